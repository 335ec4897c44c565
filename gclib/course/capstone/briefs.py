"""The capstone's briefs: a card, a model, a corpus and a deadline, and the plan that serves them best.

`draw_brief(seed)` puts a `Scenario` in words. A `TrainingPlan` says how to train in it: step, batch, tile, chunk, R,
sorted or not. Its bytes are `forecast_step`'s, its time is `forecast_flops` over the card's rate, and a little for each
pass over a chunk. `reference` is the best plan that fits, found by trying; so every brief that is drawn can be solved.

Most briefs say the batch. Every fourth seed's says instead what a batch must leave: enough updates of few examples, or
few right passages among a query's negatives. There the largest batch is the wrong one.

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

from gclib.losses.module import ContrastiveLoss
from gclib.memory.devices import GPU_MEMORY_BYTES
from gclib.memory.fake_steps import FakeStep, fake_step
from gclib.memory.flops import EncoderCost, encoder_cost, forecast_flops
from gclib.memory.forecast import MemoryForecast, forecast_workload
from gclib.memory.plan import last_true
from gclib.memory.workload import Workload
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
RIGHT_AMONG_NEGATIVES = 0.1  # that a brief with copies allows a query, on average

# Float32 FLOP a second that training in these briefs keeps up on a card: round figures to reckon with, not measured.
RATES = {
    "RTX 2080 Ti (11 GB)": 6e12,
    "T4 (16 GB)": 4e12,
    "RTX 4090 (24 GB)": 35e12,
    "A100 (40 GB)": 12e12,
    "A100 or H100 (80 GB)": 30e12,
    "H200 (141 GB)": 35e12,
}


@dataclass(frozen=True)
class TextLengths:
    """Texts by their lengths in tokens: what rows are cut at, the middle row, and the spread of the logarithm.

    spread 0: every row is as long as the limit.
    """

    words: str
    longest: tuple[int, int]
    median: tuple[int, int]
    spread: float


CORPORA = {
    "questions": TextLengths("questions and the paragraphs that answer them", (32, 128), (12, 70), 0.5),
    "functions": TextLengths("docstrings and the functions that they describe", (32, 256), (13, 80), 0.8),
    "documents": TextLengths("titles and long documents, all cut at the limit", (32, 256), (32, 256), 0.0),
}


@dataclass(frozen=True)
class Scenario:
    """A card, a model (a preset), the batch that is wanted with its K, and a corpus (a key of `CORPORA`).

    Where the brief does not say the batch, it is the largest that leaves what is asked for. updates: at least so many,
    of batch_size * updates examples. pairs, right: of the corpus, and of those for each query with a passage of their
    own, none of which the trainer can mask.
    """

    card: str
    model: str
    batch_size: int
    negatives: int
    corpus: str
    updates: int = 0
    pairs: int = 0
    right: int = 1

    @property
    def limited(self) -> bool:
        """Whether the batch is to be found."""
        return self.updates > 0 or self.right > 1

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
SCENARIOS = {  # kind: what stands in the way, and scenarios of that kind
    "activations": (
        Scenario(_2080, "minilm-l6", 1_024, 0, "questions"),
        Scenario(_2080, "minilm-l6", 2_048, 0, "questions"),
        Scenario(_T4, "distilbert-base", 1_024, 0, "questions"),
        Scenario(_4090, "bert-base-uncased", 2_048, 0, "questions"),
        Scenario(_A100, "bert-base-uncased", 4_096, 0, "questions"),
    ),
    "logits": (
        Scenario(_2080, "minilm-l6", 32_768, 0, "questions"),
        Scenario(_T4, "minilm-l6", 40_960, 0, "questions"),
        Scenario(_4090, "distilbert-base", 49_152, 0, "questions"),
    ),
    "time": (
        Scenario(_A100, "minilm-l6", 2_048, 0, "questions"),
        Scenario(_H100, "minilm-l6", 4_096, 0, "questions"),
        Scenario(_H200, "bert-base-uncased", 2_048, 0, "questions"),
    ),
    "long passages": (
        Scenario(_T4, "minilm-l6", 1_024, 1, "functions"),
        Scenario(_4090, "distilbert-base", 1_024, 1, "functions"),
        Scenario(_A100, "distilbert-base", 2_048, 1, "functions"),
    ),
    "room": (
        Scenario(_A100, "minilm-l6", 256, 0, "documents"),
        Scenario(_H100, "minilm-l6", 512, 0, "documents"),
        Scenario(_H100, "distilbert-base", 256, 0, "documents"),
    ),
    "few examples": (
        Scenario(_2080, "minilm-l6", 256, 0, "questions", updates=40_000),
        Scenario(_T4, "minilm-l6", 512, 0, "questions", updates=20_000),
        Scenario(_4090, "distilbert-base", 512, 0, "questions", updates=50_000),
    ),
    "right passages": (
        Scenario(_2080, "minilm-l6", 800, 0, "questions", pairs=24_000, right=4),
        Scenario(_A100, "minilm-l6", 400, 0, "documents", pairs=28_000, right=8),
        Scenario(_H100, "distilbert-base", 300, 0, "documents", pairs=9_000, right=4),
    ),
}


@dataclass(frozen=True)
class Brief:
    """What is asked for. examples: queries to train on, epochs counted. deadline_hours: of training time."""

    seed: int
    kind: str
    scenario: Scenario
    examples: int
    deadline_hours: float

    def __str__(self) -> str:
        scenario, corpus = self.scenario, CORPORA[self.scenario.corpus]
        count, rate = scenario.negatives, RATES[scenario.card] / 1e12
        hard = f" and K = {count} hard negative for each of them" if count else ", no hard negatives"
        rows = {
            "card": f"{scenario.card}: {format_bytes(scenario.budget_bytes)} of it can be used",
            "speed": f"{rate:g} TFLOP/s; a pass over a chunk takes {1000 * PASS_SECONDS:g} ms more",
            "model": f"{scenario.model} for both towers, float32, AdamW",
            "batch": f"B = {scenario.batch_size:,} queries an update{hard}: "
            f"{scenario.wanted_negatives:,} negatives a query",
            "corpus": corpus.words,
            "tokens": "queries {}, passages {}".format(*_tokens(scenario)),
            "training": f"{self.examples:,} examples, epochs counted, in at most {self.deadline_hours:g} hours",
        }
        if scenario.limited:
            rows["batch"] = f"yours to find: as many negatives a query as the demand leaves{hard}"
            rows["demand"] = _demand(scenario)
        return "\n".join([f"Brief {self.seed}", *(f"  {name:9} {words}" for name, words in rows.items())])


def _demand(scenario: Scenario) -> str:
    """What a batch must leave, in words."""
    if scenario.updates:
        return f"at least {scenario.updates:,} updates, for the weights have far to go"
    most = f"at most {RIGHT_AMONG_NEGATIVES:g} right passages among a query's negatives, on average"
    own = f"each query has {scenario.right} passages\n{'':12}of its own among {scenario.pairs:,} pairs"
    return f"{most}: {own}, drawn at random; no mask knows them"


def _tokens(scenario: Scenario) -> list[str]:
    """A tower's limit and mean length, in words."""
    lengths = lengths_of(scenario, scenario.batch_size)
    limits = CORPORA[scenario.corpus].longest
    return [f"at most {limit} (mean {sum(n) / len(n):.0f})" for limit, n in zip(limits, lengths, strict=True)]


@dataclass(frozen=True)
class TrainingPlan:
    """How to train in a scenario. chunk_size: None for the naive step. tile_size: None for the dense loss."""

    step: str
    batch_size: int
    tile_size: int | None = None
    chunk_size: int | None = None
    retain_chunks: int = 0
    sort_by_length: bool = True

    def chunking(self) -> dict[str, int]:
        """The keywords of the step that say how it is cut: none of the naive one."""
        of_step = {"naive": (), "accumulation": ("chunk_size",), "grad_cache": ("chunk_size", "retain_chunks")}
        return {name: getattr(self, name) for name in of_step[self.step]}

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
    kinds = [kind for kind, scenarios in SCENARIOS.items() if scenarios[0].limited == (seed % 4 == 3)]
    kind = draw.choice(kinds or list(SCENARIOS))
    scenario = draw.choice(SCENARIOS[kind])
    plan = reference(scenario)
    updates = draw.uniform(4, 40) * 3600 / seconds(scenario, plan)
    examples = math.ceil(updates * scenario.batch_size / 100_000) * 100_000
    if scenario.updates:
        examples = scenario.batch_size * scenario.updates
    needed = hours(Brief(seed, kind, scenario, examples, math.inf), plan)
    slack = 1.04 if kind == "time" else draw.uniform(1.5, 2.0)
    return Brief(seed, kind, scenario, examples, math.ceil(10 * slack * needed) / 10)


# --- what a plan takes ----------------------------------------------------------------------------------------


def forecast(scenario: Scenario, plan: TrainingPlan) -> MemoryForecast:
    """The bytes of the plan's step with a card's operations, every text padded to its limit."""
    query_length, passage_length = CORPORA[scenario.corpus].longest
    workload = Workload(
        step=plan.step,
        config=scenario.model,
        loss=_loss(plan.tile_size),
        batch_size=plan.batch_size,
        negatives=scenario.negatives,
        query_length=query_length,
        passage_length=passage_length,
        optimizer="adamw",
        device="cuda",
        **plan.chunking(),
    )
    return forecast_workload(workload, _fake(scenario.model, plan.tile_size))


@lru_cache(maxsize=64)
def _fake(model: str, tile_size: int | None) -> FakeStep:
    """The fake encoder and loss of all plans with this model and tile: finding them costs most of a forecast."""
    sizes = {"batch_size": 1, "query_length": 8, "passage_length": 8}
    return fake_step(Workload(step="naive", config=model, loss=_loss(tile_size), device="cuda", **sizes))


@lru_cache(maxsize=4096)
def peak_bytes(scenario: Scenario, plan: TrainingPlan) -> int:
    """The forecast's peak."""
    return forecast(scenario, plan).peak_bytes


def fits(scenario: Scenario, plan: TrainingPlan) -> bool:
    """Whether the plan's step stays within what the card leaves."""
    return peak_bytes(scenario, plan) <= scenario.budget_bytes


@lru_cache(maxsize=4096)
def seconds(scenario: Scenario, plan: TrainingPlan) -> float:
    """Seconds of one update: FLOPs / the card's rate + the passes over chunks."""
    costs, lengths = [_cost(scenario.model)] * 2, lengths_of(scenario, plan.batch_size)
    if plan.step == "grad_cache":
        chosen = {"chunk_size": plan.chunk_size, "retain_chunks": plan.retain_chunks}
        chosen |= {"sort_by_length": plan.sort_by_length, "device": "cuda"}
        counted = forecast_flops("grad_cache", costs, lengths, **chosen)
        loss = counted.loss
    else:
        counted = forecast_flops("naive", costs, lengths)
        loss = counted.loss * (plan.chunk_size or plan.batch_size) // plan.batch_size
    loss_flops = loss * (1 if plan.tile_size is None else TILED_FLOPS)
    return (counted.total - counted.loss + loss_flops) / RATES[scenario.card] + PASS_SECONDS * passes(scenario, plan)


def passes(scenario: Scenario, plan: TrainingPlan) -> int:
    """Forwards and backwards of chunks in one update: 2 a chunk, 3 where it is encoded twice."""
    if plan.step == "grad_cache":
        return 3 * chunks_of(scenario, plan) - plan.retain_chunks
    return 2 * 2 * (1 if plan.step == "naive" else -(-plan.batch_size // plan.chunk_size))


def chunks_of(scenario: Scenario, plan: TrainingPlan) -> int:
    """Chunks of both towers of a gradient-cache step."""
    rows = (plan.batch_size, plan.batch_size * (1 + scenario.negatives))
    return sum(-(-count // plan.chunk_size) for count in rows)


def hours(brief: Brief, plan: TrainingPlan) -> float:
    """Hours of the whole training: a last batch that is not full counts as one."""
    return updates(brief, plan) * seconds(brief.scenario, plan) / 3600


def updates(brief: Brief, plan: TrainingPlan) -> int:
    """Optimizer steps of the whole training."""
    return math.ceil(brief.examples / plan.batch_size)


def right_among_negatives(scenario: Scenario, plan: TrainingPlan) -> float:
    """Right passages beside a query's own, expected: (rows of a softmax - 1) (right - 1) / (pairs - 1).

    Each of the other rows is one of pairs - 1 others of the corpus with the same probability, and right - 1 of those
    are right.
    """
    return negatives(scenario, plan) * (scenario.right - 1) / max(1, scenario.pairs - 1)


def negatives(scenario: Scenario, plan: TrainingPlan) -> int:
    """Passages that a query is held against besides its own; with accumulation those of its chunk, if that is full."""
    queries = plan.chunk_size if plan.step == "accumulation" else plan.batch_size
    return queries * (1 + scenario.negatives) - 1


def worth(scenario: Scenario, plan: TrainingPlan | None) -> float:
    """Examples a second times the share of the wanted negatives; 0 for no plan and for one that does not fit.

    A batch larger than the wanted one is another recipe: its share is that of the smaller to the larger.
    """
    if plan is None or not fits(scenario, plan):
        return 0.0
    share = negatives(scenario, plan) / scenario.wanted_negatives
    return min(share, 1 / share) * plan.batch_size / seconds(scenario, plan) if share else 0.0


@lru_cache(maxsize=32)
def lengths_of(scenario: Scenario, batch_size: int) -> tuple[list[int], list[int]]:
    """Tokens of each query and passage of a batch: log-normal, cut at the corpus's limits, always the same."""
    corpus, towers = CORPORA[scenario.corpus], []
    for tower, rows in enumerate((batch_size, batch_size * (1 + scenario.negatives))):
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


def reference(scenario: Scenario) -> TrainingPlan:
    """The plan of the highest worth: the simplest of those within a hundredth of it. ValueError where none fits."""
    plan = best_with(scenario)
    if plan is None:
        raise refuse("scenario", "must have a plan that fits its card", str(scenario))
    return plan


def best_with(scenario: Scenario, **fixed: Any) -> TrainingPlan | None:
    """The best plan with these decisions taken (names and values of `TrainingPlan`); None where none fits."""
    return _best_with(scenario, tuple(sorted(fixed.items(), key=lambda pair: pair[0])))


@lru_cache(maxsize=1024)
def _best_with(scenario: Scenario, taken: tuple[tuple[str, Any], ...]) -> TrainingPlan | None:
    plans = [plan for plan in candidates(scenario, dict(taken)) if fits(scenario, plan)]
    highest = max((worth(scenario, plan) for plan in plans), default=0.0)
    good = [plan for plan in plans if worth(scenario, plan) >= 0.99 * highest]
    return min(good, key=_complexity, default=None)


def candidates(scenario: Scenario, fixed: dict[str, Any]) -> Iterator[TrainingPlan]:
    """The plans that are tried, with the decisions that are fixed."""
    for step in [fixed["step"]] if "step" in fixed else tuple(STEPS):
        size = fixed.get("batch_size", scenario.batch_size)
        tiles = [fixed["tile_size"]] if "tile_size" in fixed else [None] + [TILE] * (size > TILE)
        for tile in tiles:
            plan = TrainingPlan(step, size, tile, fixed.get("chunk_size"), fixed.get("retain_chunks", 0))
            plan = replace(plan, sort_by_length=fixed.get("sort_by_length", True))
            yield from _completed(scenario, plan, fixed)


def _completed(scenario: Scenario, plan: TrainingPlan, fixed: dict[str, Any]) -> Iterator[TrainingPlan]:
    """The plan with what is still open: a smaller batch for the naive step, the chunk, R."""
    if plan.step == "naive":
        largest = plan.batch_size
        if "batch_size" not in fixed and not fits(scenario, plan):
            largest = 8 * last_true(lambda n: fits(scenario, replace(plan, batch_size=8 * n)), plan.batch_size // 8)
        if largest:
            yield replace(plan, batch_size=largest)
        return
    sizes = [n for n in CHUNKS if n <= plan.batch_size] or [plan.batch_size]
    for size in [plan.chunk_size] if "chunk_size" in fixed else sizes:
        whole = replace(plan, chunk_size=size)
        if plan.step == "grad_cache" and "retain_chunks" not in fixed and fits(scenario, whole):
            yield replace(whole, retain_chunks=most_retained(scenario, whole))
        else:
            yield whole


def most_retained(scenario: Scenario, plan: TrainingPlan) -> int:
    """The largest R with which the plan fits."""
    return last_true(lambda n: fits(scenario, replace(plan, retain_chunks=n)), chunks_of(scenario, plan))


def _complexity(plan: TrainingPlan) -> tuple[Any, ...]:
    return (list(STEPS).index(plan.step), plan.tile_size is not None, plan.retain_chunks > 0, -(plan.chunk_size or 0))


# --- a plan that somebody typed -------------------------------------------------------------------------------


def read_plan(brief: Brief, given: object) -> TrainingPlan:
    """`given`, a TrainingPlan or a mapping of its fields, if it can be run at all; ValueError in words otherwise."""
    if not isinstance(brief, Brief):
        raise refuse("brief", "must be a brief, as draw_brief(seed) gives it", brief)
    if not isinstance(given, TrainingPlan):
        given = _from_mapping(given)
    scenario = brief.scenario
    one_of("step", given.step, tuple(STEPS))
    times = 16 if scenario.limited else 2
    most = times * scenario.batch_size
    if positive_int("batch_size", given.batch_size) > most:
        wanted = "the demand leaves where the whole batch is one loss" if scenario.limited else "the brief asks for"
        raise refuse("batch_size", f"must be at most {most:,}, {times} times what {wanted}", given.batch_size)
    if not isinstance(given.sort_by_length, bool):
        raise refuse("sort_by_length", "must be True or False", given.sort_by_length)
    _check_chunks(scenario, given)
    if given.tile_size is not None:
        side = positive_int("tile_size", given.tile_size)
        if (-(-given.batch_size // side)) ** 2 > MOST_TILES:
            raise refuse("tile_size", f"must cut the logits into at most {MOST_TILES:,} tiles", side)
    return given


def _from_mapping(given: object) -> TrainingPlan:
    fields = TrainingPlan.__dataclass_fields__
    if not isinstance(given, dict):
        raise refuse("plan", f"must be a TrainingPlan, or a dict with {', '.join(fields)}", given)
    if unknown := [name for name in given if name not in fields]:
        raise refuse("plan", f"must hold nothing but {', '.join(fields)}", unknown)
    if missing := [name for name in ("step", "batch_size") if name not in given]:
        raise refuse("plan", f"must say {' and '.join(missing)}", given)
    return TrainingPlan(**given)


def _check_chunks(scenario: Scenario, plan: TrainingPlan) -> None:
    retained = int_at_least("retain_chunks", plan.retain_chunks, 0)
    if plan.step == "naive" and plan.chunk_size is not None:
        raise refuse("chunk_size", "must be None for the naive step, which has no chunks", plan.chunk_size)
    if plan.step != "grad_cache" and retained:
        rule = "must be 0 unless the step is grad_cache: only there does a kept graph spare a chunk its second forward"
        raise refuse("retain_chunks", rule, retained)
    if plan.step == "naive":
        return
    if positive_int("chunk_size", plan.chunk_size) > plan.batch_size:
        rule = f"must be at most batch_size, {plan.batch_size:,}: a chunk is a part of the batch"
        raise refuse("chunk_size", rule, plan.chunk_size)
    if plan.step == "grad_cache" and retained > chunks_of(scenario, plan):
        raise refuse("retain_chunks", f"must be at most the {chunks_of(scenario, plan):,} chunks of the step", retained)
