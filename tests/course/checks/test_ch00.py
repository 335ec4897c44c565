"""Chapter 00's exercises: right answers in other words, and mistakes that only some inputs show."""

import math

import numpy as np
import pytest
import torch

from gclib.course.checks import ch00


def first_side(shape, bits):
    return next(iter(shape), 1) * bits // 8


def whole_bytes_only(shape, bits):
    return torch.Size(shape).numel() * (bits // 8)


def one_moment(kind_bytes):
    return torch.argmax(kind_bytes.sum(1))


def by_kind(kind_bytes):
    return max(int(column.sum()) for column in kind_bytes.T)


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch00.tensor_bytes, first_side, "first side only"),
        (ch00.tensor_bytes, whole_bytes_only, "bytes of one number rounded down"),
        (ch00.peak_bytes, one_moment, "where the peak is, not how high"),
        (ch00.peak_bytes, by_kind, "down the columns"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    for seed in range(5):
        assert exercise.judge(answer, seed=seed).misconception == name


def test_a_tensor_may_be_built_to_count_its_numbers():
    for seed in range(5):
        counted = ch00.tensor_bytes.judge(lambda shape, bits: torch.zeros(shape).numel() * bits // 8, seed=seed)
        assert counted.status == "correct"


def test_tensors_are_small_enough_to_be_built():
    rng = np.random.default_rng(0)
    for maker in ch00.tensor_bytes.makers:
        assert max(math.prod(maker(rng)["shape"]) for _ in range(200)) < 10_000_000


def test_a_float_of_bytes_is_told():
    verdict = ch00.tensor_bytes.judge(lambda shape, bits: math.prod(shape) * bits / 8)
    assert verdict.status == "wrong" and "an int is asked for" in verdict.explanation


def test_bytes_are_printed_whole():
    explanation = ch00.tensor_bytes.judge(lambda shape, bits: 10**6, seed=0).explanation
    assert "e+0" not in explanation and "got 1,000,000" in explanation
