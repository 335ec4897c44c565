"""One gradient held against another, by parameter and by part, on numbers worked by hand; and what is refused."""

import math

import pytest
import torch
from torch import nn

from gclib import Encoder
from gclib.audit.gradients import compare_gradients, gradients_by_part, gradients_of, worst_error


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


# --- by part --------------------------------------------------------------------------------------------------


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
    assert (errors["a"].scale, errors["b"].scale) == pytest.approx((2, 0))
    assert errors["whole"].cosine == pytest.approx(50 / math.sqrt(26 * 104))
    assert errors["whole"].error == pytest.approx(math.sqrt(30 / 26))


def test_a_gradient_of_zero_has_no_direction():
    error = compare_gradients(vectors(a=[3.0, 4.0]), vectors(a=[0.0, 0.0]))["whole"]
    assert math.isnan(error.cosine) and (error.size, error.error, error.scale) == (0, 1, 0)


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


def test_sparse_gradients_are_held_against_dense_ones():
    table, rows = nn.Embedding(4, 2, sparse=True), torch.tensor([1, 1, 3])
    found = gradients_of(lambda: table(rows).square().sum().backward(), table)
    table.sparse = False
    expected = gradients_of(lambda: table(rows).square().sum().backward(), table)
    assert worst_error(found, expected) == 0 == worst_error(expected, found)
    table.sparse = True
    table(rows).square().sum().backward()
    assert worst_error({"0.weight": table.weight.grad}, expected) == 0
    assert torch.equal(gradients_by_part(table)["embeddings"], expected["0.weight"].double().flatten())


def test_numbers_that_are_not_finite_are_no_small_error():
    expected = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])}
    assert worst_error({"a": torch.tensor([1.5]), "b": torch.tensor([math.nan])}, expected) == math.inf
    with pytest.raises(ValueError, match="expected must be finite and not zero everywhere"):
        worst_error(expected, {"a": torch.tensor([1.0]), "b": torch.tensor([math.nan])})
    with pytest.raises(ValueError, match="expected must be finite and not zero everywhere"):
        worst_error({}, {})
