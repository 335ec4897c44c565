"""Poolings against loops over their definitions, whatever stands at padding: `gclib.models.layers`."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gclib import ContrastiveLoss, Encoder, grad_cache_step
from gclib.models.layers import TOKEN_POOLINGS, Dense, pool

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0]])


def by_definition(tokens, mask, pooling):
    """One row's vector, from its unmasked tokens and their places."""
    columns = mask.nonzero().flatten()
    rows, places = tokens[columns], (columns - columns[0] + 1).to(tokens.dtype).unsqueeze(1)
    return {
        "mean": lambda: rows.mean(0),
        "cls": lambda: rows[0],
        "last": lambda: rows[-1],
        "max_tokens": lambda: rows.max(0).values,
        "mean_sqrt": lambda: rows.sum(0) / len(rows) ** 0.5,
        "weighted_mean": lambda: (rows * places).sum(0) / places.sum(),
    }[pooling]()


@pytest.mark.parametrize("padding", [0.0, 7.0, float("nan"), float("inf")])
@pytest.mark.parametrize("pooling", TOKEN_POOLINGS)
def test_a_pooling_is_its_definition_and_padding_does_not_matter(pooling, padding):
    tokens = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([by_definition(row, mask, pooling) for row, mask in zip(tokens, MASK, strict=True)])
    leaf = tokens.masked_fill(MASK.unsqueeze(-1) == 0, padding).requires_grad_()
    torch.testing.assert_close(pool(leaf, MASK, pooling), expected, rtol=0, atol=1e-14)
    pool(leaf, MASK, pooling).sum().backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[MASK == 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_mean_and_its_gradient_are_those_of_a_plain_product_bit_for_bit(autocast, dtype):
    tokens, results = torch.randn(4, 5, 3, dtype=dtype), []
    weights = MASK.to(dtype) / MASK.sum(dim=1, keepdim=True)
    for call in (lambda t: pool(t, MASK, "mean"), lambda t: (weights.unsqueeze(1) @ t).squeeze(1)):
        leaf = tokens.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            reps = call(leaf)
        (reps.to(dtype) ** 2).sum().backward()
        results.append((reps, leaf.grad))
    (ours, gradient), (plain, expected) = results
    assert ours.dtype == plain.dtype and torch.equal(ours, plain) and torch.equal(gradient, expected)


def test_several_poolings_stand_behind_one_another():
    tokens = torch.randn(4, 5, 3)
    both = pool(tokens, MASK, ("last", "mean"))
    torch.testing.assert_close(both, torch.cat([pool(tokens, MASK, "last"), pool(tokens, MASK, "mean")], dim=1))


class NanAtPadding(nn.Module):
    """A model whose padding is NaN, as that of fully masked windows is on some cards."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 8)

    def forward(self, input_ids, attention_mask):
        tokens = self.embed(input_ids).masked_fill(attention_mask.unsqueeze(-1) == 0, float("nan"))
        return SimpleNamespace(last_hidden_state=tokens)


@pytest.mark.parametrize("pooling", TOKEN_POOLINGS)
def test_a_step_of_a_model_with_nan_at_padding_is_finite(pooling):
    encoder = Encoder(NanAtPadding(), pooling=pooling)
    inputs = {"input_ids": torch.randint(1, 60, (4, 5)), "attention_mask": MASK}
    loss = grad_cache_step([encoder] * 2, [inputs] * 2, ContrastiveLoss(0.1), chunk_size=2)
    assert loss.isfinite() and encoder.model.embed.weight.grad.isfinite().all()


def test_layers_behind_the_pooling_come_before_the_normalization():
    dense = Dense(8, 3, activation=nn.Tanh())
    encoder = Encoder(NanAtPadding(), head=[dense])
    inputs = {"input_ids": torch.randint(1, 60, (4, 5)), "attention_mask": MASK}
    bare = Encoder(encoder.model, normalize=False)
    expected = nn.functional.normalize(torch.tanh(dense.linear(bare(**inputs))), dim=1)
    torch.testing.assert_close(encoder(**inputs), expected)
    assert "Dense 8 -> 3" in encoder.in_words()


@pytest.mark.parametrize("pooling", ["max", "", ("mean", "own"), (), ("mean", "median")])
def test_a_pooling_that_is_none_is_refused(pooling):
    with pytest.raises(ValueError, match="pooling must be one of"):
        Encoder(NanAtPadding(), pooling=pooling)


def test_layers_that_no_folder_can_keep_are_refused():
    with pytest.raises(ValueError, match="head must hold layers of Dense, Norm, UnitLength, Dropout, got 'Linear'"):
        Encoder(NanAtPadding(), head=[nn.Linear(8, 8)])
    for activation in (nn.GELU("tanh"), nn.LeakyReLU(0.3), nn.Softmax(dim=1), nn.Threshold(0.1, 20), NanAtPadding()):
        with pytest.raises(ValueError, match="head must hold activations of torch.nn with their defaults"):
            Encoder(NanAtPadding(), head=[Dense(8, 8, activation=activation)])
    Encoder(NanAtPadding(), head=[Dense(8, 8, activation=nn.ReLU(inplace=True)), Dense(8, 8, activation=nn.PReLU())])
    Encoder(NanAtPadding(), head=[Dense(8, 8, activation=nn.LeakyReLU(inplace=True))])


def test_a_model_that_shortens_its_rows_is_refused():
    class Short(NanAtPadding):
        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(last_hidden_state=self.embed(input_ids[:, ::2]))

    with pytest.raises(ValueError, match="must give one vector a token to be pooled"):
        Encoder(Short())(torch.ones(4, 5, dtype=torch.long), MASK)
