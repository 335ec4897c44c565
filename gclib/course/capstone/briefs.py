"""The capstone's briefs: a card, a model, a corpus and a deadline, and the plan that serves them best.

`draw_brief(seed)` states a job in words. A `Plan` says how to do it: step, batch, tile, chunk, R, sorted or not. Its
bytes are `forecast_step`'s, its time is `forecast_flops` over the card's rate, and a little for every pass over a
chunk. `reference` is the best plan among those that fit, found by trying; so every brief that is drawn can be solved.

Letters: B queries, K hard negatives, N = B * (1 + K) passages, C rows of a chunk, R retained chunks.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch

from gclib.losses.dense import ContrastiveLoss
from gclib.memory.devices import GPU_MEMORY_BYTES
from gclib.memory.flops import EncoderCost, encoder_cost, forecast_flops
from gclib.memory.forecast import MemoryForecast, forecast_step
from gclib.memory.plan import last_true
from gclib.models.encoder import Encoder
from gclib.steps import STEPS
from gclib.support.validation import int_at_least, one_of, positive_int, refuse
from gclib.support.words import format_bytes

CHUNKS = tuple(2**power for power in range(2, 11))  # what the reference tries
TILE = 4_096  # its tile: 64 MiB of float32 logits
MOST_TILES = 1_024  # of one loss: a forecast runs each of them once, with fake tensors
USABLE = 0.95  # of what a card leaves beside its context: an allocator's gaps take some
PASS_SECONDS = 0.002  # what a chunk costs in each pass besides its arithmetic, in these briefs
TILED_FLOPS = 8 / 6  # of the tiled loss over the dense one's: it computes the logits twice

# Float32 FLOP a second that a job of these briefs keeps up on a card: round figures to reckon with, not measurements.
RATES = {
    "RTX 2080 Ti (11 GB)": 6e12,
    "T4 (16 GB)": 4e12,
    "RTX 4090 (24 GB)": 35e12,
    "A100 (40 GB)": 12e12,
    "A100 or H100 (80 GB)": 30e12,
    "H200 (141 GB)": 35e12,
}


@dataclass(frozen=True)
class Corpus:
    """Texts by their lengths in tokens: what rows are cut at, the middle row, and the spread of the logarithm.

    spread 0: every row is as long as the limit.
    """

    words: str
    longest: tuple[int, int]
    median: tuple[int, int]
    spread: float


CORPORA = {
    "questions": Corpus("questions and the paragraphs that answer them", (32, 128), (12, 70), 0.5),
    "functions": Corpus("docstrings and the functions that they describe", (32, 256), (13, 80), 0.8),
    "documents": Corpus("titles and long documents, all cut at the limit", (32, 256), (32, 256), 0.0),
}


@dataclass(frozen=True)
class Job:
    """A card, a model (a preset), the batch that is wanted with its K, and a corpus (a key of `CORPORA`)."""

    card: str
    model: str
    batch_size: int
    negatives: int
    corpus: str

    @property
    def budget_bytes(self) -> int:
        """What a step may take on the card."""
        return int(USABLE * GPU_MEMORY_BYTES[self.card])

    @property
    def wanted_negatives(self) -> int:
        """Passages that each query is held against besides its own: B * (1 + K) - 1."""
        return self.batch_size * (1 + self.negatives) - 1


_CARDS = list(GPU_MEMORY_BYTES)
_2080, _T4, _4090, _A100, _H100, _H200 = _CARDS
JOBS = {  # kind: what stands in the way, and jobs of that kind
    "activations": (
        Job(_2080, "minilm-l6", 1_024, 0, "questions"),
        Job(_2080, "minilm-l6", 2_048, 0, "questions"),
        Job(_T4, "distilbert-base", 1_024, 0, "questions"),
        Job(_4090, "bert-base-uncased", 2_048, 0, "questions"),
        Job(_A100, "bert-base-uncased", 4_096, 0, "questions"),
    ),
    "logits": (
        Job(_2080, "minilm-l6", 32_768, 0, "questions"),
        Job(_T4, "minilm-l6", 40_960, 0, "questions"),
        Job(_4090, "distilbert-base", 49_152, 0, "questions"),
    ),
    "time": (
        Job(_A100, "minilm-l6", 2_048, 0, "questions"),
        Job(_H100, "minilm-l6", 4_096, 0, "questions"),
        Job(_H200, "bert-base-uncased", 2_048, 0, "questions"),
    ),
    "long passages": (
        Job(_T4, "minilm-l6", 1_024, 1, "functions"),
        Job(_4090, "distilbert-base", 1_024, 1, "functions"),
        Job(_A100, "distilbert-base", 2_048, 1, "functions"),
    ),
    "room": (
        Job(_A100, "minilm-l6", 256, 0, "documents"),
        Job(_H100, "minilm-l6", 512, 0, "documents"),
        Job(_H100, "distilbert-base", 256, 0, "documents"),
    ),
}


@dataclass(frozen=True)
class Brief:
    """What is asked for. examples: queries to train on, epochs counted. deadline_hours: of training time."""

    seed: int
    kind: str
    job: Job
    examples: int
    deadline_hours: float

    def __str__(self) -> str:
        job, corpus = self.job, CORPORA[self.job.corpus]
        hard = f" and K = {job.negatives} hard negative for each of them" if job.negatives else ", no hard negatives"
        rows = {
            "card": f"{job.card}: {format_bytes(job.budget_bytes)} of it can be used",
            "speed": f"{RATES[job.card] / 1e12:g} TFLOP/s; a pass over a chunk takes {1000 * PASS_SECONDS:g} ms more",
            "model": f"{job.model} for both towers, float32, AdamW",
            "batch": f"B = {job.batch_size:,} queries an update{hard}: {job.wanted_negatives:,} negatives a query",
            "corpus": corpus.words,
            "tokens": "queries {}, passages {}".format(*_tokens(job)),
            "training": f"{self.examples:,} examples, epochs counted, in at most {self.deadline_hours:g} hours",
        }
        return "\n".join([f"Brief {self.seed}", *(f"  {name:9} {words}" for name, words in rows.items())])


def _tokens(job: Job) -> list[str]:
    """A tower's limit and mean length, in words."""
    lengths = lengths_of(job, job.batch_size)
    limits = CORPORA[job.corpus].longest
    return [f"at most {limit} (mean {sum(n) / len(n):.0f})" for limit, n in zip(limits, lengths, strict=True)]


@dataclass(frozen=True)
class Plan:
    """How to do a job. chunk_size: None for the naive step. tile_size: None for the dense loss."""

    step: str
    batch_size: int
    tile_size: int | None = None
    chunk_size: int | None = None
    retain_chunks: int = 0
    sort_by_length: bool = True

    def __str__(self) -> str:
        parts = [f"{self.step}, B = {self.batch_size:,}"]
        if self.chunk_size is not None:
            parts.append(f"C = {self.chunk_size:,}")
        if self.step == "grad_cache":
            parts += [f"R = {self.retain_chunks:,}", "sorted" if self.sort_by_length else "not sorted"]
        parts.append("dense logits" if self.tile_size is None else f"tiles of {self.tile_size:,}")
        return ", ".join(parts)


def draw_brief(seed: int) -> Brief:
    """The brief of `seed`: the same seed, the same brief. The deadline is one that `reference` keeps.

    Raises ValueError for anything but an int of at least 0.
    """
    draw = random.Random(f"capstone {int_at_least('seed', seed, 0)}")
    kind = draw.choice(list(JOBS))
    job = draw.choice(JOBS[kind])
    plan = reference(job)
    updates = draw.uniform(4, 40) * 3600 / seconds(job, plan)
    examples = math.ceil(updates * job.batch_size / 100_000) * 100_000
    needed = hours(Brief(seed, kind, job, examples, math.inf), plan)
    slack = 1.04 if kind == "time" else draw.uniform(1.5, 2.0)
    return Brief(seed, kind, job, examples, math.ceil(10 * slack * needed) / 10)


# --- what a plan takes ----------------------------------------------------------------------------------------


def forecast(job: Job, plan: Plan) -> MemoryForecast:
    """The bytes of the plan's step with a card's operations, every text padded to its limit."""
    query_length, passage_length = CORPORA[job.corpus].longest
    given: dict[str, Any] = {} if plan.step == "naive" else {"chunk_size": plan.chunk_size}
    if plan.step == "grad_cache":
        given["retain_chunks"] = plan.retain_chunks
    return forecast_step(
        plan.step,
        config=job.model,
        loss=_loss(plan.tile_size),
        batch_size=plan.batch_size,
        negatives=job.negatives,
        query_length=query_length,
        passage_length=passage_length,
        optimizer="adamw",
        device="cuda",
        **given,
    )


@lru_cache(maxsize=4096)
def peak_bytes(job: Job, plan: Plan) -> int:
    """The forecast's peak."""
    return forecast(job, plan).peak_bytes


def fits(job: Job, plan: Plan) -> bool:
    """Whether the plan's step stays within what the card leaves."""
    return peak_bytes(job, plan) <= job.budget_bytes


@lru_cache(maxsize=4096)
def seconds(job: Job, plan: Plan) -> float:
    """Seconds of one update: FLOPs / the card's rate + the passes over chunks."""
    costs, lengths = [_cost(job.model)] * 2, lengths_of(job, plan.batch_size)
    if plan.step == "grad_cache":
        chosen = {"chunk_size": plan.chunk_size, "retain_chunks": plan.retain_chunks}
        chosen |= {"sort_by_length": plan.sort_by_length, "device": "cuda"}
        counted = forecast_flops("grad_cache", costs, lengths, **chosen)
        loss = counted.loss
    else:
        counted = forecast_flops("naive", costs, lengths)
        loss = counted.loss * (plan.chunk_size or plan.batch_size) // plan.batch_size
    loss_flops = loss * (1 if plan.tile_size is None else TILED_FLOPS)
    return (counted.total - counted.loss + loss_flops) / RATES[job.card] + PASS_SECONDS * passes(job, plan)


def passes(job: Job, plan: Plan) -> int:
    """Forwards and backwards of chunks in one update: 2 a chunk, 3 where it is encoded twice."""
    if plan.step == "grad_cache":
        return 3 * chunks_of(job, plan) - plan.retain_chunks
    return 2 * 2 * (1 if plan.step == "naive" else -(-plan.batch_size // plan.chunk_size))


def chunks_of(job: Job, plan: Plan) -> int:
    """Chunks of both towers of a gradient-cache step."""
    rows = (plan.batch_size, plan.batch_size * (1 + job.negatives))
    return sum(-(-count // plan.chunk_size) for count in rows)


def hours(brief: Brief, plan: Plan) -> float:
    """Hours of the whole training: a last batch that is not full counts as one."""
    return math.ceil(brief.examples / plan.batch_size) * seconds(brief.job, plan) / 3600


def negatives(job: Job, plan: Plan) -> int:
    """Passages that each query is held against besides its own; accumulation sees its chunk alone."""
    queries = plan.chunk_size if plan.step == "accumulation" else plan.batch_size
    return queries * (1 + job.negatives) - 1


def worth(job: Job, plan: Plan | None) -> float:
    """Examples a second times the share of the wanted negatives; 0 for no plan and for one that does not fit.

    A batch larger than the wanted one is another recipe: its share is that of the smaller to the larger.
    """
    if plan is None or not fits(job, plan):
        return 0.0
    share = negatives(job, plan) / job.wanted_negatives
    return min(share, 1 / share) * plan.batch_size / seconds(job, plan) if share else 0.0


@lru_cache(maxsize=32)
def lengths_of(job: Job, batch_size: int) -> tuple[list[int], list[int]]:
    """Tokens of each query and passage of a batch: log-normal, cut at the corpus's limits, always the same."""
    corpus, towers = CORPORA[job.corpus], []
    for tower, rows in enumerate((batch_size, batch_size * (1 + job.negatives))):
        drawn = np.random.default_rng(tower).lognormal(math.log(corpus.median[tower]), corpus.spread, rows)
        cut = np.clip(drawn.round(), 2, corpus.longest[tower]).astype(int).tolist()
        towers.append([corpus.longest[tower], *cut[1:]])
    return towers[0], towers[1]


@cache
def _cost(model: str) -> EncoderCost:
    with torch.device("meta"):
        encoder = Encoder.from_config(model).train()
    return encoder_cost(encoder)


@lru_cache(maxsize=64)
def _loss(tile_size: int | None) -> ContrastiveLoss:
    return ContrastiveLoss(0.05, tile_size=tile_size)


# --- the best plan --------------------------------------------------------------------------------------------


def reference(job: Job) -> Plan:
    """The plan of the highest worth: the simplest of those within a hundredth of it. ValueError where none fits."""
    plan = best_with(job)
    if plan is None:
        raise refuse("job", "must have a plan that fits its card", str(job))
    return plan


def best_with(job: Job, **fixed: Any) -> Plan | None:
    """The best plan with these decisions taken (names and values of `Plan`); None where none fits."""
    return _best_with(job, tuple(sorted(fixed.items(), key=lambda pair: pair[0])))


@lru_cache(maxsize=1024)
def _best_with(job: Job, taken: tuple[tuple[str, Any], ...]) -> Plan | None:
    plans = [plan for plan in candidates(job, dict(taken)) if fits(job, plan)]
    highest = max((worth(job, plan) for plan in plans), default=0.0)
    good = [plan for plan in plans if worth(job, plan) >= 0.99 * highest]
    return min(good, key=_complexity, default=None)


def candidates(job: Job, fixed: dict[str, Any]) -> Iterator[Plan]:
    """The plans that are tried, with the decisions that are fixed."""
    for step in [fixed["step"]] if "step" in fixed else tuple(STEPS):
        size = fixed.get("batch_size", job.batch_size)
        tiles = [fixed["tile_size"]] if "tile_size" in fixed else [None] + [TILE] * (size > TILE)
        for tile in tiles:
            plan = Plan(step, size, tile, fixed.get("chunk_size"), fixed.get("retain_chunks", 0))
            plan = replace(plan, sort_by_length=fixed.get("sort_by_length", True))
            yield from _completed(job, plan, fixed)


def _completed(job: Job, plan: Plan, fixed: dict[str, Any]) -> Iterator[Plan]:
    """The plan with what is still open: a smaller batch for the naive step, the chunk, R."""
    if plan.step == "naive":
        largest = plan.batch_size
        if "batch_size" not in fixed and not fits(job, plan):
            largest = 8 * last_true(lambda n: fits(job, replace(plan, batch_size=8 * n)), plan.batch_size // 8)
        if largest:
            yield replace(plan, batch_size=largest)
        return
    sizes = [n for n in CHUNKS if n <= plan.batch_size] or [plan.batch_size]
    for size in [plan.chunk_size] if "chunk_size" in fixed else sizes:
        whole = replace(plan, chunk_size=size)
        if plan.step == "grad_cache" and "retain_chunks" not in fixed and fits(job, whole):
            yield replace(whole, retain_chunks=most_retained(job, whole))
        else:
            yield whole


def most_retained(job: Job, plan: Plan) -> int:
    """The largest R with which the plan fits."""
    return last_true(lambda n: fits(job, replace(plan, retain_chunks=n)), chunks_of(job, plan))


def _complexity(plan: Plan) -> tuple[Any, ...]:
    return (list(STEPS).index(plan.step), plan.tile_size is not None, plan.retain_chunks > 0, -(plan.chunk_size or 0))


# --- a plan that somebody typed -------------------------------------------------------------------------------


def read_plan(brief: Brief, given: object) -> Plan:
    """`given`, a Plan or a mapping of its fields, if it can be run at all; ValueError in words otherwise."""
    if not isinstance(brief, Brief):
        raise refuse("brief", "must be a brief, as draw_brief(seed) gives it", brief)
    if not isinstance(given, Plan):
        given = _from_mapping(given)
    job = brief.job
    one_of("step", given.step, tuple(STEPS))
    most = 2 * job.batch_size
    if positive_int("batch_size", given.batch_size) > most:
        raise refuse("batch_size", f"must be at most {most:,}, twice what the brief asks for", given.batch_size)
    if not isinstance(given.sort_by_length, bool):
        raise refuse("sort_by_length", "must be True or False", given.sort_by_length)
    _check_chunks(job, given)
    if given.tile_size is not None:
        side = positive_int("tile_size", given.tile_size)
        if (-(-given.batch_size // side)) ** 2 > MOST_TILES:
            raise refuse("tile_size", f"must cut the logits into at most {MOST_TILES:,} tiles", side)
    return given


def _from_mapping(given: object) -> Plan:
    fields = Plan.__dataclass_fields__
    if not isinstance(given, dict):
        raise refuse("plan", f"must be a Plan, or a dict with {', '.join(fields)}", given)
    if unknown := [name for name in given if name not in fields]:
        raise refuse("plan", f"must hold nothing but {', '.join(fields)}", unknown)
    if missing := [name for name in ("step", "batch_size") if name not in given]:
        raise refuse("plan", f"must say {' and '.join(missing)}", given)
    return Plan(**given)


def _check_chunks(job: Job, plan: Plan) -> None:
    retained = int_at_least("retain_chunks", plan.retain_chunks, 0)
    if plan.step == "naive" and plan.chunk_size is not None:
        raise refuse("chunk_size", "must be None for the naive step, which has no chunks", plan.chunk_size)
    if plan.step != "grad_cache" and retained:
        raise refuse("retain_chunks", "must be 0 unless the step is grad_cache: only there is a graph kept", retained)
    if plan.step == "naive":
        return
    if positive_int("chunk_size", plan.chunk_size) > plan.batch_size:
        rule = f"must be at most batch_size, {plan.batch_size:,}: a chunk is a part of the batch"
        raise refuse("chunk_size", rule, plan.chunk_size)
    if plan.step == "grad_cache" and retained > chunks_of(job, plan):
        raise refuse("retain_chunks", f"must be at most the {chunks_of(job, plan):,} chunks of the step", retained)
