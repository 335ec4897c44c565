"""The forecast against the ledger of the step really run on the CPU: equal to the byte."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.allocator import allocator_peak
from helpers.shares import a_share
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gclib import ContrastiveLoss, Encoder, choose_retained, forecast_step, largest_batch, plan_chunks, record_memory
from gclib.chunks import Chunk, price_of_a_call, schedule
from gclib.memory.fake_steps import fake_step
from gclib.memory.forecast import chunk_groups
from gclib.memory.laws import HeldLaw
from gclib.memory.ledger import KINDS
from gclib.memory.workload import Workload
from gclib.steps import STEPS
from tests.memory.test_ledger import batch

SHAPES = {"query_length": 8, "passage_length": 12}


def really_run(step, encoders, rows, loss, inputs=None, optimizer=None, **options):
    """The ledger of the step on real tensors, as it is once its encoders are trusted."""
    options |= {"verify": "never"} if step == "grad_cache" else {}
    inputs = inputs or [batch(rows[0], 8), batch(rows[1], 12)]
    with record_memory(*encoders, loss, optimizer=optimizer) as ledger:
        STEPS[step](encoders, inputs, loss, on_phase=ledger.on_phase, **options)
    return ledger


def built(size, tied, dropout=0.1):
    first = Encoder.from_config(size, dropout=dropout)
    return [first, first if tied else Encoder.from_config(size, dropout=dropout)]


def test_the_first_test_forecast_ledger_and_allocator_side_by_side(capsys):
    """B % C = 1, K = 1, R = 1, sorted, dropout on."""
    encoders, loss = built("tiny", tied=True), ContrastiveLoss()
    inputs = [batch(9, 8), batch(18, 12)]
    options = {"chunk_size": 4, "retain_chunks": 1}
    allocated = allocator_peak(lambda: STEPS["grad_cache"](encoders, inputs, loss, verify="never", **options))
    encoders = built("tiny", tied=True)
    ledger = really_run("grad_cache", encoders, (9, 18), loss, inputs, **options)
    forecast = forecast_step("grad_cache", config="tiny", batch_size=9, negatives=1, **SHAPES, **options)
    there_before = ledger.start_bytes + sum(tensor.nbytes for given in inputs for tensor in given.values())
    print(f"forecast {forecast.peak_bytes:,}  ledger {ledger.peak_bytes:,}  allocator {allocated + there_before:,}")
    assert forecast.peak_bytes == ledger.peak_bytes
    assert forecast.at_peak() == ledger.at_peak()
    assert ledger.peak_bytes == pytest.approx(allocated + there_before, rel=0.01)


def random_shapes(count):
    """Batches, chunks, negatives, retained: ragged last chunks, single rows and everything retained among them."""
    draw = random.Random(4)
    fixed = [(9, 4, 0, 0), (9, 4, 1, 1), (1, 1, 0, 0), (5, 1, 0, 2), (2, 16, 1, 99), (8, 8, 0, 1), (6, 7, 2, 0)]
    more = [(draw.randint(1, 20), draw.randint(1, 8), draw.randint(0, 2), draw.choice([0, 1, 3])) for _ in range(count)]
    return fixed + more


@pytest.mark.slow
@a_share(("size", "tied", "step"), [("tiny", True), ("mini", False)], list(STEPS), one_in=2)
@pytest.mark.parametrize("count", [1, pytest.param(15, marks=pytest.mark.deep)])
def test_equal_to_the_byte(count, step, tied, size):
    for batch_size, chunk, negatives, retained in random_shapes(count):
        encoders, loss = built(size, tied), ContrastiveLoss()
        options = {} if step == "naive" else {"chunk_size": chunk}
        if step == "grad_cache":
            options["retain_chunks"] = retained
        ledger = really_run(step, encoders, (batch_size, batch_size * (1 + negatives)), loss, **options)
        same = {"config": size, "batch_size": batch_size, "negatives": negatives, "tied": tied, **SHAPES, **options}
        forecast = forecast_step(step, **same)
        assert forecast.exact_law
        assert (forecast.peak_bytes, forecast.at_peak()) == (ledger.peak_bytes, ledger.at_peak()), same


@pytest.mark.parametrize("tile_size", [None, 4, *(pytest.param(side, marks=pytest.mark.slow) for side in (2, 64))])
@pytest.mark.parametrize("step", STEPS)
def test_every_phase_has_the_ledgers_peak(step, tile_size):
    """Also with tiles, of which the loss takes more and more as the batch grows."""
    encoders, loss = built("tiny", tied=True), ContrastiveLoss(tile_size=tile_size)
    options = {} if step == "naive" else {"chunk_size": 5}
    if step == "grad_cache":
        options["retain_chunks"] = 1

    def peaks(timeline):
        phases = {}
        for segment in timeline:
            phases[segment.phase] = max(segment.peak_bytes, phases.get(segment.phase, 0))
        del phases["start"]  # a real run also counts what was read of the masks while planning
        return phases

    real = peaks(really_run(step, encoders, (13, 13), loss, **options).timeline)
    told = forecast_step(step, config="tiny", loss=loss, batch_size=13, **SHAPES, **options)
    assert peaks(told.timeline) == real


def test_chunks_of_their_own_size_for_each_tower():
    encoders, loss = built("tiny", tied=True), ContrastiveLoss()
    ledger = really_run("grad_cache", encoders, (9, 18), loss, chunk_size=(2, 5))
    told = forecast_step("grad_cache", config="tiny", batch_size=9, negatives=1, chunk_size=(2, 5), **SHAPES)
    assert told.peak_bytes == ledger.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_loss_of_ones_own_with_a_temperature_to_learn(step):
    encoders, loss = built("tiny", tied=True), ContrastiveLoss(0.1, learnable=True, symmetric=True)
    options = {} if step == "naive" else {"chunk_size": 3}
    ledger = really_run(step, encoders, (7, 14), loss, **options)
    told = forecast_step(step, encoders=encoders, loss=loss, batch_size=7, negatives=1, **SHAPES, **options)
    assert told.at_peak() == ledger.at_peak()
    assert all(isinstance(p, torch.nn.Parameter) and p.device.type == "cpu" for p in encoders[0].parameters())


def test_optimizer_states_are_those_of_the_second_step():
    encoders, loss = built("tiny", tied=True), ContrastiveLoss()
    optimizer = torch.optim.AdamW(encoders[0].parameters())
    really_run("naive", encoders, (4, 4), loss)
    optimizer.step()
    optimizer.zero_grad()
    ledger = really_run("grad_cache", encoders, (6, 6), loss, optimizer=optimizer, chunk_size=2)
    told = forecast_step("grad_cache", config="tiny", batch_size=6, chunk_size=2, optimizer="adamw", **SHAPES)
    assert told.at_peak() == ledger.at_peak()
    plain = forecast_step("grad_cache", config="tiny", batch_size=6, chunk_size=2, optimizer="sgd", **SHAPES)
    assert plain.at_peak()["optimizer"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_under_autocast(step):
    encoders, loss = built("tiny", tied=True), ContrastiveLoss()
    options = {} if step == "naive" else {"chunk_size": 3}
    with torch.autocast("cpu", torch.bfloat16):
        ledger = really_run(step, encoders, (8, 8), loss, **options)
    told = forecast_step(step, config="tiny", batch_size=8, autocast=torch.bfloat16, **SHAPES, **options)
    assert told.peak_bytes == ledger.peak_bytes


@pytest.mark.slow
def test_real_lengths_are_sorted_and_trimmed():
    lengths = [[3, 8, 1, 5, 8, 2, 7], [12, 4, 9, 2, 11, 12, 6]]
    inputs = [batch(7, 8), batch(7, 12)]
    for given_, rows in zip(inputs, lengths, strict=True):
        width = given_["attention_mask"].shape[1]
        given_["attention_mask"] = (torch.arange(width) < torch.tensor(rows)[:, None]).long()
    encoders, loss = built("tiny", tied=True), ContrastiveLoss()
    for given_ in inputs:
        given_["attention_mask"][:, 0] = 0  # a masked position in every row: real and fake keep the mask alike
        given_["attention_mask"][torch.arange(7), torch.tensor(lengths[given_ is inputs[1]]) - 1] = 1
    ledger = really_run("grad_cache", encoders, (7, 7), loss, inputs, chunk_size=3, retain_chunks=1)
    same = {"query_length": lengths[0], "passage_length": lengths[1], "retain_chunks": 1}
    told = forecast_step("grad_cache", config="tiny", batch_size=7, chunk_size=3, **same)
    assert not told.exact_law
    assert told.peak_bytes == pytest.approx(ledger.peak_bytes, rel=1e-3)


@pytest.mark.slow
def test_real_lengths_are_cut_as_they_are_on_the_device():
    """A call costs a card more tokens, so that its chunks are fewer and larger, and so are graphs that are retained."""
    lengths = [[32] * 4 + [4] * 20, [128] * 4 + [16] * 20]
    same = {"config": "tiny", "batch_size": 24, "query_length": lengths[0], "passage_length": lengths[1]}
    for device in ("cpu", "cuda"):
        plans = [plan_chunks(rows, chunk_size=8, call_tokens=price_of_a_call(device)) for rows in lengths]
        told = forecast_step("grad_cache", chunk_size=8, retain_chunks=2, device=device, **same)
        rows = [(s.tower, s.chunk) for s in told.timeline if s.phase == "first_forward" and s.chunk is not None]
        assert len(set(rows)) == sum(map(len, plans))
        budget = told.peak_bytes
        kept = choose_retained(budget, chunk_size=8, device=device, **same)
        again = forecast_step("grad_cache", chunk_size=8, retain_chunks=kept, device=device, **same)
        assert kept >= 2 and again.peak_bytes <= budget


def test_a_million_rows_are_answered_and_never_listed():
    told = forecast_step("grad_cache", config="tiny", batch_size=2**20, chunk_size=1, **SHAPES)
    assert told.peak_bytes > 2**40  # 4 TiB of logits alone
    assert len(told.timeline) < 20
    assert sum(segment.repeats for segment in told.timeline if segment.phase == "replay" and segment.rows) == 2 * 2**20


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(0, 30),
)
def test_counted_groups_are_the_steps_own_schedule(rows, widths, sizes, retain):
    plans = [
        [Chunk(tuple(range(at, min(at + size, count))), width) for at in range(0, count, size)]
        for count, width, size in zip(rows, widths, sizes, strict=True)
    ]
    listed = [(tower, len(plans[tower][chunk]), kept) for tower, chunk, kept in schedule(plans, retain)]
    groups = chunk_groups(rows, widths, sizes, retain)
    ordered = [group for kept in (False, True) for group in groups if group[3] == kept]
    assert [(tower, size, kept) for tower, size, count, kept in ordered for _ in range(count)] == listed


@pytest.mark.slow
def test_the_largest_batch_fits_and_the_next_does_not():
    budget = 40 * 2**20
    for step, options in (("naive", {}), ("grad_cache", {"chunk_size": 4})):
        same = {"config": "tiny", **SHAPES, **options}
        largest = largest_batch(step, budget_bytes=budget, **same)
        assert forecast_step(step, batch_size=largest, **same).peak_bytes <= budget
        assert forecast_step(step, batch_size=largest + 1, **same).peak_bytes > budget
    assert largest_batch("naive", budget_bytes=1, config="tiny", **SHAPES) == 0
    assert largest_batch("naive", budget_bytes=budget, config="tiny", largest=3, **SHAPES) == 3


def test_retained_chunks_fill_the_budget():
    same = {"config": "tiny", "batch_size": 32, "chunk_size": 4, **SHAPES}
    bare = forecast_step("grad_cache", **same).peak_bytes
    everything = forecast_step("grad_cache", **same, retain_chunks=16).peak_bytes
    chosen = choose_retained((bare + everything) // 2, **same)
    assert 0 < chosen < 16
    assert forecast_step("grad_cache", **same, retain_chunks=chosen).peak_bytes <= (bare + everything) // 2
    assert forecast_step("grad_cache", **same, retain_chunks=chosen + 1).peak_bytes > (bare + everything) // 2
    assert choose_retained(everything, **same) == 16
    with pytest.raises(ValueError, match="budget_bytes"):
        choose_retained(bare - 1, **same)


def test_the_second_forecast_runs_no_encoder():
    same = {"config": "tiny", "query_length": 8, "passage_length": 8}
    forecast_step("grad_cache", batch_size=64, chunk_size=4, **same)
    fake = fake_step(Workload(step="naive", batch_size=2, **same))
    runs = fake.runs
    for batch_size, chunk in ((100, 10), (1000, 8), (33, 3)):
        forecast_step("grad_cache", batch_size=batch_size, chunk_size=chunk, **same)
    assert fake.runs == runs


@pytest.mark.slow
def test_forecasting_disturbs_no_generator():
    before = torch.get_rng_state()
    forecast_step("grad_cache", config="tiny", batch_size=5, chunk_size=2, query_length=5, passage_length=6)
    assert torch.equal(torch.get_rng_state(), before)


def test_kinds_add_up():
    told = forecast_step("naive", config="tiny", batch_size=7, **SHAPES)
    assert list(told.at_peak()) == list(KINDS)
    assert sum(told.at_peak().values()) == told.peak_bytes


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"step": "magic"}, "step"),
        ({"config": None}, "config"),
        ({"config": "huge"}, "size"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"negatives": -1}, "negatives"),
        ({"chunk_size": None}, "chunk_size"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": (1, 2, 3)}, "chunk_size"),
        ({"step": "naive"}, "chunk_size"),
        ({"step": "accumulation", "retain_chunks": 1}, "retain_chunks"),
        ({"retain_chunks": -1}, "retain_chunks"),
        ({"query_length": 0}, "query_length"),
        ({"query_length": None}, "query_length must be a number of tokens"),
        ({"config": "clip-vit-b-32-vision"}, "query_length must be None for a tower that is given pictures"),
        ({"config": ["tiny", "tiny", "tiny"]}, "config must be one config, or one for each"),
        ({"chunk_tokens": 64}, "chunk_size and chunk_tokens: exactly one"),
        ({"chunk_size": None, "chunk_tokens": 0}, "chunk_tokens"),
        ({"step": "accumulation", "chunk_size": None, "chunk_tokens": 64}, "chunk_tokens must be None"),
        ({"pooling": "max"}, "pooling"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing"),
        ({"config": None, "encoders": [nn.Linear(1, 1)] * 2, "pooling": "mean"}, "pooling, gradient_checkpointing"),
        ({"config": None, "encoders": [nn.Linear(1, 1)] * 2, "dtype": torch.bfloat16}, "dtype=torch.bfloat16"),
        ({"passage_length": [1, 2]}, "passage_length"),
        ({"dtype": torch.int64}, "dtype"),
        ({"autocast": "bf16"}, "autocast"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"loss": 3}, "loss"),
        ({"config": None, "encoders": [1, 2]}, "encoders"),
    ],
)
def test_bad_input_is_refused_in_words(change, names):
    given_ = {"step": "grad_cache", "config": "tiny", "batch_size": 4, "chunk_size": 2, **SHAPES} | change
    with pytest.raises(ValueError, match=names):
        forecast_step(**given_)


def test_a_temperature_that_was_learned_asks_for_no_new_law():
    encoders, loss = built("tiny", tied=True), ContrastiveLoss(0.1, learnable=True)
    workload = Workload(step="naive", batch_size=2, encoders=encoders, loss=loss, **SHAPES)
    first = fake_step(workload)
    with torch.no_grad():
        loss.log_temperature.add_(1)
        next(encoders[0].parameters()).add_(1)
    assert fake_step(replace(workload)) is first
    assert fake_step(replace(workload, loss=ContrastiveLoss(0.1))) is not first


class Quadratic(nn.Module):
    """An encoder whose rows look at each other: its bytes lie on no line."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(500, 8)

    def forward(self, input_ids, attention_mask):
        rows = self.table(input_ids).mean(dim=1)
        return torch.softmax(rows @ rows.T, dim=1) @ rows


class Steps(nn.Module):
    """An encoder that pads its rows to a multiple of four: no line again, and of whole numbers only at some."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(500, 8)

    def forward(self, input_ids, attention_mask):
        count = len(input_ids)
        padded = nn.functional.pad(input_ids, (0, 0, 0, -count % 4))
        return self.table(padded).tanh().mean(dim=1)[:count]


@pytest.mark.parametrize(
    ("step", "kind"),
    [("grad_cache", Quadratic), ("grad_cache", Steps), ("naive", Steps), ("accumulation", Steps)],
)
@pytest.mark.parametrize("rows", [5, 11])
def test_where_no_law_holds_it_says_so_and_is_exact(step, kind, rows):
    encoders, loss = [kind()] * 2, ContrastiveLoss()
    options = {} if step == "naive" else {"chunk_size": 5}
    ledger = really_run(step, encoders, (rows, rows), loss, **options)
    told = forecast_step(step, encoders=encoders, loss=loss, batch_size=rows, **SHAPES, **options)
    assert not told.exact_law
    assert (told.peak_bytes, told.at_peak()) == (ledger.peak_bytes, ledger.at_peak())


@pytest.mark.slow
def test_where_no_law_holds_a_million_chunks_are_refused_in_words():
    for step in ("grad_cache", "accumulation"):
        with pytest.raises(ValueError, match="at most 4,096 chunks where no law holds"):
            forecast_step(step, encoders=[Steps()] * 2, batch_size=2**20, chunk_size=3, **SHAPES)


def held_law(values):
    """(a `HeldLaw` of these values, the n at which they were computed so far)."""
    computed = []

    def compute(n):
        computed.append(n)
        return (np.array(values(n)),)

    return HeldLaw(compute), computed


def test_a_law_answers_below_what_it_was_held_against_and_nowhere_else():
    law, computed = held_law(lambda n: [n * n, 7 * n])
    for n in (1_000, 40, 999, 1, 3, 2_000, 1_500):
        assert law.at(n)[0].tolist() == [n * n, 7 * n]
    assert computed == [1_000, 2, 3, 4, 1, 3, 2_000]


@pytest.mark.parametrize(
    "values",
    [
        lambda n: [n] if n < 50 else [n, n],  # more operations from some rows on, as in tiles
        lambda n: [n**3],
        lambda n: [-(-n // 8)],
        lambda n: [n] if n > 4 else [],
    ],
)
def test_where_no_law_of_the_loss_holds_every_value_is_computed(values):
    law, _ = held_law(values)
    for n in (1_000, 40, 60, 7, 3, 49, 2_000, 51):
        assert law.at(n)[0].tolist() == values(n)


def test_a_law_that_stops_to_hold_is_never_asked_again():
    law, computed = held_law(lambda n: [n, 0] if n <= 100 else [n, 1])
    for n in (100, 50, 300, 200, 99, 20):
        assert law.at(n)[0].tolist() == [n, int(n > 100)]
    assert computed == [100, 2, 3, 4, 300, 200, 99, 20]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (ContrastiveLoss(), {}),
        (ContrastiveLoss(symmetric=True), {"negatives": 2, "autocast": torch.bfloat16}),
        (ContrastiveLoss(tile_size=64), {"device": "cuda"}),
    ],
)
def test_the_loss_by_its_law_is_the_loss_that_is_taken(loss, options):
    same = {"loss": loss, "chunk_size": 4, "query_length": 8, "passage_length": 8, **options}
    fake = fake_step(Workload(step="grad_cache", config="tiny", batch_size=8, **same))
    negatives = options.get("negatives", 0)
    for queries in (200, 7, 64, 65, 150, 300, 299):
        rows = queries, queries * (1 + negatives)
        for by_law, taken in zip(fake.cached_loss(rows, (8, 8)), fake._cached_loss(rows, (8, 8)), strict=True):
            assert np.array_equal(by_law, taken), queries


def test_in_small_chunks_the_end_of_a_backward_makes_the_peak():
    """Chapter 06: with chunks of 4 the word table's new gradient stands beside the sum; a larger chunk is higher."""
    table, same = 8_000 * 128 * 4, {"config": "mini", "query_length": 32, "passage_length": 32, "optimizer": "adamw"}
    held = {}
    for chunk_size in (2, 4, 16):
        forecast = forecast_step("grad_cache", batch_size=64, chunk_size=chunk_size, **same)
        piece = next(piece for piece in forecast.timeline if piece.peak_bytes == forecast.peak_bytes)
        at = piece.kind_bytes.sum(axis=1).argmax()
        held[chunk_size] = forecast.at_peak()["activations"], piece.phase, bool(at > 0.9 * len(piece.kind_bytes))
    for chunk_size in (2, 4):
        bytes_held, phase, at_end = held[chunk_size]
        assert phase == "replay" and at_end and table <= bytes_held < 1.05 * table
    assert not held[16][2] and held[16][0] > 2 * table
