"""How the memory lab draws: a step's bytes over its operations, and two peaks beside each other.

The timeline is drawn by the page itself: plain modules and a style sheet in `page/`, without a build step. The peaks
are `gclib.course.plots.plot_peaks`, a figure that is kept and drawn again.
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gclib.course import plots
from gclib.course.widgets.base import sentence
from gclib.memory.timeline import TimelinePicture

PAGE = Path(__file__).parent / "page"


def page_module(*names: str) -> str:
    """These modules of `page/` (or at other paths) as one (a widget has but one), imported ones first."""
    texts = [(PAGE / f"{name}.js").read_text("utf-8") for name in names]
    return "\n".join(re.sub(r"^import [^;]*;\n|^export (?!default)", "", text, flags=re.MULTILINE) for text in texts)


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


class TimelineView(anywidget.AnyWidget):
    """The forecast of a step over its operations, drawn in the page: `page/widget.js` answers from the laws it knows.

    bundle: laws of what is shown, or one timeline (`gclib.course.memory_lab.bundles`); ahead: laws of what may come.
    shown: the settings that Python shows; budget: its bytes and name; live: the bytes of a run, as points over the
    whole picture. controls, choices: the models of the controls that the page watches itself, and the values of each.
    alt: the picture in words.
    """

    _esm = page_module("laws", "looks", "picture", "view", "widget")
    _css = (PAGE / "lab.css").read_text("utf-8")
    bundle = traitlets.Dict().tag(sync=True)
    ahead = traitlets.Dict().tag(sync=True)
    shown = traitlets.Dict().tag(sync=True)
    budget = traitlets.Dict().tag(sync=True)
    live = traitlets.Dict().tag(sync=True)
    controls = traitlets.Dict().tag(sync=True)
    choices = traitlets.Dict().tag(sync=True)
    alt = traitlets.Unicode()

    def watch(self, controls: Mapping[str, widgets.Widget], choices: Mapping[str, list[Any]]) -> None:
        """Let the page answer moves of these controls. choices: what each place of a control means."""
        with self.hold_sync():
            self.choices = dict(choices)
            self.controls = {name: control.model_id for name, control in controls.items()}

    def show(
        self,
        bundle: dict[str, Any],
        shown: dict[str, Any],
        budget_bytes: int,
        budget_name: str,
        *,
        picture: TimelinePicture,
        live: tuple[np.ndarray, np.ndarray] | None,
        words: str,
    ) -> None:
        """Show these settings. words: what the alt text says beside what `describe_timeline` does."""
        described = plots.describe_timeline(picture, card_bytes=budget_bytes, card_name=budget_name)
        x, points = live if live is not None else ((), ())
        with self.hold_sync():
            if self.bundle is not bundle:
                self.bundle = bundle
            self.shown, self.budget = shown, {"bytes": budget_bytes, "name": budget_name}
            self.live = {"x": [round(float(at), 5) for at in x], "bytes": [int(count) for count in points]}
            self.alt = f"{described} {words}".strip()

    def learn(self, bundle: dict[str, Any]) -> None:
        """Give the page these laws; those of what is shown stay, as a notebook that is saved holds one of each."""
        of_shown = all(self.shown.get(name) == value for name, value in bundle["about"].items())
        setattr(self, "bundle" if of_shown else "ahead", bundle)

    def clear(self) -> None:
        """There is no forecast: the old picture stays, pale."""
        with self.hold_sync():
            self.shown, self.live, self.alt = {}, {}, ""


class PeaksView(_View):
    """Two peaks by kind, one bar each, below what is said of them."""

    inches = (7.8, 2.2)  # as high as a legend of every kind
    drawn: tuple[dict[str, dict[str, int]], str] | None = None

    def show(self, peaks: dict[str, dict[str, int]], words: str) -> None:
        """Draw the bars. peaks: {name: {kind: bytes}}; words: their alt text too."""
        if self.value and (peaks, words) == self.drawn:
            return
        self.drawn = peaks, words
        with plots.style():
            self.figure.clear()
            axes = self.figure.add_axes((0.085, 0.25, 0.7, 0.71))
            plots.plot_peaks(axes, peaks)
            axes.get_legend().set_bbox_to_anchor((0.8, 0.5), self.figure.transFigure)
            self.value = sentence(words) + self._image(words)
