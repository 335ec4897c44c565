"""The rows of chapter 12's experiments, and the texts that each is trained on.

EQUAL_BYTES  a bigger batch, or harder negatives, in the bytes of one small step
PLANTED      false negatives of three kinds in every batch: as they are, masked, or parted by the sampler
SWEEP        temperature and learning rate, for a small and for a large batch

Letters: B queries of an update, K hard negatives of a query.
"""

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gclib.course.experiments.contents.planting import (
    CLEAN,
    PLANTERS,
    RIGHT_NEGATIVE,
    SAME_PASSAGE,
    SAME_QUERY,
    apart,
)
from gclib.course.experiments.recipes import TableSetting, scaled_rate
from gclib.course.experiments.results import pairs_and_tokenizer
from gclib.data.negatives import mine_hard_negatives
from gclib.data.pairs import TextPair
from gclib.data.sampling import draw_batches
from gclib.support.validation import int_at_least, one_of, positive_int, positive_number, refuse

SHUFFLED, TOGETHER, PARTED = "shuffled", "together", "parted"


@dataclass(frozen=True)
class Row:
    """One training. rate_factor: of the rate that grows with the root of the batch (`scaled_rate`).

    share: of the setting's updates. data: CLEAN pairs; SAME_PASSAGE, each passage under two queries; SAME_QUERY, each
    query with PARTS passages; RIGHT_NEGATIVE, each query with both halves of its passage, the one as the other's hard
    negative. order: SHUFFLED, with what belongs together side by side (TOGETHER), or PARTED by the sampler. masked:
    whether what the batch itself shows to be right is left out of the loss. Raises ValueError for what can't be.
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
        planted = int(one_of("data", self.data, (CLEAN, *PLANTERS)) == RIGHT_NEGATIVE)
        if self.data != CLEAN and self.hard_negatives != planted:
            raise refuse("hard_negatives", f"must be {planted} with {self.data}", self.hard_negatives)
        one_of("order", self.order, (SHUFFLED, TOGETHER, PARTED))

    @property
    def learning_rate(self) -> float:
        """The schedule's top."""
        return self.rate_factor * scaled_rate(self.batch_size)

    @property
    def passages(self) -> int:
        """In one softmax: N = B (1 + K)."""
        return self.batch_size * (1 + self.hard_negatives)


QUICK = TableSetting(train_pairs=1_024, passage_length=24)
WHOLE = TableSetting(4_096, 2_000, vocab_size=4_000)

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
    Row(f"{data}, {words}", 16, int(data == RIGHT_NEGATIVE), data=data, order=order, masked=words != "as it is")
    for data, words, order in (
        (SAME_PASSAGE, "as it is", TOGETHER),
        (SAME_PASSAGE, "masked", TOGETHER),
        (SAME_QUERY, "as it is", TOGETHER),
        (SAME_QUERY, "masked", TOGETHER),
        (SAME_QUERY, "parted", PARTED),
        (RIGHT_NEGATIVE, "as it is", TOGETHER),
        (RIGHT_NEGATIVE, "masked", TOGETHER),
    )
)
SWEEP = tuple(
    replace(row, temperature=temperature, rate_factor=factor)
    for row in (SMALL, MIDDLE)
    for temperature, factor in ((0.02, 1.0), (0.05, 1.0), (0.2, 1.0), (0.05, 2.0))
)


def texts_of(row: Row, setting: TableSetting) -> list[list[TextPair]]:
    """The row's pairs, those that were planted together as one group; groups have no text in common.

    Raises ValueError where the setting's pairs give too few groups for as many pairs again.
    """
    if row.data == CLEAN:
        return [[pair] for pair in _with_negatives(setting, row.hard_negatives)]
    return list(_planted(setting, row.data))


def batches_of(row: Row, setting: TableSetting, seed: int) -> Iterator[list[TextPair]]:
    """The row's batches, full ones only, an epoch after another: the same for the same seed."""
    return itertools.islice(_all_batches(row, setting, seed), updates_of(row, setting))


def updates_of(row: Row, setting: TableSetting) -> int:
    """How many updates the row takes: its share of the full batches of the setting's epochs, one at least."""
    count = sum(map(len, texts_of(row, setting)))
    if row.batch_size > count:
        raise refuse("batch_size", f"must be at most the {count} pairs", row.batch_size)
    return max(1, int(row.share * setting.epochs * (count // row.batch_size)))


def _all_batches(row: Row, setting: TableSetting, seed: int) -> Iterator[list[TextPair]]:
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


@functools.lru_cache(maxsize=4)
def _with_negatives(setting: TableSetting, count: int) -> Sequence[TextPair]:
    pairs = pairs_and_tokenizer(setting)[0]
    return mine_hard_negatives(pairs, per_query=count, seed=0) if count else pairs


@functools.lru_cache(maxsize=4)
def _planted(setting: TableSetting, data: str) -> Sequence[list[TextPair]]:
    pairs = pairs_and_tokenizer(setting)[0]
    groups = apart(filter(None, map(PLANTERS[data], pairs)))
    count = len(pairs) // len(groups[0]) if groups else 1
    if len(groups) < count:
        raise refuse("setting", f"must have pairs for {count} groups with {data}", f"those for {len(groups)}")
    return groups[:count]
