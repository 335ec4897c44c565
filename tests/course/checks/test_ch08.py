"""Chapter 08's exercises: the oracles say what the library does, wrong answers are known however they are written."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gclib.course.checks import ch08
from gclib.course.widgets.tiles import dense_loss_bytes
from gclib.losses.dense import contrastive_loss


def draws(exercise, count=3):
    rng = np.random.default_rng(0)
    return [maker(rng) for maker in exercise.makers for _ in range(count)]


def test_the_exercises_ask_for_what_the_library_does():
    for inputs in draws(ch08.online_log_sum_exp):
        found = ch08.online_log_sum_exp.oracle(**inputs)
        torch.testing.assert_close(found, inputs["tiles"].logits.logsumexp(1))
    for inputs in draws(ch08.tiled_loss):
        logits = inputs["logits"]
        reps = logits.query_reps, logits.passage_reps
        expected = contrastive_loss(*reps, temperature=logits.temperature)
        torch.testing.assert_close(ch08.tiled_loss.oracle(**inputs), expected)
    for inputs in draws(ch08.largest_dense_batch):
        found, buffers = ch08.largest_dense_batch.oracle(**inputs), inputs["buffers"]
        assert 4 * buffers * found**2 <= inputs["budget"] < 4 * buffers * (found + 1) ** 2
    assert dense_loss_bytes(1000) // 4_000_000 == 3 and dense_loss_bytes(1000, symmetric=True) // 4_000_000 == 4


@pytest.mark.parametrize("columns", [slice(0, 3), slice(3, 7)])
def test_a_tiles_gradient_is_autograds(columns):
    rows, temperature = slice(0, 3), 0.3
    queries, passages = (F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1) for _ in range(2))
    similarities = (queries @ passages.T).requires_grad_()
    logits, labels = similarities / temperature, torch.arange(7)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    (expected,) = torch.autograd.grad(loss, similarities)
    logits = logits.detach()
    lse = logits.logsumexp(1)[rows], logits.logsumexp(0)[columns]
    found = ch08.tile_gradient.oracle(logits[rows, columns], *lse, 7, temperature, rows == columns)
    torch.testing.assert_close(found, expected[rows, columns])


def test_a_counter_counts_the_tiles_that_are_held():
    counter = ch08.TileCounter()
    held = [counter.made(torch.zeros(2, 2)) for _ in range(3)]
    views = [tile.diagonal() for tile in held]
    del held
    counter.made(torch.zeros(2, 2))
    assert counter.most == 4
    del views
    counter.made(torch.zeros(2, 2))
    assert counter.most == 4 and len(counter._storages) <= 2


def with_logaddexp_from_zero(tiles, rows):
    found = torch.zeros(rows, dtype=torch.float64)
    for tile in tiles:
        found = torch.logaddexp(found, tile.logsumexp(1))
    return found


def plain_exponentials(tiles, rows):
    total = torch.zeros(rows, dtype=torch.float64)
    for tile in tiles:
        total += torch.einsum("rc->r", torch.exp(tile))
    return torch.log(total)


def clamped_maximum(tiles, rows):
    maximum, total = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    for tile in tiles:
        new = torch.stack([maximum, tile.max(dim=1).values]).max(dim=0).values
        total = total * (maximum - new).exp() + (tile.T - new).exp().sum(0)
        maximum = new
    return total.log() + maximum


def not_rescaled(tiles, rows):
    maximum, total = torch.full((rows,), -1e300, dtype=torch.float64), 0
    for tile in tiles:
        maximum = torch.maximum(maximum, tile.amax(1))
        total = total + (tile - maximum.unsqueeze(1)).exp().sum(1)
    return maximum + total.log()


def one_maximum(tiles, rows):
    maximum, total = -math.inf, torch.zeros(rows, dtype=torch.float64)
    for tile in tiles:
        new = max(maximum, tile.max().item())
        total = total * math.exp(maximum - new) + (tile - new).exp().sum(1)
        maximum = new
    return maximum + total.log()


def maximum_of_each_tile(tiles, rows):
    found = None
    for tile in tiles:
        new = tile.max(1, keepdim=True).values
        total = (tile - new).exp().sum(1)
        found = (new[:, 0], total if found is None else total + found[1] * (found[0] - new[:, 0]).exp())
    return found[0] + found[1].log()


def added(tiles, rows):
    return sum(torch.logsumexp(tile, 1) for tile in tiles)


def all_at_once(tiles, rows):
    row = torch.hstack(list(tiles))
    highest = row.amax(1)
    return highest + (row - highest[:, None]).exp().sum(1).log()


def two_passes(tiles, rows):
    highest = torch.full((rows,), -torch.inf, dtype=torch.float64)
    for tile in tiles:
        highest = torch.maximum(highest, tile.max(1).values)
    total = torch.zeros_like(highest)
    for tile in tiles:
        total += (tile - highest.unsqueeze(1)).exp().sum(1)
    return highest + total.log()


def accumulated(logits, batch_size, tile_size):
    total = 0.0
    for start in range(0, batch_size, tile_size):
        rows = slice(start, min(start + tile_size, batch_size))
        total = total - logits(rows, rows).log_softmax(1).diagonal().sum()
    return total / batch_size


def diagonals_kept(logits, batch_size, tile_size):
    lse, positives = torch.full((batch_size,), -torch.inf, dtype=torch.float64), []
    for i in range(0, batch_size, tile_size):
        rows = slice(i, min(i + tile_size, batch_size))
        for j in range(0, batch_size, tile_size):
            tile = logits(rows, slice(j, min(j + tile_size, batch_size)))
            lse[rows] = torch.logaddexp(lse[rows], tile.logsumexp(1))
            if i == j:
                positives.append(tile.diagonal())
    return (lse - torch.cat(positives)).mean()


def dense(logits, batch_size, tile_size):
    return -logits(slice(None), slice(None)).log_softmax(1).diagonal().mean()


def sums_of_rows_only(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    p = torch.exp(tile - row_lse.unsqueeze(1))
    p = p - torch.eye(len(p), dtype=p.dtype) * holds_positives
    return p / batch_size / temperature


def inside_the_tile(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    p = F.softmax(tile, dim=1) + F.softmax(tile, dim=0)
    if holds_positives:
        p.fill_diagonal_(0).add_(torch.diag((tile.softmax(0) + tile.softmax(1)).diagonal() - 2))
    return p / (2 * batch_size) / temperature


def quotients(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    p = tile.exp() / row_lse.exp().unsqueeze(1) + tile.exp() / column_lse.exp().unsqueeze(0)
    return (p - 2 * holds_positives * torch.eye(len(p))) / (2 * batch_size * temperature)


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch08.online_log_sum_exp, with_logaddexp_from_zero, "merge started at 0"),
        (ch08.online_log_sum_exp, plain_exponentials, "exponentials without the maximum"),
        (ch08.online_log_sum_exp, clamped_maximum, "maximum started at 0"),
        (ch08.online_log_sum_exp, not_rescaled, "old total not rescaled"),
        (ch08.online_log_sum_exp, one_maximum, "one maximum for all rows"),
        (ch08.online_log_sum_exp, maximum_of_each_tile, "the tile's own maximum"),
        (ch08.online_log_sum_exp, added, "log-sum-exps added"),
        (ch08.online_log_sum_exp, two_passes, "two passes"),
        (ch08.online_log_sum_exp, all_at_once, "all tiles at once"),
        (ch08.tiled_loss, accumulated, "diagonal tiles only"),
        (ch08.tiled_loss, diagonals_kept, "tiles kept"),
        (ch08.tiled_loss, dense, "the whole matrix at once"),
        (ch08.tile_gradient, sums_of_rows_only, "rows' normaliser for both directions"),
        (ch08.tile_gradient, inside_the_tile, "softmax within the tile"),
        (ch08.tile_gradient, quotients, "exponentials divided"),
        (ch08.largest_dense_batch, lambda budget, buffers: int((budget / buffers) ** 0.5), "4 bytes forgotten"),
        (ch08.largest_dense_batch, lambda budget, buffers: budget // 4 // buffers, "no root"),
        (ch08.largest_dense_batch, lambda budget, buffers: (budget / buffers / 4) ** 0.5, "not rounded down"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    for seed in range(4):
        assert exercise.judge(answer, seed=seed).misconception == name


def test_a_batch_that_does_not_fit_is_told_what_it_takes():
    verdict = ch08.largest_dense_batch.judge(lambda budget, buffers: 100 + math.isqrt(budget // 4 // buffers), seed=0)
    assert "pairs take" in verdict.explanation and "more than the budget's" in verdict.explanation
    verdict = ch08.largest_dense_batch.judge(lambda budget, buffers: 7, seed=0)
    assert verdict.status == "wrong" and "pairs take" not in verdict.explanation


def test_torchs_own_log_sum_exp_does_not_count_as_an_answer():
    def online_log_sum_exp(tiles, rows):
        found = torch.full((rows,), -torch.inf, dtype=torch.float64)
        for tile in tiles:
            found = torch.logaddexp(found, tile.logsumexp(1))
        return found

    verdict = ch08.online_log_sum_exp.judge(online_log_sum_exp)
    assert verdict.status == "wrong" and "`logaddexp` does the work" in verdict.explanation


def test_looking_behind_the_tiles_does_not_pass():
    def all_logits(tiles, rows):
        highest = tiles.logits.amax(1)
        return highest + (tiles.logits - highest[:, None]).exp().sum(1).log()

    def whole_square(logits, batch_size, tile_size):
        return F.cross_entropy(logits.whole(), torch.arange(batch_size))

    assert ch08.online_log_sum_exp.judge(all_logits).status == "wrong"
    assert ch08.tiled_loss.judge(whole_square).status == "wrong"


def test_smaller_tiles_than_allowed_are_right_too():
    def tiled_loss(logits, batch_size, tile_size):
        solved = ch08._LossOfTiles()  # the right answer, with its defaults
        return solved(logits, batch_size, tile_size - 1)

    assert ch08.tiled_loss.judge(tiled_loss).status == "correct"


def test_right_answers_in_other_words_are_right():
    def online_log_sum_exp(tiles, rows):
        found = None
        for tile in tiles:
            if found is not None:
                tile = torch.cat([found[:, None], tile], dim=1)
            highest = tile.max(dim=1, keepdim=True).values
            found = (highest + (tile - highest).exp().sum(1, keepdim=True).log())[:, 0]
        return found

    def column_by_column(logits, batch_size, tile_size):
        parts = [slice(i, min(i + tile_size, batch_size)) for i in range(0, batch_size, tile_size)]
        lse = torch.full((batch_size,), -torch.inf, dtype=torch.float64)
        positives = torch.zeros_like(lse)
        for columns in parts:
            for rows in parts:
                tile = logits(rows, columns)
                lse[rows] = torch.logaddexp(lse[rows], tile.logsumexp(1))
                if rows == columns:
                    positives[rows] = tile.diagonal()
        return (lse - positives).sum() / batch_size

    def tile_gradient(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
        wanted = torch.eye(*tile.shape, dtype=tile.dtype) if holds_positives else 0
        rows, columns = (tile.T - row_lse).T.exp() - wanted, (tile - column_lse).exp() - wanted
        return (rows + columns) / batch_size / temperature / 2

    assert ch08.online_log_sum_exp.judge(online_log_sum_exp).status == "correct"
    assert ch08.tiled_loss.judge(column_by_column).status == "correct"
    assert ch08.tile_gradient.judge(tile_gradient).status == "correct"
    assert ch08.largest_dense_batch.judge(lambda m, k: math.isqrt(m // 4 // k)).status == "correct"
