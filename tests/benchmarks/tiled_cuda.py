"""The tiled loss on a CUDA card beside the dense one, sentence-transformers' strips, open_clip's form and inf_cl.

    python tests/benchmarks/bench_tiled.py --device cuda [--batches 8192 32768 65536 131072] [--tile 4096] [--csv FILE]

Symmetric, D = 256, forward and backward, float32 representations, learnable temperature (sentence-transformers' is a
number). `inf_cl` is PyPI's kernel of Cheng et al. 2024 in Triton, called for each direction as its README calls it for
one; its products round their operands to TF32, so the rows "TF32" of the others are what it should be held against, and
the errors tell what that costs. "Small tiles" have a side of 1,024, which a card's cache would hold. Rounds alternate
between the versions; medians, measured between synchronisations. The peak is `torch.cuda.max_memory_allocated` of one
run beyond what was there before it, gradients included, the matrix library's workspaces not.

Each version is first run at B = 4,096, where its loss and gradients are held against a dense oracle in float64; that
run also compiles what has to be compiled. inf_cl comes after all others. What does not fit, or does not run here, says
so in its row.

The kept table has no row of open_clip's form yet, which scales the vectors: "two products, each divided" is another,
with two matrices more for each direction.
"""

import csv
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from helpers.rivals import open_clip_loss, sentence_transformers_strips
from torch import Tensor
from torch.nn import functional as F

from gclib.losses.dense import contrastive_loss
from gclib.losses.tiled import tiled_contrastive_loss

BATCHES = (8192, 32768, 65536, 131072)
ROUNDS = {8192: 5, 32768: 3, 65536: 3}  # one of larger batches
WARMED_UP = 32768  # larger batches take long, and what they call has been called before
JUDGED = 4096
INF_CL = "inf_cl"
MIB = 2**20
COLUMNS = ("version", "batch_size", "dimensions", "tile_size", "seconds", "rounds", "allocated_peak_bytes")
COLUMNS += ("loss_error", "query_gradient_error", "passage_gradient_error", "note", "device", "versions", "command")
Batch = tuple[Tensor, Tensor, Tensor]
Run = Callable[[Batch], tuple[Tensor, Tensor, Tensor]]  # -> the loss, the gradients of queries and passages


def versions_of(tile_size: int) -> dict[str, tuple[Run, bool, int | str | None]]:
    """Name -> (how it is run, whether products are in TF32, its tile)."""

    def tiled(size: int | str) -> Run:
        return by_autograd(lambda q, p, t: tiled_contrastive_loss(q, p, temperature=t, symmetric=True, tile_size=size))

    def strips(rows: int) -> Run:
        def run(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            queries, passages, _ = batch
            loss = sentence_transformers_strips(queries, passages, rows=rows, temperature=0.05)
            found = loss.detach(), queries.grad, passages.grad
            queries.grad = passages.grad = None
            return found

        return run

    dense = by_autograd(lambda q, p, t: contrastive_loss(q, p, temperature=t, symmetric=True))
    return {
        "dense": (dense, False, None),
        "dense, TF32": (dense, True, None),
        "tiled": (tiled(tile_size), False, tile_size),
        "tiled, TF32": (tiled(tile_size), True, tile_size),
        "tiled, small tiles": (tiled(1024), False, 1024),
        "open_clip, dense": (by_autograd(open_clip_loss), False, None),
        "sentence-t., strips of 32": (strips(32), False, 32),
        "sentence-t., strips of a tile": (strips(tile_size), False, tile_size),
        INF_CL: (by_autograd(inf_cl_loss), True, None),
    }


def by_autograd(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    """One forward and backward by autograd, the temperature's gradient too."""

    def run(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        loss = loss_of(*batch)
        of_queries, of_passages, _ = torch.autograd.grad(loss, batch)
        return loss.detach(), of_queries, of_passages

    return run


def inf_cl_loss(queries: Tensor, passages: Tensor, temperature: Tensor) -> Tensor:
    """Both directions of inf_cl's loss of one process, which gives a number a row for one."""
    from inf_cl import cal_flash_loss

    scale = 1 / temperature
    of_queries = cal_flash_loss(queries, passages, scale=scale, head_dim=queries.shape[1])
    of_passages = cal_flash_loss(passages, queries, scale=scale, head_dim=queries.shape[1])
    return (of_queries.mean() + of_passages.mean()) / 2


def make_batch(batch_size: int, dimensions: int) -> Batch:
    """Unit vectors, each passage near its query, and a temperature."""
    generator = torch.Generator("cuda").manual_seed(0)
    noise = torch.randn(2, batch_size, dimensions, generator=generator, device="cuda")
    queries = F.normalize(noise[0], dim=1)
    passages = F.normalize(queries + 0.1 * noise[1], dim=1)
    return queries.requires_grad_(), passages.requires_grad_(), torch.tensor(0.05, device="cuda", requires_grad=True)


def oracle(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, from log-sum-exps of all logits at once."""
    queries, passages, temperature = (value.detach().double().requires_grad_() for value in batch)
    logits = queries @ passages.T / temperature
    right = logits.diagonal().mean()
    loss = (logits.logsumexp(dim=1).mean() + logits.logsumexp(dim=0).mean()) / 2 - right
    return loss.detach(), *torch.autograd.grad(loss, [queries, passages])


def errors(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> dict[str, float]:
    """Length of the difference over the length of the truth, of the loss and of the two gradients."""
    names = ("loss_error", "query_gradient_error", "passage_gradient_error")
    pairs = zip(names, found, truth, strict=True)
    return {name: float((value.double() - right).norm() / right.norm()) for name, value, right in pairs}


def measured(run: Run, batch: Batch, tf32: bool) -> tuple[float, int, tuple[Tensor, ...]]:
    """Seconds of one run, the allocator's extra peak, and what came out."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    start = time.perf_counter()
    found = run(batch)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() - before, found


def attempt(run: Run, batch: Batch, tf32: bool) -> tuple[float | None, int | None, tuple[Tensor, ...] | None, str]:
    """`measured`, or in words why not: too big for the card, not installed, or refused by its own compiler."""
    try:
        return *measured(run, batch, tf32), ""
    except torch.OutOfMemoryError:
        note = "does not fit the card"
    except Exception as error:  # a rival that does not run here must not end the benchmark
        note = f"does not run here: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    batch[0].grad = batch[1].grad = None
    torch.cuda.empty_cache()
    return None, None, None, note


def rows_at(batch_size: int, dimensions: int, runs: dict[str, tuple], skipped: dict[str, str]) -> list[dict]:
    """A row a version: interleaved rounds, with one before that no time is taken of for batches up to `WARMED_UP`."""
    torch.set_float32_matmul_precision("highest")
    batch = make_batch(batch_size, dimensions)
    truth = oracle(batch) if batch_size == JUDGED else None
    times: dict[str, list[float]] = {name: [] for name in runs}
    rows = {}
    rounds = ROUNDS.get(batch_size, 1)
    for number in range(rounds + (batch_size <= WARMED_UP)):
        for name, (run, tf32, tile) in runs.items():
            row = rows.setdefault(name, {"version": name, "batch_size": batch_size, "dimensions": dimensions})
            row |= {"tile_size": tile, "note": row.get("note") or skipped.get(name, "")}
            if row["note"]:
                continue
            seconds, peak, found, row["note"] = attempt(run, batch, tf32)
            if found is None:
                continue
            row["allocated_peak_bytes"] = peak
            if truth is not None:
                row |= errors(found, truth)
            if number or batch_size > WARMED_UP:
                times[name].append(seconds)
            del found
    for name, row in rows.items():
        row |= {"seconds": statistics.median(times[name]) if times[name] else None, "rounds": len(times[name])}
    return list(rows.values())


def show(rows: list[dict]) -> None:
    """One batch's rows, and the tiled loss against the others."""
    errors_of = f"{'loss error':>11}{'dQ error':>10}{'dP error':>10}"
    print(f"{'version':30}{'B':>9}{'tile':>7}{'ms':>10}{'peak MiB':>11}{errors_of}")
    for row in rows:
        taken = f"{1000 * row['seconds']:.1f}" if row["seconds"] else "-"
        peak = f"{row['allocated_peak_bytes'] / MIB:,.1f}" if row.get("allocated_peak_bytes") else "-"
        names = ("loss_error", "query_gradient_error", "passage_gradient_error")
        judged = "".join(f"{row[name]:10.1e}" if name in row else f"{'-':>10}" for name in names)
        print(
            f"{row['version']:30}{row['batch_size']:9,}{row['tile_size'] or '-':>7}{taken:>10}{peak:>11} {judged}  "
            f"{row['note']}"
        )
    sys.stdout.flush()


def ratios(rows: list[dict]) -> None:
    """Tiled against the others at the same batch, like with like: TF32 against what computes in TF32."""
    named = {(row["version"], row["batch_size"]): row for row in rows if row["seconds"]}
    for (name, batch_size), row in named.items():
        own = named.get(("tiled, TF32" if name in (INF_CL, "dense, TF32") else "tiled", batch_size))
        if own is None or name.startswith("tiled"):
            continue
        peak = row["allocated_peak_bytes"] / own["allocated_peak_bytes"]
        print(f"{own['version']} / {name} at B={batch_size:,}: time {own['seconds'] / row['seconds']:.3f}, ", end="")
        print(f"peak 1/{peak:.1f}" if peak >= 1 else f"peak {1 / peak:.2f}")


def versions() -> str:
    """What the numbers may depend on."""
    found = [f"torch {torch.__version__}"]
    for name in ("triton", "sentence-transformers", "inf_cl"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def save(rows: list[dict], path: Path, command: str) -> None:
    """The rows as CSV, with the card, the versions and the command in each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"device": torch.cuda.get_device_name(), "versions": versions(), "command": command}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in (row | about).items()})


def main(batches: tuple[int, ...], dimensions: int, tile_size: int, path: Path) -> None:
    """All batches, the judged one first; printed as they come, and kept as CSV after each."""
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch can use no CUDA device here")
    sizes = " ".join(map(str, batches))
    command = f"python tests/benchmarks/bench_tiled.py --device cuda --batches {sizes} --tile {tile_size}"
    print(f"{torch.cuda.get_device_name()}, {versions()}")
    runs, every = versions_of(tile_size), []
    last = {INF_CL: runs.pop(INF_CL)}  # a kernel that goes astray takes the whole process with it
    for group in (runs, last):
        skipped: dict[str, str] = {}
        for batch_size in sorted({JUDGED, *batches}):
            rows = rows_at(batch_size, dimensions, group, skipped)
            skipped |= {row["version"]: row["note"] for row in rows if row["note"]}
            show(rows)
            every += rows
            save(every, path, command)
    ratios(every)
    print(f"written to {path}")
