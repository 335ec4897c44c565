"""The audit: right steps pass, each trap is told by its own name, and nothing of the caller's is touched."""

from functools import partial

import pytest
import torch
from helpers.oracles import InfoNCE, TinyEncoder, token_batch
from torch import nn

from gclib import ContrastiveLoss, Encoder, grad_cache_step, naive_step
from gclib.audit.audit import audit_step
from gclib.chunks import Chunk
from gclib.course.wild.traps import SIZE, TRAPS, right_step
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
