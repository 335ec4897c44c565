"""Answers to chapter 09, in the styles and with the mistakes of readers."""

import numpy as np
import torch

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch09")


@right("loss_to_backpropagate")
def share_times_ranks(own_loss, rows, rank):
    return own_loss * rows[rank] * len(rows) / sum(rows)


@right("loss_to_backpropagate")
def over_the_mean_share(own_loss, rows, rank):
    mean = sum(rows) / len(rows)
    return rows[rank] / mean * own_loss


@right("loss_to_backpropagate")
def share_by_numpy(own_loss, rows, rank):
    return own_loss * (rows[rank] / np.mean(rows))


@right("loss_to_backpropagate")
def share_as_tensor(own_loss, rows, rank):
    return torch.as_tensor(own_loss, dtype=torch.float64) * len(rows) * (rows[rank] / sum(rows))


@wrong("loss_to_backpropagate", "mean of means")
def own_loss_alone(own_loss, rows, rank):
    return own_loss


@wrong("loss_to_backpropagate", "W without the share")
def times_ranks(own_loss, rows, rank):
    return own_loss * len(rows)


@wrong("loss_to_backpropagate", "mean divided by W")
def over_ranks(own_loss, rows, rank):
    return own_loss / len(rows)


@wrong("loss_to_backpropagate", "W forgotten")
def share_only(own_loss, rows, rank):
    return own_loss * rows[rank] / sum(rows)


@wrong("loss_to_backpropagate", "sum over its rows")
def sum_over_own(own_loss, rows, rank):
    return own_loss * rows[rank]


@wrong("loss_to_backpropagate", "divided by W")
def share_over_ranks(own_loss, rows, rank):
    return own_loss * rows[rank] / sum(rows) / len(rows)


@wrong("loss_to_backpropagate", "weighted the wrong way round")
def inverse_share(own_loss, rows, rank):
    return own_loss * sum(rows) / rows[rank] / len(rows)


@wrong("loss_to_backpropagate", "the first rank's rows")
def first_ranks_rows(own_loss, rows, rank):
    return own_loss * rows[0] * len(rows) / sum(rows)


@wrong("loss_to_backpropagate", "sum times W")
def sum_times_ranks(own_loss, rows, rank):
    return own_loss * rows[rank] * len(rows)


@wrong("loss_to_backpropagate", "another rank's rows")
def rank_from_one(own_loss, rows, rank):
    return own_loss * rows[rank - 1] * len(rows) / sum(rows)


@wrong("loss_to_backpropagate", "mean taken for one row")
def over_all_rows(own_loss, rows, rank):
    return own_loss / sum(rows)


@wrong("loss_to_backpropagate", "weight rounded down")
def whole_quotient(own_loss, rows, rank):
    return own_loss * (rows[rank] * len(rows) // sum(rows))


@wrong("loss_to_backpropagate", "share upside down")
def total_over_own(own_loss, rows, rank):
    return own_loss * sum(rows) / rows[rank]


@right("gather_backward")
def own_slice_of_the_sum(gradients, rows, rank):
    start = sum(rows[:rank])
    return sum(gradients)[start : start + rows[rank]]


@right("gather_backward")
def sum_of_slices(gradients, rows, rank):
    start = sum(rows[:rank])
    return torch.stack([g[start : start + rows[rank]] for g in gradients]).sum(0)


@right("gather_backward")
def split_of_the_sum(gradients, rows, rank):
    return torch.stack(gradients).sum(dim=0).split(rows)[rank]


@right("gather_backward")
def sum_by_cumsum(gradients, rows, rank):
    ends = np.cumsum([0, *rows])
    total = torch.zeros_like(gradients[0])
    for g in gradients:
        total += g
    return total[ends[rank] : ends[rank + 1]]


@right("gather_backward")
def sum_by_loop(gradients, rows, rank):
    own = gradients[0].split(rows)[rank].clone()
    for other in gradients[1:]:
        own += other.split(rows)[rank]
    return own


@wrong("gather_backward", "own gradient alone")
def own_loss_only(gradients, rows, rank):
    return gradients[rank].split(rows)[rank]


@wrong("gather_backward", "mean instead of sum")
def mean_for_sum(gradients, rows, rank):
    return (sum(gradients) / len(gradients)).split(rows)[rank]


@wrong("gather_backward", "starts at rank * b")
def equal_shares(gradients, rows, rank):
    return sum(gradients)[rank * rows[rank] : (rank + 1) * rows[rank]]


@wrong("gather_backward", "starts at rank times the first rank's rows")
def equal_shares_of_the_first(gradients, rows, rank):
    return sum(gradients)[rank * rows[0] : rank * rows[0] + rows[rank]]


@wrong("gather_backward", "nothing cut out")
def everything(gradients, rows, rank):
    return sum(gradients)


@wrong("gather_backward", "own gradient, nothing cut out")
def whole_own(gradients, rows, rank):
    return gradients[rank]


@wrong("gather_backward", "another rank's rows")
def from_the_start(gradients, rows, rank):
    return sum(gradients)[: rows[rank]]


@wrong("gather_backward", "rank 0's rows")
def as_many_as_the_first(gradients, rows, rank):
    return sum(gradients)[: rows[0]]


@wrong("gather_backward", "no end")
def end_forgotten(gradients, rows, rank):
    return sum(gradients)[sum(rows[:rank]) :]


@wrong("gather_backward", "own gradient left out")
def others_only(gradients, rows, rank):
    return sum(g for i, g in enumerate(gradients) if i != rank).split(rows)[rank]


@wrong("gather_backward", "starts a rank too late")
def start_off_by_a_rank(gradients, rows, rank):
    start = sum(rows[: rank + 1])
    return sum(gradients)[start : start + rows[rank]]


@wrong("gather_backward", "multiplied by W")
def scaled_by_ranks(gradients, rows, rank):
    return len(rows) * sum(gradients).split(rows)[rank]


@wrong("gather_backward", "input changed in place")
def added_in_place(gradients, rows, rank):
    total = gradients[0]
    for g in gradients[1:]:
        total += g
    return total.split(rows)[rank]


@wrong("gather_backward", "another form")
def as_a_list(gradients, rows, rank):
    return sum(gradients).split(rows)[rank].tolist()


@wrong("gather_backward", "laid one below the other")
def concatenated(gradients, rows, rank):
    return torch.cat([g.split(rows)[rank] for g in gradients])


@wrong("gather_backward", "rows added up too")
def summed_over_rows_too(gradients, rows, rank):
    return sum(gradients).split(rows)[rank].sum(0)


@right("average_over_ranks")
def average_with_zeros(gradients):
    found = []
    for column in zip(*gradients, strict=True):
        there = [g for g in column if g is not None]
        found.append(sum(there) / len(gradients) if there else None)
    return found


@right("average_over_ranks")
def average_by_index(gradients):
    ranks, out = len(gradients), []
    for p in range(len(gradients[0])):
        total = None
        for r in range(ranks):
            g = gradients[r][p]
            if g is not None:
                total = g / ranks if total is None else total + g / ranks
        out.append(total)
    return out


@right("average_over_ranks")
def average_as_tuple(gradients):
    def mean(column):
        there = [g for g in column if g is not None]
        return torch.stack(there).sum(0) / len(column) if there else None

    return tuple(map(mean, zip(*gradients, strict=True)))


@right("average_over_ranks")
def average_by_filling(gradients):
    result = []
    for column in zip(*gradients, strict=False):
        like = next((g for g in column if g is not None), None)
        filled = [torch.zeros_like(like) if g is None else g for g in column] if like is not None else None
        result.append(None if filled is None else torch.stack(filled).mean(0))
    return result


@wrong("average_over_ranks", "divided by those who have it")
def mean_of_those_that_have_one(gradients):
    columns = [[g for g in column if g is not None] for column in zip(*gradients, strict=True)]
    return [sum(there) / len(there) if there else None for there in columns]


@wrong("average_over_ranks", "sum instead of mean")
def summed(gradients):
    columns = [[g for g in column if g is not None] for column in zip(*gradients, strict=True)]
    return [sum(there) if there else None for there in columns]


@wrong("average_over_ranks", "dropped where a rank lacks it")
def none_if_any_lacks(gradients):
    columns = zip(*gradients, strict=True)
    return [None if any(g is None for g in c) else sum(c) / len(c) for c in columns]


@wrong("average_over_ranks", "zero where nobody has one")
def zeros_where_nobody_has(gradients):
    out = []
    for column in zip(*gradients, strict=True):
        there = [g for g in column if g is not None]
        out.append(sum(there) / len(gradients) if there else torch.zeros(1))
    return out


@wrong("average_over_ranks", "zero where nobody has one")
def zero_number_where_nobody_has(gradients):
    return [sum(g for g in column if g is not None) / len(gradients) for column in zip(*gradients, strict=True)]


@wrong("average_over_ranks", "None left out of the list")
def parameters_dropped(gradients):
    out = []
    for column in zip(*gradients, strict=True):
        there = [g for g in column if g is not None]
        if there:
            out.append(sum(there) / len(gradients))
    return out


@wrong("average_over_ranks", "first rank alone, as it is")
def first_rank_only(gradients):
    return list(gradients[0])


@wrong("average_over_ranks", None)
def ranks_for_parameters(gradients):
    out = []
    for row in gradients:
        there = [g for g in row if g is not None]
        out.append(sum(g.mean() for g in there) / len(row) if there else None)
    return out


@wrong("average_over_ranks", "None taken for a tensor")
def none_is_not_handled(gradients):
    return [torch.stack(column).mean(0) for column in zip(*gradients, strict=True)]


@wrong("average_over_ranks", "None taken for a tensor")
def begun_with_none(gradients):
    means = []
    for column in zip(*gradients, strict=True):
        total = None
        for gradient in column:
            if gradient is not None:
                total = total + gradient
        means.append(total)
    return means


@wrong("average_over_ranks", "a call that gives None")
def kept_what_append_returns(gradients):
    means = []
    for column in zip(*gradients, strict=True):
        means = means.append(column[0])
    return means


@wrong("average_over_ranks", "a call that gives None")
def a_list_begun_with_none(gradients):
    found = [None] * len(gradients[0])
    for parameter, column in enumerate(zip(*gradients, strict=True)):
        for gradient in column:
            found[parameter].append(gradient)
    return found


@wrong("average_over_ranks", "a call that gives None")
def written_into_what_append_returns(gradients):
    found = [].append(None)
    for place, column in enumerate(zip(*gradients, strict=True)):
        there = [gradient for gradient in column if gradient is not None]
        found[place] = sum(there) / len(gradients)
    return found


@wrong("average_over_ranks", "nothing returned")
def where_all_have_a_gradient_it_ends_without_return(gradients):
    if any(gradient is None for column in gradients for gradient in column):
        means = []
        for column in zip(*gradients, strict=True):
            there = [gradient for gradient in column if gradient is not None]
            means.append(sum(there) / len(gradients) if there else None)
        return means


@wrong("average_over_ranks", "a call that gives None")
def kept_what_reverse_returns(gradients):
    means = []
    for column in zip(*gradients, strict=True):
        there = [gradient for gradient in column if gradient is not None]
        there = there.reverse()
        means.append(sum(there) / len(gradients))
    return means


@wrong("average_over_ranks", "decided by the first rank")
def decided_by_the_first_rank(gradients):
    out = []
    for column in zip(*gradients, strict=True):
        if column[0] is None:
            out.append(None)
        else:
            out.append(sum(g for g in column if g is not None) / len(gradients))
    return out


@wrong("average_over_ranks", "divided by the parameters")
def divided_by_parameters(gradients):
    columns = [[g for g in column if g is not None] for column in zip(*gradients, strict=True)]
    return [sum(there) / len(columns) if there else None for there in columns]


@wrong("average_over_ranks", "zeros dropped")
def falsy_gradients_skipped(gradients):
    out = []
    for column in zip(*gradients, strict=True):
        there = [g for g in column if g is not None and g.any()]
        out.append(sum(there) / len(gradients) if there else None)
    return out


@wrong("average_over_ranks", "input changed in place")
def added_in_place_too(gradients):
    out = []
    for column in zip(*gradients, strict=True):
        there = [g for g in column if g is not None]
        for g in there[1:]:
            there[0].add_(g)
        out.append(there[0].div_(len(gradients)) if there else None)
    return out


@wrong("average_over_ranks", "one number a parameter")
def scalars(gradients):
    out = []
    for column in zip(*gradients, strict=True):
        there = [g for g in column if g is not None]
        out.append(sum(there).mean() if there else None)
    return out


@right("ring_schedule")
def behind_by_hops(rank, ranks):
    return [(rank - hop) % ranks for hop in range(ranks)]


@right("ring_schedule")
def by_walking(rank, ranks):
    owners = []
    owner = rank
    for _ in range(ranks):
        owners.append(owner)
        owner = owner - 1 if owner > 0 else ranks - 1
    return owners


@right("ring_schedule")
def by_two_ranges(rank, ranks):
    return [*range(rank, -1, -1), *range(ranks - 1, rank, -1)]


@right("ring_schedule")
def as_a_tuple(rank, ranks):
    return tuple((rank + ranks - hop) % ranks for hop in range(ranks))


@right("ring_schedule")
def by_simulation(rank, ranks):
    blocks, seen = list(range(ranks)), []
    for _ in range(ranks):
        seen.append(blocks[rank])
        blocks = [blocks[-1], *blocks[:-1]]
    return seen


@right("ring_schedule")
def of_numpy_ints(rank, ranks):
    return list((rank - np.arange(ranks)) % ranks)


@wrong("ring_schedule", "the other way round")
def the_other_way(rank, ranks):
    return [(rank + hop) % ranks for hop in range(ranks)]


@wrong("ring_schedule", "starts with the block before")
def starts_after_a_hop(rank, ranks):
    return [(rank - hop) % ranks for hop in range(1, ranks + 1)]


@wrong("ring_schedule", "one hop too few")
def one_hop_too_few(rank, ranks):
    return [(rank - hop) % ranks for hop in range(ranks - 1)]


@wrong("ring_schedule", "own block left out")
def own_left_out(rank, ranks):
    return [(rank - hop) % ranks for hop in range(1, ranks)]


@wrong("ring_schedule", "one hop too many")
def one_hop_too_many(rank, ranks):
    return [(rank - hop) % ranks for hop in range(ranks + 1)]


@wrong("ring_schedule", "owners in order")
def from_zero(rank, ranks):
    return list(range(ranks))


@wrong("ring_schedule", "owners below zero")
def no_modulo(rank, ranks):
    return [rank - hop for hop in range(ranks)]


@wrong("ring_schedule", "absolute values")
def absolute_value(rank, ranks):
    return [abs(rank - hop) for hop in range(ranks)]


@wrong("ring_schedule", "modulo W - 1")
def modulo_minus_one(rank, ranks):
    return [(rank - hop) % (ranks - 1) if ranks > 1 else 0 for hop in range(ranks)]


@wrong("ring_schedule", "where the own block goes")
def where_my_block_goes(rank, ranks):
    return [(rank + hop + 1) % ranks for hop in range(ranks)]


@wrong("ring_schedule", "another form")
def a_set(rank, ranks):
    return {(rank - hop) % ranks for hop in range(ranks)}


@wrong("ring_schedule", "the same for every rank")
def rank_forgotten(rank, ranks):
    return [-hop % ranks for hop in range(ranks)]


@wrong("ring_schedule", "always its own")
def always_own(rank, ranks):
    return [rank] * ranks


@wrong("ring_schedule", "another form")
def a_generator(rank, ranks):
    return ((rank - hop) % ranks for hop in range(ranks))
