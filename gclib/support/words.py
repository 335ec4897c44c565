"""Numbers where a person reads or types them: bytes as KiB, MiB, GiB and TiB, rows as tables of text."""

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from numbers import Real

from gclib.support.validation import refuse

THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")
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


def format_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows of text under headings, in columns: words and what has a sign left, numbers right."""
    texts = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *texts, strict=True)]
    right = [all(_is_number(row[n]) for row in texts) for n in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(headings), line(["-" * width for width in widths]), *map(line, texts)])


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _is_number(text: str) -> bool:
    return text == "–" or text[:1].isdigit()


def typed_number(text: str, unit: str = "") -> int | float:
    """The number that a reader typed, with or without commas between thousands, and the unit behind it or not.

    Raises ValueError, as a sentence, for anything else: 7,5 is neither 75 nor a number that can be read for sure.
    """
    plain = text.strip().removesuffix(unit).strip()
    if "," in plain and not THOUSANDS.fullmatch(plain):
        raise ValueError(f"That is not a number: {text}. A comma stands between thousands, a point before decimals.")
    for kind in (int, float):
        with suppress(ValueError):
            number = kind(plain.replace(",", ""))
            if "_" not in plain and number - number == 0:  # neither infinite nor NaN
                return number
    raise ValueError(f"That is not a number: {text}.")
