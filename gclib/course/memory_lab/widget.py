"""The live memory lab: sliders over exact forecasts, and the same step run for real on a button.

A view and nothing more: what a position of the controls means is `gclib.course.memory_lab.answers`, the run is
`gclib.course.memory_lab.run`, the picture `gclib.course.plots`. Moving a control never computes on real tensors and
never raises. Every control has a label and works from the keyboard; the picture carries its numbers as alt text, and
`table` says all of it in text.
"""

import base64
import html
import io
import threading
import time
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gclib.course import plots
from gclib.course.memory_lab import answers as lab
from gclib.course.memory_lab.answers import LabSettings
from gclib.course.memory_lab.run import LiveRun
from gclib.course.widgets.keyboard import keyboard
from gclib.memory.devices import GPU_MEMORY_BYTES, device_words, memory_of, ram_bytes, run_device
from gclib.memory.forecast import MemoryForecast
from gclib.memory.timeline import TimelinePicture, picture_of
from gclib.models.encoder import SIZES, load_transformers
from gclib.models.presets import PRESETS
from gclib.support.validation import one_of
from gclib.support.words import format_bytes, format_table

BATCHES = [2**n for n in range(21)]
CHUNKS = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512]
RETAINED = [0, 1, 2, 4, 8, 16, 32, 64, 128]
LENGTHS = [16, 32, 64, 128, 256, 512]
TILES = [("dense", 0), *((f"{size:,}", size) for size in (256, 512, 1024, 2048, 4096, 8192, 16384))]
REDRAW_SECONDS = 0.4  # between two pictures of a run
PICTURE_INCHES = (7.8, 3.1)
COMPARED_INCHES = (7.8, 2.2)  # as high as a legend of every kind
READY = "Run does this step for real on this machine. Memory is checked first."


class MemoryLab(widgets.VBox):
    """Sliders over the exact forecast of a step, and the step itself on a button.

    Attributes, each an ipywidget: step, model, precision, optimizer, batch_size, chunk_size, retain_chunks,
    query_length, length (of passages), tile_size, budget (its value: bytes); run, stop, largest (sets the batch to the
    largest that fits), pin (keeps these settings to compare with), as_code (shows code, a program that prints this
    forecast); status, forecast, compared (text), picture. `table()` is the lab as text. `wait()` returns when all that
    was started has ended.
    The keywords set where the controls start; each must be one of the control's values. device: where Run runs the
    step; None for a CUDA card where PyTorch can use one, else the processor. A budget that is a card is forecast with
    a card's operations, any other budget with those of the device. Both towers are one encoder that reads tokens:
    towers of their own, and for pictures, are `forecast_step`'s alone.
    """

    def __init__(
        self,
        *,
        step: str = "grad_cache",
        model: str = "mini",
        batch_size: int = 64,
        chunk_size: int = 8,
        length: int = 64,
        query_length: int | None = None,
        tile_size: int | None = None,
        retain_chunks: int = 0,
        precision: str = "float32",
        optimizer: str = "adamw",
        budget: str = "256 MiB",
        device: str | None = None,
    ):
        self.device = run_device(device)
        start = LabSettings(
            step, model, batch_size, chunk_size, length, tile_size, query_length, retain_chunks, precision, optimizer
        )
        load_transformers()
        self._make_controls(start, budget)
        self._make_outputs()
        self._drawing = threading.RLock()
        self._figure, self._bars = _Canvas(), _Bars()
        self._wanted: LabSettings | None = None
        self._fitter: threading.Thread | None = None
        self._watcher: threading.Thread | None = None
        self._live: LiveRun | None = None
        self._confirmed: LabSettings | None = None
        self._pinned: LabSettings | None = None
        super().__init__(self._rows())
        self.add_class("gclib-memory-lab")
        for control in self.controls:
            control.observe(self._on_move, names="value")
        self.run.on_click(lambda _: self._on_run())
        self.stop.on_click(lambda _: self._on_stop())
        self.largest.on_click(lambda _: self._on_largest())
        self.pin.observe(lambda _: self._on_pin(), names="value")
        self.as_code.observe(lambda change: self._show_code(change["new"]), names="value")
        self.refresh()

    def _rows(self) -> list[widgets.Widget]:
        pairs = [
            (self.step, self.model),
            (self.batch_size, self.chunk_size),
            (self.query_length, self.length),
            (self.retain_chunks, self.tile_size),
            (self.precision, self.optimizer),
            (self.budget,),
            (self.run, self.stop, self.progress),
            (self.largest, self.pin, self.as_code),
        ]
        *above, buttons, more = [widgets.HBox(list(row), layout=_ROW) for row in pairs]
        return [*above, self.forecast, self.picture, self.compared, buttons, more, self.status, self.code, keyboard()]

    @property
    def controls(self) -> tuple[widgets.Widget, ...]:
        """Every control that changes the forecast."""
        return (
            self.step,
            self.model,
            self.batch_size,
            self.chunk_size,
            self.query_length,
            self.length,
            self.retain_chunks,
            self.tile_size,
            self.precision,
            self.optimizer,
            self.budget,
        )

    @property
    def budget_name(self) -> str:
        """The budget in words: a card's name, or its bytes."""
        return next(name for name, size in lab.BUDGETS.items() if size == self.budget.value)

    @property
    def live(self) -> LiveRun | None:
        """The last run, going on or ended."""
        return self._live

    def settings(self) -> LabSettings:
        """What the controls say now. Raises ValueError where tiles and batch do not go together."""
        return LabSettings(
            self.step.value,
            self.model.value,
            self.batch_size.value,
            self.chunk_size.value,
            self.length.value,
            self.tile_size.value or None,
            self.query_length.value or None,
            self.retain_chunks.value,
            self.precision.value,
            self.optimizer.value,
            "cuda" if self.budget_name in GPU_MEMORY_BYTES else self.device.type,
        )

    def refresh(self) -> None:
        """Bring text and picture up to the controls; a law not known yet is read off in a thread, in words."""
        self.chunk_size.disabled = self.step.value == "naive"
        self.retain_chunks.disabled = self.step.value != "grad_cache"
        try:
            settings = self.settings()
        except ValueError as error:
            self._clear(f"No forecast: {error}. {lab.TILES_REASON}")
            return
        self.code.value = settings.as_code()
        if lab.is_ready(settings):
            self._draw(settings)
            return
        tokens = " and ".join(str(length) for length in sorted(set(settings.lengths)))
        then = "every chunk answers at once" if settings.tile_size else "every batch and chunk answers at once"
        self._clear(
            f"Reading off the memory law of the {settings.model} model at {tokens} tokens. This takes some seconds, "
            f"once{' a batch, with tiles' if settings.tile_size else ''}; then {then}."
        )
        self._want(settings)

    def _want(self, settings: LabSettings) -> None:
        """Have the law of these settings read off, in a thread."""
        self._wanted = settings
        if self._fitter is None or not self._fitter.is_alive():
            self._fitter = threading.Thread(target=self._fit, name="memory-lab-fit", daemon=True)
            self._fitter.start()

    def wait(self, seconds: float = 120.0) -> None:
        """Return when forecast and run have ended, or after so many seconds: for cells that go on with the result."""
        end = time.monotonic() + seconds
        for thread in (self._fitter, self._watcher):
            if thread is not None:
                thread.join(max(0.0, end - time.monotonic()))

    def table(self) -> str:
        """The lab as text: the settings, the advice, the peak of each phase and kind, and the last run of them."""
        try:
            settings = self.settings()
        except ValueError as error:
            return f"No forecast: {error}. {lab.TILES_REASON}"
        forecast, budget = lab.forecast_of(settings), self.budget.value
        picture = picture_of(forecast.timeline)
        phases = [[span.label.replace("\n", " "), format_bytes(peak)] for span, peak in picture.span_peaks()]
        kinds = [[kind, format_bytes(count)] for kind, count in forecast.at_peak().items() if count]
        parts = [
            f"{settings.described()}.",
            lab.advice(settings, forecast, budget, self.budget_name),
            format_table(["phase, in order", "highest"], phases),
            format_table(["at the peak", "bytes"], [*kinds, ["sum", format_bytes(forecast.peak_bytes)]]),
        ]
        run = self._run_of(settings)
        if run is not None and run.result is not None:
            parts.append(_told(run, lab.forecast_of(run.settings)))
        if self._pinned is not None:
            parts.append(lab.compared(self._pinned, settings))
        return "\n\n".join(parts)

    def _make_controls(self, start: LabSettings, budget: str) -> None:
        steps = [(words, step) for step, words in lab.STEP_WORDS.items()]
        self.step = _dropdown("Step", steps, start.step, "How the gradient is computed")
        models = [(_model_label(name), name) for name in lab.MODELS]
        self.model = _dropdown("Model", models, start.model, "The encoder: a size of BERT, or a published one's config")
        self.batch_size = _slider("Batch", _numbers(BATCHES), start.batch_size, "Queries whose passages are contrasted")
        self.chunk_size = _slider("Chunk", _numbers(CHUNKS), start.chunk_size, "Rows that are encoded at once")
        same = [("same", 0), *_numbers(LENGTHS)]
        self.query_length = _slider(
            "Query tokens", same, start.query_length or 0, "Tokens that every query is padded to; same: as passages"
        )
        self.length = _slider(
            "Passage tokens", _numbers(LENGTHS), start.length, "Tokens that every passage is padded to"
        )
        self.tile_size = _slider("Tiles", TILES, start.tile_size or 0, "Side of a tile of logits; dense: all at once")
        kept = "Chunks whose graph is kept, and which are encoded once"
        self.retain_chunks = _slider("Retained", _numbers(RETAINED), start.retain_chunks, kept)
        precisions = [(name, name) for name in lab.PRECISIONS]
        self.precision = _dropdown("Numbers", precisions, start.precision, "Precision of weights and activations")
        optimizers = [("AdamW", "adamw"), ("SGD, no momentum", "sgd")]
        self.optimizer = _dropdown("Optimizer", optimizers, start.optimizer, "Whose states are there during the step")
        budgets = list(lab.BUDGETS.items())
        one_of("budget", budget, tuple(lab.BUDGETS))
        self.budget = _slider("Budget", budgets, lab.BUDGETS[budget], "Memory of the card, whether you own it or not")

    def _make_outputs(self) -> None:
        self.forecast = widgets.HTML()
        self.forecast.add_class("gclib-forecast")
        self.picture = widgets.HTML()
        self.picture.add_class("gclib-picture")
        self.run = _button("Run", "Run this step for real on this machine", "play")
        self.stop = _button("Stop", "End the run before its next chunk", "stop")
        self.stop.disabled = True
        self.largest = _button("Largest batch", "Set the batch to the largest one that fits the budget", "arrows-h")
        self.pin = widgets.ToggleButton(
            description="Compare", icon="thumb-tack", tooltip="Keep these settings, and compare others with them"
        )
        self.pin.add_class("gclib-compare")
        self.compared = widgets.HTML()
        self.compared.add_class("gclib-compared")
        self.as_code = widgets.ToggleButton(
            description="As code", icon="code", tooltip="Show a program that prints this forecast"
        )
        self.as_code.add_class("gclib-as-code")
        self.code = widgets.Textarea(
            description="Program", layout={"width": "100%", "height": "17em", "display": "none"}
        )
        self.code.add_class("gclib-code")
        self.progress = widgets.IntProgress(0, 0, 1, tooltip="Pieces of the step that are done")
        self.status = widgets.HTML()
        self.status.add_class("gclib-status")
        self._say(READY)

    def _on_move(self, _: Any) -> None:
        self._confirmed = None
        if self._watcher is None or not self._watcher.is_alive():
            self._say(READY)  # what was said of other settings does not stay beside these
        self.refresh()

    def _show_code(self, shown: bool) -> None:
        self.code.layout.display = "block" if shown else "none"

    def _on_pin(self) -> None:
        """Keep what the controls say, or let go of it."""
        try:
            self._pinned = self.settings() if self.pin.value else None
        except ValueError as error:
            self.pin.value = False  # comes back here, and lets go
            self._say(f"Nothing to compare with: {error}.")
        self._show_comparison()

    def _show_comparison(self) -> None:
        """The pinned settings and these, in words and as two bars."""
        if self._pinned is None:
            self.compared.value = ""
            return
        now = self.settings()
        if not (lab.is_ready(self._pinned) and lab.is_ready(now)):
            return
        said = lab.compared(self._pinned, now)
        peaks = {"pinned": lab.forecast_of(self._pinned).at_peak(), "now": lab.forecast_of(now).at_peak()}
        picture = _image(self._bars.render(peaks), said, COMPARED_INCHES)
        self.compared.value = f'<div aria-live="polite">{html.escape(said)}</div>{picture}'

    def _on_largest(self) -> None:
        """Set the batch slider to its last place that fits, and say the exact number."""
        try:
            settings = self.settings()
        except ValueError as error:
            self._say(f"No largest batch: {error}.")
            return
        if not lab.is_ready(settings):
            self._say("The forecast is not there yet. Press again when it is.")
            return
        most, name = lab.largest_that_fits(settings, self.budget.value), self.budget_name
        if most == 0:
            self._say(f"Not even one pair fits within {name}: look at what the forecast says to change.")
            return
        self.batch_size.value = max(size for size in BATCHES if size <= most)
        reached = " (more is not forecast here)" if most == lab.most_forecast(settings) else ""
        self._say(
            f"The largest batch within {name} is {most:,}{reached}; the slider stands on {self.batch_size.label}."
        )

    def _fit(self) -> None:
        """Read off laws until the controls rest on one that is known. Runs in its own thread."""
        while (settings := self._wanted) is not None:
            try:
                lab.forecast_of(settings)
            except Exception as error:  # told in words: a thread has nobody to raise to
                self._say_forecast(f"No forecast: {type(error).__name__}: {error}")
            if self._wanted == settings:
                self._wanted = None
                if lab.is_ready(settings):
                    self.refresh()

    def _run_of(self, settings: LabSettings) -> LiveRun | None:
        """The last run, if it was of these settings, on whichever device."""
        run = self._live
        return run if run is not None and run.settings == replace(settings, device=run.settings.device) else None

    def _draw(self, settings: LabSettings) -> None:
        """Forecast, text and picture of these settings; where they are those of the run, its forecast and live line."""
        budget, name, run = self.budget.value, self.budget_name, self._run_of(settings)
        forecast = lab.forecast_of(settings if run is None else run.settings)
        with self._drawing:
            picture = picture_of(forecast.timeline)
            live = run.trace(picture) if run is not None else None
            card = name if name in GPU_MEMORY_BYTES else "budget"
            png = self._figure.render(picture, budget, card, live)
            alt = plots.describe_timeline(picture, card_bytes=budget, card_name=card)
            if run is not None:
                alt += f" {_told(run, forecast)}"
            self.picture.value = _image(png, alt, PICTURE_INCHES)
            self._show_comparison()
        said = lab.advice(settings, lab.forecast_of(settings), budget, name)
        if run is not None and run.settings != settings:
            said += " The picture is of the processor that ran the step: its operations keep more than a card's."
        self._say_forecast(said)

    def _clear(self, text: str) -> None:
        """No forecast, and why: no picture and no comparison of other settings stays beside the words."""
        self.picture.value = self.code.value = self.compared.value = ""
        self._say_forecast(text)

    def _on_run(self) -> None:
        if self._watcher is not None and self._watcher.is_alive():
            self._say("A run is going on. Stop it first.")
            return
        try:
            settings = replace(self.settings(), device=self.device.type)
        except ValueError as error:
            self._say(f"Not run: {error}.")
            return
        if not lab.is_ready(settings):
            self._want(settings)
            self._say("The forecast for this machine is not there yet. Press Run again in a few seconds.")
            return
        forecast = lab.forecast_of(settings)
        card_free = memory_of(self.device)[0] if self.device.type == "cuda" else None
        if (refusal := lab.obstacle(forecast, ram_bytes()[1], card_free_bytes=card_free)) is not None:
            self._say(refusal)
            return
        seconds = lab.seconds_here(settings, forecast, str(self.device))
        if seconds > lab.SLOW_SECONDS and self._confirmed != settings:
            self._confirmed = settings
            self._say(f"This would take about {_minutes(seconds)} here. Press Run again to start it all the same.")
            return
        self._begin(settings, forecast, seconds)

    def _begin(self, settings: LabSettings, forecast: MemoryForecast, seconds: float) -> None:
        self._live = LiveRun(settings, self.device)
        self.progress.max, self.progress.value = self._live.pieces, 0
        self.run.disabled, self.stop.disabled = True, False
        where = f" on {device_words(self.device)}" if self.device.type == "cuda" else ""
        self._say(f"Starting{where}: {settings.described()}. About {_minutes(seconds)}.")
        self._watcher = threading.Thread(target=self._watch, args=(self._live, forecast), daemon=True)
        self._watcher.start()

    def _on_stop(self) -> None:
        if self._live is not None and self._live.result is None:
            self._live.stop()
            self.stop.disabled = True
            self._say("Stopping before the next chunk…")

    def _watch(self, run: LiveRun, forecast: MemoryForecast) -> None:
        """Start the run and follow it: progress, words, the live line. Runs in its own thread."""
        run.start()
        try:
            while run.result is None and run.running:
                time.sleep(REDRAW_SECONDS)
                self._follow(run)
            run.join()
        finally:
            self.run.disabled, self.stop.disabled = False, True
        self._follow(run)
        self._say(_told(run, forecast))

    def _follow(self, run: LiveRun) -> None:
        self.progress.value = run.done
        if run.result is None and not self.stop.disabled:
            live = run.ledger.events[-1].total_bytes if run.ledger and run.ledger.events else 0
            self._say(f"Piece {run.begun:,} of {run.pieces:,}: {run.stage}. Live now: {format_bytes(live)}.")
        try:
            shown = self.settings()
        except ValueError:
            return
        if self._run_of(shown) is run:
            self._draw(shown)

    def _say(self, text: str) -> None:
        self.status.value = f'<div role="status" aria-live="polite">{html.escape(text)}</div>'

    def _say_forecast(self, text: str) -> None:
        self.forecast.value = f'<div aria-live="polite" style="line-height:1.4">{html.escape(text)}</div>'


class _Canvas:
    """One figure, cleared and drawn again: cheap enough for a slider."""

    def __init__(self) -> None:
        with plots.style():
            self.figure = Figure(figsize=PICTURE_INCHES, layout="none")
            self.canvas = FigureCanvasAgg(self.figure)
            self.axes = self.figure.add_axes((0.085, 0.2, 0.72, 0.76))

    def render(self, picture: TimelinePicture, budget: int, name: str, live: Any) -> bytes:
        """The picture as a PNG."""
        png = io.BytesIO()
        with plots.style():
            for artist in [*self.axes.collections, *self.axes.lines, *self.axes.patches, *self.axes.texts]:
                artist.remove()  # axes.clear() would make all ticks anew, a third of the whole time
            plots.plot_timeline(self.axes, picture, card_bytes=budget, card_name=name, live=live)
            self.canvas.print_png(png, pil_kwargs={"compress_level": 1})
        return png.getvalue()


class _Bars:
    """Two peaks by kind, one bar each."""

    def __init__(self) -> None:
        with plots.style():
            self.figure = Figure(figsize=COMPARED_INCHES, layout="none")
            self.canvas = FigureCanvasAgg(self.figure)

    def render(self, peaks: dict[str, dict[str, int]]) -> bytes:
        """The bars as a PNG."""
        png = io.BytesIO()
        with plots.style():
            self.figure.clear()
            axes = self.figure.add_axes((0.085, 0.25, 0.7, 0.71))
            plots.plot_peaks(axes, peaks)
            axes.get_legend().set_bbox_to_anchor((0.8, 0.5), self.figure.transFigure)
            self.canvas.print_png(png, pil_kwargs={"compress_level": 1})
        return png.getvalue()


_ROW = widgets.Layout(flex_flow="row wrap", align_items="center")
_WIDE = widgets.Layout(width="400px")
_STYLE = {"description_width": "115px"}


def _slider(label: str, options: list, value: Any, tooltip: str) -> widgets.SelectionSlider:
    one_of(label.lower(), value, [option[1] if isinstance(option, tuple) else option for option in options])
    slider = widgets.SelectionSlider(
        options=options, value=value, description=label, tooltip=tooltip, style=_STYLE, layout=_WIDE
    )
    slider.add_class(_class_of(label))
    return slider


def _dropdown(label: str, options: list, value: Any, tooltip: str) -> widgets.Dropdown:
    one_of(label.lower(), value, [option[1] for option in options])
    menu = widgets.Dropdown(
        options=options, value=value, description=label, tooltip=tooltip, style=_STYLE, layout=_WIDE
    )
    menu.add_class(_class_of(label))
    return menu


def _button(label: str, tooltip: str, icon: str) -> widgets.Button:
    button = widgets.Button(description=label, tooltip=tooltip, icon=icon)
    button.add_class(_class_of(label))
    return button


def _class_of(label: str) -> str:
    """The name by which a browser test finds a control: "Query tokens" -> "gclib-query-tokens"."""
    return f"gclib-{label.lower().replace(' ', '-')}"


def _model_label(name: str) -> str:
    if name in SIZES:
        layers, width, _ = SIZES[name]
        return f"{name} ({layers} × {width})"
    return f"{name} ({PRESETS[name].parameters / 1e6:,.0f} M)"


def _numbers(values: list[int]) -> list[tuple[str, int]]:
    return [(f"{value:,}", value) for value in values]


def _image(png: bytes, alt: str, inches: tuple[float, float]) -> str:
    width, height = (round(100 * side) for side in inches)
    encoded = base64.b64encode(png).decode("ascii")
    source = f"data:image/png;base64,{encoded}"
    size = f'width="{width}" height="{height}" style="{plots.FITTING}"'
    return f'<img alt="{html.escape(alt)}" {size} src="{source}">'


def _minutes(seconds: float) -> str:
    if seconds < 1.5:
        return "1 second"
    if seconds < 90:
        return f"{round(seconds)} seconds"
    return f"{seconds / 60:,.0f} minutes" if seconds < 5400 else f"{seconds / 3600:,.0f} hours"


def _told(run: LiveRun, forecast: MemoryForecast) -> str:
    """How the run stands against its forecast, in words."""
    result = run.result
    if result is None:
        return f"A run is going on: {run.done:,} of {run.pieces:,} pieces done."
    if result.ending == "failed":
        return f"The run failed, and the lab goes on. {result.error}"
    measured = f"{format_bytes(result.peak_bytes)} ({result.peak_bytes:,} bytes)"
    card = _told_by_the_card(run)
    if result.ending == "stopped" and run.ledger is None:
        return "Stopped before the step began. Random generators are as before."
    if result.ending == "stopped":
        return (
            f"Stopped after {run.done:,} of {run.pieces:,} pieces; the peak until then was {measured}. Gradients are "
            f"cleared, random generators as before.{card}"
        )
    off = result.peak_bytes - forecast.peak_bytes
    verdict = "exactly as forecast" if off == 0 else f"{off:+,} bytes against the forecast"
    return f"Finished in {result.seconds:.1f} s on {run.texts}: measured peak {measured}, {verdict}.{card}"


def _told_by_the_card(run: LiveRun) -> str:
    """What the card's own allocator says of the run's peak; nothing on the processor."""
    allocated = run.result.allocated_peak_bytes
    if allocated is None:
        return ""
    off = 100 * (allocated / max(1, run.result.peak_bytes) - 1)
    return f" The allocator of {device_words(run.device)} counted {format_bytes(allocated)} at its peak, {off:+.1f} %."
