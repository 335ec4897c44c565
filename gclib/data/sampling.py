"""What stands together in a batch: every pair once an epoch, and beside no text that would be a false negative.

Two pairs meet badly in a batch where the one holds, as its query, its passage or a hard negative, a twin of the other's
query or of a passage that is right for it (`gclib.data.negatives` says what twins and right passages are): the loss
would push a right passage away. That two pairs have a hard negative in common does no harm.

An epoch is a shuffle, cut into batches. Where pairs meet badly it is drawn anew: those with the most twins are dealt
out first, in turn to all batches; what then fits nowhere takes the place of the pairs that are in its way, which look
for another one (ejection chains, as in timetabling). Only what still fits nowhere meets its twins, and is told.

Pairs may have an id too (a class, a document, a user): those with the same id are kept apart as twins are. Several data
sets may take turns, each batch of one of them (`draw_from_sources`), and texts with class labels are paired anew each
epoch (`draw_class_batches`). Every process draws the same batches and takes its own rows of each, so what is true of a
batch is true across processes.

Letters: n pairs, B of them a batch, n // B batches an epoch; W processes.
"""

import itertools
import random
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gclib.data.negatives import twin_numbers
from gclib.data.pairs import TextPair, check_pairs, texts_of
from gclib.support.validation import int_at_least, positive_int, refuse

_NONE: frozenset[int] = frozenset()
SCANNED = 64  # batches that are tried in turn for a pair, before it has to look for a place
SAMPLED = 16  # batches among which a pair looks for the one with the fewest in its way
ATTEMPTS = 4  # orders that are tried
PATIENCE = 1_000  # moves without a pair more in its place, after which the search ends


def draw_batches(
    pairs: Sequence[TextPair],
    batch_size: int,
    *,
    seed: int,
    epoch: int = 0,
    batch: int = 0,
    ids: Sequence[Hashable] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[int, list[TextPair]]]:
    """(epoch, batch) without end: full batches only, n // B of them an epoch, each pair once in it.

    Each epoch has an order of its own, by `seed` and epoch; the n % B pairs that fill no batch are left out of it. No
    batch holds a false negative (this module's docstring says what that is) where an order without them was found. Else
    a UserWarning says, before the first batch, how many queries meet one: more twins than an epoch has batches can't be
    parted, and are spread evenly. It says too where a pair's own hard negative is right for its query.

    epoch, batch: begin in this epoch, after so many of its batches. ids: one for each pair, None for a pair without;
    pairs with the same id are twins. rank, world_size: give this process's rows of each batch of all W processes.
    Raises ValueError for no pairs, unlike numbers of hard negatives or of ids, a batch larger than the pairs or too
    small for the processes, or a seed, epoch or batch below 0.
    """
    check_pairs(pairs)
    _check_place(batch_size, len(pairs), seed, epoch, batch)
    rows = rows_of_rank(batch_size, rank, world_size)
    ids = None if ids is None else _hashable("ids", ids)
    if ids is not None and len(ids) != len(pairs):
        raise refuse("ids", f"must be one for each of the {len(pairs)} pairs", f"{len(ids)} ids")
    texts = _Texts.of(pairs, ids)
    if texts.own_faults:
        first, count = texts.own_faults[0], len(texts.own_faults)
        warnings.warn(f"{count} pairs have a hard negative that is right for their own query: {first}", stacklevel=2)
    drawn = _epoch(texts, batch_size, seed, epoch)
    warned = _tell(texts, drawn)
    batches = itertools.islice(_drawn(pairs, texts, drawn, warned, seed, epoch), batch, None)
    return ((number, members[rows]) for number, members in batches)


def draw_from_sources(
    sources: Mapping[str, Sequence[TextPair]],
    batch_size: int,
    *,
    seed: int,
    epoch: int = 0,
    batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[int, str, list[TextPair]]]:
    """(epoch, source's name, batch) without end: each batch from one data set, as `draw_batches` draws it.

    An epoch has all full batches of every source, in an order of its own: a source comes as often as it is large. In a
    batch of one source the negatives are of the query's own kind. sources: pairs by name; those of different sources
    may have unlike numbers of hard negatives. Other arguments, and ValueError, as in `draw_batches`.
    """
    if not isinstance(sources, Mapping) or not sources:
        raise refuse("sources", "must be a mapping of at least one name to its pairs", type(sources).__name__)
    for name, pairs in sources.items():
        check_pairs(pairs, f"sources[{name!r}]")
        _check_place(batch_size, len(pairs), seed, epoch, batch, of=f"pairs of {name!r}")
    counts = {name: len(pairs) // batch_size for name, pairs in sources.items()}
    before = Counter(itertools.islice(_turns(counts, seed, epoch), batch))
    same = {"seed": seed, "epoch": epoch, "rank": rank, "world_size": world_size}
    drawn = {name: draw_batches(pairs, batch_size, batch=before[name], **same) for name, pairs in sources.items()}
    turns = itertools.islice(_turns(counts, seed, epoch), batch, None)
    return ((number, name, members) for name in turns for number, members in [next(drawn[name])])


def draw_class_batches(
    texts: Sequence[str],
    labels: Sequence[Hashable],
    batch_size: int,
    *,
    seed: int,
    epoch: int = 0,
    batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[int, list[TextPair]]]:
    """(epoch, batch) without end, of texts with class labels: `class_pairs` of each epoch, each class once a batch.

    Two texts of one class are a query and its passage; a batch holds no second pair of their class, whose texts would
    be false negatives, where there are batches enough (else a UserWarning says how many meet one; a mask of `SameIds`
    takes them out). Other arguments, and ValueError, as in `draw_batches` and `class_pairs`.
    """
    count = len(class_pairs(texts, labels, seed=seed, epoch=epoch)[0])
    _check_place(batch_size, count, seed, epoch, batch, of="pairs of the classes")

    def batches() -> Iterator[tuple[int, list[TextPair]]]:
        for number in itertools.count(epoch):
            pairs, ids = class_pairs(texts, labels, seed=seed, epoch=number)
            same = {"rank": rank, "world_size": world_size, "ids": ids}
            drawn = draw_batches(pairs, batch_size, seed=seed, epoch=number, **same)
            yield from itertools.islice(drawn, count // batch_size)

    rows_of_rank(batch_size, rank, world_size)
    return itertools.islice(batches(), batch, None)


def class_pairs(
    texts: Sequence[str], labels: Sequence[Hashable], *, seed: int, epoch: int = 0
) -> tuple[list[TextPair], list[Hashable]]:
    """Pairs of two texts of one class, and each pair's label: every text in one pair, paired anew each epoch.

    In a class of an odd number the last text is paired with one that has a pair already. A class of one text has none,
    which a UserWarning says. Raises ValueError for unlike numbers of texts and labels, for a label that is None or NaN
    (texts without a class are no pairs of each other), and for no class of two.
    """
    labels = _hashable("labels", labels)
    for place, label in enumerate(labels):
        if label is None or label != label:
            raise refuse(f"labels[{place}]", "must be a class: leave out the texts without one", label)
    if len(texts) != len(labels):
        raise refuse("labels", f"must be one for each of the {len(texts)} texts", f"{len(labels)} labels")
    generator, classes = random.Random(f"{seed}/{epoch}/classes"), defaultdict(list)
    for text, label in zip(texts, labels, strict=True):
        classes[label].append(text)
    pairs, ids = [], []
    for label, members in classes.items():
        generator.shuffle(members)
        if len(members) > 1 and len(members) % 2:
            members = [*members, members[0]]
        pairs += [TextPair(*two) for two in zip(members[::2], members[1::2], strict=False)]
        ids += [label] * (len(members) // 2)
    alone = sum(len(members) == 1 for members in classes.values())
    if not pairs:
        raise refuse("labels", "must have at least one class of two texts", f"{len(classes)} classes")
    if alone:
        warnings.warn(f"{alone} of {len(classes)} classes have one text, which has no pair", stacklevel=2)
    return pairs, ids


def rows_of_rank(batch_size: int, rank: int, world_size: int) -> slice:
    """The rows of a batch that process `rank` of `world_size` takes: side by side, the first B % W take one more.

    ValueError for a rank that is none, and for a batch too small to give each process a row.
    """
    if int_at_least("rank", rank, 0) >= positive_int("world_size", world_size):
        raise refuse("rank", f"must be below world_size, {world_size}", rank)
    if positive_int("batch_size", batch_size) < world_size:
        raise refuse("batch_size", f"must give each of the {world_size} processes a row", batch_size)
    size, longer = divmod(batch_size, world_size)
    first = rank * size + min(rank, longer)
    return slice(first, first + size + (rank < longer))


def _hashable(argument: str, values: Sequence[Any]) -> list[Hashable]:
    """A list of what compares by value, as a tensor's elements don't. ValueError for what can't be told apart."""
    listed = [value.item() if hasattr(value, "item") else value for value in values]
    for place, value in enumerate(listed):
        if not isinstance(value, Hashable):
            raise refuse(f"{argument}[{place}]", "must be hashable, such as an int or a text", type(value).__name__)
    return listed


def _check_place(batch_size: int, count: int, seed: int, epoch: int, batch: int, *, of: str = "pairs") -> None:
    if positive_int("batch_size", batch_size) > count:
        raise refuse("batch_size", f"must be at most the number of {of}, {count}", batch_size)
    for name, value in (("seed", seed), ("epoch", epoch), ("batch", batch)):
        int_at_least(name, value, 0)


def _turns(counts: Mapping[str, int], seed: int, epoch: int) -> Iterator[str]:
    """Whose batch comes next, without end: in each epoch every source as often as it has batches."""
    for number in itertools.count(epoch):
        turns = [name for name, count in counts.items() for _ in range(count)]
        random.Random(f"{seed}/{number}/sources").shuffle(turns)
        yield from turns


@dataclass(frozen=True)
class _Texts:
    """The texts of n pairs as numbers, the same for twins; only those that stand in several pairs.

    own: the query and the passage of each pair; pairs that have one in common can't be in one batch. right: its query
    and all that is right for it. held: its query, passage and hard negatives. twins: of each number, how many pairs
    have it as their own. own_faults: pairs with a hard negative that is right for them, as words. An id that several
    pairs have is a number too, own, right and held.
    """

    own: list[frozenset[int]]
    right: list[frozenset[int]]
    held: list[frozenset[int]]
    twins: Counter[int]
    own_faults: list[str]
    shared: str

    @classmethod
    def of(cls, pairs: Sequence[TextPair], ids: Sequence[Hashable] | None = None) -> "_Texts":
        numbers = twin_numbers(texts_of(pairs))
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
        shared = [] if ids is None else [key for key, count in Counter(ids).items() if count > 1 and key is not None]
        numbers_of_ids = {key: frozenset((-2 - place,)) for place, key in enumerate(shared)}
        for place, key in enumerate(ids or ()):
            for texts in (own, right, held):
                texts[place] |= numbers_of_ids.get(key, _NONE)
        shared_by = "text" if ids is None else "text or id"
        return cls(own, right, held, Counter(itertools.chain.from_iterable(own)), faults, shared_by)

    def meeting(self, batch: Sequence[int]) -> int:
        """How many queries of the batch meet a text of another pair that is right for them."""
        batch = [row for row in batch if self.held[row]]
        held = Counter(itertools.chain.from_iterable(self.held[row] for row in batch))
        return sum(any(held[number] > (number in self.held[row]) for number in self.right[row]) for row in batch)


def _drawn(
    pairs: Sequence[TextPair], texts: _Texts, batches: list[list[int]], warned: bool, seed: int, epoch: int
) -> Iterator[tuple[int, list[TextPair]]]:
    for number in itertools.count(epoch):
        if number > epoch:
            batches = _epoch(texts, len(batches[0]), seed, number)
            warned = warned or _tell(texts, batches)
        for batch in batches:
            yield number, [pairs[row] for row in batch]


def _tell(texts: _Texts, batches: list[list[int]]) -> bool:
    """Warn where queries of the epoch's batches meet a false negative; whether any do."""
    meeting, rows = sum(map(texts.meeting, batches)), sum(map(len, batches))
    if meeting:
        most, size = max(texts.twins.values(), default=1), len(batches[0])
        why = "which can't be parted" if most > len(batches) else "and no order was found that parts them"
        whose = f"one {texts.shared} belongs to {most} pairs" if most > 1 else "a negative is right for another query"
        harm = f"{meeting} of an epoch's {rows} queries meet a false negative in their batch"
        cause = f"{whose}, and an epoch has {len(batches)} batches of {size}, {why}"
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
