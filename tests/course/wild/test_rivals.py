"""The official GradCache and sentence-transformers, run as they are, give gclib's gradients: float64, no dropout."""

import pytest
import torch
from helpers.oracles import gradients, token_batch, worst_error
from helpers.rivals import (
    Counted,
    flops_of,
    official_step,
    open_clip_loss,
    sentence_transformers_step,
    sentence_transformers_strips,
    sort_and_trim,
    sorted_loss,
    split_trimmed,
)

from gclib import ContrastiveLoss, Encoder, grad_cache_step, naive_step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("gradcache")
    pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    return Encoder.from_config("tiny", dropout=0.0).double()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    return token_batch(13, 9, generator), token_batch(13, 17, generator)


def held_together(encoder, batch, ours, theirs):
    """Our gradient and theirs against the naive step's, every parameter after one SGD step with lr=1."""
    loss_fn = ContrastiveLoss(0.05)
    truth = gradients([encoder], lambda: naive_step([encoder, encoder], batch, loss_fn))
    for step in (ours, theirs):
        value, found = gradients([encoder], step)
        assert value.item() == pytest.approx(truth[0].item(), rel=1e-12)
        assert worst_error(found, truth[1]) <= 1e-12


@pytest.mark.parametrize("size", [1, 4, 13])
def test_the_official_grad_cache_gives_our_gradient(encoder, batch, size):
    both, loss_fn = [encoder, encoder], ContrastiveLoss(0.05)
    held_together(
        encoder,
        batch,
        lambda: grad_cache_step(both, batch, loss_fn, chunk_size=size),
        lambda: official_step(both, batch, loss_fn, chunk_size=size),
    )


@pytest.mark.parametrize("size", [1, 4, 13])
@pytest.mark.parametrize("symmetric", [False, True])
def test_sentence_transformers_gives_our_gradient(encoder, batch, size, symmetric):
    both, loss_fn = [encoder, encoder], ContrastiveLoss(0.05, symmetric=symmetric)
    truth = gradients([encoder], lambda: grad_cache_step(both, batch, loss_fn, chunk_size=size))
    step = lambda: sentence_transformers_step(encoder, batch, chunk_size=size, symmetric=symmetric)  # noqa: E731
    value, found = gradients([encoder], step)
    assert value.item() == pytest.approx(truth[0].item(), rel=1e-12)
    assert worst_error(found, truth[1]) <= 1e-12


def test_the_benchmark_pre_sorts_without_changing_the_gradient(encoder, batch):
    apart, both = [sort_and_trim(inputs) for inputs in batch], [encoder, encoder]
    loss_fn = sorted_loss(*batch, ContrastiveLoss(0.05))
    held_together(
        encoder,
        batch,
        lambda: grad_cache_step(both, apart, loss_fn, chunk_size=4),
        lambda: official_step(both, apart, loss_fn, chunk_size=4, split_input_fn=split_trimmed),
    )


def test_sorting_encodes_fewer_tokens_and_takes_fewer_flops(encoder, batch):
    counted, loss_fn = Counted(encoder), ContrastiveLoss(0.05)
    seen = {}
    for name, step in (
        ("official", lambda: official_step([counted, counted], batch, loss_fn, chunk_size=4)),
        ("gclib", lambda: grad_cache_step([counted, counted], batch, loss_fn, chunk_size=4)),
    ):
        counted.rows = counted.tokens = 0
        seen[name] = (flops_of(step), counted.rows, counted.tokens)
    assert seen["official"][1] == seen["gclib"][1] == 2 * 26
    assert seen["gclib"][2] < seen["official"][2] == 2 * 13 * (9 + 17)
    assert seen["gclib"][0] < seen["official"][0]


@pytest.mark.parametrize("rows", [1, 4, 13])
def test_the_public_losses_of_the_benchmark_are_the_symmetric_loss(rows):
    pytest.importorskip("sentence_transformers")
    reps = [torch.randn(13, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    truth = ContrastiveLoss(0.2, symmetric=True)(*reps)
    expected = torch.autograd.grad(truth, reps)
    dense = open_clip_loss(*reps, 0.2)
    strips = sentence_transformers_strips(*reps, rows=rows, temperature=0.2)
    for loss in (dense, strips):
        torch.testing.assert_close(loss.detach(), truth.detach())
    for wanted, of_dense, rep in zip(expected, torch.autograd.grad(dense, reps), reps, strict=True):
        torch.testing.assert_close(of_dense, wanted)
        torch.testing.assert_close(rep.grad, wanted)
