"""A race on buttons: chosen rows of the experiment trained live, in a thread of their own, with their learning curves.

Losses of unlike batches can't be compared: chance alone is log B. So the picture shows top-1 on a small pool, and the
loss minus the loss of chance. `LiveRace` is the run, `RaceLab` the view of it.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import ipywidgets as widgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gclib.course import plots
from gclib.course.experiments.recipes import LARGEST, QUICK, RECIPES, Recipe, TableSetting, steps_for
from gclib.course.experiments.results import fresh_encoder, pairs_and_tokenizer, train_encoder
from gclib.course.widgets.base import LiveLab, button
from gclib.models.encoder import Encoder
from gclib.support.validation import int_at_least, refuse
from gclib.support.words import format_table
from gclib.training.loop import TrainingRecord
from gclib.training.retrieval import retrieval_metrics

POOL = 200  # test queries, each among as many passages, that a live curve is judged on
LOOKS = 10  # how often a row is judged while it trains
REDRAW_SECONDS = 1.0
MARKERS = "osD^v*"
READY = "Choose rows, then press Train. They train one after another; Stop ends after the step in progress."
LABELS = ("top-1 on the pool (%)", "loss minus chance (nats)")


class RaceStopped(Exception):
    """Raised from a record when Stop was asked for: `train` then ends after that step."""


@dataclass
class Curve:
    """A row's curve so far: queries seen, top-1 on the pool (percent), mean loss minus chance since the last look."""

    examples: list[int] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    excess: list[float] = field(default_factory=list)


class LiveRace:
    """The rows of a race, trained one after another by `run`; `stop`, from another thread, ends it.

    curves: name -> Curve, growing. done, total: queries; 0 in all until the texts are read. stage: in words. ending: ""
    while it runs, then "finished", "stopped" or "failed"; error: in words, where it failed.
    """

    def __init__(self, recipes: Sequence[Recipe], setting: TableSetting, seed: int):
        self.recipes, self.setting, self.seed = tuple(recipes), setting, seed
        self.curves = {recipe.name: Curve() for recipe in self.recipes}
        self.done = self.total = 0
        self.stage, self.ending, self.error = "reading texts", "", ""
        self._stop = threading.Event()

    def stop(self) -> None:
        """Ask the training to end after its step."""
        self._stop.set()

    def run(self) -> str:
        """Train here and now; the ending. What goes wrong is told in `error`, and not raised."""
        try:
            pairs, _, _ = pairs_and_tokenizer(self.setting)
            each = steps_for(len(pairs), self.setting.epochs, LARGEST) * LARGEST
            self.total = each * len(self.recipes)
            for recipe in self.recipes:
                self._train(recipe, each)
        except RaceStopped:
            self.ending = "stopped"
        except Exception as problem:  # a thread has nobody to raise to: it is told in words
            self.ending, self.error = "failed", f"{type(problem).__name__}: {problem}"
        else:
            self.ending = "finished"
        return self.ending

    def _train(self, recipe: Recipe, examples: int) -> None:
        self.stage = f"training {recipe.name}"
        encoder, losses = fresh_encoder(self.setting, self.seed), []
        before = self.done

        def on_record(record: TrainingRecord) -> None:
            losses.append(record.loss)
            self.done = before + record.examples
            if record.examples * LOOKS // examples > (record.examples - recipe.batch_size) * LOOKS // examples:
                self._look(recipe, encoder, record.examples, fmean(losses))
                losses.clear()
            if self._stop.is_set():
                raise RaceStopped

        train_encoder(encoder, recipe, self.setting, seed=self.seed, on_record=on_record)

    def _look(self, recipe: Recipe, encoder: Encoder, examples: int, loss: float) -> None:
        _, held_out, tokenizer = pairs_and_tokenizer(self.setting)
        towers = (encoder, encoder)
        metrics = retrieval_metrics(towers, held_out[:POOL], tokenizer, ks=(1,), **self.setting.lengths())
        curve = self.curves[recipe.name]
        curve.excess.append(loss - recipe.chance_loss)
        curve.top1.append(100 * metrics["top-1"])
        curve.examples.append(examples)


def plot_curves(axes: Axes, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, label: str) -> None:
    """Lines over the queries seen, each with its own colour, dash and marker. curves: name -> (queries, values)."""
    for (name, (x, y)), marker in zip(curves.items(), MARKERS, strict=False):
        axes.plot(x, y, marker=marker, markersize=4, label=name)
    axes.set(xlabel="queries seen", ylabel=label)


def plot_race(panels: Sequence[Axes], curves: Mapping[str, Curve]) -> None:
    """Top-1 on the left panel, loss minus chance on the right one, a legend below both."""
    for axes, name, label in zip(panels, ("top1", "excess"), LABELS, strict=True):
        known = {row: (curve, len(curve.examples)) for row, curve in curves.items() if curve.examples}
        drawn = {row: (curve.examples[:n], getattr(curve, name)[:n]) for row, (curve, n) in known.items()}
        plot_curves(axes, drawn, label=label)
    panels[1].axhline(0, color=plots.OKABE_ITO["grey"], linewidth=0.8, linestyle=":")
    handles, names = panels[0].get_legend_handles_labels()
    if handles:
        panels[0].figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=9)


class RaceLab(LiveLab):
    """Checkboxes for the rows, a seed, the epochs, Train and Stop; curves while it trains. All from the keyboard.

    Attributes, each an ipywidget: choices (a checkbox a row), seed, epochs, train, stop, progress, picture, status.
    `table()` says all of it in text; `wait()` returns when the training has ended; `live` is the last run.
    setting: data, model and lengths; its epochs are where the control starts.
    """

    label_width = ""

    def __init__(self, *, setting: TableSetting = QUICK, recipes: Sequence[Recipe] = RECIPES, seed: int = 0):
        if not recipes or len({recipe.name for recipe in recipes}) < len(recipes):
            raise refuse("recipes", "must be at least one, with different names", [r.name for r in recipes])
        if int_at_least("seed", seed, 0) > 9:
            raise refuse("seed", "must be from 0 to 9", seed)
        if not 1 <= setting.epochs <= 8:
            raise refuse("setting", "must have from 1 to 8 epochs", setting.epochs)
        self.train = button("Train", self._on_train, icon="play", tooltip="Train the chosen rows")
        super().__init__(self.train, stop="End after this step", progress="Queries that were trained on")
        self.setting, self.recipes = setting, tuple(recipes)
        self.choices = [
            widgets.Checkbox(True, description=f"{recipe.name} (top rate {recipe.learning_rate:.2g})", indent=False)
            for recipe in self.recipes
        ]
        tooltip = "Of the first weights, the order of the pairs and dropout"
        self.seed = widgets.IntSlider(seed, 0, 9, description="Seed", tooltip=tooltip)
        tooltip = "How often every pair is seen"
        self.epochs = widgets.IntSlider(setting.epochs, 1, 8, description="Epochs", tooltip=tooltip)
        buttons = widgets.HBox([self.train, self.stop, self.progress])
        rows = [widgets.VBox(self.choices), [self.seed, self.epochs], buttons]
        self.arrange(*rows, self.status, self.picture, classes={"race": self})
        self._say(READY)

    def describe(self) -> str:
        """The curves in words, for an alt text: where each row has come to."""
        if self.live is None:
            return "No race has been run yet."
        parts = [
            f"{name}: top-1 {curve.top1[-1]:.1f} % and loss {curve.excess[-1]:+.2f} nats from chance after "
            f"{curve.examples[-1]:,} queries"
            for name, curve in self.live.curves.items()
            if curve.examples
        ]
        return f"Learning curves, seed {self.live.seed}. {'; '.join(parts) or 'No point yet'}."

    def table(self) -> str:
        """The last race as text: every point of every row."""
        if self.live is None:
            return "No race has been run yet."
        heads = ["row", "queries seen", "top-1, %", "loss - chance, nats"]
        rows = [
            [name, examples, f"{top1:.1f}", f"{excess:+.2f}"]
            for name, curve in self.live.curves.items()
            for examples, top1, excess in zip(curve.examples, curve.top1, curve.excess, strict=False)
        ]
        return "\n\n".join([self._report(self.live), *([format_table(heads, rows)] if rows else [])])

    def _on_train(self) -> None:
        chosen = [recipe for recipe, box in zip(self.recipes, self.choices, strict=True) if box.value]
        if not chosen:
            self._say("Choose at least one row.")
            return
        self._drawn_points = 0
        live = LiveRace(chosen, replace(self.setting, epochs=self.epochs.value), self.seed.value)
        self._say(self._report(live))
        self._begin(live, REDRAW_SECONDS)

    def _follow(self, live: LiveRace) -> None:
        self.progress.max, self.progress.value = max(1, live.total), live.done
        points = sum(len(curve.examples) for curve in live.curves.values())
        if points > self._drawn_points:
            self._drawn_points = points
            self._show(self.describe())
        self._say(self._report(live))

    _ended = _follow

    def _figure(self) -> Figure:
        figure, panels = plots.new_figure(1, 2, width=7.8, height=3.4)
        plot_race(panels, self.live.curves)
        return figure

    def _report(self, live: LiveRace) -> str:
        if live.ending == "failed":
            return f"The race failed: {live.error}"
        if live.ending:
            return f"The race has {live.ending}, seed {live.seed}. {self.describe()}"
        done = f": {live.done:,} of {live.total:,} queries" if live.total else ""
        return f"{live.stage[0].upper()}{live.stage[1:]}{done}."
