"""The capstone as a form: draw a brief, fill in a plan and two predictions, have them judged.

A view and nothing more: briefs are `gclib.course.capstone.briefs`, scores are `gclib.course.capstone.review`. Whatever
is typed is answered in words.
"""

from html import escape
from typing import Any

import ipywidgets as widgets

from gclib.course.capstone.briefs import Brief, draw_brief
from gclib.course.capstone.review import judge_hours, judge_peak, review
from gclib.course.widgets.base import Lab, aloud, button
from gclib.steps import STEPS
from gclib.support.validation import int_at_least
from gclib.support.words import typed_number

_FIELDS = {
    "batch_size": "batch size B",
    "tile_size": "tile size",
    "chunk_size": "chunk size C",
    "retain_chunks": "retained chunks R",
}
_UNITS = {"peak": "GiB", "hours": "hours"}


class CapstoneForm(Lab):
    """A brief's plan to fill in. All of it works from the keyboard; an empty field means none, and 0 for R.

    Attributes, each an ipywidget: seed, draw, words, step, batch_size, tile_size, chunk_size, retain_chunks, sort,
    peak, hours, judge, verdict. brief: the one that is asked now. Raises ValueError for a seed that can't be.
    """

    label_width = "130px"

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = _text("seed", str(int_at_least("seed", seed, 0)), "Another seed is another brief")
        self.draw = button("Draw this brief", self._on_draw)
        self.verdict = self.status
        self.step = widgets.Dropdown(options=tuple(STEPS), value="grad_cache", description="step")
        self.batch_size, self.tile_size, self.chunk_size, self.retain_chunks = (
            _text(shown, "", f"{name}: a whole number{'' if name == 'batch_size' else ', or empty'}", name)
            for name, shown in _FIELDS.items()
        )
        self.sort = widgets.Checkbox(True, description="sort by length, trim each chunk", indent=False)
        self.peak = _text("peak, GiB", "", "Your prediction of the step's peak")
        self.hours = _text("hours", "", "Your prediction of the whole training's hours")
        self.judge = button("Judge my plan", self._on_judge)
        self.arrange(
            *([self.seed, self.draw], self.words, [self.step, self.batch_size, self.tile_size]),
            *([self.chunk_size, self.retain_chunks, self.sort], [self.peak, self.hours, self.judge], self.verdict),
        )
        self.brief: Brief = draw_brief(seed)
        self._show_brief()

    def plan(self) -> dict[str, Any]:
        """What the fields say, as `review` reads it."""
        plan: dict[str, Any] = {"step": self.step.value, "sort_by_length": self.sort.value}
        for name in _FIELDS:
            text = getattr(self, name).value.strip()
            plan[name] = _number(text) if text else 0 if name == "retain_chunks" else None
        return plan

    def report(self) -> str:
        """The judgement of what the fields say now, as text."""
        plan = self.plan()
        if all(not getattr(self, name).value.strip() for name in _FIELDS):
            return f"Brief {self.brief.seed}. Nothing of the plan is filled in yet: it needs a batch size at least."
        judged = review(self.brief, plan)
        parts: list[object] = [f"Brief {self.brief.seed}.", judged]
        if judged.plan is not None:
            peak, predicted = (_number(getattr(self, name).value, unit) for name, unit in _UNITS.items())
            parts += [judge_peak(self.brief, plan, peak), judge_hours(self.brief, plan, predicted)]
        return "\n".join(map(str, parts))

    def _on_draw(self) -> None:
        self.draw.disabled = True
        self.verdict.value = _pre("Solving the brief, so that its deadline can be kept: a large batch takes a while…")
        try:
            self.brief = draw_brief(_number(self.seed.value))
            self._show_brief()
        except ValueError as refused:
            self.verdict.value = _pre(str(refused))
        finally:
            self.draw.disabled = False

    def _on_judge(self) -> None:
        self.judge.disabled = True
        self.verdict.value = _pre(
            "Forecasting: seconds, or minutes where a large batch is cut into tiny chunks or tiles…"
        )
        try:
            self.verdict.value = _pre(self.report())
        finally:
            self.judge.disabled = False

    def _show_brief(self) -> None:
        self.words.value = _pre(str(self.brief))
        self.verdict.value = _pre("Fill in the plan, then Judge.")


def _text(label: str, value: str, tooltip: str, placeholder: str = "") -> widgets.Text:
    look = {"placeholder": placeholder, "layout": {"width": "270px"}}
    return widgets.Text(value, description=label, tooltip=tooltip, **look)


def _number(text: str, unit: str = "") -> Any:
    """The number in a field; what is no number stays as it is, to be refused in words."""
    try:
        return typed_number(text, unit)
    except ValueError:
        return text


def _pre(text: str) -> str:
    look = "margin:0.3em 0;overflow-x:auto;line-height:1.35"
    return aloud(f'<pre style="{look}">{escape(text)}</pre>')
