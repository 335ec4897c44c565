"""The step with a deep distance against plain autograd that keeps every graph."""

from functools import partial

import pytest
import torch
from helpers.oracles import TinyEncoder, gradients, token_batch, worst_error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gclib.chunks import plan_chunks
from gclib.distance import distance_cache_step


class Scorer(nn.Module):
    """A network over each pair: [q, p, q * p] -> hidden, dropout -> a number."""

    def __init__(self, width=5, hidden=7, dropout=0.0):
        super().__init__()
        self.hidden = nn.Linear(3 * width, hidden)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, 1)
        self.pairs = []

    def forward(self, queries, passages):
        shape = len(queries), len(passages), queries.shape[1]
        self.pairs.append(shape[:2])
        left, right = queries[:, None].expand(shape), passages[None].expand(shape)
        return self.out(self.drop(torch.tanh(self.hidden(torch.cat([left, right, left * right], -1))))).squeeze(-1)


class RankLoss(nn.Module):
    """Cross entropy over distances with a temperature of its own: no matrix product in it."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, distances):
        group = distances.shape[1] // distances.shape[0]
        labels = torch.arange(len(distances)) * group
        return nn.functional.cross_entropy(-distances / self.temperature, labels)


def rows_of(batch, rows, width):
    return {name: tensor[list(rows), :width] for name, tensor in batch.items()}


def kept_graphs(encoders, distance, inputs, loss, sizes):
    """The same chunks and blocks in the same order, every graph kept, plain backward."""
    reps = []
    for encoder, batch, size in zip(encoders, inputs, sizes, strict=True):
        mask = batch["attention_mask"]
        lengths = [max(1, 1 + int(row.nonzero().max())) for row in mask]
        plan = plan_chunks(lengths, chunk_size=size)
        parts = torch.cat([encoder(**rows_of(batch, chunk.rows, chunk.width)) for chunk in plan])
        order = [row for chunk in plan for row in chunk.rows]
        reps.append(parts[torch.tensor(order).argsort()])
    queries, passages = (rep.split(size) for rep, size in zip(reps, sizes, strict=True))
    value = loss(torch.cat([torch.cat([distance(q, p) for p in passages], 1) for q in queries]))
    value.backward()
    return value


def whole_batch(encoders, distance, inputs, loss):
    value = loss(distance(*(encoder(**batch) for encoder, batch in zip(encoders, inputs, strict=True))))
    value.backward()
    return value


def make_case(seed, batch_size=6, hard=1, tied=False, dropout=0.0):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    first = TinyEncoder(dropout).double()
    encoders = [first, first if tied else TinyEncoder(dropout).double()]
    inputs = [token_batch(batch_size, 6, generator), token_batch(batch_size * (1 + hard), 8, generator)]
    return encoders, Scorer(dropout=dropout).double(), inputs, RankLoss().double()


@st.composite
def cases(draw):
    sizes = [draw(st.integers(1, 9)), draw(st.integers(1, 9))]
    tied = draw(st.booleans())
    return make_case(draw(st.integers(0, 2**31)), draw(st.integers(1, 7)), draw(st.integers(0, 2)), tied), sizes


@pytest.mark.slow
@given(cases())
def test_it_gives_the_gradient_of_plain_autograd(case):
    (encoders, distance, inputs, loss), sizes = case
    modules = [*encoders, distance, loss]
    truth = gradients(modules, lambda: whole_batch(encoders, distance, inputs, loss))
    plain = gradients(modules, lambda: kept_graphs(encoders, distance, inputs, loss, sizes))
    cached = gradients(modules, lambda: distance_cache_step(encoders, distance, inputs, loss, chunk_size=sizes))
    torch.testing.assert_close(cached[0], truth[0], rtol=1e-12, atol=1e-14)
    # Plain autograd over the same blocks is off by its own rounding, 1.2e-12 where the whole gradient is small.
    assert worst_error(cached[1], truth[1]) <= max(1e-12, 2 * worst_error(plain[1], truth[1]))
    assert worst_error(cached[1], plain[1]) <= 1e-12


@pytest.mark.slow
@given(cases(), st.integers(0, 2**31))
def test_dropout_of_encoders_and_distance_is_replayed(case, seed):
    (encoders, distance, inputs, loss), sizes = case
    modules = [*encoders, distance, loss]
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.4
    torch.manual_seed(seed)
    truth = gradients(modules, lambda: kept_graphs(encoders, distance, inputs, loss, sizes))
    after = torch.rand(())
    torch.manual_seed(seed)
    found = gradients(modules, lambda: distance_cache_step(encoders, distance, inputs, loss, chunk_size=sizes))
    assert torch.equal(torch.rand(()), after)
    torch.testing.assert_close(found[0], truth[0], rtol=1e-12, atol=1e-14)
    assert worst_error(found[1], truth[1]) <= 1e-12


def test_without_replay_of_the_distance_dropout_the_gradient_is_wrong(monkeypatch):
    """The oracle can tell: with the distance's masks drawn afresh, its parameters' gradient is far off."""
    from contextlib import nullcontext

    from gclib.randomness import RandomState

    encoders, distance, inputs, loss = make_case(3, dropout=0.4)
    modules = [distance]
    torch.manual_seed(0)
    truth = gradients(modules, lambda: kept_graphs(encoders, distance, inputs, loss, [2, 4]))
    monkeypatch.setattr(RandomState, "replay", lambda state: nullcontext())
    torch.manual_seed(0)
    step = partial(distance_cache_step, encoders, distance, inputs, loss, chunk_size=[2, 4])
    found = gradients(modules, lambda: step(verify="never"))
    assert worst_error(found[1], truth[1]) > 1e-2
    with pytest.raises(ValueError, match="distance must return the second time"):
        step()


def test_every_pair_is_scored_twice_in_blocks_of_the_chunk_sizes():
    encoders, distance, inputs, loss = make_case(0, batch_size=5, hard=1)
    distance_cache_step(encoders, distance, inputs, loss, chunk_size=[2, 4])
    once = [(2, 4), (2, 4), (2, 2), (2, 4), (2, 4), (2, 2), (1, 4), (1, 4), (1, 2)]
    assert distance.pairs == once + once


def test_phases_name_the_blocks_and_raising_leaves_the_generators_as_they_were():
    encoders, distance, inputs, loss = make_case(0, batch_size=4, hard=0, dropout=0.3)
    heard = []
    distance_cache_step(
        encoders, distance, inputs, loss, chunk_size=2, on_phase=lambda phase, **named: heard.append((phase, named))
    )
    blocks = [named["chunk"] for phase, named in heard if phase == "loss" and named.get("chunk") is not None]
    assert blocks == list(range(8))
    assert {phase for phase, _ in heard} == {"first_forward", "loss", "replay"}
    for stop_at in (1, 6):

        def stop(phase, stop_at=stop_at, **named):
            if phase == "loss" and named.get("chunk") == stop_at:
                raise KeyboardInterrupt

        before = torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt):
            distance_cache_step(encoders, distance, inputs, loss, chunk_size=2, on_phase=stop)
        assert torch.equal(torch.get_rng_state(), before)


class LargestAllocation(TorchDispatchMode):
    """The most elements that any operation's output storage had, and how many outputs had at least so many."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


def test_no_activation_of_all_pairs_is_ever_allocated():
    """The plain version holds 7 hidden numbers for each pair; here nothing is bigger than one number a pair."""
    encoders, distance, inputs, loss = make_case(0, batch_size=32, hard=0)
    with LargestAllocation() as cached:
        distance_cache_step(encoders, distance, inputs, loss, chunk_size=4)
    assert max(cached.elements) == 32 * 32
    with LargestAllocation() as plain:
        whole_batch(encoders, distance, inputs, loss)
    assert max(plain.elements) == 32 * 32 * 15


class TimesEight:
    """A scaler that only scales."""

    def scale(self, loss):
        return loss * 8


def test_a_scaler_scales_every_gradient_once_and_not_the_loss():
    encoders, distance, inputs, loss = make_case(1)
    modules = [*encoders, distance, loss]
    plain = gradients(modules, lambda: distance_cache_step(encoders, distance, inputs, loss, chunk_size=3))
    scaled = gradients(
        modules, lambda: distance_cache_step(encoders, distance, inputs, loss, chunk_size=3, scaler=TimesEight())
    )
    assert torch.equal(scaled[0], plain[0])
    assert worst_error([change / 8 for change in scaled[1]], plain[1]) <= 1e-12


def test_autocast_is_the_same_in_both_evaluations():
    """bfloat16 in the blocks both times: no further from float32 than plain autograd under the same autocast."""
    encoders, distance, inputs, loss = make_case(2, batch_size=8)
    modules = [*encoders, distance, loss]
    for module in modules:
        module.float()
    seen = []
    distance.out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))

    def under_autocast(work, *arguments, **settings):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(modules, lambda: work(*arguments, **settings))[1]

    truth = gradients(modules, lambda: whole_batch(encoders, distance, inputs, loss))[1]
    plain = under_autocast(kept_graphs, encoders, distance, inputs, loss, [3, 3])
    seen.clear()
    found = under_autocast(distance_cache_step, encoders, distance, inputs, loss, chunk_size=3)
    assert set(seen) == {torch.bfloat16}

    def error(changes):
        return sum((change - exact).norm() ** 2 for change, exact in zip(changes, truth, strict=True)) ** 0.5

    assert 0 < error(found) <= 1.1 * error(plain)


def test_a_distance_without_parameters_and_frozen_towers():
    encoders, _, inputs, loss = make_case(4)
    encoders[0].requires_grad_(False)

    def euclidean(queries, passages):
        return (queries[:, None] - passages[None]).square().sum(-1)

    modules = [encoders[1], loss]
    truth = gradients(modules, lambda: whole_batch(encoders, euclidean, inputs, loss))
    found = gradients(modules, lambda: distance_cache_step(encoders, euclidean, inputs, loss, chunk_size=3))
    assert worst_error(found[1], truth[1]) <= 1e-12
    assert all(parameter.grad is None for parameter in encoders[0].parameters())


def test_a_distance_trains_alone_on_frozen_encoders():
    encoders, distance, inputs, _ = make_case(4)
    for encoder in encoders:
        encoder.requires_grad_(False)

    def loss(distances):
        return distances.square().mean()

    truth = gradients([distance], lambda: whole_batch(encoders, distance, inputs, loss))
    found = gradients([distance], lambda: distance_cache_step(encoders, distance, inputs, loss, chunk_size=3))
    assert worst_error(found[1], truth[1]) <= 1e-12
    distance.requires_grad_(False)
    with pytest.raises(ValueError, match="encoders must hold something to train"):
        distance_cache_step(encoders, distance, inputs, loss, chunk_size=3)


def test_no_value_is_read_inside_the_step():
    with FakeTensorMode():
        encoders, distance, loss = [TinyEncoder(0.1), TinyEncoder(0.1)], Scorer(dropout=0.1), RankLoss()
        inputs = [
            {name: torch.ones(rows, 6, dtype=torch.long) for name in ("input_ids", "attention_mask")}
            for rows in (5, 10)
        ]
        value = distance_cache_step(encoders, distance, inputs, loss, chunk_size=4)
    assert value.shape == () and distance.hidden.weight.grad.shape == distance.hidden.weight.shape
    assert len(distance.pairs) == 2 * 2 * 3


class Refused(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoders": []}, "encoders must be a list or tuple of two towers"),
        ({"encoders": [len] * 3}, "encoders must be a list or tuple of two towers.*got 3 towers"),
        ({"distance": None}, "distance must be callable, got 'NoneType'"),
        ({"distance": Refused()}, "distance must not hold BatchNorm in training mode"),
        ({"loss_fn": 3}, "loss_fn must be callable, got 'int'"),
        ({"chunk_size": 0}, "chunk_size must be an int of at least 1, got 0"),
        ({"chunk_size": 2.5}, "chunk_size must be an int of at least 1"),
        ({"chunk_size": [1, 2, 3]}, "chunk_size must be one value or one for each of the 2 towers"),
        ({"inputs": []}, "inputs must be"),
        ({"on_phase": 1}, "on_phase must be callable"),
        ({"scaler": 1}, "scaler must have a scale"),
        ({"distance": lambda queries, passages: queries @ passages.T[:, :1]}, "distance must return.*shape"),
        ({"distance": lambda queries, passages: None}, "distance must return.*NoneType"),
        ({"loss_fn": lambda distances: distances}, "loss_fn must return one floating point number"),
    ],
)
def test_bad_input_is_refused_in_words(change, message):
    encoders, distance, inputs, loss = make_case(0)
    given = {"encoders": encoders, "distance": distance, "inputs": inputs, "loss_fn": loss, "chunk_size": 2} | change
    with pytest.raises(ValueError, match=message):
        distance_cache_step(given.pop("encoders"), given.pop("distance"), given.pop("inputs"), **given)
    parameters = [*encoders[0].parameters(), *encoders[1].parameters(), *distance.parameters(), *loss.parameters()]
    assert all(parameter.grad is None for parameter in parameters)
