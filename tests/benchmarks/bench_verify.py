"""What verification costs: the first step of an encoder, which looks at it, beside a later one, which trusts it.

    python tests/benchmarks/bench_verify.py [--batch 256] [--chunk 16] [--rounds 3] [--out FOLDER]

One tied encoder (BERT, 4 layers of 256, dropout on), float32, ragged rows: queries of at most 64 tokens, passages of at
most 128. FLOPs are counted and peaks are the ledger's; seconds are medians of rounds, each with an encoder that no step
has seen. "never" is verify="never", the first and the later step have the default. The table is verify.csv.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import paths
import torch

from gclib import ContrastiveLoss, Encoder, grad_cache_step, record_memory
from gclib.memory.flops import count_flops
from gclib.support.words import format_table


def ragged(rows: int, width: int) -> dict[str, torch.Tensor]:
    """Rows of 4 to `width` random tokens."""
    mask = (torch.arange(width) < torch.randint(4, width + 1, (rows, 1))).long()
    return {"input_ids": torch.randint(1, 8_000, (rows, width)) * mask, "attention_mask": mask}


def prepared(options: argparse.Namespace) -> tuple[Encoder, Callable[..., torch.Tensor]]:
    """A new encoder, and its step; the same weights and rows each time."""
    torch.manual_seed(0)
    encoder = Encoder.from_config("small").train()
    inputs = [ragged(options.batch, width) for width in options.widths]
    return encoder, partial(grad_cache_step, [encoder] * 2, inputs, ContrastiveLoss(), chunk_size=options.chunk)


CASES = ("first", "later", "never")  # in the order in which one encoder meets them
COLUMNS = ("step", "gigaflops", "over_never", "peak_mib", "seconds", "seconds_over_never")


def counted(options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """(FLOPs, the ledger's peak) of each case."""
    encoder, step = prepared(options)
    results = {}
    for case in CASES:
        encoder.zero_grad(set_to_none=True)
        with record_memory(encoder) as ledger:
            verify = "never" if case == "never" else "first"
            flops = count_flops(partial(step, verify=verify, on_phase=ledger.on_phase))
        results[case] = flops, ledger.peak_bytes
    return results


def timed(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of each case, of an encoder that no step has seen; one step of another goes before."""
    prepared(options)[1](verify="never")
    encoder, step = prepared(options)
    results = {}
    for case in CASES:
        encoder.zero_grad(set_to_none=True)
        started = time.perf_counter()
        step(verify="never" if case == "never" else "first")
        results[case] = time.perf_counter() - started
    return results


def main() -> None:
    """Print the table and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="0: count alone")
    parser.add_argument("--widths", type=int, nargs=2, default=(64, 128), help="most tokens of a query, a passage")
    parser.add_argument("--out", type=Path, default=paths.RESULTS)
    options = parser.parse_args()
    counts, rounds = counted(options), [timed(options) for _ in range(options.rounds)]
    rows = []
    for case, (flops, peak) in counts.items():
        row = [case, round(flops / 1e9, 2), round(flops / counts["never"][0], 5), round(peak / 2**20, 2)]
        seconds = [statistics.median(times[case] for times in rounds)] if rounds else []
        shares = [statistics.median(times[case] / times["never"] for times in rounds)] if rounds else []
        rows.append(row + ([round(seconds[0], 2), round(shares[0], 3)] if rounds else [None, None]))
    print(format_table(COLUMNS, rows))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "verify.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
