"""The devices that a step runs on: what of a card's memory its tensors may use, and what this machine has free.

A card has less than its name says: part is kept for error correction and the driver. `REPORTED_GIB` is what torch
reports as a card's total: the least that was found quoted in public logs and out-of-memory messages. Of that, two
things are no tensor's: the process's own CUDA context, and the workspaces that PyTorch's allocator holds for the matrix
library, one for the thread that works forward and one for the one that works backward. `GPU_MEMORY_BYTES` is what is
left.

Context and workspaces were measured on an H100; another card, driver or torch has others (a recorded one 751 MiB).
`python -m gclib calibrate` measures your own, and the gaps that the allocator leaves.
"""

import gc
from pathlib import Path

import psutil
import torch

from gclib.support.validation import refuse
from gclib.support.words import GiB, MiB

DEVICES = ("cpu", "cuda")  # whose operations a forecast counts
CONTEXT_BYTES = 769 * MiB  # on the H100 after a step in float32 and bf16; 619 MiB before the first matrix product
WORKSPACE_BYTES = 2 * 8_519_680  # two of PyTorch's default
HOPPER_WORKSPACE_BYTES = 2 * 32 * MiB  # measured, and PyTorch's default from the H100 on
_HOPPER = ("A100 or H100 (80 GB)", "H200 (141 GB)")

# GiB as torch writes it after "total capacity", and where it was read.
REPORTED_GIB = {
    "RTX 2080 Ti (11 GB)": (10.76, "github.com/ispc-lab/TMA/issues/5"),
    "T4 (16 GB)": (14.56, "github.com/Zheng-Chong/CatVTON/issues/133"),
    "RTX 4090 (24 GB)": (23.64, "github.com/ali-vilab/VGen/issues/104"),
    "A100 (40 GB)": (39.50, "github.com/TianheWu/CoSeR/issues/10"),
    "A100 or H100 (80 GB)": (79.10, "github.com/huggingface/trl/issues/2688"),
    "H200 (141 GB)": (139.72, "no source to name: several public logs, 139.72 to 139.81"),
}

GPU_MEMORY_BYTES = {
    name: int(gib * GiB) - CONTEXT_BYTES - (HOPPER_WORKSPACE_BYTES if name in _HOPPER else WORKSPACE_BYTES)
    for name, (gib, _) in REPORTED_GIB.items()
}

CGROUP = Path("/sys/fs/cgroup")  # where Linux keeps the limits of a container


def run_device(device: str | torch.device | None = None) -> torch.device:
    """Where a run takes place: the device given, or CUDA's present one where PyTorch can use it, else the processor.

    Raises ValueError for what is neither the processor nor a CUDA device that is there.
    """
    rule = "must be the processor, or a CUDA device that PyTorch can use"
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise refuse("device", rule, device) from error
    if place.type == "cpu":
        return torch.device("cpu")
    if place.type != "cuda" or not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count():
        raise refuse("device", rule, str(place))
    return place if place.index is not None else torch.device("cuda", torch.cuda.current_device())


def device_words(device: torch.device, processor: str = "This machine") -> str:
    """The card's name; or what a processor is to be called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor


def memory_of(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of the device. On a card, what PyTorch's allocator keeps for later is free too."""
    if device.type != "cuda":
        total, free = ram_bytes()
        return free, total
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def fill_workspaces(device: torch.device) -> int:
    """Bytes that a card's allocator has given out once the matrix library holds its workspaces; 0 on a processor.

    The library takes one in each thread that calls it, here and in autograd's, and keeps it: no step's.
    """
    if device.type != "cuda":
        return 0
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(64, 64, device=device, dtype=dtype)
        layer(layer(torch.ones(64, 64, device=device, dtype=dtype))).sum().backward()
    del layer
    gc.collect()
    return torch.cuda.memory_allocated(device)


def workspace_bytes(device: torch.device) -> int:
    """What the matrix library takes of the allocator's memory, for the thread that works forward and the one that
    works backward; nothing on a processor.
    """
    if device.type != "cuda":
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated(device)
    return fill_workspaces(device) - before


def context_bytes(device: torch.device) -> int | None:
    """What of the card is taken beside this process's tensors, other programs included; None on a processor."""
    if device.type != "cuda":
        return None
    torch.zeros(1, device=device)
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def ram_bytes(cgroup: Path = CGROUP) -> tuple[int, int]:
    """(total, free) bytes of memory for this process: the machine's, or its container's where that is less."""
    memory = psutil.virtual_memory()
    limit, used = (_read_int(cgroup / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return memory.total, memory.available
    return min(memory.total, limit), min(memory.available, max(0, limit - used))


def _read_int(path: Path) -> int | None:
    """The number that is all of a small file; None where there is no such file, or where it says "max"."""
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return None
