"""The two functions that hold one gradient against another, on numbers worked by hand."""

import pytest
import torch
from torch import nn

from gclib.audit.gradients import gradients_of, worst_error


def line(weight: float) -> nn.Linear:
    """y = weight * x + bias, in float64."""
    layer = nn.Linear(1, 1).double()
    nn.init.constant_(layer.weight, weight)
    return layer


def test_gradients_are_those_of_the_step_alone_and_are_cleared():
    layer, other = line(2.0), line(3.0)
    layer.weight.grad = torch.full_like(layer.weight, 100.0)
    rows = torch.tensor([[1.0], [4.0]], dtype=torch.float64)
    found = gradients_of(lambda: layer(rows).sum().backward(), layer, other)
    assert {name: gradient.item() for name, gradient in found.items()} == {"0.weight": 5.0, "0.bias": 2.0}
    assert layer.weight.grad is None and layer.bias.grad is None


def test_the_error_is_the_worst_parameters_on_its_own_scale():
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([100.0])}
    found = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([101.0])}
    assert worst_error(found, expected) == pytest.approx(0.5 / 5)
    assert worst_error(expected, expected) == 0


def test_a_gradient_of_zero_is_held_against_the_whole():
    expected = {"a": torch.tensor([1000.0]), "key bias": torch.tensor([0.0])}
    found = {"a": torch.tensor([1000.0]), "key bias": torch.tensor([1e-6])}
    assert worst_error(found, expected) == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("found", "expected", "named"),
    [
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, "found"),
        ({"a": torch.ones(3)}, {"a": torch.ones(2)}, "found\\['a'\\]"),
        ({"a": torch.ones(2)}, {"a": torch.zeros(2)}, "expected"),
    ],
)
def test_what_cannot_be_compared_is_refused(found, expected, named):
    with pytest.raises(ValueError, match=named):
        worst_error(found, expected)


def test_a_step_that_is_none_is_refused():
    with pytest.raises(ValueError, match="step"):
        gradients_of(None, line(1.0))
    with pytest.raises(ValueError, match="gradient"):
        gradients_of(lambda: None, line(1.0))
