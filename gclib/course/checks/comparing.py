"""Two values side by side, in words: what differs first, or nothing.

Works on what answers return: tensors, numbers, strings, booleans, None, and lists, tuples and dicts of those.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor, nn

SHOWN_VALUES = 8


def describe(value: object) -> str:
    """`value` in a few words: a small tensor with its numbers, a large one by shape and dtype only."""
    if value is None:
        return "nothing (None)"
    if isinstance(value, Tensor):
        return _describe_tensor(value)
    if isinstance(value, nn.Module):
        return a_kind(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list | tuple) and len(value) <= 6 and any(isinstance(part, Tensor) for part in value):
        return f"{a_kind(value)} of {len(value)}: {', '.join(_describe_part(part) for part in value)}"
    if isinstance(value, list | tuple) and len(repr(value)) > 160:
        return f"{a_kind(value)} of {len(value)}, starting with {describe(value[0])}"
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def a_kind(value: object) -> str:
    """The type of `value` with its article: "a list", "an int"; "nothing (None)" for None."""
    if isinstance(value, np.ndarray):
        return "a numpy array"
    return "nothing (None)" if value is None else _with_article(type(value).__name__)


def _with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"


def _number(value: float) -> str:
    """Whole numbers whole, with commas; large ones to the hundredth; the others to six digits."""
    if not math.isfinite(value) or abs(value) >= 1e15:
        return f"{value:.6g}"
    if value.is_integer():
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 1e5 else f"{value:.6g}"


def _describe_tensor(value: Tensor) -> str:
    dtype = str(value.dtype).removeprefix("torch.")
    if value.ndim == 0:
        return f"the {dtype} scalar {describe(value.item())}"
    if value.numel() > SHOWN_VALUES:
        return f"{_with_article(dtype)} tensor of shape {tuple(value.shape)}"
    return f"the {dtype} tensor {_rounded(value.detach().tolist())}"


def _describe_part(part: object) -> str:
    return f"a tensor {tuple(part.shape)}" if isinstance(part, Tensor) else describe(part)


def _rounded(shown: object) -> object:
    """Nested lists of numbers, each to four decimals."""
    if isinstance(shown, list):
        return [_rounded(part) for part in shown]
    return round(shown, 4) if isinstance(shown, float) else shown


def difference(expected: object, got: object, *, rtol: float, atol: float) -> str | None:
    """The first difference of `got` from `expected` in words, or None when they agree.

    Tensors must agree in shape, dtype and values (a NaN equals a NaN); a wider float than the expected one agrees. A
    real number is also accepted as a scalar tensor, and a list as a tuple: how an answer packs a number is not what is
    asked.
    """
    if isinstance(expected, Tensor):
        return _tensor_difference(expected, got, rtol, atol)
    if isinstance(expected, bool) or expected is None or isinstance(expected, str):
        if type(got) is type(expected) and got == expected:
            return None
        return f"expected {describe(expected)}, got {describe(got)}"
    if isinstance(expected, Real):
        return _number_difference(float(expected), got, rtol, atol)
    if isinstance(expected, Mapping):
        return _mapping_difference(expected, got, rtol, atol)
    if isinstance(expected, Sequence):
        return _sequence_difference(expected, got, rtol, atol)
    raise TypeError(f"a {type(expected).__name__} cannot be compared")


def _tensor_difference(expected: Tensor, got: object, rtol: float, atol: float) -> str | None:
    if not isinstance(got, Tensor):
        return f"expected {describe(expected)}, got {a_kind(got)}, not a tensor{_but_right(expected, got, rtol, atol)}"
    if got.shape != expected.shape:
        return f"expected shape {_shape(expected)}, got shape {_shape(got)}"
    if got.dtype != expected.dtype and not (got.dtype == torch.float64 and expected.is_floating_point()):
        right = _but_right(expected, got, rtol, atol)
        return f"expected dtype {expected.dtype}, got {got.dtype}{right}"
    if got.device != expected.device:
        return f"expected a tensor on {expected.device}, got one on {got.device}"
    got = got.detach()
    same = torch.isclose(got, expected.detach().to(got.dtype), rtol=rtol, atol=atol, equal_nan=True)
    if same.all():
        return None
    if expected.ndim == 0:
        return f"expected {describe(expected)}, got {describe(got)}"
    place = tuple((~same).nonzero()[0].tolist())
    wrong = f"{int((~same).sum())} of {same.numel()} values differ"
    return f"{wrong}; the first is at {list(place)}: expected {_at(expected, place)}, got {_at(got, place)}"


def _but_right(expected: object, got: object, rtol: float, atol: float) -> str:
    """ "; the values are right" where `got` is `expected` in another type, "" where it is not."""
    try:
        values = torch.as_tensor(got).detach().double()
        same = torch.isclose(values, torch.as_tensor(expected).detach().double(), rtol=rtol, atol=atol, equal_nan=True)
    except (TypeError, ValueError, RuntimeError):
        return ""
    wanted = torch.as_tensor(expected).shape
    return "; the values are right, only the type is not" if values.shape == wanted and same.all() else ""


def _shape(value: Tensor) -> str:
    return f"{tuple(value.shape)}" if value.ndim else "() (a scalar)"


def _at(value: Tensor, place: tuple[int, ...]) -> str:
    return describe(value[place].item())


def _number_difference(expected: float, got: object, rtol: float, atol: float) -> str | None:
    if isinstance(got, Tensor) and got.ndim == 0:
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, Real):
        return f"expected the number {describe(expected)}, got {describe(got)}"
    close = torch.isclose(
        torch.tensor(float(got), dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=rtol,
        atol=atol,
        equal_nan=True,
    )
    return None if close else f"expected {describe(expected)}, got {describe(float(got))}"


def _mapping_difference(expected: Mapping, got: object, rtol: float, atol: float) -> str | None:
    if not isinstance(got, Mapping):
        return f"expected a dict, got {a_kind(got)}"
    if set(got) != set(expected):
        return f"expected the keys {sorted(map(str, expected))}, got {sorted(map(str, got))}"
    for key, value in expected.items():
        if (found := difference(value, got[key], rtol=rtol, atol=atol)) is not None:
            return f"at {key!r}: {found}"
    return None


def _sequence_difference(expected: Sequence, got: object, rtol: float, atol: float) -> str | None:
    if isinstance(got, str) or not isinstance(got, Sequence):
        return f"expected {a_kind(expected)}, got {a_kind(got)}{_but_right(expected, got, rtol, atol)}"
    if len(got) != len(expected):
        return f"expected {len(expected)} items, got {len(got)}"
    for place, (value, other) in enumerate(zip(expected, got, strict=True)):
        if (found := difference(value, other, rtol=rtol, atol=atol)) is not None:
            return f"at [{place}]: {found}"
    return None


def other_form(expected: object, got: object) -> bool:
    """Whether `got` is packed otherwise than `expected`, so that its values can't be held against it one by one."""
    if isinstance(expected, Tensor):
        wider = isinstance(got, Tensor) and got.dtype == torch.float64 and expected.is_floating_point()
        return not isinstance(got, Tensor) or got.dtype != expected.dtype and not wider
    if isinstance(expected, Mapping):
        if not isinstance(got, Mapping) or set(got) != set(expected):
            return True
        return any(other_form(value, got[key]) for key, value in expected.items())
    if isinstance(expected, Sequence) and not isinstance(expected, str):
        if isinstance(got, str) or not isinstance(got, Sequence):
            return True
        return len(got) == len(expected) and any(map(other_form, expected, got))
    if isinstance(expected, Real) and not isinstance(expected, bool):
        return not isinstance(got, Real) and not (isinstance(got, Tensor) and got.ndim == 0)
    return False
