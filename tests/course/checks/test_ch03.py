"""Chapter 03's misconceptions, written in other words than those that they must be recognised as; right answers too.

tests/course/checks/test_checks.py runs what holds for every chapter: solutions, stubs, signatures, each listed wrong
answer.
"""

import pytest
import torch

from gclib.course.checks import ch03


def whole_batch(batch_size, chunk_size, hard_negatives):
    passages = batch_size + batch_size * hard_negatives
    return [passages - 1 for _ in range(batch_size)]


def running_total(batch_size, chunk_size, hard_negatives):
    seen, counts = 0, []
    for start in range(0, batch_size, chunk_size):
        size = min(chunk_size, batch_size - start)
        seen += size * (1 + hard_negatives)
        counts += [seen - 1] * size
    return counts


def others_and_own(batch_size, chunk_size, hard_negatives):
    counts = []
    for query in range(batch_size):
        others = min(chunk_size, batch_size - query // chunk_size * chunk_size) - 1
        counts.append(others + hard_negatives)
    return counts


def tril_of_blocks(batch_size, chunk_size, hard_negatives):
    chunk = torch.arange(batch_size) // chunk_size
    return (chunk[:, None] >= chunk).repeat_interleave(1 + hard_negatives, dim=1)


def near_the_diagonal(batch_size, chunk_size, hard_negatives):
    full = torch.ones(batch_size, batch_size, dtype=torch.bool)
    band = full.tril(chunk_size - 1) & full.triu(1 - chunk_size)
    return band.repeat_interleave(1 + hard_negatives, dim=1)


def square(batch_size, chunk_size, hard_negatives):
    mask = torch.zeros(batch_size, batch_size, dtype=torch.bool)
    for start in range(0, batch_size, chunk_size):
        mask[start : start + chunk_size, start : start + chunk_size] = True
    return mask


def added_up(loss_fn, queries, passages, chunk_size):
    group = len(passages) // len(queries)
    parts = zip(queries.split(chunk_size), passages.split(chunk_size * group), strict=True)
    return torch.stack([loss_fn(q, p) for q, p in parts]).sum()


def plain_mean(loss_fn, queries, passages, chunk_size):
    group = len(passages) // len(queries)
    parts = list(zip(queries.split(chunk_size), passages.split(chunk_size * group), strict=True))
    return sum(loss_fn(q, p) for q, p in parts) / len(parts)


def whole_loss_shared_out(loss_fn, queries, passages, chunk_size):
    return loss_fn(queries, passages).div(chunk_size)


def same_slices(loss_fn, queries, passages, chunk_size):
    total = torch.zeros(())
    for start in range(0, len(queries), chunk_size):
        rows = slice(start, min(start + chunk_size, len(queries)))
        total = total + loss_fn(queries[rows], passages[rows]) * len(queries[rows])
    return total / len(queries)


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch03.negatives_seen, whole_batch, "negatives of the full batch"),
        (ch03.negatives_seen, running_total, "earlier chunks remembered"),
        (ch03.negatives_seen, others_and_own, "own hard negatives only"),
        (ch03.block_mask, tril_of_blocks, "earlier chunks remembered"),
        (ch03.block_mask, near_the_diagonal, "a band, not blocks"),
        (ch03.block_mask, square, "hard negatives left out"),
        (ch03.accumulate, added_up, "sum instead of mean"),
        (ch03.accumulate, plain_mean, "short last chunk weighted like a whole one"),
        (ch03.accumulate, whole_loss_shared_out, "full batch divided by the chunk size"),
        (ch03.accumulate, same_slices, "passages cut like queries"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    for seed in range(5):
        assert exercise.judge(answer, seed=seed).misconception == name


def test_right_answers_in_other_words_are_right():
    def negatives_seen(batch_size, chunk_size, hard_negatives):
        last = batch_size % chunk_size
        whole = batch_size - last
        return [chunk_size * (1 + hard_negatives) - 1] * whole + [last * (1 + hard_negatives) - 1] * last

    def block_mask(batch_size, chunk_size, hard_negatives):
        return square(batch_size, chunk_size, 0).repeat_interleave(1 + hard_negatives, dim=1)

    def accumulate(loss_fn, queries, passages, chunk_size):
        group = len(passages) // len(queries)
        parts = list(zip(queries.split(chunk_size), passages.split(chunk_size * group), strict=True))
        shares = torch.tensor([len(q) / len(queries) for q, _ in parts])
        return torch.stack([loss_fn(q, p) for q, p in parts]) @ shares

    for seed in range(10):
        assert ch03.negatives_seen.judge(negatives_seen, seed=seed).status == "correct"
        assert ch03.block_mask.judge(block_mask, seed=seed).status == "correct"
        assert ch03.accumulate.judge(accumulate, seed=seed).status == "correct"


def split_alike(loss_fn, queries, passages, chunk_size):
    total = torch.zeros(())
    for q, p in zip(queries.split(chunk_size), passages.split(chunk_size), strict=False):
        total = total + loss_fn(q, p) * (len(q) / len(queries))
    return total


def split_alike_strictly(loss_fn, queries, passages, chunk_size):
    pairs = zip(queries.split(chunk_size), passages.split(chunk_size), strict=True)
    return sum(loss_fn(q, p) * len(q) for q, p in pairs) / len(queries)


def split_by_groups_strictly(loss_fn, queries, passages, chunk_size):
    pairs = zip(queries.split(chunk_size), passages.split(len(passages) // len(queries)), strict=True)
    return sum(loss_fn(q, p) * len(q) for q, p in pairs) / len(queries)


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        (split_alike, "passages split like queries"),
        (split_alike_strictly, "more pieces of passages"),
        (split_by_groups_strictly, "more pieces of passages"),
    ],
)
def test_passages_that_are_split_like_queries_are_told(answer, name):
    for seed in range(5):
        assert ch03.accumulate.judge(answer, seed=seed).misconception == name


def test_a_backward_inside_the_loop_is_told():
    def accumulate(loss_fn, queries, passages, chunk_size):
        total = 0
        for q, p in zip(queries.split(chunk_size), passages.split(chunk_size), strict=False):
            loss = loss_fn(q, p) * len(q) / len(queries)
            loss.backward()
            total = total + loss
        return total

    assert ch03.accumulate.judge(accumulate).misconception == "backward inside"


@pytest.mark.parametrize("cut", [lambda loss: loss.detach(), lambda loss: torch.tensor(loss.item())])
def test_right_weights_without_a_gradient_are_not_called_wrong_weights(cut):
    def accumulate(loss_fn, queries, passages, chunk_size):
        return cut(ch03.accumulate.oracle(loss_fn, queries, passages, chunk_size))

    verdict = ch03.accumulate.judge(accumulate)
    assert verdict.misconception == "graph cut off" and "no gradient reaches `queries`" in verdict.explanation


def test_a_gradient_that_item_cuts_off_is_told():
    def accumulate(loss_fn, queries, passages, chunk_size):
        group = len(passages) // len(queries)
        total = 0.0
        for q, p in zip(queries.split(chunk_size), passages.split(chunk_size * group), strict=True):
            total += loss_fn(q, p).item() * len(q) / len(queries)
        return torch.tensor(total)

    assert "no gradient reaches `queries`" in ch03.accumulate.judge(accumulate).explanation
