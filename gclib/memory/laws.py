"""The laws of a step's memory: lines through the bytes of a few runs, that give those of every other.

At fixed lengths the bytes after every single operation are affine in a chunk's rows, from two rows on; a loss adds a
square in B. So one run of the step with fake tensors (`gclib.memory.fake_steps`), with a chunk of few rows and one of
many, gives every event of every batch and chunk, exactly. One row takes other operations and is run as it is. The peak
is the largest of these lines and not a line itself.

Whether there is such a line is tested: `FEW` and `MANY` are a prime number of rows apart, so that values between which
no line through whole numbers runs are seen; and a forward of another number of rows must lie on it. Where one does
not (nor with all layers read, see `gclib.memory.depth`), `LawBroken` is raised, and the whole step is run with fake
tensors.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gclib.memory.ledger import KINDS

FEW, CHECKED, MANY = 2, 5, 4_101  # rows; 4,099 is a prime
LEAST = 16  # events: fewer are not taken for a layer's
_ACTIVATIONS = KINDS.index("activations")
_GRADIENTS = KINDS.index("gradients")
_REPRESENTATIONS = KINDS.index("representations")


class LawBroken(Exception):
    """No law joins the runs (they took different operations, say): the step itself must be run."""


@dataclass(frozen=True)
class Law:
    """A polynomial through values at n = 2, 3, ..., in Newton's form; exact in integers."""

    differences: tuple[np.ndarray, ...]

    @classmethod
    def through(cls, values: Sequence[np.ndarray]) -> "Law":
        """The law with these values at n = 2, 3, ... Raises LawBroken where their shapes differ."""
        if len({value.shape for value in values}) != 1:
            raise LawBroken
        differences, row = [], list(values)
        while row:
            differences.append(row[0])
            row = [later - earlier for earlier, later in zip(row, row[1:], strict=False)]
        return cls(tuple(differences))

    @classmethod
    def line(cls, few: np.ndarray, many: np.ndarray) -> "Law":
        """The line with these values at FEW and MANY rows. Raises LawBroken where none has whole coefficients."""
        if few.shape != many.shape:
            raise LawBroken
        slope, rest = np.divmod(many - few, MANY - FEW)
        if rest.any():
            raise LawBroken
        return cls((few, slope))

    def beside(self, value: np.ndarray, extra: int | None) -> "Law":
        """This law moved: this value at n = 2, the same growth. With `extra`, two events more stand at that place."""
        rows = [] if extra is None else [extra, extra]
        widened = []
        for difference in self.differences:
            repeated = difference[extra - 1] if extra else difference[:1]
            widened.append(np.insert(difference, rows, repeated, axis=0) if rows else difference)
        if widened[0].shape != value.shape:
            raise LawBroken
        return Law((value, *widened[1:]))

    def at(self, n: int) -> np.ndarray:
        """The value at n rows."""
        total, binomial = np.zeros_like(self.differences[0]), 1
        for order, difference in enumerate(self.differences):
            total = total + binomial * difference
            binomial = binomial * (n - 2 - order) // (order + 1)
        return total

    def check(self, n: int, events: np.ndarray) -> None:
        """Raise LawBroken unless a run of n rows has these values; what a run that was ended lets go of may follow."""
        expected = self.at(n)
        if not np.array_equal(events[: len(expected)], expected):
            raise LawBroken


def grown(few: np.ndarray, more: np.ndarray, times: int, places: int = 1) -> np.ndarray:
    """(events, kinds): `few` with what `more` has beside it put in so many times, each on top of the one before.

    What was put in, at so many places at most, must repeat the events in front of it, moved, and move all behind it.
    Raises LawBroken where it does not, or is so short (LEAST) that it may look so by chance. An event that stands alone
    goes along a line.
    """
    if len(few) == len(more) == 1:
        return few + times * (more - few)
    inserted = _inserted(few, more, places)
    if inserted is None:
        raise LawBroken
    parts, done, shift = [], 0, np.zeros_like(few[0])
    for at, block, net in inserted:
        parts += [few[done:at] + shift, *(block + shift + n * net for n in range(times))]
        done, shift = at, shift + times * net
    return np.concatenate([*parts, few[done:] + shift])


def _inserted(few: np.ndarray, more: np.ndarray, places: int) -> list[tuple[int, np.ndarray, np.ndarray]] | None:
    """Where in `few` events were put in, which (before anything else had moved them), and what they move all behind
    them by: as many at once as can be. None where `more` is not such a `few`.
    """
    same = _length(np.append((more[: len(few)] == few[: len(more)]).all(axis=1), values=False))
    rest, moved = few[same:], more[same:]
    if not len(rest) and not len(moved):
        return []
    sizes = range(min(same, len(moved) - len(rest)), LEAST - 1, -1) if places else ()
    for size in sizes:
        repeated = more[same : same + size] - more[same - size : same]
        net = repeated[0]
        fits = not len(rest) or (moved[size] - rest[0] == net).all()
        if fits and (repeated == net).all():
            behind = _inserted(rest, moved[size:] - net, places - 1)
            if behind is not None:
                return [(same, moved[:size], net), *((same + at, block, further) for at, block, further in behind)]
    return None


def _length(same: np.ndarray) -> int:
    """How many are true before the first that is not."""
    return len(same) if same.all() else int(same.argmin())


class HeldLaw:
    """Values at n that `compute` gives, in whole; below an n at which their law was held against them, the law does.

    compute: n -> arrays. The law is that of n = 2, 3 and 4. Where it does not hold, all values are computed.
    """

    def __init__(self, compute: Callable[[int], tuple[np.ndarray, ...]]):
        self.compute, self.laws, self.broken = compute, (), False
        self.farthest: tuple[int, tuple[np.ndarray, ...]] = (0, ())

    def at(self, n: int) -> tuple[np.ndarray, ...]:
        """The values at n."""
        if FEW + 2 < n < self.farthest[0] and self._holds():
            return tuple(law.at(n) for law in self.laws)
        values = self.compute(n)
        if n > self.farthest[0]:
            self.farthest = n, values
            self.broken = self.broken or bool(self.laws) and not self._lies_on_laws()
        return values

    def _holds(self) -> bool:
        if not self.laws and not self.broken:
            try:
                runs = [self.compute(n) for n in (FEW, FEW + 1, FEW + 2)]
                self.laws = tuple(Law.through(values) for values in zip(*runs, strict=True))
                self.broken = not self._lies_on_laws()
            except (LawBroken, ValueError):  # what takes these rows alone, say
                self.broken = True
        return not self.broken

    def _lies_on_laws(self) -> bool:
        n, values = self.farthest
        return all(np.array_equal(law.at(n), value) for law, value in zip(self.laws, values, strict=True))


@dataclass(frozen=True)
class Piece:
    """One piece of a chunk: its events relative to its start, and which of them mark something.

    room_at: None, or the event at which the room for all representations is allocated; its bytes are left out of
    `kind_bytes` because they go with the tower's rows and not with the chunk's. encoded_at: None, or the first event
    after the encoder's forward, when autocast's copies are let go of. flops: where they were counted.
    """

    kind_bytes: np.ndarray
    room_at: int | None = None
    encoded_at: int | None = None
    flops: int = 0

    def grown(self, more: "Piece", times: int) -> "Piece":
        """The piece of a deeper encoder, from this one's and that of one deeper by so many layers as come on `times`
        over (`gclib.memory.depth`). Raises LawBroken where they do not show it.
        """
        marks = ((self.room_at, more.room_at), (self.encoded_at, more.encoded_at))
        if any((few is None) != (deeper is None) for few, deeper in marks):
            raise LawBroken
        room_at, encoded_at = (None if few is None else few + times * (deeper - few) for few, deeper in marks)
        parts, start = [], np.zeros_like(self.kind_bytes[0])
        for own, other in zip(self._parts(), more._parts(), strict=True):
            parts.append(start + grown(*(events - before for events, before in (own, other)), times))
            start = parts[-1][-1]
        return Piece(np.concatenate(parts), room_at, encoded_at, self.flops + times * (more.flops - self.flops))

    def _parts(self) -> list[tuple[np.ndarray, np.ndarray | int]]:
        """The events of the forward, the one at its end and those behind it, each with the bytes before it."""
        at = len(self.kind_bytes) if self.encoded_at is None else self.encoded_at
        cuts = [0, at, at + 1, len(self.kind_bytes)]
        parts = [(self.kind_bytes[start:end], start) for start, end in itertools.pairwise(cuts)]
        return [(events, self.kind_bytes[start - 1] if start else 0) for events, start in parts if len(events)]

    def with_room(self, room_bytes: int) -> np.ndarray:
        """The events with this many bytes of room: for one event an activation, then representations."""
        events = self.kind_bytes.copy()
        if self.room_at is not None:
            events[self.room_at, _ACTIVATIONS] += room_bytes
            events[self.room_at + 1 :, _REPRESENTATIONS] += room_bytes
        return events

    @classmethod
    def without_room(cls, events: np.ndarray, room_bytes: int, encoded_at: int | None) -> "Piece":
        """The piece of these events; where it allocates the room for the tower's representations, that is taken out."""
        named = np.diff(events[:, _REPRESENTATIONS], prepend=0) > 0
        if not named.any():
            return cls(events, None, encoded_at)
        at = int(named.argmax()) - 1
        room = cls(np.zeros_like(events), at).with_room(room_bytes)
        return cls(events - room, at, encoded_at)

    def as_later(self) -> np.ndarray:
        """What the first chunk's events would be if it were not the first.

        It alone makes room for representations, in two events; and where it creates a gradient, a later chunk adds to
        that.
        """
        events = self.kind_bytes.copy()
        events[:, _GRADIENTS] = 0
        return events if self.room_at is None else np.delete(events, [self.room_at, self.room_at + 1], axis=0)
