"""A step's bytes over time as plain data, ready to be drawn: panels side by side, equal pieces summarised.

A gradient-cache step of a thousand chunks is a thousand times the same picture. A run of n equal pieces becomes
three panels: its first piece, the peaks of those between, and its last piece. So the size of a picture does not grow
with the batch, and its highest point is the step's peak, to the byte. Nothing here draws: `plots.plot_timeline` does.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from gclib.memory.ledger import KINDS, Segment
from gclib.support.validation import refuse

COLUMNS = 360  # points of a whole picture; more could not be seen
SMALLEST_SHARE = 0.04  # of the width, so that a short phase (the loss) can be seen
POINTS = 48  # of a recorded line, in each piece of the step
BETWEEN_COLUMNS = 24  # points of the summary between first and last
PHASE_WORDS = {
    "first_forward": "first forward",
    "loss": "loss",
    "backward": "backward",
    "replay": "second forward\nand backward",
    "average": "average of\ngradients",
}
TOWER_WORDS = {None: "", 0: "queries", 1: "passages"}


@dataclass(frozen=True)
class Panel:
    """A stretch of the horizontal axis, from `start` to `stop` (0 to 1 over the whole step).

    pieces: which of its phase's and tower's pieces it stands for, counted from 0. operations: events of one piece.
    between: this is the summary of several pieces (one peak each), not one piece operation by operation.
    kind_bytes: (columns, kinds).
    """

    phase: str
    tower: int | None
    pieces: range
    operations: int
    between: bool
    kind_bytes: np.ndarray
    start: float = 0.0
    stop: float = 0.0

    def edges(self) -> np.ndarray:
        """Where each column begins, (columns,); the last ends at `stop`."""
        count = len(self.kind_bytes)
        return self.start + np.arange(count) / count * (self.stop - self.start)

    @property
    def peak_bytes(self) -> int:
        """The most bytes in this panel."""
        return int(self.kind_bytes.sum(axis=1).max())


@dataclass(frozen=True)
class Span:
    """Neighbouring panels that share a label, such as "first forward, queries × 64"."""

    label: str
    start: float
    stop: float


@dataclass(frozen=True)
class TimelinePicture:
    """What `plots.plot_timeline` draws."""

    panels: tuple[Panel, ...]
    spans: tuple[Span, ...]

    @property
    def edges(self) -> np.ndarray:
        """Where columns begin and the last ends, (columns + 1,), rising from 0 to 1."""
        return np.concatenate([*(panel.edges() for panel in self.panels), [1.0]])

    @property
    def kind_bytes(self) -> np.ndarray:
        """(columns, kinds) bytes."""
        return np.concatenate([panel.kind_bytes for panel in self.panels])

    @property
    def peak_bytes(self) -> int:
        """The highest point: the peak of the step."""
        return int(self.kind_bytes.sum(axis=1).max())

    @property
    def peak_x(self) -> float:
        """Where the highest column stands (its middle)."""
        highest = int(self.kind_bytes.sum(axis=1).argmax())
        return float(self.edges[highest : highest + 2].mean())

    def at_peak(self) -> dict[str, int]:
        """The bytes of each kind at the highest point."""
        highest = self.kind_bytes[self.kind_bytes.sum(axis=1).argmax()]
        return dict(zip(KINDS, map(int, highest), strict=True))

    def span_peaks(self) -> list[tuple["Span", int]]:
        """Each span with the most bytes in it, in order."""
        peaks = []
        for span in self.spans:
            inside = [panel.peak_bytes for panel in self.panels if span.start <= panel.start < span.stop]
            peaks.append((span, max(inside)))
        return peaks

    def place(self, phase: str, tower: int | None, piece: int) -> Panel | None:
        """The panel that stands for the `piece`-th piece (from 0) of a phase and tower; None where there is none."""
        candidates = [panel for panel in self.panels if piece in panel.pieces]
        own = [panel for panel in candidates if (panel.phase, panel.tower) == (phase, tower)]
        shared = [panel for panel in candidates if panel.between and self.cyclic]
        return next(iter(own + shared), None)

    def points(self, phase: str, tower: int | None, totals: np.ndarray, piece: int) -> tuple[np.ndarray, np.ndarray]:
        """A recorded piece over its panel: x from 0 to 1, and bytes. totals: after each event, in any number.

        Over the summary of several pieces its peak stands for it; a piece without a panel has no points.
        """
        panel = self.place(phase, tower, piece)
        if panel is None or not len(totals):
            return np.zeros(0), np.zeros(0)
        width = panel.stop - panel.start
        if panel.between:
            share = np.array([0, 1]) + piece - panel.pieces.start
            return panel.start + share / len(panel.pieces) * width, totals.max().repeat(2)
        reach = np.arange(len(totals)) / max(panel.operations, len(totals))
        edges = np.unique(np.linspace(0, len(totals), min(POINTS, len(totals)) + 1).astype(int))
        highest = [at + int(totals[at:end].argmax()) for at, end in zip(edges, edges[1:], strict=False)]
        return panel.start + reach[highest] * width, totals[highest]

    @property
    def cyclic(self) -> bool:
        """True for accumulation, where every chunk goes through all phases before the next begins."""
        return sum(len(panel.pieces) for panel in self.panels if panel.phase == "loss") > 1


def picture_of(timeline: Sequence[Segment]) -> TimelinePicture:
    """Panels and labels for a timeline, a ledger's or a forecast's. ValueError where there is nothing to draw."""
    segments = [s for s in timeline if len(s.kind_bytes) and not is_heading(s.phase, s.tower, s.chunk)]
    if not segments:
        raise refuse("timeline", "must hold at least one piece of a step", "an empty timeline")
    counted: Counter = Counter()
    pieces = [piece for group in _groups(segments) for piece in _pieces(group, counted)]
    weights = np.array([BETWEEN_COLUMNS if piece.between else len(piece.kind_bytes) for piece in pieces], dtype=float)
    within = np.array([not piece.between for piece in pieces])
    operations = weights[within].sum()
    smallest = operations * min(SMALLEST_SHARE, 0.5 / len(pieces))
    weights = np.where(within, np.maximum(weights, smallest), max(smallest, 0.06 * operations))
    sums = np.cumsum(weights)
    edges = np.concatenate([[0.0], sums / sums[-1]])
    panels = tuple(
        replace(p, kind_bytes=thinned(p.kind_bytes, max(8, round((stop - start) * COLUMNS))), start=start, stop=stop)
        for p, start, stop in zip(pieces, edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    )
    return TimelinePicture(panels, tuple(_spans(panels)))


def largest_kinds(kind_bytes: Mapping[str, int], *, smallest_share: float = 0.05) -> list[tuple[str, int]]:
    """(kind, bytes), largest first, of the kinds that hold at least this share of the sum."""
    total = sum(kind_bytes.values())
    held = [(kind, count) for kind, count in kind_bytes.items() if count and count >= smallest_share * total]
    return sorted(held, key=lambda entry: -entry[1])


def is_heading(phase: str, tower: int | None, chunk: int | None) -> bool:
    """Where a step only names the tensors that it begins with; the next piece starts at the same bytes."""
    return phase not in ("loss", "backward", "average") and tower is None and chunk is None


def thinned(kind_bytes: np.ndarray, bins: int) -> np.ndarray:
    """At most so many rows of (events, kinds); of each bin the row with the most bytes."""
    if len(kind_bytes) <= bins:
        return kind_bytes
    totals = kind_bytes.sum(axis=1)
    edges = np.linspace(0, len(totals), bins + 1).astype(int)
    highest = [start + int(totals[start:stop].argmax()) for start, stop in zip(edges, edges[1:], strict=False)]
    return kind_bytes[highest]


def _groups(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """One segment each; in accumulation, where chunks are worked off one after another, all pieces of a chunk."""
    if not any(s.phase == "loss" and s.chunk is not None for s in segments):
        yield from ([segment] for segment in segments)
        return
    for _, group in groupby(segments, key=lambda s: (s.chunk, s.repeats, s.rows)):
        yield list(group)


def _pieces(group: list[Segment], counted: Counter) -> Iterator[Panel]:
    """The first repeat; the peaks of those between; the last. Widths come later. `counted`: pieces so far."""
    repeats = group[0].repeats
    starts = [counted[segment.phase, segment.tower] for segment in group]
    for segment in group:
        counted[segment.phase, segment.tower] += repeats
    for segment, start in zip(group, starts, strict=True):
        yield _piece(segment, start, 0)
    if repeats > 2:
        highest, start = max(zip(group, starts, strict=True), key=lambda pair: pair[0].peak_bytes)
        numbers = np.linspace(1, repeats - 2, min(repeats - 2, BETWEEN_COLUMNS)).round().astype(np.int64)
        at_first_peak = highest.kind_bytes[highest.kind_bytes.sum(axis=1).argmax()]
        peaks = at_first_peak + numbers[:, None] * highest.net_bytes
        others = range(start + 1, start + repeats - 1)
        yield Panel(highest.phase, highest.tower, others, len(highest.kind_bytes), True, peaks)
    if repeats > 1:
        for segment, start in zip(group, starts, strict=True):
            yield _piece(segment, start, repeats - 1)


def _piece(segment: Segment, start: int, repeat: int) -> Panel:
    bytes_ = segment.kind_bytes + repeat * segment.net_bytes
    number = start + repeat
    return Panel(segment.phase, segment.tower, range(number, number + 1), len(bytes_), False, bytes_)


def _spans(panels: Sequence[Panel]) -> Iterator[Span]:
    cyclic = TimelinePicture(tuple(panels), ()).cyclic

    def by_chunk(panel: Panel) -> bool:
        return cyclic and panel.phase != "average"

    def key(panel: Panel) -> tuple:
        return (panel.pieces, panel.between) if by_chunk(panel) else (panel.phase, panel.tower)

    replays = any(panel.phase == "replay" for panel in panels)
    for _, group in groupby(panels, key=key):
        members = list(group)
        label = _chunk_label(members[0]) if by_chunk(members[0]) else _phase_label(members, replays)
        yield Span(label, members[0].start, members[-1].stop)


def _phase_label(panels: Sequence[Panel], replays: bool) -> str:
    first = panels[0]
    words = PHASE_WORDS.get(first.phase, first.phase)
    if first.phase == "first_forward" and not replays:
        words = "forward"
    pieces = sum(len(panel.pieces) for panel in panels)
    tower = TOWER_WORDS.get(first.tower, f"tower {first.tower}")
    times = f"× {pieces:,}" if pieces > 1 else ""
    below = " ".join(part for part in (tower, times) if part)
    return f"{words}\n{below}" if below else words


def _chunk_label(panel: Panel) -> str:
    return f"… × {len(panel.pieces):,}" if panel.between else f"chunk {panel.pieces.start + 1:,}"
