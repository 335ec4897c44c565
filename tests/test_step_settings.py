"""Steps in the settings that trainers put them: autocast around, inside and off again; CLIP's own temperature."""

import math
from functools import partial

import pytest
import torch
from helpers.oracles import InfoNCE, TinyEncoder, gradients, token_batch, worst_error
from torch import nn

from gclib import ContrastiveLoss, contrastive_loss, grad_cache_step, naive_step, tiled_contrastive_loss

CACHED = partial(grad_cache_step, chunk_size=3)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    return [token_batch(8, 6, generator), token_batch(8, 6, generator)]


class Inside(TinyEncoder):
    """Opens autocast by itself."""

    def forward(self, **given):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(**given).float()


class Projected(nn.Module):
    """A projection in the loss that is one of the encoder's layers."""

    def __init__(self, shared):
        super().__init__()
        self.shared, self.inner = shared, InfoNCE()

    def forward(self, queries, passages):
        return self.inner(self.shared(queries), self.shared(passages))


@pytest.mark.parametrize("retain", [0, 2])
@pytest.mark.parametrize("where", ["outside", "inside", "off again inside", "outside, a weight shared with the loss"])
def test_autocast_wherever_it_stands(where, retain, inputs):
    torch.manual_seed(0)
    encoder = Inside() if where == "inside" else TinyEncoder()
    loss_fn = Projected(encoder.out) if "shared" in where else InfoNCE()

    def run(step):
        half = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
        with half(enabled=where != "inside"), half(enabled="outside" in where):
            return step([encoder] * 2, inputs, loss_fn)

    truth = gradients([encoder, loss_fn], lambda: run(naive_step))
    found = gradients([encoder, loss_fn], lambda: run(partial(CACHED, retain_chunks=retain)))
    assert all(change.abs().sum() > 0 for change in found[1])
    assert worst_error(found[1], truth[1]) < (2e-5 if where == "off again inside" else 0.05)


class Clip(nn.Module):
    """The loss with CLIP's logit_scale: exponentiated and clamped."""

    def __init__(self, start, loss):
        super().__init__()
        self.logit_scale, self.loss = nn.Parameter(torch.tensor(start)), loss

    def forward(self, queries, passages):
        queries, passages = nn.functional.normalize(queries, dim=-1), nn.functional.normalize(passages, dim=-1)
        return self.loss(queries, passages, temperature=1 / self.logit_scale.exp().clamp(max=100), symmetric=True)


@pytest.mark.parametrize("start", [math.log(1 / 0.07), math.log(100), 6.0, 80.0])
@pytest.mark.parametrize("loss", [contrastive_loss, partial(tiled_contrastive_loss, tile_size=3)])
def test_clips_temperature_at_and_beyond_its_limit(start, loss, inputs):
    encoder, dense, cached = TinyEncoder().double(), Clip(start, contrastive_loss).double(), Clip(start, loss).double()
    truth = gradients([encoder, dense], lambda: naive_step([encoder] * 2, inputs, dense))[1]
    found = gradients([encoder, cached], lambda: CACHED([encoder] * 2, inputs, cached))[1]
    assert worst_error(found, truth) <= 1e-12


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30])
def test_a_tiny_temperature_is_the_same_dense_and_in_tiles(temperature, inputs):
    encoder = TinyEncoder()
    values = [float(CACHED([encoder] * 2, inputs, ContrastiveLoss(temperature, tile_size=tile))) for tile in (None, 3)]
    assert values[0] == pytest.approx(values[1], rel=1e-4) and math.isfinite(values[0])
