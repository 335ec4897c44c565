"""Refuse a bad argument in words, before anything is computed or changed.

Every message has the same three parts: the argument, the rule, and what was got.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def refuse(argument: str, rule: str, got: object) -> ValueError:
    """The error to raise: `raise refuse("chunk_size", "must be a positive int", 2.5)`. Words of `got` stay unquoted."""
    described = got if isinstance(got, str) and " " in got else repr(got)
    return ValueError(f"{argument} {rule}, got {described}")


def positive_int(argument: str, value: object) -> int:
    """`value` as an int of at least 1; bools and floats are refused."""
    return int_at_least(argument, value, 1)


def int_at_least(argument: str, value: object, smallest: int) -> int:
    """`value` as an int of at least `smallest`; bools and floats are refused."""
    if type(value) is int and value >= smallest:  # most are, and lists of them are long
        return value
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise refuse(argument, f"must be an int of at least {smallest}", value)
    return int(value)


def positive_number(argument: str, value: object) -> float:
    """`value` as a finite float above zero; bools and NaN are refused."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
        raise refuse(argument, "must be a finite number above 0", value)
    return float(value)


def one_of(argument: str, value: object, choices: Sequence[object]) -> object:
    """`value`, if it is one of `choices`."""
    if value not in choices:
        raise refuse(argument, f"must be one of {', '.join(map(repr, choices))}", value)
    return value


def check_representations(query_reps: Tensor, passage_reps: Tensor) -> None:
    """Both (rows, D), same D, dtype and device, and N a multiple of B; ValueError otherwise."""
    for name, reps in (("query_reps", query_reps), ("passage_reps", passage_reps)):
        if not isinstance(reps, Tensor):
            raise refuse(name, "must be a Tensor", type(reps).__name__)
        if reps.ndim != 2 or reps.shape[0] == 0 or not reps.is_floating_point():
            raise refuse(name, "must be a floating point matrix (rows, D) with at least one row", describe(reps))
    for what in ("dtype", "device"):
        if getattr(query_reps, what) != getattr(passage_reps, what):
            got = getattr(passage_reps, what)
            raise refuse("passage_reps", f"must have query_reps' {what} {getattr(query_reps, what)}", got)
    queries, passages = query_reps.shape[0], passage_reps.shape[0]
    if query_reps.shape[1] != passage_reps.shape[1]:
        raise refuse("passage_reps", f"must have query_reps' {query_reps.shape[1]} dimensions", describe(passage_reps))
    if passages % queries:
        raise refuse("passage_reps", f"must have B * (1 + K) rows, a multiple of B = {queries}", f"{passages} rows")


def check_temperature(temperature: float | Tensor) -> None:
    """A finite number above 0, or a floating point tensor of one element (its value is not read)."""
    if not isinstance(temperature, Tensor):
        positive_number("temperature", temperature)
    elif temperature.numel() != 1 or temperature.ndim > 2 or not temperature.is_floating_point():
        raise refuse("temperature", "must be a floating tensor of one element, at most 2 axes", describe(temperature))


def check_mask(mask: Tensor | None, queries: int, passages: int, device: torch.device) -> None:
    """A bool tensor (B, N) on the representations' device, or None. Its values are not read."""
    if mask is None:
        return
    rule = f"must be a bool tensor of shape ({queries}, {passages})"
    if not isinstance(mask, Tensor):
        raise refuse("mask", rule, type(mask).__name__)
    if mask.dtype != torch.bool or tuple(mask.shape) != (queries, passages):
        raise refuse("mask", rule, describe(mask))
    if mask.device != device:
        raise refuse("mask", f"must be on {device}", mask.device)


def describe(tensor: Tensor) -> str:
    """Shape and dtype in words, for an error message."""
    return f"shape {tuple(tensor.shape)} of {tensor.dtype}"


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor holds numbers: a fake tensor, which has a shape and takes no memory, holds none."""
    return not isinstance(tensor, FakeTensor)
