"""The live memory lab: sliders over exact forecasts, and the same step run for real on a button.

A view and nothing more: what a position of the controls means is `gclib.course.memory_lab.answers`, the run is
`gclib.course.memory_lab.run`, the picture `gclib.course.memory_lab.picture`, which the page itself moves where it knows
the law. Moving a control never computes on real tensors and never raises. Every control has a label and works from the
keyboard; the picture is read by a cursor, event by event, and `table` says all of it in text.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import ipywidgets as widgets

from gclib.course.memory_lab import answers, bundles
from gclib.course.memory_lab.advice import advice, knows_a_way_out, verdict, way_out
from gclib.course.memory_lab.answers import LabSettings, peak_of
from gclib.course.memory_lab.picture import PeaksView, TimelineView
from gclib.course.memory_lab.run import LiveRun
from gclib.course.threads import Worker
from gclib.course.widgets.base import WRAPPED, LiveLab, button, on_change, sentence, slider
from gclib.memory.devices import DEVICES, GPU_MEMORY_BYTES, device_words, memory_of, ram_bytes, run_device
from gclib.memory.forecast import MemoryForecast
from gclib.memory.timeline import picture_of
from gclib.models.encoder import SIZES, load_transformers
from gclib.models.presets import PRESETS
from gclib.steps import STEPS
from gclib.support.validation import one_of
from gclib.support.words import format_bytes, format_table

SHOWN = ("batch_size", "chunk_size", "length", "step", "budget")  # two a row, below the picture
FOLDED = ("model", "precision", "retain_chunks", "tile_size", "query_length", "optimizer")  # two a row, under "More"
FOLDED += ("negatives", "symmetric", "tied", "checkpointing", "lora_rank", "ranks")
REDRAW_SECONDS = 0.4  # between two pictures of a run
READY = "Run does this step for real on this machine. Memory is checked first."


class MemoryLab(LiveLab):
    """Sliders over the exact forecast of a step, and the step itself on a button.

    Attributes, each an ipywidget: step, model, precision, optimizer, batch_size, chunk_size, retain_chunks,
    query_length, length (of passages), tile_size, budget (its value: bytes), negatives, symmetric, tied, checkpointing,
    lora_rank, ranks (processes, and how they keep the weights), of which `FOLDED` are folded under `more`; run, stop,
    largest (says the largest batch that fits, and moves the slider to its last place that does), pin (keeps these
    settings to compare with), as_code (shows code, a program that prints this forecast); status, forecast, compared
    (text), picture. `table()` is the lab as text. `wait()` returns when all that was started has ended. `controls`: all
    that change the forecast. `live`: the last run, going on or ended. The keywords set where the controls start: those
    of `LabSettings`, with its defaults, and budget; each must be one of the control's values. device: where Run runs
    the step; None for a CUDA card where PyTorch can use one, else the processor. ahead: once nothing else waits, the
    page gets the laws of every step, for chunks of one row too, and for both kinds of devices: then no move of batch,
    chunk, step, retained, budget or optimizer asks Python. A budget that is a card is forecast with a card's
    operations, any other budget with those of the device. Both towers read tokens: towers for pictures are
    `forecast_step`'s alone.
    """

    label_width = "115px"

    def __init__(self, *, budget: str = "256 MiB", device: str | None = None, ahead: bool = True, **start: Any):
        self.run = button("Run", self._on_run, tooltip="Run this step for real on this machine", icon="play")
        tooltip = "Pieces of the step that are done"
        super().__init__(self.run, stop="End the run before its next chunk or phase", progress=tooltip)
        self.device, self.ahead = run_device(device), ahead
        load_transformers()
        self._make_controls(LabSettings(**start), budget)
        self._make_outputs()
        self._drawing, self._wanting, self._fitting = threading.RLock(), threading.Lock(), False
        self._wanted: tuple[LabSettings, int] | None = None
        self._refused: dict[LabSettings, str] = {}
        self._confirmed: LabSettings | None = None
        self._pinned: LabSettings | None = None
        self._timeline: tuple[LabSettings | None, dict[str, Any]] = (None, {})
        self._say(READY)
        on_change(self._on_move, *self.controls)
        self._let_the_page_answer()
        self.refresh()

    def _make_controls(self, start: LabSettings, budget: str) -> None:
        choice = partial(slider, layout=_WIDE)
        menu = partial(choice, kind=widgets.Dropdown)
        steps = [(words, step) for step, words in answers.STEP_WORDS.items()]
        self.step = menu("Step", steps, start.step, "How the gradient is computed")
        models = [(_model_label(name), name) for name in answers.MODELS]
        self.model = menu("Model", models, start.model, "The encoder: a size of BERT, or a published one's config")
        self.batch_size = choice("Batch", answers.BATCHES, start.batch_size, "Queries whose passages are contrasted")
        tooltip = "Rows encoded at once; accumulation: queries, with their passages"
        self.chunk_size = choice("Chunk", answers.CHUNKS, start.chunk_size, tooltip)
        tooltip = "Tokens that every query is padded to; same: as passages"
        self.query_length = choice("Query tokens", [("same", 0), *answers.LENGTHS], start.query_length or 0, tooltip)
        self.length = choice("Passage tokens", answers.LENGTHS, start.length, "Tokens that every passage is padded to")
        tooltip = "Side of a tile of logits; dense: all at once"
        self.tile_size = choice("Tiles", [("dense", 0), *answers.TILES], start.tile_size or 0, tooltip)
        tooltip = "Chunks whose graph is kept, and which are encoded once"
        self.retain_chunks = choice("Retained", answers.RETAINED, start.retain_chunks, tooltip)
        self.precision = menu("Numbers", answers.PRECISIONS, start.precision, "Precision of weights and activations")
        optimizers = [("AdamW", "adamw"), ("SGD, no momentum", "sgd")]
        self.optimizer = menu("Optimizer", optimizers, start.optimizer, "Whose states are there during the step")
        self._make_folded_controls(start, choice, menu)
        one_of("budget", budget, tuple(answers.BUDGETS))
        tooltip = "A card's memory, whether you own it or not, or a plain size"
        self.budget = choice("Budget", list(answers.BUDGETS.items()), answers.BUDGETS[budget], tooltip)

    def _make_folded_controls(self, start: LabSettings, choice: Callable, menu: Callable) -> None:
        tooltip = "Hard negatives of each query: their passages are encoded too"
        self.negatives = choice("Hard negatives", answers.NEGATIVES, start.negatives, tooltip)
        ways = [("queries to passages", False), ("both (symmetric)", True)]
        self.symmetric = menu("Directions", ways, start.symmetric, "Of the loss")
        towers = [("one, tied", True), ("two of their own", False)]
        self.tied = menu("Towers", towers, start.tied, "Whether queries and passages share one encoder")
        ways = [("no", False), ("yes", True)]
        tooltip = "Each layer keeps its input alone, and computes the rest again"
        self.checkpointing = menu("Checkpointing", ways, start.checkpointing, tooltip)
        tooltip = "Small matrices that are trained beside frozen weights; none: all weights are trained"
        self.lora_rank = choice("LoRA rank", [("none", 0), *answers.LORA_RANKS], start.lora_rank, tooltip)
        tooltip = "Processes, a card each, with whole weights (DDP) or shards (FSDP2); the batch is one rank's"
        self.ranks = menu("Ranks", answers.RANKS, start.ranks, tooltip)

    def _make_outputs(self) -> None:
        """The buttons, and what is shown; then all of it in rows."""
        self.forecast, self.picture, self.compared = self.words, TimelineView(), PeaksView()
        tooltip = "Find the largest batch that fits the budget, and set the slider to its last place that does"
        self.largest = button("Largest batch", self._on_largest, tooltip=tooltip, icon="arrows-h")
        tooltip = "Keep these settings, and compare others with them"
        self.pin = widgets.ToggleButton(description="Compare", icon="thumb-tack", tooltip=tooltip)
        on_change(self._on_pin, self.pin)
        tooltip = "Show a program that prints this forecast"
        self.as_code = widgets.ToggleButton(description="As code", icon="code", tooltip=tooltip)
        on_change(self._show_code, self.as_code)
        look = {"width": "100%", "height": "17em", "display": "none"}
        self.code = widgets.Textarea(description="Program", layout=look)
        plain, folded = ([getattr(self, name) for name in names] for names in (SHOWN, FOLDED))
        self.controls = (*plain, *folded)
        rows = [plain[at : at + 2] for at in range(0, len(plain), 2)]
        for control in folded:
            control.style.description_width = self.label_width
        pairs = [widgets.HBox(folded[at : at + 2], layout=WRAPPED) for at in range(0, len(folded), 2)]
        tooltip = "Show the other settings: model, numbers, retained chunks, tiles, hard negatives, and more"
        self.more = widgets.ToggleButton(description="More", icon="sliders", tooltip=tooltip)
        on_change(self._show_more, self.more)
        self.folded = widgets.VBox(pairs, layout={"display": "none"})
        buttons = [[self.run, self.stop, self.progress], [self.largest, self.pin, self.as_code]]
        labelled = (*self.controls, self.run, self.stop, *buttons[1])
        classes = {control.description.lower().replace(" ", "-"): control for control in labelled}
        shown = {"forecast": self.forecast, "picture": self.picture, "compared": self.compared, "status": self.status}
        classes |= shown | {"code": self.code, "memory-lab": self}
        classes |= {"more": self.more}
        self.forecast.layout.min_height = "4.4em"  # three lines: what is below does not jump when words wrap
        above, below = [self.picture, self.forecast], [self.compared, *buttons, self.status, self.code]
        self.arrange(*above, *rows, self.more, self.folded, *below, classes=classes)

    def _let_the_page_answer(self) -> None:
        """Tell the picture which controls to watch, and what each of their places means; again when that changes."""
        controls = {name: getattr(self, name) for name in (*SHOWN, *FOLDED)}

        def tell(_: Any = None) -> None:
            choices = {name: [value for _, value in control.options] for name, control in controls.items()}
            names = {size: name for name, size in answers.BUDGETS.items()}
            choices["budget"] = [
                [size, _line_name(names[size]), self._counted_on(names[size])] for size in choices["budget"]
            ]
            self.picture.watch(controls, choices)

        for control in controls.values():
            control.observe(tell, "options")
        tell()

    @property
    def budget_name(self) -> str:
        """The budget in words: a card's name, or its bytes."""
        return next(name for name, size in answers.BUDGETS.items() if size == self.budget.value)

    def settings(self) -> LabSettings:
        """What the controls say now. Raises ValueError for what can't be, as texts that are too long."""
        values = {name: getattr(self, name).value for name in (*SHOWN, *FOLDED) if name != "budget"}
        values |= {name: values[name] or None for name in ("query_length", "tile_size")}
        return LabSettings(**values, device=self._counted_on(self.budget_name))

    def _counted_on(self, budget_name: str) -> str:
        """Whose operations are counted with this budget."""
        return "cuda" if budget_name in GPU_MEMORY_BYTES else self.device.type

    def refresh(self) -> None:
        """Bring text and picture up to the controls; a law not known yet is read off in a thread, in words."""
        self.chunk_size.disabled = self.step.value == "naive"
        self.retain_chunks.disabled = self.step.value != "grad_cache"
        settings, refusal = self._settings_or_why_not()
        if settings is None:
            self._clear(f"No forecast: {refusal}.")
            return
        self.code.value = settings.as_code()
        if answers.is_ready(settings):
            self._draw(settings)
            return
        tokens = " and ".join(str(length) for length in sorted(set(settings.lengths)))
        then = "other chunks" if settings.tile_size else "other batches and chunks"
        once = "once a batch, with tiles" if settings.tile_size else "once"
        self._clear(
            f"Reading off the memory law of the {settings.model} model at {tokens} tokens. This takes "
            f"{_reading(settings)}, {once}; then {then} answer at once (the first of one row aside)."
        )
        self._want(settings)

    def _settings_or_why_not(self) -> tuple[LabSettings | None, str]:
        """What the controls say; or None, and why that has no forecast."""
        try:
            settings = self.settings()
        except ValueError as error:
            return None, str(error)
        refusal = self._refused.get(settings, "")
        return (None, refusal) if refusal else (settings, "")

    def _want(self, settings: LabSettings) -> None:
        """Have the law of these settings read off, and what to advise where they do not fit, in a thread."""
        with self._wanting:
            self._wanted = (settings, self.budget.value)
            if self._fitting:
                return
            self._fitting = True
        self._threads["memory-lab-fit"] = Worker(self._fit, name="memory-lab-fit")
        self._threads["memory-lab-fit"].start()

    def table(self) -> str:
        """The lab as text: the settings, the advice, the peak of each phase and kind, and the last run of them."""
        settings, refusal = self._settings_or_why_not()
        if settings is not None:
            refusal = self._try(settings)
        if refusal:
            return f"No forecast: {refusal}."
        forecast, budget = answers.forecast_of(settings), self.budget.value
        picture = picture_of(forecast.timeline)
        phases = [[span.label.replace("\n", " "), format_bytes(peak)] for span, peak in picture.span_peaks()]
        kinds = [[kind, format_bytes(count)] for kind, count in forecast.at_peak().items() if count]
        parts = [
            f"{settings.described()}.",
            advice(settings, forecast, budget, self.budget_name),
            format_table(["phase, in order", "highest"], phases),
            format_table(
                ["at the peak", f"bytes, {answers.OPERATIONS[settings.device]}"],
                [*kinds, ["sum", format_bytes(forecast.peak_bytes)]],
            ),
        ]
        run = self._run_of(settings)
        if run is not None and run.result is not None:
            parts.append(_report(run, answers.forecast_of(run.settings)))
        if self._pinned is not None and not self._try(self._pinned):
            parts.append(answers.compared(self._pinned, settings))
        return "\n\n".join(parts)

    def _on_move(self) -> None:
        self._confirmed = None
        if not self._is_busy("watch"):
            self._say(READY)  # what was said of other settings does not stay beside these
            self.progress.value = 0
        self.refresh()

    def _show_code(self) -> None:
        self.code.layout.display = "block" if self.as_code.value else "none"

    def _show_more(self) -> None:
        self.folded.layout.display = "flex" if self.more.value else "none"

    def _on_pin(self) -> None:
        """Keep what the controls say, or let go of it."""
        self._pinned, refusal = self._settings_or_why_not() if self.pin.value else (None, "")
        if refusal:
            self.pin.value = False  # comes back here, and lets go
            self._say(f"Nothing to compare with: {refusal}.")
        self._show_comparison()

    def _show_comparison(self) -> None:
        """The pinned settings and these, in words and as two bars."""
        if self._pinned is None:
            self.compared.clear()
            return
        now, _ = self._settings_or_why_not()
        if now is None or not (answers.is_ready(self._pinned) and answers.is_ready(now)):
            return
        peaks = {"pinned": answers.forecast_of(self._pinned).at_peak(), "now": answers.forecast_of(now).at_peak()}
        self.compared.show(peaks, answers.compared(self._pinned, now))

    def _on_largest(self) -> None:
        """Set the batch slider to its last place that fits, and say the exact number."""
        settings, refusal = self._settings_or_why_not()
        if settings is None:
            self._say(f"No largest batch: {refusal}.")
            return
        if not answers.is_ready(settings):
            self._say("The forecast is not there yet. Press again when it is.")
            return
        most, name = answers.largest_that_fits(settings, self.budget.value), self.budget_name
        if most == 0:
            self._say(f"Not even one pair fits within {name}: look at what the forecast says to change.")
            return
        self.batch_size.value = max(size for size in answers.BATCHES if size <= most)
        reached = " (more is not forecast here)" if most == answers.most_forecast(settings) else ""
        self._say(
            f"The largest batch within {name} is {most:,}{reached}; the slider stands on {self.batch_size.label}."
        )

    def _fit(self) -> None:
        """Read off laws, and look for ways out, until the controls rest on what is known. Runs in its own thread."""
        while (wanted := self._next_wanted()) is not None:
            settings, budget_bytes = wanted
            known = answers.is_ready(settings)
            if not self._try(settings) and self._wanted == wanted:
                if not known:
                    self._draw(settings)  # the picture, before the advice and the page's own laws
                if peak_of(settings) > budget_bytes:
                    way_out(settings, budget_bytes, lambda wanted=wanted: self._wanted == wanted)
                if self._wanted == wanted and not bundles.is_learnt(settings):
                    bundles.learn(settings)
            with self._wanting:
                if self._wanted != wanted:
                    continue
                self._wanted = None
            self.refresh()
            if self.ahead and bundles.can_learn(settings):
                self._learn_ahead(settings)

    def _learn_ahead(self, settings: LabSettings) -> None:
        """Send the page the laws of every step, of one row and of many, for both kinds of devices: these first."""
        steps, devices = (
            sorted(names, key=lambda name: name not in (settings.step, settings.device)) for names in (STEPS, DEVICES)
        )
        for step, device in product(steps, devices):
            there = replace(settings, device=device)
            if self._wanted is not None or self._try(there):
                return
            bundles.learn(there, [(step, False), (step, True)])
            with self._drawing:
                if (bundle := bundles.known_bundle(there)) is not None:
                    self.picture.learn(bundle)

    def _next_wanted(self) -> tuple[LabSettings, int] | None:
        with self._wanting:
            self._fitting = self._wanted is not None
            return self._wanted

    def _try(self, settings: LabSettings) -> str:
        """Forecast these settings; "" where that went well, else why not, which is remembered."""
        try:
            answers.forecast_of(settings)
        except Exception as error:  # told in words: a thread has nobody to raise to
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self._refused[settings] = text.rstrip(".")
        return self._refused.get(settings, "")

    def _run_of(self, settings: LabSettings) -> LiveRun | None:
        """The last run, if it was of these settings, on whichever device."""
        run = self.live
        return run if run is not None and run.settings == replace(settings, device=run.settings.device) else None

    def _draw(self, settings: LabSettings) -> None:
        """Forecast, text and picture of these settings; where they are those of the run, its forecast and live line."""
        budget, name, run = self.budget.value, self.budget_name, self._run_of(settings)
        forecast = answers.forecast_of(settings if run is None else run.settings)
        with self._drawing:
            picture = picture_of(forecast.timeline)
            live = run.trace(picture) if run is not None else None
            words = _report(run, forecast) if run is not None else ""
            drawn = settings if run is None else run.settings
            bundle = bundles.known_bundle(drawn) or self._explicit(drawn, forecast)
            shown = bundles.page_settings(drawn)
            self.picture.show(bundle, shown, budget, _line_name(name), picture=picture, live=live, words=words)
            self._show_comparison()
        if not bundles.is_learnt(settings):
            self._want(settings)
        shown = answers.forecast_of(settings)
        if shown.peak_bytes <= budget or knows_a_way_out(settings, budget):
            text = advice(settings, shown, budget, name)
        else:
            text = f"{verdict(settings, shown, budget, name)} Looking for what would fit…"
            self._want(settings)
        if run is not None and run.settings != settings:
            text += " The picture is of the processor that ran the step; these words are of a card's operations."
        self.forecast.value = sentence(text)

    def _explicit(self, settings: LabSettings, forecast: MemoryForecast) -> dict[str, Any]:
        """One timeline for the page, where it has no law of these settings; the same object for the same settings."""
        if self._timeline[0] != settings:
            self._timeline = settings, bundles.explicit_bundle(settings, forecast)
        return self._timeline[1]

    def _clear(self, text: str) -> None:
        """No forecast, and why: no picture and no comparison of other settings stays beside the words."""
        self.picture.clear()
        self.compared.clear()
        self.code.value = ""
        self.forecast.value = sentence(text)

    def _on_run(self) -> None:
        if self._is_busy("watch"):
            self._say("A run is going on. Stop it first.")
            return
        try:
            settings = replace(self.settings(), device=self.device.type)
            refusal = self._refused.get(settings)
        except ValueError as error:
            refusal = error
        if not refusal and settings.ranks != answers.ONE_RANK:
            refusal = f"Run is one process, and this step takes {answers.RANKS[settings.ranks][0]}. Set Ranks to 1"
        if refusal:
            self._say(f"Not run: {refusal}.")
            return
        if not answers.is_ready(settings):
            self._want(settings)
            self._say(f"The forecast for this machine is not there yet. Press Run again in {_reading(settings)}.")
            return
        forecast = answers.forecast_of(settings)
        card_free = memory_of(self.device)[0] if self.device.type == "cuda" else None
        halved = settings.precision == "pure bf16"
        refusal = answers.obstacle(forecast, ram_bytes()[1], card_free_bytes=card_free, halved=halved)
        if refusal is not None:
            self._say(refusal)
            return
        seconds = answers.seconds_here(settings, forecast, str(self.device))
        if seconds > answers.SLOW_SECONDS and self._confirmed != settings:
            self._confirmed = settings
            self._say(f"This would take about {_minutes(seconds)} here. Press Run again to start it all the same.")
            return
        run = LiveRun(settings, self.device)
        self.progress.max, self.progress.value = run.pieces, 0
        where = f" on {device_words(self.device)}" if self.device.type == "cuda" else ""
        self._say(f"Starting{where}: {settings.described()}. About {_minutes(seconds)}.")
        self._begin(run, REDRAW_SECONDS)

    def _on_stop(self) -> None:
        if self._is_busy("run"):
            super()._on_stop()
            self._say("Stopping before the next chunk or phase…")

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

    def _ended(self, run: LiveRun) -> None:
        self._follow(run)
        self._say(_report(run, answers.forecast_of(run.settings)))


_WIDE = widgets.Layout(width="400px")


def _reading(settings: LabSettings) -> str:
    """How long its laws take to read off, in words."""
    return "half a minute" if answers.is_deep(settings.model) else "some seconds"


def _model_label(name: str) -> str:
    if name in SIZES:
        layers, width, _ = SIZES[name]
        return f"{name} ({layers} × {width})"
    return f"{name} ({PRESETS[name].parameters / 1e6:,.0f} M)"


def _line_name(budget_name: str) -> str:
    """What the picture's line is called."""
    return budget_name if budget_name in GPU_MEMORY_BYTES else "the budget"


def _minutes(seconds: float) -> str:
    if seconds < 1.5:
        return "1 second"
    if seconds < 90:
        return f"{round(seconds)} seconds"
    return f"{seconds / 60:,.0f} minutes" if seconds < 5400 else f"{seconds / 3600:,.0f} hours"


def _report(run: LiveRun, forecast: MemoryForecast) -> str:
    """How the run stands against its forecast, in words."""
    result = run.result
    if result is None:
        return f"A run is going on: {run.done:,} of {run.pieces:,} pieces done."
    if result.ending == "failed":
        return f"The run failed, and the lab goes on. {result.error}"
    measured = f"{format_bytes(result.peak_bytes)} ({result.peak_bytes:,} bytes)"
    card = _report_of_the_card(run)
    if result.ending == "stopped" and run.ledger is None:
        return "Stopped before the step began. Random generators are as before."
    if result.ending == "stopped":
        return (
            f"Stopped after {run.done:,} of {run.pieces:,} pieces; the peak until then was {measured}. Gradients are "
            f"cleared, random generators as before.{card}"
        )
    off = result.peak_bytes - forecast.peak_bytes
    counted = f"with {answers.OPERATIONS[run.settings.device]}"
    compared = f"exactly as forecast {counted}" if off == 0 else f"{off:+,} bytes against the forecast {counted}"
    return f"Finished in {result.seconds:.1f} s on {run.texts}: measured peak {measured}, {compared}.{card}"


def _report_of_the_card(run: LiveRun) -> str:
    """What the card's own allocator says of the run's peak; nothing on the processor."""
    allocated = run.result.allocated_peak_bytes
    if allocated is None:
        return ""
    off = 100 * (allocated / max(1, run.result.peak_bytes) - 1)
    return f" The allocator of {device_words(run.device)} counted {format_bytes(allocated)} at its peak, {off:+.1f} %."
