"""Other ways to many negatives than one big batch: each at the same peak of bytes, and for the same FLOPs.

The budget of bytes is what a naive step of 16 pairs takes. Each way encodes as many rows at a time as fit into it, by
the ledger, rows as long as the setting lets them be. The budget of FLOPs is what that small batch needs to see the
setting's pairs `epochs` times; each way takes the updates that it can pay for, as `count_flops` counts one of its own.
Neither number depends on the machine. Seconds do; they are noted beside. Rates follow the root of the batch, for all.

    python -m gclib.course.experiments.other_ways

trains all of them at the full setting, with three seeds and a progress bar, and writes data/results/other_ways.csv,
which chapter 14 shows.

AdamW's two states are the same for all, and left out of the bytes; a momentum encoder's second set of weights is not.

Letters: B queries of an update, C rows of a chunk, K hard negatives of a query, M entries of a queue or bank.
"""

import argparse
import csv
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gclib.audit.gradients import gradients_by_part
from gclib.course.banks import MomentumEncoder, QueueLoss, TwoSidedBankLoss
from gclib.course.chapters import PROJECT as ROOT
from gclib.course.experiments.recipes import Recipe, TableSetting, scaled_rate
from gclib.course.experiments.results import SEEDS, Result, fresh_encoder, pairs_and_tokenizer, race
from gclib.course.experiments.summaries import METRICS
from gclib.data.negatives import mine_hard_negatives
from gclib.data.pairs import TextPair
from gclib.data.tokens import tokenize_pairs
from gclib.losses.module import ContrastiveLoss
from gclib.losses.sigmoid import SigmoidLoss
from gclib.memory.fake_modules import padded_tokens
from gclib.memory.flops import count_flops
from gclib.memory.ledger import record_memory
from gclib.support.modules import training_mode
from gclib.support.validation import positive_int, refuse

AGAINST = 64  # passages that a query is held against, by every way that reaches beyond the rows that fit
ROWS = 16  # pairs of the naive step that sets the budget of bytes
QUICK = TableSetting(train_pairs=1_536)
RESULTS = ROOT / "data" / "results" / "other_ways.csv"
COLUMNS = ("way", "seed", "rows", "batch_size", "updates", "peak_bytes", "flops", *METRICS, "seconds")
WHOLE = TableSetting(6_144, 2_000, vocab_size=6_000, query_length=24, passage_length=64)


@dataclass(frozen=True)
class Way(Recipe):
    """A recipe at its size for the budgets.

    update_count: optimizer steps; update_flops: of one of them, on average; peak_bytes: of one, by the ledger, the bank
    full. rows: encoded with a graph at a time. The class itself is InfoNCE, by the step that the recipe names.
    """

    update_count: int = 0
    update_flops: int = 0
    peak_bytes: int = 0

    hard_negatives = 0  # of each pair in `training_pairs`

    @property
    def rows(self) -> int:
        """C, or B where the batch is encoded at once."""
        return self.chunk_size or self.batch_size

    @property
    def bank_size(self) -> int:
        """M that makes up `AGAINST` passages together with the rows that are encoded now."""
        return max(0, AGAINST - self.rows)

    def updates(self, pairs: int, setting: TableSetting) -> int:
        """As many as its FLOPs pay for."""
        return positive_int("update_count", self.update_count)


@dataclass(frozen=True)
class QueueWay(Way):
    """MoCo: passages by a copy that follows the encoder, and the last M of them in a queue; gradient to queries."""

    @property
    def momentum(self) -> float:
        """The copy follows over a tenth of the training: 1 - 10 / updates, as 0.999 does over 10,000 updates."""
        return max(0.0, 1 - 10 / max(1, self.update_count))

    def towers(self, encoder: nn.Module) -> list[nn.Module]:
        """The encoder for queries, its copy for passages."""
        return [encoder, MomentumEncoder(encoder, self.momentum)]

    def loss_fn(self, setting: TableSetting) -> nn.Module:
        """InfoNCE against batch and queue."""
        return QueueLoss(self.bank_size, setting.temperature)

    def after_update(self, towers: Sequence[nn.Module]) -> None:
        """The copy takes its step after the encoder."""
        towers[1].follow()


@dataclass(frozen=True)
class BankWay(Way):
    """ContAccum: accumulation whose chunks meet the M pairs before them, queries and passages."""

    def loss_fn(self, setting: TableSetting) -> nn.Module:
        """The loss of chunk and bank."""
        return TwoSidedBankLoss(self.bank_size, ContrastiveLoss(setting.temperature))


@dataclass(frozen=True)
class SigmoidWay(Way):
    """SigLIP's loss, temperature and bias learned from where the paper starts them."""

    def loss_fn(self, setting: TableSetting) -> nn.Module:
        """Every pair by itself."""
        return SigmoidLoss()


@dataclass(frozen=True)
class MinedWay(Way):
    """One hard negative by BM25 for each query."""

    hard_negatives = 1

    def training_pairs(self, pairs: Sequence[TextPair]) -> Sequence[TextPair]:
        """The pairs with their negatives, mined once."""
        return _mined(tuple(pairs))


NAMES = ("small batch", "accumulation", "gradient cache", "queue", "two-sided bank", "sigmoid", "mined negatives")


def way_of(name: str, rows: int) -> Way:
    """One of `NAMES` with this many rows at a time, not sized yet. Raises ValueError for another name."""

    def of_batch(kind: type[Way], batch_size: int, step: str = "naive") -> Way:
        return kind(name, step, batch_size, None if step == "naive" else rows, scaled_rate(batch_size))

    positive_int("rows", rows)
    makers = (
        lambda: of_batch(Way, rows),
        lambda: of_batch(Way, AGAINST, "accumulation"),
        lambda: of_batch(Way, AGAINST, "grad_cache"),
        lambda: of_batch(QueueWay, rows),
        lambda: of_batch(BankWay, AGAINST, "accumulation"),
        lambda: of_batch(SigmoidWay, rows),
        lambda: of_batch(MinedWay, rows),
    )
    if name not in NAMES:
        raise refuse("name", f"must be one of {', '.join(NAMES)}", name)
    return makers[NAMES.index(name)]()


@functools.lru_cache(maxsize=4)
def sized_ways(setting: TableSetting = QUICK) -> tuple[Way, ...]:
    """Every way in the order of `NAMES`, as large as the budget of bytes lets it be, with the updates that it can pay.

    Trains nothing; takes some dozens of steps for the ledger and the counter. Raises ValueError where no row fits.
    """
    small = way_of(NAMES[0], ROWS)
    budget_bytes = peak_bytes(small, setting)
    pairs = len(pairs_and_tokenizer(setting)[0])
    budget_flops = setting.epochs * pairs // ROWS * update_flops(small, setting)
    return tuple(_sized(name, setting, budget_bytes, budget_flops) for name in NAMES)


def _sized(name: str, setting: TableSetting, budget_bytes: int, budget_flops: int) -> Way:
    """Bytes grow nearly in a line with the rows: one through two sizes says where to look for the largest that fits."""

    @functools.cache
    def peak(rows: int) -> int:
        return peak_bytes(way_of(name, rows), setting)

    slope = (peak(ROWS) - peak(ROWS // 2)) / (ROWS - ROWS // 2)
    rows = min(AGAINST, max(1, int(ROWS + (budget_bytes - peak(ROWS)) / slope)))
    while rows and peak(rows) > budget_bytes:
        rows -= 1
    if not rows:
        raise refuse("setting", f"must leave room for a row of {name} in {budget_bytes:,} bytes", setting)
    while rows < AGAINST and peak(rows + 1) <= budget_bytes:
        rows += 1
    way = way_of(name, rows)
    flops = update_flops(way, setting)
    return replace(way, update_count=budget_flops // flops, update_flops=flops, peak_bytes=peak(rows))


def peak_bytes(way: Way, setting: TableSetting) -> int:
    """The ledger's peak of one of its steps, the bank full, every row padded to the setting's lengths."""
    encoder = fresh_encoder(setting, 0)
    towers, loss_fn = way.towers(encoder), way.loss_fn(setting)
    group = 1 + way.hard_negatives
    inputs = [padded_tokens(way.batch_size, setting.query_length)]
    inputs.append(padded_tokens(group * way.batch_size, setting.passage_length))
    with torch.no_grad():
        loss_fn(*(torch.eye(rows, encoder.model.config.hidden_size) for rows in (AGAINST, group * AGAINST)))
    step = way.step_function()
    step(towers, inputs, loss_fn)  # the first one is verified, which takes bytes of its own
    encoder.zero_grad(set_to_none=True)
    loss_fn.zero_grad(set_to_none=True)
    with record_memory(*towers, loss_fn) as ledger:
        step(towers, inputs, loss_fn, on_phase=ledger.on_phase)
    return ledger.peak_bytes


def update_flops(way: Way, setting: TableSetting) -> int:
    """FLOPs of one update: the mean over the batches that the first 64 pairs make, at their real lengths."""
    pairs, _, tokenizer = pairs_and_tokenizer(setting)
    pairs = way.training_pairs(pairs)[: max(AGAINST, way.batch_size)]
    encoder = fresh_encoder(setting, 0)
    towers, loss_fn, step = way.towers(encoder), way.loss_fn(setting), way.step_function()
    batches = [pairs[at : at + way.batch_size] for at in range(0, len(pairs) - way.batch_size + 1, way.batch_size)]
    inputs = [tokenize_pairs(batch, tokenizer, **setting.lengths()) for batch in batches]
    step(towers, inputs[0], loss_fn)  # the first one is verified
    return sum(count_flops(functools.partial(step, towers, batch, loss_fn)) for batch in inputs) // len(inputs)


def gradient(
    way: Way, encoder: nn.Module, older: nn.Module, inputs: Sequence[Mapping[str, Tensor]], setting: TableSetting
) -> dict[str, Tensor]:
    """The way's gradient over a batch at fixed weights, by part: the mean over the updates that the batch makes.

    inputs: the tokens of queries (B, Tq) and passages (B (1 + K), Tp). What a queue or bank keeps was encoded by
    `older`, a copy of the encoder with the weights of some steps ago (or the encoder itself: nothing is stale); so are
    a queue's own passages, whose copy lags. Dropout is off. No weight changes; the encoder's gradients are cleared
    before and kept after.
    """
    towers, loss_fn, step = way.towers(encoder), way.loss_fn(setting), way.step_function()
    if isinstance(towers[1], MomentumEncoder):
        towers[1].copy.load_state_dict(older.state_dict())
    count = len(inputs[0]["input_ids"])
    groups = (1, len(inputs[1]["input_ids"]) // count)

    def cut(start: int, stop: int) -> list[dict[str, Tensor]]:
        pairs = zip(inputs, groups, strict=True)
        return [{name: part[start * n : stop * n] for name, part in tower.items()} for tower, n in pairs]

    starts = range(0, count, way.batch_size)
    with training_mode([*towers, older], False):
        with torch.no_grad():
            for start in range(0, count, way.rows):  # so that a chunk meets the others, and not itself
                loss_fn(*(older(**tower) for tower in cut(start, min(start + way.rows, count))))
        encoder.zero_grad(set_to_none=True)
        for start in starts:
            step(towers, cut(start, min(start + way.batch_size, count)), loss_fn)
    return {name: part / len(starts) for name, part in gradients_by_part(encoder).items()}


def as_line(result: Result) -> dict[str, str | int]:
    """One line of the results: a way and seed, its size, what it cost, and its metrics."""
    way = result.recipe
    sizes = (way.name, result.seed, way.rows, way.batch_size, way.update_count, way.peak_bytes)
    metrics = (f"{result.metrics[name]:.4f}" for name in METRICS)
    line = (*sizes, way.update_count * way.update_flops, *metrics, f"{result.seconds:.0f}")
    return dict(zip(COLUMNS, line, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every way with every seed, those that are not saved yet, and write the lines."""
    parser = argparse.ArgumentParser(prog="python -m gclib.course.experiments.other_ways", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the setting that chapter 14 trains at")
    parser.add_argument("--output", type=Path, default=RESULTS)
    typed = parser.parse_args(arguments)
    setting = QUICK if typed.quick else WHOLE
    results = race(setting, recipes=sized_ways(setting), seeds=SEEDS)
    typed.output.parent.mkdir(parents=True, exist_ok=True)
    with typed.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(as_line, results))


@functools.lru_cache(maxsize=2)
def _mined(pairs: tuple[TextPair, ...]) -> list[TextPair]:
    """Mining takes seconds, and every seed wants the same negatives."""
    return mine_hard_negatives(pairs, per_query=MinedWay.hard_negatives, seed=0)


if __name__ == "__main__":
    main()
