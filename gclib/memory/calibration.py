"""The learner's own device against the forecast: real steps of random tokens, measured, kept, and read back.

A forecast counts tensors. A GPU takes more, and each part of that has a name here: the *context* (driver and kernels,
in no counter of PyTorch), the *workspace* of its matrix library (memory that PyTorch's
allocator holds for good), and *rounding* (blocks are handed out in sizes of the allocator's own). Context and
workspace are measured once; steps of rising size show the rest, and the largest ratio is what a card's bytes are
divided by.

On a processor the allocator's peak is read by PyTorch's profiler, on a GPU from `torch.cuda.memory_stats`.
"""

import dataclasses
import gc
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gclib.losses.module import ContrastiveLoss
from gclib.memory.devices import context_bytes, device_words, memory_of, run_device, workspace_bytes
from gclib.memory.forecast import forecast_step
from gclib.models.encoder import Encoder
from gclib.steps import STEPS
from gclib.support.files import DamagedFile, cache_folder, read_checked, write_checked
from gclib.support.validation import positive_number, refuse


@dataclass(frozen=True)
class CalibratedStep:
    """One step to run: rows of equally long, padded, random tokens. autocast: in bf16, or not at all."""

    step: str
    batch_size: int
    chunk_size: int | None
    length: int
    autocast: bool = False


@dataclass(frozen=True)
class Reading:
    """What the forecast said of a case's tensors, and what the device took, all in bytes.

    measured_bytes: the most that the allocator had given out, its workspaces included. requested_bytes: the same
    before it rounded sizes up; None on a processor, whose allocator does not tell.
    """

    case: CalibratedStep
    forecast_bytes: int
    measured_bytes: int
    requested_bytes: int | None = None
    workspace_bytes: int = 0

    @property
    def ratio(self) -> float:
        """Measured over forecast with the workspace."""
        return self.measured_bytes / (self.forecast_bytes + self.workspace_bytes)


@dataclass(frozen=True)
class Calibration:
    """A device as it was measured. context_bytes: beside all tensors, once matrix products have run, of this process
    and of any other on the device; None where nothing tells.

    workspace_bytes: what the matrix library keeps of the allocator's memory.
    """

    device: str
    model: str
    total_bytes: int
    context_bytes: int | None
    readings: tuple[Reading, ...]
    versions: str
    workspace_bytes: int = 0

    @property
    def ratio(self) -> float:
        """The largest measured / forecast."""
        return max(reading.ratio for reading in self.readings)

    @property
    def usable_bytes(self) -> int:
        """The budget to give a forecast for this device: what is left of it beside the context, over the ratio, less
        the workspace.
        """
        left = (self.total_bytes - (self.context_bytes or 0)) / max(self.ratio, 1.0)
        return int(left) - self.workspace_bytes


# A model and steps that a device of the kind finishes in half a minute; on a GPU, BERT-base at C = 8 ... 256.
GPU_CASES = tuple(
    CalibratedStep(step, batch, chunk, 128, autocast)
    for chunk in (8, 16, 32, 64, 128, 256)
    for autocast in (False, True)
    for step, batch, chunk in (("naive", chunk, None), ("grad_cache", 4 * chunk, chunk))
)
CPU_CASES = tuple(
    CalibratedStep(step, batch, chunk, 64)
    for size in (8, 16, 32)
    for step, batch, chunk in (("naive", size, None), ("grad_cache", 4 * size, size))
)


def calibrate(
    device: str | torch.device | None = None,
    *,
    seconds: float = 30.0,
    model: str | None = None,
    cases: Sequence[CalibratedStep] | None = None,
    on_reading: Callable[[Reading], object] | None = None,
) -> Calibration:
    """Run the cases in order until `seconds` are over (at least one), and keep what was read in the cache folder.

    device: None for CUDA where there is one, else the processor. model: what `Encoder.from_config` takes; None for
    "bert-base" on a GPU and "mini" on a processor. A case that does not fit ends the run; what was read before counts.

    Raises ValueError for a device that is not there, for no cases, and for seconds that are not above 0.
    """
    limit = positive_number("seconds", seconds)
    place = run_device(device)
    on_gpu = place.type == "cuda"
    model = model or ("bert-base" if on_gpu else "mini")
    cases = (GPU_CASES if on_gpu else CPU_CASES) if cases is None else tuple(cases)
    if not cases:
        raise refuse("cases", "must be at least one", "none")
    readings: list[Reading] = []
    started, workspace = time.perf_counter(), workspace_bytes(place)
    context = context_bytes(place)
    for case in cases:
        if readings and time.perf_counter() - started > limit:
            break
        try:
            readings.append(read(case, model, place, workspace))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if not readings:
                raise
            break
        if on_reading is not None:
            on_reading(readings[-1])
    versions = f"torch {torch.__version__}, transformers {version('transformers')}"
    name, total = _name(place), memory_of(place)[1]
    calibration = Calibration(name, model, total, context, tuple(readings), versions, workspace)
    write_checked(_path(name), {"device": name}, json.dumps(dataclasses.asdict(calibration)).encode())
    return calibration


def read(case: CalibratedStep, model: str, device: torch.device, workspace_bytes: int = 0) -> Reading:
    """One case: its forecast, and the peak of the same step run on the device, its encoder's weights included."""
    same = {"batch_size": case.batch_size, "query_length": case.length, "passage_length": case.length}
    same |= {"chunk_size": case.chunk_size, "device": device.type}
    autocast = torch.bfloat16 if case.autocast else None
    forecast_bytes = forecast_step(case.step, config=model, autocast=autocast, **same).peak_bytes
    if device.type == "cuda":
        measured, requested = _cuda_peaks(lambda: run_case(case, model, device), device)
        return Reading(case, forecast_bytes, measured + workspace_bytes, requested + workspace_bytes, workspace_bytes)
    return Reading(case, forecast_bytes, _processor_peak(lambda: run_case(case, model, device)))


def load(device: str | torch.device | None = None) -> Calibration | None:
    """The calibration that was kept for the device; None where there is none that is whole."""
    place = run_device(device)
    try:
        _, body = read_checked(_path(_name(place)))
    except (FileNotFoundError, DamagedFile):
        return None
    return from_fields(json.loads(body))


def from_fields(fields: dict[str, Any]) -> Calibration:
    """A calibration from its fields as JSON keeps them."""
    readings = tuple(
        Reading(**{**reading, "case": CalibratedStep(**reading["case"])}) for reading in fields["readings"]
    )
    return Calibration(**{**fields, "readings": readings})


def format_calibration(calibration: Calibration) -> str:
    """The readings as a table, and what follows from them, in words."""
    lines = [
        f"{calibration.device}, {calibration.model} ({calibration.versions})",
        "step         batch  chunk  autocast   forecast  requested   measured  ratio",
    ]
    for reading in calibration.readings:
        case, mib = reading.case, 2**20
        asked = "-" if reading.requested_bytes is None else f"{reading.requested_bytes / mib:,.1f}"
        lines.append(
            f"{case.step:11}{case.batch_size:7,}{case.chunk_size or '-':>7}{'bf16' if case.autocast else '-':>10}"
            f"{(reading.forecast_bytes + reading.workspace_bytes) / mib:11,.1f}{asked:>11}"
            f"{reading.measured_bytes / mib:11,.1f}{reading.ratio:7.3f}"
        )
    context = "unknown" if calibration.context_bytes is None else f"{calibration.context_bytes / 2**20:,.0f} MiB"
    lines.append(
        f"(MiB.) Context, other programs included: {context}. Workspace, in every column: "
        f"{calibration.workspace_bytes / 2**20:,.1f} MiB. "
        f"Give forecasts a budget of {calibration.usable_bytes / 2**30:.2f} GiB."
    )
    return "\n".join(lines)


def run_case(
    case: CalibratedStep, model: str, device: torch.device, encoder: Encoder | None = None, **options: Any
) -> None:
    """The step of the case, its encoder made for it if none is given; every row has a masked position, as forecasts
    have. options: what else the step takes.
    """
    if encoder is None:
        with device:
            encoder = Encoder.from_config(model)
    shape = (case.batch_size, case.length)
    tokens = torch.randint(5, 1_000, shape, device=device)
    mask = torch.ones(shape, dtype=torch.long, device=device)
    mask[:, case.length // 2] = 0
    inputs = [{"input_ids": tokens.clone(), "attention_mask": mask.clone()} for _ in range(2)]
    del tokens, mask
    if case.chunk_size is not None:
        options["chunk_size"] = case.chunk_size
    if case.step == "grad_cache":
        options["verify"] = "never"  # a forecast is of a step that trusts its encoder
    with torch.autocast(device.type, torch.bfloat16, enabled=case.autocast):
        STEPS[case.step]([encoder, encoder], inputs, ContrastiveLoss(), **options)


def _cuda_peaks(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """The most bytes that CUDA's allocator had given out at once, and the most that it had been asked for, both beyond
    what was there before.
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    after = torch.cuda.memory_stats(device)
    names = ("allocated_bytes.all", "requested_bytes.all")
    allocated, requested = (after[f"{name}.peak"] - before[f"{name}.current"] for name in names)
    return allocated, requested


def _processor_peak(run: Callable[[], object]) -> int:
    """The same of the processor's allocator, by the profiler's memory events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _name(device: torch.device) -> str:
    return device_words(device, processor=f"processor, {platform.machine()}")


def _path(name: str) -> Path:
    file_name = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    return cache_folder() / f"calibration-{file_name}.json"
