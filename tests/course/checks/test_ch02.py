"""Chapter 02's exercises: wrong and right answers in other words than the check's own."""

import math

import numpy as np
import pytest

from gclib.course.checks import ch02


def forgot_heads(batch_size, tokens, heads, layers):
    return sum(4 * batch_size * tokens * tokens for _ in range(layers))


def per_token(batch_size, tokens, heads, layers):
    return batch_size * heads * layers * (tokens << 2)


def scaled_up(batches, peaks, batch_size, parameters):
    return peaks[1] * (batch_size / batches[1]) - 8 * parameters


def from_zero(batches, peaks, batch_size, parameters):
    (b, c), (m, n) = batches, peaks
    return batch_size * (n - m) / (c - b) - 8 * parameters


def no_model(fixed, per_row, budget):
    return int(budget / per_row)


def next_one(fixed, per_row, budget):
    return max(0, math.ceil((budget - fixed) / per_row))


def negative(fixed, per_row, budget):
    return math.floor((budget - fixed) / per_row)


def with_momentum(parameters, optimizer):
    kept = [parameters, parameters, parameters]
    return 4 * sum(kept + [parameters] * (optimizer == "adamw"))


def capital_letters(parameters, optimizer):
    return 16 * parameters if optimizer == "AdamW" else 8 * parameters


def pairs(batch_size, tokens, heads, layers):
    return math.prod([2, batch_size, layers, heads, tokens**2, 4])


def as_saved(batch_size, tokens, heads, layers):
    return sum(batch_size * heads * tokens * tokens * 4 for _ in range(3 * layers))


def interpolated(batches, peaks, batch_size, parameters):
    return np.interp(batch_size, sorted(batches), sorted(peaks)) - 8 * parameters


def from_the_second(batches, peaks, batch_size, parameters):
    slope = (peaks[1] - peaks[0]) / (batches[1] - batches[0])
    return slope * batch_size + peaks[1] - 8 * parameters


def back_from_the_second(batches, peaks, batch_size, parameters):
    slope = (peaks[1] - peaks[0]) / (batches[1] - batches[0])
    return peaks[0] - slope * (batches[1] - batch_size) - 8 * parameters


def whole_bytes(batches, peaks, batch_size, parameters):
    slope = (peaks[1] - peaks[0]) // (batches[1] - batches[0])
    return peaks[1] - slope * (batches[1] - batch_size) - 8 * parameters


def divided(fixed, per_row, budget):
    return (budget - fixed) / per_row


def nearest(fixed, per_row, budget):
    return max(0, int((budget - fixed) / per_row + 0.5))


def each_with_a_model(fixed, per_row, budget):
    return int(budget / (per_row + fixed))


def cut(fixed, per_row, budget):
    return math.trunc((budget - fixed) / per_row)


def one_at_least(fixed, per_row, budget):
    rows = 1
    while fixed + per_row * (rows + 1) <= budget:
        rows += 1
    return rows


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch02.model_bytes, lambda parameters, optimizer: 4.0 * parameters, "weights alone, or numbers for bytes"),
        (ch02.model_bytes, lambda p, o: sum([4 * p] * (3 if o == "adamw" else 1)), "one number a parameter short"),
        (ch02.model_bytes, lambda parameters, optimizer: parameters << 4, "states for plain SGD"),
        (ch02.attention_bytes, forgot_heads, "one head"),
        (ch02.attention_bytes, per_token, "linear in the tokens"),
        (ch02.predict_peak, scaled_up, "proportional to the batch, from the second"),
        (ch02.predict_peak, from_zero, "intercept dropped, AdamW's states taken off"),
        (ch02.largest_batch_that_fits, no_model, "the model forgotten"),
        (ch02.largest_batch_that_fits, next_one, "rounded up"),
        (ch02.largest_batch_that_fits, negative, "below zero"),
        (ch02.model_bytes, with_momentum, "momentum for plain SGD"),
        (ch02.model_bytes, capital_letters, "two numbers of four"),
        (ch02.attention_bytes, lambda b, t, h, n: n * h * t**2 * 4, "one text"),
        (ch02.attention_bytes, pairs, "both towers, or float64"),
        (ch02.attention_bytes, as_saved, "dropout's tensors too"),
        (ch02.predict_peak, interpolated, "never beyond the two"),
        (ch02.predict_peak, from_the_second, "the whole batch added to the second peak"),
        (ch02.predict_peak, back_from_the_second, "first peak, second batch"),
        (ch02.predict_peak, whole_bytes, "slope cut to a whole number, from the second"),
        (ch02.largest_batch_that_fits, divided, "not rounded"),
        (ch02.largest_batch_that_fits, nearest, "rounded to the nearest"),
        (ch02.largest_batch_that_fits, each_with_a_model, "the model brought by every row"),
        (ch02.largest_batch_that_fits, cut, "below zero, cut"),
        (ch02.largest_batch_that_fits, one_at_least, "a row where none fits"),
    ],
)
def test_wrong_answers_in_other_words_are_recognised(exercise, answer, name):
    verdict = exercise.judge(answer, seed=1)
    assert verdict.status == "wrong" and verdict.misconception == name


def test_a_batch_is_an_int():
    verdict = ch02.largest_batch_that_fits.judge(lambda f, r, b: max(0, math.floor((b - f) / r)) * 1.0)
    assert verdict.status == "wrong" and "an int is asked for" in verdict.explanation
    assert ch02.largest_batch_that_fits.judge(lambda f, r, b: np.maximum(0, (b - f) // r)).status == "correct"


def walk(batches, peaks, batch_size, parameters):
    share = (batch_size - batches[0]) / (batches[1] - batches[0])
    return round((1 - share) * peaks[0] + share * peaks[1]) - 8 * parameters


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
