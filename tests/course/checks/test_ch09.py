"""Chapter 09's checks: what they ask is what the library does, and mistakes in other words are recognised."""

import itertools

import numpy as np
import pytest
import torch

from gclib.course.checks import ch09
from gclib.losses.ring import Ring


def test_the_exercise_s_owners_are_the_ring_s():
    for ranks in range(2, 7):
        for rank in range(ranks):
            ring = Ring(rank, [1] * ranks, 1, side=4, directions=None, rule=None, group=None)
            assert ch09.ring_schedule.oracle(rank, ranks) == [ring.owner(hop) for hop in range(ranks)]


def test_the_shares_add_up_to_ranks_times_the_mean_over_all_rows():
    rows, means = [5, 2, 1], [1.5, 0.25, 4.0]
    shares = [ch09.loss_to_backpropagate.oracle(mean, rows, rank) for rank, mean in enumerate(means)]
    assert sum(shares) == pytest.approx(3 * np.average(means, weights=rows))


def test_what_ranks_keep_of_the_gathered_gradients_adds_up_to_autograd_s():
    rows = [2, 1, 3]
    passages = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 6, 3, dtype=torch.float64)
    (passages * weights).sum().backward()
    kept = [ch09.gather_backward.oracle(list(weights), rows, rank) for rank in range(3)]
    torch.testing.assert_close(torch.cat(kept), passages.grad)


def test_an_even_split_can_be_made_and_is_wrong():
    rng = np.random.default_rng(0)
    for _ in range(20):
        inputs = ch09.gather_backward.makers[0](rng)
        assert sum(inputs["rows"]) % 4 == 0 and sum(inputs["rows"]) // 4 != inputs["rows"][inputs["rank"]]


def batches_alike(own_loss, rows, rank):
    weights = [1 / len(rows) for _ in rows]
    return own_loss * weights[rank] * len(rows)


def own_share(own_loss, rows, rank):
    return torch.tensor(own_loss, dtype=torch.float64) * (rows[rank] / torch.tensor(rows).sum().item())


def squared(own_loss, rows, rank):
    world = len(rows)
    share = own_loss * rows[rank] / sum(rows)
    return world * (world * share)


def all_but_local(gradients, rows, rank):
    start = sum(rows[:rank])
    return gradients[rank].narrow(0, start, rows[rank]).clone()


def averaged(gradients, rows, rank):
    start = sum(rows[:rank])
    return torch.stack(gradients).mean(dim=0)[start : start + rows[rank]]


def equal_slices(gradients, rows, rank):
    each = sum(rows) // len(rows)
    return sum(gradients)[each * rank : each * (rank + 1)]


def whole_sum(gradients, rows, rank):
    total = torch.zeros_like(gradients[0])
    for gradient in gradients:
        total += gradient
    return total


def added(gradients):
    found = [[g for g in parts if g is not None] for parts in zip(*gradients, strict=True)]
    return [torch.stack(parts).sum(dim=0) if parts else None for parts in found]


def mean_of_what_is_there(gradients):
    result = []
    for parts in zip(*gradients, strict=True):
        there = [g for g in parts if g is not None]
        result.append(torch.stack(there).mean(dim=0) if there else None)
    return result


def only_complete(gradients):
    result = []
    for parts in zip(*gradients, strict=True):
        complete = all(g is not None for g in parts)
        result.append(sum(parts) / len(parts) if complete else None)
    return result


def empty_sums(gradients):
    return [sum(g for g in parts if g is not None) / len(gradients) for parts in zip(*gradients, strict=True)]


def upwards(rank, ranks):
    return [*range(rank, ranks), *range(rank)]


def sent_first(rank, ranks):
    seen, here = [], rank
    while len(seen) < ranks:
        here = here - 1 if here else ranks - 1
        seen.append(here)
    return seen


def others_only(rank, ranks):
    return [owner % ranks for owner in range(rank, rank - ranks + 1, -1)]


def not_wrapped(rank, ranks):
    return list(itertools.islice(itertools.count(rank, -1), ranks))


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch09.loss_to_backpropagate, batches_alike, "mean of means"),
        (ch09.loss_to_backpropagate, own_share, "W forgotten"),
        (ch09.loss_to_backpropagate, squared, "W twice"),
        (ch09.loss_to_backpropagate, lambda loss, r, n: loss / len(r), "mean divided by W"),
        (ch09.loss_to_backpropagate, lambda loss, r, n: len(r) / sum(r) * loss, "mean taken for a sum"),
        (ch09.gather_backward, lambda g, r, n: sum(g)[n * r[n] : n * r[n] + r[n]], "starts at rank * b"),
        (ch09.gather_backward, lambda g, r, n: g[n], "own gradient, nothing cut out"),
        (ch09.gather_backward, all_but_local, "own gradient alone"),
        (ch09.gather_backward, averaged, "mean instead of sum"),
        (ch09.gather_backward, equal_slices, "even split"),
        (ch09.gather_backward, whole_sum, "nothing cut out"),
        (ch09.average_over_ranks, added, "sum instead of mean"),
        (ch09.average_over_ranks, mean_of_what_is_there, "divided by those who have it"),
        (ch09.average_over_ranks, only_complete, "dropped where a rank lacks it"),
        (ch09.average_over_ranks, empty_sums, "zero where nobody has one"),
        (ch09.ring_schedule, upwards, "the other way round"),
        (ch09.ring_schedule, sent_first, "starts with the block before"),
        (ch09.ring_schedule, others_only, "one hop too few"),
        (ch09.ring_schedule, not_wrapped, "owners below zero"),
        (ch09.ring_schedule, lambda rank, ranks: [(rank - h) % ranks for h in range(1, ranks)], "own block left out"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    for seed in range(6):
        assert exercise.judge(answer, seed=seed).misconception == name


def test_right_answers_in_other_words_are_right():
    def average_over_ranks(gradients):
        result = []
        for number in range(len(gradients[0])):
            there = [rank[number] for rank in gradients if rank[number] is not None]
            result.append(torch.stack(there).sum(0).div(len(gradients)) if there else None)
        return result

    def ring_schedule(rank, ranks):
        order = list(range(rank, -1, -1)) + list(range(ranks - 1, rank, -1))
        return torch.tensor(order).tolist()

    for seed in range(10):
        assert ch09.average_over_ranks.judge(average_over_ranks, seed=seed).status == "correct"
        assert ch09.ring_schedule.judge(ring_schedule, seed=seed).status == "correct"
        assert ch09.gather_backward.judge(lambda g, r, n: sum(g).split(r)[n], seed=seed).status == "correct"
        scaled = ch09.loss_to_backpropagate.judge(lambda loss, r, n: loss / (sum(r) / len(r)) * r[n], seed=seed)
        assert scaled.status == "correct"


def test_an_answer_that_changes_the_gradients_in_place_is_told():
    def gather_backward(gradients, rows, rank):
        for gradient in gradients[1:]:
            gradients[0] += gradient
        return gradients[0].split(rows)[rank]

    assert "changes its input `gradients`" in ch09.gather_backward.judge(gather_backward).explanation


def test_zeros_of_any_shape_for_a_gradient_that_nobody_has_are_named():
    def answer(gradients):
        means = ch09.average_over_ranks.oracle(gradients)
        return [torch.zeros(3) if mean is None else mean for mean in means]

    verdict = ch09.average_over_ranks.judge(answer, seed=0)
    assert (verdict.status, verdict.misconception) == ("wrong", "zero where nobody has one")


def test_means_that_are_written_into_the_input_and_not_returned_are_asked_for_a_return():
    def written(gradients):
        for number, column in enumerate(zip(*gradients, strict=True)):
            there = [gradient for gradient in column if gradient is not None]
            for rank in gradients:
                rank[number] = sum(there) / len(gradients) if there else None

    verdict = ch09.average_over_ranks.judge(written)
    assert verdict.status == "not attempted" and "does it end in `return`?" in verdict.explanation
