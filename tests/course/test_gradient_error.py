"""The picture of a gradient's errors: its bars are the numbers, and so are its words."""

import pytest
import torch

from gclib.audit.gradients import compare_gradients
from gclib.course import plots
from gclib.course.gradient_error import describe_errors, plot_gradient_errors


def vectors(**parts):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in parts.items()}


def test_the_bars_are_the_numbers():
    errors = compare_gradients(vectors(a=[3.0, 4.0], b=[1.0, 0.0]), vectors(a=[-3.0, -4.0], b=[0.0, 0.0]))
    _, axes = plots.new_figure(1, 2)
    plot_gradient_errors(axes, errors)
    expected = [-1, 0, errors["whole"].cosine]
    assert [bar.get_width() for bar in axes[0].patches] == pytest.approx(expected)
    assert [bar.get_width() for bar in axes[1].patches] == pytest.approx([errors[name].size for name in errors])
    assert [text.get_text() for text in axes[0].texts][:2] == ["-1.00", "no direction: zero"]
    assert axes[0].get_xlim()[0] <= -1 and axes[0].get_xlim()[1] > 1
    assert "a: cosine -1.00, size 1.00; b: no direction, size 0.00; " in describe_errors(errors)
