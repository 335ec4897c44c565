"""A plan fits, no other plan is quicker, and the reason says the numbers."""

import pytest

from gclib import ContrastiveLoss, best_plan, forecast_step, largest_chunk
from gclib.memory.plan import USUAL_CHUNKS

SAME = {"config": "tiny", "query_length": 8, "passage_length": 12}
MIB = 2**20


def peak(step, **options):
    return forecast_step(step, **SAME, **options).peak_bytes


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


def test_no_other_chunk_and_share_that_fits_is_quicker():
    budget, batch = 12 * MIB, 128
    plan = best_plan(budget, batch_size=batch, **SAME)
    assert plan.step == "grad_cache" and plan.tile_size is None
    loss = {"loss": ContrastiveLoss()}
    assert plan.peak_bytes == peak("grad_cache", batch_size=batch, **loss, **plan.options()) <= budget
    for size in USUAL_CHUNKS[:7]:  # by hand: retained passages (12 tokens) first, then queries (8)
        chunks = -(-batch // size)
        for retained in range(0, 2 * chunks + 1, max(1, chunks // 4)):
            if peak("grad_cache", batch_size=batch, chunk_size=size, retain_chunks=retained, **loss) <= budget:
                passages = min(retained, chunks) * size * 12
                queries = max(0, retained - chunks) * size * 8
                assert 1 + (1 - (passages + queries) / (batch * 20)) / 3 >= plan.time_ratio - 1e-9
    assert f"{plan.time_ratio:.2f}" in plan.reason and f"{plan.chunk_size:,}" in plan.reason


def test_tiles_where_the_logits_alone_are_too_big():
    plan = best_plan(48 * MIB, batch_size=2_560, **SAME)  # 25 MiB of logits, and their gradient
    assert (plan.step, plan.tile_size) == ("grad_cache", 1_024)
    assert plan.peak_bytes <= 48 * MIB and "tiles of 1,024" in plan.reason


def test_a_card_on_which_nothing_fits_and_bad_input_are_refused_in_words():
    with pytest.raises(ValueError, match="budget_bytes must be at least the .* of one row a chunk"):
        best_plan(1_000, batch_size=8, **SAME)
    with pytest.raises(ValueError, match="query_length must be one int"):
        best_plan(2**30, config="tiny", batch_size=2, query_length=[3, 4], passage_length=8)
    with pytest.raises(ValueError, match="chunk_size must be left to best_plan"):
        best_plan(2**30, batch_size=8, chunk_size=2, **SAME)
