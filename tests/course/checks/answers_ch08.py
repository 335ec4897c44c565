"""Answers to chapter 08, in the styles and with the mistakes of readers."""

import math

import numpy as np
import torch

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch08")


@right("online_log_sum_exp")
def lse_with_maximum_and_sum(tiles, rows):
    top = torch.full((rows,), -math.inf, dtype=torch.float64)
    total = torch.zeros(rows, dtype=torch.float64)
    for tile in tiles:
        new = torch.maximum(top, tile.max(1).values)
        total = total * (top - new).exp() + (tile - new[:, None]).exp().sum(1)
        top = new
    return top + total.log()


@right("online_log_sum_exp")
def lse_merged_pairwise(tiles, rows):
    found = None
    for tile in tiles:
        top = tile.amax(dim=1)
        part = top + torch.log(torch.sum(torch.exp(tile - top.unsqueeze(1)), dim=1))
        if found is None:
            found = part
        else:
            high = torch.maximum(found, part)
            found = high + torch.log(torch.exp(found - high) + torch.exp(part - high))
    return found


@right("online_log_sum_exp")
def lse_by_log1p(tiles, rows):
    lse = None
    for tile in tiles:
        m = tile.max(dim=1, keepdim=True)[0]
        part = (m + (tile - m).exp().sum(1, keepdim=True).log()).squeeze(1)
        lse = part if lse is None else torch.max(lse, part) + torch.log1p(torch.exp(-(lse - part).abs()))
    return lse


@right("online_log_sum_exp")
def lse_by_numpy(tiles, rows):
    top, total = np.full(rows, -np.inf), np.zeros(rows)
    for tile in tiles:
        tile = tile.numpy()
        new = np.maximum(top, tile.max(1))
        total = total * np.exp(top - new) + np.exp(tile - new[:, None]).sum(1)
        top = new
    return torch.from_numpy(top + np.log(total))


@right("online_log_sum_exp")
def lse_by_iterator(tiles, rows):
    tiles = iter(tiles)
    first = next(tiles)
    m = first.max(1).values
    s = (first - m[:, None]).exp().sum(1)
    for t in tiles:
        n = torch.max(m, t.max(1).values)
        s, m = s * torch.exp(m - n) + torch.exp(t - n[:, None]).sum(1), n
    return s.log() + m


@wrong("online_log_sum_exp", "exponentials without the maximum")
def no_maximum(tiles, rows):
    total = torch.zeros(rows, dtype=torch.float64)
    for tile in tiles:
        total = total + tile.exp().sum(1)
    return total.log()


@wrong("online_log_sum_exp", "old total not rescaled")
def old_sum_not_rescaled(tiles, rows):
    top = torch.full((rows,), -math.inf, dtype=torch.float64)
    total = torch.zeros(rows, dtype=torch.float64)
    for tile in tiles:
        top = torch.maximum(top, tile.max(1).values)
        total = total + (tile - top[:, None]).exp().sum(1)
    return top + total.log()


@wrong("online_log_sum_exp", "rescaled the wrong way round")
def total_starts_at_minus_infinity(tiles, rows):
    top = torch.full((rows,), -math.inf, dtype=torch.float64)
    total = top.clone()
    for tile in tiles:
        new = torch.maximum(top, tile.max(1).values)
        total = total * (top - new).exp() + (tile - new[:, None]).exp().sum(1)
        top = new
    return top + total.log()


@wrong("online_log_sum_exp", "maximum started at -1,000")
def maximum_starts_at_minus_1000(tiles, rows):
    top = torch.full((rows,), -1000.0, dtype=torch.float64)
    total = torch.zeros(rows, dtype=torch.float64)
    for tile in tiles:
        new = torch.maximum(top, tile.max(1).values)
        total = total * (top - new).exp() + (tile - new[:, None]).exp().sum(1)
        top = new
    return top + total.log()


@wrong("online_log_sum_exp", "maximum started at 0")
def maximum_starts_at_zero(tiles, rows):
    top = torch.zeros(rows, dtype=torch.float64)
    total = torch.zeros(rows, dtype=torch.float64)
    for tile in tiles:
        new = torch.maximum(top, tile.max(1).values)
        total = total * (top - new).exp() + (tile - new[:, None]).exp().sum(1)
        top = new
    return top + total.log()


@wrong("online_log_sum_exp", "one maximum for all rows")
def one_maximum_for_all_rows(tiles, rows):
    top, total = -math.inf, torch.zeros(rows, dtype=torch.float64)
    for tile in tiles:
        new = max(top, tile.max().item())
        total = total * math.exp(top - new) + (tile - new).exp().sum(1)
        top = new
    return top + total.log()


@wrong("online_log_sum_exp", "maximum of the first tile")
def maximum_of_the_first_tile(tiles, rows):
    top, total = None, 0
    for tile in tiles:
        if top is None:
            top = tile.max(1).values
        total = total + (tile - top[:, None]).exp().sum(1)
    return top + total.log()


@wrong("online_log_sum_exp", "first tile alone")
def return_inside_the_loop(tiles, rows):
    top = torch.full((rows,), -math.inf, dtype=torch.float64)
    total = torch.zeros_like(top)
    for tile in tiles:
        new = torch.maximum(top, tile.amax(1))
        total = total * (top - new).exp() + (tile - new[:, None]).exp().sum(1)
        return new + total.log()


@wrong("online_log_sum_exp", "all tiles at once")
def all_tiles_held(tiles, rows):
    logits = torch.cat(list(tiles), dim=1)
    top = logits.max(1).values
    return top + (logits - top[:, None]).exp().sum(1).log()


@wrong("online_log_sum_exp", "log-sum-exps added")
def log_sum_exps_added(tiles, rows):
    found = torch.zeros(rows, dtype=torch.float64)
    for tile in tiles:
        top = tile.max(1).values
        found = found + top + (tile - top[:, None]).exp().sum(1).log()
    return found


@wrong("online_log_sum_exp", "rescaled the wrong way round, after the first tile")
def rescaled_the_wrong_way(tiles, rows):
    top, total = None, None
    for tile in tiles:
        if top is None:
            top = tile.max(1).values
            total = (tile - top[:, None]).exp().sum(1)
            continue
        new = torch.maximum(top, tile.max(1).values)
        total = total * (new - top).exp() + (tile - new[:, None]).exp().sum(1)
        top = new
    return top + total.log()


@wrong("online_log_sum_exp", "maximum not added again")
def maximum_not_added(tiles, rows):
    top = torch.full((rows,), -math.inf, dtype=torch.float64)
    total = torch.zeros(rows, dtype=torch.float64)
    for tile in tiles:
        new = torch.maximum(top, tile.max(1).values)
        total = total * (top - new).exp() + (tile - new[:, None]).exp().sum(1)
        top = new
    return total.log()


@wrong("online_log_sum_exp", "maximum alone")
def only_the_maximum(tiles, rows):
    top = torch.full((rows,), -math.inf, dtype=torch.float64)
    for tile in tiles:
        top = torch.maximum(top, tile.max(1).values)
    return top


@wrong("online_log_sum_exp", "another form")
def in_float32(tiles, rows):
    top = torch.full((rows,), -math.inf)
    total = torch.zeros(rows)
    for tile in tiles:
        tile = tile.float()
        new = torch.maximum(top, tile.max(1).values)
        total = total * (top - new).exp() + (tile - new[:, None]).exp().sum(1)
        top = new
    return top + total.log()


@wrong("online_log_sum_exp", "left to a function that does it")
def by_torch(tiles, rows):
    found = torch.full((rows,), -math.inf, dtype=torch.float64)
    for tile in tiles:
        found = torch.logaddexp(found, torch.logsumexp(tile, 1))
    return found


@wrong("online_log_sum_exp", "two passes")
def twice_through(tiles, rows):
    top = torch.stack([tile.max(1).values for tile in tiles]).max(0).values
    return top + sum((tile - top[:, None]).exp().sum(1) for tile in tiles).log()


@wrong("online_log_sum_exp", "last tile alone")
def last_tile_only(tiles, rows):
    for tile in tiles:
        top = tile.max(1).values
        found = top + (tile - top[:, None]).exp().sum(1).log()
    return found


@wrong("online_log_sum_exp", "mean instead of sum")
def mean_for_sum(tiles, rows):
    top = torch.full((rows,), -math.inf, dtype=torch.float64)
    total, count = torch.zeros(rows, dtype=torch.float64), 0
    for tile in tiles:
        new = torch.maximum(top, tile.max(1).values)
        total = total * (top - new).exp() + (tile - new[:, None]).exp().sum(1)
        top, count = new, count + tile.shape[1]
    return top + (total / count).log()


@right("tiled_loss")
def loss_by_stripes(logits, batch_size, tile_size):
    total = 0
    for r in range(0, batch_size, tile_size):
        rows = slice(r, min(r + tile_size, batch_size))
        lse = torch.full((rows.stop - r,), -math.inf, dtype=torch.float64)
        for c in range(0, batch_size, tile_size):
            tile = logits(rows, slice(c, min(c + tile_size, batch_size)))
            lse = torch.logaddexp(lse, tile.logsumexp(1))
            if c == r:
                positives = tile.diagonal()
        total = total + (lse - positives).sum()
    return total / batch_size


@right("tiled_loss")
def loss_with_open_slices(logits, batch_size, tile_size):
    losses = []
    for r in range(0, batch_size, tile_size):
        parts = []
        for c in range(0, batch_size, tile_size):
            tile = logits(slice(r, r + tile_size), slice(c, c + tile_size))
            parts.append(torch.logsumexp(tile, 1))
            if c == r:
                own = torch.diag(tile)
        losses.append(torch.logsumexp(torch.stack(parts), 0) - own)
    return torch.cat(losses).mean()


@right("tiled_loss")
def loss_with_vectors(logits, batch_size, tile_size):
    lse = torch.full((batch_size,), -math.inf, dtype=torch.float64)
    positives = torch.zeros(batch_size, dtype=torch.float64)
    cuts = [slice(i, min(i + tile_size, batch_size)) for i in range(0, batch_size, tile_size)]
    for rows in cuts:
        for columns in cuts:
            tile = logits(rows, columns)
            lse[rows] = torch.logaddexp(lse[rows], torch.logsumexp(tile, dim=1))
            if rows == columns:
                positives[rows] = tile.diagonal()
    return (lse - positives).mean()


@right("tiled_loss")
def loss_with_positives_apart(logits, batch_size, tile_size):
    cuts = [slice(i, min(i + tile_size, batch_size)) for i in range(0, batch_size, tile_size)]
    total = torch.zeros((), dtype=torch.float64)
    for rows in cuts:
        lse = torch.logsumexp(torch.stack([logits(rows, c).logsumexp(1) for c in cuts], 1), 1)
        total += lse.sum() - logits(rows, rows).trace()
    return total / batch_size


@wrong("tiled_loss", "sum instead of mean")
def sum_not_mean(logits, batch_size, tile_size):
    cuts = [slice(i, min(i + tile_size, batch_size)) for i in range(0, batch_size, tile_size)]
    total = 0
    for rows in cuts:
        lse = torch.logsumexp(torch.stack([logits(rows, c).logsumexp(1) for c in cuts]), 0)
        total = total + (lse - logits(rows, rows).diagonal()).sum()
    return total


@wrong("tiled_loss", "mean over blocks of rows")
def mean_of_stripe_means(logits, batch_size, tile_size):
    cuts = [slice(i, min(i + tile_size, batch_size)) for i in range(0, batch_size, tile_size)]
    means = []
    for rows in cuts:
        lse = torch.logsumexp(torch.stack([logits(rows, c).logsumexp(1) for c in cuts]), 0)
        means.append((lse - logits(rows, rows).diagonal()).mean())
    return torch.stack(means).mean()


@wrong("tiled_loss", "diagonal tiles only")
def diagonal_tiles_only(logits, batch_size, tile_size):
    cuts = [slice(i, min(i + tile_size, batch_size)) for i in range(0, batch_size, tile_size)]
    return sum((t.logsumexp(1) - t.diagonal()).sum() for t in (logits(c, c) for c in cuts)) / batch_size


@wrong("tiled_loss", None)
def short_tiles_dropped(logits, batch_size, tile_size):
    count = batch_size // tile_size
    cuts = [slice(i * tile_size, (i + 1) * tile_size) for i in range(count)]
    total = 0
    for rows in cuts:
        lse = torch.logsumexp(torch.stack([logits(rows, c).logsumexp(1) for c in cuts]), 0)
        total = total + (lse - logits(rows, rows).diagonal()).sum()
    return total / batch_size


@wrong("tiled_loss", "positive out of the denominator")
def positive_left_out_of_the_sum(logits, batch_size, tile_size):
    cuts = [slice(i, min(i + tile_size, batch_size)) for i in range(0, batch_size, tile_size)]
    total = 0
    for rows in cuts:
        parts = []
        for columns in cuts:
            tile = logits(rows, columns)
            if rows == columns:
                own = tile.diagonal()
                tile = tile.masked_fill(torch.eye(len(tile), dtype=torch.bool), -math.inf)
            parts.append(tile.logsumexp(1))
        total = total + (torch.logsumexp(torch.stack(parts), 0) - own).sum()
    return total / batch_size


@wrong("tiled_loss", "down the columns")
def columns_for_rows(logits, batch_size, tile_size):
    cuts = [slice(i, min(i + tile_size, batch_size)) for i in range(0, batch_size, tile_size)]
    total = 0
    for columns in cuts:
        lse = torch.logsumexp(torch.stack([logits(r, columns).logsumexp(0) for r in cuts]), 0)
        total = total + (lse - logits(columns, columns).diagonal()).sum()
    return total / batch_size


@wrong("tiled_loss", "the whole matrix at once")
def whole_matrix(logits, batch_size, tile_size):
    whole = logits(slice(0, batch_size), slice(0, batch_size))
    return (whole.logsumexp(1) - whole.diagonal()).mean()


@wrong("tiled_loss", "tiles kept")
def tiles_kept(logits, batch_size, tile_size):
    cuts = [slice(i, min(i + tile_size, batch_size)) for i in range(0, batch_size, tile_size)]
    whole = torch.cat([torch.cat([logits(r, c) for c in cuts], 1) for r in cuts])
    return (whole.logsumexp(1) - whole.diagonal()).mean()


@wrong("tiled_loss", "a strip at once")
def whole_stripes(logits, batch_size, tile_size):
    total = 0
    for r in range(0, batch_size, tile_size):
        stripe = logits(slice(r, r + tile_size), slice(0, batch_size))
        total = total + (stripe.logsumexp(1) - stripe.diagonal(r)[: len(stripe)]).sum()
    return total / batch_size


@wrong("tiled_loss", "minus the loss")
def sign_turned(logits, batch_size, tile_size):
    return -loss_with_positives_apart(logits, batch_size, tile_size)


@wrong("tiled_loss", "positive forgotten")
def positives_forgotten(logits, batch_size, tile_size):
    cuts = [slice(i, min(i + tile_size, batch_size)) for i in range(0, batch_size, tile_size)]
    return torch.cat([torch.logsumexp(torch.stack([logits(r, c).logsumexp(1) for c in cuts]), 0) for r in cuts]).mean()


@wrong("tiled_loss", "log-sum-exps added")
def log_sum_exps_of_tiles_added(logits, batch_size, tile_size):
    cuts = [slice(i, min(i + tile_size, batch_size)) for i in range(0, batch_size, tile_size)]
    total = 0
    for rows in cuts:
        total = total + (sum(logits(rows, c).logsumexp(1) for c in cuts) - logits(rows, rows).diagonal()).sum()
    return total / batch_size


@wrong("tiled_loss", "exponentials without the maximum")
def plain_exponentials(logits, batch_size, tile_size):
    cuts = [slice(i, min(i + tile_size, batch_size)) for i in range(0, batch_size, tile_size)]
    total = 0
    for rows in cuts:
        summed = sum(logits(rows, c).exp().sum(1) for c in cuts)
        total = total + (summed.log() - logits(rows, rows).diagonal()).sum()
    return total / batch_size


@wrong("tiled_loss", "both directions")
def both_directions(logits, batch_size, tile_size):
    one = loss_with_positives_apart(logits, batch_size, tile_size)
    other = columns_for_rows(logits, batch_size, tile_size)
    return (one + other) / 2


@wrong("tiled_loss", "another form")
def a_plain_float(logits, batch_size, tile_size):
    return [loss_with_positives_apart(logits, batch_size, tile_size)]


@right("tile_gradient")
def gradient_of_both_softmaxes(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    g = (tile - row_lse[:, None]).exp() + (tile - column_lse[None, :]).exp()
    if holds_positives:
        g = g - 2 * torch.eye(*tile.shape, dtype=tile.dtype)
    return g / (2 * batch_size * temperature)


@right("tile_gradient")
def gradient_by_diagonal(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    p = torch.exp(tile - row_lse.unsqueeze(1))
    q = torch.exp(tile - column_lse)
    both = (p + q) / 2
    if holds_positives:
        both.diagonal().sub_(1)
    return both / batch_size / temperature


@right("tile_gradient")
def gradient_in_two(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    own = torch.eye(len(tile), tile.shape[1]).to(tile) if holds_positives else 0
    rows, columns = (tile.T - row_lse).T.exp() - own, (tile - column_lse).exp() - own
    return 0.5 * (rows + columns) / batch_size / temperature


@wrong("tile_gradient", "both directions added")
def no_half(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    return 2 * gradient_in_two(tile, row_lse, column_lse, batch_size, temperature, holds_positives)


@wrong("tile_gradient", "temperature forgotten")
def no_temperature(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    return gradient_in_two(tile, row_lse, column_lse, batch_size, temperature, holds_positives) * temperature


@wrong("tile_gradient", "multiplied by the temperature")
def temperature_multiplied(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    return gradient_in_two(tile, row_lse, column_lse, batch_size, temperature, holds_positives) * temperature**2


@wrong("tile_gradient", "1/B forgotten")
def no_batch(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    return gradient_in_two(tile, row_lse, column_lse, batch_size, temperature, holds_positives) * batch_size


@wrong("tile_gradient", "divided by the tile's rows")
def mean_over_the_tile(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    return gradient_in_two(tile, row_lse, column_lse, len(tile), temperature, holds_positives)


@wrong("tile_gradient", "rows' normaliser for both directions")
def rows_alone(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    own = torch.eye(*tile.shape).to(tile) if holds_positives else 0
    return ((tile - row_lse[:, None]).exp() - own) / batch_size / temperature


@wrong("tile_gradient", "columns' normaliser for both directions")
def columns_alone(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    own = torch.eye(*tile.shape).to(tile) if holds_positives else 0
    return ((tile - column_lse).exp() - own) / batch_size / temperature


@wrong("tile_gradient", "positive's -1 in one direction only")
def positive_once(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    own = torch.eye(*tile.shape).to(tile) if holds_positives else 0
    return ((tile - row_lse[:, None]).exp() + (tile - column_lse).exp() - own) / 2 / batch_size / temperature


@wrong("tile_gradient", "positives in every tile")
def positives_always(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    return gradient_in_two(tile, row_lse, column_lse, batch_size, temperature, True)


@wrong("tile_gradient", "positive's -1 forgotten")
def positives_never(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    return gradient_in_two(tile, row_lse, column_lse, batch_size, temperature, False)


@wrong("tile_gradient", "softmax within the tile")
def softmax_of_the_tile(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    own = torch.eye(*tile.shape).to(tile) if holds_positives else 0
    return (tile.softmax(1) + tile.softmax(0) - 2 * own) / 2 / batch_size / temperature


@wrong("tile_gradient", "row and column sums crossed")
def log_sum_exps_swapped(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    own = torch.eye(*tile.shape).to(tile) if holds_positives else 0
    rows, columns = (tile - row_lse).exp(), (tile - column_lse[:, None]).exp()
    return (rows + columns - 2 * own) / 2 / batch_size / temperature


@wrong("tile_gradient", "minus the gradient")
def sign_of_the_gradient(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    return -gradient_in_two(tile, row_lse, column_lse, batch_size, temperature, holds_positives)


@wrong("tile_gradient", "exponentials divided")
def exponentials_divided(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    own = torch.eye(*tile.shape).to(tile) if holds_positives else 0
    rows = tile.exp() / row_lse.exp()[:, None]
    return (rows + tile.exp() / column_lse.exp() - 2 * own) / 2 / batch_size / temperature


@wrong("tile_gradient", "divided by the logarithm")
def divided_by_lse(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    own = torch.eye(*tile.shape).to(tile) if holds_positives else 0
    return (tile.exp() / row_lse[:, None] + tile.exp() / column_lse - 2 * own) / 2 / batch_size / temperature


@wrong("tile_gradient", "logits divided again")
def tile_divided_by_temperature_again(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    return gradient_in_two(tile / temperature, row_lse, column_lse, batch_size, temperature, holds_positives)


@wrong("tile_gradient", "input changed in place")
def tile_changed_in_place(tile, row_lse, column_lse, batch_size, temperature, holds_positives):
    found = gradient_in_two(tile, row_lse, column_lse, batch_size, temperature, holds_positives)
    tile.copy_(found)
    return tile


@right("largest_dense_batch")
def batch_by_isqrt(budget, buffers):
    return math.isqrt(budget // (4 * buffers))


@right("largest_dense_batch")
def batch_by_search(budget, buffers):
    low, high = 0, budget + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if 4 * buffers * middle * middle <= budget else (low, middle)
    return low


@right("largest_dense_batch")
def batch_by_integer_newton(budget, buffers):
    n = budget // buffers // 4
    x = n
    while x * x > n:
        x = (x + n // x) // 2
    return x


@right("largest_dense_batch")
def batch_by_root_and_correction(budget, buffers):
    B = int((budget / 4 / buffers) ** 0.5) + 2
    while 4 * buffers * B * B > budget:
        B -= 1
    return B


@wrong("largest_dense_batch", "4 bytes forgotten")
def number_is_one_byte(budget, buffers):
    return math.isqrt(budget // buffers)


@wrong("largest_dense_batch", "2 bytes a number")
def two_byte_numbers(budget, buffers):
    return math.isqrt(budget // (2 * buffers))


@wrong("largest_dense_batch", "one matrix only")
def buffers_forgotten(budget, buffers):
    return math.isqrt(budget // 4)


@wrong("largest_dense_batch", "no root")
def no_root(budget, buffers):
    return budget // (4 * buffers)


@wrong("largest_dense_batch", "not rounded down")
def not_rounded(budget, buffers):
    return (budget / (4 * buffers)) ** 0.5


@wrong("largest_dense_batch", "rounded to the nearest")
def rounded(budget, buffers):
    return round((budget / (4 * buffers)) ** 0.5)


@wrong("largest_dense_batch", None)
def rounded_up(budget, buffers):
    return math.ceil((budget / (4 * buffers)) ** 0.5)


@wrong("largest_dense_batch", "root in float32")
def root_of_float32(budget, buffers):
    return int(torch.tensor(budget / (4 * buffers)).sqrt())


@wrong("largest_dense_batch", "root in float32")
def root_of_numpy_float32(budget, buffers):
    return int(np.sqrt(np.float32(budget / (4 * buffers))))


@wrong("largest_dense_batch", "a float for an int")
def floor_as_float(budget, buffers):
    return (budget // (4 * buffers)) ** 0.5 // 1


@wrong("largest_dense_batch", "4 rooted, buffers not")
def buffers_outside_the_root(budget, buffers):
    return math.isqrt(budget // 4) // buffers


@wrong("largest_dense_batch", "buffers rooted, 4 not")
def four_outside_the_root(budget, buffers):
    return math.isqrt(budget // buffers) // 4


@wrong("largest_dense_batch", "twice the bytes")
def halved_triangle(budget, buffers):
    return math.isqrt(budget // (2 * 4 * buffers))


@wrong("largest_dense_batch", "bits for bytes")
def bits_for_bytes(budget, buffers):
    return math.isqrt(budget // (32 * buffers))


@wrong("largest_dense_batch", "one too few")
def one_less(budget, buffers):
    return math.isqrt(budget // (4 * buffers)) - 1
