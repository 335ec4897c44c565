"""Chapter 05's checks: the probe counts graphs truly, and mistakes written in other words are recognised."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

from gclib.course.checks import ch05


def probe():
    """A probe encoder and three chunks of two rows."""
    encoder = ch05.SmallEncoder(3, 2, dropout=0.0)
    return encoder, list(torch.randn(6, 3, dtype=torch.float64).split(2))


def test_the_probe_counts_graphs_that_are_built_and_alive():
    encoder, chunks = probe()
    with torch.no_grad():
        encoder(chunks[0])
    assert (encoder.graphs, encoder.most_alive) == (0, 0)
    for chunk in chunks:
        encoder(chunk).sum().backward()
    assert (encoder.graphs, encoder.most_alive) == (3, 1)
    kept = [encoder(chunk) for chunk in chunks]
    assert (encoder.graphs, encoder.most_alive) == (6, 3)
    assert len(kept) == 3


def test_the_probe_gives_the_gradient_of_the_network_that_it_is():
    encoder, chunks = probe()
    (encoder(chunks[0]) ** 2).sum().backward()
    found = encoder.hidden.weight.grad.clone()
    encoder.zero_grad()
    (encoder.out(torch.tanh(encoder.hidden(chunks[0]))) ** 2).sum().backward()
    torch.testing.assert_close(found, encoder.hidden.weight.grad)


def test_a_setup_is_copied_whole():
    """The optimizer of a copy steps the copy's parameters."""
    setup = ch05.gradient_cache_step.makers[2](np.random.default_rng(0))["setup"]
    other = copy.deepcopy(setup)
    before = setup.encoder.out.weight.clone()
    assert other.encoder.out.weight.grad is not None
    other.optimizer.step()
    assert torch.equal(setup.encoder.out.weight, before)
    assert not torch.equal(other.encoder.out.weight, before)


def detached_too_late(encoder, chunks):
    states, reps = [], []
    for chunk in chunks:
        states.append(torch.get_rng_state())
        reps.append(encoder(chunk))
    return torch.vstack(reps).detach().requires_grad_(True), states


def fresh_masks(encoder, chunks, cache, states):
    first = 0
    for chunk in chunks:
        encoder(chunk).backward(cache[first : first + len(chunk)])
        first += len(chunk)


def averaged(encoder, chunks, cache, states):
    for chunk, rows, state in zip(chunks, cache.split(len(chunks[0])), states, strict=True):
        torch.set_rng_state(state)
        encoder(chunk).backward(rows / len(states))


def nominal(encoder, chunks, cache, states):
    size = len(cache) // len(chunks)
    for n, chunk in enumerate(chunks):
        torch.set_rng_state(states[n])
        encoder(chunk).backward(cache[n * size :][: len(chunk)])


def pulled(encoder, chunks, cache, states):
    for chunk, rows, state in zip(chunks, cache.split(len(chunks[0])), states, strict=True):
        torch.set_rng_state(state)
        ((encoder(chunk) - rows) ** 2).sum().backward()


def detached(reps, loss_fn):
    leaves = [rep.detach() for rep in reps]
    loss = loss_fn(*leaves)
    loss.backward()
    return loss.detach(), [rep.grad for rep in reps]


def open_clip(setup, queries, passages, chunk_size):
    setup.optimizer.zero_grad()
    towers, states = [queries.split(chunk_size), passages.split(chunk_size)], {}
    with torch.no_grad():
        reps = [[], []]
        for t, chunks in enumerate(towers):
            for n, chunk in enumerate(chunks):
                states[t, n] = torch.get_rng_state()
                reps[t].append(setup.encoder(chunk))
    for n in range(len(towers[0])):
        live = [list(parts) for parts in reps]
        for t in (0, 1):
            torch.set_rng_state(states[t, n])
            live[t][n] = setup.encoder(towers[t][n])
        loss = setup.loss_fn(torch.cat(live[0]), torch.cat(live[1]))
        loss.backward()
    setup.optimizer.step()
    return loss.detach()


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch05.first_forward, detached_too_late, "graph kept in the first forward"),
        (ch05.build_cache, detached, "detached before the loss"),
        (ch05.replay, fresh_masks, "dropout not replayed"),
        (ch05.replay, averaged, "mean over the chunks"),
        (ch05.replay, nominal, "re-split into equal parts"),
        (ch05.replay, pulled, "squared distance instead of dot product"),
        (ch05.gradient_cache_step, open_clip, "temperature once per pair of chunks"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    assert exercise.judge(answer).misconception == name


def test_the_surrogate_written_out_is_right_too():
    def replay(encoder, chunks, cache, states):
        for chunk, rows, state in zip(chunks, cache.split(len(chunks[0])), states, strict=True):
            torch.set_rng_state(state)
            torch.einsum("bd,bd->", encoder(chunk), rows).backward()

    assert ch05.replay.judge(replay).status == "correct"


def cut_by_chunk(encoder, chunks, cache, states):
    for chunk, state, rows in zip(chunks, states, cache.chunk(len(chunks)), strict=True):
        torch.set_rng_state(state)
        encoder(chunk).backward(rows)


def cut_by_chunk_and_multiplied(encoder, chunks, cache, states):
    for chunk, state, rows in zip(chunks, states, cache.tensor_split(len(chunks)), strict=True):
        torch.set_rng_state(state)
        (encoder(chunk) * rows).sum().backward()


@pytest.mark.parametrize("answer", [cut_by_chunk, cut_by_chunk_and_multiplied])
def test_a_cache_cut_unlike_the_rows_never_passes(answer):
    for seed in range(25):
        verdict = ch05.replay.judge(answer, seed=seed)
        assert (verdict.status, verdict.misconception) == ("wrong", "shapes that do not fit")
        assert "torch.chunk" in verdict.explanation


def whole_step(setup, queries, passages, chunk_size, *, cut=torch.split, late=False, steps=1):
    """The method in other words: `cut` divides the cache, `late` clears .grad after it, `steps` optimizer steps."""
    setup.optimizer.zero_grad()
    towers, states, leaves = [queries.split(chunk_size), passages.split(chunk_size)], [], []
    with torch.no_grad():
        for chunks in towers:
            reps = []
            for chunk in chunks:
                states.append(torch.get_rng_state())
                reps.append(setup.encoder(chunk))
            leaves.append(torch.cat(reps))
    for leaf in leaves:
        leaf.requires_grad_()
    loss = setup.loss_fn(*leaves)
    loss.backward()
    if late:
        setup.optimizer.zero_grad()
    for chunks, leaf in zip(towers, leaves, strict=True):
        pieces = cut(leaf.grad, chunk_size if cut is torch.split else len(chunks))
        for chunk, rows in zip(chunks, pieces, strict=True):
            torch.set_rng_state(states.pop(0))
            setup.encoder(chunk).backward(rows)
    for _ in range(steps):
        setup.optimizer.step()
    return loss.detach()


def test_a_whole_step_with_a_cache_cut_unlike_the_rows_never_passes():
    for seed in range(20):
        verdict = ch05.gradient_cache_step.judge(partial(whole_step, cut=torch.chunk), seed=seed)
        assert (verdict.status, verdict.misconception) == ("wrong", "shapes that do not fit")


def naive(setup, queries, passages, chunk_size):
    setup.optimizer.zero_grad()
    loss = setup.loss_fn(*map(setup.encoder, (queries, passages)))
    loss.backward()
    setup.optimizer.step()
    return loss.detach()


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        (partial(whole_step, steps=0), "no optimizer step"),
        (partial(whole_step, late=True), "temperature without gradient"),
        (naive, "the plain step"),
    ],
)
def test_a_mistake_in_the_step_is_recognised_however_it_is_written(answer, name):
    assert ch05.gradient_cache_step.judge(answer).misconception == name


def test_the_whole_step_in_other_words_is_right():
    assert ch05.gradient_cache_step.judge(whole_step).status == "correct"


def test_a_second_backward_of_one_graph_is_told():
    def build_cache(reps, loss_fn):
        loss = loss_fn(*reps)
        for _ in reps:
            loss.backward()
        return loss.detach(), [rep.grad for rep in reps]

    assert ch05.build_cache.judge(build_cache).misconception == "graph used twice"
