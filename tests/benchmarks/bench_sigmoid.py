"""SigLIP's loss: dense, in tiles, and beside them the tiled softmax loss. Seconds and peak bytes.

    python tests/benchmarks/bench_sigmoid.py [--batch 8192] [--dimensions 256] [--tile 1024] [--repeats 5] [--csv FILE]

float32, forward and backward, learnable temperature and bias; one B x N matrix of logits where dense, as open_clip's
SigLipLoss has it. Rounds alternate between the versions; medians are printed. Peak: the allocator's extra bytes,
gradients of the representations included, by `torch.profiler`.
"""

import argparse
import csv
import statistics
from pathlib import Path

import paths
import torch
from bench_tiled import make_batch, seconds_of
from helpers.allocator import allocator_peak

from gclib.losses.module import ContrastiveLoss
from gclib.losses.sigmoid import SigmoidLoss

COLUMNS = ("version", "batch_size", "dimensions", "tile_size", "threads", "seconds", "peak_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=paths.RESULTS / "sigmoid.csv")
    options = parser.parse_args()
    versions = {
        "sigmoid, dense": SigmoidLoss(),
        "sigmoid, tiled": SigmoidLoss(tile_size=options.tile),
        "softmax, tiled": ContrastiveLoss(learnable=True, tile_size=options.tile),
    }
    queries, passages, _ = make_batch(options.batch, options.dimensions)
    work = {
        name: lambda loss_fn=loss_fn: torch.autograd.grad(
            loss_fn(queries, passages), [queries, passages, *loss_fn.parameters()]
        )
        for name, loss_fn in versions.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(1 + options.repeats):
        for name, run in work.items():
            taken = seconds_of(run)
            if number:
                seconds[name].append(taken)
    sizes = (options.batch, options.dimensions, options.tile, torch.get_num_threads())
    rows = [(name, *sizes, statistics.median(seconds[name]), allocator_peak(run)) for name, run in work.items()]
    print(f"{'version':18}{'B':>8}{'tile':>6}{'seconds':>10}{'peak MiB':>10}")
    for name, batch, _, tile, _, middle, peak in rows:
        print(f"{name:18}{batch:8,}{tile:6}{middle:10.3f}{peak / 2**20:10.1f}")
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    print(f"written to {options.csv}")


if __name__ == "__main__":
    main()
