"""What the learner expects before measuring: asked, kept under data/cache/, and shown back afterwards.

`after_prediction` keeps the widget that answers a question closed until the learner has answered it. A prediction
changes nothing that runs later, so a notebook executed by a machine passes them by.
"""

import math
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape
from numbers import Real
from typing import TYPE_CHECKING, Any

from gclib.support.validation import int_at_least, refuse
from gclib.support.words import typed_number

from . import progress

if TYPE_CHECKING:
    import ipywidgets

Prediction = str | float
_asked: dict[tuple[str, str], dict[str, Any]] = {}  # the questions of this process, by chapter and key
_closed: dict[tuple[str, str], list[Callable[[], None]]] = {}  # what opens when a prediction is kept


def record_prediction(chapter: int, key: str, value: Prediction) -> None:
    """Keep `value` as the learner's prediction for `key`; a later one replaces it.

    value: a string or a finite number. Raises ValueError for anything else, a negative chapter, an empty key.
    """
    name = _chapter_name(chapter)
    _check_key(key)
    if isinstance(value, bool) or not isinstance(value, str | Real):
        raise refuse("value", "must be a string or a finite number", value)
    if isinstance(value, Real) and not math.isfinite(value):
        raise refuse("value", "must be finite", value)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"value": value if isinstance(value, str) else float(value), "when": when}

    def change(record: dict) -> None:
        answers = record.get(name)
        record[name] = (answers if isinstance(answers, dict) else {}) | {key: entry}

    progress.update("predictions", change)
    for open_now in _closed.pop((name, key), ()):
        open_now()


def recall(chapter: int) -> dict[str, Prediction]:
    """The learner's predictions in `chapter` by key; empty where nothing was predicted."""
    answers = progress.load("predictions").get(_chapter_name(chapter))
    if not isinstance(answers, dict):
        return {}
    entries = {key: entry.get("value") for key, entry in answers.items() if isinstance(entry, dict)}
    return {key: value for key, value in entries.items() if isinstance(value, Prediction)}  # a damaged one is none


def show_back(chapter: int, key: str, measured: object, *, unit: str = "", how: str = "Measured") -> None:
    """Print the learner's prediction for `key` beside what was found (numbers to three digits).

    how: the word for the way in which it was found: "Measured", "Forecast", "Counted".
    """
    _check_key(key)
    finding = f"{how}: {_in_words(measured)} {unit}".strip()
    predicted = recall(chapter).get(key)
    if predicted is None:
        print(f"You made no prediction here. {finding}.")
        return
    print(f"{f'You predicted {_in_words(predicted)} {unit}'.strip()}. {finding}.")
    if isinstance(predicted, Real) and isinstance(measured, Real) and predicted > 0 and measured > 0:
        factor = max(predicted / measured, measured / predicted)
        much = "much" if predicted > measured else "little"
        print("That is as good as exact." if factor < 1.05 else f"That is {_in_words(factor)} times too {much}.")


def predict(
    chapter: int,
    key: str,
    question: str,
    *,
    options: Sequence[str] | None = None,
    unit: str | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> "ipywidgets.VBox":
    """A widget that asks `question` and keeps the answer: one of `options`, or a number in `unit` from `low` to `high`.

    The unit may be typed behind the number. The attributes `answer`, `keep` (a button) and `status` work from the
    keyboard alone; Enter in the field keeps the number too. An earlier prediction is shown and can be changed. Raises
    ValueError unless exactly one of `options` and `unit` is given, and low < high.
    """
    _check_question(chapter, key, question, options, unit)
    if not low < high:
        raise refuse("low", "must be below high", f"low={low!r}, high={high!r}")
    asked = {"question": question, "options": options, "unit": unit, "low": low, "high": high}
    _asked[_chapter_name(chapter), key] = asked
    import ipywidgets as widgets

    from gclib.course.widgets.base import Lab, button

    box = Lab()
    box.label_width = "initial"
    earlier = recall(chapter).get(key)
    box.words.value = f"<b>Your prediction.</b> {escape(question)}"
    box.status.value = "" if earlier is None else f"Kept earlier: {escape(_in_words(earlier))}."
    if options is not None:
        chosen = earlier if earlier in options else None
        box.answer = widgets.RadioButtons(options=list(options), value=chosen, layout={"width": "max-content"})
    else:
        start = f"{earlier:g}" if isinstance(earlier, Real) else ""
        look = {"placeholder": "a number", "layout": {"width": "18em"}}
        box.answer = widgets.Text(value=start, description=unit, **look)
        box.answer.on_msg(lambda _, content, __: content.get("event") == "submit" and keep_answer())  # Enter

    def keep_answer() -> None:
        answer = box.answer.value
        try:
            value = answer if options is not None else _read_number(answer, unit, low, high)
            box.status.value = escape(_keep(chapter, key, value))
        except ValueError as refused:
            box.status.value = escape(f"{refused}{_still_kept(chapter, key)}")

    box.keep = button("Keep my prediction", keep_answer)
    box.arrange(box.words, box.answer, box.keep, box.status, classes={"prediction": box})
    return box


def after_prediction(chapter: int, key: str, widget: "ipywidgets.Widget") -> "ipywidgets.Widget":
    """`widget`, closed until the learner has predicted `key`, or says Skip; as it is where that was done before.

    The view alone is closed: code works with `widget` as ever. In its place stands the question, where `predict` asked
    it in this process, to be answered there too; `skip` is a button, and `open_now` opens it from code. Raises
    ValueError for a negative chapter and an empty key.
    """
    _check_key(key)
    place = (_chapter_name(chapter), key)
    if key in recall(chapter):
        return widget
    from gclib.course.widgets.base import Lab, aloud, button

    box = Lab()
    asked = [predict(chapter, key, **_asked[place])] if place in _asked else []
    here = "here" if asked else "where the chapter asks for it"

    def open_now() -> None:
        box.remove_class("gclib-closed")
        box.status.value = aloud("Open. Compare it with what you predicted." if key in recall(chapter) else "Open.")
        box.arrange(box.status, widget)

    box.open_now, box.skip = open_now, button("Skip", open_now, tooltip="Open it without a prediction")
    box.status.value = aloud(f"<b>Predict first.</b> What answers this opens when you have kept a prediction {here}.")
    box.arrange(box.status, *asked, box.skip, classes={"closed": box, "skip": box.skip})
    _closed.setdefault(place, []).append(open_now)
    return box


def _read_number(text: str, unit: str, low: float, high: float) -> float:
    """The number in `text`, which may have commas and end in the unit; ValueError, in words, for anything else."""
    if not text.strip():
        raise ValueError("Type a number first.")
    number = typed_number(text, unit)
    if not -sys.float_info.max <= number <= sys.float_info.max:
        raise ValueError(f"That is not a number that can be kept: {text}.")
    if number < low:
        raise ValueError(f"{_in_words(number)} is too low: it can't be below {_in_words(low)}.")
    if number > high:
        raise ValueError(f"{_in_words(number)} is too high: it can't be above {_in_words(high)}.")
    return number


def _keep(chapter: int, key: str, value: Prediction | None) -> str:
    """Keep the prediction; what to tell the learner. ValueError, in words, where nothing was chosen."""
    if value is None:
        raise ValueError("Choose an answer first.")
    record_prediction(chapter, key, value)
    return f"Kept: {_in_words(value)}. Go on, and see."


def _still_kept(chapter: int, key: str) -> str:
    earlier = recall(chapter).get(key)
    return "" if earlier is None else f" What you said earlier is still kept: {_in_words(earlier)}."


def _check_question(chapter: int, key: str, question: str, options: Sequence[str] | None, unit: str | None) -> None:
    _chapter_name(chapter)
    _check_key(key)
    if not isinstance(question, str) or not question.strip():
        raise refuse("question", "must be a sentence", question)
    if (options is None) == (unit is None):
        raise refuse("options", "or unit must be given, and not both", f"options={options!r}, unit={unit!r}")
    if options is not None and (isinstance(options, str) or len(set(options)) < 2):
        raise refuse("options", "must be at least two different strings", options)


def _check_key(key: str) -> None:
    if not isinstance(key, str) or not key.strip():
        raise refuse("key", "must be a non-empty string", key)


def _chapter_name(chapter: int) -> str:
    return f"ch{int_at_least('chapter', chapter, 0):02d}"


def _in_words(value: object) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
