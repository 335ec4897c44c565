"""The laws of a step's memory, read off a few tiny runs under fake tensors.

At fixed lengths the bytes after every single operation are affine in a chunk's rows, from two rows on; a loss adds a
square in B. So a handful of fake runs of the real steps, with two and three rows a chunk, gives every event of
every batch and chunk, exactly. One row takes other operations and is run as it is. The peak is the largest of these
lines and not a line itself.

Nothing here imitates a step: it is the step that runs, with tensors that have shapes and no numbers.
"""

import copy
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gclib.chunking import Chunk
from gclib.ledger import KINDS, MemoryLedger, Segment, record_memory
from gclib.randomness import RandomState
from gclib.steps import accumulation_step, cache_gradients, grad_cache_step, naive_step

_ACTIVATIONS = KINDS.index("activations")
_REPRESENTATIONS = KINDS.index("representations")


class LawBroken(Exception):
    """Two runs took different operations: no law joins them, and the step itself must be run."""


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

    def beside(self, value: np.ndarray, extra: int | None) -> "Law":
        """The law with this value at n = 2 and the same growth. With `extra`, two events more stand at that place."""
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


def relative(ledger: MemoryLedger) -> list[tuple[Segment, np.ndarray]]:
    """Each piece of a run, behind its start, with its bytes relative to the end of the piece before."""
    start, *pieces = ledger.timeline
    ends = [start.kind_bytes[0], *(piece.kind_bytes[-1] for piece in pieces)]
    return [(piece, piece.kind_bytes - before) for piece, before in zip(pieces, ends, strict=False)]


@dataclass(frozen=True)
class Piece:
    """One piece of a chunk: its events relative to its start, and from which event on its tower's room is there.

    room_at is None, or the event at which the room for all representations is allocated; its bytes are left out of
    `kind_bytes` because they go with the tower's rows and not with the chunk's.
    """

    kind_bytes: np.ndarray
    room_at: int | None = None

    def with_room(self, room_bytes: int) -> np.ndarray:
        """The events with this many bytes of room: for one event an activation, then representations."""
        events = self.kind_bytes.copy()
        if self.room_at is not None:
            events[self.room_at, _ACTIVATIONS] += room_bytes
            events[self.room_at + 1 :, _REPRESENTATIONS] += room_bytes
        return events


class FakeStep:
    """Encoders and loss as fake modules, and the laws of the steps that were run with them.

    Parameters have shapes, dtypes and devices but take no memory. Laws are kept: the second forecast of a
    configuration runs nothing but its loss. Safe to use from several threads.

    make(mode) returns the encoders, one a tower, and the loss, made with `fake_copy`.
    """

    def __init__(self, make: Callable[[FakeTensorMode], tuple[Sequence[nn.Module], Any]], autocast: torch.dtype | None):
        self.mode = FakeTensorMode()
        self.lock = threading.RLock()
        self.autocast = autocast
        self.runs = 0
        self._laws: dict[Any, Any] = {}
        self.encoders, self.loss = make(self.mode)

    @property
    def modules(self) -> list[nn.Module]:
        """Encoders and loss, each once."""
        modules = [*self.encoders, self.loss]
        return list({id(module): module for module in modules if isinstance(module, nn.Module)}.values())

    def start_bytes(self, optimizer: str | None) -> np.ndarray:
        """Bytes of each kind before the step: parameters, and the optimizer's states from the second step on.

        AdamW keeps two numbers for each parameter's number and a float32 count; SGD without momentum keeps nothing.
        """
        start = self._once("start", self._parameter_bytes).copy()
        if optimizer == "adamw":
            parameters = {id(p): p for module in self.modules for p in module.parameters() if p.requires_grad}
            start[KINDS.index("optimizer")] = sum(2 * p.nbytes + 4 for p in parameters.values())
        return start

    def _parameter_bytes(self) -> np.ndarray:
        with self._faked(), record_memory(*self.modules) as ledger:
            return np.array(ledger.events[0].kind_bytes, dtype=np.int64)

    def state_bytes(self) -> int:
        """Bytes of the generator states that a step records at once."""
        return self._once("states", self._state_bytes)

    def _state_bytes(self) -> int:
        with self._faked():
            parameters = [parameter for encoder in self.encoders for parameter in encoder.parameters()]
            return sum(tensor.nbytes for tensor in RandomState.record(parameters).tensors)

    def encoder_index(self, tower: int) -> int:
        """The first tower that has the same encoder: tied towers share laws and gradients."""
        return next(number for number, other in enumerate(self.encoders) if other is self.encoders[tower])

    def run(
        self,
        step: Callable[..., Tensor],
        rows: Sequence[int],
        widths: Sequence[int],
        towers: Sequence[int] | None = None,
        loss_fn: Any = None,
        **options: Any,
    ) -> MemoryLedger:
        """Run a step on a padded batch of fake tokens; return its ledger."""
        encoders = self.encoders if towers is None else [self.encoders[tower] for tower in towers]
        with self._faked():
            self.runs += 1
            inputs = [padded_tokens(count, width) for count, width in zip(rows, widths, strict=True)]
            with record_memory(*self.modules) as ledger:
                step(encoders, inputs, loss_fn or self.loss, on_phase=ledger.on_phase, **options)
            return ledger

    def whole(
        self, step: str, queries: int, negatives: int, widths: tuple[int, ...]
    ) -> list[tuple[Segment, np.ndarray]]:
        """The naive step's pieces; or those of accumulation's first and later chunk of this many queries."""
        single = queries == 1
        key = ("whole", step, negatives, widths, single)
        with self.lock:
            if key not in self._laws:
                runs = [self._whole_run(step, n, negatives, widths) for n in ((1,) if single else (2, 3, 4))]
                self._laws[key] = _joined(runs)
        return [(segment, law.at(2 if single else queries)) for segment, law in self._laws[key]]

    def _whole_run(self, step: str, queries: int, negatives: int, widths: tuple[int, ...]) -> list:
        if step == "naive":
            return relative(self.run(naive_step, _rows(queries, negatives), widths))
        rows = _rows(2 * queries, negatives)
        pieces = relative(self.run(accumulation_step, rows, widths, chunk_size=queries))
        return [piece for piece in pieces if piece[0].chunk is not None]

    def chunk(self, tower: int, width: int, rows: int, retained: bool) -> dict[tuple[str, bool], Piece]:
        """The pieces of one chunk of gradient caching, by (phase, whether it is the first of its encoder)."""
        single, encoder = rows == 1, self.encoder_index(tower)
        key = ("chunk", encoder, width, retained, single)
        with self.lock:
            if key not in self._laws:
                pieces = self._chunk_run(encoder, width, (1, 1) if single else (2, 2, 3), retained)
                self._laws[key] = _chunk_laws(pieces)
        n = 2 if single else rows
        return {name: Piece(law.at(n), room_at) for name, (law, room_at) in self._laws[key].items()}

    def _chunk_run(self, encoder: int, width: int, sizes: Sequence[int], retained: bool) -> dict[Any, Piece]:
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        plan = [Chunk(tuple(range(at, at + size)), width) for at, size in zip(starts, sizes, strict=True)]
        retain = len(sizes) if retained else 0
        ledger = self.run(grad_cache_step, [sum(sizes)], [width], [encoder], _total, plan=plan, retain_chunks=retain)
        room = sum(sizes) * self.row_bytes(encoder, width)
        return {
            (segment.phase, segment.chunk == 0, sizes[segment.chunk]): _without_room(events, room)
            for segment, events in relative(ledger)
            if segment.chunk is not None
        }

    def row_of(self, tower: int, width: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape behind the rows, and dtype, of the tower's representations."""
        key = ("row", self.encoder_index(tower), width)
        with self._faked(), torch.no_grad():
            if key not in self._laws:
                reps = self.encoders[tower](**padded_tokens(2, width))
                self._laws[key] = (tuple(reps.shape[1:]), reps.dtype)
        return self._laws[key]

    def row_bytes(self, tower: int, width: int) -> int:
        """Bytes of one representation."""
        shape, dtype = self.row_of(tower, width)
        return math.prod(shape) * dtype.itemsize

    def cached_loss(self, rows: Sequence[int], widths: Sequence[int]) -> np.ndarray:
        """Step 2 at its real size, for the loss alone is a few operations: bytes relative to its start."""
        kinds = [self.row_of(tower, width) for tower, width in enumerate(widths)]
        loss = [self.loss] if isinstance(self.loss, nn.Module) else []
        with self._faked(), record_memory(*loss) as ledger:
            reps = [torch.empty(count, *shape, dtype=dtype) for count, (shape, dtype) in zip(rows, kinds, strict=True)]
            ledger.on_phase("first_forward", tensors=[("representations", rep) for rep in reps])
            before = np.array(ledger.events[-1].kind_bytes, dtype=np.int64)
            held = _cache(reps, self.loss, ledger)
            events = ledger.timeline[-1].kind_bytes - before
            del held
        return events

    def _once(self, key: str, compute: Callable[[], Any]) -> Any:
        with self.lock:
            if key not in self._laws:
                self._laws[key] = compute()
            return self._laws[key]

    @contextmanager
    def _faked(self) -> Iterator[None]:
        """Fake tensors and the autocast of the forecast, one thread at a time, with no gradients left over."""
        context = torch.autocast("cpu", self.autocast) if self.autocast else nullcontext()
        with self.lock, self.mode, context:
            for module in self.modules:
                module.zero_grad(set_to_none=True)
            yield


def fake_copy(module: Any, mode: FakeTensorMode) -> Any:
    """A module with fake parameters and buffers; the real ones (or those on "meta") are neither copied nor changed."""
    if not isinstance(module, nn.Module):
        return module
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_meta:
            with mode:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        else:
            fake = mode.from_tensor(tensor.detach())
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(module, memo)


def padded_tokens(rows: int, width: int) -> dict[str, Tensor]:
    """A padded batch as the tokenizer makes it, without numbers worth reading."""
    return {
        "input_ids": torch.zeros(rows, width, dtype=torch.long),
        "attention_mask": torch.ones(rows, width, dtype=torch.long),
    }


def _rows(queries: int, negatives: int) -> tuple[int, int]:
    return queries, queries * (1 + negatives)


def _cache(reps: list[Tensor], loss: Any, ledger: MemoryLedger) -> list[Any]:
    """Step 2. Its representations are let go of, as the step does; loss and caches are returned."""
    leaves = [rep.requires_grad_() for rep in reps]
    reps.clear()
    return [cache_gradients(leaves, loss, None, None, ledger.on_phase), *(leaf.grad for leaf in leaves)]


def _total(reps: Tensor) -> Tensor:
    """A loss for runs that ask only about the encoder."""
    return reps.sum()


def _without_room(events: np.ndarray, room_bytes: int) -> Piece:
    """Take the room for the tower's representations out of the piece that allocates it."""
    named = np.diff(events[:, _REPRESENTATIONS], prepend=0) > 0
    if not named.any():
        return Piece(events)
    at = int(named.argmax())
    rest = Piece(np.zeros_like(events), at - 1).with_room(room_bytes)
    return Piece(events - rest, at - 1)


def _joined(runs: Sequence[list[tuple[Segment, np.ndarray]]]) -> list[tuple[Segment, Law]]:
    """One law a piece, through the same piece of every run."""
    if len({len(run) for run in runs}) != 1:
        raise LawBroken
    return [(pieces[0][0], Law.through([events for _, events in pieces])) for pieces in zip(*runs, strict=True)]


def _chunk_laws(pieces: dict[Any, Piece]) -> dict[tuple[str, bool], tuple[Law, int | None]]:
    """For each phase, a law of later chunks through their sizes, and a law of the first beside it.

    The first chunk makes room for representations, or creates gradients where later ones add to them: that
    difference does not depend on its rows.
    """
    laws: dict[tuple[str, bool], tuple[Law, int | None]] = {}
    for phase in {phase for phase, _, _ in pieces}:
        first = next(piece for key, piece in pieces.items() if key[:2] == (phase, True))
        later = [pieces[key] for key in sorted(pieces) if key[:2] == (phase, False)]
        law = Law.through([piece.kind_bytes for piece in later])
        laws[phase, False] = (law, None)
        laws[phase, True] = (law.beside(first.kind_bytes, first.room_at), first.room_at)
    return laws
