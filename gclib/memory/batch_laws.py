"""Bytes and FLOPs of a chunk of a real batch, of any number of rows and any width: what `plan_step` reckons with.

The encoders are the caller's own and so are the entries of their inputs; both are faked, run at a few widths, and every
event of a run is written as a + b w + c w^2 + r (d + e w + f w^2) for r rows of w tokens (`gclib.memory.laws` says why
bytes are a line in r; attention and its mask make them a parabola in w). A run at the batch's own width must lie on it,
to the byte. Chunks are of rows that do not stand side by side, as in a sorted batch: they have copies of ids and masks,
which are told apart, so that laws of rows that do stand side by side follow.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from gclib.chunks import Chunk
from gclib.distributed import world_size
from gclib.memory.fake_modules import fake_copy
from gclib.memory.fake_steps import FakeStep, Total, loss_events, relative
from gclib.memory.flops import FlopsByPhase
from gclib.memory.laws import CHECKED, FEW, MANY, Law, LawBroken, Piece
from gclib.memory.ledger import KINDS, record_memory
from gclib.steps import grad_cache_step
from gclib.support.modules import modules_of
from gclib.support.validation import refuse
from gclib.towers import Tower, generators_of, row_lengths, take, trimmed_names

WIDTHS = (2, 5, 11)  # three for a parabola; the batch's own width is a fourth
PRIME = 32_749  # rows
COPIES = KINDS.index("other")  # the kind that `MemoryLedger.name_copies` gives
PLAIN = (bool, int, float, str)
MEASURED = 2  # rows of a chunk that is measured, where there are no laws
RETAINED = ("first_forward", "backward")
PARTS = {"": slice(None), " copies": slice(COPIES, COPIES + 1)}  # all bytes of an event, and those of copies


@dataclass(frozen=True)
class Entries:
    """What a tower's inputs are made of: for each entry its rows' shape, dtype and whether it is cut to the chunk's
    width (then the shape is what follows the width); other values as they are.
    """

    kind: str
    entries: tuple[tuple[Any, Any, Any, bool], ...]

    @classmethod
    def of(cls, tower: Tower) -> "Entries":
        """Those of a real tower."""
        inputs = tower.inputs
        if isinstance(inputs, Tensor):
            return cls("tensor", (_entry(None, inputs, trimmed=False),))
        items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
        entries = tuple(_entry(name, value, trimmed=name in tower.trimmed) for name, value in items)
        return cls("mapping" if isinstance(inputs, Mapping) else "tuple", entries)

    def made(self, rows: int, width: int | None) -> Any:
        """Inputs of this many rows, every one of them full."""
        values = {}
        for name, shape, dtype, trimmed in self.entries:
            if dtype is None:
                values[name] = shape
            else:
                fill = torch.ones if name == "attention_mask" else torch.zeros
                values[name] = fill((rows, *((width,) if trimmed else ()), *shape), dtype=dtype)
        if self.kind == "tensor":
            return values[None]
        return values if self.kind == "mapping" else tuple(values.values())


def _entry(name: Any, value: Any, *, trimmed: bool) -> tuple[Any, Any, Any, bool]:
    if not isinstance(value, Tensor):
        return name, value, None, False
    return name, tuple(value.shape[2 if trimmed else 1 :]), value.dtype, trimmed


@dataclass(frozen=True)
class Lines:
    """Bytes over the events of a piece, as six coefficients an event: of 1, w, w^2, r, r w and r w^2."""

    events: np.ndarray

    def at(self, rows: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """(events, chunks): every event of every chunk."""
        return self.events @ monomials(rows, widths)

    def peaks(self, rows: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """(chunks,): the highest event of each."""
        return self.at(rows, widths).max(axis=0) if len(self.events) else np.zeros(len(rows))

    def highest(self) -> "Lines":
        """Without the events that are nowhere above another one."""
        events = np.unique(self.events, axis=0)
        above = (events[:, None] <= events[None]).all(axis=2)
        np.fill_diagonal(above, val=False)
        return Lines(events[~above.any(axis=1)])


def monomials(rows: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(6, chunks): what the coefficients of `Lines` stand before."""
    return np.stack([rows**a * widths**b for a in (0, 1) for b in (0, 1, 2)]).astype(np.float64)


def _no_laws() -> None:
    """One row counts as two."""


@dataclass(frozen=True)
class ChunkLaws:
    """One tower's chunks: bytes relative to a chunk's start, and FLOPs of a forward and of a backward.

    before, after: the forward with a graph, until the room for the tower's representations is there (the first chunk
    alone makes it), and from then on. graph: what that forward leaves. first, later: the backward that creates the
    encoder's gradients, and one that adds to them; first_net, later_net: what they leave. gradients: bytes of these.
    row_bytes: of one representation. token_flops: of a forward of one token. alone: laws of chunks of one row, found
    when first asked for, at some price; None where there are none. look: of these laws, the bytes of two rows encoded
    without a graph, as `gclib.verify` does it before the first step. views: the laws of rows that stand side by side
    and are not copied; None where they are not known to take less.
    """

    before: Lines
    after: Lines
    graph: Lines
    first: Lines
    later: Lines
    first_net: Lines
    later_net: Lines
    gradients: int
    row_bytes: int
    forward_flops: np.ndarray
    backward_flops: np.ndarray
    trained: bool
    token_flops: float
    alone: Callable[[], "ChunkLaws | None"] = _no_laws
    look: int = 0
    views: "ChunkLaws | None" = None

    def peaks(self, name: str, rows: np.ndarray, widths: np.ndarray, views: np.ndarray, lone: str) -> np.ndarray:
        """(chunks,): the highest event of each, by the lines of this name. views: whether its rows are not copied.

        lone: one row takes other operations than two. It counts as "two", which is no less; by its "own" laws; or by
        the "line" of more rows, at hardly any price nearly what it takes.
        """
        laws = [(np.full(len(rows), fill_value=True), self), (views, self.views)]
        laws += [(rows == 1, self.alone())] if lone == "own" and (rows == 1).any() else []
        rows = rows if lone == "line" else np.maximum(rows, 2)
        values = np.zeros(len(rows))
        for these, law in laws:
            if law is not None and these.any():
                values[these] = getattr(law, name).peaks(rows[these], widths[these])
        return values

    def flops(self, rows: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(chunks,) each: FLOPs of a forward and of a backward."""
        values = monomials(rows, widths)
        return self.forward_flops @ values, self.backward_flops @ values


@dataclass(frozen=True)
class LossBytes:
    """Bytes of the loss from its start: the most, and what it leaves."""

    highest: int
    left: int


@dataclass(frozen=True)
class _Subject:
    """What a `BatchStep` fakes: encoders under an autocast on a device; the loss comes later."""

    encoders: Sequence[Any]
    autocast: torch.dtype | None
    device: str
    loss: Any = torch.sum
    ranks: int = 1


class BatchStep(FakeStep):
    """The step of a real batch's towers, run with fake tensors."""

    why = ""  # what is no law but measured was, and why

    def __init__(self, subject: Any, entries: Sequence[Entries]):
        super().__init__(subject)
        self.entries = entries
        self._counter = FlopsByPhase()
        self._losses: dict[Any, LossBytes] = {}

    def batch(self, tower: int, rows: int, width: int | None) -> Any:
        """Rows of the tower's own entries."""
        return self.entries[tower].made(rows, width)

    def in_order(self, first: int, rows: int) -> tuple[int, ...]:
        """The rows of a chunk, not side by side where there is more than one."""
        return tuple(range(first + rows - 1, first - 1, -1))

    def chunk_width(self, tower: int, width: int | None) -> int:
        """The batch's own width where rows are not trimmed, though they have a mask."""
        return width or untrimmed_width(self.batch(tower, 1, width))

    def encoder_index(self, tower: int) -> int:
        """The first tower with the same encoder and the same entries: they share laws."""
        own = self.encoders[tower], self.entries[tower]
        pairs = zip(self.encoders, self.entries, strict=True)
        return next(n for n, (encoder, entries) in enumerate(pairs) if encoder is own[0] and entries == own[1])

    def row_of(self, tower: int, width: int | None) -> tuple[tuple[int, ...], torch.dtype]:
        """Run once more only where what a representation is goes with the width, as far as is known."""
        place = self.encoder_index(tower)
        known = [row for key, row in self._laws.items() if key[:2] == ("row", place)]
        return known[0] if len(known) > len(WIDTHS) and len(set(known)) == 1 else super().row_of(tower, width)

    def run(self, step: Any, *arguments: Any, **options: Any) -> Any:
        """As `FakeStep` runs it, with FLOPs counted."""
        self._counter = FlopsByPhase()
        return super().run(partial(self._counter.step, step), *arguments, **options)

    def loss_bytes(self, loss_fn: Any, towers: Sequence[Tower], tile: Any) -> LossBytes:
        """The loss of all rows of the towers, with this tile where it has one."""
        rows, widths = zip(*((tower.rows, tower.width or None) for tower in towers), strict=True)
        key = (signature([loss_fn]), rows, tuple(self.row_of(*each) for each in enumerate(widths)), tile)
        with self.lock:
            if key not in self._losses:
                try:
                    if world_size() > 1 and getattr(loss_fn, "needs_whole_batch", False):
                        raise refuse("loss_fn", "must not gather to be faked", loss_fn)
                    self.loss = fake_copy(loss_fn, self.mode)
                    if tile is not None:
                        self.loss.tile_size = tile
                    events, copies = self._cached_loss(rows, widths)
                except ValueError:
                    events, copies = _real_loss(loss_fn, towers, key[2])
                self._losses = {key: LossBytes(int(events.sum(axis=1).max()), int(events[-1].sum() + copies.sum()))}
            return self._losses[key]

    def chunk_laws(self, tower: int, width: int | None) -> ChunkLaws:
        """The laws of a tower's chunks, up to this width; None: rows have no width. Raises LawBroken, ValueError."""
        place = self.encoder_index(tower)
        fit = self._checked_fit(place, width, alone=False)

        def as_laws() -> ChunkLaws:
            views = self._as_chunk_laws(place, width, {name: fit[name] - fit.get(f"{name} copies", 0) for name in fit})
            laws = self._as_chunk_laws(place, width, fit)
            return replace(laws, alone=partial(self._laws_of_one_row, place, width), views=views)

        return self._once(("chunk laws", place, width), as_laws)

    def _laws_of_one_row(self, place: int, width: int | None) -> ChunkLaws | None:
        """Those of chunks of one row; None where no law describes them."""

        def fitted() -> ChunkLaws | None:
            with suppress(LawBroken, ValueError):
                laws = self._as_chunk_laws(place, width, self._checked_fit(place, width, alone=True))
                return replace(laws, look=self._look(place, width))

        return self._once(("laws of one row", place, width), fitted)

    def _look(self, place: int, width: int | None) -> int:
        """Two rows without a graph; beside them representations, and copies of buffers and generators' states."""
        seen = self._chunk_run(place, width, (2,), retained=False, until="loss")["first_forward", True]
        buffers = sum(buffer.nbytes for buffer in self.encoders[place].buffers())
        held = 2 * self.state_bytes() + buffers + 4 * self.row_bytes(place, width)
        return int(seen.kind_bytes.sum(axis=1).max()) + held

    def _checked_fit(self, place: int, width: int | None, *, alone: bool) -> dict[str, np.ndarray]:
        """Six coefficients for every event of "forward", "first" and "later", of the copies among them, and for FLOPs:
        of any chunk, or of chunks of one row. A run at the widest width so far lies on them; LawBroken where not.
        """
        with self.lock:
            key, rows = (place, alone), 1 if alone else CHECKED
            fit = self._laws.get(("fit", *key))
            if fit is None or self._laws["checked", *key] < (width or 0):
                seen = self._one_chunk(place, width, rows, whole=True)
                if fit is None:
                    fit = self._fit_alone(place, width) if alone else self._quick_fit(place, width, seen)
                if not alone and not _on_laws(seen, fit, width, rows):
                    self._unlike.add(place)
                    fit = self._fit(place, width)
                if not _on_laws(seen, fit, width, rows):
                    raise LawBroken
                self._laws["fit", *key], self._laws["checked", *key] = fit, width or 0
            return fit

    def _fit_alone(self, place: int, width: int | None) -> dict[str, np.ndarray]:
        """That of a chunk of one row; coefficients of growth a row are zero."""
        runs = [self._one_chunk(place, each, 1) for each in _widths(width)]
        return _fits([{name: np.stack([v, 0 * v], axis=1) for name, v in run.items()} for run in runs], _widths(width))

    def _fit(self, place: int, width: int | None) -> dict[str, np.ndarray]:
        """That of any chunk, by two of them at each width."""
        return _fits([self._run_at(place, each) for each in _widths(width)], _widths(width))

    def _quick_fit(self, place: int, width: int | None, seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same by one chunk of PRIME rows at each width, and the chunk of CHECKED rows at the batch's own that was
        seen. Values at no rows are taken to lie on a line a + b w (not so with a mask of all pairs of tokens that no
        row owns): a number of rows that is prime leaves it as the rest of a division. What a has beyond that rest, a
        number of times PRIME, is what keeps the law from the chunk that was seen. {} where there is no such law.
        """
        widths = _widths(width)
        runs = [self._one_chunk(place, each, PRIME) for each in widths]
        if len({tuple((name, len(values)) for name, values in run.items()) for run in (*runs, seen)}) != 1:
            return {}
        fit = {}
        for name, own in seen.items():
            values = [run[name] for run in runs]
            rests = [value % PRIME for value in values]
            at_none = [rests[0]] * len(widths)
            if width is not None:
                a_token = (rests[1] - rests[0]) * pow(widths[1] - widths[0], -1, PRIME) % PRIME
                a_token = np.where(a_token > PRIME * 7 // 8, a_token - PRIME, a_token)
                at_none = [rests[0] + (each - widths[0]) * a_token for each in widths]
            slopes, over = np.divmod(np.array(values) - at_none, PRIME)
            if over.any():
                return {}
            lines = _parabolas(np.stack([at_none, slopes], axis=2).astype(np.float64), widths)
            off = own - Lines(lines).at(np.array([CHECKED]), np.array([width or 0]))[:, 0]
            lines[:, (0, 3)] += np.round(off / (PRIME - CHECKED))[:, None] * (PRIME, -1)
            fit[name] = lines
        return fit

    def _run_at(self, place: int, width: int | None) -> dict[str, np.ndarray]:
        """Value at no rows and growth a row, (events, 2), of each piece at one width; room_at as it is."""
        laws = {(m["phase"], m["first"]): (m, law) for m, law in self._fitted(place, width, retained=True)}
        marks, law = laws["first_forward", True]
        lines = {"forward": law}
        for first, name in ((True, "first"), (False, "later")):
            if ("backward", first) in laws:
                lines[name] = laws["backward", first][1]
        lines = {f"{name}{end}": _line(law, kinds) for name, law in lines.items() for end, kinds in PARTS.items()}
        for phase in RETAINED:
            few, many = (laws[phase, first][0]["flops"] if (phase, first) in laws else 0 for first in (True, False))
            slope = (many - few) / (MANY - FEW)
            lines[f"{phase} FLOPs"] = np.array([[few - FEW * slope, slope]])
        return lines | {"room_at": np.array([[marks["room_at"], 0]])}

    def _read_chunks(self, *chunk: Any) -> dict[tuple[str, bool], Piece]:
        """As `FakeStep` reads them, with FLOPs; bytes of a piece before its copies were named are these copies."""
        pieces = super()._read_chunks(*chunk)
        for piece in pieces.values():
            unnamed = piece.kind_bytes[: int((piece.kind_bytes[:, COPIES] > 0).argmax())]
            unnamed[:, COPIES], unnamed[:, :COPIES] = unnamed.sum(axis=1), 0
        totals = self._counter.totals
        return {(phase, first): replace(p, flops=totals[phase, 0, 1 - first]) for (phase, first), p in pieces.items()}

    def _one_chunk(self, place: int, width: int | None, rows: int, whole: bool = False) -> dict[str, np.ndarray]:
        """(events,) of each piece of one chunk, and of FLOPs; room_at as it is."""
        pieces = self._chunk_run(place, width, (rows,), retained=True, whole=whole)
        forward, backward = pieces["first_forward", True], pieces.get(("backward", True))
        seen = {"forward": forward.kind_bytes}
        if backward is not None:
            seen |= {"first": backward.kind_bytes, "later": backward.as_later()}
        seen = {
            f"{name}{end}": each[:, kinds].sum(axis=1) for name, each in seen.items() for end, kinds in PARTS.items()
        }
        seen |= {
            f"{phase} FLOPs": np.array([pieces[phase, True].flops if (phase, True) in pieces else 0])
            for phase in RETAINED
        }
        return seen | {"room_at": np.array([forward.room_at])}

    def _as_chunk_laws(self, place: int, width: int | None, fit: Mapping[str, np.ndarray]) -> ChunkLaws:
        forward, room_at = fit["forward"], int(fit["room_at"][0, 0])
        nothing = np.zeros((1, 6))
        first, later = fit.get("first", nothing), fit.get("later", nothing)
        own = {id(p): p.nbytes for p in self.encoders[place].parameters() if p.requires_grad}
        return ChunkLaws(
            before=Lines(forward[:room_at]).highest(),
            after=Lines(forward[room_at:]).highest(),
            graph=Lines(forward[-1:]),
            first=Lines(first).highest(),
            later=Lines(later).highest(),
            first_net=Lines(first[-1:]),
            later_net=Lines(later[-1:]),
            gradients=sum(own.values()),
            row_bytes=self.row_bytes(place, width),
            forward_flops=fit["first_forward FLOPs"][0],
            backward_flops=fit["backward FLOPs"][0],
            trained=bool(own),
            token_flops=self._token_flops(place, fit["first_forward FLOPs"][0]),
        )

    def _token_flops(self, place: int, forward: np.ndarray) -> float:
        """Those that grow with the width; where rows have none (pictures), a product with each matrix."""
        weights = sum(p.numel() for p in self.encoders[place].parameters() if p.ndim > 1)
        return float(forward[4]) if forward[4] > 0 else 2.0 * weights


def untrimmed_width(inputs: Any) -> int:
    """The width at which a step leaves these inputs as they are."""
    return inputs["attention_mask"].shape[1] if trimmed_names(inputs) else 1


def _widths(width: int | None) -> tuple[int | None, ...]:
    """Those at which rows are run that have a width, and the one of rows that have none."""
    return (None,) if width is None else WIDTHS


def _line(law: Law, kinds: slice) -> np.ndarray:
    """(events, 2): the value at no rows and the growth a row, of these kinds together."""
    few, slope = (difference[:, kinds].sum(axis=1) for difference in law.differences)
    return np.stack([few - FEW * slope, slope], axis=1).astype(np.float64)


def _on_laws(seen: Mapping[str, np.ndarray], fit: Mapping[str, np.ndarray], width: int | None, rows: int) -> bool:
    """Whether a run of so many rows at this width lies on the laws, if there are any."""
    for name in {f"{name}{end}" for name in ("forward", "first") for end in PARTS} & {*seen}:
        lines = Lines(fit[name]).at(np.array([rows]), np.array([width or 0]))[:, 0] if name in fit else None
        if lines is None or not np.array_equal(seen[name], np.round(lines)):
            return False
    return True


def _fits(runs: Sequence[Mapping[str, np.ndarray]], widths: Sequence[int | None]) -> dict[str, np.ndarray]:
    """`_parabolas` of every piece through the runs at these widths. Raises LawBroken where they differ in events."""
    if len({tuple((name, values.shape) for name, values in run.items()) for run in runs}) != 1:
        raise LawBroken
    return {name: _parabolas([run[name] for run in runs], widths) for name in runs[0]}


def _parabolas(lines: Sequence[np.ndarray], widths: Sequence[int | None]) -> np.ndarray:
    """(events, 6): the coefficients through a line in r at each of three widths; of one width, that line."""
    if len(lines) == 1:
        zeros = np.zeros_like(lines[0][:, 0])
        return np.stack([lines[0][:, 0], zeros, zeros, lines[0][:, 1], zeros, zeros], axis=1)
    powers = np.linalg.inv(np.vander(np.array(widths, dtype=np.float64), increasing=True))
    solved = np.einsum("pw,wen->enp", powers, np.stack(lines))
    return (np.round(solved * 4) / 4).reshape(len(lines[0]), 6)


class MeasuredStep(BatchStep):
    """The same of encoders that can't be faked, or that no law describes: one chunk of a few real rows, the longest, is
    encoded as wide as the batch, backpropagated and measured by the ledger. Bytes of more rows are that many times as
    much, and shorter rows count as wide, so no chunk takes more than is said. Gradients, generators and buffers are put
    back.
    """

    def __init__(self, towers: Sequence[Tower], autocast: torch.dtype | None, why: Exception):
        super().__init__(_Subject([], autocast, towers[0].kind), [])
        self.why = str(why) or "no law describes them"
        self.states = sum(tensor.nbytes for tensor in generators_of(towers).tensors) if towers[0].kind == "cpu" else 0
        self._measured = {tower.number: self._measure(tower) for tower in towers}

    def encoder_index(self, tower: int) -> int:
        """Every tower has laws of its own."""
        return tower

    def state_bytes(self) -> int:
        """Of the real generators."""
        return self.states

    def chunk_laws(self, tower: int, width: int | None) -> ChunkLaws:
        """The laws of a tower's chunks, all as wide as the batch that was measured."""
        self._laws["row", tower, width], laws = self._measured[tower]
        return laws

    def _measure(self, tower: Tower) -> tuple[Any, ChunkLaws]:
        """Shape and dtype of a representation, and the laws. The chunk before the measured one creates gradients."""
        lengths = row_lengths(tower.inputs, tower.trimmed) or [0] * tower.rows
        longest = sorted(range(tower.rows), key=lambda row: -lengths[row])
        picked = Chunk(tuple(longest[n % tower.rows] for n in range(2 * MEASURED)), tower.width)
        halves = [tuple(range(first, first + MEASURED))[::-1] for first in (0, MEASURED)]
        counter, total, modules = FlopsByPhase(), Total(), modules_of(tower.encoder)
        with _put_back(modules, tower), record_memory(*modules) as ledger:
            inputs = take(tower.inputs, picked, tower.trimmed)
            options = {"plan": [Chunk(half, untrimmed_width(inputs)) for half in halves], "retain_chunks": 2}
            options |= {"verify": "never", "on_phase": ledger.on_phase}
            counter.step(grad_cache_step, [tower.encoder], [inputs], total, **options)
        events = {piece.phase: seen.sum(axis=1) for piece, seen in relative(ledger) if piece.chunk == 1}
        flops = [counter.totals[phase, 0, 1] / MEASURED for phase in RETAINED]
        return total.row, self._scaled(tower, modules, events, total.row, flops)

    def _scaled(self, tower: Tower, modules: Any, events: Mapping[str, np.ndarray], row: Any, flops: Any) -> ChunkLaws:
        def lines(at_none: float, a_row: float) -> Lines:
            return Lines(np.array([[at_none, 0, 0, a_row, 0, 0]], dtype=np.float64))

        forward = lines(0, max(0, events["first_forward"].max()) / MEASURED)
        graph, backward = events["first_forward"][-1] / MEASURED, max(0, events["backward"].max()) / MEASURED
        trained = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values()
        gradients, width = sum(p.nbytes for p in trained), tower.width or 1
        weights = sum(p.numel() for module in modules for p in module.parameters() if p.ndim > 1)
        rates = [np.eye(6)[4 if tower.width else 3] * each / width for each in flops]
        return ChunkLaws(
            before=forward,
            after=forward,
            graph=lines(0, graph),
            first=lines(gradients, backward),
            later=lines(0, backward),
            first_net=lines(self.states + gradients, -graph),
            later_net=lines(self.states, -graph),
            gradients=gradients,
            row_bytes=math.prod(row[0]) * row[1].itemsize,
            forward_flops=rates[0],
            backward_flops=rates[1],
            trained=tower.needs_gradient(),
            token_flops=flops[0] / width if tower.width else 2.0 * weights,
        )


def _real_loss(loss_fn: Any, towers: Sequence[Tower], kinds: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """As `FakeStep.cached_loss`, of a loss that can't be faked: it is taken, of zeros, and measured; no copies."""
    modules = modules_of(loss_fn)
    with _put_back(modules, towers[0]), record_memory(*modules) as ledger:
        pairs = zip(towers, kinds, strict=True)
        reps = [torch.zeros(t.rows, *shape, dtype=kind, device=t.tensors[0].device) for t, (shape, kind) in pairs]
        events, _ = loss_events(reps, loss_fn, ledger)
    return events, np.zeros_like(events[-1])


@contextmanager
def _put_back(modules: Sequence[Any], tower: Tower) -> Iterator[None]:
    """Gradients, buffers and generators are at the end as they are now; inside there are no gradients."""
    parameters = [p for module in modules for p in module.parameters()]
    gradients, state = [p.grad for p in parameters], generators_of([tower])
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        state.restore()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


_steps: WeakKeyDictionary[Any, dict[tuple, BatchStep]] = WeakKeyDictionary()


def batch_step(towers: Sequence[Tower]) -> BatchStep:
    """The towers' `BatchStep`, with the laws that were found for it so far: for these encoders as they now are (modes,
    what is trained, plain attributes, hooks), inputs of these entries, and the autocast that is on.
    """
    kind, encoders = towers[0].kind, [tower.encoder for tower in towers]
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    entries = [Entries.of(tower) for tower in towers]
    same = [encoders.index(encoder) for encoder in encoders]
    key = (signature(encoders), tuple(same), tuple(entries), autocast, kind)
    steps = _steps.setdefault(getattr(encoders[0], "__self__", encoders[0]), {})
    measured = (key, tuple(tower.width for tower in towers))
    if measured in steps:
        return steps[measured]
    try:
        if kinds := [type(encoder).__name__ for encoder in encoders if not isinstance(encoder, nn.Module)]:
            raise refuse("encoders", "must be modules to be run with fake tensors", f"a {kinds[0]}")
        if key not in steps:
            steps[key] = BatchStep(_Subject(encoders, autocast, kind), entries)
        for tower in sorted(towers, key=lambda tower: -tower.width):  # the widest has the laws checked for all
            steps[key].chunk_laws(tower.number, tower.width or None)
        return steps[key]
    except (LawBroken, ValueError) as error:
        steps[measured] = MeasuredStep(towers, autocast, error)
        return steps[measured]


def signature(callables: Sequence[Any]) -> tuple:
    """All that is cheap to see of what bytes depend on in modules: parts, modes, plain attributes, hooks, tensors."""
    parts = [part for each in callables for module in modules_of(each) for part in module.modules()]
    seen: list[Any] = [id(each) for each in callables]
    for part in parts:
        values = vars(part)
        seen.append((id(part), type(part), len(part._forward_hooks), len(part._forward_pre_hooks)))
        seen += [(name, value) for name, value in values.items() if type(value) in PLAIN]
        seen += [(id(p), p.dtype, p.requires_grad, p.shape) for p in part._parameters.values() if p is not None]
    return tuple(seen)
