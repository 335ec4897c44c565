"""The dense loss against the formula, written out with plain Python loops."""

import math

import pytest
import torch
from helpers.rivals import open_clip_loss

from gclib import ContrastiveLoss, contrastive_loss


def by_hand(queries, passages, temperature, symmetric=False, mask=None):
    """Equation (1) of Gao et al. 2021, number by number."""
    batch, total = len(queries), len(passages)
    group = total // batch
    z = [[float(q @ p) / temperature for p in passages] for q in queries]
    kept = [[mask is None or not bool(mask[i, j]) for j in range(total)] for i in range(batch)]
    loss = 0.0
    for i in range(batch):
        loss += math.log(sum(math.exp(z[i][j]) for j in range(total) if kept[i][j])) - z[i][i * group]
    if symmetric:
        for j in range(batch):
            column = j * group
            loss += math.log(sum(math.exp(z[i][column]) for i in range(batch) if kept[i][column])) - z[j][column]
    return loss / batch / (2 if symmetric else 1)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_is_the_formula(negatives, symmetric, masked):
    batch, total = 5, 5 * (1 + negatives)
    queries, passages = torch.randn(batch, 4).double(), torch.randn(total, 4).double()
    mask = torch.rand(batch, total) < 0.3 if masked else None
    if masked:
        mask[torch.arange(batch), torch.arange(batch) * (1 + negatives)] = False
    loss = contrastive_loss(queries, passages, temperature=0.5, symmetric=symmetric, mask=mask)
    assert loss.item() == pytest.approx(by_hand(queries, passages, 0.5, symmetric, mask), rel=1e-12)


def test_one_pair_alone_has_nothing_to_tell_apart():
    assert contrastive_loss(torch.randn(1, 3), torch.randn(1, 3), temperature=0.1).item() == pytest.approx(0)


def test_equal_logits_give_log_n():
    loss = contrastive_loss(torch.ones(4, 3), torch.ones(8, 3), temperature=0.05)
    assert loss.item() == pytest.approx(math.log(8), rel=1e-6)


def test_an_excluded_positive_is_an_infinite_loss():
    mask = torch.eye(3, dtype=torch.bool)
    assert contrastive_loss(torch.randn(3, 2), torch.randn(3, 2), temperature=1.0, mask=mask).isinf()


def test_module_owns_its_temperature_only_if_learnable():
    fixed, learnable = ContrastiveLoss(0.07), ContrastiveLoss(0.07, learnable=True)
    queries, passages = torch.randn(4, 8), torch.randn(4, 8)
    assert list(fixed.parameters()) == []
    assert len(list(learnable.parameters())) == 1
    assert learnable.temperature.item() == pytest.approx(0.07)
    assert learnable(queries, passages).item() == pytest.approx(fixed(queries, passages).item(), rel=1e-5)


def test_gradient_of_the_temperature():
    loss = ContrastiveLoss(0.3, learnable=True).double()
    queries, passages = torch.randn(4, 8).double(), torch.randn(4, 8).double()
    loss(queries, passages).backward()
    up, down = (by_hand(queries, passages, 0.3 * math.exp(step)) for step in (1e-6, -1e-6))
    assert loss.log_temperature.grad.item() == pytest.approx((up - down) / 2e-6, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"query_reps": torch.randn(0, 3)}, "query_reps"),
        ({"query_reps": [[1.0]]}, "query_reps"),
        ({"query_reps": torch.ones(4, 3, dtype=torch.long)}, "query_reps"),
        ({"query_reps": torch.randn(4, 3).double()}, "passage_reps must have query_reps' dtype"),
        ({"passage_reps": torch.randn(4, 5)}, "passage_reps must have query_reps' 3 dimensions"),
        ({"passage_reps": torch.randn(6, 3)}, r"passage_reps must have B \* \(1 \+ K\) rows"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": torch.ones(2)}, "temperature"),
        ({"mask": torch.zeros(4, 3, dtype=torch.bool)}, "mask"),
        ({"mask": torch.zeros(4, 4)}, "mask"),
        ({"mask": "none"}, "mask"),
        ({"passage_reps": torch.randn(4, 3, device="meta")}, "passage_reps must have query_reps' device"),
    ],
)
def test_bad_input_is_refused_in_words(change, names):
    given = {"query_reps": torch.randn(4, 3), "passage_reps": torch.randn(4, 3), "temperature": 0.1} | change
    with pytest.raises(ValueError, match=names):
        contrastive_loss(**given)


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), 0, -0.05, None, True])
def test_module_refuses_a_temperature_that_cannot_be(temperature):
    with pytest.raises(ValueError, match="temperature"):
        ContrastiveLoss(temperature)


@pytest.mark.parametrize("symmetric", [False, True])
def test_tiles_give_the_same_loss_and_gradients(symmetric):
    queries, passages = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (7, 14))
    mask = torch.zeros(7, 14, dtype=torch.bool)
    mask[0, 1] = mask[3, 2] = True
    found = []
    for tile_size in (None, 3):
        loss = ContrastiveLoss(0.2, learnable=True, symmetric=symmetric, tile_size=tile_size).double()
        value = loss(queries, passages, mask)
        found.append([value, *torch.autograd.grad(value, [queries, passages, loss.log_temperature])])
    for tiled, dense in zip(*found, strict=True):
        torch.testing.assert_close(tiled, dense, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tile_size", [0, -1, 2.5, "big", True])
def test_module_refuses_a_tile_that_cannot_be(tile_size):
    with pytest.raises(ValueError, match="tile_size"):
        ContrastiveLoss(tile_size=tile_size)


def test_the_rival_of_the_benchmarks_computes_the_same_loss_and_gradient():
    results = []
    for loss_of in (contrastive_loss, open_clip_loss):
        torch.manual_seed(0)
        batch = [torch.randn(7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        options = {"symmetric": True} if loss_of is contrastive_loss else {}
        loss = loss_of(*batch, temperature=0.3, **options)
        results.append([loss, *torch.autograd.grad(loss, batch)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
