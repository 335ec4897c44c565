"""Which trap is it? A step that is not named, its audit on a slider's batch, and a guess. A view, and nothing more."""

import random
from collections.abc import Callable, Mapping, Sequence
from html import escape

import ipywidgets as widgets
from torch import Tensor, nn

from gclib.audit.audit import AuditReport, audit_step
from gclib.course.widgets.base import Lab, aloud, button, on_change
from gclib.course.wild.traps import TRAPS, Trap, right_step, rows_of
from gclib.support.validation import refuse
from gclib.support.words import format_table

NOTHING = "nothing wrong"
RIGHT = Trap(NOTHING, right_step, "Gao et al. 2021, section 3.3", "as it is, nothing to mend")
SMALLEST = 5  # rows, in chunks of 3: a full one, and a short one of more than one row
RANKS = 2
MEASURED = (
    "the encoders' factor",
    "the cosine",
    "the temperature's factor",
    "“the second forward gives what the first gave”",
    "“both under one autocast”",
)


class AuditLab(Lab):
    """A choice of steps A, B, ... without their names, a slider for B, a guess, its check. All works from the keyboard.

    Attributes, each an ipywidget: step, rows, words, guess, tell, status. `table()` says all of it in text. inputs: the
    largest batch, of at least `SMALLEST` rows, one mapping of tensors a tower. seed: of the order of the steps.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        inputs: Sequence[Mapping[str, Tensor]],
        loss_fn: Callable[..., Tensor],
        *,
        seed: int = 0,
    ):
        most = min(len(next(iter(tower.values()))) for tower in inputs)
        if most < SMALLEST:
            raise refuse("inputs", f"must have at least {SMALLEST} rows", most)
        super().__init__()
        self._encoders, self._inputs, self._loss_fn = list(encoders), list(inputs), loss_fn
        self._steps = random.Random(seed).sample([RIGHT, *TRAPS], 1 + len(TRAPS))
        self._reports: dict[tuple[int, int], AuditReport] = {}
        letters = [(f"step {chr(ord('A') + number)}", number) for number in range(len(self._steps))]
        self.step = widgets.Dropdown(options=letters, value=0, description="Audit")
        self.rows = widgets.IntSlider(
            min(7, most), SMALLEST, most, description="B", continuous_update=False, tooltip="Pairs"
        )
        names = [NOTHING, *sorted(trap.name for trap in TRAPS)]
        self.guess = widgets.Dropdown(options=names, value=NOTHING, description="I say")
        self.tell = button("Check my answer", self._on_tell, icon="check", tooltip="Is the guess right?")
        self.arrange([self.step, self.rows], self.words, [self.guess, self.tell], self.status)
        on_change(self.refresh, self.step, self.rows)
        self.refresh()

    def report(self) -> AuditReport:
        """The audit of the chosen step on the chosen rows."""
        return self._audit(self.step.value, self.rows.value)

    def table(self) -> str:
        """The lab as text: what was measured of each step on as many rows as the slider says; no names."""
        heads = ["step", "scale", "cosine", "temperature's", "same second forward", "one autocast"]
        audits = [(label, self._audit(number, self.rows.value)) for label, number in self.step.options]
        return format_table(heads, [[label, *self._numbers(report)] for label, report in audits])

    def _audit(self, number: int, rows: int) -> AuditReport:
        if (number, rows) not in self._reports:
            batch, step = [rows_of(tower, 0, rows) for tower in self._inputs], self._steps[number].step
            self._reports[number, rows] = audit_step(step, self._encoders, batch, self._loss_fn, ranks=RANKS)
        return self._reports[number, rows]

    @staticmethod
    def _numbers(report: AuditReport) -> list[str]:
        temperature = "–" if report.temperature is None else f"{report.temperature:.3f}"
        replayed = "no" if "random states not replayed" in report.names else "yes"
        one_autocast = "no" if "autocast not restored" in report.names else "yes"
        return [f"{report.scale:.3f}", f"{report.cosine:.4f}", temperature, replayed, one_autocast]

    def refresh(self) -> None:
        """Bring the measurements up to the controls, and ask for a guess."""
        scale, cosine, temperature, same, together = self._numbers(self.report())
        pieces = ", ".join(map(str, self.report().chunks))
        lines = (
            f"Encoded with a graph in pieces of {pieces} rows.",
            f"Gradient of the encoders: {scale} times the right one, cosine {cosine}. "
            f"Of the temperature: {temperature} times.",
            f"The second forward gives what the first gave, dropout on: {same}. Both under one autocast: {together}.",
        )
        self.words.value = aloud("<br>".join(map(escape, lines)))
        self._say("Choose a name, then check your answer.")

    def _on_tell(self) -> None:
        trap = self._steps[self.step.value]
        if self.guess.value == trap.name:
            self._say(f"Yes: {trap.name}. What is right: {trap.right}.")
        else:
            self._say(f"No. {self._against(self.guess.value)}")

    def _against(self, name: str) -> str:
        """What a step of that name would show otherwise, on the same rows: the first such number."""
        guessed = next(number for number, trap in enumerate(self._steps) if trap.name == name)
        there, here = (self._numbers(self._audit(number, self.rows.value)) for number in (guessed, self.step.value))
        for what, other, own in zip(MEASURED, there, here, strict=True):
            if other != own:
                return f"For “{name}” {what} would be {other}, and here it is {own}."
        return "On so many rows both show the same numbers: move B."
