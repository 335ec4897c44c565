"""Graphics cards, and what of their memory a step may use.

A card has less than its name says: part is kept for error correction and the driver, and the process's own CUDA
context takes more. `REPORTED_GIB` is what torch reports as a card's total: the least that was found quoted in public
logs and out-of-memory messages, nothing measured here. `GPU_MEMORY_BYTES` is that less `CONTEXT_BYTES`, an allowance:
a context's size depends on card, driver and torch. `python -m gclib calibrate` measures your own.
"""

from gclib.units import GiB, MiB

CONTEXT_BYTES = 512 * MiB

# GiB as torch writes it after "total capacity", and where it was read.
REPORTED_GIB = {
    "RTX 2080 Ti (11 GB)": (10.76, "github.com/ispc-lab/TMA/issues/5"),
    "T4 (16 GB)": (14.56, "github.com/Zheng-Chong/CatVTON/issues/133"),
    "RTX 4090 (24 GB)": (23.64, "github.com/ali-vilab/VGen/issues/104"),
    "A100 (40 GB)": (39.50, "github.com/TianheWu/CoSeR/issues/10"),
    "A100 or H100 (80 GB)": (79.10, "github.com/huggingface/trl/issues/2688"),
    "H200 (141 GB)": (139.72, "no source to name: several public logs, 139.72 to 139.81"),
}

GPU_MEMORY_BYTES = {name: int(gib * GiB) - CONTEXT_BYTES for name, (gib, _) in REPORTED_GIB.items()}
