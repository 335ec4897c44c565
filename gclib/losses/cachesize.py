"""How big a tile of logits should be: as much as the last-level cache holds, by rule and not by trial.

That rule is a processor's. On a GPU a tile is `LARGEST_TILE` wide whatever its cache: each tile costs some dozens of
calls there, and a side of 1,024, which its cache would hold, took six times as long at B = 8,192 on an H100
(tests/benchmarks/results/tiled_cuda.csv).
"""

from functools import cache
from pathlib import Path

import torch

from gclib.support.validation import positive_int

CACHE_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE_BYTES = 16 * 2**20  # where the system doesn't tell
SMALLEST_TILE, LARGEST_TILE = 128, 4096
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def auto_tile_size(dimensions: int, *, dtype: torch.dtype = torch.float32, cache_bytes: int | None = None) -> int:
    """The largest power of two T whose tile works in half of the cache: 2 T^2 + 2 T D numbers.

    That is a tile of logits, one more for the second direction, and the two blocks of representations. Half, because
    the gradients pass through the cache too. From 128 (below, calls cost more than numbers) to 4,096. dtype: of the
    representations; half precision is accumulated in float32. cache_bytes: None for this machine's own.

    Source: the rule of Cheng et al. 2024, section 3.2 (tiles live in the memory next to the processor), for
    whole-matrix operations. Raises ValueError for dimensions or cache_bytes that are not positive ints.
    """
    D = positive_int("dimensions", dimensions)
    room = positive_int("cache_bytes", last_level_cache_bytes() if cache_bytes is None else cache_bytes)
    itemsize = torch.promote_types(dtype, torch.float32).itemsize
    side = SMALLEST_TILE
    while side < LARGEST_TILE and 2 * (2 * side) * (2 * side + D) * itemsize <= room // 2:
        side *= 2
    return side


@cache
def last_level_cache_bytes() -> int:
    """Bytes of the processor's largest cache; 16 MiB where the system doesn't tell."""
    return max((_read(path) for path in CACHE_FOLDER.glob("index*/size")), default=UNKNOWN_CACHE_BYTES)


def _read(path: Path) -> int:
    """Bytes of a text such as "36608K"; 0 where it can't be read."""
    try:
        text = path.read_text().strip()
        return int(text[:-1]) * UNITS[text[-1]] if text[-1:] in UNITS else int(text)
    except (OSError, ValueError, KeyError):
        return 0
