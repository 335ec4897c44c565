"""False negatives that are planted: pairs made of one pair, in which more than one passage is right for a query."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from gclib.data.negatives import normal_form
from gclib.data.pairs import TextPair

CLEAN, SAME_PASSAGE, SAME_QUERY, RIGHT_NEGATIVE = "clean", "same passage", "same query", "right negative"
PARTS = 4  # that a passage is cut in where a query has several
_NAME = re.compile(r"\b(?:def|class)\s+(\w+)")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


def two_queries(pair: TextPair) -> list[TextPair]:
    """The passage under its query, and under the name of the function in words; nothing where that is no other text."""
    name = _NAME.search(pair.passage)
    words = " ".join(_WORD.findall(name[1])).lower() if name else ""
    return [pair, replace(pair, query=words)] if words not in ("", pair.query.lower()) else []


def several_passages(pair: TextPair, parts: int = PARTS) -> list[TextPair]:
    """The query with each of `parts` pieces of its passage, of as many words each; nothing for less than 4 words each.

    The words of code are what white space parts.
    """
    words = pair.passage.split()
    edges = [place * len(words) // parts for place in range(parts + 1)]
    pieces = [" ".join(words[start:stop]) for start, stop in zip(edges, edges[1:], strict=False)]
    return [replace(pair, passage=piece) for piece in pieces] if len(words) >= 4 * parts else []


def right_negatives(pair: TextPair) -> list[TextPair]:
    """The query with each half of its passage, the other half as a hard negative; nothing for a short passage."""
    halves = several_passages(pair, 2) if several_passages(pair) else []
    return [replace(half, negatives=(other.passage,)) for half, other in zip(halves, halves[::-1], strict=True)]


def apart(groups: Iterable[list[TextPair]]) -> list[list[TextPair]]:
    """Those groups in which no text is a twin of an earlier group's, nor of one beside it."""
    seen, apart = set(), []
    for group in groups:
        texts = {*(pair.query for pair in group), *(pair.passage for pair in group)}
        forms = set(map(normal_form, texts))
        if len(forms) == len(texts) and seen.isdisjoint(forms):
            apart.append(group)
            seen |= forms
    return apart


PLANTERS: dict[str, Callable[[TextPair], list[TextPair]]] = {
    SAME_PASSAGE: two_queries,
    SAME_QUERY: several_passages,
    RIGHT_NEGATIVE: right_negatives,
}
