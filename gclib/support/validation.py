"""Refuse a bad argument in words, before anything is computed or changed.

Every message has the same three parts: the argument, the rule, and what was got.
"""

import math
import re
from collections.abc import Sequence
from numbers import Integral, Real

THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")


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


def typed_number(text: str, unit: str = "") -> int | float:
    """The number that a reader typed, with or without commas between thousands, and the unit behind it or not.

    Raises ValueError, as a sentence, for anything else: 7,5 is neither 75 nor a number that can be read for sure.
    """
    plain = text.strip().removesuffix(unit).strip()
    if "," in plain and not THOUSANDS.fullmatch(plain):
        raise ValueError(f"That is not a number: {text}. A comma stands between thousands, a point before decimals.")
    for kind in (int, float):
        try:
            return kind(plain.replace(",", ""))
        except ValueError:
            pass
    raise ValueError(f"That is not a number: {text}.")
