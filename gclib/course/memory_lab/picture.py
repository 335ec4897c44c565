"""How the memory lab draws: a step's bytes over its operations, and two peaks beside each other.

What lies on the paper is `gclib.course.plots`: `plot_timeline` and `plot_peaks`. A view keeps one figure and draws it
again, which is cheap enough for a slider. Any ipywidget with the same `show` and `clear` can take a view's place.
"""

import io

import ipywidgets as widgets
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gclib.course import plots
from gclib.course.widgets.base import sentence
from gclib.memory.timeline import TimelinePicture


class _View(widgets.HTML):
    inches: tuple[float, float]

    def __init__(self) -> None:
        super().__init__()
        with plots.style():
            self.figure = Figure(figsize=self.inches, layout="none")
            self.canvas = FigureCanvasAgg(self.figure)

    def clear(self) -> None:
        """Show nothing."""
        self.value = ""

    def _image(self, alt: str) -> str:
        """The figure as it is now, as HTML."""
        png = io.BytesIO()
        self.canvas.print_png(png, pil_kwargs={"compress_level": 1})
        width, height = (round(100 * side) for side in self.inches)
        return plots.image_tag(png.getvalue(), alt, f'width="{width}" height="{height}"')


class TimelineView(_View):
    """The forecast of a step over its operations, a line at the budget, and over it the live bytes of a run."""

    inches = (7.8, 3.1)

    def __init__(self) -> None:
        super().__init__()
        with plots.style():
            self.axes = self.figure.add_axes((0.085, 0.2, 0.72, 0.76))

    def show(
        self,
        picture: TimelinePicture,
        budget_bytes: int,
        budget_name: str,
        *,
        live: tuple[np.ndarray, np.ndarray] | None,
        words: str,
    ) -> None:
        """Draw the picture. words: what the alt text says beside what `describe_timeline` does."""
        budget = {"card_bytes": budget_bytes, "card_name": budget_name}
        with plots.style():
            for artist in [*self.axes.collections, *self.axes.lines, *self.axes.patches, *self.axes.texts]:
                artist.remove()  # axes.clear() would make all ticks anew, a third of the whole time
            plots.plot_timeline(self.axes, picture, live=live, **budget)
            self.value = self._image(f"{plots.describe_timeline(picture, **budget)} {words}".strip())


class PeaksView(_View):
    """Two peaks by kind, one bar each, below what is said of them."""

    inches = (7.8, 2.2)  # as high as a legend of every kind

    def show(self, peaks: dict[str, dict[str, int]], words: str) -> None:
        """Draw the bars. peaks: {name: {kind: bytes}}; words: their alt text too."""
        with plots.style():
            self.figure.clear()
            axes = self.figure.add_axes((0.085, 0.25, 0.7, 0.71))
            plots.plot_peaks(axes, peaks)
            axes.get_legend().set_bbox_to_anchor((0.8, 0.5), self.figure.transFigure)
            self.value = sentence(words) + self._image(words)
