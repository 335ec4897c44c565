"""Two gradients side by side: parts by name, cosine and size by hand, and what is refused."""

import math

import pytest
import torch

from gclib import Encoder
from gclib.course import plots
from gclib.course.gradient_error import compare_gradients, describe_errors, gradients_by_part, plot_gradient_errors


def vectors(**parts):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in parts.items()}


def test_every_gradient_of_an_encoder_is_in_one_part():
    encoder = Encoder.from_config("tiny", vocab_size=50)
    with pytest.raises(ValueError, match="^module must have a parameter with a gradient"):
        gradients_by_part(encoder)
    for number, parameter in enumerate(encoder.parameters()):
        parameter.grad = torch.full_like(parameter, number)
    parts = gradients_by_part(encoder)
    halves = [f"layer {n} {half}" for n in (1, 2) for half in ("attention", "feed-forward")]
    assert list(parts) == ["embeddings", *halves]
    assert sum(len(vector) for vector in parts.values()) == sum(p.numel() for p in encoder.parameters())
    assert all(vector.dtype == torch.float64 for vector in parts.values())
    attention = sum(p.numel() for n, p in encoder.named_parameters() if "layer.1.attention." in n)
    assert len(parts["layer 2 attention"]) == attention


def test_parameters_without_a_gradient_are_left_out():
    encoder = Encoder.from_config("tiny", vocab_size=50)
    last = list(encoder.parameters())[-1]
    last.grad = torch.ones_like(last)
    assert {name: len(vector) for name, vector in gradients_by_part(encoder).items()} == {
        "layer 2 feed-forward": last.numel()
    }


def test_cosine_size_and_error_by_hand():
    errors = compare_gradients(vectors(a=[3.0, 4.0], b=[1.0, 0.0]), vectors(a=[6.0, 8.0], b=[0.0, 2.0]))
    assert list(errors) == ["a", "b", "whole"]
    assert (errors["a"].cosine, errors["a"].size, errors["a"].error) == pytest.approx((1, 2, 1))
    assert (errors["b"].cosine, errors["b"].size, errors["b"].error) == pytest.approx((0, 2, math.sqrt(5)))
    assert errors["whole"].cosine == pytest.approx(50 / math.sqrt(26 * 104))
    assert errors["whole"].error == pytest.approx(math.sqrt(30 / 26))


def test_a_gradient_of_zero_has_no_direction():
    error = compare_gradients(vectors(a=[3.0, 4.0]), vectors(a=[0.0, 0.0]))["whole"]
    assert math.isnan(error.cosine) and (error.size, error.error) == (0, 1)


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


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (vectors(b=[1.0]), "^found must have the parts a, got 'b'"),
        (vectors(a=[1.0]), r"^found\['a'\] must have the shape \(2,\)"),
    ],
)
def test_gradients_of_other_parts_are_refused(found, message):
    with pytest.raises(ValueError, match=message):
        compare_gradients(vectors(a=[1.0, 2.0]), found)


def test_nothing_can_be_held_against_zero():
    with pytest.raises(ValueError, match=r"^expected\['a'\] must not be zero"):
        compare_gradients(vectors(a=[0.0]), vectors(a=[1.0]))
