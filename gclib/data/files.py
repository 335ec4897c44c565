"""Text pairs from your own files: JSON lines, read without any other library, or whatever `datasets` can read."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gclib.data.pairs import TextPair, check_pairs
from gclib.support.validation import one_of, positive_int, refuse


def load_own_pairs(
    name_or_folder: str, split: str, *, query: str = "query", passage: str = "passage", limit: int | None = None
) -> list[TextPair]:
    """The pairs of one split: of the folder's `<split>.jsonl` where there is one, else what `datasets` finds.

    query, passage: names of the two text columns. Raises ValueError where there is nothing to be had.
    """
    file = Path(name_or_folder, f"{split}.jsonl")
    if file.is_file():
        return read_pair_file(file, query=query, passage=passage, limit=limit)
    if any(Path(name_or_folder).glob("*.jsonl")):
        raise refuse("name_or_folder", f"must hold a file {split}.jsonl", str(name_or_folder))
    return pairs_from_dataset(name_or_folder, query=query, passage=passage, split=split, limit=limit)


def read_pair_file(
    path: Path, *, query: str = "query", passage: str = "passage", limit: int | None = None
) -> list[TextPair]:
    """One pair a line, {"query": ..., "passage": ..., "negatives": [...]}; the negatives may be left out, by all lines.

    limit: the first so many. Raises ValueError naming the line that is no pair, and for lines with unlike numbers of
    negatives.
    """
    if limit is not None:
        positive_int("limit", limit)
    return check_pairs(list(itertools.islice(_pairs(path, query, passage), limit)), str(path))


def pairs_from_dataset(
    name_or_folder: str,
    *,
    query: str = "query",
    passage: str = "answer",
    config: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> list[TextPair]:
    """Pairs out of a public retrieval set, or a local folder of its files, through the `datasets` library.

    name_or_folder: a name on the Hugging Face hub, such as "sentence-transformers/natural-questions" (needs a
    network), a folder of CSV, JSON or Parquet files, or one that `save_to_disk` wrote. query, passage: the names of
    the two text columns. config: which of the set's configurations. Rows without text in either are left out.

    Raises ValueError where `datasets` is not installed, the set can't be had, or a column or split is missing.
    """
    if limit is not None:
        positive_int("limit", limit)
    rows = _dataset(str(name_or_folder), config, split)
    for argument, column in (("query", query), ("passage", passage)):
        if column not in rows.column_names:
            raise refuse(argument, f"must be one of the columns {', '.join(rows.column_names)}", column)
    pairs = (TextPair(row[query], row[passage]) for row in rows if _has_text(row[query]) and _has_text(row[passage]))
    return list(itertools.islice(pairs, limit))


def _pairs(path: Path, query: str, passage: str) -> Iterator[TextPair]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _pair(line, f"{path}, line {number},", query, passage)


def _pair(line: str, place: str, query: str, passage: str) -> TextPair:
    rule = f'must be a JSON object with texts "{query}" and "{passage}", and "negatives", a list of texts, if any'
    try:
        row = json.loads(line)
        texts = [row[query], row[passage], *row.get("negatives", ())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse(place, rule, line.strip()[:80]) from error
    if not all(map(_has_text, texts)):
        raise refuse(place, rule, line.strip()[:80])
    return TextPair(texts[0], texts[1], tuple(texts[2:]))


def _dataset(name_or_folder: str, config: str | None, split: str) -> Any:
    """One split of the set as `datasets` gives it."""
    try:
        import datasets
    except ImportError as error:
        rule = "needs the datasets library (pip install datasets)"
        raise refuse("name_or_folder", rule, f"{name_or_folder!r} and no such library") from error
    try:
        if _was_saved_to_disk(name_or_folder):
            splits = datasets.load_from_disk(name_or_folder)
        else:
            splits = datasets.load_dataset(name_or_folder, config)
    except (OSError, ValueError) as error:
        raise refuse("name_or_folder", f"must be a retrieval set that can be read ({error})", name_or_folder) from error
    return splits[one_of("split", split, tuple(splits))] if isinstance(splits, dict) else splits


def _was_saved_to_disk(folder: str) -> bool:
    """Whether `save_to_disk` wrote the folder: a set, or a dictionary of splits."""
    return any(Path(folder, name).is_file() for name in ("state.json", "dataset_dict.json"))


def _has_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
