"""On a CUDA device: dropout replayed, autocast and GradScaler, and bytes against the allocator. Skipped elsewhere."""

import pytest
import torch
from helpers.oracles import gradients, worst_error

from gclib import ContrastiveLoss, Encoder, forecast_step, grad_cache_step, naive_step, record_memory
from gclib.memory.devices import workspace_bytes
from tests.memory.test_ledger import batch


def on_gpu(given):
    return {name: value.cuda() for name, value in given.items()}


def test_gradient_is_the_naive_one():
    encoder = Encoder.from_config("tiny", vocab_size=500, dropout=0.0).cuda().double()
    loss = ContrastiveLoss(0.1, learnable=True, symmetric=True).cuda().double()
    inputs = [on_gpu(batch(9, 8)), on_gpu(batch(18, 12))]
    truth = gradients([encoder, loss], lambda: naive_step([encoder] * 2, inputs, loss))
    options = {"chunk_size": 4, "retain_chunks": 1}
    found = gradients([encoder, loss], lambda: grad_cache_step([encoder] * 2, inputs, loss, **options))
    assert worst_error(found[1], truth[1]) <= 1e-12


def test_dropout_is_replayed_from_the_device_generator():
    """Retaining every chunk replays nothing: the same seed must then give the same gradient as replaying all."""
    encoder = Encoder.from_config("tiny", vocab_size=500, dropout=0.3).cuda().double()
    inputs, loss = [on_gpu(batch(8, 8)), on_gpu(batch(8, 8))], ContrastiveLoss(0.1)

    def step(retain):
        torch.manual_seed(3)
        return grad_cache_step([encoder] * 2, inputs, loss, chunk_size=4, retain_chunks=retain)

    kept, replayed = gradients([encoder], lambda: step(99)), gradients([encoder], lambda: step(0))
    assert worst_error(replayed[1], kept[1]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_grad_scaler(dtype):
    """A scale that float16 holds: the scaler's own first one overflows by design, and is lowered step by step."""
    encoder = Encoder.from_config("mini", vocab_size=500).cuda()
    inputs, scaler = [on_gpu(batch(8, 8)), on_gpu(batch(8, 8))], torch.amp.GradScaler("cuda", init_scale=64.0)
    optimizer = torch.optim.AdamW(encoder.parameters())
    with torch.autocast("cuda", dtype):
        loss = grad_cache_step([encoder] * 2, inputs, ContrastiveLoss(0.1), chunk_size=3, scaler=scaler)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
    scaler.step(optimizer)
    assert loss.isfinite() and norm.isfinite() and 0 < norm < 1e3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_the_same_in_both_forwards(dtype):
    """Without dropout the cached gradient is the naive one, but for the rounding that autocast itself makes."""
    encoder = Encoder.from_config("mini", vocab_size=500, dropout=0.0).cuda()
    inputs, loss = [on_gpu(batch(12, 16)), on_gpu(batch(12, 16))], ContrastiveLoss(0.1)
    exact = gradients([encoder], lambda: naive_step([encoder] * 2, inputs, loss))[1]

    def error(step, **options):
        with torch.autocast("cuda", dtype):
            return worst_error(gradients([encoder], lambda: step([encoder] * 2, inputs, loss, **options))[1], exact)

    own = error(naive_step)
    assert own > 0 and error(grad_cache_step, chunk_size=5) <= 1.1 * own


@pytest.mark.parametrize("chunk", [8, 32])
def test_bytes_against_the_allocator(chunk):
    """What the allocator was asked for, without the workspaces that it keeps for good; blocks are not counted. An
    operation's own temporaries, which no ledger sees, weigh more the smaller the model.
    """
    encoder, loss = Encoder.from_config("small", vocab_size=8000).cuda(), ContrastiveLoss(0.1)
    inputs = [on_gpu(batch(64, 64)), on_gpu(batch(64, 128))]
    workspace = workspace_bytes(torch.device("cuda"))
    grad_cache_step([encoder] * 2, inputs, loss, chunk_size=chunk, sort_by_length=False)  # plans are made
    encoder.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    grad_cache_step([encoder] * 2, inputs, loss, chunk_size=chunk, sort_by_length=False)
    measured = torch.cuda.memory_stats()["requested_bytes.all.peak"] - workspace
    encoder.zero_grad()
    with record_memory(encoder, loss, device="cuda") as ledger:
        options = {"chunk_size": chunk, "sort_by_length": False}
        grad_cache_step([encoder] * 2, inputs, loss, on_phase=ledger.on_phase, **options)
    shape = {"query_length": 64, "passage_length": 128, "batch_size": 64, "chunk_size": chunk}
    told = forecast_step("grad_cache", config="small", device="cuda", **shape)
    assert ledger.peak_bytes == pytest.approx(measured, rel=0.05)
    assert told.peak_bytes == pytest.approx(ledger.peak_bytes, abs=1024)
