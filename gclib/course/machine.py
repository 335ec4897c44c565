"""What this computer has, and in words what of the course will and will not work on it.

`look` gathers the facts, `judge` turns facts into assessments (no machine is touched, so every case can be
tested), `report` prints them as one table. Nothing is changed, and nothing leaves the machine.
"""

import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

from gclib.memory.devices import ram_bytes
from gclib.support import ROOT
from gclib.support.files import cache_folder
from gclib.support.validation import refuse
from gclib.support.words import GiB, format_bytes

PINS = ROOT / "constraints.txt"
CORE = ("torch", "transformers", "tokenizers", "numpy", "bm25s", "tqdm", "psutil", "jaxtyping")
COURSE = ("jupyterlab", "ipywidgets", "anywidget", "matplotlib", "peft")
SMALLEST_PYTHON = (3, 11)
NEEDED_RAM_BYTES = 2 * GiB  # one notebook and JupyterLab, with room to spare for all but chapter 13
EASY_RAM_BYTES = 4 * GiB
NEEDED_DISK_BYTES = GiB
_REFUSED = "A live run of the memory lab or the tile lab that would not fit is refused before it starts."

State = Literal["works", "limited", "will not work"]


@dataclass(frozen=True)
class Machine:
    """Facts about a computer. Bytes are bytes; a missing package has no entry in `installed`."""

    system: str
    python: tuple[int, int, int]
    cores: int
    ram_bytes: int
    free_ram_bytes: int
    free_disk_bytes: int
    gpus: tuple[tuple[str, int], ...] = ()  # name, bytes
    installed: Mapping[str, str] = field(default_factory=dict)
    pinned: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Assessment:
    """One row of the report: what was looked at, what was found, and what that means for the course."""

    topic: str
    found: str
    state: State
    meaning: str


def read_pins(path: Path = PINS) -> dict[str, str]:
    """Package name (lower case, dashes) -> exact version, from a constraints file; {} where there is none.

    Raises ValueError when a line of the file is neither a comment nor `name==version`.
    """
    if not path.is_file():
        return {}
    pins = {}
    for line in path.read_text("utf-8").splitlines():
        line = line.split("#")[0].strip()
        if not line:
            continue
        pin = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", line)
        if pin is None:
            raise refuse("path", "must hold lines of the form name==version", line)
        pins[re.sub(r"[-_.]+", "-", pin[1]).lower()] = pin[2]
    return pins


def look() -> Machine:
    """The facts of the computer that runs this. Cores and memory are those that this process may use."""
    import psutil

    total, free = ram_bytes()
    affinity = getattr(os, "sched_getaffinity", None)
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=tuple(sys.version_info[:3]),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        ram_bytes=total,
        free_ram_bytes=free,
        free_disk_bytes=psutil.disk_usage(str(_there(cache_folder()))).free,
        gpus=_gpus(),
        installed={name: v for name in CORE + COURSE if (v := _installed(name)) is not None},
        pinned=read_pins(),
    )


def judge(machine: Machine) -> list[Assessment]:
    """What each fact of `machine` means for the course, one assessment a topic.

    The topics are always the same, in this order: Python, Packages, Memory, Processor cores, Disk, GPU.
    """
    topics = (_judge_python, _judge_packages, _judge_memory, _judge_cores, _judge_disk, _judge_gpu)
    return [judge_topic(machine) for judge_topic in topics]


def report(assessments: Sequence[Assessment]) -> str:
    """The assessments as lines of text, followed by one sentence that sums them up."""
    width = max(len(row.state) for row in assessments)
    rows = []
    for row in assessments:
        rows.append(f"{row.state:<{width}}  {row.topic}: {row.found}")
        rows.append(f"{'':<{width}}  {row.meaning}")
    states = [row.state for row in assessments]
    if "will not work" in states:
        broken = ", ".join(row.topic for row in assessments if row.state == "will not work")
        rows.append(f"\nMend this first, then run the cell again: {broken}.")
    elif "limited" in states:
        rows.append("\nYou can take the course here; the lines marked 'limited' say what to expect.")
    else:
        rows.append("\nEverything in the course works here.")
    return "\n".join(rows)


def _gpus() -> tuple[tuple[str, int], ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple((card.name, card.total_memory) for card in cards)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _judge_python(machine: Machine) -> Assessment:
    version = ".".join(map(str, machine.python))
    found = f"{version} on {machine.system}"
    if machine.python[:2] < SMALLEST_PYTHON:
        needed = ".".join(map(str, SMALLEST_PYTHON))
        return Assessment("Python", found, "will not work", f"The course needs Python {needed} or newer.")
    return Assessment("Python", found, "works", "New enough for everything.")


def _judge_packages(machine: Machine) -> Assessment:
    names = CORE + COURSE
    missing = [name for name in names if name not in machine.installed]
    found = f"{len(names) - len(missing)} of the {len(names)} that the course uses are installed"
    if missing == ["peft"]:
        means = "Missing: peft. Chapters 06 and 13 stop where they come to LoRA, and the memory lab forecasts none."
        return Assessment("Packages", found, "limited", means)
    if missing:
        means = f"Missing: {', '.join(missing)}. Run `make env`, or what the README has you type."
        return Assessment("Packages", found, "will not work", means)
    if not machine.pinned:
        means = "The list of tested versions (constraints.txt) is not beside the library, so none was compared."
        return Assessment("Packages", found, "limited", means)
    other = [
        f"{name} {machine.installed[name]} (tested: {machine.pinned.get(name, 'not listed')})"
        for name in names
        if machine.installed[name].split("+")[0] != machine.pinned.get(name)
    ]
    if other:
        means = f"Not the tested versions: {', '.join(other)}. If a cell fails, run `make env`."
        return Assessment("Packages", found, "limited", means)
    return Assessment("Packages", found, "works", "Every version is the one that the tests passed with.")


def _judge_memory(machine: Machine) -> Assessment:
    found = f"{format_bytes(machine.free_ram_bytes)} free of {format_bytes(machine.ram_bytes)}"
    if machine.free_ram_bytes < NEEDED_RAM_BYTES:
        needed = format_bytes(NEEDED_RAM_BYTES, digits=1)
        means = f"The notebooks need about {needed}. Close other programs, or shut down other kernels."
        return Assessment("Memory", found, "will not work", means)
    if machine.free_ram_bytes < EASY_RAM_BYTES:
        means = "Enough, with one notebook open at a time; for chapter 13, which takes most, if 2.2 GiB are free. "
        means += _REFUSED
        return Assessment("Memory", found, "limited", means)
    means = f"Enough for every chapter. {_REFUSED}"
    return Assessment("Memory", found, "works", means)


def _judge_cores(machine: Machine) -> Assessment:
    found = f"{machine.cores}"
    if machine.cores < 2:
        means = "The chapters' times of a processor were measured on 2 cores: expect longer ones."
        return Assessment("Processor cores", found, "limited", means)
    return Assessment("Processor cores", found, "works", "The chapters' times of a processor were measured on 2.")


def _judge_disk(machine: Machine) -> Assessment:
    found = f"{format_bytes(machine.free_disk_bytes)} free"
    if machine.free_disk_bytes < NEEDED_DISK_BYTES:
        means = f"The text pairs and the runs are cached in {_cache()}: make about 1 GiB of room."
        return Assessment("Disk", found, "limited", means)
    return Assessment("Disk", found, "works", f"Room for the text pairs, which are cached in {_cache()}.")


def _there(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _cache() -> str:
    folder = cache_folder()
    return "data/cache/" if folder == ROOT / "data" / "cache" else str(folder)


def _judge_gpu(machine: Machine) -> Assessment:
    if not machine.gpus:
        means = "None is needed: every chapter runs on the processor, and bytes of cards are forecast."
        return Assessment("GPU", "none that PyTorch can use", "works", means)
    cards = ", ".join(f"{name} ({format_bytes(size)})" for name, size in machine.gpus)
    return Assessment("GPU", cards, "works", "Live runs can also be held against this card's own counters.")
