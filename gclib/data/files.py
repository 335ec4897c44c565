"""Text pairs from your own files: JSON lines, read without any other library, or whatever `datasets` can read."""

import json
from collections.abc import Iterator
from pathlib import Path

from gclib.data.pairs import TextPair, check_pairs, pairs_from_dataset
from gclib.support.validation import positive_int, refuse


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
    pairs = []
    for pair in _pairs(path, query, passage):
        pairs.append(pair)
        if len(pairs) == limit:
            break
    check_pairs(pairs, str(path))
    return pairs


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
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise refuse(place, rule, line.strip()[:80])
    return TextPair(texts[0], texts[1], tuple(texts[2:]))
