"""One style for every picture: axes in, artists out.

Measure, turn into plain data, draw. What is drawn is computed by small functions that return arrays or dataclasses
(tests check those, never pixels); the functions that take `axes` only put them on paper. Colours are Okabe and Ito's,
which people with any colour vision can tell apart, and each goes with a hatch or a line style of its own. The
background is opaque white with its own dark text, so that a picture reads the same in a light and in a dark theme.

Nothing here changes matplotlib's settings on import, and figures are made without pyplot: a widget may draw in any
thread, and nothing piles up.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from gclib.memory.ledger import KINDS, Segment
from gclib.memory.timeline import Span, TimelinePicture, largest_kinds, picture_of
from gclib.support.validation import refuse
from gclib.support.words import format_bytes, unit_for

# Okabe and Ito, "Color Universal Design" (2008), and two greys
OKABE_ITO = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky blue": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "grey": "#999999",
    "pale grey": "#DDDDDD",
}
_KIND_STYLES = {  # kind: colour, hatch of its area, style of its line
    "parameters": ("blue", "", "-"),
    "gradients": ("green", "", "--"),
    "optimizer": ("grey", "..", "-."),
    "inputs": ("pale grey", "", ":"),
    "representations": ("purple", "//", "-"),
    "cache": ("yellow", "\\\\", "--"),
    "loss": ("vermillion", "xx", "-."),
    "activations": ("sky blue", "", ":"),
    "random states": ("black", "", (0, (1, 1))),
    "other": ("orange", "--", (0, (5, 1))),
}
COLORS = {kind: OKABE_ITO[_KIND_STYLES[kind][0]] for kind in KINDS}
HATCHES = {kind: _KIND_STYLES[kind][1] for kind in KINDS}
LINE_STYLES = {kind: _KIND_STYLES[kind][2] for kind in KINDS}
INK, PAPER, LIVE_COLOR, CARD_COLOR = "#1A1A1A", "#FFFFFF", "#000000", "#8B0000"
FITTING = "max-width:100%;height:auto"  # an HTML image shrinks with a narrow or zoomed page; nothing is cut

SETTINGS = {
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "savefig.transparent": False,
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "axes.facecolor": PAPER,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.prop_cycle": matplotlib.cycler(
        color=[OKABE_ITO[name] for name in ("blue", "vermillion", "green", "purple", "orange", "sky blue")],
        linestyle=["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1))],
    ),
    "hatch.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 10,
    "legend.frameon": False,
    "image.cmap": "viridis",
}


@contextmanager
def style() -> Iterator[None]:
    """The course's look for figures made and drawn inside; matplotlib's settings are put back afterwards."""
    with matplotlib.rc_context(SETTINGS):
        yield


def new_figure(rows: int = 1, columns: int = 1, *, width: float = 8.0, height: float = 3.6) -> tuple[Figure, Any]:
    """A figure of `width` x `height` inches and its axes (one, or an array), apart from pyplot."""
    with style():
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns)


def to_png(figure: Figure, *, dpi: int = 100) -> bytes:
    """The figure as an opaque PNG."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def to_html(figure: Figure, alt: str) -> str:
    """The figure as an HTML image whose alt text is `alt`: what `show` displays, for a widget to hold.

    alt: what the picture says, in words and with its numbers, for a reader who cannot see it. JupyterLab passes alt
    texts on for HTML images only.
    """
    if not isinstance(alt, str) or len(alt.strip()) < 10:
        raise refuse("alt", "must say in words what the picture shows", alt)
    width = round(figure.get_figwidth() * 100)
    return image_tag(to_png(figure, dpi=150), alt, f'width="{width}"')


def image_tag(png: bytes, alt: str, size: str) -> str:
    """A PNG as an HTML image that never grows wider than its page. size: its width and height as HTML attributes."""
    encoded = base64.b64encode(png).decode("ascii")
    return f'<img alt="{escape(alt)}" {size} style="{FITTING}" src="data:image/png;base64,{encoded}">'


def show(figure: Figure, alt: str) -> None:
    """Display the figure in a notebook as a PNG whose alt text is `alt` (see `to_html`), then close it."""
    tag = to_html(figure, alt)
    from IPython.display import display
    from matplotlib import pyplot

    display({"text/html": tag, "text/plain": f"Figure: {alt}"}, raw=True)
    pyplot.close(figure)


def plot_timeline(
    axes: Axes,
    timeline: Sequence[Segment] | TimelinePicture,
    *,
    card_bytes: int | None = None,
    card_name: str = "the card",
    live: tuple[np.ndarray, np.ndarray] | None = None,
) -> TimelinePicture:
    """Stack a step's bytes by kind over its operations, phases named below, equal pieces summarised as "× n".

    timeline: a ledger's or a forecast's. card_bytes: a line at what a card holds, or words where it is far above.
    live: (x from 0 to 1, bytes) of a run, drawn over it. Returns the picture that was drawn, as data.
    """
    picture = timeline if isinstance(timeline, TimelinePicture) else picture_of(timeline)
    highest = max([picture.peak_bytes, *(live[1] if live is not None else ())])
    unit, size = unit_for(highest)
    top = highest * 1.18
    _draw_stack(axes, picture, size)
    _draw_betweens(axes, picture, size)
    if card_bytes is not None:
        top = max(top, card_bytes * 1.12) if card_bytes <= 2 * highest else highest * 1.32
        _draw_card(axes, card_bytes, card_name, top, highest, size)
    if live is not None and len(live[0]):
        axes.plot(live[0], np.asarray(live[1]) / size, color=LIVE_COLOR, linewidth=1.3, linestyle="-", zorder=5)
    _draw_peak(axes, picture, size)
    _draw_spans(axes, picture.spans)
    axes.set(xlim=(0, 1), ylim=(0, top / size), ylabel=f"live bytes ({unit})", xticks=[])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return picture


def plot_peaks(
    axes: Axes, peaks: Mapping[str, Mapping[str, int]], *, card_bytes: int | None = None, card_name: str = "the card"
) -> None:
    """A bar for each name, as long as its peak and divided by kind; a line at what a card holds.

    peaks: {name: {kind: bytes at the peak}}, as `MemoryForecast.at_peak` and `MemoryLedger.at_peak` give them.
    """
    totals = [sum(kinds.values()) for kinds in peaks.values()]
    unit, size = unit_for(max(totals))
    seen = [kind for kind in KINDS if any(kinds.get(kind, 0) > 0.005 * max(totals) for kinds in peaks.values())]
    left = np.zeros(len(peaks))
    for kind in seen:
        lengths = np.array([kinds.get(kind, 0) for kinds in peaks.values()]) / size
        look = {"color": COLORS[kind], "hatch": HATCHES[kind], "edgecolor": INK, "linewidth": 0.3}
        axes.barh(list(peaks), lengths, 0.62, left=left, label=kind, **look)
        left = left + lengths
    for place, total in enumerate(totals):
        paper = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8}
        where, look = (total / size, place), {"va": "center", "bbox": paper, "zorder": 5}
        axes.annotate(format_bytes(total), where, (5, 0), textcoords="offset points", **look)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.2 * max([*totals, card_bytes or 0]) / size), xlabel=f"peak of live bytes ({unit})")
    if card_bytes is not None:
        axes.axvline(card_bytes / size, color=CARD_COLOR, linestyle="--", linewidth=1.5)
        label, where = f"{card_name}: {format_bytes(card_bytes)}", (card_bytes / size, 1)
        look = {"textcoords": "offset points", "ha": "right", "color": CARD_COLOR, "fontsize": 9}
        axes.annotate(label, where, (-4, 3), axes.get_xaxis_transform(), **look)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)


def describe_timeline(picture: TimelinePicture, *, card_bytes: int | None = None, card_name: str = "the card") -> str:
    """The picture in words, for its alt text: phases in order, the peak, its largest parts, and the card."""
    order = "; ".join(span.label.replace("\n", " ") for span in picture.spans)
    parts = [f"{kind} {format_bytes(count)}" for kind, count in largest_kinds(picture.at_peak())]
    words = f"Bytes over one step: {order}. Peak {format_bytes(picture.peak_bytes)}, of which {', '.join(parts)}."
    if card_bytes is None:
        return words
    fits = "fits within" if picture.peak_bytes <= card_bytes else "does not fit within"
    return f"{words} It {fits} {card_name} ({format_bytes(card_bytes)})."


def _draw_stack(axes: Axes, picture: TimelinePicture, size: int) -> None:
    edges, values = picture.edges, picture.kind_bytes[[*range(len(picture.kind_bytes)), -1]] / size
    seen = [n for n in range(len(KINDS)) if values[:, n].max() > 0.01 * picture.peak_bytes / size]
    base = np.zeros(len(edges))
    for number in seen:
        kind = KINDS[number]
        top = base + values[:, number]
        look = {"facecolor": COLORS[kind], "hatch": HATCHES[kind], "edgecolor": INK}
        axes.fill_between(edges, base, top, step="post", linewidth=0.0, **look)
        base = top
    handles = [Patch(facecolor=COLORS[KINDS[n]], hatch=HATCHES[KINDS[n]], edgecolor=INK, lw=0.3) for n in seen[::-1]]
    look = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "fontsize": 9, "handlelength": 1.4}
    axes.legend(handles, [KINDS[n] for n in seen[::-1]], borderaxespad=0.6, **look)


def _draw_betweens(axes: Axes, picture: TimelinePicture, size: int) -> None:
    """Fade the panels that stand for several pieces by their peaks, and put dots on them."""
    for panel in picture.panels:
        if panel.between:
            middle, width, height = (panel.start + panel.stop) / 2, panel.stop - panel.start, panel.peak_bytes / size
            axes.bar(middle, height, width, color=PAPER, alpha=0.5, zorder=3)
            axes.text(middle, height / 2, "…", ha="center", va="center", fontsize=12, zorder=4)


def _draw_card(axes: Axes, card_bytes: int, name: str, top: float, highest: float, size: int) -> None:
    label, look = f"{name}: {format_bytes(card_bytes)}", {"color": CARD_COLOR, "fontsize": 9}
    if card_bytes <= top:
        axes.axhline(card_bytes / size, color=CARD_COLOR, linestyle="--", linewidth=1.5, zorder=4)
        axes.annotate(label, (0.005, card_bytes / size), (0, 3), textcoords="offset points", zorder=6, **look)
    else:
        label += f" ({card_bytes / highest:,.0f} times the peak: far above this picture)"
        axes.text(0.005, 0.985, label, transform=axes.transAxes, va="top", **look)


def _draw_peak(axes: Axes, picture: TimelinePicture, size: int) -> None:
    x, peak = picture.peak_x, picture.peak_bytes
    axes.plot([x], [peak / size], marker="v", color=INK, markersize=5, zorder=6)
    side = "right" if x > 0.8 else "left" if x < 0.2 else "center"
    look = {"fontsize": 9, "weight": "bold", "zorder": 6}
    look["bbox"] = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    label = f"peak {format_bytes(peak)}"
    axes.annotate(label, (x, peak / size), (0, 7), textcoords="offset points", ha=side, **look)


def _draw_spans(axes: Axes, spans: Sequence[Span]) -> None:
    """Names below the axis; a narrow span's name moves a line down where it would touch its neighbour's."""
    below = blended_transform_factory(axes.transData, axes.transAxes)
    width = axes.get_position().width * axes.figure.get_figwidth()
    taken = [-1.0, -1.0, -1.0]  # how far each row of names reaches
    for span in spans:
        axes.plot([span.stop, span.stop], [-0.02, 0], transform=below, color=INK, linewidth=0.8, clip_on=False)
        half = 0.033 * max(map(len, span.label.split("\n"))) / width
        middle = min(max((span.start + span.stop) / 2, half), 1 - half)
        row = next((n for n, reach in enumerate(taken) if middle - half > reach), None)
        if row is None:
            continue
        taken[row] = middle + half
        axes.text(middle, -0.03 - 0.13 * row, span.label, transform=below, ha="center", va="top", fontsize=8)


def plot_logits(
    axes: Axes,
    values: np.ndarray,
    *,
    title: str = "",
    label: str = "logit",
    limits: tuple[float, float] | None = None,
    mask: np.ndarray | None = None,
    colorbar: bool = True,
) -> None:
    """A heat map of the (B, N) matrix of logits (or similarities, or probabilities): queries down, passages across.

    The positive of query i, passage i * (1 + K), is outlined; cells where `mask` (B, N) is True are crossed out.
    limits: the values at the two ends of the colour scale. Tensors are taken as arrays are.
    Raises ValueError where `values` isn't (B, B * (1 + K)), or the mask has another shape.
    """
    table = np.asarray(values, dtype=float)
    if table.ndim != 2 or 0 in table.shape or table.shape[1] % table.shape[0]:
        raise refuse("values", "must be a matrix (B, N) with N a multiple of B", f"shape {table.shape}")
    if mask is not None and np.shape(mask) != table.shape:
        raise refuse("mask", f"must have the shape of values, {table.shape}", f"shape {np.shape(mask)}")
    low, high = limits if limits is not None else (table.min(), table.max())
    image = axes.imshow(table, vmin=low, vmax=high, aspect="equal" if len(table) == table.shape[1] else "auto")
    group = table.shape[1] // len(table)
    line = min(1.1, axes.get_window_extent().width / table.shape[1] / 22)
    halo = [withStroke(linewidth=2.4 * line, foreground=PAPER)]
    for row in range(len(table)):
        corner = (row * group - 0.5, row - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=INK, linewidth=line, path_effects=halo))
    for row, column in np.argwhere(np.zeros_like(table) if mask is None else np.asarray(mask)):
        axes.text(column, row, "×", ha="center", va="center", path_effects=halo)
    axes.set(title=title, xlabel="passage", ylabel="query")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    if colorbar:
        axes.figure.colorbar(image, ax=axes, label=label, shrink=0.85)


def contrast(one: str, other: str) -> float:
    """How far two colours are apart for the eye, from 1 to 21; text needs 4.5 (WCAG 2.2, 1.4.3)."""
    lights = []
    for color in (one, other):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(lights) / min(lights)


def ink_of(color: str) -> str:
    """The colour, darkened until words in it can be read on PAPER."""
    shares = (1 - step / 20 for step in range(20))
    darker = (to_hex([share * c for c in to_rgb(color)]) for share in shares)
    return next(ink for ink in darker if contrast(ink, PAPER) >= 4.5)


def plot_by_batch_size(axes: Axes, sizes: Sequence[int], series: Mapping[str, Sequence[float]], *, label: str) -> None:
    """Lines over the batch size (a logarithmic axis, a tick for each size), each named at its right end.

    series: name -> one value for each size. label: the quantity with its unit, for the other axis.
    """
    ends = []
    for (name, values), marker in zip(series.items(), "osD^v*", strict=False):
        (line,) = axes.plot(sizes, values, marker=marker, markersize=4)
        ends.append((values[-1], name, line.get_color()))
    low, high = axes.get_ylim()
    height = float("-inf")
    for value, name, color in sorted(ends):
        height = max(value, height + 0.07 * (high - low))
        look = {"textcoords": "offset points", "color": ink_of(color), "va": "center", "annotation_clip": False}
        axes.annotate(name, (sizes[-1], height), (7, 0), **look)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=9)
    axes.minorticks_off()
    axes.set(xlabel="batch size B", ylabel=label)
