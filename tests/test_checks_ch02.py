"""Chapter 02's exercises: wrong and right answers in other words than the check's own."""

import math

import pytest

from gclib.checks import ch02


def forgot_heads(batch_size, tokens, heads, layers):
    return sum(4 * batch_size * tokens * tokens for _ in range(layers))


def per_token(batch_size, tokens, heads, layers):
    return batch_size * heads * layers * (tokens << 2)


def scaled_up(batches, peaks, batch_size):
    return peaks[1] * (batch_size / batches[1])


def from_zero(batches, peaks, batch_size):
    (b, c), (m, n) = batches, peaks
    return batch_size * (n - m) / (c - b)


def no_model(fixed, per_row, budget):
    return int(budget / per_row)


def next_one(fixed, per_row, budget):
    return max(0, math.ceil((budget - fixed) / per_row))


def negative(fixed, per_row, budget):
    return math.floor((budget - fixed) / per_row)


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch02.model_bytes, lambda parameters, optimizer: 4.0 * parameters, "weights alone, or numbers for bytes"),
        (ch02.model_bytes, lambda p, o: sum([4 * p] * (3 if o == "adamw" else 2)), "one number a parameter short"),
        (ch02.model_bytes, lambda parameters, optimizer: parameters << 4, "states for plain SGD"),
        (ch02.attention_bytes, forgot_heads, "one head"),
        (ch02.attention_bytes, per_token, "linear in the tokens"),
        (ch02.predict_peak, scaled_up, "through the origin"),
        (ch02.predict_peak, from_zero, "slope alone"),
        (ch02.largest_batch_that_fits, no_model, "the model forgotten"),
        (ch02.largest_batch_that_fits, next_one, "rounded up"),
        (ch02.largest_batch_that_fits, negative, "below zero"),
    ],
)
def test_wrong_answers_in_other_words_are_recognised(exercise, answer, name):
    verdict = exercise.judge(answer, seed=1)
    assert verdict.status == "wrong" and verdict.misconception == name


def walk(batches, peaks, batch_size):
    share = (batch_size - batches[0]) / (batches[1] - batches[0])
    return round((1 - share) * peaks[0] + share * peaks[1])


def count_up(fixed, per_row, budget):
    return sum(fixed + per_row * n <= budget for n in range(1, 10_000))


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (ch02.model_bytes, lambda parameters, optimizer: 8 * parameters * (2 if optimizer == "adamw" else 1)),
        (ch02.attention_bytes, lambda b, t, h, n: math.prod([b, h, t, t, n, 4])),
        (ch02.predict_peak, walk),
        (ch02.largest_batch_that_fits, count_up),
    ],
)
def test_right_answers_in_other_words_pass(exercise, answer):
    assert exercise.judge(answer, seed=1).status == "correct"
