"""Bytes in words: whole bytes inside the library, KiB, MiB, GiB and TiB only where a person reads."""

import math
from numbers import Real

from gclib.validation import refuse

KiB, MiB, GiB, TiB = 2**10, 2**20, 2**30, 2**40
UNITS = (("TiB", TiB), ("GiB", GiB), ("MiB", MiB), ("KiB", KiB))


def format_bytes(count: float, *, digits: int = 3) -> str:
    """`count` bytes with a binary unit and at least `digits` significant digits: 1536 -> "1.50 KiB".

    Digits before the decimal point are never rounded away: 1,023 MiB stays "1,023 MiB". Below 1 KiB: "12 B".
    Raises ValueError for anything but a finite number.
    """
    if isinstance(count, bool) or not isinstance(count, Real) or not math.isfinite(count):
        raise refuse("count", "must be a finite number of bytes", count)
    name, size = unit_for(count)
    value = count / size
    if size == 1:
        return f"{value:,.0f} B"
    whole = len(str(int(abs(value))))
    return f"{value:,.{max(0, digits - whole)}f} {name}"


def unit_for(count: float) -> tuple[str, int]:
    """The largest unit that `count` fills at least once, and its bytes: 3 * 2**20 -> ("MiB", 2**20)."""
    return next((unit for unit in UNITS if abs(count) >= unit[1]), ("B", 1))
