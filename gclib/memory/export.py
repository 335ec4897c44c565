"""A ledger or a forecast as a file: CSV for a spreadsheet, JSON for a program; `plots.plot_timeline` draws the picture.

One row a moment of the step, with the bytes of each kind and their sum. A forecast's run of like pieces is one piece
with `repeats`, and stays one.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gclib.memory.forecast import MemoryForecast
from gclib.memory.ledger import KINDS, MemoryLedger
from gclib.support.validation import refuse

COLUMNS = ("piece", "phase", "tower", "chunk", "repeats", "event", *KINDS, "total")


def export_ledger(record: MemoryLedger | MemoryForecast, path: str | Path) -> Path:
    """Write the record to a path that ends in .csv or .json, and return the path.

    CSV: a header and one row an event, COLUMNS. JSON: peak_bytes, at_peak, kinds, and pieces with their events as lists
    of bytes in the order of kinds. ValueError for anything else.
    """
    if not isinstance(record, (MemoryLedger, MemoryForecast)):
        raise refuse("record", "must be a MemoryLedger or a MemoryForecast", type(record).__name__)
    path = Path(path)
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(ledger_rows(record))
    elif path.suffix == ".json":
        path.write_text(json.dumps(_described(record)), "utf-8")
    else:
        raise refuse("path", "must end in .csv or .json", str(path))
    return path


def ledger_rows(record: MemoryLedger | MemoryForecast) -> Iterator[tuple[Any, ...]]:
    """One tuple an event, in the order of COLUMNS; None where a piece belongs to no tower or chunk."""
    for number, piece in enumerate(record.timeline):
        for event, held in enumerate(piece.kind_bytes.tolist()):
            yield (number, piece.phase, piece.tower, piece.chunk, piece.repeats, event, *held, sum(held))


def _described(record: MemoryLedger | MemoryForecast) -> dict[str, Any]:
    pieces = [
        {
            "phase": piece.phase,
            "tower": piece.tower,
            "chunk": piece.chunk,
            "rows": piece.rows,
            "repeats": piece.repeats,
            "net_bytes": piece.net_bytes.tolist(),
            "events": piece.kind_bytes.tolist(),
        }
        for piece in record.timeline
    ]
    return {"peak_bytes": record.peak_bytes, "at_peak": record.at_peak(), "kinds": list(KINDS), "pieces": pieces}
