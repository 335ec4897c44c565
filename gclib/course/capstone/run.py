"""A plan of the capstone, scaled down until it runs on this CPU: its bytes recorded, and some real updates.

The mini model and a small batch stand for the brief's; chunk, tile and R are scaled with the batch, so that the small
step is cut as the large one is. Hard negatives are left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gclib.course.capstone.briefs import Brief, TrainingPlan, chunks_of, read_plan
from gclib.course.memory_lab.answers import LabSettings, forecast_of
from gclib.course.memory_lab.run import LiveRun
from gclib.data.pairs import TextPair
from gclib.losses.module import ContrastiveLoss
from gclib.models.encoder import Encoder
from gclib.steps import STEPS
from gclib.support.validation import positive_int
from gclib.training.loop import TrainingRecord, train

BATCH = 64
QUERY_LENGTH, PASSAGE_LENGTH = 16, 48


@dataclass(frozen=True)
class ScaledRun:
    """What became of the small plan: bytes forecast and recorded in one padded step, and the updates' records."""

    plan: TrainingPlan
    forecast_bytes: int
    recorded_bytes: int
    records: tuple[TrainingRecord, ...]

    def __str__(self) -> str:
        agree = "equal" if self.forecast_bytes == self.recorded_bytes else "NOT equal"
        losses = ", ".join(f"{record.loss:.3f}" for record in self.records)
        return (
            f"Small plan: {self.plan}.\nForecast {self.forecast_bytes:,} bytes at the peak, recorded "
            f"{self.recorded_bytes:,}: {agree}.\nLoss of {len(self.records)} updates: {losses}."
        )


def scaled(brief: Brief, given: object, *, batch_size: int = BATCH) -> TrainingPlan:
    """The plan at `batch_size`: chunk and tile in proportion, the same share of chunks retained."""
    plan = read_plan(brief, given)
    small = positive_int("batch_size", batch_size)
    factor = small / plan.batch_size
    chunk = None if plan.chunk_size is None else min(small, max(2, round(plan.chunk_size * factor)))
    tile = None if plan.tile_size is None else min(small, max(-(-small // 8), round(plan.tile_size * factor)))
    retained = 0
    if plan.retain_chunks:
        share = plan.retain_chunks / chunks_of(brief.scenario, plan)
        retained = max(1, round(share * 2 * -(-small // chunk)))
    return TrainingPlan(plan.step, small, tile, chunk, retained, plan.sort_by_length)


def settings_of(plan: TrainingPlan) -> LabSettings:
    """A small plan as the memory lab's settings: the mini model, AdamW, padded texts."""
    return LabSettings(
        step=plan.step,
        batch_size=plan.batch_size,
        tile_size=plan.tile_size,
        length=PASSAGE_LENGTH,
        query_length=QUERY_LENGTH,
        **plan.chunking(),
    )


def step_of(plan: TrainingPlan) -> Callable[..., Tensor]:
    """The step that the plan names, with its chunk, R and order."""
    order = {"sort_by_length": plan.sort_by_length} if plan.step == "grad_cache" else {}
    return partial(STEPS[plan.step], **plan.chunking(), **order)


def run_scaled(
    brief: Brief, given: object, pairs: Sequence[TextPair], tokenizer: Any, *, updates: int = 4, seed: int = 0
) -> ScaledRun:
    """Record one step of the scaled plan, then train on pairs for some updates. ValueError for a plan that can't be."""
    plan = scaled(brief, given)
    settings = settings_of(plan)
    recorded = LiveRun(settings, "cpu").run()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = Encoder.from_config("mini", vocab_size=len(tokenizer))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    records = train(
        [encoder, encoder],
        pairs,
        tokenizer,
        ContrastiveLoss(0.05, tile_size=plan.tile_size),
        step=step_of(plan),
        batch_size=plan.batch_size,
        steps=updates,
        optimizer=optimizer,
        seed=seed,
        query_length=QUERY_LENGTH,
        passage_length=PASSAGE_LENGTH,
        progress=False,
    )
    return ScaledRun(plan, forecast_of(settings).peak_bytes, recorded.peak_bytes, tuple(records))
