"""The capstone's form: what is typed is judged in words, whatever it is."""

import pytest

from gclib.course.capstone.briefs import SCENARIOS, peak_bytes, reference
from gclib.course.capstone.widget import CapstoneForm

SMALL, SHORT_OF_TIME = 24, 4  # seeds of briefs with the smallest model: whatever else is drawn asks for other laws


@pytest.fixture
def form():
    form = CapstoneForm(SMALL)
    assert form.brief.scenario == SCENARIOS["activations"][0]
    return form


def fill(form, plan):
    form.step.value, form.sort.value = plan.step, plan.sort_by_length
    for name in ("batch_size", "tile_size", "chunk_size", "retain_chunks"):
        value = getattr(plan, name)
        getattr(form, name).value = "" if value is None else f"{value:,}"


@pytest.mark.slow
def test_the_reference_typed_in_serves_the_brief(form):
    plan = reference(form.brief.scenario)
    fill(form, plan)
    form.peak.value = f"{peak_bytes(form.brief.scenario, plan) / 2**30:.2f}"
    form.judge.click()
    assert "It serves the brief" in form.verdict.value and "peak: you said" in form.verdict.value
    assert form.report().count("Score 1.00") == 1 and form.report().startswith(f"Brief {SMALL}.")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({}, "Nothing of the plan is filled in yet"),
        ({"chunk_size": "8"}, "batch_size must be"),
        ({"batch_size": "many"}, "batch_size must be"),
        ({"batch_size": "64", "chunk_size": "128"}, "chunk_size must be at most"),
        ({"batch_size": "64", "chunk_size": "1e1"}, "chunk_size must be"),
        ({"batch_size": "9" * 5000, "chunk_size": "8"}, "batch_size must be"),
        ({"batch_size": "64", "chunk_size": "8", "retain_chunks": "x"}, "retain_chunks must be"),
        ({"batch_size": "64", "chunk_size": "8", "peak": "<b>"}, "above 0 is asked for"),
        ({"batch_size": "64", "chunk_size": "7,5"}, "chunk_size must be an int of at least 1, got &#x27;7,5&#x27;"),
        ({"batch_size": "64", "chunk_size": "8", "peak": "7,5"}, "its decimals after a point"),
        ({"batch_size": "1,024", "chunk_size": "8", "peak": "1,024 GiB"}, "you said 1,024"),
    ],
)
def test_whatever_is_typed_is_answered_in_words(form, typed, said):
    for name, text in typed.items():
        getattr(form, name).value = text
    form.judge.click()
    assert said in form.verdict.value and "<b>" not in form.verdict.value
    assert not form.judge.disabled


def test_a_plan_that_cannot_be_run_is_refused_once(form):
    form.chunk_size.value = "8"
    assert form.report().count("batch_size must be") == 1 and "peak" not in form.report()


def test_another_seed_draws_another_brief_and_no_seed_is_refused(form):
    before = form.words.value
    form.seed.value = "-4"
    form.draw.click()
    assert "seed must be an int of at least 0" in form.verdict.value and form.words.value == before
    form.seed.value = str(SHORT_OF_TIME)
    said = []
    form.verdict.observe(lambda change: said.append((change.new, form.draw.disabled)), "value")
    form.draw.click()
    assert "Solving the brief" in said[0][0] and said[0][1] and not form.draw.disabled
    assert form.brief.kind == "time" and form.words.value != before
    with pytest.raises(ValueError, match="seed must be an int"):
        CapstoneForm("one")
