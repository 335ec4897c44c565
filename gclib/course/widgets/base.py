"""What every widget of the course shares: rows of controls, words read aloud, a picture, Measure, Run and Stop.

A widget is a `Lab`: it makes its controls, puts them in rows with `arrange`, and says in a few methods what they mean.
Three kinds of lab know more: `MomentLab` walks with Previous and Next, `MeasuredLab` holds a prediction against a
measurement, `LiveLab` follows a run in a thread.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets

from gclib.course import plots
from gclib.course.threads import Worker
from gclib.course.widgets.keyboard import Keyboard
from gclib.support.validation import one_of
from gclib.support.words import format_table

WRAPPED = {"flex_flow": "row wrap", "align_items": "center"}
LABELLED = (widgets.SelectionSlider, widgets.IntSlider, widgets.Dropdown, widgets.Text)
Row = widgets.Widget | list[widgets.Widget]


def aloud(markup: str) -> str:
    """HTML that a screen reader says when it changes, as a status."""
    return f'<div role="status" aria-live="polite">{markup}</div>'


def sentence(text: str) -> str:
    """Text as HTML that a screen reader says when it changes."""
    return f'<div aria-live="polite" style="line-height:1.4">{escape(text)}</div>'


def button(label: str, react: Callable[[], object], **look: Any) -> widgets.Button:
    """A button that calls `react` when it is pressed, as wide as its words."""
    made = widgets.Button(description=label, layout={"width": "max-content", "min_width": "148px"}, **look)
    made.on_click(lambda _: react())
    return made


def slider(
    label: str,
    options: Sequence[Any],
    value: Any,
    tooltip: str | None = None,
    *,
    kind: type = widgets.SelectionSlider,
    argument: str = "",
    **look: Any,
) -> widgets.Widget:
    """A slider (or a menu: another `kind`) over options, values or (words, value); numbers are shown with commas.

    argument: the name by which a start that is no option is refused, else the label's. Raises ValueError there.
    """
    pairs = [option if isinstance(option, tuple) else (_shown(option), option) for option in options]
    one_of(argument or label.lower(), value, [option for _, option in pairs])
    return kind(options=pairs, value=value, description=label, tooltip=tooltip, **look)


def on_change(react: Callable[[], object], *controls: widgets.Widget) -> None:
    """Call `react` whenever one of the controls has another value."""
    for control in controls:
        control.observe(lambda _: react(), names="value")


class Lab(widgets.VBox):
    """A widget of the course. `words`, `picture` and `status` are HTML; all of it works from the keyboard.

    `refresh` brings words and picture up to the controls. For it a subclass has `_words` (HTML), `_figure`, and
    `describe`: the picture in words, its alt text.
    """

    label_width = "70px"  # of the controls' names; "": as ipywidgets has it

    def __init__(self) -> None:
        super().__init__()
        self.words, self.picture, self.status = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._threads: dict[str, Worker] = {}

    def arrange(self, *rows: Row, classes: Mapping[str, widgets.Widget] | None = None) -> None:
        """Put widgets below each other, those of a list side by side. classes: {name: what gets "gclib-name"}."""
        for control in (one for row in rows for one in (row if isinstance(row, list) else [row])):
            if isinstance(control, LABELLED):
                control.style.description_width = self.label_width
        for name, widget in (classes or {}).items():
            widget.add_class(f"gclib-{name}")
        boxes = [widgets.HBox(row, layout=WRAPPED) if isinstance(row, list) else row for row in rows]
        self.add_class("gclib-lab")
        self.children = [*boxes, Keyboard()]

    def refresh(self) -> None:
        """Bring words and picture up to the controls."""
        self.words.value = aloud(self._words())
        self._show(self.describe())

    def wait(self, seconds: float = 300.0) -> None:
        """Return when all that was started has ended, or after so many seconds: for cells that need the result."""
        end = time.monotonic() + seconds
        for thread in list(self._threads.values()):
            thread.join(max(0.0, end - time.monotonic()))

    def _show(self, alt: str) -> None:
        with plots.style():
            self.picture.value = plots.to_html(self._figure(), alt)

    def _say(self, text: str) -> None:
        self.status.value = aloud(escape(text))

    def _start(self, name: str, work: Callable[..., object], *arguments: object) -> None:
        """Have `work` done in a thread, unless one of this name is at work already."""
        if not self._is_busy(name):
            self._threads[name] = Worker(work, *arguments, name=name)
            self._threads[name].start()

    def _is_busy(self, name: str) -> bool:
        return name in self._threads and self._threads[name].is_alive()


class MomentLab(Lab):
    """A walk through moments: a choice, a slider, Previous and Next over words and picture. Another choice starts anew.

    A subclass has `_moments` of what is chosen; of the moment `index` `_title_and_sentence`, `_figure` and `describe`.
    """

    label_width = "60px"

    def _arrange(self, chooser: widgets.Widget, *, name: str, step: str, **look: Any) -> None:
        """The controls, with the classes gclib-`name`-..., and the first picture. step: what a button moves by."""
        self.moment = widgets.IntSlider(1, 1, len(self._moments()), description="Moment", **look)
        self.previous = button("Previous", lambda: self._move(-1), icon="arrow-left", tooltip=f"{step} back")
        self.next = button("Next", lambda: self._move(1), icon="arrow-right", tooltip=f"{step} on")
        classes = {f"{name}-{chooser.description.lower()}": chooser}
        classes |= {f"{name}-moment": self.moment, f"{name}-next": self.next}
        self.arrange([chooser, self.moment, self.previous, self.next], self.words, self.picture, classes=classes)
        on_change(self._start_anew, chooser)
        on_change(self.refresh, self.moment)
        self.refresh()

    @property
    def index(self) -> int:
        """The moment that is shown, from 0."""
        return self.moment.value - 1

    def refresh(self) -> None:
        """Bring words, picture and buttons up to the slider."""
        super().refresh()
        self.previous.disabled, self.next.disabled = self.index == 0, self.moment.value == self.moment.max

    def _words(self) -> str:
        title, sentence = map(escape, self._title_and_sentence())
        return f"<b>{self.moment.value} of {self.moment.max} · {title}.</b> {sentence}"

    def _move(self, by: int) -> None:
        self.moment.value = min(max(self.moment.value + by, 1), self.moment.max)

    def _start_anew(self) -> None:
        self.moment.max = len(self._moments())
        if self.moment.value == 1:
            self.refresh()
        self.moment.value = 1


class MeasuredLab(Lab):
    """A prediction that is there at once, and Measure: the same run on this machine, remembered, told beside it.

    measured: {settings: what was measured}. A subclass has `settings`, `describe`, `_prediction` (in words),
    `_figure`, `_obstacle` (why these settings must not be run), `_measure` (run them), `_compared` (in words), and for
    `table` `_plan` (headings and rows), `_row` (of one measurement) and `heads` over such rows.
    """

    compares = unmeasured = note = ""  # what runs in turn, what is said before it has, and what stands below the table
    heads: tuple[str, ...] = ()

    def __init__(self, tooltip: str) -> None:
        super().__init__()
        self.measured: dict[Any, Any] = {}
        self.measure = button("Measure", self._on_measure, icon="play", tooltip=tooltip)
        self.outputs = (self.words, self.picture, self.measure, self.status)

    def refresh(self) -> None:
        """Bring words, picture and what was measured up to the controls."""
        super().refresh()
        measured = self.measured.get(self.settings())
        self._say(self._compared(measured) if measured else self.unmeasured)

    def table(self) -> str:
        """The lab as text: the prediction, a table of it, and predicted beside measured for all that was measured."""
        parts = [self._prediction(), format_table(*self._plan())]
        if self.measured:
            rows = [self._row(settings, measured) for settings, measured in self.measured.items()]
            parts += [format_table(self.heads, rows), self.note]
        return "\n\n".join(filter(None, parts))

    def _words(self) -> str:
        return escape(self._prediction())

    def _obstacle(self, settings: Any) -> str | None:
        return None

    def _on_measure(self) -> None:
        settings = self.settings()
        if (refusal := self._obstacle(settings)) is not None:
            self._say(refusal)
            return
        self.measure.disabled = True
        self._say(f"Measuring: {self.compares}, in turn…")
        try:
            self.measured[settings] = self._measure(settings)
            self._say(self._compared(self.measured[settings]))
        except KeyboardInterrupt:
            self._say("Interrupted: nothing was measured.")
        except (RuntimeError, ValueError) as error:
            self._say(f"Not measured: {error}")
        finally:
            self.measure.disabled = False


class LiveLab(Lab):
    """A run that goes on in a thread: a button that begins it, Stop, and a bar of its progress. `live` is the last run.

    A run has `run`, which raises nothing, and `stop`. A subclass has `_follow` (show how far the run is) and `_ended`
    (say how it ended); both are called in a thread that watches the run.
    """

    def __init__(self, begin: widgets.Button, *, stop: str, progress: str) -> None:
        super().__init__()
        self.live: Any = None
        self._begin_button = begin
        self.stop = button("Stop", self._on_stop, icon="stop", tooltip=stop, disabled=True)
        self.progress = widgets.IntProgress(0, 0, 1, tooltip=progress)

    def _begin(self, run: Any, redraw_seconds: float) -> None:
        """Have `run` done in a thread, and follow it in another one."""
        if "watch" in self._threads:
            self._threads["watch"].join()  # it may still be drawing how the run before has ended
        self.live = run
        self._begin_button.disabled, self.stop.disabled = True, False
        self._start("run", run.run)
        self._start("watch", self._watch, run, redraw_seconds)

    def _on_stop(self) -> None:
        if self._is_busy("run"):
            self.stop.disabled = True
            self.live.stop()

    def _watch(self, run: Any, redraw_seconds: float) -> None:
        try:
            while self._is_busy("run"):
                self._threads["run"].join(redraw_seconds)
                self._follow(run)
        finally:
            self._begin_button.disabled, self.stop.disabled = False, True
        self._ended(run)


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
