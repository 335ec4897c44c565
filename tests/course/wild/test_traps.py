"""The sharp edges of public code, one named test each: the trap, written small, fails what gclib's step passes.

Every error is measured on absolute gradients (after an SGD step with lr=1), never on directions alone: Adam would hide
a wrong scale. The traps are described in chapter 11. That of several processes, the lost factor W, is in
test_distributed.py, with real ranks.
"""

from functools import partial

import pytest
import torch
from helpers.oracles import InfoNCE, TinyEncoder, gradients, token_batch, unique_parameters, worst_error
from torch import Tensor, nn
from torch.nn import functional as F

from gclib import ContrastiveLoss, grad_cache_step, tiled_contrastive_loss
from gclib.chunks import Chunk
from gclib.randomness import RandomState

ROWS, SIZE = 7, 3  # 7 = 3 + 3 + 1: the last chunk is short


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    return token_batch(ROWS, 6, generator), token_batch(ROWS, 6, generator)


@pytest.fixture
def encoder():
    torch.manual_seed(1)
    return TinyEncoder().double()


def whole_batch(encoder, batch, loss_fn):
    """The oracle: everything encoded with its graph, one backward."""
    loss = loss_fn(*(encoder(**inputs) for inputs in batch))
    loss.backward()
    return loss


def slices(batch, sizes=None):
    """Each tower's rows in file order, in chunks of `SIZE` or of the sizes given."""
    return [
        [dict(zip(t, parts, strict=True)) for parts in zip(*(v.split(sizes or SIZE) for v in t.values()), strict=True)]
        for t in batch
    ]


def cached(encoder, batch, loss_fn, *, sizes=None, resplit=None, scale=1.0):
    """A gradient cache in ten lines, with places to go wrong: how the cache is split again, and a factor on it."""
    chunks = slices(batch, sizes)
    with torch.no_grad():
        reps = [torch.cat([encoder(**chunk) for chunk in tower]) for tower in chunks]
    leaves = [rep.requires_grad_() for rep in reps]
    loss = loss_fn(*leaves)
    loss.backward()
    for tower, leaf in zip(chunks, leaves, strict=True):
        for chunk, part in zip(tower, leaf.grad.split(resplit or sizes or SIZE), strict=False):
            reps = encoder(**chunk)[: len(part)]
            (scale * reps * part[: len(reps)]).sum().backward()
    return loss


def error_of(step, encoder, batch, loss_fn, truth_loss=None):
    """The step's worst parameter error against plain autograd."""
    modules = [encoder, *([loss_fn] if isinstance(loss_fn, nn.Module) else [])]
    truth = gradients(modules, lambda: whole_batch(encoder, batch, truth_loss or loss_fn))
    return worst_error(gradients(modules, step)[1], truth[1])


def test_the_ten_lines_are_right_when_nothing_is_broken(encoder, batch):
    loss_fn = InfoNCE().double()
    assert error_of(lambda: cached(encoder, batch, loss_fn), encoder, batch, loss_fn) <= 1e-12


def test_random_states_of_every_device_of_the_inputs_are_recorded(encoder, batch, monkeypatch):
    """GradCache's functional decorators record the state without the inputs: a GPU's dropout is not replayed."""
    seen = []
    record = RandomState.record.__func__

    def watch(cls, tensors):
        tensors = list(tensors)
        seen.append({id(tensor) for tensor in tensors})
        return record(cls, tensors)

    monkeypatch.setattr(RandomState, "record", classmethod(watch))
    grad_cache_step([encoder, encoder], batch, InfoNCE().double(), chunk_size=SIZE)
    given = {id(tensor) for inputs in batch for tensor in inputs.values()}
    weights = {id(parameter) for parameter in encoder.parameters()}
    of_towers = [{id(tensor) for tensor in inputs.values()} | weights for inputs in batch]
    assert all(any(tower <= told for tower in of_towers) for told in seen)  # never without its inputs and weights
    assert any(given <= told for told in seen)  # what is put back in the end covers every tower


def test_the_cache_is_split_by_real_chunk_lengths(encoder, batch):
    """GradCache splits the inputs with the caller's function, and the cache by the nominal size."""
    loss_fn, sizes = InfoNCE().double(), [2, 4, 1]
    trap = partial(cached, encoder, batch, loss_fn, sizes=sizes, resplit=SIZE)
    assert error_of(trap, encoder, batch, loss_fn) > 0.05
    starts = [0, 2, 6]
    plan = [[Chunk(tuple(range(s, s + n)), 6) for s, n in zip(starts, sizes, strict=True)]] * 2
    ours = partial(grad_cache_step, [encoder, encoder], batch, loss_fn, plan=plan)
    assert error_of(ours, encoder, batch, loss_fn) <= 1e-12


def test_a_learnable_temperature_gets_its_gradient_once(encoder, batch):
    """open_clip's --accum-freq backpropagates the whole loss for every chunk: n times the temperature's gradient."""
    loss_fn = InfoNCE().double()

    def trap():
        chunks = slices(batch)
        with torch.no_grad():
            reps = [[encoder(**chunk) for chunk in tower] for tower in chunks]
        for number in range(len(chunks[0])):
            parts = [list(tower) for tower in reps]
            for tower in (0, 1):
                parts[tower][number] = encoder(**chunks[tower][number])
            loss = loss_fn(*(torch.cat(part) for part in parts))
            loss.backward()
        return loss

    modules = [encoder, loss_fn]
    truth = gradients(modules, lambda: whole_batch(encoder, batch, loss_fn))[1]
    place = [id(p) for p in unique_parameters(*modules)].index(id(loss_fn.temperature))
    wrong = gradients(modules, trap)[1]
    assert wrong[place].item() == pytest.approx(3 * truth[place].item(), rel=1e-9)  # 3 chunks
    right = gradients(modules, lambda: grad_cache_step([encoder, encoder], batch, loss_fn, chunk_size=SIZE))[1]
    assert right[place].item() == pytest.approx(truth[place].item(), rel=1e-12)


def test_dropout_is_replayed(batch):
    """open_clip's second forward draws other dropout masks than the first: another function is differentiated."""
    torch.manual_seed(2)
    encoder, loss_fn = TinyEncoder(0.5).double(), InfoNCE().double()
    plan = [Chunk(tuple(range(start, min(start + SIZE, ROWS))), 6) for start in range(0, ROWS, SIZE)]

    def kept_graphs():
        torch.manual_seed(5)
        reps = [torch.cat([encoder(**chunk) for chunk in tower]) for tower in slices(batch)]
        loss = loss_fn(*reps)
        loss.backward()
        return loss

    def seeded(step):
        torch.manual_seed(5)
        return step()

    truth = gradients([encoder, loss_fn], kept_graphs)[1]
    trap = gradients([encoder, loss_fn], lambda: seeded(lambda: cached(encoder, batch, loss_fn)))[1]
    assert worst_error(trap, truth) > 0.05
    step = partial(grad_cache_step, [encoder, encoder], batch, loss_fn, plan=[plan, plan])
    ours = gradients([encoder, loss_fn], lambda: seeded(step))[1]
    assert worst_error(ours, truth) <= 1e-12


def test_the_gradient_has_the_right_size_and_not_only_its_direction(encoder, batch):
    """PyLate's cached loss sums and then divides a detached value: gradients B times too large, hidden by Adam."""
    loss_fn = InfoNCE(learnable=False).double()
    trap = partial(cached, encoder, batch, loss_fn, scale=float(ROWS))
    truth = gradients([encoder], lambda: whole_batch(encoder, batch, loss_fn))[1]
    wrong = gradients([encoder], trap)[1]
    cosine = F.cosine_similarity(
        torch.cat([g.flatten() for g in wrong]), torch.cat([g.flatten() for g in truth]), dim=0
    )
    assert cosine.item() == pytest.approx(1)  # a test of directions would pass it
    assert worst_error(wrong, truth) == pytest.approx(ROWS - 1)
    ours = partial(grad_cache_step, [encoder, encoder], batch, loss_fn, chunk_size=SIZE)
    assert error_of(ours, encoder, batch, loss_fn) <= 1e-12


def test_the_temperature_is_part_of_the_one_loss(encoder, batch):
    """tevatron's --grad_cache path left the temperature out: another loss was trained."""
    temperature = 0.1
    unit = lambda **inputs: F.normalize(encoder(**inputs), dim=-1)  # noqa: E731
    loss_fn = ContrastiveLoss(temperature).double()

    def formula(queries: Tensor, passages: Tensor) -> Tensor:
        logits = queries @ passages.T / temperature
        return (logits.logsumexp(dim=1) - logits.diagonal()).mean()

    truth = gradients([encoder], lambda: whole_batch(unit, batch, formula))[1]
    trap = gradients([encoder], lambda: cached(unit, batch, ContrastiveLoss(1.0)))[1]
    assert worst_error(trap, truth) > 0.05
    ours = gradients([encoder], lambda: grad_cache_step([unit, unit], batch, loss_fn, chunk_size=SIZE))[1]
    assert worst_error(ours, truth) <= 1e-12


class Watching(nn.Module):
    """A linear encoder that notes in which precision each of its forwards ran."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(8, 4), []

    def forward(self, rows: Tensor) -> Tensor:
        reps = self.linear(rows)
        self.seen.append((torch.is_grad_enabled(), reps.dtype))
        return reps.float()


def test_both_forwards_run_under_the_same_autocast():
    """A replay from a backward hook runs where ambient autocast has ended: a float32 replay of a bf16 forward."""
    torch.manual_seed(0)
    encoder, inputs = Watching(), [torch.randn(6, 8), torch.randn(6, 8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reps = encoder(inputs[0])
    encoder(inputs[0])  # the trap: the same call, once the context is left
    assert [dtype for _, dtype in encoder.seen] == [torch.bfloat16, torch.float32] and reps.requires_grad
    encoder.seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grad_cache_step([encoder, encoder], inputs, ContrastiveLoss(0.1), chunk_size=2, verify="never")
    assert encoder.seen == [(False, torch.bfloat16)] * 6 + [(True, torch.bfloat16)] * 6


def test_large_logits_do_not_overflow():
    """Inf-CL's ring merges with log(exp(x)): at scale 100 and beyond a float32 exponential overflows."""
    torch.manual_seed(0)
    queries, passages = torch.randn(9, 4), torch.randn(9, 4)
    logits = queries @ passages.T / 0.01
    assert torch.isinf(logits.exp().sum(dim=1).log()).any()  # the trap
    found = tiled_contrastive_loss(queries, passages, temperature=0.01, tile_size=2)
    exact = logits.double()
    truth = (exact.logsumexp(dim=1) - exact.diagonal()).mean()
    assert found.item() == pytest.approx(truth.item(), rel=1e-5)


@pytest.mark.parametrize("rows", [63, 64, 65, 127, 129])
def test_ragged_tiles_read_nothing_that_is_not_there(rows):
    """Inf-CL's kernel masks a tile without its start: it reads out of bounds when B is not a multiple of 64."""
    torch.manual_seed(0)
    queries, passages = torch.randn(rows, 4).double().requires_grad_(), torch.randn(rows, 4).double().requires_grad_()
    logits = queries @ passages.T / 0.5
    truth = (logits.logsumexp(dim=1) - logits.diagonal()).mean()
    expected = torch.autograd.grad(truth, [queries, passages])
    found = tiled_contrastive_loss(queries, passages, temperature=0.5, tile_size=64)
    assert found.item() == pytest.approx(truth.item(), rel=1e-12)
    for got, wanted in zip(torch.autograd.grad(found, [queries, passages]), expected, strict=True):
        assert (got - wanted).norm() <= 1e-12 * wanted.norm()


def test_batch_norm_is_refused():
    """Everywhere else BatchNorm silently uses a chunk's statistics, and updates its running averages twice."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    rows = torch.randn(8, 4)
    encoder(rows)
    once = encoder[1].num_batches_tracked.item()
    for part in (*rows.split(4), *rows.split(4)):
        encoder(part)  # the trap: two chunks, two forwards
    assert encoder[1].num_batches_tracked.item() == once + 4
    with pytest.raises(ValueError, match="BatchNorm in training mode"):
        grad_cache_step([encoder, encoder], [rows, rows], ContrastiveLoss(0.1), chunk_size=4)
