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
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gclib.ledger import KINDS
from gclib.validation import refuse

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


def show(figure: Figure, alt: str) -> None:
    """Display the figure in a notebook as a PNG whose alt text is `alt`, then close it.

    alt: what the picture says, in words and with its numbers, for a reader who cannot see it. JupyterLab passes alt
    texts on for HTML images only, so that is what is displayed.
    """
    if not isinstance(alt, str) or len(alt.strip()) < 10:
        raise refuse("alt", "must say in words what the picture shows", alt)
    from IPython.display import display
    from matplotlib import pyplot

    width = round(figure.get_figwidth() * 100)
    encoded = base64.b64encode(to_png(figure, dpi=150)).decode("ascii")
    tag = f'<img alt="{escape(alt)}" width="{width}" src="data:image/png;base64,{encoded}">'
    display({"text/html": tag, "text/plain": f"Figure: {alt}"}, raw=True)
    pyplot.close(figure)
