"""Queues and banks: nothing kept is the plain loss; what is kept is what was encoded; gradients by hand."""

import copy
import math

import pytest
import torch
from helpers.oracles import gradients, worst_error
from torch import nn

from gclib import ContrastiveLoss, accumulation_step, contrastive_loss, grad_cache_loss, grad_cache_step, naive_step
from gclib.course.banks import MomentumEncoder, QueueLoss, TwoSidedBankLoss

LOSSES = [
    lambda size: QueueLoss(size, 0.3),
    lambda size: TwoSidedBankLoss(size, ContrastiveLoss(0.3)),
    lambda size: TwoSidedBankLoss(size, ContrastiveLoss(0.3, symmetric=True, tile_size=2)),
]


def batch(seed, rows=6, hard=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (rows, rows * (1 + hard))]


@pytest.mark.parametrize("make", LOSSES[:2])
def test_a_bank_of_size_0_is_the_plain_loss(make):
    loss_fn = make(0)
    for seed in range(3):
        reps = batch(seed)
        assert torch.equal(loss_fn(*reps), contrastive_loss(*reps, temperature=0.3))
    assert loss_fn.passages is None


@pytest.mark.parametrize("make", LOSSES)
def test_entries_are_what_was_encoded_the_newest_without_a_graph(make):
    encoder, loss_fn = nn.Linear(5, 3).double(), make(8)
    per_pair = 1 if isinstance(loss_fn, QueueLoss) else 2
    encoded = []
    for seed in range(3):
        naive_step([encoder] * 2, batch(seed), loss_fn)
        encoded.insert(0, [encoder(inputs).detach() for inputs in batch(seed)])
        with torch.no_grad():
            encoder.weight.mul_(1.1)
    assert torch.equal(loss_fn.passages, torch.cat([passages for _, passages in encoded])[: 8 * per_pair])
    assert not loss_fn.passages.requires_grad
    if isinstance(loss_fn, TwoSidedBankLoss):
        assert torch.equal(loss_fn.queries, torch.cat([queries for queries, _ in encoded])[:8])


@pytest.mark.parametrize("make", LOSSES)
def test_every_step_takes_it_and_the_cached_ones_give_the_naive_gradient(make):
    encoder, full = nn.Linear(5, 3).double(), make(8)
    naive_step([encoder] * 2, batch(0), full)
    both, inputs = [encoder] * 2, batch(1)

    def deferred(loss_fn):
        loss = grad_cache_loss(both, inputs, loss_fn, chunk_size=2)
        loss.backward()
        return loss

    def run(step):
        loss_fn = copy.deepcopy(full)
        return gradients([encoder], lambda: step(loss_fn)), loss_fn.passages

    truth, kept = run(lambda loss_fn: naive_step(both, inputs, loss_fn))
    for step in (lambda loss_fn: grad_cache_step(both, inputs, loss_fn, chunk_size=4), deferred):
        (loss, changes), passages = run(step)
        assert abs(loss - truth[0]) <= 1e-12 and worst_error(changes, truth[1]) <= 1e-12
        torch.testing.assert_close(passages, kept, rtol=1e-12, atol=1e-12)
    _, passages = run(lambda loss_fn: accumulation_step(both, inputs, loss_fn, chunk_size=2))
    newest_chunk = encoder(inputs[1][8:]).detach()
    torch.testing.assert_close(passages[: len(newest_chunk)], newest_chunk)


def test_the_queue_s_gradient_by_hand():
    """q = 1, passage 2, and 3 in the queue, temperature 1: with p = e^3 / (e^2 + e^3), dL/dq = p (3 - 2)."""
    loss_fn = QueueLoss(1, 1.0)
    loss_fn(torch.ones(1, 1), torch.full((1, 1), 3.0))
    query, passage = torch.ones(1, 1, requires_grad=True), torch.full((1, 1), 2.0, requires_grad=True)
    loss = loss_fn(query, passage)
    loss.backward()
    wrong = math.exp(3) / (math.exp(2) + math.exp(3))
    assert loss.item() == pytest.approx(-math.log(1 - wrong), rel=1e-6)
    assert query.grad.item() == pytest.approx(wrong * (3 - 2), rel=1e-6)
    assert passage.grad.item() == pytest.approx(-wrong, rel=1e-6)


def test_the_two_sided_bank_s_gradient_by_hand():
    """Pair (1, 2) now and (4, 3) kept: dL/dp has a part of the kept query, which the queue's loss lacks."""
    loss_fn = TwoSidedBankLoss(1, ContrastiveLoss(1.0))
    loss_fn(torch.full((1, 1), 4.0), torch.full((1, 1), 3.0))
    query, passage = torch.ones(1, 1, requires_grad=True), torch.full((1, 1), 2.0, requires_grad=True)
    loss_fn(query, passage).backward()
    of_query = math.exp(3) / (math.exp(2) + math.exp(3))  # query 1 on the kept passage 3
    of_kept = math.exp(8) / (math.exp(8) + math.exp(12))  # the kept query 4 on passage 2
    assert query.grad.item() == pytest.approx(of_query * (3 - 2) / 2, rel=1e-6)
    assert passage.grad.item() == pytest.approx((-of_query * 1 + of_kept * 4) / 2, rel=1e-6)


def test_the_momentum_encoder_follows_and_is_not_trained():
    encoder = nn.Linear(5, 3).double()
    follower = MomentumEncoder(encoder, 0.75)
    start = encoder.weight.detach().clone()
    loss_fn, inputs = QueueLoss(4, 0.3), batch(0)
    grad_cache_step([encoder, follower], inputs, loss_fn, chunk_size=2)
    torch.testing.assert_close(loss_fn.passages, encoder(inputs[1]).detach()[:4])
    assert follower.copy.weight.grad is None and encoder.weight.grad is not None
    torch.optim.SGD(encoder.parameters(), lr=1.0).step()
    follower.follow()
    torch.testing.assert_close(follower.copy.weight, 0.75 * start + 0.25 * encoder.weight.detach())
    assert len(list(follower.parameters())) == 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: QueueLoss(-1), "size must be an int of at least 0"),
        (lambda: QueueLoss(1, 0), "temperature must be a finite number above 0"),
        (lambda: TwoSidedBankLoss(1, "dense"), "loss_fn must be callable"),
        (lambda: MomentumEncoder(nn.Linear(1, 1), "0.9"), "momentum must be at least 0 and below 1"),
        (lambda: MomentumEncoder(nn.Linear(1, 1), 1.0), "momentum must be at least 0 and below 1"),
        (lambda: QueueLoss(1)(torch.ones(2, 3), torch.ones(3, 3)), "passage_reps must have B"),
    ],
)
def test_bad_arguments_are_refused_in_words(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()


@pytest.mark.parametrize("make", LOSSES)
def test_a_bank_of_another_encoder_is_refused(make):
    loss_fn, reps = make(4), batch(0)
    loss_fn(*reps)
    for other in ([rep[:, :4] for rep in reps], [rep.float() for rep in reps], [rep.to("meta") for rep in reps]):
        with pytest.raises(ValueError, match="passage_reps must have the bank's 5 dimensions of torch.float64 on cpu"):
            loss_fn(*other)


def test_a_bank_needs_the_whole_batch_where_its_loss_does():
    assert TwoSidedBankLoss(1, ContrastiveLoss(across="gather")).needs_whole_batch
    assert not TwoSidedBankLoss(1, ContrastiveLoss()).needs_whole_batch and not TwoSidedBankLoss(1).needs_whole_batch


def test_a_bank_of_other_pairs_is_refused():
    loss_fn = TwoSidedBankLoss(4)
    loss_fn(*batch(0, hard=1))
    with pytest.raises(ValueError, match="passage_reps must have 2 for each query"):
        loss_fn(*batch(0, hard=0))
