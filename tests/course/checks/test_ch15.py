"""Chapter 15's checks: mistakes written in other words are recognised; the course's record, kept or not."""

import math

import nbformat
import pytest

from gclib.course.capstone.briefs import SCENARIOS, TrainingPlan, forecast, peak_bytes
from gclib.course.checks import ch15, record
from gclib.course.checks.predictions import record_prediction


@pytest.fixture(autouse=True)
def own_record(monkeypatch, tmp_path):
    monkeypatch.setenv("GCLIB_PROGRESS_FOLDER", str(tmp_path))


def test_the_peak_by_hand_is_near_the_forecast():
    scenario, size = SCENARIOS["activations"][0], SCENARIOS["activations"][0].batch_size
    few, more = (peak_bytes(scenario, TrainingPlan("grad_cache", size, None, 32, retained)) for retained in (2, 4))
    weights = forecast(scenario, TrainingPlan("grad_cache", size, None, 32)).at_peak()["parameters"]
    row, chunk, retained = round((more - few) / 64), 32, 3
    said = ch15.predict_peak.oracle(4 * weights, row, 4 * 384, size, chunk, retained, None)
    assert said == pytest.approx(
        peak_bytes(scenario, TrainingPlan("grad_cache", size, None, chunk, retained)) / 2**30, rel=0.05
    )


def everything_kept(fixed, row, rep, batch, chunk, retained, tile):
    side = tile if tile else batch
    return (fixed + 4 * batch * rep + max(12 * side**2 + row * 2 * batch, chunk * row)) / 1024**3


def no_graphs(fixed, row, rep, batch, chunk, retained, tile):
    logits = 3 * (tile or batch) ** 2 * 4
    return (fixed + 4 * batch * rep + max(logits, chunk * row)) / 2**30


def all_at_once(fixed, row, rep, batch, chunk, retained, tile):
    return (fixed + 4 * batch * rep + chunk * row * (retained + 1) + 12 * (tile or batch) ** 2) / 2**30


def decimal(fixed, row, rep, batch, chunk, retained, tile):
    total = fixed + 4 * batch * rep + max(retained * chunk * row + 12 * (tile or batch) ** 2, chunk * row)
    return total / 1000**3


def doubled(examples, batch, naive_seconds, encoded, retained):
    updates = math.ceil(examples / batch)
    return updates * naive_seconds * (encoded * retained + 2 * encoded * (1 - retained)) / 3600


def whole_batches(examples, batch, naive_seconds, encoded, retained):
    return sum(naive_seconds * encoded * (4 - retained) / 3 for _ in range(examples // batch)) / 3600


def all_twice(examples, batch, naive_seconds, encoded, retained):
    return math.ceil(examples / batch) * naive_seconds * 4 * encoded / 3 / 3600


def greedy(batch, budget, need):
    if need(None, 0, None) <= budget:
        return dict(step="naive", chunk_size=None, retain_chunks=0, tile_size=None)
    tile = None if need(4, 0, None) <= budget else 1024
    chunk = [c for c in (4, 8, 16, 32, 64) if need(c, 0, tile) <= budget][-1]
    return dict(step="grad_cache", chunk_size=chunk, retain_chunks=0, tile_size=tile)


def tiled_always(batch, budget, need):
    found = ch15.plan.oracle(batch, budget, need)
    if found["step"] == "naive":
        return found
    found |= {"tile_size": 1024, "chunk_size": max(c for c in (4, 8, 16, 32, 64) if need(c, 0, 1024) <= budget)}
    chunks = 2 * math.ceil(batch / found["chunk_size"])
    kept = (r for r in range(chunks, -1, -1) if need(found["chunk_size"], r, 1024) <= budget)
    return found | {"retain_chunks": next(kept)}


def by_batch(plans, card_gib, deadline):
    fine = [p for p in plans if p["peak_bytes"] <= card_gib * 2**30 and p["hours"] <= deadline]
    return [plans.index(p) for p in sorted(fine, key=lambda p: (p["batch_size"], -p["hours"]), reverse=True)]


def by_hours(plans, card_gib, deadline):
    fine = [n for n, p in enumerate(plans) if p["peak_bytes"] <= card_gib * 2**30 and p["hours"] <= deadline]
    return sorted(fine, key=lambda n: plans[n]["hours"])


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch15.predict_peak, everything_kept, "the naive step's peak"),
        (ch15.predict_peak, no_graphs, "retained graphs forgotten"),
        (ch15.predict_peak, all_at_once, "both moments at once"),
        (ch15.predict_peak, decimal, "GB instead of GiB"),
        (ch15.predict_time, doubled, "2 instead of 4/3"),
        (ch15.predict_time, whole_batches, "last batch lost"),
        (ch15.predict_time, all_twice, "retained chunks forgotten"),
        (ch15.plan, greedy, "nothing retained"),
        (ch15.plan, tiled_always, "tiles without need"),
        (ch15.defend, by_batch, "accumulation's batch taken for its negatives"),
        (ch15.defend, by_hours, "the fastest first"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    for seed in range(4):
        assert exercise.judge(answer, seed=seed).misconception == name


def test_right_answers_in_other_words_are_right():
    def plan(batch, budget, need):
        best = ("naive", None, 0, None)
        if need(None, 0, None) > budget:
            tile = 1024 if need(4, 0, None) > budget else None
            chunk = next(c for c in (64, 32, 16, 8, 4) if need(c, 0, tile) <= budget)
            retained = next(r for r in range(2 * -(-batch // chunk), -1, -1) if need(chunk, r, tile) <= budget)
            best = ("grad_cache", chunk, retained, tile)
        return dict(zip(("step", "chunk_size", "retain_chunks", "tile_size"), best, strict=True))

    assert ch15.plan.judge(plan).status == "correct"


# --- the record -----------------------------------------------------------------------------------------------


def test_without_a_record_the_page_and_the_certificate_say_so():
    assert "No prediction is kept" in record.predictions_page()
    assert "Nothing is recorded as solved" in record.certificate()


def test_the_page_without_any_notebook_says_so(tmp_path):
    assert record.questions(tmp_path / "none") == []
    assert record.predictions_page(tmp_path / "none").startswith("No prediction is kept")


def test_every_question_of_the_chapters_is_found_with_what_was_shown():
    asked = record.questions()
    assert len({(q.chapter, q.key) for q in asked}) == len(asked) >= 24
    found = {(q.chapter, q.key): q.found for q in asked}
    assert all(found.values())
    assert found[7, "ratio"] == "1.33" and found[1, "copies"] == "it stays the same"


def test_kept_predictions_stand_beside_what_was_found():
    record_prediction(7, "ratio", "2")
    record_prediction(7, "sorted", 1.6)
    page = record.predictions_page()
    assert "kept: 2." in page and "07 ratio" in page and "another" in page and "too high" in page


def test_what_was_found_is_read_from_the_readers_own_copy(monkeypatch, tmp_path):
    ask, shown = "predict(7, 'ratio', 'How much?')", "show_back(7, 'ratio', 9)"
    cells = [nbformat.v4.new_code_cell(f"notebook.{call}") for call in (ask, shown)]
    cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="You predicted 2. Measured: 9.\n")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "07_the_price_is_time.ipynb")
    record_prediction(7, "ratio", 2)
    monkeypatch.chdir(tmp_path)
    assert record.predictions_page().splitlines()[-1].split()[:5] == ["07", "ratio", "2", "9", "4.5"]


def test_a_prediction_whose_key_the_chapter_makes_as_it_runs_stands_on_the_page_too():
    record_prediction(14, "case A", "gradient cache")
    record_prediction(15, "claim 1", "it holds")
    rows = record.predictions_page().splitlines()[-2:]
    assert [row.split()[:3] for row in rows] == [["14", "case", "A"], ["15", "claim", "1"]]
    assert all("see the chapter" in row for row in rows)


@pytest.mark.parametrize(
    ("predicted", "found", "said"),
    [
        ("less", "less", "the same"),
        ("less", "more", "another"),
        (10.0, "10.2 MiB", "as good as exact"),
        (20.0, "10 MiB", "2 times too high"),
        (500.0, "4,000 MiB", "8 times too low"),
        (0.0, "0 steps", "exact"),
        (3.0, "0 steps", "off"),
        (3.0, "", "not shown yet"),
    ],
)
def test_an_error_is_told_in_words(predicted, found, said):
    assert record.error_of(predicted, found) == said


def test_the_certificate_counts_what_is_solved(capsys):
    ch15.predict_peak(no_graphs)
    ch15.predict_peak(ch15.predict_peak.oracle)
    assert "Solved: 1 of " in record.certificate()
    row = next(line for line in record.certificate().splitlines() if "15 Capstone" in line)
    assert "1 of 4" in row and row.split()[-2:] == ["2", "1"]


def test_a_damaged_record_is_no_record(tmp_path):
    (tmp_path / "exercises.json").write_text('{"ch15.predict_peak": 7}')
    (tmp_path / "predictions.json").write_text('{"07": {"ratio": {"value": null}, "sorted": {}}}')
    assert "No prediction" in record.predictions_page()
    (tmp_path / "predictions.json").write_text("[1")
    assert "Nothing is recorded" in record.certificate() and "No prediction" in record.predictions_page()
