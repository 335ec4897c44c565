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
