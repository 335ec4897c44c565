"""The picture of a gradient's errors: its bars are the numbers, and so are its words."""

import pytest
import torch

from gclib.audit.gradients import compare_gradients
from gclib.course import plots
from gclib.course.gradient_error import (
    describe_arrows,
    describe_errors,
    plot_gradient_arrows,
    plot_gradient_errors,
)


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


def test_an_arrow_is_as_long_as_its_gradient_and_at_its_angle_to_the_true_one():
    true, turned = vectors(a=[1.0, 0.0]), vectors(a=[0.3, 0.4])
    errors = {"other": compare_gradients(true, turned)["whole"], "same": compare_gradients(true, true)["whole"]}
    _, axes = plots.new_figure()
    plot_gradient_arrows(axes, errors)
    tips = [text.xy for text in axes.texts if text.arrow_patch is not None]
    assert tips == [pytest.approx(tip) for tip in [(1, 0), (0.3, 0.4), (1, 0)]]
    assert describe_arrows(errors) == (
        "true gradient: length 1; other: length 0.50, turned by 53°; same: length 1.00, turned by 0°"
    )


def test_a_gradient_of_zero_is_a_dot_without_direction():
    errors = {"none": compare_gradients(vectors(a=[1.0, 0.0]), vectors(a=[0.0, 0.0]))["whole"]}
    _, axes = plots.new_figure()
    plot_gradient_arrows(axes, errors)
    assert axes.lines[0].get_xydata().tolist() == [[0, 0]]
    assert describe_arrows(errors) == "true gradient: length 1; none: length 0, no direction"
