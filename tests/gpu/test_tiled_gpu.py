"""The tiled loss on a CUDA device gives what it gives on the CPU, in its own dtypes and within its own memory."""

import pytest
import torch
from torch.nn import functional as F

from gclib.losses.tiled import tiled_contrastive_loss

SETTINGS = {"symmetric": True, "tile_size": 96}


def value_and_gradients(device, dtype, batch_size=250, hard=1):
    """One forward and backward of a fixed problem on that device; results on the CPU."""
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(batch_size, 64, generator=generator, dtype=torch.float64), dim=1)
    passages = F.normalize(torch.randn(batch_size * (1 + hard), 64, generator=generator, dtype=torch.float64), dim=1)
    leaves = [reps.to(device, dtype).requires_grad_() for reps in (queries, passages)]
    leaves.append(torch.tensor(0.05, device=device, requires_grad=True))
    mask = torch.rand(batch_size, batch_size * (1 + hard), generator=generator) < 0.1
    mask[torch.arange(batch_size), torch.arange(batch_size) * (1 + hard)] = False
    loss = tiled_contrastive_loss(*leaves[:2], temperature=leaves[2], mask=mask.to(device), **SETTINGS)
    return [value.cpu() for value in (loss.detach(), *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cuda_agrees_with_the_cpu(dtype):
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for found, expected in zip(value_and_gradients("cuda", dtype), value_and_gradients("cpu", dtype), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_autocast_on_cuda_changes_nothing():
    plain = value_and_gradients("cuda", torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        inside = value_and_gradients("cuda", torch.float32)
    for found, expected in zip(inside, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_it_never_waits_for_the_device():
    torch.cuda.set_sync_debug_mode("error")
    try:
        queries = torch.randn(100, 16, device="cuda", requires_grad=True)
        tiled_contrastive_loss(queries, queries.detach(), temperature=0.1, **SETTINGS).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_peak_memory_is_gradients_and_tiles():
    queries, passages = (torch.randn(8192, 64, device="cuda", requires_grad=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tiled_contrastive_loss(queries, passages, temperature=0.1, symmetric=True, tile_size=512).backward()
    extra = torch.cuda.max_memory_allocated() - before
    gradients, logits = 2 * 8192 * 64 * 4, 8192**2 * 4
    assert extra < gradients + logits / 15
