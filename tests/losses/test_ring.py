"""The ring against the whole batch's loss in one process; what it sends, and when; what it holds."""

import random

import pytest
import torch
import torch.distributed as dist
from helpers.allocator import allocator_peak
from helpers.oracles import InfoNCE
from helpers.ranks import die, message_of, run_ranks

import gclib.losses.ring
from gclib.losses.gathered import gathered_contrastive_loss
from gclib.losses.ring import ring_contrastive_loss

CASES = 30


def drawn(number, ranks):
    """Sizes, settings and representations of one case, the same on every rank."""
    draw = random.Random(f"{ranks}/{number}")
    rows = [draw.randint(1, 9) for _ in range(ranks)]
    settings = {"symmetric": draw.random() < 0.6, "tile_size": draw.choice([1, 2, 3, 4, 7, 64])}
    negatives, scale = draw.choice([0, 0, 1, 3]), draw.choice([0.3, 1.0, 5.0])
    torch.manual_seed(number)
    queries = scale * torch.randn(sum(rows), 5, dtype=torch.float64)
    passages = scale * torch.randn(sum(rows) * (1 + negatives), 5, dtype=torch.float64)
    return rows, settings, queries, passages


def part(reps, rows, rank):
    group = reps.shape[0] // sum(rows)
    return reps[sum(rows[:rank]) * group : sum(rows[: rank + 1]) * group].clone().requires_grad_()


def error(found, truth):
    return float((found - truth).norm() / truth.norm().clamp_min(1e-300))


def random_cases(here):
    """The largest error of the loss and of each gradient, W times the whole batch's, over all cases."""
    worst = {"loss": 0.0, "queries": 0.0, "passages": 0.0, "temperature": 0.0}
    for number in range(CASES):
        rows, settings, queries, passages = drawn(number, here.world_size)
        leaves = [queries.clone().requires_grad_(), passages.clone().requires_grad_()]
        oracle = InfoNCE(settings["symmetric"]).double()
        truth = oracle(*leaves)
        truth.backward()
        own = [part(reps, rows, here.rank) for reps in (queries, passages)]
        temperature = oracle.temperature.detach().clone().requires_grad_()
        loss = ring_contrastive_loss(*own, temperature=temperature, **settings)
        loss.backward()
        shared = temperature.grad.clone()
        dist.all_reduce(shared)
        errors = {
            "loss": error(loss.detach(), truth.detach()),
            "queries": error(own[0].grad / here.world_size, part(leaves[0].grad, rows, here.rank)),
            "passages": error(own[1].grad / here.world_size, part(leaves[1].grad, rows, here.rank)),
            "temperature": error(shared / here.world_size, oracle.temperature.grad),
        }
        worst = {name: max(worst[name], errors[name]) for name in worst}
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_ring_is_the_whole_batch_s_loss_over_random_shapes(ranks, tmp_path):
    for worst in run_ranks(random_cases, ranks, tmp_path):
        assert max(worst.values()) <= 1e-9, worst  # of a row's own gradient, however small: saturated ones lose digits
        assert worst["loss"] <= 1e-12


def what_happens(here):
    """The order of sends and of tiles, and how many numbers leave this rank."""
    events, sent = [], []
    send, merge, add = dist.batch_isend_irecv, gclib.losses.ring.merge_logits, gclib.losses.ring.add_gradients

    def sending(moves):
        events.append("send")
        sent.append(moves[0].tensor.numel())
        return send(moves)

    def recording(name, function):
        def call(*arguments):
            events.append(name)
            return function(*arguments)

        return call

    dist.batch_isend_irecv = sending
    gclib.losses.ring.merge_logits, gclib.losses.ring.add_gradients = (
        recording("tiles", merge),
        recording("gradients", add),
    )
    try:
        reps = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
        ring_contrastive_loss(*reps, temperature=0.1, tile_size=2).backward()
    finally:
        dist.batch_isend_irecv, gclib.losses.ring.merge_logits, gclib.losses.ring.add_gradients = send, merge, add
    return [events, sum(sent)]


@pytest.mark.slow
def test_the_next_block_travels_while_the_tiles_of_this_one_are_computed(tmp_path):
    for events, sent in run_ranks(what_happens, 3, tmp_path):
        forward = ["send", "tiles", "send", "tiles", "tiles"]
        assert events == forward + ["send", "gradients", "send"] * 2 + ["gradients", "send"]
        block = 4 * 8
        assert sent == 2 * block + 2 * block + 3 * block  # passages forward and backward, gradients home


def peaks(here, rows, dimensions, tile_size):
    """Allocator peaks of this rank: the ring's, and those of the gathered loss, dense and tiled.

    Each the least of three: gloo's thread may let go of what it sent a moment late, which adds to a peak and says
    nothing of the loss.
    """
    torch.manual_seed(here.rank)
    reps = [torch.randn(rows, dimensions, requires_grad=True) for _ in range(2)]
    forms = {
        "ring": lambda: ring_contrastive_loss(*reps, temperature=0.1, symmetric=True, tile_size=tile_size),
        "gathered, tiled": lambda: gathered_contrastive_loss(
            *reps, temperature=0.1, symmetric=True, tile_size=tile_size
        ),
        "gathered, dense": lambda: gathered_contrastive_loss(*reps, temperature=0.1, symmetric=True),
    }
    found = {}
    for name, form in forms.items():
        for rep in reps:
            rep.grad = torch.zeros_like(rep)
        found[name] = min(allocator_peak(lambda form=form: form().backward()) for _ in range(3))
    return found


@pytest.mark.slow
def test_a_rank_of_the_ring_holds_six_blocks_of_its_share_of_the_batch(tmp_path):
    """O(B / W * D): five blocks of b x D numbers with two ranks, six with more, beside tiles (less than one block)."""
    rows, dimensions, tile = 128, 256, 32
    block = rows * dimensions * 4
    for ranks, blocks in ((2, 5), (4, 6)):
        found = run_ranks(peaks, ranks, tmp_path, rows, dimensions, tile)[0]
        assert blocks * block < found["ring"] < (blocks + 1) * block
        assert found["ring"] < found["gathered, tiled"] and found["ring"] < found["gathered, dense"]


def a_rank_dies_on_the_way_back(here, folder):
    """What the others are told, and how long that took, where rank 1 is gone after the forward pass."""
    reps = [torch.randn(8, 4, requires_grad=True) for _ in range(2)]
    loss = ring_contrastive_loss(*reps, temperature=0.1, tile_size=4)
    if here.rank == 1:
        die(here.rank, folder)
    return message_of(loss.backward)


@pytest.mark.slow
def test_a_rank_that_dies_inside_the_ring_ends_it_for_all_with_a_clear_error(tmp_path):
    first, _, last = run_ranks(a_rank_dies_on_the_way_back, 3, tmp_path, str(tmp_path), timeout=8.0)
    for kind, text, seconds in (first, last):
        assert kind == "RuntimeError" and "the ring" in text and "another rank failed or is late" in text
        assert seconds < 30
