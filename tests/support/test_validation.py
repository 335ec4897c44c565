"""Arguments are refused in words: the argument, the rule, and what was got."""

import math

import numpy as np
import pytest
import torch

from gclib.support.validation import (
    check_mask,
    check_representations,
    check_temperature,
    int_at_least,
    one_of,
    positive_int,
    positive_number,
    refuse,
)


def test_a_message_names_argument_rule_and_what_was_got():
    assert str(refuse("chunk_size", "must be a positive int", 2.5)) == "chunk_size must be a positive int, got 2.5"
    assert str(refuse("inputs", "must fit", "3 rows")) == "inputs must fit, got 3 rows"


def test_numbers_that_pass_are_plain_ones():
    assert type(positive_int("n", np.int64(3))) is int and int_at_least("n", 0, 0) == 0
    assert type(positive_number("x", np.float32(0.5))) is float and one_of("kind", "a", ("a", "b")) == "a"


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None, math.nan])
def test_what_is_no_positive_int_is_refused(value):
    with pytest.raises(ValueError, match="rows must be an int of at least 1"):
        positive_int("rows", value)


@pytest.mark.parametrize("value", [0, -0.5, math.nan, math.inf, True, "1"])
def test_what_is_no_positive_number_is_refused(value):
    with pytest.raises(ValueError, match="seconds must be a finite number above 0"):
        positive_number("seconds", value)


@pytest.mark.parametrize(
    ("queries", "passages", "rule"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), "3 dimensions"),
        (torch.zeros(2, 3), torch.zeros(5, 3), "multiple of B = 2"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64), "dtype"),
        (torch.zeros(0, 3), torch.zeros(2, 3), "at least one row"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3), "floating point"),
        ([1.0], torch.zeros(2, 3), "must be a Tensor"),
    ],
)
def test_representations_that_do_not_fit(queries, passages, rule):
    with pytest.raises(ValueError, match=rule):
        check_representations(queries, passages)


@pytest.mark.parametrize("mask", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bool), [[True]]])
def test_masks_that_do_not_fit(mask):
    with pytest.raises(ValueError, match=r"mask must be a bool tensor of shape \(2, 3\)"):
        check_mask(mask, 2, 3, torch.device("cpu"))


@pytest.mark.parametrize("temperature", [0.0, -1, torch.zeros(2), torch.tensor(1)])
def test_temperatures_that_do_not_fit(temperature):
    with pytest.raises(ValueError, match="temperature"):
        check_temperature(temperature)
