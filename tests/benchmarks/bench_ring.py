"""The loss over several processes: around a ring, or with everything gathered. Bytes of a rank, and seconds.

    python tests/benchmarks/bench_ring.py [--batch 4096] [--dimensions 256] [--tile 256] [--ranks 2 4] [--csv FILE]

Symmetric, float32, forward and backward of the loss alone; the ranks are processes on this machine, joined by gloo,
one thread each. Peak: the allocator's extra bytes of a rank, gradients of its own representations included, by
`torch.profiler`; the largest rank counts. What gloo holds inside is not seen. Seconds: the median of five, of ranks
that share this machine's cores, so they say nothing of machines with a network between them.
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

import paths
import torch
from helpers.allocator import allocator_peak
from helpers.ranks import run_ranks

from gclib.losses.module import ContrastiveLoss

FORMS = {
    "gathered, dense": {"across": "gather"},
    "gathered, tiled": {"across": "gather", "tile_size": True},
    "ring": {"across": "ring", "tile_size": True},
}
COLUMNS = ("form", "ranks", "batch_size", "dimensions", "tile_size", "peak_bytes", "seconds")


def measure(here, batch_size: int, dimensions: int, tile_size: int) -> dict[str, tuple[int, float]]:
    """Each form's peak bytes and seconds on this rank."""
    torch.manual_seed(here.rank)
    rows = batch_size // here.world_size
    reps = [torch.nn.functional.normalize(torch.randn(rows, dimensions)).requires_grad_() for _ in range(2)]
    found = {}
    for name, settings in FORMS.items():
        tile = tile_size if settings.get("tile_size") else None
        loss_fn = ContrastiveLoss(0.05, learnable=True, symmetric=True, **(settings | {"tile_size": tile}))

        def run(loss_fn=loss_fn) -> float:
            start = time.perf_counter()
            loss_fn(*reps).backward()
            return time.perf_counter() - start

        run()  # warm-up; gradients are there from now on
        seconds = statistics.median(run() for _ in range(5))
        found[name] = (allocator_peak(run), seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--csv", type=Path, default=paths.RESULTS / "ring.csv")
    options = parser.parse_args()
    rows = []
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            settings = (options.batch, options.dimensions, options.tile)
            found = run_ranks(measure, ranks, Path(folder), *settings, timeout=300.0)
        for form in FORMS:
            peak, seconds = (max(numbers) for numbers in zip(*(rank[form] for rank in found), strict=True))
            rows.append(dict(zip(COLUMNS, (form, ranks, *settings, peak, seconds), strict=True)))
    print(f"{'form':18}{'ranks':>6}{'B':>8}{'tile':>6}{'peak MiB':>10}{'/ ring':>8}{'seconds':>9}")
    for row in rows:
        ring = next(r for r in rows if r["ranks"] == row["ranks"] and r["form"] == "ring")
        print(
            f"{row['form']:18}{row['ranks']:6}{row['batch_size']:8,}{row['tile_size']:6}"
            f"{row['peak_bytes'] / 2**20:10.1f}{row['peak_bytes'] / ring['peak_bytes']:8.2f}{row['seconds']:9.2f}"
        )
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {options.csv}")


if __name__ == "__main__":
    main()
