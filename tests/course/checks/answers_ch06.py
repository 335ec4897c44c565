"""Answers to chapter 06, in the styles and with the mistakes of readers."""

import bisect

import numpy as np
import torch

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch06")


@right("two_batch_sizes")
def sizes_by_min(batch_size, chunk_size, hard_negatives):
    passages = batch_size * (1 + hard_negatives)
    return min(chunk_size, passages), passages - 1


@right("two_batch_sizes")
def sizes_as_list(B, C, K):
    total = B + B * K
    return [C if total > C else total, total - 1]


@right("two_batch_sizes")
def sizes_of_numpy(B, C, K):
    n = np.int64(B) * (1 + K)
    return np.minimum(n, C), n - 1


@right("two_batch_sizes")
def sizes_as_tensors(B, C, K):
    n = torch.tensor(B * (K + 1))
    return torch.clamp(n, max=C), n - 1


@wrong("two_batch_sizes", "chunk larger than the tower")
def chunk_even_if_larger(batch_size, chunk_size, hard_negatives):
    return chunk_size, batch_size * (1 + hard_negatives) - 1


@wrong("two_batch_sizes", "positive counted as wrong")
def own_positive_counted(B, C, K):
    return min(C, B * (1 + K)), B * (1 + K)


@wrong("two_batch_sizes", "hard negatives forgotten")
def in_batch_only(B, C, K):
    return min(C, B * (1 + K)), B - 1


@wrong("two_batch_sizes", "own hard negatives only")
def own_hard_negatives_only(B, C, K):
    return min(C, B * (1 + K)), B - 1 + K


@wrong("two_batch_sizes", None)
def chunk_is_the_batch(B, C, K):
    return min(C, B * (1 + K)), C * (1 + K) - 1


@wrong("two_batch_sizes", "negatives of a chunk's rows")
def negatives_of_a_chunk(B, C, K):
    return min(C, B * (1 + K)), min(C, B * (1 + K)) - 1


@wrong("two_batch_sizes", "a chunk of queries with all their passages")
def chunk_counts_queries(B, C, K):
    return min(C, B) * (1 + K), B * (1 + K) - 1


@wrong("two_batch_sizes", "limited by the queries")
def chunk_of_queries(B, C, K):
    return min(C, B), B * (1 + K) - 1


@wrong("two_batch_sizes", "whole batch encoded at once")
def whole_batch_encoded(B, C, K):
    return B * (1 + K), B * (1 + K) - 1


@wrong("two_batch_sizes", "the two are swapped")
def swapped(B, C, K):
    return B * (1 + K) - 1, min(C, B * (1 + K))


@wrong("two_batch_sizes", None)
def hard_negatives_forgotten(B, C, K):
    return min(C, B), B - 1


@wrong("two_batch_sizes", "own hard negatives forgotten")
def all_hard_negatives_of_others(B, C, K):
    return min(C, B * (1 + K)), (B - 1) * (1 + K)


@wrong("two_batch_sizes", "how many chunks")
def chunks_counted(B, C, K):
    return -(-B * (1 + K) // C), B * (1 + K) - 1


@wrong("two_batch_sizes", "a float for an int")
def as_floats(B, C, K):
    return float(min(C, B * (1 + K))), float(B * (1 + K) - 1)


@wrong("two_batch_sizes", "another form")
def one_number(B, C, K):
    return B * (1 + K) - 1


@wrong("two_batch_sizes", "another form")
def as_dict(B, C, K):
    return {"encoded": min(C, B * (1 + K)), "wrong": B * (1 + K) - 1}


@right("peak_of_step")
def peak_by_generator(fixed, per_row, rows):
    return max(f + p * rows for f, p in zip(fixed, per_row, strict=True))


@right("peak_of_step")
def peak_by_loop(fixed, per_row, rows):
    best = fixed[0] + per_row[0] * rows
    for i in range(1, len(fixed)):
        if fixed[i] + per_row[i] * rows > best:
            best = fixed[i] + per_row[i] * rows
    return best


@right("peak_of_step")
def peak_by_numpy(fixed, per_row, rows):
    return (np.array(fixed) + np.array(per_row) * rows).max()


@right("peak_of_step")
def peak_by_torch(fixed, per_row, rows):
    return int((torch.tensor(fixed) + torch.tensor(per_row) * rows).max())


@right("peak_of_step")
def peak_by_sorting(fixed, per_row, rows):
    return sorted(fixed[i] + per_row[i] * rows for i in range(len(fixed)))[-1]


@wrong("peak_of_step", "phases added up")
def sum_of_phases(fixed, per_row, rows):
    return sum(f + p * rows for f, p in zip(fixed, per_row, strict=True))


@wrong("peak_of_step", "maxima of the two parts")
def maxima_apart(fixed, per_row, rows):
    return max(fixed) + max(per_row) * rows


@wrong("peak_of_step", "last phase only")
def last_phase(fixed, per_row, rows):
    return fixed[-1] + per_row[-1] * rows


@wrong("peak_of_step", "first phase only")
def first_phase(fixed, per_row, rows):
    return fixed[0] + per_row[0] * rows


@wrong("peak_of_step", "fixed part forgotten")
def only_the_growing_part(fixed, per_row, rows):
    return max(p * rows for p in per_row)


@wrong("peak_of_step", "highest at no rows")
def phase_of_largest_fixed(fixed, per_row, rows):
    i = fixed.index(max(fixed))
    return fixed[i] + per_row[i] * rows


@wrong("peak_of_step", "steepest phase only")
def phase_of_steepest_row(fixed, per_row, rows):
    i = per_row.index(max(per_row))
    return fixed[i] + per_row[i] * rows


@wrong("peak_of_step", "fixed part once a row")
def rows_times_all(fixed, per_row, rows):
    return max((f + p) * rows for f, p in zip(fixed, per_row, strict=True))


@wrong("peak_of_step", "fixed parts added up")
def fixed_added_up(fixed, per_row, rows):
    return sum(fixed) + max(per_row) * rows


@wrong("peak_of_step", "lowest phase")
def least_phase(fixed, per_row, rows):
    return min(f + p * rows for f, p in zip(fixed, per_row, strict=True))


@wrong("peak_of_step", "another form")
def all_phases(fixed, per_row, rows):
    return [f + p * rows for f, p in zip(fixed, per_row, strict=True)]


@wrong("peak_of_step", None)
def four_phases(fixed, per_row, rows):
    return max(fixed[i] + per_row[i] * rows for i in range(4))


@wrong("peak_of_step", "a float for an int")
def float_of_bytes(fixed, per_row, rows):
    return max(f + p * rows for f, p in zip(fixed, per_row, strict=True)) / 1


@wrong("peak_of_step", "rows forgotten")
def rows_forgotten(fixed, per_row, rows):
    return max(f + p for f, p in zip(fixed, per_row, strict=True))


@wrong("peak_of_step", "which phase and not how much")
def which_phase(fixed, per_row, rows):
    return int(np.argmax(np.array(fixed) + np.array(per_row) * rows))


@right("largest_chunk")
def by_counting_down(forecast_peak, budget, batch_size):
    for size in range(batch_size, 0, -1):
        if forecast_peak(size) <= budget:
            return size
    return 0


@right("largest_chunk")
def by_bisection(forecast_peak, budget, batch_size):
    low, high = 0, batch_size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if forecast_peak(middle) <= budget else (low, middle - 1)
    return low


@right("largest_chunk")
def by_max_of_all(forecast_peak, budget, batch_size):
    return max((c for c in range(1, batch_size + 1) if forecast_peak(c) <= budget), default=0)


@right("largest_chunk")
def by_bisect(forecast_peak, budget, batch_size):
    return bisect.bisect_right(range(1, batch_size + 1), budget, key=forecast_peak)


@right("largest_chunk")
def by_counting_up(forecast_peak, budget, batch_size):
    size = 0
    while size < batch_size and forecast_peak(size + 1) <= budget:
        size += 1
    return size


@right("largest_chunk")
def by_sum(forecast_peak, budget, batch_size):
    return sum(forecast_peak(c) <= budget for c in range(1, batch_size + 1))


@wrong("largest_chunk", "exact fit refused")
def strictly_below(forecast_peak, budget, batch_size):
    return max((c for c in range(1, batch_size + 1) if forecast_peak(c) < budget), default=0)


@wrong("largest_chunk", "one too many")
def first_too_large(forecast_peak, budget, batch_size):
    for size in range(1, batch_size + 1):
        if forecast_peak(size) > budget:
            return size
    return batch_size


@wrong("largest_chunk", "a row where none fits")
def one_at_least(forecast_peak, budget, batch_size):
    for size in range(batch_size, 1, -1):
        if forecast_peak(size) <= budget:
            return size
    return 1


@wrong("largest_chunk", "batch itself left out")
def range_ends_early(forecast_peak, budget, batch_size):
    return max((c for c in range(1, batch_size) if forecast_peak(c) <= budget), default=0)


@wrong("largest_chunk", "powers of two only")
def powers_of_two(forecast_peak, budget, batch_size):
    size = 0
    while max(2 * size, 1) <= batch_size and forecast_peak(max(2 * size, 1)) <= budget:
        size = max(2 * size, 1)
    return size


@wrong("largest_chunk", "larger than the batch")
def beyond_the_batch(forecast_peak, budget, batch_size):
    size = 0
    while forecast_peak(size + 1) <= budget and size < 10 * batch_size:
        size += 1
    return size


@wrong("largest_chunk", "one line through two chunks")
def by_a_line(forecast_peak, budget, batch_size):
    slope = forecast_peak(2) - forecast_peak(1)
    return max(0, min(batch_size, 1 + (budget - forecast_peak(1)) // max(1, slope)))


@wrong("largest_chunk", "budget divided by one row's peak")
def by_division(forecast_peak, budget, batch_size):
    return min(batch_size, budget // forecast_peak(1))


@wrong("largest_chunk", "nothing returned")
def none_where_none_fits(forecast_peak, budget, batch_size):
    sizes = [c for c in range(1, batch_size + 1) if forecast_peak(c) <= budget]
    return sizes[-1] if sizes else None


@wrong("largest_chunk", "nothing to take the largest of")
def raises_where_none_fits(forecast_peak, budget, batch_size):
    return max(c for c in range(1, batch_size + 1) if forecast_peak(c) <= budget)


@wrong("largest_chunk", "bytes and not rows")
def the_peak_itself(forecast_peak, budget, batch_size):
    return max((forecast_peak(c) for c in range(1, batch_size + 1) if forecast_peak(c) <= budget), default=0)


@wrong("largest_chunk", "smallest chunk that fits")
def smallest_that_fits(forecast_peak, budget, batch_size):
    for size in range(1, batch_size + 1):
        if forecast_peak(size) <= budget:
            return size
    return 0


@wrong("largest_chunk", "divisors of the batch only")
def only_divisors(forecast_peak, budget, batch_size):
    return max((c for c in range(1, batch_size + 1) if batch_size % c == 0 and forecast_peak(c) <= budget), default=0)


@wrong("largest_chunk", "-1 where none fits")
def minus_one_where_none_fits(forecast_peak, budget, batch_size):
    return next((c for c in range(batch_size, 0, -1) if forecast_peak(c) <= budget), -1)


@wrong("largest_chunk", "batch itself left out")
def bisection_off_by_one(forecast_peak, budget, batch_size):
    low, high = 1, batch_size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if forecast_peak(middle) <= budget else (low, middle)
    return low if forecast_peak(low) <= budget else 0
