"""Text pairs from your own files: JSON lines, read without any other library, or whatever `datasets` can read.

Hard negatives come along by either way, from a column "negatives" (a list of texts) or from columns "negative",
"negative_1", "negative_2", ... (a text each, in this order). A column that is not read is told in a warning; one that
is named like hard negatives and is not read is refused.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gclib.data.pairs import SURROGATE, TextPair, check_pairs
from gclib.support.validation import one_of, positive_int, refuse

_NEGATIVES_RULE = 'and "negatives", a list of texts, if any'
_NAMES_RULE = 'must name hard negatives "negatives" (a list of texts), or "negative", "negative_1", ... (a text each)'
_NUMBERED = re.compile(r"negative_(\d+)")
_LIKE_NEGATIVES = re.compile(r"(hard[_ ]?)?neg(ative)?s?([_ ]?(passage|text|document|doc|ctx)s?)?(_?\d+)?", re.I)
_TEXT_FILES = (".csv", ".tsv", ".json", ".jsonl", ".txt")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_own_pairs(
    name_or_folder: str, split: str, *, query: str = "query", passage: str = "passage", limit: int | None = None
) -> list[TextPair]:
    """The pairs of one split: of the folder's `<split>.jsonl` where there is one, else what `datasets` finds.

    query, passage: names of the two text columns. Raises ValueError where there is nothing to be had.
    """
    folder = Path(name_or_folder)
    file = folder / f"{split}.jsonl"
    if file.is_file():
        return read_pair_file(file, query=query, passage=passage, limit=limit)
    if folder.is_file():
        raise refuse("name_or_folder", f"must be the folder that holds {split}.jsonl", f"the file {name_or_folder}")
    if any(folder.glob("*.jsonl")):
        raise refuse("name_or_folder", f"must hold a file {split}.jsonl", str(name_or_folder))
    if folder.is_dir() and not any(folder.iterdir()):
        raise refuse("name_or_folder", f"must hold a file {split}.jsonl", f"{name_or_folder}, which is empty")
    return pairs_from_dataset(name_or_folder, query=query, passage=passage, split=split, limit=limit)


def read_pair_file(
    path: Path, *, query: str = "query", passage: str = "passage", limit: int | None = None
) -> list[TextPair]:
    """One pair a line, {"query": ..., "passage": ..., "negatives": [...]}; the negatives may be left out, by all lines.

    limit: the first so many. The file is UTF-8, with or without a byte order mark; empty lines are passed over. Of a
    key that stands twice in a line the last is read, with a warning. Raises ValueError naming the line that is no pair
    (not JSON, not UTF-8, a text missing or none: see `TextPair`), or that has another number of negatives than the
    first.
    """
    if limit is not None:
        positive_int("limit", limit)
    reader = _Reader(str(path), "line", "a JSON object", query, passage)
    return check_pairs(reader.read(_lines(Path(path), reader), limit), str(path))


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

    name_or_folder: a name on the Hugging Face hub, such as "sentence-transformers/natural-questions" (needs a network),
    a folder of CSV, JSON or Parquet files, or one that `save_to_disk` wrote (a single table is "test" if it was taken
    from that split, else "train"). query, passage: the names of the two text columns. config: which of the set's
    configurations. Rows without text in either are left out, with a warning that counts them.

    Raises ValueError where `datasets` is not installed, the set can't be had, a column or split is missing, a row is no
    pair (see `TextPair`), or no row is one.
    """
    if limit is not None:
        positive_int("limit", limit)
    rows = _dataset(str(name_or_folder), config, split)
    for argument, column in (("query", query), ("passage", passage)):
        if column not in rows.column_names:
            raise refuse(argument, f"must be one of the columns {', '.join(rows.column_names)}", column)
    reader = _Reader(str(name_or_folder), "row", "a row", query, passage)
    used = reader.columns(rows.column_names, "its columns")
    pairs = reader.read(enumerate(rows.select_columns(list(dict.fromkeys(used))), start=1), limit)
    return check_pairs(pairs, str(name_or_folder))


@dataclass
class _Reader:
    """The rules of one source of rows, whatever it is kept in, and what there is to tell of it at the end."""

    source: str
    unit: str  # what a row is called: "line"
    kind: str  # what it must be: "a JSON object"
    query: str
    passage: str
    unread: dict[str, None] = field(default_factory=dict)
    doubled: list[str] = field(default_factory=list)

    def read(self, rows: Iterable[tuple[int, Any]], limit: int | None) -> list[TextPair]:
        """The first `limit` pairs of the numbered rows, all with as many negatives; then a warning, if need be."""
        pairs: list[TextPair] = []
        without_text = 0
        for number, row in rows:
            place = f"{self.source}, {self.unit} {number},"
            if self.unit == "row" and any(_is_blank(row[column]) for column in (self.query, self.passage)):
                without_text += 1
                continue
            pair = self.pair(row, place)
            if pairs and len(pair.negatives) != len(pairs[0].negatives):
                rule = f"must have as many hard negatives as the first pair, {len(pairs[0].negatives)}"
                raise refuse(place, rule, len(pair.negatives))
            pairs.append(pair)
            if len(pairs) == limit:
                break
        self._tell(without_text)
        return pairs

    def _tell(self, without_text: int) -> None:
        """Warn of what was left out, and of what could be read otherwise."""
        notes = []
        if without_text:
            notes.append(f"{without_text} rows have no text as {self.query!r} or {self.passage!r}, and are left out")
        if self.unread:
            names = ", ".join(map(repr, self.unread))
            notes.append(f"read are {self.query!r}, {self.passage!r} and hard negatives; not read: {names}")
        if self.doubled:
            more = f" (and {len(self.doubled) - 1} more like it)" if len(self.doubled) > 1 else ""
            notes.append(f"{self.doubled[0]} more than once, of which the last is read{more}")
        for note in notes:
            warnings.warn(f"{self.source}: {note}", stacklevel=4)

    def pair(self, row: Any, place: str) -> TextPair:
        """The pair that a row holds; ValueError that says which part of it is none."""
        rule = f'must be {self.kind} with texts "{self.query}" and "{self.passage}", {_NEGATIVES_RULE}'
        if not isinstance(row, Mapping):
            raise refuse(place, rule, f"the {type(row).__name__} {row!r:.80}")
        for column in (self.query, self.passage):
            if column not in row:
                raise refuse(place, rule, f'no "{column}" among {", ".join(map(repr, row))}'[:160])
        _, _, *columns = self.columns(row, place)
        negatives = row["negatives"] if columns == ["negatives"] else [row[column] for column in columns]
        try:
            return TextPair(row[self.query], row[self.passage], negatives)
        except ValueError as error:
            raise refuse(place, rule, f"a row in which {error}") from error

    def columns(self, names: Iterable[str], place: str) -> list[str]:
        """The columns to read: query, passage, and those of hard negatives. The others are noted, or refused."""
        others = [name for name in names if name not in (self.query, self.passage)]
        numbered = sorted((name for name in others if _NUMBERED.fullmatch(name)), key=lambda name: int(name[9:]))
        single = ["negative"] * ("negative" in others) + numbered
        if "negatives" in others and single:
            raise refuse(place, _NAMES_RULE, ", ".join(map(repr, ["negatives", *single])))
        used = single or ["negatives"] * ("negatives" in others)
        for name in others:
            if name not in used and _LIKE_NEGATIVES.fullmatch(name):
                raise refuse(place, _NAMES_RULE, name)
            if name not in used:
                self.unread[name] = None
        return [self.query, self.passage, *used]


class JsonObject(dict):
    """A JSON object, and the keys that stand in it more than once."""

    def __init__(self, items: list[tuple[str, Any]]):
        super().__init__(items)
        keys = [key for key, _ in items]
        self.doubled = [key for key in self if keys.count(key) > 1] if len(self) < len(keys) else []


def _lines(path: Path, reader: _Reader) -> Iterator[tuple[int, Any]]:
    """(number, value) for each line with something in it; ValueError for one that is not UTF-8 or not JSON."""
    rule = f'must be a JSON object with texts "{reader.query}" and "{reader.passage}"'
    for number, line in _utf8_lines(path):
        text = line.lstrip("\ufeff")  # files that were joined have the mark in their midst
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=JsonObject)
        except (ValueError, RecursionError) as error:
            raise refuse(f"{path}, line {number},", rule, f"{text.strip()[:80]} ({error})") from error
        reader.doubled.extend(f"line {number} has the key {key!r}" for key in getattr(row, "doubled", ()))
        yield number, row


def _utf8_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file; ValueError for one that can't be read, or that is not UTF-8."""
    rule = "must be UTF-8 text (save the file as UTF-8)"
    try:
        lines = path.open(encoding="utf-8", errors="surrogateescape")  # bytes that are not UTF-8 become surrogates
    except OSError as error:
        raise refuse("path", "must be a file that can be read", f"{path}: {error.strerror}") from error
    with lines:
        for number, line in enumerate(lines, start=1):
            wrong = None if line.isascii() else SURROGATE.search(line)
            if wrong:
                byte = ord(wrong[0]) - 0xDC00
                looks = ", as UTF-16 begins" if wrong.start() == 0 and byte in (0xFE, 0xFF) else ""
                got = f"the byte 0x{byte:02x} as character {wrong.start() + 1}{looks}"
                raise refuse(f"{path}, line {number},", rule, got)
            if "\0" in line:
                raise refuse(f"{path}, line {number},", rule, "a zero byte, as UTF-16 and UTF-32 have them")
            yield number, line


def _dataset(name_or_folder: str, config: str | None, split: str) -> Any:
    """One split of the set as `datasets` gives it."""
    is_folder = Path(name_or_folder).is_dir()
    if not is_folder and not _HUB_NAME.fullmatch(name_or_folder):
        rule = "must be a retrieval set: a folder that exists, or a name on the Hugging Face hub"
        raise refuse("name_or_folder", rule, name_or_folder)
    try:
        import datasets
    except ImportError as error:
        missing = "holds no JSON lines (.jsonl)" if is_folder else "is no folder here"
        what = "to read its other files" if is_folder else "to look for it on the Hugging Face hub"
        rule = f"{missing}, and {what} needs the datasets library (pip install datasets)"
        raise refuse("name_or_folder", rule, f"{name_or_folder!r} and no such library") from error
    try:
        if any(Path(name_or_folder, name).is_file() for name in ("state.json", "dataset_dict.json")):  # saved to disk
            splits = datasets.load_from_disk(name_or_folder)
        else:
            splits = datasets.load_dataset(name_or_folder, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        for file in sorted(Path(name_or_folder).rglob("*")):
            if file.suffix in _TEXT_FILES and file.is_file():
                for _ in _utf8_lines(file):  # says which line is to blame, if it is the encoding
                    pass
        missing = "" if is_folder else "; there is no such folder here"
        rule = f"must be a retrieval set that can be read ({error.__cause__ or error}{missing})"
        raise refuse("name_or_folder", rule, name_or_folder) from error
    if not isinstance(splits, dict):  # one table that `Dataset.save_to_disk` wrote
        splits = {"test" if re.match(r"test\b", str(splits.split)) else "train": splits}
    return splits[one_of("split", split, tuple(splits))]


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())
