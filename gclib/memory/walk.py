"""What is alive while a step runs: bytes by kind, and which pieces' graphs autograd still remembers.

A walk is measured, not told: the step really runs, a ledger counts its tensors, and hooks on what autograd saves for
the backward say which piece (tower, chunk) saved it, and when it is let go.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gclib.memory.ledger import KINDS, record_memory
from gclib.support.validation import refuse

Piece = tuple[int | None, int | None]  # (tower, chunk); (None, None) is the loss, or the step as a whole
WHOLE: Piece = (None, None)
AFTER = "after"


@dataclass(frozen=True)
class Moment:
    """One piece of a step, when most was alive in it.

    kind_bytes: live bytes by kind. graph_bytes: bytes that autograd remembers for the backward, by the piece
    whose forward saved them (parameters are not counted). encoded: pieces whose representations exist or existed.
    events: (events, kinds), live bytes after each event of the moment, in the order of KINDS.
    """

    phase: str
    piece: Piece
    kind_bytes: dict[str, int]
    graph_bytes: dict[Piece, int]
    encoded: frozenset[Piece]
    events: np.ndarray = field(compare=False, repr=False)


@dataclass(frozen=True)
class Walk:
    """A step, moment by moment. rows: the pieces that it cuts the towers' inputs into, in order."""

    rows: tuple[Piece, ...]
    moments: tuple[Moment, ...]


def record_walk(
    step: Callable[..., Tensor],
    encoders: Sequence[nn.Module],
    inputs: Sequence[Any],
    loss_fn: Callable[..., Tensor],
    **options: Any,
) -> Walk:
    """Run `step(encoders, inputs, loss_fn, **options)` for real, on the CPU, and return what was alive when.

    One Moment for each piece that the step reports through `on_phase` (so options may not hold that) but a chunked
    step's entry, and one after it has returned. Gradients are added to `.grad`, as the step does. Raises ValueError
    where encoders are no modules.
    """
    if not all(isinstance(encoder, nn.Module) for encoder in encoders):
        raise refuse("encoders", "must be torch modules", [type(encoder).__name__ for encoder in encoders])
    if "on_phase" in options:
        raise refuse("options", "must not hold on_phase: the walk listens there itself", sorted(options))
    saved = _Saved(parameter for encoder in encoders for parameter in encoder.parameters())
    with record_memory(*encoders) as ledger:

        def on_phase(phase: str, **named: Any) -> None:
            ledger.on_phase(phase, **named)
            saved.enter(phase, (named.get("tower"), named.get("chunk")))

        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda handle: handle):
            step(encoders, inputs, loss_fn, on_phase=on_phase, **options)
        on_phase(AFTER)
    return _walk_of(ledger.timeline[1:], saved.peaks)


class _Saved:
    """Bytes of the storages that autograd remembers, by the piece that was going on when they were saved."""

    def __init__(self, parameters: Any):
        self._known = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._uses: dict[tuple[Piece, int], int] = {}
        self._bytes: dict[Piece, int] = {}
        self._place: tuple[str, Piece] | None = None
        self.peaks: list[dict[Piece, int]] = []

    def enter(self, phase: str, piece: Piece) -> None:
        """A new piece begins, unless it is the same one that reports again."""
        if (phase, piece) != self._place:
            self._place = phase, piece
            self.peaks.append({})
            self._note()

    def pack(self, tensor: Tensor) -> Tensor:
        """Called by autograd as it saves `tensor`; what is returned lives as long as autograd remembers it."""
        handle = tensor.detach()
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            key, size = (self._place[1], storage._cdata), storage.nbytes()
            if key not in self._uses:
                self._bytes[key[0]] = self._bytes.get(key[0], 0) + size
            self._uses[key] = self._uses.get(key, 0) + 1
            weakref.finalize(handle, self._forget, key, size).atexit = False
            self._note()
        return handle

    def _forget(self, key: tuple[Piece, int], size: int) -> None:
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._uses[key]
            self._bytes[key[0]] -= size

    def _note(self) -> None:
        if sum(self._bytes.values()) >= sum(self.peaks[-1].values()):
            self.peaks[-1] = {piece: size for piece, size in self._bytes.items() if size}


def _walk_of(segments: Sequence[Any], peaks: Sequence[dict[Piece, int]]) -> Walk:
    """The ledger's pieces and autograd's, joined; the entry of a chunked step, where nothing has happened, left out."""
    moments: list[Moment] = []
    encoded: list[Piece] = []
    for segment, graph_bytes in zip(segments, peaks, strict=True):
        piece = (segment.tower, segment.chunk)
        if segment.phase == "first_forward" and piece == WHOLE:
            continue
        if segment.phase == "first_forward" and piece not in encoded:
            encoded.append(piece)
        kind_bytes = {kind: int(count) for kind, count in zip(KINDS, segment.at_peak(), strict=True)}
        moments.append(Moment(segment.phase, piece, kind_bytes, graph_bytes, frozenset(encoded), segment.kind_bytes))
    return Walk(tuple(sorted(encoded, key=lambda row: (row[0], row[1] or 0))), tuple(moments))
