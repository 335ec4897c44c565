"""The step, run with fake tensors: its laws are read off it, and nothing here imitates it.

Fake tensors have shapes, dtypes and devices, and no numbers. What is run is `gclib.steps`, under the ledger.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gclib.chunks import Chunk
from gclib.distributed import average_gradients, rehearsal
from gclib.memory.cpu_operations import CpuKernels
from gclib.memory.cuda_operations import CudaKernels
from gclib.memory.depth import over_depth
from gclib.memory.fake_modules import FakeMode, encoders_of, fake_copy, fake_encoders, padded_batch
from gclib.memory.fingerprint import Indescribable, fingerprint
from gclib.memory.flops import count_flops
from gclib.memory.law_files import LawFiles
from gclib.memory.laws import CHECKED, FEW, MANY, HeldLaw, Law, LawBroken, Piece, grown
from gclib.memory.ledger import KINDS, MemoryLedger, Segment, record_memory
from gclib.memory.workload import Workload
from gclib.randomness import RandomState
from gclib.steps import accumulation_step, cache_gradients, grad_cache_step, naive_step, take_loss
from gclib.support.validation import refuse
from gclib.towers import encode

Events = list[tuple[Segment, np.ndarray]]  # a run's pieces, each with its bytes relative to its start
PlacedLaws = list[tuple[dict[str, Any], Law]]  # where in the step a piece stands, and its law


KNOWN_CODE = frozenset(("gclib", "torch", "transformers", "peft"))  # whose layers differ in what can be seen of them


class PhaseReached(Exception):
    """Raised where a run has shown what was asked of it."""


def relative(ledger: MemoryLedger) -> Events:
    """Each piece of a run, behind its start, with its bytes relative to the end of the piece before."""
    start, *pieces = ledger.timeline
    ends = [start.kind_bytes[0], *(piece.kind_bytes[-1] for piece in pieces)]
    return [(piece, piece.kind_bytes - before) for piece, before in zip(pieces, ends, strict=False)]


class _Described:
    """A workload that is known by a checksum of what its laws depend on, and let go of once it was used."""

    def __init__(self, workload: Workload):
        self.workload: Workload | None = workload
        self.loss = fingerprint(workload.loss) + (f" {workload.ranks} ranks" if workload.ranks > 1 else "")
        self.encoders = f"{fingerprint(encoders_of(workload))} {workload.autocast} {workload.device}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Described) and (self.encoders, self.loss) == (other.encoders, other.loss)

    def __hash__(self) -> int:
        return hash((self.encoders, self.loss))


def fake_step(workload: Workload) -> "FakeStep":
    """The fake encoders and loss of a workload, with the laws that were found for them so far; with none where what
    they depend on cannot be written down.
    """
    try:
        return _made(_Described(workload))
    except Indescribable:
        return FakeStep(workload)


@lru_cache(maxsize=32)
def _made(described: _Described) -> "FakeStep":
    workload, described.workload = described.workload, None
    files = None
    if workload.encoders is None:
        files = LawFiles(described.encoders, described.loss if isinstance(workload.loss, nn.Module) else None)
    return FakeStep(workload, files)


class FakeStep:
    """A workload's encoders and loss as fake modules, and the laws of the steps that were run with them.

    Parameters have shapes, dtypes and devices but take no memory. Laws are kept: the second forecast of a
    configuration runs nothing but its loss. Safe to use from several threads.

    files: where laws are kept from one session to the next; None for encoders that no text describes. runs: how often
    a step was run so far.
    """

    def __init__(self, workload: Workload, files: LawFiles | None = None):
        self.files = files
        self.device = workload.device
        self.autocast = workload.autocast
        self.ranks = workload.ranks
        self.mode = FakeMode()
        self.lock = threading.RLock()
        self.runs = 0
        self._laws: dict[Any, Any] = {}
        self._unlike: set[int] = set()  # encoders that cannot be read off few layers
        self._last_loss: tuple[Any, tuple[np.ndarray, ...]] | None = None
        self._loss_laws: dict[Any, HeldLaw] = {}
        self.encoders, self.loss = fake_encoders(workload, self.mode), fake_copy(workload.loss, self.mode)
        parts = (type(part).__module__.split(".")[0] for encoder in self.encoders for part in encoder.modules())
        self.of_known_code = workload.encoders is None and KNOWN_CODE.issuperset(parts)

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
            start[KINDS.index("optimizer")] = sum(2 * p.nbytes + 4 for p in self.trained)
        return start

    def _parameter_bytes(self) -> np.ndarray:
        with self._faked(), record_memory(*self.modules) as ledger:
            return np.array(ledger.events[0].kind_bytes, dtype=np.int64)

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters that get a gradient, each once."""
        return list({id(p): p for module in self.modules for p in module.parameters() if p.requires_grad}.values())

    def average(self) -> np.ndarray:
        """What `average_gradients` holds beside the gradients, after each of its operations."""
        with self._faked():
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter)
            with record_memory(*self.modules) as ledger:
                ledger.on_phase("average")
                average_gradients(*self.modules)
        held = ledger.timeline[-1].kind_bytes
        return held - held[0]

    def state_bytes(self) -> int:
        """Bytes of the generator states that a step records at once: none on a card, whose states lie with the host."""
        return 0 if self.device == "cuda" else self._once("states", self._state_bytes)

    def _state_bytes(self) -> int:
        with self._faked():
            parameters = [parameter for encoder in self.encoders for parameter in encoder.parameters()]
            return sum(tensor.nbytes for tensor in RandomState.record(parameters).tensors)

    def batch(self, tower: int, rows: int, width: int | None) -> Any:
        """What a tower is given in a run: a padded batch of fake tensors."""
        return padded_batch(self.encoders[tower], rows, width)

    def in_order(self, first: int, rows: int) -> tuple[int, ...]:
        """The rows of a run's chunk: side by side, as in a padded batch."""
        return tuple(range(first, first + rows))

    def chunk_width(self, tower: int, width: int | None) -> int:
        """The width of a run's chunk that leaves its rows as they are."""
        return width or 1

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

        on_encoded: is called with the ledger so far and the representations at the end of each forward of an encoder;
        what the encoder is given is then named where it is a copy.
        """
        towers = range(len(self.encoders)) if towers is None else towers
        encoders = [self.encoders[tower] for tower in towers]
        with self._faked():
            self.runs += 1
            inputs = [self.batch(*each) for each in zip(towers, rows, widths, strict=True)]
            with record_memory(*self.modules) as ledger, ExitStack() as stack:
                stack.enter_context(suppress(PhaseReached))
                for encoder in encoders if on_encoded else ():
                    given = encoder.register_forward_pre_hook(
                        lambda module, *inputs: ledger.name_copies(*inputs), with_kwargs=True
                    )
                    hook = encoder.register_forward_hook(lambda module, inputs, reps: on_encoded(ledger, reps))
                    stack.callback(lambda hooks=(given, hook): [hook.remove() for hook in hooks])

                def on_phase(phase: str, **named: Any) -> None:
                    if phase == until:
                        raise PhaseReached
                    if self.device == "cuda":
                        named["tensors"] = [one for one in named.get("tensors", ()) if one[0] != "random states"]
                    ledger.on_phase(phase, **named)

                step(encoders, inputs, loss_fn or self.loss, on_phase=on_phase, **options)
            if step is not naive_step:
                self._refuse_sparse()
            return ledger

    def _refuse_sparse(self) -> None:
        """Sparse gradients grow where chunks add to them, and fake ones do not."""
        gradients = [p.grad for module in self.modules for p in module.parameters() if p.grad is not None]
        if any(gradient.layout != torch.strided for gradient in gradients):
            rule = "must have dense gradients for a forecast of a step in chunks; measure with record_memory"
            raise refuse("encoders", rule, "sparse ones (nn.Embedding(sparse=True))")

    def input_bytes(self, tower: int, rows: int, width: int | None) -> int:
        """Bytes of what a tower is given."""
        with self._faked():
            row = self.batch(tower, 1, width)
        return rows * sum(tensor.nbytes for tensor in row.values())

    def row_flops(self, tower: int, width: int | None) -> tuple[float, float]:
        """FLOPs of one row's forward and backward, as `count_flops` counts those of two."""
        key = f"flops {self.encoder_index(tower)} {width}"
        return self._once(key, lambda: self._row_flops(tower, width))

    def _row_flops(self, tower: int, width: int | None) -> tuple[float, float]:
        encoder, outputs = self.encoders[tower], []
        with self._faked():
            inputs = self.batch(tower, 2, width)
            forward = count_flops(lambda: outputs.append(encode(encoder, inputs)))
            reps = outputs.pop()
            return forward / 2, count_flops(reps.sum().backward) / 2 if reps.requires_grad else 0.0

    def token_flops(self, tower: int, width: int | None) -> float:
        """FLOPs of one token's forward; of a picture's patch those of a product with each matrix."""
        if width is not None:
            return self.row_flops(tower, width)[0] / width
        return 2.0 * sum(p.numel() for p in self.encoders[tower].parameters() if p.ndim > 1)

    def whole(
        self, step: str, queries: int, negatives: int, widths: tuple[int | None, ...]
    ) -> list[tuple[dict[str, Any], np.ndarray]]:
        """The naive step's pieces, each with its phase, tower and chunk; or those of accumulation's first and later
        chunk of this many queries.
        """
        single = queries == 1
        if not single:
            self._check_loss(queries, negatives, widths)

        def fit() -> PlacedLaws:
            laws = _joined([self._whole_run(step, n, negatives, widths) for n in ((1,) if single else (2, 3, 4))])
            rows, until = (1, self._checked_until) if single else (CHECKED, "")  # of one row, no law in the rows
            seen = self._read_whole(step, rows, negatives, widths, until)
            try:
                for (place, law), (segment, events) in zip(laws[: len(seen)] if until else laws, seen, strict=True):
                    if place != _place(segment):
                        raise LawBroken
                    law.check(FEW if single else rows, events)
            except (LawBroken, ValueError):  # other pieces, say
                return self._whole_again(0, fit)
            return laws

        laws = self._kept(("whole", step, negatives, widths, single), fit, with_loss=True)
        return [(place, law.at(FEW if single else queries)) for place, law in laws]

    def _check_loss(self, queries: int, negatives: int, widths: tuple[int | None, ...]) -> None:
        """Raise LawBroken for a loss that takes other operations for this many queries than for a few: tiles do."""
        few = self._once(f"loss {negatives} {widths}", lambda: len(self._cached_loss(_rows(FEW, negatives), widths)[0]))
        if len(self.cached_loss(_rows(queries, negatives), widths)[0]) != few:
            raise LawBroken

    def _whole_run(self, step: str, queries: int, negatives: int, widths: tuple[Any, ...]) -> Events:
        """Pieces of a step with so many queries; of tied towers read off few layers, where these are alike."""
        read = partial(self._read_whole, step, queries, negatives, widths)
        all_layers = self.encoder_index(1) or 0 in self._unlike
        return read() if all_layers else over_depth(self.encoders[0], read, _grown)

    @property
    def _checked_until(self) -> str:
        """The phase up to which what was read off few layers is held against all of them: the loss, after each tower's
        first forward, where the encoder was made of a config by known code; "" for all of the step where somebody's own
        code may treat some layers otherwise.
        """
        return "loss" if self.of_known_code else ""

    def _read_whole(self, step: str, queries: int, negatives: int, widths: tuple[Any, ...], until: str = "") -> Events:
        if step == "naive":
            return relative(self.run(naive_step, _rows(queries, negatives), widths, until=until))
        rows = _rows(2 * queries, negatives)
        pieces = relative(self.run(accumulation_step, rows, widths, chunk_size=queries, until=until))
        return [piece for piece in pieces if piece[0].chunk is not None]

    def chunk(self, tower: int, width: int, rows: int, retained: bool) -> dict[tuple[str, bool], Piece]:
        """The pieces of one chunk of gradient caching, by (phase, whether it is the first of its encoder)."""
        single = rows == 1
        key = (self.encoder_index(tower), width, retained, single)
        laws = self._kept(("chunk", *key), lambda: self._chunk_laws(*key), with_loss=False)
        n = FEW if single else rows
        return {
            (marks["phase"], marks["first"]): Piece(law.at(n), marks["room_at"], marks["encoded_at"])
            for marks, law in laws
        }

    def _kept(self, key: tuple, fit: Callable[[], PlacedLaws], *, with_loss: bool) -> PlacedLaws:
        """The laws under this key: of this session, of an earlier one, or fitted now."""
        with self.lock:
            if key not in self._laws:
                stored = self.files.read(key, with_loss=with_loss) if self.files else None
                laws = fit() if stored is None else [(place, Law(differences)) for place, differences in stored]
                if stored is None and self.files:
                    self.files.write(key, [(place, law.differences) for place, law in laws], with_loss=with_loss)
                self._laws[key] = laws
            return self._laws[key]

    def _chunk_run(
        self,
        encoder: int,
        width: int | None,
        sizes: Sequence[int],
        retained: bool,
        until: str = "",
        whole: bool = False,
    ) -> dict[tuple[str, bool], Piece]:
        """A step with a tower of chunks of these sizes: pieces by (phase, whether it is the first).

        whole: with all layers of the encoder, as up to a phase; if not, it is read off few where they are alike.
        """
        read = partial(self._read_chunks, encoder, width, sizes, retained, until)
        all_layers = until or whole or encoder in self._unlike
        return read() if all_layers else over_depth(self.encoders[encoder], read, _grown_pieces)

    def _read_chunks(
        self, encoder: int, width: int | None, sizes: Sequence[int], retained: bool, until: str
    ) -> dict[tuple[str, bool], Piece]:
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        wide = self.chunk_width(encoder, width)
        chunks = [Chunk(self.in_order(at, size), wide) for at, size in zip(starts, sizes, strict=True)]
        options = {"plan": chunks, "retain_chunks": len(sizes) if retained else 0, "until": until}
        ends: list[int] = []

        def on_encoded(ledger: MemoryLedger, reps: Tensor) -> None:
            ends.append(len(ledger.events))
            self._laws["row", encoder, width] = (tuple(reps.shape[1:]), reps.dtype)
            if reps.requires_grad:
                reps.register_hook(lambda gradient: ledger.name_copies(gradient))

        ledger = self.run(grad_cache_step, [sum(sizes)], [width], [encoder], Total(), on_encoded=on_encoded, **options)
        room = sum(sizes) * self.row_bytes(encoder, width)
        starts = [start for start, _ in ledger.pieces[1:]]
        read = []
        for (segment, events), start in zip(relative(ledger), starts, strict=True):
            if segment.chunk is not None:
                end = next((end - start for end in ends if start <= end < start + len(events)), None)
                read.append((segment, events, end))
        read = _freed_at_once(read) if self.autocast else read
        return {
            (segment.phase, segment.chunk == 0): Piece.without_room(events, room, end) for segment, events, end in read
        }

    def _chunk_laws(self, encoder: int, width: int | None, retained: bool, single: bool) -> PlacedLaws:
        """The laws of chunks, once a chunk of CHECKED rows, or of the one, lies on its own with all layers, as far as
        `_checked_until` says. Raises LawBroken where not.
        """
        laws = self._fitted(encoder, width, retained, single)
        rows, until = 1 if single else CHECKED, self._checked_until
        seen = self._chunk_run(encoder, width, (rows,), retained, until=until, whole=True)
        try:
            for marks, law in laws:
                if marks["first"] and (marks["phase"], True) in seen:
                    law.check(FEW if single else rows, seen[marks["phase"], True].kind_bytes)
        except LawBroken:
            return self._whole_again(encoder, lambda: self._chunk_laws(encoder, width, retained, single))
        return laws

    def _whole_again(self, encoder: int, fit: Callable[[], PlacedLaws]) -> PlacedLaws:
        """A fit that was not held, with all layers: perhaps they only looked alike. LawBroken where they were read."""
        if encoder in self._unlike:
            raise LawBroken
        self._unlike.add(encoder)
        return fit()

    def _fitted(self, encoder: int, width: int | None, retained: bool, single: bool = False) -> PlacedLaws:
        """For each phase, a law of later chunks, and a law of the first beside it."""
        pieces = self._chunk_run(encoder, width, (1, 1) if single else (FEW, MANY), retained)
        laws: PlacedLaws = []
        for phase in sorted({phase for phase, _ in pieces}):
            first, later = pieces[phase, True], pieces[phase, False]
            law = Law((later.kind_bytes,)) if single else Law.line(first.as_later(), later.kind_bytes)
            beside = law.beside(first.kind_bytes, first.room_at)
            for piece, fitted in ((first, beside), (later, law)):
                marks = {"room_at": piece.room_at, "encoded_at": piece.encoded_at, "flops": piece.flops}
                laws.append(({"phase": phase, "first": piece is first, **marks}, fitted))
        return laws

    def row_of(self, tower: int, width: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape behind the rows, and dtype, of the tower's representations."""
        key = ("row", self.encoder_index(tower), width)
        with self._faked(), torch.no_grad():
            if key not in self._laws:
                reps = encode(self.encoders[tower], self.batch(tower, 2, width))
                self._laws[key] = (tuple(reps.shape[1:]), reps.dtype)
        return self._laws[key]

    def row_bytes(self, tower: int, width: int) -> int:
        """Bytes of one representation."""
        shape, dtype = self.row_of(tower, width)
        return math.prod(shape) * dtype.itemsize

    def cached_loss(self, rows: Sequence[int], widths: Sequence[int | None]) -> tuple[np.ndarray, ...]:
        """Step 2, for the loss alone is a few operations: bytes relative to its start.

        And, by kind, what autocast's copies of representations hold until the next forward has ended. It is taken at
        its real size; of fewer rows than once before, a law answers that was held against those (`HeldLaw`). The last
        answer is remembered: who looks for a chunk asks again and again for the same rows.
        """
        with self.lock:
            asked = (tuple(rows), tuple(widths))
            if self._last_loss is None or self._last_loss[0] != asked:
                each = rows[1] // rows[0]  # passages a query, which losses of one law have in common
                law = HeldLaw(lambda n: self._cached_loss((n, each * n), asked[1]))
                law = self._loss_laws.setdefault((each, asked[1]), law)
                self._last_loss = (asked, law.at(rows[0]))
            return self._last_loss[1]

    def _cached_loss(self, rows: Sequence[int], widths: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray]:
        kinds = [self.row_of(tower, width) for tower, width in enumerate(widths)]
        loss = [self.loss] if isinstance(self.loss, nn.Module) else []
        with self._faked(), record_memory(*loss) as ledger:
            reps = [torch.empty(count, *shape, dtype=dtype) for count, (shape, dtype) in zip(rows, kinds, strict=True)]
            return loss_events(reps, self.loss, ledger)

    def _once(self, key: str, compute: Callable[[], Any]) -> Any:
        with self.lock:
            if key not in self._laws:
                self._laws[key] = compute()
            return self._laws[key]

    @contextmanager
    def _faked(self) -> Iterator[None]:
        """Fake tensors and the autocast of the forecast, one thread at a time, with no gradients left over."""
        context = torch.autocast("cpu", self.autocast, enabled=self.autocast is not None)
        kernels = CudaKernels() if self.device == "cuda" else CpuKernels()
        with (
            self.lock,
            torch.inference_mode(False),
            torch.enable_grad(),
            self.mode,
            context,
            kernels,
            rehearsal(self.ranks),
        ):
            for module in self.modules:
                module.zero_grad(set_to_none=True)
            try:
                yield
            except (ValueError, LawBroken):
                raise
            except Exception as error:
                rule = "and loss must run on fake tensors, which have shapes and no values; measure with record_memory"
                raise refuse("encoders", rule, f"{type(error).__name__}: {str(error)[:200]}") from error


def _rows(queries: int, negatives: int) -> tuple[int, int]:
    return queries, queries * (1 + negatives)


def loss_events(reps: list[Tensor], loss: Any, ledger: MemoryLedger) -> tuple[np.ndarray, np.ndarray]:
    """Step 2: its bytes relative to its start, and by kind those of autocast's copies at its end.

    The list is emptied, for its representations are let go of, as the step does; loss and caches stay.
    """
    ledger.on_phase("first_forward", tensors=[("representations", rep) for rep in reps])
    before = np.array(ledger.events[-1].kind_bytes, dtype=np.int64)
    leaves = [rep.requires_grad_() for rep in reps]
    reps.clear()
    value = take_loss(leaves, loss, None, ledger.on_phase)
    cache_gradients(value, None, leaves, ledger.on_phase)
    held = [value.detach(), *(leaf.grad for leaf in leaves)]
    del value, leaves
    events = ledger.timeline[-1].kind_bytes - before
    torch.clear_autocast_cache()
    copies = events[-1] + before - np.array(ledger.events[-1].kind_bytes, dtype=np.int64)
    del held
    return events, copies


class Total(nn.Module):
    """The sum of representations, a loss for runs that ask only about the encoder; it keeps what a row is. For the
    number in it, which could be trained, a frozen encoder is run too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(()))

    def forward(self, reps: Tensor) -> Tensor:
        """The sum of all numbers."""
        self.row = tuple(reps.shape[1:]), reps.dtype
        return reps.sum()


def _freed_at_once(read: list[tuple[Segment, np.ndarray, int | None]]) -> list[tuple[Segment, np.ndarray, int | None]]:
    """Chunks' events under autocast, whose copies are let go of behind the forward: one event for all of them, which
    are freed in an order that goes by their addresses. (As many in every chunk of a phase; none of them is a peak.)
    """
    copies: dict[str, int] = {}
    for segment, events, end in read:
        grows = (np.diff(events, axis=0, prepend=0) > 0).any(axis=1)[end:]
        copies[segment.phase] = min(
            int(grows.argmax()) if grows.any() else len(grows), copies.get(segment.phase, 1 << 62)
        )
    return [
        (
            segment,
            events if end is None else np.delete(events, range(end, end + copies[segment.phase] - 1), axis=0),
            end,
        )
        for segment, events, end in read
    ]


def _grown(few: Events, more: Events, times: int) -> Events:
    """A run's pieces at a greater depth: a backward goes through both towers. LawBroken where they are not alike."""
    if [_place(segment) for segment, _ in few] != [_place(segment) for segment, _ in more]:
        raise LawBroken
    both = zip(few, more, strict=True)
    return [(segment, grown(events, deeper, times, places=2)) for (segment, events), (_, deeper) in both]


def _grown_pieces(few: dict[Any, Piece], more: dict[Any, Piece], times: int) -> dict[Any, Piece]:
    if few.keys() != more.keys():
        raise LawBroken
    return {key: piece.grown(more[key], times) for key, piece in few.items()}


def _place(segment: Segment) -> dict[str, Any]:
    return {"phase": segment.phase, "tower": segment.tower, "chunk": segment.chunk}


def _joined(runs: Sequence[Events]) -> PlacedLaws:
    """One law a piece, through the same piece of every run."""
    if len({len(run) for run in runs}) != 1:
        raise LawBroken
    laws: PlacedLaws = []
    for pieces in zip(*runs, strict=True):
        laws.append((_place(pieces[0][0]), Law.through([events for _, events in pieces])))
    return laws
