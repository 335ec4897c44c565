"""The picture of a gradient's errors: direction and size of each part, and the same in words."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from gclib.audit.gradients import GradientError
from gclib.course import plots


def plot_gradient_errors(axes: Sequence[Axes], errors: Mapping[str, GradientError]) -> None:
    """Two panels of bars, a bar for each part: the cosine on axes[0], the size on axes[1]; a line where both are right.

    The numbers stand inside bars that are long enough and end before the line. A cosine that is not defined (a
    gradient of zero) is said in words.
    """
    panels = (("cosine", "cosine with the full batch's gradient"), ("size", "size / size of the full batch's gradient"))
    for panel, (key, label) in zip(axes, panels, strict=True):
        values = np.array([getattr(error, key) for error in errors.values()])
        look = {"color": plots.OKABE_ITO["sky blue"], "edgecolor": plots.INK, "linewidth": 0.5}
        paper = {"facecolor": plots.PAPER, "edgecolor": "none", "pad": 1.0}
        panel.barh(list(errors), np.nan_to_num(values), 0.62, **look)
        for place, value in enumerate(values):
            words = "no direction: zero" if np.isnan(value) else f"{value:.2f}"
            bar_end = (max(0.0, np.nan_to_num(value)), place)
            inside = 0.3 < bar_end[0] < 1.005
            beside = {"xytext": (-4, 0), "ha": "right"} if inside else {"xytext": (5, 0), "bbox": paper}
            panel.annotate(words, bar_end, textcoords="offset points", va="center", zorder=5, **beside)
        panel.axvline(1, color=plots.INK, linestyle="--", linewidth=1)
        panel.set(xlim=(min(0.0, np.nanmin([*values, 0])), max(1.3, 1.2 * np.nanmax([*values, 1]))), xlabel=label)
        panel.invert_yaxis()


def describe_errors(errors: Mapping[str, GradientError]) -> str:
    """The picture in words: cosine and size of every part."""
    directions = {name: f"cosine {error.cosine:.2f}" for name, error in errors.items() if error.size > 0}
    return "; ".join(f"{name}: {directions.get(name, 'no direction')}, size {e.size:.2f}" for name, e in errors.items())


def plot_gradient_arrows(axes: Axes, errors: Mapping[str, GradientError], *, true: str = "true gradient") -> None:
    """Arrows from one point: the true gradient along the axis, 1 long; each other at its angle to it, in its length.

    errors: name -> how this gradient differs from the true one, two names at most; the second is named under the axis.
    An angle is the one to the true gradient; what two others have between them is not drawn true. Zero is a dot.
    """
    look = {"textcoords": "offset points", "va": "center"}
    _draw_arrow(axes, (1, 0), "pale grey", "-", 9)
    axes.annotate(true, (0, 0), (0, -15), **look)
    for number, (name, error) in enumerate(errors.items()):
        color, line, width = (("vermillion", "--", 2.2), ("blue", "-", 1.2))[number]
        angle = 0.0 if np.isnan(error.cosine) else float(np.arccos(np.clip(error.cosine, -1, 1)))
        tip = (error.size * np.cos(angle), error.size * np.sin(angle))
        _draw_arrow(axes, tip, color, line, width)
        at, beside = ((0, 0), (0, -29)) if number else (tip, (0, 10))
        axes.annotate(_words_of_arrow(name, error), at, beside, color=plots.ink_of(plots.OKABE_ITO[color]), **look)
    axes.set(xlim=(-0.05, 1.6), ylim=(-0.26, 0.85), aspect="equal")
    axes.set_axis_off()


def describe_arrows(errors: Mapping[str, GradientError], *, true: str = "true gradient") -> str:
    """The arrows in words: the length of each, beside the true gradient's, and its angle to it."""
    return f"{true}: length 1; " + "; ".join(_words_of_arrow(name, error) for name, error in errors.items())


def _draw_arrow(axes: Axes, tip: tuple[float, float], color: str, line: str, width: float) -> None:
    look = {"color": plots.OKABE_ITO[color], "linestyle": line, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    if np.hypot(*tip) < 1e-6:
        axes.plot(*tip, "o", color=plots.OKABE_ITO[color])
    else:
        axes.annotate("", tip, (0, 0), arrowprops={"arrowstyle": f"-|>,head_width={0.3 + width / 40}", **look})


def _words_of_arrow(name: str, error: GradientError) -> str:
    if not error.size > 0:
        return f"{name}: length 0, no direction"
    degrees = np.degrees(np.arccos(np.clip(error.cosine, -1, 1)))
    return f"{name}: length {error.size:.2f}, turned by {degrees:.0f}°"
