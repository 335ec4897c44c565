"""Steps recorded on a graphics card, kept as plain JSON, and read back where there is none.

A recording holds three witnesses of one step. The *ledger*, tensor by tensor (`gclib.memory.ledger`); the *allocator's
history*, every request for memory and every return, which PyTorch keeps by itself and which shares no code with the
ledger; and the allocator's *peaks*: what was requested, what was given out (rounded up to blocks), what was reserved.
`python -m gclib calibrate --record FOLDER` makes one file a card.
"""

import dataclasses
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gclib.memory.calibration import CalibratedStep, Calibration, from_fields, run_case
from gclib.memory.ledger import record_memory
from gclib.memory.timeline import TimelinePicture
from gclib.models.encoder import Encoder
from gclib.support import ROOT
from gclib.support.validation import one_of, refuse

FOLDER = ROOT / "data" / "recordings"
RECORDED = (
    CalibratedStep("naive", 16, None, 128),
    CalibratedStep("grad_cache", 48, 16, 128),
    CalibratedStep("naive", 16, None, 128, autocast=True),
    CalibratedStep("grad_cache", 48, 16, 128, autocast=True),
)
SERIES = ("ledger_bytes", "allocator_bytes")
MOST_ENTRIES = 1_000_000  # of the allocator's history


@dataclass(frozen=True)
class RecordedPiece:
    """One piece of a step, between two reports of it: bytes of live tensors after each event of the ledger, and bytes
    requested of the allocator after each of its own.
    """

    phase: str
    tower: int | None
    chunk: int | None
    ledger_bytes: tuple[int, ...]
    allocator_bytes: tuple[int, ...]


@dataclass(frozen=True)
class RecordedStep:
    """One step on a card. *_peak_bytes: the allocator's own, workspaces included; at_peak: the ledger's kinds."""

    case: CalibratedStep
    pieces: tuple[RecordedPiece, ...]
    at_peak: dict[str, int]
    requested_peak_bytes: int
    allocated_peak_bytes: int
    reserved_peak_bytes: int

    def line(self, picture: TimelinePicture, series: str = "ledger_bytes") -> tuple[np.ndarray, np.ndarray]:
        """The step as a line over a forecast's picture: x from 0 to 1, bytes. series: one of `SERIES`."""
        counts: Counter = Counter()
        points = []
        for piece in self.pieces:
            totals = np.array(getattr(piece, one_of("series", series, SERIES)))
            points.append(picture.points(piece.phase, piece.tower, totals, counts[piece.phase, piece.tower]))
            counts[piece.phase, piece.tower] += 1
        x, y = (np.concatenate(part) for part in zip(*points, strict=True))
        return x, y

    @property
    def ledger_peak_bytes(self) -> int:
        """The most bytes of live tensors."""
        return max(max(piece.ledger_bytes) for piece in self.pieces if piece.ledger_bytes)


@dataclass(frozen=True)
class Recording:
    """A card's calibration, steps recorded on it, and the command that made both."""

    calibration: Calibration
    steps: tuple[RecordedStep, ...]
    command: str


def record_card(
    calibration: Calibration,
    folder: str | Path,
    *,
    command: str,
    cases: Sequence[CalibratedStep] = RECORDED,
) -> Path:
    """Record the cases on the CUDA card that `calibration` is of, and write both to a file in the folder.

    command: what makes such a recording again.

    Raises ValueError where there is no such card.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_name() != calibration.device:
        raise refuse("calibration", "must be of the CUDA card that is here", calibration.device)
    with torch.device("cuda"):
        encoder = Encoder.from_config(calibration.model)
    steps = tuple(_record(case, encoder) for case in cases)
    name = "".join(letter if letter.isalnum() else "-" for letter in calibration.device.lower())
    recording = Recording(calibration, steps, command)
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_written(recording), separators=(",", ":")) + "\n", "utf-8")
    return path


def load_recordings(folder: str | Path = FOLDER) -> list[Recording]:
    """Every recording in the folder, by file name; none where there is no such folder."""
    return [_read(json.loads(path.read_text("utf-8"))) for path in sorted(Path(folder).glob("*.json"))]


def _record(case: CalibratedStep, encoder: Encoder) -> RecordedStep:
    device = torch.device("cuda")

    def run(on_phase: Callable[..., None] | None = None) -> None:
        encoder.zero_grad(set_to_none=True)
        run_case(case, "", device, encoder, on_phase=on_phase)
        torch.cuda.synchronize()

    run()  # workspaces and plans of the libraries are made
    encoder.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    places, totals = _history_of(run)
    peaks = torch.cuda.memory_stats()
    encoder.zero_grad(set_to_none=True)
    with record_memory(encoder, device="cuda") as ledger:
        run(ledger.on_phase)
    pieces = []
    for number, piece in enumerate(ledger.timeline, start=-1):
        held = tuple(piece.kind_bytes.sum(axis=1).tolist())
        pieces.append(RecordedPiece(piece.phase, piece.tower, piece.chunk, held, tuple(totals.get(number, ()))))
    assert [(piece.phase, piece.tower, piece.chunk) for piece in pieces[1:]] == places
    named = ("requested_bytes.all.peak", "allocated_bytes.all.peak", "reserved_bytes.all.peak")
    return RecordedStep(case, tuple(pieces), ledger.at_peak(), *(peaks[name] for name in named))


def _history_of(run: Callable[..., None]) -> tuple[list[tuple], dict[int, list[int]]]:
    """The places that the step reports, and for the number of each the bytes requested after every request or return.

    Both clocks are the host's: a report falls between the requests before it and those after it.
    """
    places: list[tuple] = []
    begins: list[int] = []

    def on_phase(phase: str, *, tower: int | None = None, chunk: int | None = None, **_: Any) -> None:
        if not places or places[-1] != (phase, tower, chunk):
            places.append((phase, tower, chunk))
            begins.append(time.time_ns() // 1_000)

    now = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.memory._record_memory_history(max_entries=MOST_ENTRIES, context=None, clear_history=True)
    try:
        run(on_phase)
        entries = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    totals: dict[int, list[int]] = {}
    number = -1
    for entry in entries:
        change = {"alloc": 1, "free_completed": -1}.get(entry["action"], 0) * entry["size"]
        while number + 1 < len(begins) and entry["time_us"] >= begins[number + 1]:
            number += 1
        if change:
            now += change
            totals.setdefault(number, []).append(now)
    return places, totals


def _written(recording: Recording) -> dict[str, Any]:
    """A recording as JSON keeps it: of bytes over time, how much each is more than the one before."""
    written = dataclasses.asdict(recording)
    for piece in (piece for step in written["steps"] for piece in step["pieces"]):
        for name in SERIES:
            piece[name] = np.diff(piece[name], prepend=0).tolist()
    return written


def _read(written: dict[str, Any]) -> Recording:
    """The recording of which `_written` made this."""
    steps = []
    for step in written["steps"]:
        pieces = tuple(
            RecordedPiece(**piece | {name: tuple(np.cumsum(piece[name], dtype=int).tolist()) for name in SERIES})
            for piece in step["pieces"]
        )
        steps.append(RecordedStep(**step | {"case": CalibratedStep(**step["case"]), "pieces": pieces}))
    return Recording(from_fields(written["calibration"]), tuple(steps), written["command"])
