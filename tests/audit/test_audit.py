"""The audit: right steps pass, each trap is told by its own name, and nothing of the caller's is touched."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from helpers.oracles import InfoNCE, TinyEncoder, token_batch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from gclib import ContrastiveLoss, Encoder, grad_cache_step, naive_step
from gclib.audit.audit import FAULTS, audit_step
from gclib.chunks import Chunk
from gclib.course.wild.traps import SIZE, TRAPS, right_step
from gclib.losses.max_sim import MaxSimLoss
from gclib.steps import accumulation_step

ROWS = 7  # 3 + 3 + 1: the last chunk is short


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    return token_batch(ROWS, 6, generator), token_batch(ROWS, 6, generator)


@pytest.fixture
def encoder():
    torch.manual_seed(1)
    return TinyEncoder(0.3)


def audit(step, encoder, batch, loss_fn=None, **options):
    return audit_step(step, [encoder, encoder], batch, loss_fn or InfoNCE(), **options)


RIGHT = {
    "ten lines": right_step,
    "naive": naive_step,
    "gclib": partial(grad_cache_step, chunk_size=3),
    "gclib, one row a chunk": partial(grad_cache_step, chunk_size=1),
    "gclib, not sorted, retained": partial(grad_cache_step, chunk_size=3, sort_by_length=False, retain_chunks=2),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_step_passes(name, encoder, batch):
    report = audit(RIGHT[name], encoder, batch)
    assert report.right and report.names == []
    assert report.error < 1e-12 and report.scale == pytest.approx(1) == pytest.approx(report.temperature)
    assert "Nothing wrong was found" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_right_steps_pass_on_random_batches(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, group, size = (
        int(torch.randint(low, high, (), generator=generator)) for low, high in ((2, 9), (1, 4), (1, 6))
    )
    batch = token_batch(rows, 6, generator), token_batch(rows * group, 9, generator)
    torch.manual_seed(seed)
    towers = [TinyEncoder(0.4 * (seed % 2)), TinyEncoder(0.2)]
    options = [{"chunk_size": size}, {"chunk_tokens": 20}, {"chunk_size": [size, 2], "retain_chunks": size}][seed % 3]
    for step in (naive_step, partial(grad_cache_step, **options)):
        report = audit_step(step, towers, batch, InfoNCE(symmetric=seed % 4 == 0), seed=seed)
        assert report.right, str(report)


def test_the_rows_and_replays_are_told(encoder, batch):
    report = audit(right_step, encoder, batch)
    assert report.batch == (7, 7) and report.chunks == (3, 3, 1) * 2 and report.replayed == report.alike == 6
    assert report.dropout
    assert "7 + 7 rows" in str(report) and "3, 3, 1" in str(report)


EXPECTED = {
    "random states not replayed": ["random states not replayed"],
    "1/W of the gradient": ["1/W of the gradient"],
    "cache split by nominal size": ["cached gradients of other rows", "random states not replayed"],
    "whole loss for every chunk": ["whole loss for every chunk", "random states not replayed"],
    "B times the gradient": ["B times too large"],
    "temperature not applied": ["temperature not applied"],
    "replay outside autocast": ["autocast not restored"],
}


def test_every_trap_is_expected_here():
    assert set(EXPECTED) == {trap.name for trap in TRAPS}


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_each_trap_is_recognised_by_name(trap, encoder, batch):
    report = audit(trap.step, encoder, batch, ranks=2)
    assert report.names == EXPECTED[trap.name]
    assert all(finding.said in str(report) for finding in report.findings)
    assert f"def {trap.step.__name__}" in trap.source


@pytest.mark.slow
@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_each_trap_is_recognised_in_a_transformer(trap, batch):
    torch.manual_seed(0)
    encoder = Encoder.from_config("tiny", vocab_size=64)
    report = audit(trap.step, encoder, batch, ContrastiveLoss(0.1, learnable=True), ranks=2)
    assert report.names == EXPECTED[trap.name]


def test_without_dropout_the_randomness_is_not_judged(batch):
    report = audit(TRAPS[0].step, TinyEncoder(0.0), batch)
    assert report.right and not report.dropout and "draw no random numbers" in str(report)


def test_accumulation_loses_negatives(encoder, batch):
    report = audit(partial(accumulation_step, chunk_size=3), encoder, batch)
    assert report.names == ["a loss for every chunk"] and "3, 3, 1 queries at a time" in str(report)


def test_a_size_says_what_it_may_be(encoder, batch):
    def times(factor):
        def step(encoders, inputs, loss_fn):
            loss = factor * loss_fn(*(encoder(**given) for encoder, given in zip(encoders, inputs, strict=True)))
            loss.backward()
            return loss / factor

        return step

    assert audit(times(7.0), encoder, batch).names == ["B times too large"]
    assert audit(times(0.25), encoder, batch, ranks=4).names == ["1/W of the gradient"]
    assert audit(times(0.25), encoder, batch).names == ["too small"]
    assert audit(times(1.3), encoder, batch).names == ["wrong size"]
    assert audit(times(1.3), encoder, batch).scale == pytest.approx(1.3)
    assert audit(times(-1.0), encoder, batch).names == ["another gradient"]


def test_a_temperature_that_gets_no_gradient_is_told(encoder, batch):
    def step(encoders, inputs, loss_fn):
        loss = right_step(encoders, inputs, loss_fn)
        for parameter in loss_fn.parameters():
            parameter.grad = None
        return loss

    report = audit(step, encoder, batch)
    assert report.names == ["temperature's gradient"] and report.temperature == 0


def test_overflow_is_told(batch):
    class Overflowing(nn.Module):
        def forward(self, queries, passages):
            return (queries @ passages.T / 1e-3).logsumexp(dim=1).mean()

    def step(encoders, inputs, loss_fn):
        reps = [encoder(**given) for encoder, given in zip(encoders, inputs, strict=True)]
        loss = (reps[0] @ reps[1].T / 1e-4).exp().sum(dim=1).log().mean()
        loss.backward()
        return loss

    assert audit(step, TinyEncoder(0.0), batch, Overflowing()).names == ["not a number"]


def test_a_generator_that_is_turned_back_is_told(encoder, batch):
    def step(encoders, inputs, loss_fn):
        state = torch.get_rng_state()
        loss = right_step(encoders, inputs, loss_fn)
        torch.set_rng_state(state)
        return loss

    assert audit(step, encoder, batch).names == ["generators turned back"]


@pytest.mark.parametrize("rates", [(0.4, 0.0), (0.0, 0.4)])
def test_of_two_towers_one_may_draw_nothing(rates, batch):
    towers = list(map(TinyEncoder, rates))
    for step in RIGHT.values():
        report = audit_step(step, towers, batch, InfoNCE())
        assert report.right, str(report)


def test_a_loss_that_is_returned_as_a_number_is_judged_and_none_is_said(encoder, batch):
    def returns(give):
        return audit(lambda *given: give(naive_step(*given)), encoder, batch)

    assert returns(float).right and "the loss" not in str(returns(float).unjudged)
    assert returns(lambda loss: 7 * float(loss)).names == ["another loss"]
    assert returns(lambda loss: None).right
    assert "Not judged: the loss, for the step returns no number." in str(returns(lambda loss: None))


def test_with_the_plan_dropout_is_held_against_kept_graphs(encoder, batch):
    plan = [[Chunk(tuple(range(start, min(start + SIZE, ROWS))), 6) for start in range(0, ROWS, SIZE)]] * 2
    assert audit(right_step, encoder, batch, plan=plan).right
    assert audit(partial(grad_cache_step, plan=plan), encoder, batch, plan=plan).right
    names = audit(TRAPS[0].step, encoder, batch, plan=plan).names
    assert names == ["random states not replayed", "gradient under dropout"]


class Normed(nn.Module):
    """An encoder with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(23, 5), nn.BatchNorm1d(5)

    def forward(self, input_ids, attention_mask):
        return self.norm((self.table(input_ids) * attention_mask.unsqueeze(-1)).sum(dim=1))


def test_batch_norm_is_told_and_a_refusal_is_right():
    generator = torch.Generator().manual_seed(3)
    batch = [token_batch(6, 6, generator), token_batch(6, 6, generator)]
    torch.manual_seed(0)
    report = audit(right_step, Normed(), batch)
    assert report.names == ["BatchNorm"] and "8 updates" in str(report)
    assert audit(naive_step, Normed(), batch).right

    def refused(encoders, inputs, loss_fn):
        if encoders[0].training:
            raise ValueError("no BatchNorm in training mode")
        return right_step(encoders, inputs, loss_fn)

    assert audit(refused, Normed(), batch).right


def test_a_step_that_trains_something_else_is_told(encoder, batch):
    other, loss_fn = TinyEncoder(), InfoNCE()
    report = audit(lambda encoders, inputs, loss: right_step([other, other], inputs, loss_fn).detach(), encoder, batch)
    assert not report.right


def test_nothing_of_the_callers_is_touched(encoder, batch):
    loss_fn = InfoNCE()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    encoder.eval()
    audit(right_step, encoder, batch, loss_fn)
    assert torch.equal(state, torch.get_rng_state()) and not encoder.training
    assert all(parameter.grad is None for parameter in [*encoder.parameters(), *loss_fn.parameters()])
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert next(encoder.parameters()).dtype == torch.float32


def test_plain_tensors_and_untied_towers_are_audited():
    torch.manual_seed(0)
    towers, inputs = [nn.Linear(4, 3), nn.Linear(5, 3)], [torch.randn(6, 4), (torch.randn(12, 5),)]
    assert audit_step(partial(grad_cache_step, chunk_size=4), towers, inputs, ContrastiveLoss(0.5)).right


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"step": None}, "step must be callable"),
        ({"loss_fn": 3}, "loss_fn must be callable"),
        ({"encoders": [lambda x: x] * 2}, "encoders\\[0\\] must be a torch module"),
        ({"encoders": []}, "encoders must be a list"),
        ({"encoders": [nn.ReLU(), nn.ReLU()]}, "encoders must have a parameter"),
        ({"tolerance": 0}, "tolerance must be"),
        ({"ranks": 0}, "ranks must be"),
    ],
)
def test_bad_arguments_are_refused(change, match, encoder, batch):
    given = {"step": right_step, "encoders": [encoder, encoder], "inputs": batch, "loss_fn": InfoNCE()} | change
    with pytest.raises(ValueError, match=match):
        audit_step(**given)


def test_the_public_libraries_pass(batch):
    pytest.importorskip("gradcache")
    pytest.importorskip("sentence_transformers")
    from gclib.course.wild.rivals import official_step, sentence_transformers_step

    encoder = Encoder.from_config("tiny", vocab_size=64)
    assert audit(partial(official_step, chunk_size=3), encoder, batch, ContrastiveLoss(0.1, learnable=True)).right

    def step(encoders, inputs, loss_fn):
        return sentence_transformers_step(encoders[0], inputs, chunk_size=3, temperature=0.1)

    assert audit(step, encoder, batch, ContrastiveLoss(0.1)).right


class Behind(TinyEncoder):
    """An encoder, and something behind it."""

    def __init__(self, behind):
        super().__init__()
        self.behind = behind

    def forward(self, input_ids, attention_mask):
        return self.behind(super().forward(input_ids, attention_mask))


class Running(nn.Module):
    """A running mean, or a running scale, in a buffer or an attribute."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.scale = kind, 1.0
        self.register_buffer("seen", torch.ones(5))

    def forward(self, x):
        if self.kind == "attribute":
            self.scale *= 1.1
        elif self.training:
            self.seen.mul_(0.5).add_(x.detach().square().mean(0), alpha=0.5)
        return (x - self.seen if self.kind == "mean" else x / self.seen.sqrt()) * self.scale


def numpy_noise(x):
    return x * (1 + 0.1 * torch.from_numpy(np.random.standard_normal(tuple(x.shape))))


def slow():
    """A layer whose singular values are close to each other: power iteration takes long."""
    layer = nn.Linear(5, 5)
    with torch.no_grad():
        layer.weight.copy_(nn.init.orthogonal_(layer.weight) * torch.linspace(0.9, 1, 5))
    return layer


CHANGING = {
    "spectral norm": lambda: spectral_norm(slow()),
    "old spectral norm": lambda: nn.utils.spectral_norm(slow()),
    "mean": lambda: Running("mean"),
    "scale": lambda: Running("scale"),
    "attribute": lambda: Running("attribute"),
    "numpy's generator": lambda: numpy_noise,
    "Python's generator": lambda: lambda x: x * (1 + 0.1 * random.random()),
}
BLIND = partial(grad_cache_step, chunk_size=3, verify="never")
SECOND, COMPANY, PADDING, WRITES = FAULTS["replay"], FAULTS["company"], FAULTS["padding"], FAULTS["inputs"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CHANGING)
def test_an_encoder_whose_second_forward_is_another_is_named(name, batch):
    torch.manual_seed(0)
    encoder = Behind(CHANGING[name]())
    report = audit(partial(grad_cache_step, chunk_size=3), encoder, batch)
    assert report.names == [SECOND] and not report.right
    assert "The step refuses it: encoders[0] must " in report.findings[0].said
    for step in (BLIND, right_step):
        report = audit(step, encoder, batch)
        assert report.names == [SECOND] and not report.right
    report = audit(naive_step, encoder, batch)
    assert report.right and report.names == [SECOND] and f"NOTE, {SECOND}" in str(report)


@pytest.mark.parametrize("name", ["spectral norm", "old spectral norm", "scale"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_changes_in_training_mode_alone_is_right_in_eval_mode(name, batch):
    report = audit(partial(grad_cache_step, chunk_size=3), Behind(CHANGING[name]()).eval(), batch)
    assert report.right and report.names == [SECOND] and "given in eval mode" in report.findings[0].said
    encoder = Behind(CHANGING[name]())
    encoder.behind.eval()
    report = audit(partial(grad_cache_step, chunk_size=3), encoder, batch)
    assert report.right and report.names == []


TOGETHER = {
    "a mean over the batch": lambda x: x - x.mean(0),
    "batch statistics": lambda x: nn.functional.batch_norm(x, None, None, training=True),
    "a median": lambda x: x * (x > x.median(0).values),
    "a capacity": lambda x: x * (torch.arange(len(x)) < 4).unsqueeze(-1),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_that_depend_on_each_other_are_named(name, batch):
    encoder = Behind(TOGETHER[name])
    for step in (partial(grad_cache_step, chunk_size=3), BLIND, right_step):
        report = audit(step, encoder, batch)
        assert report.names == [COMPANY] and not report.right
    assert audit(naive_step, encoder, batch).right


class Recurrent(nn.Module):
    """An LSTM over padded rows."""

    def __init__(self):
        super().__init__()
        self.table, self.lstm = nn.Embedding(23, 6), nn.LSTM(6, 3, bidirectional=True, batch_first=True)

    def forward(self, input_ids, attention_mask):
        weights = attention_mask.unsqueeze(-1)
        return (self.lstm(self.table(input_ids))[0] * weights).sum(1) / weights.sum(1)


def test_padding_that_matters_is_named_also_where_the_step_left_it_on(batch):
    untrimmed, trimmed = (
        audit(partial(grad_cache_step, chunk_size=3), Recurrent(), batch),
        audit(BLIND, Recurrent(), batch),
    )
    assert untrimmed.names == trimmed.names == [PADDING]
    assert untrimmed.right and untrimmed.error < 1e-12 and f"NOTE, {PADDING}" in str(untrimmed)
    assert not trimmed.right and trimmed.error > 0.01
    assert "trimmed" in trimmed.findings[0].said and audit(right_step, Recurrent(), batch).right


class Tokens(nn.Embedding):
    """One vector for every token, padding too."""

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids)


def test_padding_that_the_loss_leaves_out_does_no_harm(batch):
    masks = [tower["attention_mask"] for tower in batch]
    for loss_fn, harm in ((MaxSimLoss(*masks), False), (MaxSimLoss(*map(torch.ones_like, masks)), True)):
        report = audit(BLIND, Tokens(23, 4), batch, loss_fn)
        assert report.names == [PADDING] and report.right is not harm
        assert audit(partial(grad_cache_step, chunk_size=3), Tokens(23, 4), batch, loss_fn).right


def test_an_encoder_that_writes_into_its_inputs_is_named_and_the_batch_is_whole():
    class Halving(nn.Linear):
        def forward(self, rows):
            return super().forward(rows.mul_(0.5))

    for dtype in (torch.float32, torch.float64):
        inputs = [torch.randn(7, 4, dtype=dtype), torch.randn(7, 4, dtype=dtype)]
        before = [rows.clone() for rows in inputs]
        for step in (partial(grad_cache_step, chunk_size=3), BLIND, naive_step):
            report = audit_step(step, [Halving(4, 3)] * 2, inputs, InfoNCE())
            assert report.names == [WRITES] and not report.right and "inputs" in report.findings[0].said
        assert all(map(torch.equal, inputs, before))


def test_a_fault_of_the_encoder_hides_no_fault_of_the_step(batch):
    def seven_times(encoders, inputs, loss_fn):
        loss = naive_step(encoders, inputs, lambda *reps: 7 * loss_fn(*reps))
        return loss / 7

    report = audit(seven_times, Recurrent(), batch)
    assert report.names == [PADDING, "B times too large"]
    assert [finding.wrong for finding in report.findings] == [False, True]


def test_other_refusals_of_a_step_are_passed_on(encoder, batch):
    with pytest.raises(ValueError, match="chunk_size must be a positive int|chunk_size must be an int of at least 1"):
        audit(partial(grad_cache_step, chunk_size=0), encoder, batch)

    class Rarely(TinyEncoder):
        calls = 0  # of one row

        def forward(self, input_ids, attention_mask):
            self.calls += len(input_ids) == 1
            return super().forward(input_ids, attention_mask) * (1 + (self.calls > 14))

    report = audit(partial(grad_cache_step, chunk_size=1), Rarely(), batch)
    assert report.names == ["the step refuses the encoders"] and not report.right


def test_what_is_not_judged_is_said(encoder, batch):
    report = audit(right_step, encoder, batch)
    assert report.unjudged == ("the gradient with dropout on (`plan` would tell its chunks)",)
    assert f"Not judged: {report.unjudged[0]}" in str(report)
    always = Behind(lambda x: nn.functional.dropout(x, 0.3))
    report = audit(partial(grad_cache_step, chunk_size=3), always, batch)
    assert report.right and "random numbers in eval mode" in str(report.unjudged)
    assert audit(TRAPS[0].step, always, batch).names == ["random states not replayed"]
    report = audit(partial(grad_cache_step, chunk_size=3), Behind(Running("attribute")), batch)
    assert "the step refuses its encoders" in str(report.unjudged) and report.error != report.error
    normed = [torch.randn(6, 5), torch.randn(6, 5)]
    report = audit_step(naive_step, [nn.BatchNorm1d(5)] * 2, normed, InfoNCE())
    assert report.right and "BatchNorm in training mode" in str(report)


def test_numbers_that_are_not_finite_are_named(batch):
    nan = lambda q, p: InfoNCE()(q, p) * torch.nan  # noqa: E731
    assert audit(right_step, TinyEncoder(), batch, nan).names == ["not a number"]

    def step(encoders, inputs, loss_fn):
        loss = right_step(encoders, inputs, loss_fn)
        for parameter in encoders[0].parameters():
            parameter.grad.view(-1)[0] = torch.nan
        return loss

    assert audit(step, TinyEncoder(), batch).names == ["not a number"]


@pytest.mark.parametrize("cut", [{"retain_chunks": 1}, {"retain_chunks": 2}, {}, {"chunk_size": 8, "retain_chunks": 1}])
def test_chunks_with_equal_inputs_are_not_taken_for_each_other(cut, encoder, batch):
    twin = {name: tensor.clone() for name, tensor in batch[0].items()}
    step = partial(grad_cache_step, **{"chunk_size": 3} | cut)
    report = audit(step, encoder.train(), [batch[0], twin])
    assert report.right and report.alike == report.replayed, report
