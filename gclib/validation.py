"""Refuse a bad argument in words, before anything is computed or changed.

Every message has the same three parts: the argument, the rule, and what was got.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real


def refuse(argument: str, rule: str, got: object) -> ValueError:
    """The error to raise: `raise refuse("chunk_size", "must be a positive int", 2.5)`."""
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
