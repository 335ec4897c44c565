"""Every tensor byte of a step: when it came and went, in which phase, and what it was for.

A dispatch mode sees each operation's outputs. A storage that was not seen before is counted with its real size; a
finalizer takes it off when the last tensor on it is gone. Views, in-place results and shared storages therefore count
once. What no dispatch mode sees, generator states and the batch, the steps name through `on_phase`.

Not seen: workspaces inside an operation (a processor's bf16 products take some hundred KiB), the allocator's rounding,
a CUDA context.

Watching changes one thing, and the ledger takes that out again: where a tensor is used twice, autograd adds the second
gradient to the first in place, but not while somebody else (a dispatch mode, a fake tensor) knows the first. The
sum and the operand that dies with it are then counted as the one buffer that they are in an unwatched step. (Autograd
does so for gradients that are no views; tests/memory/test_ledger.py holds this against the allocator of unwatched
steps.)
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from gclib.support.validation import refuse

KINDS = (
    "parameters",
    "gradients",
    "optimizer",
    "inputs",
    "representations",
    "cache",
    "loss",
    "activations",
    "random states",
    "other",
)
_NUMBER = {kind: number for number, kind in enumerate(KINDS)}
_LAYOUT_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
ASKED_DEVICE = torch.ops.prim.device.default


@dataclass(frozen=True, slots=True)
class Event:
    """The bytes of each kind (in the order of KINDS) after something came, went or changed its kind."""

    phase: str
    tower: int | None
    chunk: int | None
    kind_bytes: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all live tensors."""
        return sum(self.kind_bytes)


@dataclass(frozen=True)
class Segment:
    """One piece of a step, between two calls of on_phase, or a run of `repeats` such pieces that are alike.

    kind_bytes: (events, kinds), absolute bytes of the first repeat. net_bytes: (kinds,), what each repeat leaves.
    """

    phase: str
    tower: int | None
    chunk: int | None
    rows: int | None
    repeats: int
    kind_bytes: np.ndarray
    net_bytes: np.ndarray

    @property
    def peak_bytes(self) -> int:
        """The most bytes live at once in any of the repeats."""
        return int(self.at_peak().sum())

    def at_peak(self) -> np.ndarray:
        """The bytes of each kind at this segment's peak, (kinds,)."""
        highest = self.kind_bytes[self.kind_bytes.sum(axis=1).argmax()]
        grows = self.net_bytes.sum() > 0
        return highest + (self.repeats - 1) * self.net_bytes if grows else highest


@dataclass
class MemoryLedger:
    """What `record_memory` fills in. Bytes everywhere; a list that grows while the step runs.

    device: the type of the only device whose tensors are counted; None for every device.
    """

    events: list[Event] = field(default_factory=list)
    device: str | None = None
    pieces: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    _live: dict[int, list[int]] = field(default_factory=dict, repr=False)
    _totals: list[int] = field(default_factory=lambda: [0] * len(KINDS), repr=False)
    _default: int = field(default=_NUMBER["other"], repr=False)
    _recording: bool = field(default=True, repr=False)
    _sum: tuple[int, Event] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._place = {"phase": "start", "tower": None, "chunk": None}

    @property
    def start_bytes(self) -> int:
        """Bytes that were live when the first phase began: parameters, gradients and optimizer states."""
        return self.events[0].total_bytes if self.events else 0

    @property
    def peak_bytes(self) -> int:
        """The most bytes of live tensors at any event."""
        return max((event.total_bytes for event in self.events), default=0)

    def at_peak(self) -> dict[str, int]:
        """The bytes of each kind at the (first) peak; they add up to `peak_bytes`."""
        if not self.events:
            return dict.fromkeys(KINDS, 0)
        return dict(zip(KINDS, max(self.events, key=lambda event: event.total_bytes).kind_bytes, strict=True))

    @property
    def timeline(self) -> list[Segment]:
        """The events cut into pieces, one Segment each: a new one where on_phase names another place."""
        starts = [start for start, _ in self.pieces]
        segments: list[Segment] = []
        held = np.array([event.kind_bytes for event in self.events], dtype=np.int64).reshape(-1, len(KINDS))
        for (start, place), stop in zip(self.pieces, [*starts[1:], len(held)], strict=True):
            before = held[start - 1] if start else np.zeros(len(KINDS), dtype=np.int64)
            net = held[stop - 1] - before
            segments.append(Segment(**place, rows=None, repeats=1, kind_bytes=held[start:stop], net_bytes=net))
        return segments

    def on_phase(
        self,
        phase: str,
        *,
        tower: int | None = None,
        chunk: int | None = None,
        chunks: int | None = None,
        tensors: Any = (),
    ) -> None:
        """Hand this to a step as its on_phase. Begins a piece, and gives the named tensors their kind."""
        self._settle()
        place = {"phase": phase, "tower": tower, "chunk": chunk}
        self._default = _NUMBER["loss" if phase == "loss" else "activations"]
        if place != self._place:
            self._place = place
            self.pieces.append((len(self.events), place))
        for kind, tensor in tensors:
            self._assign(tensor, kind)
        self._log()

    def _assign(self, tensor: Tensor, kind: str) -> bool:
        """Count the tensor's storage under `kind`, whether it was seen before or not. True if anything changed."""
        if kind not in _NUMBER:
            raise refuse("tensors", f"must be (kind, tensor) pairs with a kind of {', '.join(KINDS)}", kind)
        if self._elsewhere(tensor):
            return False
        if tensor.layout != torch.strided:
            return any([self._assign(part, kind) for part in _parts(tensor)])
        storage = tensor.untyped_storage()
        entry = self._live.get(storage._cdata)
        if entry is None:
            self._add(storage, _NUMBER[kind])
            return True
        if entry[1] == _NUMBER[kind] or entry[1] == _NUMBER["parameters"]:
            return False
        self._totals[entry[1]] -= entry[0]
        self._totals[_NUMBER[kind]] += entry[0]
        entry[1] = _NUMBER[kind]
        return True

    def name_copies(self, *values: Any) -> None:
        """Count as "other" those of the tensors in these values that an operation of the step has made: of what an
        encoder is given, the rows that do not stand side by side.
        """
        for tensor in _tensors(values):
            entry = self._live.get(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None
            if entry is not None and entry[1] == _NUMBER["activations"]:
                self._assign(tensor, "other")

    def _see(self, value: Tensor, kind: int) -> bool:
        """Count the storage of an operation's argument or output, unless it is counted already."""
        if self._elsewhere(value):
            return False
        if value.layout != torch.strided:
            return any([self._see(part, kind) for part in _parts(value)])
        storage = value.untyped_storage()
        entry = self._live.get(storage._cdata)
        if entry is None:
            return self._add(storage, kind)
        size = storage.nbytes()
        if size == entry[0]:
            return False
        self._totals[entry[1]] += size - entry[0]  # resized in place
        entry[0] = size
        return True

    def _elsewhere(self, tensor: Tensor) -> bool:
        """Whether the tensor is on a device that is not counted."""
        return self.device is not None and tensor.device.type != self.device

    def _add(self, storage: torch.UntypedStorage, kind: int) -> bool:
        key, size = storage._cdata, storage.nbytes()
        self._live[key] = [size, kind]
        self._totals[kind] += size
        weakref.finalize(storage, self._gone, key).atexit = False
        return size > 0

    def _gone(self, key: int) -> None:
        entry = self._live.pop(key, None)
        if entry is not None:
            self._totals[entry[1]] -= entry[0]
            if self._sum is not None and key == self._sum[0]:
                self._sum = None
            if entry[0]:
                self._log()

    def _log(self) -> None:
        if self._recording:
            self.events.append(self._now())

    def _now(self) -> Event:
        return Event(**self._place, kind_bytes=tuple(self._totals))

    def _hold_sum(self, first: Tensor) -> None:
        """A sum made by autograd: logged only if the next operation comes while its first operand still lives."""
        self._sum = (first.untyped_storage()._cdata, self._now())

    def _settle(self) -> None:
        """Log a sum whose first operand outlived it: it was not one that autograd does in place."""
        if self._sum is not None and self._recording:
            self.events.append(self._sum[1])
        self._sum = None


class UncompiledMode(TorchDispatchMode):
    """A dispatch mode in which nothing is compiled: keeping the compiler out takes a fifth of a recording's time."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Recorder(UncompiledMode):
    """Shows the ledger every operation's arguments (what was there before) and outputs (what is new)."""

    def __init__(self, ledger: MemoryLedger):
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ledger, kwargs = self.ledger, kwargs or {}
        if func is ASKED_DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two of three operations on fake tensors only ask this
        ledger._settle()
        for value in _tensors((args, kwargs)):
            ledger._see(value, _NUMBER["inputs"])
        # A sparse tensor that grows in place has new parts beside the old ones inside the operation.
        _old = [_parts(value) for value in _tensors(args) if value.layout != torch.strided]
        result = func(*args, **kwargs)
        if any([ledger._see(value, ledger._default) for value in _tensors(result)]):
            if func is torch.ops.aten.add.Tensor and _in_place_unwatched(args[0], result):
                ledger._hold_sum(args[0])
            else:
                ledger._log()
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an operation's arguments or outputs: containers of any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that one of another layout is made of; none where PyTorch shows none."""
    names = _LAYOUT_PARTS.get(tensor.layout, ())
    return [getattr(tensor, name)() for name in names]


def _in_place_unwatched(first: Tensor, result: Tensor) -> bool:
    """Whether autograd, if nobody watched, would add to this operand in place (should it hold the last reference)."""
    inside_backward = torch._C._current_graph_task_id() != -1
    # A view shares its storage with its base, which autograd respects.
    alone = first.layout == torch.strided and first._base is None
    return inside_backward and alone and first.shape == result.shape and first.dtype == result.dtype


@contextmanager
def record_memory(
    *modules: nn.Module, optimizer: torch.optim.Optimizer | None = None, device: str | None = None
) -> Iterator[MemoryLedger]:
    """Record every tensor byte of what runs inside, in this thread, on the CPU or a GPU.

    modules: encoders and a loss with parameters; their parameters, buffers and present gradients are counted from
    the start. optimizer: its states too. device: count only tensors on devices of this type ("cuda": what lies on the
    card, and not the generator states, which lie with the host); None counts all. Hand `ledger.on_phase` to the step
    for phases and kinds. Recording takes time (`tests/benchmarks/bench_ledger.py` prints how much): bytes are exact,
    times recorded inside are not.
    """
    if not all(isinstance(module, nn.Module) for module in modules):
        raise refuse("modules", "must be torch modules", [type(module).__name__ for module in modules])
    ledger = MemoryLedger(device=device)
    with ExitStack() as stack:
        parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
        for tensor in (*parameters, *(buffer for module in modules for buffer in module.buffers())):
            ledger._assign(tensor, "parameters")
        for parameter in parameters:
            if parameter.grad is not None:
                ledger._assign(parameter.grad, "gradients")
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(_gradient_namer(ledger)).remove)
        for tensor in _tensors(list(optimizer.state.values()) if optimizer else []):
            ledger._assign(tensor, "optimizer")
        ledger.pieces.append((0, ledger._place))
        ledger._log()
        stack.enter_context(_Recorder(ledger))
        try:
            yield ledger
        finally:
            ledger._recording = False


def _gradient_namer(ledger: MemoryLedger) -> Any:
    """.grad adopts a temporary without an operation: the hook gives it its kind at that moment."""

    def name_gradient(parameter: Tensor) -> None:
        if ledger._assign(parameter.grad, "gradients"):
            ledger._log()

    name_gradient.only_reads = True  # so a chunked step lets it stay
    return name_gradient
