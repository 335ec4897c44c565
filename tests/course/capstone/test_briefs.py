"""The capstone: briefs of any seed can be solved, the reference is not beaten, worse decisions score less."""

import itertools
import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gclib.course.capstone import briefs as capstone
from gclib.course.capstone.briefs import (
    RIGHT_AMONG_NEGATIVES,
    SCENARIOS,
    Brief,
    Scenario,
    TrainingPlan,
    best_with,
    draw_brief,
    fits,
    hours,
    negatives,
    peak_bytes,
    reference,
    right_among_negatives,
    updates,
    worth,
)
from gclib.course.capstone.review import _gain, claims, judge_claims, judge_hours, judge_peak, review
from gclib.course.capstone.run import run_scaled, scaled
from gclib.data.pairs import TextPair
from gclib.data.tokens import train_tokenizer
from gclib.losses.module import ContrastiveLoss
from gclib.memory.flops import count_flops, encoder_cost
from gclib.models.encoder import Encoder

SMALL = SCENARIOS["activations"][0]  # the one that the quick tests look at: each takes seconds of forecasts
FIRST = {kind: scenarios[:1] for kind, scenarios in SCENARIOS.items()}  # `make test` looks at these, test-deep at all
KIND_OF = {scenario: kind for kind, scenarios in SCENARIOS.items() for scenario in scenarios}
ALL_SCENARIOS = list(KIND_OF)
MARKS = {each: [pytest.mark.slow, *([] if (each,) in FIRST.values() else [pytest.mark.deep])] for each in ALL_SCENARIOS}
MARKS[SMALL] = []
every_scenario = pytest.mark.parametrize(
    "scenario",
    [pytest.param(each, marks=MARKS[each]) for each in ALL_SCENARIOS],
    ids=lambda scenario: f"{scenario.card}, {scenario.model}, {scenario.batch_size}",
)
LIMITED = [scenario for scenario in ALL_SCENARIOS if scenario.limited]
BRIEF = Brief(0, "activations", SMALL, 1_000_000, 100.0)


def plan_of(**changed):
    return replace(reference(SMALL), **changed)


def scores_of(brief, plan):
    return {part.name: part.score for part in review(brief, plan).scores}


# --- briefs ---------------------------------------------------------------------------------------------------


DRAWN_FROM = {"small": {"activations": (SMALL,)}, "first": FIRST, "all": SCENARIOS}


@pytest.fixture(
    params=["small", pytest.param("first", marks=pytest.mark.slow), pytest.param("all", marks=pytest.mark.deep)]
)
def scenarios(request, monkeypatch):
    """What briefs are drawn from."""
    chosen = DRAWN_FROM[request.param]
    monkeypatch.setattr(capstone, "SCENARIOS", chosen)
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 200), marks=pytest.mark.deep)], ids=str)
def test_briefs_are_solved_by_their_reference(scenarios, seeds):
    kinds = set()
    for seed in seeds[: 2 if scenarios is DRAWN_FROM["small"] else None]:
        brief = draw_brief(seed)
        plan = reference(brief.scenario)
        kinds.add(brief.kind)
        assert brief.scenario in scenarios[brief.kind]
        assert fits(brief.scenario, plan) and negatives(brief.scenario, plan) == brief.scenario.wanted_negatives
        assert all(review(brief, plan).kept().values())
        assert brief.examples >= brief.scenario.batch_size
    assert kinds == set(scenarios)


def test_a_seed_is_a_brief(scenarios):
    assert draw_brief(5) == draw_brief(5)
    assert len({str(draw_brief(seed)) for seed in range(30)}) == 30
    with pytest.raises(ValueError, match="seed must be an int of at least 0, got -1"):
        draw_brief(-1)


def test_a_brief_says_everything_in_words(scenarios):
    brief = draw_brief(0)
    told = str(brief)
    for part in (
        brief.scenario.card,
        brief.scenario.model,
        f"{brief.scenario.batch_size:,}",
        f"{brief.examples:,}",
        "hard negative",
    ):
        assert part in told


@every_scenario
def test_a_kind_of_brief_is_what_it_says(scenario):
    kind = KIND_OF[scenario]
    if not scenario.limited:
        best, naive = reference(scenario), TrainingPlan("naive", scenario.batch_size)
        smallest = TrainingPlan("grad_cache", scenario.batch_size, chunk_size=4)
        assert fits(scenario, naive) == (kind == "room") == (best.step == "naive")
        assert fits(scenario, smallest) == (kind != "logits") == (best.tile_size is None)
        assert (scenario.negatives > 0) == (kind == "long passages")


# --- a batch that is to be found ------------------------------------------------------------------------------


def test_right_passages_among_negatives_are_counted_over_every_batch_of_a_small_corpus():
    queries = [0, 0, 0, 1, 1, 1]  # of six pairs: each query with three passages
    scenario = Scenario("any", "any", 4, 0, "any", pairs=len(queries), right=3)
    for size in (1, 2, 3, 4, 5):
        batches = itertools.combinations(queries, size)
        beside = fmean(batch.count(query) - 1 for batch in batches for query in batch)
        assert right_among_negatives(scenario, TrainingPlan("naive", size)) == pytest.approx(beside)
        assert right_among_negatives(scenario, TrainingPlan("accumulation", 6, None, size)) == pytest.approx(beside)


@pytest.mark.parametrize("scenario", LIMITED, ids=str)
def test_the_batch_to_be_found_is_the_largest_that_leaves_what_is_asked_for(scenario):
    brief = Brief(3, "any", scenario, scenario.batch_size * max(scenario.updates, 1), math.inf)
    for size, good in ((scenario.batch_size, True), (scenario.batch_size + 1, False)):
        plan = TrainingPlan("naive", size)
        left = right_among_negatives(scenario, plan) <= RIGHT_AMONG_NEGATIVES
        assert (left and updates(brief, plan) >= scenario.updates) == good
    told = str(brief)
    assert "yours to find" in told and f"{scenario.batch_size:,} queries" not in told


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["few examples", "right passages"])
@pytest.mark.parametrize("times", [2, 8])
def test_there_a_larger_batch_loses_for_a_reason_in_numbers(kind, times):
    scenario = SCENARIOS[kind][0]
    brief = Brief(3, kind, scenario, scenario.batch_size * max(scenario.updates, 1_000), math.inf)
    judged = review(brief, TrainingPlan("grad_cache", times * scenario.batch_size, chunk_size=64))
    part = next(part for part in judged.scores if part.name == "B")
    assert judged.kept() == {"card": True, "deadline": True, "negatives": True, "demand": False}
    assert not judged.passed and part.score < 0.7 and judged.worth < 0.7
    limit = {"few examples": "10,240,000 / 40,000 = 256", "right passages": "1 + 0.1 x 23,999 / 3, so 800"}
    assert limit[kind] in part.reason and "demand    BROKEN" in str(judged)
    nearly = review(brief, TrainingPlan("grad_cache", scenario.batch_size + 1, chunk_size=64))
    assert not nearly.passed and nearly.worth < 1


@pytest.mark.slow
@pytest.mark.parametrize("drawn_from", ["first", pytest.param("all", marks=pytest.mark.deep)])
def test_where_time_is_the_wall_neither_order_nor_graphs_can_be_left_out(drawn_from, monkeypatch):
    monkeypatch.setattr(capstone, "SCENARIOS", {"time": DRAWN_FROM[drawn_from]["time"]})
    for seed in range(12):
        brief = draw_brief(seed)
        assert brief.kind == "time"
        for left_out in ({"sort_by_length": False}, {"retain_chunks": 0}):
            assert hours(brief, replace(reference(brief.scenario), **left_out)) > brief.deadline_hours


# --- what a plan takes ----------------------------------------------------------------------------------------


def test_tiles_cost_what_the_plan_says():
    queries, passages = (torch.randn(48, 8, requires_grad=True) for _ in range(2))
    flops = [count_flops(lambda t=t: ContrastiveLoss(tile_size=t)(queries, passages).backward()) for t in (None, 16)]
    assert flops[1] / flops[0] == capstone.TILED_FLOPS


def test_seconds_are_flops_over_the_rate_and_passes():
    scenario, size, cost = SMALL, SMALL.batch_size, encoder_cost(Encoder.from_config(SMALL.model).train())
    queries, passages = capstone.lengths_of(scenario, size)
    rows = [(size, max(queries)), (size, max(passages))]
    forward = sum(cost.forward.at(*row) for row in rows)
    backward = sum(cost.backward.at(*row) for row in rows)
    loss, rate = 6 * size * size * cost.dimensions, capstone.RATES[scenario.card]
    naive = (forward + backward + loss) / rate + 4 * capstone.PASS_SECONDS
    assert capstone.seconds(scenario, TrainingPlan("naive", size)) == pytest.approx(naive)
    plain = TrainingPlan("grad_cache", size, chunk_size=64, sort_by_length=False)
    cached = (2 * forward + backward + loss) / rate + 3 * 2 * (size / 64) * capstone.PASS_SECONDS
    assert capstone.seconds(scenario, plain) == pytest.approx(cached)


def test_accumulation_sees_its_chunk_only():
    assert negatives(SMALL, TrainingPlan("accumulation", 1024, chunk_size=64)) == 63
    assert negatives(SMALL, TrainingPlan("grad_cache", 1024, chunk_size=64)) == 1023


# --- the reference --------------------------------------------------------------------------------------------


@every_scenario
def test_the_reference_gets_full_scores(scenario):
    brief = Brief(0, "any", scenario, max(1_000_000, scenario.batch_size * scenario.updates), math.inf)
    judged = review(brief, reference(scenario))
    assert judged.passed and judged.worth == 1
    assert [part.score for part in judged.scores] == [1.0] * len(judged.scores)


@every_scenario
def test_no_neighbour_of_the_reference_is_worth_more(scenario):
    best = reference(scenario)
    nearby: list[dict] = [{"batch_size": best.batch_size // 2}]
    if best.step == "grad_cache":
        nearby = [{"retain_chunks": 0}, {"sort_by_length": False}, {"retain_chunks": best.retain_chunks + 1}]
        nearby += [{"chunk_size": best.chunk_size // 2}, {"chunk_size": best.chunk_size + 12, "retain_chunks": 0}]
    if best.tile_size is None:
        nearby += [{"tile_size": best.batch_size // 4}]
    for changed in nearby:
        assert worth(scenario, replace(best, **changed)) <= 1.02 * worth(scenario, best)


WORSE = (
    ("step", {"step": "accumulation", "retain_chunks": 0, "chunk_size": 64}),
    ("step", {"step": "naive", "retain_chunks": 0, "chunk_size": None, "batch_size": 128}),
    ("B", {"batch_size": 512, "chunk_size": 64, "retain_chunks": 0}),
    ("B", {"batch_size": 2048, "chunk_size": 64, "retain_chunks": 0}),
    ("tile", {"tile_size": 512}),
    ("C", {"chunk_size": 4, "retain_chunks": 0}),
    ("C", {"chunk_size": 1024, "retain_chunks": 0}),
    ("R", {"retain_chunks": 0, "chunk_size": 64}),
    ("R", {"retain_chunks": 16}),
)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("order", {"sort_by_length": False}),
        *(pytest.param(*decision, marks=pytest.mark.slow) for decision in WORSE),
    ],
)
def test_a_worse_decision_scores_less_and_says_why(name, changed):
    judged = review(BRIEF, plan_of(**changed))
    part = next(part for part in judged.scores if part.name == name)
    assert part.score < 1 and part.reason != "as good as any"
    gained = ("would gain", "over the card", "the dense logits fit", "is asked for")
    assert any(words in part.reason for words in gained), part.reason


@pytest.mark.slow
def test_the_smallest_plans_are_judged_too():
    for step, chunk in (("naive", None), ("accumulation", 1), ("grad_cache", 1)):
        judged = review(BRIEF, {"step": step, "batch_size": 1, "chunk_size": chunk})
        part = next(part for part in judged.scores if part.name == "B")
        assert judged.worth == part.score == 0 and "would gain" in part.reason and "over the card" not in str(judged)


@pytest.mark.slow
def test_a_batch_that_is_nearly_the_wanted_one_is_not_the_wanted_one():
    judged = review(BRIEF, plan_of(batch_size=1023))
    part = next(part for part in judged.scores if part.name == "B")
    assert not judged.passed and judged.worth == part.score == 0.99
    assert part.reason.startswith("1,024 would gain 1 negative a query")


@pytest.mark.slow
def test_a_step_is_held_against_the_best_plan_with_it():
    judged = review(BRIEF, {"step": "accumulation", "batch_size": 1024, "chunk_size": 8})
    assert "over accumulation with C = 256" in str(judged)


@pytest.mark.slow
def test_a_step_that_is_as_good_as_the_naive_one_only_where_it_is_the_naive_one_is_told_so():
    brief = Brief(0, "room", SCENARIOS["room"][0], 1_000_000, 100.0)
    for step, alone in (("accumulation", "C = 256"), ("grad_cache", "C = 256, R = 2")):
        judged = review(brief, {"step": step, "batch_size": 256, "chunk_size": 32})
        assert f"as good as naive where {alone}" in str(judged) and judged.worth < 0.7
    assert "as good as naive" not in str(review(brief, TrainingPlan("naive", 256)))


@pytest.mark.slow
def test_worse_is_worse():
    brief = BRIEF
    by_batch = [
        scores_of(brief, TrainingPlan("grad_cache", size, chunk_size=16))["B"] for size in (1024, 512, 256, 128)
    ]
    by_chunk = [scores_of(brief, TrainingPlan("grad_cache", 1024, chunk_size=size))["C"] for size in (16, 8, 4, 2)]
    for falling in (by_batch, by_chunk):
        assert falling == sorted(falling, reverse=True) and falling[0] > falling[-1]


def test_a_plan_over_the_card_is_worth_nothing_and_told_by_how_much():
    judged = review(BRIEF, {"step": "naive", "batch_size": 1024})
    assert not judged.passed and judged.worth == 0 and not judged.kept()["card"]
    assert "GiB over the card" in str(judged) and "BROKEN" in str(judged)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from((256, 512, 1024)),
    st.sampled_from((8, 16, 64, 256)),
    st.integers(0, 10),
    st.booleans(),
    st.sampled_from((None, 256)),
)
def test_scores_multiply_nearly_to_the_worth(batch_size, chunk_size, retained, by_length, tile):
    retained = min(retained, 2 * batch_size // chunk_size)
    judged = review(BRIEF, TrainingPlan("grad_cache", batch_size, tile, chunk_size, retained, by_length))
    assert all(0 <= part.score <= 1 for part in judged.scores)
    product = math.prod(part.score for part in judged.scores if part.name != "tile")
    assert judged.worth == pytest.approx(product, rel=0.08, abs=1e-9)


# --- whatever is typed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_plan", "problem"),
    [
        (None, "there is no plan yet"),
        (5, "plan must be a TrainingPlan"),
        ([], "plan must be a TrainingPlan"),
        ({}, "plan must say step and batch_size"),
        ({"step": "magic", "batch_size": 8}, "step must be one of"),
        ({"step": ["naive"], "batch_size": 8}, "step must be one of"),
        ({"step": "naive", "batch_size": 8, "chunks": 2}, "plan must hold nothing but"),
        ({"step": "naive", "batch_size": "many"}, "batch_size must be an int"),
        ({"step": "naive", "batch_size": True}, "batch_size must be an int"),
        ({"step": "naive", "batch_size": 0}, "batch_size must be an int of at least 1"),
        ({"step": "naive", "batch_size": 10**30}, "batch_size must be at most 2,048"),
        ({"step": "naive", "batch_size": 8, "chunk_size": 4}, "chunk_size must be None for the naive step"),
        ({"step": "naive", "batch_size": 8, "retain_chunks": 1}, "retain_chunks must be 0 unless"),
        ({"step": "grad_cache", "batch_size": 8}, "chunk_size must be an int"),
        ({"step": "grad_cache", "batch_size": 8, "chunk_size": 9}, "chunk_size must be at most batch_size, 8"),
        ({"step": "grad_cache", "batch_size": 8, "chunk_size": 4, "retain_chunks": 5}, "at most the 4 chunks"),
        ({"step": "grad_cache", "batch_size": 8, "chunk_size": 4, "retain_chunks": -1}, "retain_chunks must be an int"),
        ({"step": "grad_cache", "batch_size": 1024, "chunk_size": 4, "tile_size": 1}, "at most 1,024 tiles"),
        ({"step": "grad_cache", "batch_size": 8, "chunk_size": 4, "tile_size": 1.5}, "tile_size must be an int"),
        ({"step": "grad_cache", "batch_size": 8, "chunk_size": 4, "sort_by_length": 3}, "sort_by_length must be"),
    ],
)
def test_a_plan_that_cannot_be_run_is_told_why(given_plan, problem):
    judged = review(BRIEF, given_plan)
    assert judged.plan is None and not judged.passed and problem in str(judged)
    assert judge_peak(BRIEF, given_plan, 5).score == judge_hours(BRIEF, given_plan, 5).score == 0


def test_a_batch_far_beyond_a_demand_is_refused_without_telling_the_largest():
    brief = Brief(3, "few examples", LIMITED[0], 10_240_000, 9.0)
    told = str(review(brief, {"step": "naive", "batch_size": 10**5}))
    assert "batch_size must be at most 4,096, 16 times what the demand leaves where the whole batch is one loss" in told


def test_a_seed_is_not_its_brief():
    assert "brief must be a brief, as draw_brief(seed) gives it, got 24" in str(review(24, reference(BRIEF.scenario)))


@pytest.mark.parametrize("typed", [None, "six", -1, 0, math.nan, math.inf, True, 10**400, [5]])
def test_a_prediction_that_is_no_number_scores_nothing(typed):
    assert judge_peak(BRIEF, reference(SMALL), typed).score == 0
    assert "above 0 is asked for" in judge_hours(BRIEF, reference(SMALL), typed).reason


# --- predictions ----------------------------------------------------------------------------------------------

GIB = 2**30


def peak_gib(**changed):
    return peak_bytes(SMALL, plan_of(**changed)) / GIB


def test_a_peak_is_judged_and_its_mistake_named():
    plan, right = reference(SMALL), peak_gib()
    assert judge_peak(BRIEF, plan, 1.03 * right).score == 1
    naive = peak_bytes(SMALL, TrainingPlan("naive", SMALL.batch_size)) / GIB
    for said, words in {
        right * GIB / 1e9: "GB (10^9 bytes)",
        naive: "the naive step's peak",
        right * 1024: "in MiB",
        right * GIB / 1e6: "in MB",
        1e6: "as if not in GiB",
        1e-6: "less than a fiftieth of that, as if not in GiB",
        peak_gib(retain_chunks=0): "retained chunks are forgotten",
    }.items():
        judged = judge_peak(BRIEF, plan, said)
        assert words in judged.reason and judged.score == pytest.approx(min(said / right, right / said))


@pytest.mark.slow
def test_forgotten_logits_are_named_where_they_are_the_wall():
    scenario = SCENARIOS["logits"][0]
    brief, dense = (
        Brief(0, "logits", scenario, 10**6, 1.0),
        replace(reference(scenario), tile_size=None, retain_chunks=0),
    )
    assert "the logits are forgotten" in judge_peak(brief, dense, 12.43 - 12.0).reason
    tiled = reference(scenario)
    with_dense = peak_bytes(scenario, replace(tiled, tile_size=None)) / GIB
    assert "dense logits" in judge_peak(brief, tiled, with_dense).reason


def test_hours_are_judged_and_the_mistake_named():
    plan, right = reference(SMALL), hours(BRIEF, reference(SMALL))
    naive = hours(BRIEF, TrainingPlan("naive", SMALL.batch_size))
    assert judge_hours(BRIEF, plan, right).score == 1
    for said, words in {
        naive: "the naive step's time",
        2 * naive: "4/3",
        3600 * right: "seconds",
        60 * right: "minutes",
        right / 24: "days",
        hours(BRIEF, replace(plan, sort_by_length=False, retain_chunks=0)): "without sorting",
    }.items():
        assert words in judge_hours(BRIEF, plan, said).reason


# --- the defence and the small run ----------------------------------------------------------------------------


@pytest.mark.slow
def test_claims_are_judged_by_forecasts():
    best = {kind: reference(SCENARIOS[kind][0]) for kind in SCENARIOS}
    found = {kind: claims(Brief(0, kind, SCENARIOS[kind][0], 10**6, 1.0), best[kind]) for kind in SCENARIOS}
    ways = ("would fit", "against 63 ", "less than 60 %", "more than a tenth", "at least a quarter")
    truth = {kind: [c.holds == (way in c.text) for c, way in zip(found[kind], ways, strict=True)] for kind in SCENARIOS}
    assert all(len(said) == 5 for said in found.values())
    assert truth["room"][0] and not truth["activations"][0]
    assert found["room"][1].holds == ("against 63 " in found["room"][1].text)
    assert truth["room"][2] and not truth["activations"][2]
    assert truth["logits"][3] and not truth["activations"][3]
    assert truth["activations"][4] and not truth["room"][4]
    with pytest.raises(ValueError, match="step must be one of"):
        claims(BRIEF, {"step": "no", "batch_size": 3})


def test_a_claim_on_accumulation_speaks_of_full_chunks():
    """800 queries in chunks of 128 leave 32, which have 31 negatives."""
    brief, plan = draw_brief(35), {"step": "grad_cache", "batch_size": 800, "chunk_size": 128}
    claim = claims(brief, plan)[1]
    assert claim.holds and claim.text == (
        "Accumulation in chunks of 128 would hold a query of a full chunk against 127 negatives."
    )


@pytest.mark.slow
def test_what_is_said_of_accumulation_counts_its_chunks():
    """Its logits are C x C; its larger batch may keep a demand on what shares a loss, and may have fewer negatives."""
    tiled = review(draw_brief(4), {"step": "accumulation", "batch_size": 4096, "tile_size": 512, "chunk_size": 64})
    assert "the dense logits fit (4.00 MiB a matrix for C = 1,024)" in str(tiled)  # the best chunks with that tile
    kept = review(draw_brief(35), {"step": "accumulation", "batch_size": 4096, "chunk_size": 64})
    assert kept.kept()["demand"] and "800 is what the demand leaves where the whole batch is one loss" in str(kept)
    beyond = review(draw_brief(12), {"step": "accumulation", "batch_size": 512, "chunk_size": 512})
    assert "256 would gain a number of negatives that is nearer to the one asked for" in str(beyond)


def test_the_half_of_a_batch_that_cuts_its_chunk_is_named_with_the_smaller_chunk():
    said = [
        claims(draw_brief(12), {"step": "grad_cache", "batch_size": 256, "chunk_size": size})[2] for size in (256, 64)
    ]
    assert "half the batch in chunks of 128 would" in said[0].text
    assert "half the batch in the same chunks would" in said[1].text


def test_a_gain_is_of_something_that_the_better_plan_has(monkeypatch):
    """Of two plans of equal hours: negatives nearer to the wanted 255, or a time too short to be named."""
    plans = [TrainingPlan("naive", size) for size in (300, 256, 200)]
    monkeypatch.setattr("gclib.course.capstone.review.hours", lambda brief, plan: 1.0)
    brief = Brief(0, "few", LIMITED[0], 10**6, 9.0)
    assert brief.scenario.wanted_negatives == 255
    assert "nearer to the one asked for" in _gain(brief, plans[0], plans[1])
    assert _gain(brief, plans[1], plans[2]) == "less than a second"


@pytest.mark.slow
def test_a_review_speaks_of_the_plan_that_it_judges():
    """A tile by the batch that fits; and no plan that fails its brief is called better than the best."""
    tile = review(draw_brief(4), {"step": "naive", "batch_size": 4096, "tile_size": 512})
    assert "with this step 3,048 would fit" in str(tile) and "(35.4 MiB a matrix for B = 3,048)" in str(tile)
    short = {"step": "grad_cache", "batch_size": 1023, "chunk_size": 120, "retain_chunks": 4}
    judged = review(draw_brief(24), short)
    assert not judged.passed and judged.gain > 0.0005 and "better than" not in str(judged)
    larger = review(draw_brief(3), {"step": "grad_cache", "batch_size": 320, "chunk_size": 64}).scores
    assert [f"{part.score:.2f}" for part in larger if part.name == "B"] == ["0.83"]  # chapter 15 says so
    served = review(draw_brief(24), {**short, "batch_size": 1024})
    assert served.passed and "better than that plan" in str(served)


def test_answers_to_claims_are_counted():
    found = claims(BRIEF, reference(SMALL))
    right = {place: claim.holds for place, claim in enumerate(found, 1)}
    assert judge_claims(found, right).endswith("5 of 5 right.")
    assert judge_claims(found, {}).count("not answered") == 5 and "hold (" not in judge_claims(found, {})
    assert judge_claims(found, {}).endswith("None of them is answered yet.")
    assert judge_claims(found, [True, False]).startswith("Answers are a dict")  # type: ignore[arg-type]
    judged = judge_claims(found, {1: not found[0].holds, 2: "yes", 7: True})
    assert judged.count("wrong:") == 1 and "but with 'yes'" in judged and "There is no claim 7" in judged


@pytest.mark.slow
def test_to_say_the_same_of_every_claim_is_no_defence():
    for kind in SCENARIOS:
        scenario, said = SCENARIOS[kind][0], set()
        for seed in range(12):
            holds = [claim.holds for claim in claims(Brief(seed, kind, scenario, 10**6, 1.0), reference(scenario))]
            assert sum(holds) in (2, 3)
            said.add(tuple(holds))
        assert len(said) > 4


def pairs():
    return [TextPair(f"what does number {n} do", f"def number_{n}(x): return x + {n}") for n in range(80)]


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(TrainingPlan("naive", 1024), marks=pytest.mark.deep),
        pytest.param(TrainingPlan("accumulation", 1024, None, 512), marks=pytest.mark.deep),
        TrainingPlan("grad_cache", 1024, 256, 250, 3, False),
    ],
    ids=str,
)
def test_the_small_run_takes_the_bytes_of_its_forecast_and_trains(chosen):
    texts = pairs()
    run = run_scaled(BRIEF, chosen, texts, train_tokenizer(texts), updates=2)
    assert run.forecast_bytes == run.recorded_bytes and len(run.records) == 2
    assert (run.plan.step, run.plan.sort_by_length) == (chosen.step, chosen.sort_by_length)
    assert run.records[0].loss < 2 * math.log(64) and "equal" in str(run)


@every_scenario
def test_every_reference_can_be_scaled(scenario):
    small = scaled(Brief(0, "any", scenario, 10**6, 1.0), reference(scenario))
    assert small.batch_size == 64 and (small.step, small.tile_size is None) == (
        reference(scenario).step,
        reference(scenario).tile_size is None,
    )
    assert best_with(scenario, step=reference(scenario).step) == reference(scenario)
