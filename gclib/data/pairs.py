"""Text pairs: a query, the passage that answers it, and K hard negatives that look right and are not."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gclib.data.corpus import SPLITS, load_corpus
from gclib.support.validation import one_of, positive_int, refuse

SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class TextPair:
    """A query, the passage that answers it, and K passages that look right and are not.

    Raises ValueError for a text that is none: another type, nothing but white space, or half of a surrogate pair in it
    (what is left of an emoji that was cut); and for negatives that are no list or tuple of texts.
    """

    query: str
    passage: str
    negatives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.negatives, (list, tuple)):
            got = f"the {type(self.negatives).__name__} {self.negatives!r:.80}"
            raise refuse("negatives", "must be a list of texts", got)
        object.__setattr__(self, "negatives", tuple(self.negatives))
        check_text("query", self.query)
        check_text("passage", self.passage)
        for number, text in enumerate(self.negatives):
            check_text(f"negatives[{number}]", text)


def load_pairs(split: str = "train", *, limit: int | None = None, progress: bool = True) -> list[TextPair]:
    """(docstring's first paragraph, function source without it) pairs of the installed packages.

    split: "train" or "test"; no file gave pairs to both. limit: the first so many; the order is as good as random
    and always the same, so they are a sample of all packages. progress: show a bar while the corpus is mined, which
    happens once for each set of package versions; later starts read the cache (see data/README.md).

    Raises ValueError for an unknown split or a limit below 1.
    """
    one_of("split", split, SPLITS)
    if limit is not None:
        positive_int("limit", limit)
    rows = load_corpus(progress=progress).split(split)
    return [TextPair(row.query, row.passage) for row in rows[:limit]]


def check_text(argument: str, value: Any) -> str:
    """`value`, if it is a text of whole characters with more than white space in it; ValueError otherwise."""
    if not isinstance(value, str):
        raise refuse(argument, "must be a text", f"the {type(value).__name__} {value!r:.80}")
    if not value or value.isspace():
        raise refuse(argument, "must be a text with more than white space in it", value[:80])
    half = None if value.isascii() else SURROGATE.search(value)
    if half:
        got = f"the lone surrogate {half[0]!r} as character {half.start() + 1}"
        raise refuse(argument, "must be a text of whole characters", got)
    return value


def texts_of(pairs: Sequence[TextPair]) -> list[str]:
    """Every text of the pairs: query, passage, negatives, pair by pair."""
    return [text for pair in pairs for text in (pair.query, pair.passage, *pair.negatives)]


def check_pairs(pairs: Any, argument: str = "pairs", *, same_negatives: bool = True) -> Sequence[TextPair]:
    """`pairs`, if it is a sequence of at least one TextPair, all with as many hard negatives; ValueError otherwise.

    same_negatives: False where their number may differ from pair to pair.
    """
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or len(pairs) == 0:
        got = "none" if isinstance(pairs, Sequence) and not isinstance(pairs, str) else type(pairs).__name__
        raise refuse(argument, "must be a list of at least one TextPair", got)
    for number, pair in enumerate(pairs):
        if not isinstance(pair, TextPair):
            raise refuse(f"{argument}[{number}]", "must be a TextPair", type(pair).__name__)
        if same_negatives and len(pair.negatives) != len(pairs[0].negatives):
            rule = f"must have as many negatives as {argument}[0], {len(pairs[0].negatives)}"
            raise refuse(f"{argument}[{number}]", rule, len(pair.negatives))
    return pairs
