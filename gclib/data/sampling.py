"""What stands together in a batch: every pair once an epoch, and beside no text that would be a false negative.

Two pairs meet badly in a batch where the one holds, as its query, its passage or a hard negative, a twin of the other's
query or of a passage that is right for it (`gclib.data.negatives` says what twins and right passages are): the loss
would push a right passage away. That two pairs have a hard negative in common does no harm.

An epoch is a shuffle, cut into batches. Where pairs meet badly it is drawn anew: those with the most twins are dealt
out first, in turn to all batches; what then fits nowhere takes the place of the pairs that are in its way, which look
for another one (ejection chains, as in timetabling). Only what still fits nowhere meets its twins, and is told.

Letters: n pairs, B of them a batch, n // B batches an epoch.
"""

import itertools
import random
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gclib.data.negatives import twin_numbers
from gclib.data.pairs import TextPair, check_pairs
from gclib.support.validation import int_at_least, positive_int, refuse

_NONE: frozenset[int] = frozenset()
SCANNED = 64  # batches that are tried in turn for a pair, before it has to look for a place
SAMPLED = 16  # batches among which a pair looks for the one with the fewest in its way
ATTEMPTS = 4  # orders that are tried
PATIENCE = 1_000  # moves without a pair more in its place, after which the search ends


def draw_batches(
    pairs: Sequence[TextPair], batch_size: int, *, seed: int, epoch: int = 0, batch: int = 0
) -> Iterator[tuple[int, list[TextPair]]]:
    """(epoch, batch) without end: full batches only, n // B of them an epoch, each pair once in it.

    Each epoch has an order of its own, by `seed` and epoch; the n % B pairs that fill no batch are left out of it. No
    batch holds a false negative (this module's docstring says what that is) where an order without them was found. Else
    a UserWarning says, before the first batch, how many queries meet one: more twins than an epoch has batches can't be
    parted, and are spread evenly. It says too where a pair's own hard negative is right for its query.

    epoch, batch: begin in this epoch, after so many of its batches. Raises ValueError for no pairs, unlike numbers of
    hard negatives, a batch larger than the pairs, or a seed, epoch or batch below 0.
    """
    check_pairs(pairs)
    if positive_int("batch_size", batch_size) > len(pairs):
        raise refuse("batch_size", f"must be at most the number of pairs, {len(pairs)}", batch_size)
    for name, value in (("seed", seed), ("epoch", epoch), ("batch", batch)):
        int_at_least(name, value, 0)
    texts = _Texts.of(pairs)
    if texts.own_faults:
        first, count = texts.own_faults[0], len(texts.own_faults)
        warnings.warn(f"{count} pairs have a hard negative that is right for their own query: {first}", stacklevel=2)
    drawn = _epoch(texts, batch_size, seed, epoch)
    _tell(texts, drawn)
    return itertools.islice(_drawn(pairs, texts, drawn, seed, epoch), batch, None)


@dataclass(frozen=True)
class _Texts:
    """The texts of n pairs as numbers, the same for twins; only those that stand in several pairs.

    own: the query and the passage of each pair; pairs that have one in common can't be in one batch. right: its query
    and all that is right for it. held: its query, passage and hard negatives. twins: of each number, how many pairs
    have it as their own. own_faults: pairs with a hard negative that is right for them, as words.
    """

    own: list[frozenset[int]]
    right: list[frozenset[int]]
    held: list[frozenset[int]]
    twins: Counter[int]
    own_faults: list[str]

    @classmethod
    def of(cls, pairs: Sequence[TextPair]) -> "_Texts":
        numbers = twin_numbers([text for pair in pairs for text in (pair.query, pair.passage, *pair.negatives)])
        size = 2 + len(pairs[0].negatives)
        rows = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        repeated = {number for number, count in Counter(numbers).items() if count > 1}
        passages = defaultdict(set)
        for query, passage, *_ in rows:
            passages[query].update((query, passage))
        own, right, held, faults = [], [], [], []
        for place, row in enumerate(rows):
            if repeated.isdisjoint(row):
                own.append(_NONE), right.append(_NONE), held.append(_NONE)
                continue
            own.append(repeated.intersection(row[:2]))
            right.append(repeated & passages[row[0]])
            held.append(repeated.intersection(row))
            if not right[-1].isdisjoint(row[2:]):
                faults.append(f"pairs[{place}]")
        return cls(own, right, held, Counter(itertools.chain.from_iterable(own)), faults)

    def meeting(self, batch: Sequence[int]) -> int:
        """How many pairs of the batch meet another one badly."""
        batch = [row for row in batch if self.held[row]]
        right = Counter(itertools.chain.from_iterable(self.right[row] for row in batch))
        held = Counter(itertools.chain.from_iterable(self.held[row] for row in batch))
        return sum(
            any(right[number] > (number in self.right[row]) for number in self.held[row])
            or any(held[number] > (number in self.held[row]) for number in self.right[row])
            for row in batch
        )


def _drawn(
    pairs: Sequence[TextPair], texts: _Texts, first: list[list[int]], seed: int, epoch: int
) -> Iterator[tuple[int, list[TextPair]]]:
    warned, batches = any(map(texts.meeting, first)), first
    for number in itertools.count(epoch):
        if number > epoch:
            batches = _epoch(texts, len(first[0]), seed, number)
            if not warned:
                warned = _tell(texts, batches)
        for batch in batches:
            yield number, [pairs[row] for row in batch]


def _tell(texts: _Texts, batches: list[list[int]]) -> bool:
    """Warn where pairs of the epoch's batches meet badly; whether any do."""
    meeting, rows = sum(map(texts.meeting, batches)), sum(map(len, batches))
    if meeting:
        most, size = max(texts.twins.values(), default=1), len(batches[0])
        why = "which can't be parted" if most > len(batches) else "and no order was found that parts them"
        harm = f"{meeting} of an epoch's {rows} queries meet a false negative in their batch"
        cause = f"one text belongs to {most} pairs, and an epoch has {len(batches)} batches of {size}, {why}"
        warnings.warn(f"{harm}: {cause}; smaller batches have fewer of them", stacklevel=3)
    return bool(meeting)


def _epoch(texts: _Texts, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of each batch of one epoch."""
    order = list(range(len(texts.right)))
    generator = random.Random(f"{seed}/{epoch}")
    generator.shuffle(order)
    count = len(order) // batch_size
    batches = [order[start : start + batch_size] for start in range(0, count * batch_size, batch_size)]
    if not any(map(texts.meeting, batches)):
        return batches
    fewest = len(order) + 1
    for _ in range(ATTEMPTS):
        table = _Table(texts, count, batch_size, generator)
        table.fill(order)
        meeting = sum(map(texts.meeting, table.batches))
        if meeting < fewest:
            fewest, batches = meeting, table.batches
        if not meeting or table.surplus:
            break
        generator.shuffle(order)
    for batch in batches:
        generator.shuffle(batch)
    generator.shuffle(batches)
    return batches


class _Table:
    """The batches of one epoch while they are filled."""

    def __init__(self, texts: _Texts, count: int, batch_size: int, generator: random.Random):
        self.texts, self.batch_size, self.generator = texts, batch_size, generator
        self.batches: list[list[int]] = [[] for _ in range(count)]
        self.right: list[Counter[int]] = [Counter() for _ in range(count)]
        self.held: list[Counter[int]] = [Counter() for _ in range(count)]
        self.empty = count * batch_size  # places
        self.surplus = False  # whether there are more twins than batches to part them, and others to leave out

    def fill(self, order: Sequence[int]) -> None:
        """Give every place to one of the rows: those with most twins first, in turn; the last ones are left out."""
        turn, waiting, surplus = 0, deque(), deque()
        placed: Counter[int] = Counter()
        for row in self._most_twins_first(order):
            if any(placed[number] >= len(self.batches) for number in self.texts.own[row]):
                surplus.append(row)  # each batch has a twin of it
                continue
            placed.update(self.texts.own[row])
            in_turn = (place % len(self.batches) for place in range(turn, turn + min(len(self.batches), SCANNED)))
            batch = next((batch for batch in in_turn if self._has_room(batch) and self._fits(row, batch)), None)
            if batch is None:
                waiting.append(row)
            else:
                self._put(row, batch)
                turn = batch + 1
        self._search(waiting)
        rest = waiting + surplus
        self.surplus = len(surplus) > len(order) - len(self.batches) * self.batch_size
        open_batches = itertools.cycle(range(len(self.batches)))
        while self.empty:
            batch = next(open_batches)
            if self._has_room(batch):
                self._put(rest.popleft(), batch)

    def _most_twins_first(self, order: Sequence[int]) -> list[int]:
        """The rows that are right for most pairs first, twins side by side, else in the order given."""
        twins, first = self.texts.twins, {}
        leaders = [max(own, key=lambda number: (twins[number], number), default=-1) for own in self.texts.own]
        for place, row in enumerate(order):
            first.setdefault(leaders[row], place)
        held = self.texts.held
        return sorted(order, key=lambda row: (not held[row], -twins[leaders[row]], first[leaders[row]]))

    def _search(self, waiting: deque[int]) -> None:
        """Place the waiting rows where the fewest others are in the way, which wait then; until nothing improves."""
        best, moves = self.empty, 0
        while waiting and self.empty and moves < PATIENCE:
            row = waiting.popleft()
            sample = self.generator.sample(range(len(self.batches)), min(len(self.batches), SAMPLED))
            in_the_way = {batch: self._in_the_way(row, batch) for batch in sample}
            batch = min(sample, key=lambda batch: len(in_the_way[batch]))
            for other in in_the_way[batch]:
                self._take(other, batch)
                waiting.append(other)
            self._put(row, batch)
            best, moves = (self.empty, 0) if self.empty < best else (best, moves + 1)

    def _in_the_way(self, row: int, batch: int) -> list[int]:
        """The rows that must leave the batch for this one: its twins there, or any where the batch is full."""
        rows = self.batches[batch]
        twins = [] if self._fits(row, batch) else [other for other in rows if self._meet(row, other)]
        return twins or ([] if self._has_room(batch) else [self.generator.choice(rows)])

    def _meet(self, row: int, other: int) -> bool:
        right, held = self.texts.right, self.texts.held
        return not (right[row].isdisjoint(held[other]) and held[row].isdisjoint(right[other]))

    def _fits(self, row: int, batch: int) -> bool:
        held, right = self.held[batch], self.right[batch]
        return held.keys().isdisjoint(self.texts.right[row]) and right.keys().isdisjoint(self.texts.held[row])

    def _has_room(self, batch: int) -> bool:
        return len(self.batches[batch]) < self.batch_size

    def _put(self, row: int, batch: int) -> None:
        self.batches[batch].append(row)
        self.right[batch].update(self.texts.right[row])
        self.held[batch].update(self.texts.held[row])
        self.empty -= 1

    def _take(self, row: int, batch: int) -> None:
        self.batches[batch].remove(row)
        for counts, numbers in ((self.right[batch], self.texts.right[row]), (self.held[batch], self.texts.held[row])):
            counts.subtract(numbers)
            for number in numbers:
                if not counts[number]:
                    del counts[number]
        self.empty += 1
