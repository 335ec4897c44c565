"""Nested representations: the loss is the sum over prefixes, and every step takes it."""

from functools import partial

import pytest
import torch
from helpers.oracles import TinyEncoder, gradients, token_batch, worst_error
from torch.nn import functional as F

from gclib import ContrastiveLoss, grad_cache_step, naive_step
from gclib.losses.matryoshka import MatryoshkaLoss


def test_it_is_the_sum_over_unit_prefixes():
    reps = [torch.randn(6, 8, dtype=torch.float64) for _ in range(2)]
    found = MatryoshkaLoss(ContrastiveLoss(0.2), (2, 5, 8))(*reps)
    expected = 0
    for dim in (2, 5, 8):
        logits = F.normalize(reps[0][:, :dim], dim=1) @ F.normalize(reps[1][:, :dim], dim=1).T / 0.2
        expected = expected + (logits.logsumexp(dim=1) - logits.diagonal()).mean()
    torch.testing.assert_close(found, expected)


def test_the_cached_step_gives_its_gradient_and_the_temperatures_once():
    generator = torch.Generator().manual_seed(0)
    batch = token_batch(7, 6, generator), token_batch(7, 6, generator)
    encoder = TinyEncoder().double()
    loss_fn = MatryoshkaLoss(ContrastiveLoss(0.1, learnable=True), (2, 5)).double()
    both, mask = [encoder, encoder], torch.zeros(7, 7, dtype=torch.bool)
    mask[0, 3] = True
    truth = gradients([encoder, loss_fn], partial(naive_step, both, batch, loss_fn, mask=mask))
    found = gradients([encoder, loss_fn], partial(grad_cache_step, both, batch, loss_fn, chunk_size=3, mask=mask))
    assert worst_error(found[1], truth[1]) <= 1e-12


@pytest.mark.parametrize("dims", [(), (0,), (2.5,), (9,), 8, "8", None])
def test_dims_that_cannot_be_are_refused(dims):
    with pytest.raises(ValueError, match="dims must"):
        MatryoshkaLoss(ContrastiveLoss(0.1), dims)(torch.randn(4, 8), torch.randn(4, 8))


def test_it_needs_the_whole_batch_where_its_loss_does():
    assert MatryoshkaLoss(ContrastiveLoss(across="gather"), [2]).needs_whole_batch
    assert not MatryoshkaLoss(ContrastiveLoss(), [2]).needs_whole_batch
