"""The rows of chapter 12's experiments, and the texts that each is trained on.

EQUAL_BYTES  a bigger batch, or harder negatives, in the bytes of one small step
PLANTED      duplicates of two kinds in every batch: as they are, masked by id, or parted by the sampler
SWEEP        temperature and learning rate, for a small and for a large batch

Letters: B queries of an update, K hard negatives of a query.
"""

import functools
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from gclib.course.experiments.recipes import Setting, scaled_rate
from gclib.course.experiments.results import pairs_and_tokenizer
from gclib.data.negatives import mine_hard_negatives, normal_form
from gclib.data.pairs import TextPair
from gclib.data.sampling import draw_batches
from gclib.support.validation import int_at_least, one_of, positive_int, positive_number, refuse

CLEAN, SAME_PASSAGE, SAME_QUERY = "clean", "same passage", "same query"
SHUFFLED, TOGETHER, PARTED = "shuffled", "together", "parted"
PARTS = 4  # that a passage is cut in where a query has several
_NAME = re.compile(r"\b(?:def|class)\s+(\w+)")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


@dataclass(frozen=True)
class Row:
    """One training. rate_factor: of the rate that grows with the root of the batch (`scaled_rate`).

    share: of the setting's updates. data: CLEAN pairs; SAME_PASSAGE, each passage under two queries; SAME_QUERY, each
    query with PARTS passages. order: SHUFFLED, with what belongs together side by side (TOGETHER), or PARTED by the
    sampler. masked: whether what an id knows as right is left out of the loss. Raises ValueError for what can't be, and
    for hard negatives with other than CLEAN pairs.
    """

    name: str
    batch_size: int
    hard_negatives: int = 0
    share: float = 1.0
    temperature: float = 0.05
    rate_factor: float = 1.0
    data: str = CLEAN
    order: str = SHUFFLED
    masked: bool = True

    def __post_init__(self) -> None:
        positive_int("batch_size", self.batch_size)
        int_at_least("hard_negatives", self.hard_negatives, 0)
        for name in ("share", "temperature", "rate_factor"):
            positive_number(name, getattr(self, name))
        if self.share > 1:
            raise refuse("share", "must be at most 1", self.share)
        if one_of("data", self.data, (CLEAN, SAME_PASSAGE, SAME_QUERY)) != CLEAN and self.hard_negatives:
            raise refuse("hard_negatives", "must be 0 with planted duplicates", self.hard_negatives)
        one_of("order", self.order, (SHUFFLED, TOGETHER, PARTED))

    @property
    def learning_rate(self) -> float:
        """The schedule's top."""
        return self.rate_factor * scaled_rate(self.batch_size)

    @property
    def passages(self) -> int:
        """In one softmax: N = B (1 + K)."""
        return self.batch_size * (1 + self.hard_negatives)


QUICK = Setting(train_pairs=1_024, passage_length=24)
WHOLE = Setting(4_096, 2_000, vocab_size=4_000)

SMALL = Row("B = 32, K = 0", 32)  # the one whose bytes all others must keep to
MIDDLE = Row("B = 128, K = 0", 128)
EQUAL_BYTES = (
    SMALL,
    Row("B = 32, K = 1", 32, 1),
    Row("B = 32, K = 7", 32, 7),
    Row("B = 32, K = 7, a fifth", 32, 7, share=0.2),  # about as many tokens as the rows with K = 0
    MIDDLE,
    Row("B = 512, K = 0", 512),
)
PLANTED = tuple(
    Row(f"{data}, {words}", 128, data=data, order=order, masked=masked)
    for data in (SAME_PASSAGE, SAME_QUERY)
    for words, order, masked in (("as it is", TOGETHER, False), ("masked", TOGETHER, True), ("parted", PARTED, True))
)
SWEEP = tuple(
    replace(row, temperature=temperature, rate_factor=factor)
    for row in (SMALL, MIDDLE)
    for temperature, factor in ((0.02, 1.0), (0.05, 1.0), (0.2, 1.0), (0.05, 2.0))
)


def texts_of(row: Row, setting: Setting) -> list[list[TextPair]]:
    """The row's pairs, those that were planted together as one group; groups have no text in common.

    Raises ValueError where the setting's pairs give too few groups for as many pairs again.
    """
    pairs = pairs_and_tokenizer(setting)[0]
    if row.data == CLEAN:
        return [[pair] for pair in _with_negatives(setting, row.hard_negatives)]
    groups = _apart(filter(None, map(two_queries if row.data == SAME_PASSAGE else several_passages, pairs)))
    count = len(pairs) // len(groups[0]) if groups else 1
    if len(groups) < count:
        raise refuse("setting", f"must have pairs for {count} groups with {row.data}", f"those for {len(groups)}")
    return groups[:count]


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


def batches_of(row: Row, setting: Setting, seed: int) -> Iterator[list[TextPair]]:
    """The row's batches, full ones only, an epoch after another: the same for the same seed."""
    return itertools.islice(_all_batches(row, setting, seed), updates_of(row, setting))


def updates_of(row: Row, setting: Setting) -> int:
    """How many updates the row takes: its share of the full batches of the setting's epochs, one at least."""
    count = sum(map(len, texts_of(row, setting)))
    if row.batch_size > count:
        raise refuse("batch_size", f"must be at most the {count} pairs", row.batch_size)
    return max(1, int(row.share * setting.epochs * (count // row.batch_size)))


def _all_batches(row: Row, setting: Setting, seed: int) -> Iterator[list[TextPair]]:
    """Without end."""
    groups = texts_of(row, setting)
    if row.order == PARTED:
        drawn = draw_batches([pair for group in groups for pair in group], row.batch_size, seed=seed)
        yield from (batch for _, batch in drawn)
    for epoch in itertools.count():
        order = list(groups) if row.order == TOGETHER else [[pair] for group in groups for pair in group]
        random.Random(f"{seed}/{epoch}").shuffle(order)
        pairs = [pair for group in order for pair in group]
        for start in range(0, len(pairs) - row.batch_size + 1, row.batch_size):
            yield pairs[start : start + row.batch_size]


def _apart(groups: Iterable[list[TextPair]]) -> list[list[TextPair]]:
    """Those groups in which no text is a twin of an earlier group's, nor of a piece beside it."""
    seen, apart = set(), []
    for group in groups:
        texts = {*(pair.query for pair in group), *(pair.passage for pair in group)}
        forms = set(map(normal_form, texts))
        if len(forms) == len(texts) and seen.isdisjoint(forms):
            apart.append(group)
            seen |= forms
    return apart


@functools.lru_cache(maxsize=4)
def _with_negatives(setting: Setting, count: int) -> Sequence[TextPair]:
    pairs = pairs_and_tokenizer(setting)[0]
    return mine_hard_negatives(pairs, per_query=count, seed=0) if count else pairs
