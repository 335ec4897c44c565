"""Steps side by side: naive, the official GradCache, sentence-transformers' cached loss, and gclib's.

    python tests/benchmarks/bench_steps.py [--batches 256 1024] [--chunks 16 32] [--rounds 3] [--whole]
                                           [--times-only] [--compared-only] [--out FOLDER]
    python tests/benchmarks/bench_steps.py --device cuda [--encoder bert-base] [and as above]

One tied encoder (BERT, 4 layers of 256, dropout on), mined pairs drawn with a fixed seed and put in file order, queries
of at most 64 tokens, passages of at most 128, float32. The pairs are Python's own: the standard library is the same on
every machine with the same Python, while the whole corpus (`--whole`) is of whatever is installed beside it.

Each batch with its chunk size has a process of its own, started afresh. Each round there runs every version once, in an
order of its own, so that a slow minute hurts them all and none always follows the same one; medians are printed. At the
smallest batch each version runs once before the rounds for its FLOPs, and once for its allocator peak. Larger batches
warm up on one row in eight; after their first round only those versions run again that are compared (`COMPARED`). With
`--times-only` nothing is counted, and every batch warms up like that. "Pre-sorted" rows show what sorting alone buys
elsewhere.

With `--device cuda` every batch gets all rounds after a warm-up, times are taken between synchronisations, and the peak
is `torch.cuda.max_memory_allocated` beyond what was there before (weights and gradients), at every batch. A version
that does not fit the card, or does not run there, says so in its row. The table is steps_cuda.csv. `--encoder` takes
another size of BERT, whose name is then in the table's: one of 4 x 256 leaves a big card idle.

`predicted` is rho * (1 + (1 - r) / 3) with rho = encoded tokens of one forward / padded tokens of the batch and
r = the share of those tokens whose graph is retained: a step's time over the padded naive step's, if time went with
tokens. "A quarter retained" is a quarter of the chunks of an even cut, 2 B / C. The ratios that the bars are about are
medians of each round's ratio, kept in steps_bars.csv.
"""

import argparse
import csv
import gc
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path

import paths
import torch
import transformers
from helpers.allocator import allocator_peak
from helpers.rivals import (
    Counted,
    flops_of,
    official_step,
    sentence_transformers_step,
    sort_and_trim,
    sorted_loss,
    split_trimmed,
)
from torch import Tensor

from gclib import ContrastiveLoss, Encoder, grad_cache_step, naive_step
from gclib.chunks import Chunk, plan_chunks
from gclib.data.corpus import load_corpus
from gclib.data.pairs import TextPair, load_pairs
from gclib.data.tokens import tokenize_pairs, train_tokenizer
from gclib.models.encoder import SIZES
from gclib.towers import row_lengths, take

Batch = dict[str, Tensor]
NAIVE, BUCKETS = "naive, padded", "naive, in length buckets"
OFFICIAL, OFFICIAL_SORTED = "official GradCache", "official, pre-sorted and trimmed"
ST, ST_SORTED = "sentence-transformers cached", "sentence-transformers, pre-sorted"
PLAIN, OURS, ONE, QUARTER, PACKED = (
    "gclib, not sorted",
    "gclib (defaults: sorted)",
    "gclib, sorted, 1 retained",
    "gclib, sorted, a quarter retained",
    "gclib, packed by tokens",
)
PRESORTED = "gclib, pre-sorted by the caller"
COMPARED = (OFFICIAL, OFFICIAL_SORTED, ST, OURS, PRESORTED)
COLUMNS = ("version", "batch_size", "chunk_size", "seconds", "over_naive", "predicted", "peak_mib", "rows", "tokens")
COLUMNS += ("gigaflops", "rounds", "threads")
BAR_COLUMNS = ("batch_size", "chunk_size", "bar", "ratio")
CUDA_COLUMNS = (*COLUMNS, "note", "encoder", "device", "versions", "command")


@cache
def texts(whole: bool) -> tuple[list, object]:
    """Rows of Python's own modules, or of all packages, and a tokenizer."""
    tokenizer = train_tokenizer(load_pairs()[:4_000])
    rows = load_corpus().split("train")
    return [row for row in rows if whole or row.module.split(".")[0] in sys.stdlib_module_names], tokenizer


def make_batch(batch_size: int, whole: bool = False, device: str = "cpu") -> tuple[Batch, Batch]:
    """B pairs drawn with a fixed seed, in file order: no order of lengths. whole: of all packages, not Python's own."""
    rows, tokenizer = texts(whole)
    chosen = sorted(random.Random(0).sample(rows, batch_size), key=lambda row: (row.module, row.line))
    pairs = [TextPair(row.query, row.passage) for row in chosen]
    towers = tokenize_pairs(pairs, tokenizer, query_length=64, passage_length=128)
    return tuple({name: value.to(device) for name, value in tower.items()} for tower in towers)


def naive_in_buckets(encoder, batch: tuple[Batch, Batch], loss_fn, plans: list[list[Chunk]]) -> None:
    """The naive step without the padding: rows of like length are encoded together, all graphs are kept."""
    reps = []
    for inputs, plan in zip(batch, plans, strict=True):
        parts = torch.cat([encoder(**take(inputs, chunk)) for chunk in plan])
        order = torch.tensor([row for chunk in plan for row in chunk.rows], device=parts.device)
        reps.append(parts[order.argsort()])
    loss_fn(*reps).backward()


def versions(encoder: Counted, batch: tuple[Batch, Batch], C: int) -> dict[str, Callable[[], object]]:
    """Every version of the step as a call without arguments."""
    loss_fn, encoders = ContrastiveLoss(0.05), [encoder, encoder]
    lengths = [row_lengths(inputs) for inputs in batch]
    n = sum(-(-len(rows) // C) for rows in lengths)
    apart = [sort_and_trim(inputs) for inputs in batch]
    order = batch[1]["attention_mask"].sum(dim=1).argsort(descending=True, stable=True)
    together = [{key: value[order] for key, value in inputs.items()} for inputs in batch]
    buckets = [plan_chunks(rows, chunk_size=32) for rows in lengths]
    tokens = [C * max(rows) for rows in lengths]
    in_pairs = sorted_loss(*batch, loss_fn)
    return {
        NAIVE: lambda: naive_step(encoders, batch, loss_fn),
        BUCKETS: lambda: naive_in_buckets(encoder, batch, loss_fn, buckets),
        OFFICIAL: lambda: official_step(encoders, batch, loss_fn, chunk_size=C),
        OFFICIAL_SORTED: lambda: official_step(encoders, apart, in_pairs, chunk_size=C, split_input_fn=split_trimmed),
        ST: lambda: sentence_transformers_step(encoder, batch, chunk_size=C),
        ST_SORTED: lambda: sentence_transformers_step(encoder, together, chunk_size=C),
        PLAIN: lambda: grad_cache_step(encoders, batch, loss_fn, chunk_size=C, sort_by_length=False),
        OURS: lambda: grad_cache_step(encoders, batch, loss_fn, chunk_size=C),
        PRESORTED: lambda: grad_cache_step(encoders, apart, in_pairs, chunk_size=C),
        ONE: lambda: grad_cache_step(encoders, batch, loss_fn, chunk_size=C, retain_chunks=1),
        QUARTER: lambda: grad_cache_step(encoders, batch, loss_fn, chunk_size=C, retain_chunks=n // 4),
        PACKED: lambda: grad_cache_step(encoders, batch, loss_fn, chunk_tokens=tokens),
    }


def unpadded_flops(encoder, batch: tuple[Batch, Batch]) -> int | None:
    """FLOPs of a naive step that encodes no padding at all: rows of exactly the same length together.

    None where the step does not fit the card.
    """
    plans = []
    for inputs in batch:
        same: dict[int, list[int]] = {}
        for row, length in enumerate(row_lengths(inputs)):
            same.setdefault(length, []).append(row)
        plans.append([Chunk(tuple(rows), length) for length, rows in same.items()])
    try:
        return flops_of(lambda: naive_in_buckets(encoder, batch, ContrastiveLoss(0.05), plans))
    except torch.OutOfMemoryError:
        return None


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def peak_of(run: Callable[[], object], device: str) -> int:
    """The most bytes that the device's allocator had given out during the run, beyond what was there before."""
    if device != "cuda":
        return allocator_peak(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def zeroed(encoder: Counted, run: Callable[[], object]) -> Callable[[], object]:
    """`run` as in training: gradients are there and are added to; the same dropout every time."""

    def call() -> None:
        encoder.zero_grad(set_to_none=False)
        torch.manual_seed(0)
        run()

    return call


def make_encoder(size: str, device: str) -> Counted:
    """The encoder, with gradients that are there; on a card the matrix library's workspaces are there too."""
    torch.manual_seed(0)
    encoder = Counted(Encoder.from_config(size, dropout=0.1)).to(device)
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if device == "cuda":
        few = torch.ones(2, 8, dtype=torch.long, device=device)
        encoder(few, few).sum().backward()
    return encoder


def first_runs(
    runs: dict[str, Callable[[], object]], about: dict, options: argparse.Namespace, first: bool
) -> dict[str, dict]:
    """A row a version, with its FLOPs and its peak where they are counted; what does not fit is taken out of `runs`."""
    rows = {}
    for name, run in list(runs.items()):
        row = rows[name] = {"version": name, **about}
        counted, on_card = first and not options.times_only, options.device == "cuda"
        try:
            row["gigaflops"] = flops_of(run) / 1e9 if counted or name == OURS else None
            row["peak_mib"] = peak_of(run, options.device) / 2**20 if counted or on_card else None
        except Exception as error:
            if not on_card:
                raise
            row |= {"gigaflops": None, "peak_mib": None, "note": why_not(error)}
            del runs[name]
        if "note" in row:
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def why_not(error: Exception) -> str:
    """Why a version has no numbers of this card, in words."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit the card"
    return f"does not run here: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"


def bench(batch_size: int, chunk_size: int, options: argparse.Namespace) -> tuple[list[dict], dict[str, float]]:
    """One row a version, and the ratios that the bars are about."""
    batch = make_batch(batch_size, options.whole, options.device)
    lengths = [statistics.mean(row_lengths(inputs)) for inputs in batch]
    print(
        f"\n{'whole corpus' if options.whole else 'standard library'}: queries of {lengths[0]:.1f} tokens, "
        f"passages of {lengths[1]:.1f} on average"
    )
    encoder = make_encoder(options.encoder, options.device)
    runs = {name: zeroed(encoder, run) for name, run in versions(encoder, batch, chunk_size).items()}
    if options.compared_only:
        runs = {name: runs[name] for name in COMPARED}
    padded, all_rows = sum(inputs["input_ids"].numel() for inputs in batch), 2 * batch_size
    first = batch_size == min(options.batches)
    if options.device == "cpu" and (options.times_only or not first):
        few = tuple({key: value[::8] for key, value in inputs.items()} for inputs in batch)
        warm = versions(encoder, few, chunk_size)
        for name in runs:
            zeroed(encoder, warm[name])()
    rows = first_runs(runs, {"batch_size": batch_size, "chunk_size": chunk_size}, options, first)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds):
        every = number == 0 or first or options.device == "cuda"
        now = [name for name in runs if every or name in COMPARED]
        for name in random.Random(number).sample(now, len(now)):
            run = runs[name]
            encoder.rows = encoder.tokens = encoder.with_graph = 0
            seconds[name].append(seconds_of(run, options.device))
            rows[name] |= {"rows": encoder.rows / all_rows, "tokens": encoder.tokens / padded}
            once, again = encoder.with_graph, encoder.tokens - encoder.with_graph
            rows[name]["predicted"] = (once + again / 3) / padded
    for name, taken in seconds.items():
        rows[name] |= {"seconds": statistics.median(taken), "rounds": len(taken)}
        rows[name]["over_naive"] = ratio(taken, seconds.get(NAIVE))
    for row in rows.values():
        row["threads"] = torch.get_num_threads()
    return list(rows.values()), ratios_of(rows, seconds, unpadded_flops(encoder, batch))


def ratio(taken: list[float] | None, other: list[float] | None) -> float | None:
    """The median over the rounds that both ran in; None where one of them did not run."""
    if taken is None or other is None:
        return None
    return statistics.median([a / b for a, b in zip(taken, other, strict=False)])


def ratios_of(rows: dict[str, dict], seconds: dict[str, list[float]], unpadded: int | None) -> dict[str, float]:
    """What the bars are about, of gclib's defaults. unpadded: FLOPs of a naive step without any padding, if known."""
    ratios = {
        "time / official GradCache (bar 0.50)": ratio(seconds.get(OURS), seconds.get(OFFICIAL)),
        "time / sentence-transformers cached (bar 0.65)": ratio(seconds.get(OURS), seconds.get(ST)),
        "time / official, both pre-sorted the same way (bar 1.00)": ratio(
            seconds.get(PRESORTED), seconds.get(OFFICIAL_SORTED)
        ),
    }
    if unpadded and rows[OURS]["gigaflops"]:
        ratios["FLOPs / (4/3 of the unpadded naive step's) (bar 1.12)"] = 0.75e9 * rows[OURS]["gigaflops"] / unpadded
    if rows[OFFICIAL]["peak_mib"] and rows[OURS]["peak_mib"]:
        ratios["allocator peak / official (bar 1.02)"] = rows[OURS]["peak_mib"] / rows[OFFICIAL]["peak_mib"]
    return {name: value for name, value in ratios.items() if value is not None}


def show(rows: list[dict], ratios: dict[str, float]) -> None:
    batch_size, chunk_size, threads = (rows[0][key] for key in ("batch_size", "chunk_size", "threads"))
    print(
        f"B = {batch_size:,}, C = {chunk_size}; rounds: {max(row.get('rounds', 0) for row in rows)}, threads: {threads}"
    )
    print(f"{'':36}{'seconds':>9}{'/ naive':>9}{'predicted':>11}{'peak MiB':>10}{'rows':>7}{'tokens':>8}{'GFLOP':>9}")
    for row in rows:
        if "note" in row:
            print(f"{row['version']:36}{row['note']}")
            continue
        peak = f"{row['peak_mib']:.1f}" if row["peak_mib"] else "-"
        flops = f"{row['gigaflops']:.0f}" if row["gigaflops"] else "-"
        over = f"{row['over_naive']:.2f}" if row["over_naive"] else "-"
        print(
            f"{row['version']:36}{row['seconds']:9.{3 if row['seconds'] < 1 else 2}f}{over:>9}"
            f"{row['predicted']:11.2f}{peak:>10}{row['rows']:7.3f}{row['tokens']:8.3f}{flops:>9}"
        )
    for name, value in ratios.items():
        print(f"  gclib (defaults): {name}: {value:.3f}")
    sys.stdout.flush()


def save(rows: list[dict], bars: list[dict], options: argparse.Namespace) -> None:
    """Table and bars as CSV, and the times as a picture; from a card with its name, the versions and the command."""
    options.out.mkdir(parents=True, exist_ok=True)
    on_card = options.device == "cuda"
    about = about_card(options) if on_card else {}
    name = "steps_cuda" if on_card else "steps"
    name += "" if options.encoder == "small" else f"_{options.encoder}"
    with (options.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, CUDA_COLUMNS if on_card else COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in (row | about).items()})
    with (options.out / f"{name}_bars.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, BAR_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(bar | {"ratio": f"{bar['ratio']:.3f}"} for bar in bars)
    if on_card:
        print(f"\nwritten to {options.out / name}.csv")
        return
    draw(rows, options.out / f"{name}.png")
    print(f"\nwritten to {options.out / name}.csv and {name}.png")


def about_card(options: argparse.Namespace) -> dict[str, str]:
    """What the numbers of a card depend on."""
    listed = [f"--batches {' '.join(map(str, options.batches))}", f"--chunks {' '.join(map(str, options.chunks))}"]
    more = ["--whole"] * options.whole + ["--times-only"] * options.times_only
    command = ["python tests/benchmarks/bench_steps.py --device cuda", f"--encoder {options.encoder}", *listed]
    return {
        "encoder": options.encoder,
        "device": torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "command": " ".join([*command, f"--rounds {options.rounds}", *more]),
    }


def draw(rows: list[dict], path: Path) -> None:
    """One panel for each batch and chunk: time over the padded naive step's, and what was predicted."""
    from gclib.course import plots

    settings = list(dict.fromkeys((row["batch_size"], row["chunk_size"]) for row in rows))
    with plots.style():
        figure, all_axes = plots.new_figure(width=5.2 * len(settings), height=4.6, columns=len(settings))
        for axes, (batch_size, chunk_size) in zip(all_axes if len(settings) > 1 else [all_axes], settings, strict=True):
            here = [row for row in rows if (row["batch_size"], row["chunk_size"]) == (batch_size, chunk_size)][::-1]
            ours = [row["version"].startswith("gclib") for row in here]
            colours = [plots.OKABE_ITO["blue"] if own else plots.OKABE_ITO["orange"] for own in ours]
            axes.barh(range(len(here)), [row["over_naive"] for row in here], color=colours)
            axes.plot([row["predicted"] for row in here], range(len(here)), "kD", markersize=4, label="predicted")
            axes.set_yticks(range(len(here)), [row["version"] for row in here])
            axes.set(title=f"B = {batch_size:,}, C = {chunk_size}", xlabel="time / padded naive step")
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1))
        figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 32])
    parser.add_argument(
        "--rounds", type=int, default=3, help="on a CPU larger batches than the smallest repeat what is compared"
    )
    parser.add_argument("--whole", action="store_true", help="pairs of all packages, not of the standard library alone")
    parser.add_argument("--times-only", action="store_true", help="no FLOPs, and on a CPU no peaks, of the versions")
    parser.add_argument(
        "--compared-only", action="store_true", help="only the versions that the bars are about; nothing is written"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--encoder", choices=tuple(SIZES), default="small", help="the size of BERT")
    parser.add_argument("--out", type=Path, default=paths.RESULTS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch can use no CUDA device here")
    every, bars = [], []
    for batch_size in options.batches:
        for chunk_size in options.chunks:
            try:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                    rows, ratios = process.submit(bench, batch_size, chunk_size, options).result()
            except BrokenProcessPool:
                print(f"B = {batch_size:,}, C = {chunk_size}: the process was killed, most likely for its memory")
                continue
            show(rows, ratios)
            every += rows
            bars += [
                {"batch_size": batch_size, "chunk_size": chunk_size, "bar": k, "ratio": v} for k, v in ratios.items()
            ]
            if not options.compared_only:
                save(every, bars, options)


if __name__ == "__main__":
    main()
