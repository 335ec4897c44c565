"""Each row trained, measured and kept on disk, under a checksum of all that it depends on.

    python -m gclib.course.experiments.contents.runs

trains chapter 12's full tables with a progress bar, and writes data/results/contents.csv, which the chapter shows.
Every update keeps to the bytes that the small row's plain step
takes: where the whole batch is more, the gradient cache takes it in the largest chunks that fit. The second update is
recorded by the ledger.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from gclib.course.chapters import PROJECT as ROOT
from gclib.course.experiments.contents.rows import (
    EQUAL_BYTES,
    PLANTED,
    SMALL,
    SWEEP,
    WHOLE,
    Row,
    batches_of,
    updates_of,
)
from gclib.course.experiments.kept import check_chosen, read_or_train
from gclib.course.experiments.recipes import TableSetting
from gclib.course.experiments.results import KS, SEEDS, fresh_encoder, pairs_and_tokenizer
from gclib.course.experiments.summaries import METRICS
from gclib.data.corpus import fingerprint, installed_sources
from gclib.data.negatives import false_negative_mask
from gclib.losses.module import ContrastiveLoss
from gclib.memory.forecast import forecast_step
from gclib.memory.ledger import record_memory
from gclib.memory.plan import largest_chunk
from gclib.models.encoder import Encoder
from gclib.steps import grad_cache_step, naive_step
from gclib.support.files import DamagedFile, cache_folder, code_digest, read_checked
from gclib.training.loop import Training, learning_rate_factors
from gclib.training.retrieval import retrieval_metrics

RESULTS = ROOT / "data" / "results" / "contents.csv"
NAMING = ("name", "temperature", "rate_factor")  # what tells one row from all others
COUNTED = ("seed", "pool", "updates", "tokens", "chunk_size", "peak_bytes", "threads")


@dataclass(frozen=True)
class Trained:
    """A row that was trained with a seed, and judged on the test split's `pool` queries.

    metrics: shares from 0 to 1. chunk_size: C, None for the plain step. peak_bytes: the ledger's, of the second update
    (0 where there is one update). tokens: encoded once, padding included. seconds: of training with `threads` threads.
    """

    recipe: Row
    seed: int
    metrics: dict[str, float]
    pool: int
    updates: int
    tokens: int
    chunk_size: int | None
    peak_bytes: int
    final_loss: float
    seconds: float
    threads: int
    saved: bool = False


def trainings(
    setting: TableSetting,
    rows: Sequence[Row],
    *,
    seeds: Sequence[int] = SEEDS,
    progress: bool = True,
) -> list[Trained]:
    """One result for each row and seed, seed by seed; those trained before with the same data and code are read.

    progress: a bar over the queries still to train on. Raises ValueError for no rows or seeds, or a seed below 0.
    """
    check_chosen(seeds, rows=rows)

    def queries(row: Row) -> int:
        return updates_of(row, setting) * row.batch_size

    def train(row: Row, seed: int, advance: Callable[[int], object]) -> Trained:
        return train_row(row, setting, seed=seed, on_update=lambda: advance(row.batch_size))

    return read_or_train(train, _paths(setting, rows, seeds), _read, queries=queries, progress=progress)


def saved_trainings(setting: TableSetting, rows: Sequence[Row], seeds: Sequence[int] = SEEDS) -> list[Trained]:
    """Those results that are kept on disk; nothing is trained."""
    read = [_read(path, row) for (row, _), path in _paths(setting, rows, seeds).items()]
    return [result for result in read if result is not None]


def train_row(row: Row, setting: TableSetting, *, seed: int, on_update: Callable[[], object] = lambda: None) -> Trained:
    """Train one encoder for both towers on the row's batches, and judge it."""
    encoder, tokenizer = fresh_encoder(setting, seed), pairs_and_tokenizer(setting)[2]
    encoder.train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=row.learning_rate, weight_decay=0.01, fused=True)
    chunk_size, steps = chunk_for(row, setting), updates_of(row, setting)
    step = _Step(encoder, optimizer, chunk_size)
    both, loss_fn = (encoder, encoder), ContrastiveLoss(row.temperature)
    same = {"batch_size": row.batch_size, "steps": steps, "seed": seed, **setting.lengths()}
    training = Training(both, tokenizer, loss_fn, step, optimizer, **same)
    factors = learning_rate_factors(steps, warmup_steps=round(setting.warmup_share * steps))
    started = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for factor, batch in zip(factors, batches_of(row, setting, seed), strict=True):
            optimizer.param_groups[0]["lr"] = factor * row.learning_rate
            step.mask = false_negative_mask(batch) if row.masked else None
            loss, _ = training.update(batch)
            on_update()
    seconds, pool = time.perf_counter() - started, pairs_and_tokenizer(setting)[1]
    metrics = retrieval_metrics(both, pool, tokenizer, ks=KS, **setting.lengths())
    measured = (step.tokens, chunk_size, step.peak_bytes, loss, seconds, torch.get_num_threads())
    return Trained(row, seed, metrics, len(pool), steps, *measured)


def budget_bytes(setting: TableSetting) -> int:
    """What the plain step of the small row takes at its peak, AdamW's states and full lengths included."""
    return _forecast_plain(SMALL, setting)


@functools.cache
def chunk_for(row: Row, setting: TableSetting) -> int | None:
    """The largest chunk with which the row's step keeps to the budget; None where its plain step does."""
    budget = budget_bytes(setting)
    if _forecast_plain(row, setting) <= budget:
        return None
    return largest_chunk(budget_bytes=budget, batch_size=row.batch_size, **_planned(row, setting))


class _Step:
    """A step with the mask of the batch at hand; its second call is recorded."""

    def __init__(self, encoder: Encoder, optimizer: Any, chunk_size: int | None):
        self.watched = {"optimizer": optimizer}
        self.encoder, self.mask, self.calls, self.tokens, self.peak_bytes = encoder, None, 0, 0, 0
        self.take = naive_step if chunk_size is None else functools.partial(grad_cache_step, chunk_size=chunk_size)

    def __call__(self, encoders: Sequence[Encoder], inputs: Any, loss_fn: Callable[..., Tensor]) -> Tensor:
        self.calls += 1
        self.tokens += sum(tower["input_ids"].numel() for tower in inputs)
        with record_memory(self.encoder, **self.watched) if self.calls == 2 else nullcontext() as ledger:
            loss = self.take(encoders, inputs, loss_fn, mask=self.mask)
        self.peak_bytes = ledger.peak_bytes if ledger else self.peak_bytes
        return loss


def _planned(row: Row, setting: TableSetting) -> dict[str, Any]:
    """The row as a forecast is asked for it."""
    config = fresh_encoder(setting, 0).model.config
    same = {"config": config, "pooling": "mean", "loss": ContrastiveLoss(row.temperature), "optimizer": "adamw"}
    return same | {"negatives": row.hard_negatives, **setting.lengths()}


@functools.cache
def _forecast_plain(row: Row, setting: TableSetting) -> int:
    return forecast_step("naive", batch_size=row.batch_size, **_planned(row, setting)).peak_bytes


def _paths(setting: TableSetting, rows: Sequence[Row], seeds: Iterable[int]) -> dict[tuple[Row, int], Path]:
    """Where the result of each row and seed is kept, seed by seed."""
    around = json.dumps([dataclasses.asdict(setting), dataclasses.asdict(SMALL), _surroundings()])
    return {(row, seed): cache_folder() / f"contents-{_key(row, seed, around)}.json" for seed in seeds for row in rows}


def _key(row: Row, seed: int, around: str) -> str:
    """16 hexadecimal digits of all that a result depends on."""
    return hashlib.sha256(json.dumps([dataclasses.asdict(row), seed, around]).encode()).hexdigest()[:16]


def _surroundings() -> dict[str, Any]:
    """The corpus, the versions and the code that a result depends on."""
    folders = ("support", "", "losses", "models", "data", "memory", "training")
    ours = ("course/experiments", "course/experiments/contents")
    return {
        "corpus": fingerprint(installed_sources()),
        "versions": [torch.__version__, transformers.__version__],
        "code": code_digest(*folders, *ours),
    }


def _read(path: Path, row: Row) -> Trained | None:
    """The saved result, or None where there is none that is whole."""
    try:
        _, body = read_checked(path)
    except (FileNotFoundError, DamagedFile):
        return None
    return Trained(**{**json.loads(body), "recipe": row, "saved": True})


def as_line(result: Trained) -> dict[str, str | int | None]:
    """One line of the results: a row and seed, what it took, and its metrics."""
    told = {name: getattr(result.recipe, name) for name in NAMING} | {n: getattr(result, n) for n in COUNTED}
    told |= {name: f"{result.metrics[name]:.4f}" for name in METRICS}
    return told | {"final_loss": f"{result.final_loss:.4f}", "seconds": f"{result.seconds:.0f}"}


def recorded_trainings(rows: Sequence[Row], path: Path = RESULTS) -> list[Trained]:
    """The full experiment's results of these rows, as they were written, seed by seed; none where there is no file."""
    if not path.is_file():
        return []
    by_name = {tuple(str(getattr(row, name)) for name in NAMING): row for row in rows}
    with path.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if tuple(line[name] for name in NAMING) in by_name]
    return [
        Trained(
            by_name[tuple(line[name] for name in NAMING)],
            metrics={name: float(line[name]) for name in METRICS},
            final_loss=float(line["final_loss"]),
            seconds=float(line["seconds"]),
            saved=True,
            **{name: int(line[name]) if line[name] else None for name in COUNTED},
        )
        for line in lines
    ]


def main(path: Path = RESULTS) -> None:
    """Train every row with every seed, those that are not saved yet, and write the lines."""
    lines = list(map(as_line, trainings(WHOLE, tuple(dict.fromkeys((*EQUAL_BYTES, *PLANTED, *SWEEP))))))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
