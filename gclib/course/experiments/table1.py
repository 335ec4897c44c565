"""Does a bigger batch help? The published table's rows on mined pairs, with several seeds, in minutes.

Gao et al. 2021, table 1 (Natural Questions; top-20: sequential 71.9, accumulated 77.2, gradient cache 79.3 with B = 128
and 79.9 with B = 512), repeated with a small BERT from scratch: every row sees as many examples, in as many epochs,
from the same first weights. Learning rates grow with the square root of the batch, so that no row is tuned by hand.

Letters: B queries of an update, C rows of a chunk.
"""

import dataclasses
import functools
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tqdm import tqdm

from gclib.data.corpus import fingerprint, installed_sources
from gclib.data.pairs import TextPair, load_pairs
from gclib.data.tokens import train_tokenizer
from gclib.losses.module import ContrastiveLoss
from gclib.models.encoder import Encoder, bert_config
from gclib.steps import STEPS, naive_step
from gclib.support.files import DamagedFile, cache_folder, code_digest, read_checked, write_checked
from gclib.support.validation import int_at_least, one_of, positive_int, positive_number, refuse
from gclib.training.loop import TrainingRecord, train
from gclib.training.retrieval import retrieval_metrics

KS = (1, 5, 20, 100)
METRICS = (*(f"top-{k}" for k in KS), "mrr")
LARGEST = 512  # every batch size divides it, and every row sees a multiple of it
POINTS = 40  # of a learning curve that is kept
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """Everything but the row: the data, the model, the length of training.

    train_pairs, test_pairs: None for all that there are; layers: None for as many as `size` has.
    """

    train_pairs: int | None = 2_048
    test_pairs: int | None = 500
    epochs: int = 1
    size: str = "mini"
    layers: int | None = 1
    vocab_size: int = 2_000
    query_length: int = 16
    passage_length: int = 32
    temperature: float = 0.05
    warmup_share: float = 0.1

    def lengths(self) -> dict[str, int]:
        """Both towers' lengths, as `train` and `retrieval_metrics` take them."""
        return {"query_length": self.query_length, "passage_length": self.passage_length}


@dataclass(frozen=True)
class Recipe:
    """One row: how many queries an update sees, how the gradient is made, and the schedule's highest learning rate."""

    name: str
    step: str
    batch_size: int
    chunk_size: int | None
    learning_rate: float

    @property
    def chance_loss(self) -> float:
        """The loss of an encoder that knows nothing, in nats: the log of the passages in one softmax.

        Accumulation's softmax holds a chunk's passages, not the batch's: chance is log C there, log B elsewhere.
        """
        return math.log(self.chunk_size if self.step == "accumulation" else self.batch_size)

    def step_function(self) -> Callable[..., torch.Tensor]:
        """The step with its chunk size settled, as `train` takes it."""
        if self.step == "naive":
            return naive_step
        return functools.partial(STEPS[self.step], chunk_size=self.chunk_size)


def scaled_rate(batch_size: int, *, at_128: float = 2e-3) -> float:
    """The learning rate that grows with the square root of the batch: at_128 * sqrt(B / 128)."""
    return positive_number("at_128", at_128) * math.sqrt(positive_int("batch_size", batch_size) / 128)


def batch_recipe(batch_size: int, *, learning_rate: float | None = None) -> Recipe:
    """The whole batch in one softmax: the naive step up to 32 queries, above it the gradient cache in chunks of 32.

    learning_rate: by default the scaled one. Raises ValueError for a batch that does not divide 512.
    """
    if LARGEST % positive_int("batch_size", batch_size):
        raise refuse("batch_size", f"must divide {LARGEST}", batch_size)
    rate = scaled_rate(batch_size) if learning_rate is None else positive_number("learning_rate", learning_rate)
    cached = batch_size > 32
    name = {8: "sequential, B=8"}.get(batch_size, f"{'gradient cache' if cached else 'one batch'}, B={batch_size}")
    name = name if learning_rate is None else f"{name}, rate {learning_rate:g}"
    return Recipe(name, "grad_cache" if cached else "naive", batch_size, 32 if cached else None, rate)


QUICK = Setting()
WHOLE = Setting(8_192, 2_000, epochs=2, vocab_size=6_000, query_length=24, passage_length=64)
RECIPES = (
    batch_recipe(8),
    Recipe("accumulation, 16 x 8", "accumulation", 128, 8, scaled_rate(128)),
    batch_recipe(128),
    batch_recipe(512),
)
BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512)
# Two rates at two batch sizes: each its own, and the other's.
RATES = (
    batch_recipe(32),
    batch_recipe(32, learning_rate=scaled_rate(512)),
    batch_recipe(512, learning_rate=scaled_rate(32)),
    batch_recipe(512),
)


class Point(NamedTuple):
    """A stretch of training: queries seen at its end; the mean loss (nats) and gradient norm of its steps."""

    examples: int
    loss: float
    gradient_norm: float


@dataclass(frozen=True)
class Result:
    """A row that was trained and judged: `pool` queries, each among as many passages.

    metrics: shares from 0 to 1; seconds: of training, with `threads` threads; final_loss: the last step's, in nats;
    curve: the whole training in at most 40 points.
    """

    recipe: Recipe
    seed: int
    metrics: dict[str, float]
    pool: int
    seconds: float
    examples: int
    final_loss: float
    threads: int
    curve: tuple[Point, ...] = ()
    saved: bool = False


@dataclass(frozen=True)
class Summary:
    """A recipe over its seeds: each metric's mean, and its spread (standard deviation with n - 1; NaN for one seed)."""

    recipe: Recipe
    seeds: tuple[int, ...]
    mean: dict[str, float]
    spread: dict[str, float]


def table1(
    setting: Setting = QUICK,
    *,
    recipes: Sequence[Recipe] = RECIPES,
    seed: int = 0,
    fresh: bool = False,
    progress: bool = True,
) -> list[Result]:
    """One result a recipe. Those already trained with the same data, settings and code are read from the cache.

    fresh: train all of them again. Raises ValueError where a setting can't be.
    """
    return race(setting, recipes=recipes, seeds=(seed,), fresh=fresh, progress=progress)


def race(
    setting: Setting = QUICK,
    *,
    recipes: Sequence[Recipe] = RECIPES,
    seeds: Sequence[int] = SEEDS,
    fresh: bool = False,
    progress: bool = True,
) -> list[Result]:
    """One result for each recipe and seed, seed by seed; saved ones are read, as in `table1`.

    progress: one bar over all queries that are still to be trained on.
    """
    for seed in seeds:
        int_at_least("seed", seed, 0)
    for name, chosen in (("recipes", recipes), ("seeds", seeds)):
        if not chosen:
            raise refuse(name, "must be at least one", "none")
    rows = [(recipe, seed) for seed in seeds for recipe in recipes]
    paths = _paths(setting, rows)
    found = {row: None if fresh else _read(paths[row]) for row in rows}
    missing = [row for row in rows if found[row] is None]
    with _bar(setting, len(missing), progress) as bar:
        for recipe, seed in missing:
            bar.set_description(f"{recipe.name}, seed {seed}")
            result = run(recipe, setting, seed=seed, on_record=lambda _, rows=recipe.batch_size: bar.update(rows))
            body = json.dumps(dataclasses.asdict(result)).encode()
            write_checked(paths[recipe, seed], {"row": recipe.name}, body)
            found[recipe, seed] = result
    return [found[row] for row in rows]


def saved_results(
    setting: Setting, *, recipes: Sequence[Recipe] = RECIPES, seeds: Sequence[int] = SEEDS
) -> list[Result]:
    """Those results of a race that are in the cache; nothing is trained."""
    found = map(_read, _paths(setting, [(recipe, seed) for seed in seeds for recipe in recipes]).values())
    return [result for result in found if result is not None]


def run(
    recipe: Recipe, setting: Setting, *, seed: int, on_record: Callable[[TrainingRecord], object] | None = None
) -> Result:
    """Train one encoder for both towers by the recipe, and judge it on the test split."""
    pairs, held_out, tokenizer = texts_of(setting)
    encoder = fresh_encoder(setting, seed)
    records = train_encoder(encoder, recipe, setting, seed=seed, on_record=on_record)
    metrics = retrieval_metrics((encoder, encoder), held_out, tokenizer, ks=KS, **setting.lengths())
    last, threads = records[-1], torch.get_num_threads()
    counts = (len(held_out), last.seconds, last.examples, last.loss, threads)
    return Result(recipe, seed, metrics, *counts, thin(records))


def train_encoder(
    encoder: Encoder,
    recipe: Recipe,
    setting: Setting,
    *,
    seed: int,
    on_record: Callable[[TrainingRecord], object] | None = None,
) -> list[TrainingRecord]:
    """Train the encoder, for both towers, by the recipe; the records of its steps."""
    pairs, _, tokenizer = texts_of(setting)
    steps = steps_for(len(pairs), setting.epochs, recipe.batch_size)
    rate = recipe.learning_rate
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=rate, weight_decay=0.01, fused=True)
    return train(
        (encoder, encoder),
        pairs,
        tokenizer,
        ContrastiveLoss(setting.temperature),
        step=recipe.step_function(),
        batch_size=recipe.batch_size,
        steps=steps,
        optimizer=optimizer,
        seed=seed,
        on_record=on_record,
        warmup_steps=round(setting.warmup_share * steps),
        progress=False,
        **setting.lengths(),
    )


def texts_of(setting: Setting) -> tuple[list[TextPair], list[TextPair], Any]:
    """Training pairs, test pairs, and a tokenizer trained on the former; read once for all rows of a setting."""
    return _texts(setting.train_pairs, setting.test_pairs, setting.vocab_size, *setting.lengths().values())


def fresh_encoder(setting: Setting, seed: int) -> Encoder:
    """The same first weights for every row of a seed; the caller's generators are left as they were."""
    config = bert_config(setting.size, setting.vocab_size)
    if setting.layers is not None:
        config.num_hidden_layers = positive_int("layers", setting.layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Encoder.from_config(config, pooling="mean")


def steps_for(pairs: int, epochs: int, batch_size: int) -> int:
    """Updates that see `epochs` times the pairs, rounded down to whole batches of the biggest row, 512.

    So every row sees the same number of examples.
    """
    examples = epochs * (pairs // LARGEST) * LARGEST
    if examples == 0 or examples % batch_size:
        raise refuse("batch_size", f"must divide {LARGEST}, with at least {LARGEST} pairs to train on", batch_size)
    return examples // batch_size


def thin(records: Sequence[TrainingRecord], points: int = POINTS) -> tuple[Point, ...]:
    """The records in at most `points` stretches of equal length (to a step), each as its mean."""
    count = min(positive_int("points", points), len(records))
    edges = [round(place * len(records) / count) for place in range(count + 1)] if count else []
    parts = [records[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
    return tuple(
        Point(
            part[-1].examples,
            statistics.fmean(record.loss for record in part),
            statistics.fmean(record.gradient_norm for record in part),
        )
        for part in parts
    )


def summarise(results: Sequence[Result]) -> list[Summary]:
    """Mean and spread of every metric over the seeds of each recipe, recipes in the order of the results."""
    if not results:
        raise refuse("results", "must be at least one", "none")
    groups: dict[Recipe, list[Result]] = {}
    for result in results:
        groups.setdefault(result.recipe, []).append(result)
    summaries = []
    for recipe, rows in groups.items():
        values = {name: [row.metrics[name] for row in rows] for name in METRICS}
        mean = {name: statistics.fmean(found) for name, found in values.items()}
        spread = {name: statistics.stdev(found) if len(found) > 1 else math.nan for name, found in values.items()}
        summaries.append(Summary(recipe, tuple(row.seed for row in rows), mean, spread))
    return summaries


def beyond_spread(first: Summary, second: Summary, metric: str = "top-1") -> float:
    """By how many spreads the first mean is above the second: their difference over the larger of both spreads.

    Above 1: the first is better by more than the seeds differ; below -1: the second is. NaN with one seed.
    """
    one_of("metric", metric, METRICS)
    larger = max(first.spread[metric], second.spread[metric])
    gap = first.mean[metric] - second.mean[metric]
    return gap / larger if larger else math.copysign(math.inf, gap) if gap else 0.0


def format_table(results: Sequence[Result]) -> str:
    """The rows as a markdown table: shares in percent, MRR, seconds of training."""
    lines = [["", *(f"top-{k}" for k in KS), "MRR", "seconds"]]
    for result in results:
        seconds = f"{result.seconds:.0f}{' (saved)' if result.saved else ''}"
        lines.append([result.recipe.name, *(_told(name, result.metrics[name]) for name in METRICS), seconds])
    return _markdown(lines)


def format_summaries(summaries: Sequence[Summary]) -> str:
    """Mean ± spread of each row as a markdown table, shares in percent."""
    lines = [["mean ± spread", "top rate", *(f"top-{k}" for k in KS), "MRR"]]
    for row in summaries:
        cells = [f"{_told(name, row.mean[name])} ± {_told(name, row.spread[name])}" for name in METRICS]
        lines.append([row.recipe.name, f"{row.recipe.learning_rate:.2g}", *cells])
    return _markdown(lines)


def _told(metric: str, share: float) -> str:
    return f"{share:.3f}" if metric == "mrr" else f"{100 * share:.1f}"


def _markdown(lines: list[list[str]]) -> str:
    head, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


@functools.cache
def _all_pairs(split: str) -> list[TextPair]:
    """A whole split, read once."""
    return load_pairs(split, limit=None, progress=False)


@functools.lru_cache(maxsize=2)
def _texts(
    train_pairs: int | None, test_pairs: int | None, vocab_size: int, query_length: int, passage_length: int
) -> tuple[list[TextPair], list[TextPair], Any]:
    """Texts are cut to 8 characters a token beforehand: to read long functions in every step takes its time."""

    def load(split: str, limit: int | None) -> list[TextPair]:
        pairs = _all_pairs(split)[:limit]
        return [TextPair(p.query[: 8 * query_length], p.passage[: 8 * passage_length]) for p in pairs]

    pairs = load("train", train_pairs)
    return pairs, load("test", test_pairs), train_tokenizer(pairs, vocab_size=vocab_size)


def _bar(setting: Setting, rows: int, progress: bool) -> Any:
    """A progress bar over the queries of so many rows."""
    total = 0
    if rows:
        pairs, _, _ = texts_of(setting)
        total = rows * steps_for(len(pairs), setting.epochs, LARGEST) * LARGEST
    return tqdm(total=total, unit="query", disable=not (progress and rows), mininterval=0.5)


def _paths(setting: Setting, rows: Sequence[tuple[Recipe, int]]) -> dict[tuple[Recipe, int], Path]:
    """Where the result of each recipe and seed is kept."""
    around = _surroundings()
    return {row: cache_folder() / f"table1-{_key(setting, *row, around)}.json" for row in rows}


def _key(setting: Setting, recipe: Recipe, seed: int, around: dict[str, Any]) -> str:
    """16 hexadecimal digits of all that a result depends on."""
    row = {"setting": dataclasses.asdict(setting), "recipe": dataclasses.asdict(recipe), "seed": seed}
    described = row | around
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _surroundings() -> dict[str, Any]:
    """The corpus, the versions and the code that a result depends on."""
    return {
        "corpus": fingerprint(installed_sources()),
        "versions": [torch.__version__, transformers.__version__],
        "code": code_digest("support", "", "losses", "models", "data", "training", "course/experiments"),
    }


def _read(path: Path) -> Result | None:
    """The saved result, or None where there is none that is whole."""
    try:
        _, body = read_checked(path)
    except (FileNotFoundError, DamagedFile):
        return None
    fields = json.loads(body)
    curve = tuple(Point(*point) for point in fields["curve"])
    return Result(**{**fields, "recipe": Recipe(**fields["recipe"]), "curve": curve, "saved": True})
