"""SigLIP's loss in tiles and across processes against plain autograd on the whole batch."""

import math
import random

import pytest
import torch
import torch.distributed as dist
from helpers.oracles import gradients, worst_error
from helpers.ranks import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from gclib import grad_cache_step, naive_step
from gclib.losses.masks import HardnessWeight, SameIds
from gclib.losses.sigmoid import SigmoidLoss, sigmoid_loss


def oracle(queries, passages, temperature, bias, mask=None):
    """The formula, pair by pair, from softplus without its threshold."""
    batch, group = len(queries), len(passages) // len(queries)
    z = queries @ passages.T / temperature + bias
    z = torch.where(torch.arange(batch * group) == torch.arange(batch)[:, None] * group, -z, z)
    pairs = torch.logaddexp(z, torch.zeros_like(z))
    return (pairs if mask is None else pairs.masked_fill(mask, 0)).sum() / batch


def leaves_of(batch, hard, dimensions=3, scale=2.0):
    reps = [scale * torch.randn(rows, dimensions, dtype=torch.float64) for rows in (batch, batch * (1 + hard))]
    numbers = [torch.tensor(0.3, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)]
    return [leaf.requires_grad_() for leaf in (*reps, *numbers)]


def ids_and_mask(batch, hard):
    query_ids, passage_ids = torch.arange(batch), torch.randint(0, batch, (batch * (1 + hard),))
    positives = torch.arange(batch) * (1 + hard)
    mask = passage_ids[positives][:, None] == passage_ids
    mask[torch.arange(batch), positives] = False
    return SameIds(query_ids, passage_ids), mask


def both(leaves, loss):
    value = loss(*leaves)
    return [value.detach()], list(torch.autograd.grad(value, leaves))


@given(
    st.integers(0, 2**31), st.integers(1, 12), st.integers(0, 3), st.sampled_from([None, 1, 2, 3, 5, 64]), st.booleans()
)
def test_value_and_gradients_are_the_dense_ones(seed, batch, hard, tile_size, masked):
    torch.manual_seed(seed)
    leaves, (rule, mask) = leaves_of(batch, hard), ids_and_mask(batch, hard)
    truth = both(leaves, lambda q, p, t, b: oracle(q, p, t, b, mask if masked else None))
    for given_mask in (rule, mask) if masked else (None,):
        values = both(
            leaves,
            lambda q, p, t, b, m=given_mask: sigmoid_loss(q, p, temperature=t, bias=b, mask=m, tile_size=tile_size),
        )
        assert worst_error(values[0], truth[0]) <= 1e-12
        assert worst_error(values[1], truth[1]) <= 1e-12


def test_the_paper_s_numbers_by_hand():
    """Two pairs at right angles: z is 10 - 10 = 0 for positives and -10 for the others; divided by B, not by B * B."""
    loss = SigmoidLoss()(torch.eye(2), torch.eye(2))
    assert loss.item() == pytest.approx(math.log(2) + math.log1p(math.exp(-10)), rel=1e-5)
    loss.backward()
    assert SigmoidLoss().temperature.item() == pytest.approx(0.1)


def test_far_logits_keep_their_digits():
    """Beyond 20 a softplus with torch's threshold is off by 2e-9 of float64."""
    leaves = leaves_of(6, 1, scale=9.0)
    truth = both(leaves, oracle)
    values = both(leaves, lambda q, p, t, b: sigmoid_loss(q, p, temperature=t, bias=b, tile_size=4))
    assert worst_error(values[0], truth[0]) <= 1e-12 and worst_error(values[1], truth[1]) <= 1e-12


def across_ranks(here):
    """The largest error over random cases and forms, W times the whole batch's gradient."""
    worst = 0.0
    for number in range(12):
        draw = random.Random(f"{here.world_size}/{number}")
        torch.manual_seed(number)
        rows, hard = [draw.randint(1, 5) for _ in range(here.world_size)], draw.choice([0, 1, 2])
        leaves, (rule, mask) = leaves_of(sum(rows), hard), ids_and_mask(sum(rows), hard)
        masked = draw.random() < 0.5
        value = oracle(*leaves, mask if masked else None)
        truth = torch.autograd.grad(value, leaves)
        own = slice(sum(rows[: here.rank]), sum(rows[: here.rank + 1]))
        mine = slice(own.start * (1 + hard), own.stop * (1 + hard))
        for form in ({"across": "gather"}, {"across": "gather", "tile_size": 2}, {"across": "ring", "tile_size": 3}):
            parts = [part.detach().clone().requires_grad_() for part in (leaves[0][own], leaves[1][mine], *leaves[2:])]
            part = rule[own, mine] if masked else None
            loss = sigmoid_loss(*parts[:2], temperature=parts[2], bias=parts[3], mask=part, **form)
            found = [gradient / here.world_size for gradient in torch.autograd.grad(loss, parts)]
            if here.world_size > 1:
                for shared in found[2:]:
                    dist.all_reduce(shared)
            expected = [truth[0][own], truth[1][mine], *truth[2:]]
            worst = max(worst, worst_error([loss.detach()], [value.detach()]), worst_error(found, expected))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_gathered_and_around_a_ring_it_is_the_whole_batch_s_loss(ranks, tmp_path):
    for worst in run_ranks(across_ranks, ranks, tmp_path):
        assert worst <= 1e-12


@pytest.mark.parametrize("tile_size", [None, 3])
def test_the_cached_step_trains_encoder_temperature_and_bias(tile_size):
    encoder = torch.nn.Linear(5, 4).double()
    inputs = [torch.randn(rows, 5, dtype=torch.float64) for rows in (7, 14)]
    loss_fn = SigmoidLoss(tile_size=tile_size).double()
    modules = [encoder, loss_fn]

    def plain(queries, passages):
        return oracle(queries, passages, loss_fn.temperature, loss_fn.bias)

    truth = gradients(modules, lambda: naive_step([encoder] * 2, inputs, plain))
    loss, changes = gradients(modules, lambda: grad_cache_step([encoder] * 2, inputs, loss_fn, chunk_size=3))
    assert abs(loss - truth[0]) <= 1e-12 * truth[0] and worst_error(changes, truth[1]) <= 1e-12


def test_no_value_is_read_and_half_precision_is_summed_in_float32():
    with FakeTensorMode():
        reps = [torch.empty(20, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
        loss = SigmoidLoss(tile_size=6)(*reps)
        loss.backward()
    assert loss.dtype == torch.float32 and reps[0].grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: SigmoidLoss(0.0), "temperature must be a finite number above 0"),
        (lambda: SigmoidLoss(bias=math.nan), "bias must be a finite number"),
        (lambda: SigmoidLoss(bias="-10"), "bias must be a finite number"),
        (
            lambda: sigmoid_loss(torch.ones(2, 3), torch.ones(2, 3), temperature=1.0, bias=torch.zeros(2)),
            "bias must be a floating point tensor of one element",
        ),
        (
            lambda: sigmoid_loss(torch.ones(2, 3), torch.ones(2, 3), temperature=torch.ones(1, 1, 1), bias=0.0),
            "temperature must be a floating tensor of one element, at most 2 axes",
        ),
        (
            lambda: sigmoid_loss(torch.ones(2, 3), torch.ones(2, 3), temperature=1.0, bias=torch.ones(1, 1, 1)),
            "bias must be a floating point tensor of one element, of at most 2 axes",
        ),
        (
            lambda: sigmoid_loss(torch.ones(2, 3), torch.ones(2, 3), temperature=1.0, bias=0.0, across="gahter"),
            "across must be one of",
        ),
        (lambda: SigmoidLoss(across="ring"), "tile_size must be an int"),
        (lambda: SigmoidLoss(across="all"), "across must be one of"),
        (lambda: SigmoidLoss()(torch.ones(2, 3), torch.ones(3, 3)), "passage_reps must have B"),
        (lambda: SigmoidLoss()(torch.ones(2, 3), torch.ones(2, 3), HardnessWeight(1.0)), "mask must be a rule that"),
        (
            lambda: SigmoidLoss(across="gather")(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 2).bool()),
            "mask must be a rule of gclib.losses.masks",
        ),
    ],
)
def test_bad_arguments_are_refused_in_words(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()
