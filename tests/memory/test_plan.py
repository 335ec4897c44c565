"""A plan fits, no other plan is quicker, and the reason says the numbers."""

import random
from dataclasses import replace

import pytest

from gclib import ContrastiveLoss, Encoder, best_plan, choose_retained, forecast_step, largest_chunk
from gclib.memory.fake_steps import fake_step
from gclib.memory.flops import encoder_cost
from gclib.memory.forecast import forecast_workload
from gclib.memory.plan import StepPrice
from gclib.memory.workload import Workload

SAME = {"config": "tiny", "query_length": 8, "passage_length": 12}
MIB = 2**20


def peak(step, **options):
    return forecast_step(step, **SAME, **options).peak_bytes


@pytest.mark.slow
def test_the_largest_chunk_fits_and_the_next_does_not():
    budget = 12 * MIB
    for step in ("grad_cache", "accumulation"):
        size = largest_chunk(step, budget_bytes=budget, batch_size=256, **SAME)
        assert 1 < size < 256
        assert peak(step, batch_size=256, chunk_size=size) <= budget
        assert peak(step, batch_size=256, chunk_size=size + 1) > budget
    assert largest_chunk(budget_bytes=1, batch_size=4, **SAME) == 0
    assert largest_chunk(budget_bytes=2**40, batch_size=4, negatives=1, **SAME) == 8
    with pytest.raises(ValueError, match="step"):
        largest_chunk("naive", budget_bytes=budget, batch_size=4, **SAME)


def test_the_naive_step_where_it_fits():
    plan = best_plan(2**30, batch_size=32, **SAME)
    options = {"chunk_size": (32, 32), "retain_chunks": 2, "sort_by_length": False}
    assert (plan.step, plan.time_ratio, plan.options()) == ("naive", 1.0, options)
    assert plan.peak_bytes == peak("naive", batch_size=32)
    assert "nothing has to be encoded twice" in plan.reason


def ratio(costs, rows, widths, size, retained, call_tokens=128):
    """Time over the naive step's by hand: every chunk, the most tokens first, the first `retained` encoded once."""
    chunks = [(t, min(size, rows[t] - at), widths[t]) for t in (0, 1) for at in range(0, rows[t], size)]
    chunks.sort(key=lambda chunk: -chunk[1] * chunk[2])

    def time(tower, count, width, forwards):
        cost = costs[tower]
        call = call_tokens * cost.forward.at(1, width) / width
        return forwards * (cost.forward.at(count, width) + call) + cost.backward.at(count, width) + 2 * call

    cached = sum(time(*chunk, 1 if n < retained else 2) for n, chunk in enumerate(chunks))
    return cached / sum(time(tower, rows[tower], widths[tower], 1) for tower in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.deep) for seed in range(1, 60))])
def test_the_largest_chunk_and_the_most_retained_are_those_of_all_that_are_tried(seed):
    """Peaks fall as well as rise: a larger chunk has fewer generators' states, and no later chunk that adds."""
    dice = random.Random(seed)
    same = {"config": dice.choice(["tiny", "mini"]), "batch_size": dice.randint(2, 70), "tied": dice.random() < 0.6}
    same |= {"query_length": dice.choice([4, 16]), "passage_length": dice.choice([4, 16, 32])}
    same |= {"negatives": dice.choice([0, 0, 1, 3]), "device": dice.choice(["cpu", "cuda"])}
    same |= {"loss": ContrastiveLoss(symmetric=dice.random() < 0.5, tile_size=dice.choice([None, 8]))}
    workload = Workload(step="grad_cache", chunk_size=1, **same)
    fake = fake_step(workload)

    def peaks(name, values, workload):
        return {n: forecast_workload(replace(workload, **{name: n}), fake).peak_bytes for n in values}

    def budgets(peaks):
        drawn = [dice.choice([*peaks.values()]) + dice.choice([-1, 0, 1]) for _ in range(8)]
        return [min(peaks.values()), *drawn]

    by_chunk = peaks("chunk_size", range(1, workload.rows[1] + 1), workload)
    kept = {"retain_chunks": dice.choice([1, 2, 5])}
    ways = [({}, workload, by_chunk), (kept, replace(workload, **kept), None)]
    ways += [({"step": "accumulation"}, Workload(step="accumulation", chunk_size=1, **same), None)]
    for options, other, found in ways:
        most = other.rows[0 if options.get("step") else 1]
        by_size = found or peaks("chunk_size", range(1, most + 1), other)
        for budget in [*budgets(by_size), min(by_size.values()) - 1]:
            fitting = [size for size, peak in by_size.items() if peak <= budget]
            assert largest_chunk(budget_bytes=budget, **options, **same) == max(fitting, default=0)
    chunked = replace(workload, chunk_size=dice.randint(1, workload.rows[1]))
    by_retained = peaks("retain_chunks", range(chunked.chunk_count + 1), chunked)
    least, same["chunk_size"] = min(by_retained.values()), chunked.chunk_size
    for budget in budgets(by_retained):
        if budget >= least:
            most = max(n for n, peak in by_retained.items() if peak <= budget)
            assert choose_retained(budget, **same) == most
    with pytest.raises(ValueError, match=f"at least the {least} bytes"):
        choose_retained(least - 1, **same)


@pytest.mark.slow
def test_rows_of_unlike_lengths_retain_the_most_of_all_counts_that_are_tried():
    same = {"config": "tiny", "batch_size": 6, "chunk_size": 3}
    same |= {"query_length": [3, 20, 9, 3, 9, 20], "passage_length": [20, 3, 9, 3, 3, 9]}
    count = Workload(step="grad_cache", **same).chunk_count
    peaks = [forecast_step("grad_cache", retain_chunks=n, **same).peak_bytes for n in range(count + 1)]
    for budget in sorted(set(peaks)):
        most = max(n for n, each in enumerate(peaks) if each <= budget)
        assert choose_retained(budget, **same) == most
    with pytest.raises(ValueError, match=f"at least the {min(peaks)} bytes"):
        choose_retained(min(peaks) - 1, **same)


@pytest.mark.slow
def test_a_budget_between_the_peaks_of_one_row_and_of_more_has_a_chunk():
    """At many rows one row a chunk is not the smallest step: 8,192 generators' states are 40 MiB."""
    same = {"config": "mini", "batch_size": 4_096, "query_length": 32, "passage_length": 32, "optimizer": "adamw"}
    by_chunk = {n: forecast_step("grad_cache", chunk_size=n, **same).peak_bytes for n in (1, 16, 64)}
    budget = by_chunk[16]
    assert by_chunk[64] < budget < by_chunk[1]
    size = largest_chunk(budget_bytes=budget, **same)
    assert size >= 64 and best_plan(budget, **same).peak_bytes <= budget


JOBS = [
    *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1)),
    *(pytest.param(seed, marks=[pytest.mark.slow, pytest.mark.deep]) for seed in range(1, 100)),
]


@pytest.mark.parametrize("seed", JOBS)
def test_no_other_chunk_and_share_that_fits_is_quicker_or_nearly_so_and_larger(seed):
    """Every chunk size and every number of retained chunks, by counted FLOPs plus calls."""
    dice = random.Random(seed)
    batch, negatives, widths = dice.randint(8, 64), dice.choice([0, 1, 3]), (dice.randint(4, 16), dice.randint(8, 48))
    rows, cost = (batch, batch * (1 + negatives)), encoder_cost(Encoder.from_config("tiny").train())
    same = {"config": "tiny", "batch_size": batch, "negatives": negatives, "loss": ContrastiveLoss()}
    same |= dict(zip(("query_length", "passage_length"), widths, strict=True))
    fake = fake_step(Workload(step="grad_cache", chunk_size=1, **same))

    def peak(size, retained):
        workload = Workload(step="grad_cache", chunk_size=size, retain_chunks=retained, **same)
        return forecast_workload(workload, fake).peak_bytes

    naive = forecast_step("naive", **same).peak_bytes
    budget = int(peak(1, 0) + dice.random() * (naive - peak(1, 0)))
    same.pop("loss")
    plan = best_plan(budget, **same)
    assert plan.step == "grad_cache" and plan.peak_bytes == peak(plan.chunk_size, plan.retain_chunks) <= budget
    assert plan.time_ratio == pytest.approx(ratio([cost] * 2, rows, widths, plan.chunk_size, plan.retain_chunks))
    best = {}
    for size in range(1, max(rows) + 1):
        count = sum(-(-n // size) for n in rows)
        if peak(size, 0) <= budget:
            most = max(n for n in range(count + 1) if peak(size, n) <= budget)
            best[size] = ratio([cost] * 2, rows, widths, size, most)
    assert plan.time_ratio <= 1.01 * min(best.values()) + 1e-9
    nearly = [size for size, time in best.items() if time <= 1.01 * min(best.values())]
    assert plan.chunk_size >= max(nearly)


@pytest.mark.slow
def test_a_picture_counts_by_its_flops():
    """CLIP L/14: a picture costs a dozen texts, so texts that are retained save little."""
    vision, text = (f"clip-vit-l-14-{kind}" for kind in ("vision", "text"))
    workload = Workload(
        **{"step": "grad_cache", "config": [vision, text], "batch_size": 4_096, "chunk_size": 128},
        **{"query_length": None, "passage_length": 77, "retain_chunks": 14},
    )
    price = StepPrice.of(workload, fake_step(workload))
    attention = 4 * 257**2 * 1_024 * 24  # two products of T x T for each of 24 layers
    assert price.forward[0] == pytest.approx(155.5e9 + attention, rel=0.005)
    assert price.forward[1] == pytest.approx(13.1e9 + 4 * 77**2 * 768 * 12, rel=0.02)
    assert price.time_ratio(workload) == pytest.approx(1.322, abs=0.004)


@pytest.mark.slow
def test_tiles_where_the_logits_alone_are_too_big():
    plan = best_plan(48 * MIB, batch_size=2_560, **SAME)  # 25 MiB of logits, and their gradient
    assert (plan.step, plan.tile_size) == ("grad_cache", 1_024)
    assert plan.peak_bytes <= 48 * MIB and "tiles of 1,024" in plan.reason


def test_a_card_on_which_nothing_fits_and_bad_input_are_refused_in_words():
    with pytest.raises(ValueError, match="budget_bytes must be at least the 3.29 MiB of 8 rows a chunk"):
        best_plan(1_000, batch_size=8, **SAME)
    assert peak("grad_cache", batch_size=8, chunk_size=8) < peak("grad_cache", batch_size=8, chunk_size=1)
    with pytest.raises(ValueError, match="query_length must be one int"):
        best_plan(2**30, config="tiny", batch_size=2, query_length=[3, 4], passage_length=8)
    with pytest.raises(ValueError, match="chunk_size must be left to best_plan"):
        best_plan(2**30, batch_size=8, chunk_size=2, **SAME)
