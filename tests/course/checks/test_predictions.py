"""Predictions: kept, recalled, shown back, and asked by a widget that refuses what cannot be kept."""

import json
import math

import ipywidgets as widgets
import pytest

from gclib.course.checks.predictions import after_prediction, predict, recall, record_prediction, show_back


@pytest.fixture(autouse=True)
def own_progress(monkeypatch, tmp_path):
    monkeypatch.setenv("GCLIB_PROGRESS_FOLDER", str(tmp_path))
    return tmp_path


def test_predictions_are_kept_by_chapter_and_replaced():
    assert recall(1) == {}
    record_prediction(1, "loss", 4)
    record_prediction(1, "loss", 4.5)
    record_prediction(1, "direction", "falls")
    record_prediction(2, "loss", 1.0)
    assert recall(1) == {"loss": 4.5, "direction": "falls"}
    assert recall(2) == {"loss": 1.0}


def test_a_damaged_record_reads_as_none(own_progress):
    for text in ("{", '{"ch01": 3}', '{"ch01": {"loss": 3}}'):
        (own_progress / "predictions.json").write_text(text)
        assert recall(1) == {}
    record_prediction(1, "loss", 2.0)
    assert recall(1) == {"loss": 2.0}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((-1, "loss", 1.0), "chapter"),
        (("1", "loss", 1.0), "chapter"),
        ((1, "", 1.0), "key"),
        ((1, 3, 1.0), "key"),
        ((1, "loss", math.nan), "value"),
        ((1, "loss", True), "value"),
        ((1, "loss", [1.0]), "value"),
    ],
)
def test_what_cannot_be_kept_is_refused(own_progress, arguments, named):
    with pytest.raises(ValueError, match=f"^{named} "):
        record_prediction(*arguments)
    assert list(own_progress.iterdir()) == []


def test_predictions_are_shown_back(capsys):
    show_back(1, "loss", 4.852, unit="nats")
    record_prediction(1, "loss", 9.704)
    record_prediction(1, "tokens", 24_000)
    record_prediction(1, "direction", "it falls")
    show_back(1, "loss", 4.852, unit="nats")
    show_back(1, "tokens", 12_000)
    show_back(1, "direction", "it rises", how="Counted")
    assert capsys.readouterr().out.splitlines() == [
        "You made no prediction here. Measured: 4.85 nats.",
        "You predicted 9.7 nats. Measured: 4.85 nats.",
        "That is 2 times too much.",
        "You predicted 24,000. Measured: 12,000.",
        "That is 2 times too much.",
        "You predicted it falls. Counted: it rises.",
    ]


def test_enter_in_the_field_keeps_the_number():
    box = predict(3, "bytes", "How many?", unit="MiB")
    box.answer.value = "12"
    box.answer._handle_custom_msg({"event": "submit"}, [])  # what the page sends
    assert recall(3) == {"bytes": 12.0} and "Kept: 12" in box.status.value


def answer(box, value):
    """Type or choose `value`, press the button; what the widget says."""
    box.answer.value = value
    box.keep.click()
    return box.status.value


def test_the_widget_keeps_a_number():
    box = predict(1, "loss", "How large is the loss?", unit="nats")
    box.keep.click()
    assert box.status.value == "Type a number first." and recall(1) == {}
    assert answer(box, "about <four>") == "That is not a number: about &lt;four&gt;." and recall(1) == {}
    assert answer(box, "7,5").startswith("That is not a number: 7,5. A comma stands between") and recall(1) == {}
    assert answer(box, "nan").startswith("That is not a number") and recall(1) == {}
    assert answer(box, " 1,200.5 ").startswith("Kept: ") and recall(1) == {"loss": 1200.5}


@pytest.mark.parametrize("typed", ["4096 MiB", "4,096MiB", " 4096  MiB ", "4096"])
def test_the_unit_may_be_typed(typed):
    answer(predict(1, "peak", "How much?", unit="MiB"), typed)
    assert recall(1) == {"peak": 4096}


def test_a_number_out_of_range_is_refused_and_the_older_one_stays():
    box = predict(1, "cosine", "Which cosine?", unit="(from -1 to 1)", low=-1, high=1)
    assert answer(box, "7") == "7 is too high: it can&#x27;t be above 1." and recall(1) == {}
    assert answer(box, "1").startswith("Kept: ") and answer(box, "-1").startswith("Kept: ")
    said = answer(box, "-1.5")
    assert said.startswith("-1.5 is too low") and said.endswith("What you said earlier is still kept: -1.")
    assert answer(box, "").startswith("Type a number first. What you said earlier is still kept")
    assert recall(1) == {"cosine": -1}


def test_an_exact_hit_is_told_as_one(capsys):
    record_prediction(1, "loss", 4.85)
    show_back(1, "loss", 4.852, unit="nats")
    assert capsys.readouterr().out.splitlines()[1] == "That is as good as exact."


def test_the_widget_keeps_a_choice_and_shows_it_again():
    options = ["it falls", "it rises"]
    box = predict(1, "direction", "Which way?", options=options)
    assert box.answer.value is None
    box.keep.click()
    assert box.status.value == "Choose an answer first."
    box.answer.value = "it rises"
    box.keep.click()
    again = predict(1, "direction", "Which way?", options=options)
    assert again.answer.value == "it rises" and "Kept earlier" in again.status.value
    assert predict(1, "direction", "Which way?", options=["yes", "no"]).answer.value is None


def test_the_question_is_shown_as_text():
    assert "&lt;b&gt;" in predict(1, "k", "Is <b> bold?", unit="x").children[0].value


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"question": " "}, "question"),
        ({"options": ["a", "b"]}, "options"),
        ({"unit": None}, "options"),
        ({"unit": None, "options": ["a"]}, "options"),
        ({"unit": None, "options": "ab"}, "options"),
        ({"low": 1, "high": 1}, "low"),
        ({"chapter": 1.5}, "chapter"),
        ({"key": ""}, "key"),
    ],
)
def test_a_bad_question_is_refused(change, named):
    with pytest.raises(ValueError, match=f"^{named} "):
        predict(**({"chapter": 1, "key": "k", "question": "Why?", "unit": "x"} | change))


def test_the_record_is_readable_json(own_progress):
    record_prediction(1, "loss", 4)
    entry = json.loads((own_progress / "predictions.json").read_text())["ch01"]["loss"]
    assert entry["value"] == 4.0 and entry["when"].endswith("+00:00")


# --- what opens after a prediction ----------------------------------------------------------------------------


def below(box):
    """Every widget inside a box."""
    return [one for child in getattr(box, "children", ()) for one in (child, *below(child))]


def test_what_answers_a_question_opens_when_it_is_predicted_there():
    predict(1, "loss", "How large?", unit="nats", low=0)
    answer_to_it = widgets.IntSlider()
    lock = after_prediction(1, "loss", answer_to_it)
    assert answer_to_it not in below(lock) and "Predict first" in lock.status.value
    (asked,) = [one for one in below(lock) if hasattr(one, "answer")]
    answer_to_it.value = 7  # code works with it as ever
    assert answer(asked, "-1").startswith("-1 is too low") and answer_to_it not in below(lock)
    answer(asked, "4.85")
    assert answer_to_it in below(lock) and asked not in below(lock) and answer_to_it.value == 7
    assert "Compare it" in lock.status.value and "gclib-closed" not in lock._dom_classes
    assert after_prediction(1, "loss", answer_to_it) is answer_to_it  # the next day


def test_it_opens_by_the_box_above_and_all_that_wait_for_the_same_open_together():
    above = predict(1, "loss", "How large?", unit="nats")
    parts = widgets.Label(), widgets.Label()
    locks = [after_prediction(1, "loss", part) for part in parts]
    other = after_prediction(1, "tokens", parts[0])
    answer(above, "3")
    assert all(part in below(lock) for part, lock in zip(parts, locks, strict=True))
    assert parts[0] not in below(other)


def test_skip_opens_it_and_keeps_no_prediction():
    slider = widgets.IntSlider()
    lock = after_prediction(2, "never asked", slider)
    assert not [one for one in below(lock) if hasattr(one, "answer")] and "where the chapter asks" in lock.status.value
    lock.skip.click()
    assert slider in below(lock) and lock.status.value.endswith(">Open.</div>") and recall(2) == {}
    record_prediction(2, "never asked", 1.0)
    assert below(lock).count(slider) == 1


@pytest.mark.parametrize(("arguments", "named"), [((-1, "a"), "chapter"), ((1, " "), "key")])
def test_a_bad_place_is_refused(arguments, named):
    with pytest.raises(ValueError, match=f"^{named} "):
        after_prediction(*arguments, widgets.Label())
