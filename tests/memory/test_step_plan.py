"""`plan_step` against the ledger of the real step, an exhaustive grid, and the naive step's gradient."""

import re

import pytest
import torch
from torch import nn

from gclib import ContrastiveLoss, Encoder, grad_cache_loss, grad_cache_step, naive_step, plan_chunks, plan_step
from gclib.chunks import price_of_a_call
from gclib.memory import step_plan
from gclib.memory.batch_laws import WIDTHS, _fits, batch_step
from gclib.memory.flops import count_flops
from gclib.memory.ledger import record_memory
from gclib.verify import check_towers
from tests.helpers.oracles import TinyEncoder, gradients, token_batch, worst_error
from tests.helpers.plans import Job, encoder_pool, judge, random_job

MIB = 2**20


@pytest.fixture(scope="module")
def pool():
    return encoder_pool(0)


@pytest.fixture
def job():
    generator = torch.Generator().manual_seed(0)
    encoder = TinyEncoder(0.1, width=32).double()
    inputs = [token_batch(24, 12, generator), token_batch(48, 30, generator)]
    return Job([encoder, encoder], inputs, ContrastiveLoss(0.4).double(), 0)


def planned(job, **options):
    return plan_step(job.encoders, job.inputs, job.loss, **options)


JOBS = [
    *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4)),
    *(pytest.param(seed, marks=[pytest.mark.slow, pytest.mark.deep]) for seed in range(4, 30)),
]


@pytest.mark.parametrize("seed", JOBS)
def test_within_the_budget_by_the_ledger_and_as_quick_as_the_best_of_a_grid(seed, pool):
    """The same 300 times: tests/benchmarks/bench_plans.py."""
    judged = judge(random_job(seed, pool))
    assert judged.of_budget <= 1 and judged.cost_ratio <= 1.05
    assert 1 <= judged.of_ledger < 1.25


def test_bytes_are_the_ledgers_and_flops_those_that_are_counted(job):
    """At budgets from all to hardly anything; bytes are at most 3 % above the ledger's (copies of ids, scalars)."""
    whole = planned(job, budget_bytes=2**30)
    for share in (1.0, 0.7, 0.5, 0.4):
        plan = planned(job, budget_bytes=int(share * whole.peak_bytes))
        seen = job.ledger_bytes(**plan.options(), verify="always")
        assert 0.97 * plan.peak_bytes <= seen <= plan.peak_bytes <= share * whole.peak_bytes
        cost, _ = job.cost()
        cut = step_plan.Cut("chunk_size", plan.chunk_size) if isinstance(plan.chunk_size, tuple) else None
        if cut is None:
            name = "chunk_size" if plan.chunk_size else "chunk_tokens"
            value = getattr(plan, name)
            cut = step_plan.Cut(name, value if isinstance(value, tuple) else (value, value))
        chunks = cost.chunks(cost.as_one if plan.step == "naive" else cut)
        again = chunks.trained & ~chunks._kept(plan.retain_chunks)
        calls = ((1 + again + 2 * chunks.trained) * torch.tensor(cost.call).numpy()[chunks.tower]).sum()
        run = count_flops(
            lambda plan=plan: grad_cache_step(job.encoders, job.inputs, job.loss, **plan.options(), verify="never")
        )
        loss = count_flops(lambda: job.loss(*(torch.zeros(n, 32).double() for n in (24, 48))))
        assert chunks.time(plan.retain_chunks) - calls + 3 * loss == pytest.approx(run)


@pytest.mark.parametrize("lengths", ["full", "unlike"])
def test_the_options_give_the_naive_gradient_in_both_steps(job, lengths):
    """Dropout off; the whole batch at once, chunks in rows and in tokens, all and none retained."""
    job.encoders[0].eval()
    if lengths == "full":
        for inputs in job.inputs:
            inputs["attention_mask"].fill_(1)
    modules = [job.encoders[0], job.loss]
    loss, truth = gradients(modules, lambda: naive_step(job.encoders, job.inputs, job.loss))
    whole, steps = planned(job, budget_bytes=2**30), set()
    for share in (1.0, 0.6, 0.4):
        plan = planned(job, budget_bytes=int(share * whole.peak_bytes))
        steps.add(plan.step)

        def by_loss(plan=plan):
            value = grad_cache_loss(job.encoders, job.inputs, job.loss, **plan.options())
            value.backward()
            return value.detach()

        for step in (lambda plan=plan: grad_cache_step(job.encoders, job.inputs, job.loss, **plan.options()), by_loss):
            value, seen = gradients(modules, step)
            assert float(value) == pytest.approx(float(loss), rel=1e-12) and worst_error(seen, truth) <= 1e-12
    assert steps == {"naive", "grad_cache"}


def test_the_naive_step_by_its_options_is_the_naive_step_to_the_bit_and_nearly_to_the_byte(job):
    for inputs in job.inputs:
        inputs["attention_mask"].fill_(1)
    plan = planned(job, budget_bytes=2**30)
    assert (plan.step, plan.time_ratio) == ("naive", 1.0)
    assert plan.options() == {"chunk_size": (24, 48), "retain_chunks": 2, "sort_by_length": False}
    torch.manual_seed(0)
    loss, truth = gradients(job.encoders[:1], lambda: naive_step(job.encoders, job.inputs, job.loss))
    torch.manual_seed(0)
    seen_loss, seen = gradients(
        job.encoders[:1], lambda: grad_cache_step(job.encoders, job.inputs, job.loss, **plan.options())
    )
    assert torch.equal(loss, seen_loss) and all(map(torch.equal, seen, truth))


def test_gradients_and_states_that_are_there_count(job):
    plain = planned(job, budget_bytes=2**30)
    weights = sum(p.nbytes for p in job.encoders[0].parameters())
    assert planned(job, budget_bytes=2**30, optimizer="adamw").peak_bytes == plain.peak_bytes + 2 * weights + 12
    optimizer = torch.optim.AdamW(job.encoders[0].parameters())
    assert planned(job, budget_bytes=2**30, optimizer=optimizer).peak_bytes == plain.peak_bytes + 2 * weights + 12
    grad_cache_step(job.encoders, job.inputs, job.loss, chunk_size=4)
    optimizer.step()
    stepped = planned(job, budget_bytes=2**30, optimizer=optimizer)
    assert plain.peak_bytes + 2 * weights < stepped.peak_bytes <= plain.peak_bytes + 4 * weights
    with pytest.raises(ValueError, match="optimizer must be one of"):
        planned(job, optimizer="lion")


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        (lambda weights: torch.optim.SGD(weights, lr=0.1), 0),
        (lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9), 1),
        (lambda weights: torch.optim.Adam(weights, amsgrad=True), 3),
    ],
    ids=["sgd", "sgd with momentum", "adam with amsgrad"],
)
def test_states_to_come_are_as_many_as_come(job, optimizer, moments):
    optimizer = optimizer(job.encoders[0].parameters())
    plain, coming = planned(job, budget_bytes=2**30), planned(job, budget_bytes=2**30, optimizer=optimizer)
    grad_cache_step(job.encoders, job.inputs, job.loss, chunk_size=4)
    optimizer.step()
    optimizer.zero_grad()
    weights = sum(p.nbytes for p in job.encoders[0].parameters())
    assert moments * weights <= coming.peak_bytes - plain.peak_bytes <= moments * weights + 4 * 3
    assert planned(job, budget_bytes=2**30, optimizer=optimizer).peak_bytes == coming.peak_bytes


@pytest.mark.parametrize("name", ["NAdam", "RAdam", "Adamax", "Adadelta", "RMSprop", "Rprop", "ASGD"])
def test_states_to_come_of_other_optimizers_are_no_more_than_was_told(job, name):
    optimizer = getattr(torch.optim, name)(job.encoders[0].parameters(), lr=1e-3)
    coming = planned(job, budget_bytes=2**30, optimizer=optimizer)
    grad_cache_step(job.encoders, job.inputs, job.loss, chunk_size=4)
    optimizer.step()
    optimizer.zero_grad()
    assert planned(job, budget_bytes=2**30, optimizer=optimizer).peak_bytes <= coming.peak_bytes


def test_the_smallest_budget_that_is_named_is_one_that_will_do():
    """Of a tiny encoder chunks of a row are not the smallest step: each of them holds the generators' states."""
    encoder, inputs = nn.Linear(6, 4), [torch.randn(12, 6), torch.randn(24, 6)]
    step = [encoder] * 2, inputs, ContrastiveLoss(0.1)
    with pytest.raises(ValueError, match="must be at least") as told:
        plan_step(*step, budget_bytes=10_000)
    named = float(re.search(r"at least the ([\d.]+) KiB", str(told.value)).group(1))
    assert 10_000 < plan_step(*step, budget_bytes=int((named + 0.05) * 1_024)).peak_bytes <= (named + 0.05) * 1_024


def test_a_callable_that_is_no_module_is_measured(job):
    encoder = job.encoders[0]
    encoder.out.weight.grad = torch.ones_like(encoder.out.weight)
    state = torch.get_rng_state()

    def call(**inputs):
        return encoder(**inputs)

    wrapped, sizes = Job([call, call], job.inputs, job.loss, 0), []
    assert "small chunk was run and measured" in planned(wrapped, budget_bytes=2**30).reason
    assert torch.equal(encoder.out.weight.grad, torch.ones_like(encoder.out.weight))
    assert encoder.table.weight.grad is None and torch.equal(torch.get_rng_state(), state)
    encoder.zero_grad()
    for budget in (2**30, 2 * MIB, MIB):
        plan = planned(wrapped, budget_bytes=budget)
        sizes.append(job.ledger_bytes(**plan.options()))
        assert sizes[-1] <= plan.peak_bytes <= budget
    assert sizes[0] > sizes[-1]


def test_a_frozen_tower_that_is_no_module_is_measured(job):
    encoder, frozen = job.encoders[0], TinyEncoder(width=32).double().requires_grad_(False)
    encoders = [encoder, lambda **inputs: frozen(**inputs)]
    plan = plan_step(encoders, job.inputs, job.loss, budget_bytes=2**30)
    with record_memory(encoder, frozen) as ledger:
        grad_cache_step(encoders, job.inputs, job.loss, **plan.options(), on_phase=ledger.on_phase)
    assert plan.reason.endswith("must be modules to be run with fake tensors, got a function")
    assert ledger.peak_bytes <= plan.peak_bytes


def test_a_loss_that_reads_values_is_measured(job):
    def odd(queries, passages):
        return job.loss(queries, passages) if float(queries.detach().sum()) < 1e9 else None

    assert plan_step(job.encoders, job.inputs, odd, budget_bytes=2**30).peak_bytes == pytest.approx(
        planned(job, budget_bytes=2**30).peak_bytes, rel=0.01
    )


@pytest.mark.slow
def test_tiles_where_the_logits_leave_no_room():
    encoder, generator = TinyEncoder(width=8), torch.Generator().manual_seed(0)
    inputs = [token_batch(3_000, 4, generator) for _ in range(2)]
    loss = ContrastiveLoss()
    plan = plan_step([encoder, encoder], inputs, loss, budget_bytes=48 * MIB)
    assert plan.tile_size == 1_024 and loss.tile_size is None
    loss.tile_size = plan.tile_size
    job = Job([encoder, encoder], inputs, loss, 0)
    assert job.ledger_bytes(**plan.options()) <= plan.peak_bytes <= 48 * MIB


def test_a_padded_tower_is_planned_untrimmed():
    """An encoder whose rows change with their padding is encoded as wide as the batch."""

    class Padded(TinyEncoder):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, torch.ones_like(attention_mask)) / input_ids.shape[1]

    encoder, generator = Padded(width=16), torch.Generator().manual_seed(1)
    inputs = [token_batch(16, 20, generator) for _ in range(2)]
    job = Job([encoder, encoder], inputs, ContrastiveLoss(), 0)
    with pytest.warns(UserWarning, match="depends on how far a row is padded"):
        plan = planned(job, budget_bytes=2**30)
    assert plan.time_ratio == 1.0 and job.ledger_bytes(**plan.options()) <= plan.peak_bytes


@pytest.mark.parametrize("name", ["chunk_size", "chunk_tokens"])
def test_rows_are_cut_as_the_step_cuts_them(name):
    generator = torch.Generator().manual_seed(0)
    towers = check_towers(
        [TinyEncoder()] * 2, [token_batch(37, 30, generator)] * 2, max, mask=None, on_phase=None, scaler=None
    )
    rows = step_plan.RowWidths.of(towers[0])
    lengths = towers[0].inputs["attention_mask"].sum(1).tolist()
    for value in (1, 2, 5, 30, 64, 500, 2_000):
        chunks = plan_chunks(lengths, **{name: value}, call_tokens=price_of_a_call("cpu"))
        views = [isinstance(chunk.index("cpu"), slice) and chunk.width == rows.uncut for chunk in chunks]
        cut = [(len(chunk), chunk.width, view) for chunk, view in zip(chunks, views, strict=True)]
        assert cut == list(zip(*rows.chunks(name, value), strict=True))


class Causal(nn.Module):
    """Its mask is of all pairs of tokens and of no row: bytes that grow with the square of the width alone."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(30, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, input_ids, attention_mask):
        later = torch.ones(input_ids.shape[1], input_ids.shape[1]).triu(1).bool()
        mask = torch.zeros(later.shape).masked_fill(later, float("-inf"))
        return self.layer(self.tokens(input_ids), src_mask=mask)[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "runs"), [(lambda: TinyEncoder(0.1), 4), (Causal, 7)], ids=["nothing but rows", "a mask that no row owns"]
)
@pytest.mark.parametrize("width", [None, 9, 2])
def test_one_chunk_at_each_width_says_as_much_as_two(made, runs, width):
    """The law of both is the same; where one chunk does not say it, it is found by two."""
    encoder, inputs = made(), token_batch(4, width or 9, torch.Generator().manual_seed(0))
    if width is None:
        encoder, inputs, runs = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.1)), torch.randn(4, 6), 2
    step = batch_step(check_towers([encoder], [inputs], torch.sum, mask=None, on_phase=None, scaler=None))
    assert step.runs == runs and not step.why
    widths = (None,) if width is None else WIDTHS
    laws = step._laws["fit", 0, False]
    for name, values in _fits([step._run_at(0, each) for each in widths], widths).items():
        assert (values == laws[name]).all(), name


@pytest.mark.parametrize("retained", [0, 1, 2])
def test_rows_that_stand_side_by_side_are_not_copied(retained):
    """Nor are states of generators recorded again in a replay: of full rows every byte is the ledger's."""
    encoder, generator = TinyEncoder(0.1, width=32), torch.Generator().manual_seed(0)
    inputs = [token_batch(16, 20, generator), token_batch(16, 55, generator)]
    for each in inputs:
        each["attention_mask"].fill_(1)
    job = Job([encoder, encoder], inputs, ContrastiveLoss(0.4), 0)
    cost, loss = job.cost()
    seen = job.ledger_bytes(chunk_size=6, retain_chunks=retained)
    assert cost.chunks(step_plan.Cut("chunk_size", (6, 6))).peak(retained, loss) == seen + step_plan.SCALARS


def test_a_row_alone_has_laws_of_its_own(job):
    """It takes other operations than two rows, and does not count as two."""
    cost, loss = job.cost()
    chunks = cost.chunks(step_plan.Cut("chunk_size", (1, 1)), "own")
    for retained in (0, chunks.count):
        seen = job.ledger_bytes(chunk_size=1, retain_chunks=retained, verify="always")
        assert seen <= chunks.peak(retained, loss) <= 1.03 * seen


@pytest.mark.slow
def test_what_the_step_refuses_and_a_budget_that_is_none_are_refused(job):
    with pytest.raises(ValueError, match="budget_bytes must be an int of at least 1"):
        planned(job, budget_bytes=0)
    with pytest.raises(ValueError, match="budget_bytes must be at least the .* of the smallest step"):
        planned(job, budget_bytes=1_000)
    with pytest.raises(ValueError, match="inputs must be one for each"):
        plan_step(job.encoders, job.inputs[:1], job.loss)
    assert planned(job).peak_bytes > 0


@pytest.mark.slow
@pytest.mark.deep
def test_pictures_and_texts_are_planned_together():
    vision, text = (Encoder.from_config(f"clip-vit-b-32-{kind}").train() for kind in ("vision", "text"))
    pictures = {"pixel_values": torch.rand(12, 3, 224, 224)}
    texts = token_batch(12, 20, torch.Generator().manual_seed(0))
    job = Job([vision, text], [pictures, texts], ContrastiveLoss(), 0)
    whole = planned(job, budget_bytes=2**40)
    plan = planned(job, budget_bytes=int(0.9 * whole.peak_bytes))
    assert job.ledger_bytes(**plan.options()) <= plan.peak_bytes <= 0.9 * whole.peak_bytes
