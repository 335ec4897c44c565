"""Time and memory of the tiled loss against the dense one, public ones, and the machine's matrix product.

    python tests/benchmarks/bench_tiled.py [--batch 8192] [--large 65536] [--tile 1024] [--repeats 5] [--csv FILE]
    python tests/benchmarks/bench_tiled.py --device cuda [--batches 8192 32768 65536 131072] [--tile 4096] [--csv FILE]

Symmetric, float32, D=256, forward and backward, learnable temperature (sentence-transformers' is a number). Dense is
`contrastive_loss`; open_clip's dense loss has a product for each direction; the strips are the cached loss of
sentence-transformers, whole rows of logits at a time: 32 of them, as by default, or a tile's side. Rounds alternate
between the versions; medians are printed. Every memory figure is a process of its own, gradients included: the
allocator's extra peak by `torch.profiler`'s events, the resident extra peak by looking every millisecond. The limit is
8 B^2 D FLOPs at the rate of a matrix product with the tile's shape, measured between the rounds.

On a CUDA card it is another table: see `tiled_cuda.py`.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import paths
import psutil
import torch
from helpers.allocator import allocator_peak
from helpers.rivals import open_clip_loss, sentence_transformers_strips
from torch import Tensor
from torch.nn import functional as F

from gclib.losses.dense import contrastive_loss
from gclib.losses.tiled import tiled_contrastive_loss

MIB = 2**20
DENSE, TILED, OPEN_CLIP = "dense", "tiled", "open_clip, dense"
STRIPS, WIDE_STRIPS = "sentence-t., strips of 32", "sentence-t., strips of a tile"
VERSIONS = (DENSE, TILED, OPEN_CLIP, STRIPS, WIDE_STRIPS)
COLUMNS = ("version", "batch_size", "dimensions", "tile_size", "threads", "seconds", "gigaflops", "over_limit")
BYTES = ("allocated_peak_bytes", "resident_peak_bytes")


def make_batch(batch_size: int, dimensions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors, each passage near its query, and a temperature."""
    torch.manual_seed(0)
    queries = F.normalize(torch.randn(batch_size, dimensions), dim=1)
    passages = F.normalize(queries + 0.1 * torch.randn(batch_size, dimensions), dim=1)
    return queries.requires_grad_(), passages.requires_grad_(), torch.tensor(0.05, requires_grad=True)


def run(version: str, batch: tuple[Tensor, Tensor, Tensor], tile_size: int) -> None:
    """One forward and backward."""
    queries, passages, temperature = batch
    if version in (STRIPS, WIDE_STRIPS):
        rows = 32 if version == STRIPS else tile_size
        sentence_transformers_strips(queries, passages, rows=rows, temperature=0.05)
        queries.grad = passages.grad = None
        return
    if version == DENSE:
        loss = contrastive_loss(queries, passages, temperature=temperature, symmetric=True)
    elif version == OPEN_CLIP:
        loss = open_clip_loss(queries, passages, temperature)
    else:
        loss = tiled_contrastive_loss(queries, passages, temperature=temperature, symmetric=True, tile_size=tile_size)
    torch.autograd.grad(loss, batch)


def seconds_of(work, *arguments) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def product_rate(tile_size: int, dimensions: int) -> float:
    """FLOPs a second of (tile, D) @ (D, tile), the best of ten."""
    left, right = torch.randn(tile_size, dimensions), torch.randn(tile_size, dimensions)
    out = torch.empty(tile_size, tile_size)
    best = min(seconds_of(lambda: torch.mm(left, right.T, out=out)) for _ in range(10))
    return 2 * tile_size**2 * dimensions / best


def time_versions(versions, batch_size, dimensions, tile_size, repeats) -> list[dict]:
    """Interleaved rounds after one warm-up; the product's rate is measured in every round too."""
    batch = make_batch(batch_size, dimensions)
    seconds: dict[str, list[float]] = {version: [] for version in versions}
    rates = []
    for number in range(repeats + (repeats > 1)):
        for version in versions:
            taken = seconds_of(run, version, batch, tile_size)
            if number or repeats == 1:
                seconds[version].append(taken)
        rates.append(product_rate(tile_size, dimensions))
    rate, work = statistics.median(rates), 8 * batch_size**2 * dimensions
    rows = []
    for version, taken in seconds.items():
        middle = statistics.median(taken)
        numbers = (version, batch_size, dimensions, tile_size, torch.get_num_threads(), middle, rate / 1e9)
        rows.append(dict(zip(COLUMNS, (*numbers, middle / (work / rate)), strict=True)))
    return rows


def resident_peak(work, *arguments) -> int:
    """Most resident bytes beyond those at entry, looked at every millisecond while the work runs."""
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work(*arguments)
    done.set()
    watcher.join()
    return highest - before


def measure_memory(version: str, batch_size: int, dimensions: int, tile_size: int, way: str) -> int:
    """Extra peak bytes, gradients included, of one forward and backward: in a fresh process, after a small run."""
    run(version, make_batch(8, dimensions), 8)
    batch = make_batch(batch_size, dimensions)
    if way == "resident_peak_bytes":
        return resident_peak(run, version, batch, tile_size)
    return allocator_peak(lambda: run(version, batch, tile_size))


def memory_in_new_process(row: dict, way: str) -> int:
    """`measure_memory` where nothing else has been resident."""
    settings = json.dumps([row["version"], row["batch_size"], row["dimensions"], row["tile_size"], way])
    command = [sys.executable, __file__, "--memory", settings]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def show(rows: list[dict]) -> None:
    """The table, and the ratios that the bars are about."""
    print(
        f"{'version':30}{'B':>8}{'tile':>7}{'seconds':>10}{'GFLOP/s':>9}{'/ limit':>9}"
        f"{'alloc MiB':>11}{'resident MiB':>14}"
    )
    for row in rows:
        sizes = [f"{row[way] / MIB:.1f}" if row[way] else "-" for way in BYTES]
        print(
            f"{row['version']:30}{row['batch_size']:8,}{row['tile_size']:7}{row['seconds']:10.3f}{row['gigaflops']:9.1f}"
            f"{row['over_limit']:9.2f}{sizes[0]:>11}{sizes[1]:>14}"
        )
    tiled = rows[VERSIONS.index(TILED)]
    for other in rows[: len(VERSIONS)]:
        if other is not tiled:
            print(f"tiled / {other['version']} at B={other['batch_size']:,}: ", end="")
            print(f"time {tiled['seconds'] / other['seconds']:.3f}", end="")
            print("".join(f", {way.replace('_', ' ')} 1/{other[way] / tiled[way]:.1f}" for way in BYTES))


def save(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS + BYTES)
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--large", type=int, default=65536, help="0: leave it out")
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--tile", type=int, help="1,024, and 4,096 on CUDA")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", help="of --device cuda, which takes no --batch and --large")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(measure_memory(*json.loads(options.memory)))
        return
    if options.device == "cuda":
        import tiled_cuda

        batches = options.batches or tiled_cuda.BATCHES
        tiled_cuda.main(
            batches, options.dimensions, options.tile or 4096, options.csv or paths.RESULTS / "tiled_cuda.csv"
        )
        return
    options.tile, options.csv = options.tile or 1024, options.csv or paths.RESULTS / "tiled.csv"
    rows = time_versions(VERSIONS, options.batch, options.dimensions, options.tile, options.repeats)
    if options.large:
        rows += time_versions((TILED,), options.large, options.dimensions, options.tile, 1)
    for row in rows:
        for way in BYTES:
            profiled = way == "allocated_peak_bytes"
            row[way] = memory_in_new_process(row, way) if not profiled or row["batch_size"] == options.batch else 0
    show(rows)
    save(rows, options.csv)


if __name__ == "__main__":
    main()
