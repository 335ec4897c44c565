"""The laws of a step's memory, read off a few runs under fake tensors.

At fixed lengths the bytes after every single operation are affine in a chunk's rows, from two rows on; a loss adds a
square in B. So one fake run of the real step, with a chunk of few rows and one of many, gives every event of every
batch and chunk, exactly. One row takes other operations and is run as it is. The peak is the largest of these lines
and not a line itself.

Whether there is such a line is tested: `FEW` and `MANY` are a prime number of rows apart, so that values between which
no line through whole numbers runs are seen; and a forward of another number of rows must lie on it. Where one does
not, `LawBroken` is raised, and the whole step is run with fake tensors.

Nothing here imitates a step: it is the step that runs, with tensors that have shapes and no numbers.
"""

import copy
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gclib.chunks import Chunk
from gclib.memory.cuda_operations import CudaKernels
from gclib.memory.law_files import LawFiles
from gclib.memory.ledger import KINDS, MemoryLedger, Segment, record_memory
from gclib.randomness import RandomState
from gclib.steps import accumulation_step, cache_gradients, grad_cache_step, naive_step

FEW, CHECKED, MANY = 2, 5, 4_101  # rows; 4,099 is a prime
_ACTIVATIONS = KINDS.index("activations")
_GRADIENTS = KINDS.index("gradients")
_REPRESENTATIONS = KINDS.index("representations")


class LawBroken(Exception):
    """No law joins the runs (they took different operations, say): the step itself must be run."""


class _Stopped(Exception):
    """Raised where a run has shown what was asked of it."""


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
class Place:
    """Where in a step a piece belongs."""

    phase: str
    tower: int | None
    chunk: int | None


@dataclass(frozen=True)
class Piece:
    """One piece of a chunk: its events relative to its start, and which of them mark something.

    room_at: None, or the event at which the room for all representations is allocated; its bytes are left out of
    `kind_bytes` because they go with the tower's rows and not with the chunk's. encoded_at: None, or the first event
    after the encoder's forward, when autocast's copies are let go of.
    """

    kind_bytes: np.ndarray
    room_at: int | None = None
    encoded_at: int | None = None

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

    make(mode) returns the encoders, one a tower, and the loss, made with `fake_copy`. files: where laws are kept from
    one session to the next; None for encoders that no text describes. device: whose operations are counted, "cpu" or
    "cuda" (`gclib.memory.cuda_operations`).
    """

    def __init__(
        self,
        make: Callable[[FakeTensorMode], tuple[Sequence[nn.Module], Any]],
        autocast: torch.dtype | None,
        files: LawFiles | None = None,
        device: str = "cpu",
    ):
        self.files = files
        self.device = device
        self.mode = FakeTensorMode()
        self.lock = threading.RLock()
        self.autocast = autocast
        self.runs = 0
        self._laws: dict[Any, Any] = {}
        self._last_loss: tuple[Any, tuple[np.ndarray, np.ndarray]] | None = None
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
        """Bytes of the generator states that a step records at once: none on a card, whose states lie with the host."""
        return 0 if self.device == "cuda" else self._once("states", self._state_bytes)

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
        widths: Sequence[int | None],
        towers: Sequence[int] | None = None,
        loss_fn: Any = None,
        until: str = "",
        on_encoded: Callable[[MemoryLedger, Tensor], None] | None = None,
        **options: Any,
    ) -> MemoryLedger:
        """Run a step on a padded batch of fake inputs, up to a phase or to its end; return its ledger.

        on_encoded: is called with the ledger so far and the representations at the end of each forward of an encoder.
        """
        encoders = self.encoders if towers is None else [self.encoders[tower] for tower in towers]
        with self._faked():
            self.runs += 1
            inputs = [padded_batch(*given) for given in zip(encoders, rows, widths, strict=True)]
            with record_memory(*self.modules) as ledger, ExitStack() as stack:
                stack.enter_context(suppress(_Stopped))
                for encoder in encoders if on_encoded else ():
                    hook = encoder.register_forward_hook(lambda module, given, reps: on_encoded(ledger, reps))
                    stack.callback(hook.remove)

                def on_phase(phase: str, **named: Any) -> None:
                    if phase == until:
                        raise _Stopped
                    if self.device == "cuda":
                        named["tensors"] = [one for one in named.get("tensors", ()) if one[0] != "random states"]
                    ledger.on_phase(phase, **named)

                step(encoders, inputs, loss_fn or self.loss, on_phase=on_phase, **options)
            return ledger

    def input_bytes(self, tower: int, rows: int, width: int | None) -> int:
        """Bytes of what a tower is given."""
        with self._faked():
            row = padded_batch(self.encoders[tower], 1, width)
        return rows * sum(tensor.nbytes for tensor in row.values())

    def whole(
        self, step: str, queries: int, negatives: int, widths: tuple[int | None, ...]
    ) -> list[tuple[Place, np.ndarray]]:
        """The naive step's pieces; or those of accumulation's first and later chunk of this many queries."""
        single = queries == 1
        if not single:
            self._check_loss(queries, negatives, widths)

        def fit() -> list[tuple[dict[str, Any], Law]]:
            laws = _joined([self._whole_run(step, n, negatives, widths) for n in ((1,) if single else (2, 3, 4))])
            if not single:
                seen = self._whole_run(step, CHECKED, negatives, widths, until="loss")
                for (_, law), (_, events) in zip(laws, seen, strict=False):
                    _check(events, law.at(CHECKED))
            return laws

        laws = self._kept(("whole", step, negatives, widths, single), fit, with_loss=True)
        return [(Place(**place), law.at(FEW if single else queries)) for place, law in laws]

    def _check_loss(self, queries: int, negatives: int, widths: tuple[int | None, ...]) -> None:
        """Raise LawBroken for a loss that takes other operations for this many queries than for a few: tiles do."""
        few = self._once(f"loss {negatives} {widths}", lambda: len(self._cached_loss(_rows(FEW, negatives), widths)[0]))
        if len(self.cached_loss(_rows(queries, negatives), widths)[0]) != few:
            raise LawBroken

    def _whole_run(self, step: str, queries: int, negatives: int, widths: tuple[Any, ...], until: str = "") -> list:
        if step == "naive":
            return relative(self.run(naive_step, _rows(queries, negatives), widths, until=until))
        rows = _rows(2 * queries, negatives)
        pieces = relative(self.run(accumulation_step, rows, widths, chunk_size=queries, until=until))
        return [piece for piece in pieces if piece[0].chunk is not None]

    def chunk(self, tower: int, width: int, rows: int, retained: bool) -> dict[tuple[str, bool], Piece]:
        """The pieces of one chunk of gradient caching, by (phase, whether it is the first of its encoder)."""
        single, encoder = rows == 1, self.encoder_index(tower)

        def fit() -> list[tuple[dict[str, Any], Law]]:
            return self._chunk_laws(encoder, width, retained, single)

        laws = self._kept(("chunk", encoder, width, retained, single), fit, with_loss=False)
        n = FEW if single else rows
        return {
            (marks["phase"], marks["first"]): Piece(law.at(n), marks["room_at"], marks["encoded_at"])
            for marks, law in laws
        }

    def _kept(self, key: tuple, fit: Callable[[], list], *, with_loss: bool) -> list[tuple[dict[str, Any], Law]]:
        """The laws under this key: of this session, of an earlier one, or fitted now."""
        with self.lock:
            if key not in self._laws:
                found = self.files.read(key, with_loss=with_loss) if self.files else None
                laws = fit() if found is None else [(described, Law(law)) for described, law in found]
                if found is None and self.files:
                    self.files.write(
                        key, [(described, law.differences) for described, law in laws], with_loss=with_loss
                    )
                self._laws[key] = laws
            return self._laws[key]

    def _chunk_run(
        self, encoder: int, width: int | None, sizes: Sequence[int], retained: bool, until: str = ""
    ) -> dict:
        """A step with a tower of chunks of these sizes: pieces by (phase, whether it is the first)."""
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        plan = [Chunk(tuple(range(at, at + size)), width or 1) for at, size in zip(starts, sizes, strict=True)]
        options = {"plan": plan, "retain_chunks": len(sizes) if retained else 0, "until": until}
        ends: list[int] = []

        def on_encoded(ledger: MemoryLedger, reps: Tensor) -> None:
            ends.append(len(ledger.events))
            self._laws["row", encoder, width] = (tuple(reps.shape[1:]), reps.dtype)

        ledger = self.run(grad_cache_step, [sum(sizes)], [width], [encoder], _total, on_encoded=on_encoded, **options)
        room = sum(sizes) * self.row_bytes(encoder, width)
        starts = [start for start, _ in ledger.pieces[1:]]
        pieces = {}
        for (segment, events), start in zip(relative(ledger), starts, strict=True):
            if segment.chunk is not None:
                end = next((end - start for end in ends if start <= end < start + len(events)), None)
                pieces[segment.phase, segment.chunk == 0] = replace(_without_room(events, room), encoded_at=end)
        return pieces

    def _chunk_laws(
        self, encoder: int, width: int | None, retained: bool, single: bool
    ) -> list[tuple[dict[str, Any], Law]]:
        """For each phase, a law of later chunks, and a law of the first beside it."""
        pieces = self._chunk_run(encoder, width, (1, 1) if single else (FEW, MANY), retained)
        laws: list[tuple[dict[str, Any], Law]] = []
        for phase in sorted({phase for phase, _ in pieces}):
            first, later = pieces[phase, True], pieces[phase, False]
            law = Law((later.kind_bytes,)) if single else Law.line(_as_later(first), later.kind_bytes)
            beside = law.beside(first.kind_bytes, first.room_at)
            for piece, fitted in ((first, beside), (later, law)):
                marks = {"room_at": piece.room_at, "encoded_at": piece.encoded_at}
                laws.append(({"phase": phase, "first": piece is first, **marks}, fitted))
        if not single:
            self._check_forward(encoder, width, retained, laws)
        return laws

    def _check_forward(self, encoder: int, width: int | None, retained: bool, laws: list) -> None:
        """A first forward of CHECKED rows lies on its law. Raises LawBroken where it does not."""
        seen = self._chunk_run(encoder, width, (CHECKED,), retained, until="loss")["first_forward", True]
        law = next(law for marks, law in laws if marks["first"] and marks["phase"] == "first_forward")
        _check(seen.kind_bytes, law.at(CHECKED))

    def row_of(self, tower: int, width: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape behind the rows, and dtype, of the tower's representations."""
        key = ("row", self.encoder_index(tower), width)
        with self._faked(), torch.no_grad():
            if key not in self._laws:
                reps = self.encoders[tower](**padded_batch(self.encoders[tower], 2, width))
                self._laws[key] = (tuple(reps.shape[1:]), reps.dtype)
        return self._laws[key]

    def row_bytes(self, tower: int, width: int) -> int:
        """Bytes of one representation."""
        shape, dtype = self.row_of(tower, width)
        return math.prod(shape) * dtype.itemsize

    def cached_loss(self, rows: Sequence[int], widths: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray]:
        """Step 2 at its real size, for the loss alone is a few operations: bytes relative to its start.

        And, by kind, what autocast's copies of representations hold until the next forward has ended. The last answer
        is remembered: who looks for a chunk asks again and again for the same rows.
        """
        with self.lock:
            asked = (tuple(rows), tuple(widths))
            if self._last_loss is None or self._last_loss[0] != asked:
                self._last_loss = (asked, self._cached_loss(rows, widths))
            return self._last_loss[1]

    def _cached_loss(self, rows: Sequence[int], widths: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray]:
        kinds = [self.row_of(tower, width) for tower, width in enumerate(widths)]
        loss = [self.loss] if isinstance(self.loss, nn.Module) else []
        with self._faked(), record_memory(*loss) as ledger:
            reps = [torch.empty(count, *shape, dtype=dtype) for count, (shape, dtype) in zip(rows, kinds, strict=True)]
            ledger.on_phase("first_forward", tensors=[("representations", rep) for rep in reps])
            before = np.array(ledger.events[-1].kind_bytes, dtype=np.int64)
            held = _cache(reps, self.loss, ledger)
            events = ledger.timeline[-1].kind_bytes - before
            torch.clear_autocast_cache()
            copies = events[-1] + before - np.array(ledger.events[-1].kind_bytes, dtype=np.int64)
            del held
        return events, copies

    def _once(self, key: str, compute: Callable[[], Any]) -> Any:
        with self.lock:
            if key not in self._laws:
                self._laws[key] = compute()
            return self._laws[key]

    @contextmanager
    def _faked(self) -> Iterator[None]:
        """Fake tensors and the autocast of the forecast, one thread at a time, with no gradients left over."""
        context = torch.autocast("cpu", self.autocast) if self.autocast else nullcontext()
        kernels = CudaKernels() if self.device == "cuda" else nullcontext()
        with self.lock, self.mode, context, kernels:
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


def picture_shape(encoder: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) of what an encoder for pictures is given; None for one that reads tokens."""
    for part in encoder.modules():
        config = getattr(part, "config", None)
        if getattr(part, "main_input_name", None) == "pixel_values" and hasattr(config, "image_size"):
            size = config.image_size
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            return (getattr(config, "num_channels", 3), height, width)
    return None


def padded_batch(encoder: nn.Module, rows: int, width: int | None) -> dict[str, Tensor]:
    """Rows of this many tokens; for width None, pictures of the size that the encoder's config states, in float32."""
    if width is not None:
        return padded_tokens(rows, width)
    return {"pixel_values": torch.zeros(rows, *picture_shape(encoder), dtype=torch.float32)}


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


def _check(events: np.ndarray, expected: np.ndarray) -> None:
    """Raise LawBroken unless the events are those expected; what a stopped run lets go of may follow."""
    if not np.array_equal(events[: len(expected)], expected):
        raise LawBroken


def _joined(runs: Sequence[list[tuple[Segment, np.ndarray]]]) -> list[tuple[dict[str, Any], Law]]:
    """One law a piece, through the same piece of every run."""
    if len({len(run) for run in runs}) != 1:
        raise LawBroken
    laws = []
    for pieces in zip(*runs, strict=True):
        segment = pieces[0][0]
        place = {"phase": segment.phase, "tower": segment.tower, "chunk": segment.chunk}
        laws.append((place, Law.through([events for _, events in pieces])))
    return laws


def _as_later(first: Piece) -> np.ndarray:
    """What the first chunk's events would be if it were not the first.

    It alone makes room for representations, in two events; and where it creates a gradient, a later chunk adds to that.
    """
    events = first.kind_bytes.copy()
    events[:, _GRADIENTS] = 0
    return events if first.room_at is None else np.delete(events, [first.room_at, first.room_at + 1], axis=0)
