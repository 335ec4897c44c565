"""Chapter 06's exercises: wrong and right answers in other words than the check's own."""

import bisect
import math

import numpy as np
import pytest

from gclib.course.checks import ch06


def own_group(batch_size, chunk_size, hard_negatives):
    passages = batch_size + batch_size * hard_negatives
    return sorted([chunk_size, passages])[0], (batch_size - 1) + hard_negatives


def other_groups(batch_size, chunk_size, hard_negatives):
    group = 1 + hard_negatives
    return min(chunk_size, batch_size * group), batch_size * group - group


def mined_ones(batch_size, chunk_size, hard_negatives):
    passages = batch_size * (1 + hard_negatives)
    return min(chunk_size, passages), passages - batch_size


def everything_times_rows(fixed, per_row, rows):
    return int((np.array(fixed) + np.array(per_row)).max() * rows)


def rows_alone(fixed, per_row, rows):
    return rows * max(per_row)


def divides(forecast_peak, budget, batch_size):
    fits = [c for c in range(1, batch_size + 1) if not batch_size % c and forecast_peak(c) <= budget]
    return fits[-1] if fits else 0


def chunks_of_all_passages(batch_size, chunk_size, hard_negatives):
    passages = batch_size * (1 + hard_negatives)
    return math.ceil(passages / chunk_size), passages - 1


def a_loss_a_chunk(batch_size, chunk_size, hard_negatives):
    rows = min(chunk_size, batch_size * (1 + hard_negatives))
    return rows, rows - 1


def joined_lists(fixed, per_row, rows):
    return max(fixed + per_row * rows)


def number_of_the_highest(fixed, per_row, rows):
    peaks = [f + p * rows for f, p in zip(fixed, per_row, strict=True)]
    return peaks.index(max(peaks))


def in_mib(fixed, per_row, rows):
    return max(np.array(fixed) + np.array(per_row) * rows) / 1024**2


def down_to_two(forecast_peak, budget, batch_size):
    for chunk in range(batch_size, 1, -1):
        if forecast_peak(chunk) <= budget:
            return chunk
    return 0


def up_to_the_first(forecast_peak, budget, batch_size):
    for chunk in range(1, batch_size + 1):
        if forecast_peak(chunk) <= budget:
            return chunk
    return 0


def with_room(forecast_peak, budget, batch_size):
    return max((c for c in range(1, batch_size + 1) if forecast_peak(c) <= budget * 0.9), default=0)


def highest_peak(forecast_peak, budget, batch_size):
    peaks = [forecast_peak(chunk) for chunk in range(1, batch_size + 1)]
    return max([peak for peak in peaks if peak <= budget] or [0])


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch06.two_batch_sizes, own_group, "own hard negatives only"),
        (ch06.two_batch_sizes, other_groups, "own hard negatives forgotten"),
        (ch06.two_batch_sizes, mined_ones, "hard negatives alone"),
        (ch06.two_batch_sizes, chunks_of_all_passages, "how many chunks"),
        (ch06.two_batch_sizes, a_loss_a_chunk, "negatives of a chunk's rows"),
        (ch06.peak_of_step, joined_lists, "rows' part forgotten"),
        (ch06.peak_of_step, number_of_the_highest, "which phase and not how much"),
        (ch06.peak_of_step, in_mib, "MiB and not bytes"),
        (ch06.peak_of_step, everything_times_rows, "fixed part once a row"),
        (ch06.peak_of_step, rows_alone, "fixed part forgotten"),
        (ch06.largest_chunk, down_to_two, "chunk of one row left out"),
        (ch06.largest_chunk, up_to_the_first, "smallest chunk that fits"),
        (ch06.largest_chunk, with_room, "a tenth left free"),
        (ch06.largest_chunk, divides, "divisors of the batch only"),
        (ch06.largest_chunk, highest_peak, "bytes and not rows"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    for seed in range(4):
        verdict = exercise.judge(answer, seed=seed)
        assert verdict.status == "wrong" and verdict.misconception == name


@pytest.mark.parametrize(
    "answer",
    [
        lambda peak, budget, batch: max(c for c in range(1, batch + 1) if peak(c) <= budget),
        lambda peak, budget, batch: next(c for c in range(batch, 0, -1) if peak(c) <= budget),
    ],
)
def test_a_card_where_nothing_fits_is_told_in_words(answer):
    verdict = ch06.largest_chunk.judge(answer)
    assert (verdict.status, verdict.misconception) == ("wrong", "nothing to take the largest of")


@pytest.mark.parametrize(
    "answer",
    [
        lambda peak, budget, batch: [c for c in range(1, batch + 1) if peak(c) <= budget][-1],
        lambda peak, budget, batch: next(
            c for c in range(batch + 1) if [peak(n + 1) for n in range(batch)][c] > budget
        ),
        lambda peak, budget, batch: max(
            c for peaks in [[peak(c) for c in range(1, batch + 1)]] for c in range(1, batch + 1) if peaks[c] <= budget
        ),
    ],
)
def test_an_index_past_the_end_is_not_taken_for_an_empty_choice(answer):
    verdict = ch06.largest_chunk.judge(answer)
    assert (verdict.status, verdict.misconception) == ("wrong", "index past the end")


def test_an_answer_that_returns_nothing_where_nothing_fits_is_not_taken_for_the_stub():
    def no_last_line(forecast_peak, budget, batch_size):
        for chunk in range(batch_size, 0, -1):
            if forecast_peak(chunk) <= budget:
                return chunk

    verdict = ch06.largest_chunk.judge(no_last_line)
    assert verdict.status == "wrong" and "returns nothing for this input" in verdict.explanation


def test_two_ints_are_asked_for():
    verdict = ch06.two_batch_sizes.judge(lambda b, c, k: (float(min(c, b + b * k)), b + b * k - 1))
    assert verdict.status == "wrong" and "an int is asked for" in verdict.explanation


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (ch06.two_batch_sizes, lambda b, c, k: [np.minimum(c, b * (1 + k)), math.prod([b, 1 + k]) - 1]),
        (ch06.peak_of_step, lambda fixed, per_row, rows: (np.array(fixed) + np.array(per_row) * rows).max()),
        (ch06.largest_chunk, lambda peak, budget, batch: bisect.bisect_right(range(1, batch + 1), budget, key=peak)),
    ],
)
def test_right_answers_in_other_words_pass(exercise, answer):
    assert exercise.judge(answer, seed=1).status == "correct"
