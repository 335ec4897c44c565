"""Chapter 13's sharded ranks: messages by formula, gradients by an oracle in one process, bytes that differ."""

import weakref

import pytest
import torch
from helpers.oracles import InfoNCE, worst_error

from gclib.course.ranks import shards
from gclib.course.ranks.demo import make_batch

PAIRS, CHUNKS, LAYERS, RANKS = 4, 2, 4, 2


@pytest.fixture(scope="module")
def launched():
    return shards.launch_sharded(PAIRS, ranks=RANKS, chunks=CHUNKS, layers=LAYERS)


@pytest.mark.slow
def test_messages_follow_from_chunks_and_layers(launched):
    chunks, weights = 2 * CHUNKS, sum(p.nbytes for p in shards.layered_encoder(LAYERS, sharded=False).parameters())
    unit = next(shards.layered_encoder(LAYERS, sharded=False).layers.parameters())
    layer = unit.nbytes + shards.WIDTH * unit.element_size()
    for rank in launched:
        each, kept, once = (rank[choice] for choice in shards.CHOICES)
        assert each["all-gathers"] == 3 * chunks * LAYERS + chunks
        assert kept["all-gathers"] == once["all-gathers"] == LAYERS + 1
        assert each["reduce-scatters"] == kept["reduce-scatters"] == chunks * (LAYERS + 1)
        assert once["reduce-scatters"] == LAYERS + 1
        assert once["bytes of all-gathers"] == once["bytes of reduce-scatters"] == weights
        assert each["bytes of all-gathers"] == chunks * (weights + 2 * LAYERS * layer)
        assert each["bytes of reduce-scatters"] == chunks * weights


@pytest.mark.slow
def test_every_choice_has_the_gradient_of_one_process(launched):
    encoder, loss_fn = shards.layered_encoder(LAYERS, sharded=False), InfoNCE(learnable=False).double()
    loss_fn.temperature = torch.tensor(shards.TEMPERATURE, dtype=torch.float64)
    loss = loss_fn(*(encoder(inputs) for inputs in make_batch(RANKS * PAIRS)))
    loss.backward()
    expected = [parameter.grad for parameter in encoder.parameters()]
    for rank in launched:
        for choice in shards.CHOICES:
            assert rank[choice]["loss"] == pytest.approx(float(loss), rel=1e-12)
            assert worst_error(list(rank[choice]["gradients"].values()), expected) <= 1e-10


@pytest.mark.slow
def test_weights_that_are_kept_take_more_room(launched):
    whole = sum(p.nbytes for p in shards.layered_encoder(LAYERS, sharded=False).parameters())
    for rank in launched:
        each, kept, once = (rank[choice] for choice in shards.CHOICES)
        assert each["shard bytes"] == kept["shard bytes"] == once["shard bytes"] == whole // RANKS
        assert each["peak bytes"] < min(kept["peak bytes"], once["peak bytes"])
        assert min(kept["peak bytes"], once["peak bytes"]) >= 1.5 * whole


def test_a_storage_at_the_address_of_one_that_is_gone_is_counted():
    tensor, watch = torch.zeros(8), shards.Watch()
    gone = torch.zeros(1).untyped_storage()
    watch._storages[tensor.untyped_storage()._cdata] = weakref.ref(gone)
    del gone
    with watch:
        tensor.view(2, 4)
    assert watch.peak_bytes == tensor.nbytes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ranks": 1}, "ranks must be 2 to"),
        ({"pairs": 5, "chunks": 2}, "chunks must divide the 5 pairs"),
        ({"layers": 0}, "layers must be an int of at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_a_rank_starts(settings, words):
    with pytest.raises(ValueError, match=words):
        shards.launch_sharded(**settings)
