"""A measured walk: graphs are there exactly while autograd remembers them, and watching changes no gradient."""

import pytest
import torch
from torch import nn

from gclib import ContrastiveLoss, Encoder, accumulation_step, grad_cache_step, naive_step
from gclib.memory.walk import AFTER, WHOLE, record_walk

B, DIMENSIONS = 6, 32


def texts():
    """Two towers' inputs of B rows, with padding in each."""
    towers = []
    for width in (8, 12):
        mask = torch.ones(B, width, dtype=torch.long)
        mask[1::2, width // 2 :] = 0
        towers.append({"input_ids": torch.randint(5, 50, (B, width)), "attention_mask": mask})
    return towers


@pytest.fixture
def encoder():
    return Encoder.from_config("tiny", vocab_size=50)


def walk_of(step, encoder, **options):
    options |= {"verify": "never"} if step is grad_cache_step else {}
    return record_walk(step, [encoder, encoder], texts(), ContrastiveLoss(), **options)


def phases(walk):
    return [moment.phase for moment in walk.moments]


def test_a_gradient_cache_step_keeps_one_graph_at_a_time(encoder):
    walk = walk_of(grad_cache_step, encoder, chunk_size=2)
    assert walk.rows == tuple((tower, chunk) for tower in (0, 1) for chunk in (0, 1, 2))
    assert phases(walk) == ["first_forward"] * 6 + ["loss"] + ["replay"] * 8 + [AFTER]
    for moment in walk.moments:
        if moment.phase in ("first_forward", AFTER) or moment.phase == "replay" and moment.piece == WHOLE:
            assert moment.graph_bytes == {}
        else:
            assert set(moment.graph_bytes) == {moment.piece}
    assert [m.piece for m in walk.moments if m.phase == "replay" and m.piece != WHOLE] == list(walk.rows)


def test_the_cache_is_what_crosses_from_the_loss_to_the_replay(encoder):
    walk = walk_of(grad_cache_step, encoder, chunk_size=4)
    for moment in walk.moments:
        assert moment.kind_bytes["cache"] == (2 * B * DIMENSIONS * 4 if moment.phase == "replay" else 0)
        if moment.phase == "replay":
            assert moment.kind_bytes["representations"] == 0


def test_retained_graphs_live_through_the_loss(encoder):
    walk = walk_of(grad_cache_step, encoder, chunk_size=2, retain_chunks=2)
    loss = next(moment for moment in walk.moments if moment.phase == "loss")
    retained = {moment.piece for moment in walk.moments if moment.phase == "backward"}
    assert len(retained) == 2 and set(loss.graph_bytes) == retained | {WHOLE}


def test_a_naive_step_remembers_everything_at_the_loss(encoder):
    walk = walk_of(naive_step, encoder)
    assert walk.rows == ((0, None), (1, None))
    assert phases(walk) == ["first_forward", "first_forward", "loss", "backward", AFTER]
    assert [set(moment.graph_bytes) for moment in walk.moments] == [
        {(0, None)},
        {(0, None), (1, None)},
        {(0, None), (1, None), WHOLE},
        {(0, None), (1, None), WHOLE},
        set(),
    ]


def test_accumulation_lets_a_chunk_go_before_the_next(encoder):
    walk = walk_of(accumulation_step, encoder, chunk_size=3)
    for moment in walk.moments:
        chunks = {chunk for _, chunk in moment.graph_bytes}
        assert len(chunks) <= 1
    assert max(len(moment.graph_bytes) for moment in walk.moments) == 3


def test_remembered_bytes_are_those_that_can_be_counted_by_hand():
    """A linear layer remembers its input, tanh its output; a square remembers what it squares."""
    layer = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    walk = record_walk(naive_step, [layer], [torch.randn(7, 3)], lambda reps: reps.square().sum())
    forward, loss = 7 * 3 * 4 + 7 * 5 * 4, 7 * 5 * 4
    assert [moment.graph_bytes for moment in walk.moments] == [
        {(0, None): forward},
        {(0, None): forward, WHOLE: loss},
        {(0, None): forward, WHOLE: loss},
        {},
    ]


@pytest.mark.parametrize(("step", "options"), [(naive_step, {}), (grad_cache_step, {"chunk_size": 4})])
def test_watching_changes_no_gradient(encoder, step, options):
    encoder.eval()
    inputs = texts()
    step([encoder, encoder], inputs, ContrastiveLoss(), **options)
    wanted = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    record_walk(step, [encoder, encoder], inputs, ContrastiveLoss(), **options)
    found = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def test_bad_arguments_are_refused_before_anything_runs(encoder):
    with pytest.raises(ValueError, match="encoders must be torch modules"):
        record_walk(naive_step, [lambda **x: encoder(**x)], texts()[:1], ContrastiveLoss())
    with pytest.raises(ValueError, match="options must not hold on_phase"):
        walk_of(naive_step, encoder, on_phase=print)
    assert all(parameter.grad is None for parameter in encoder.parameters())
