"""Does a bigger batch help? The published table's rows on mined pairs, with several seeds, in minutes.

Gao et al. 2021, table 1 (Natural Questions; top-20: sequential 71.9, accumulated 77.2, gradient cache 79.3 with B = 128
and 79.9 with B = 512), repeated with a small BERT from scratch: every row sees as many examples, in as many epochs,
from the same first weights. Each result is kept on disk, under a checksum of all that it depends on.

Letters: B queries of an update, C rows of a chunk.
"""

import dataclasses
import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from gclib.course.experiments.kept import check_chosen, read_or_train
from gclib.course.experiments.recipes import QUICK, RECIPES, Recipe, TableSetting
from gclib.data.corpus import fingerprint, installed_sources
from gclib.data.pairs import TextPair, load_pairs
from gclib.data.tokens import train_tokenizer
from gclib.models.encoder import Encoder, bert_config
from gclib.support.files import DamagedFile, cache_folder, code_digest, read_checked
from gclib.support.validation import positive_int
from gclib.training.loop import TrainingRecord, train
from gclib.training.retrieval import retrieval_metrics

KS = (1, 5, 20, 100)
POINTS = 40  # of a learning curve that is kept
SEEDS = (0, 1, 2)
_BATCH = {"truncation": True, "padding": "longest", "return_tensors": "pt"}  # how `tokenize_texts` asks


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


def table1(
    setting: TableSetting = QUICK,
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
    setting: TableSetting = QUICK,
    *,
    recipes: Sequence[Recipe] = RECIPES,
    seeds: Sequence[int] = SEEDS,
    fresh: bool = False,
    progress: bool = True,
) -> list[Result]:
    """One result for each recipe and seed, seed by seed; saved ones are read, as in `table1`.

    progress: one bar over all queries that are still to be trained on.
    """
    check_chosen(seeds, recipes=recipes)
    paths = _paths(setting, [(recipe, seed) for seed in seeds for recipe in recipes])

    def queries(recipe: Recipe) -> int:
        return recipe.updates(len(pairs_and_tokenizer(setting)[0]), setting) * recipe.batch_size

    def train_row(recipe: Recipe, seed: int, advance: Callable[[int], object]) -> Result:
        return run(recipe, setting, seed=seed, on_record=lambda _: advance(recipe.batch_size))

    results = read_or_train(train_row, paths, _read, queries=queries, progress=progress, fresh=fresh)
    by_row = dict(zip(paths, results, strict=True))
    return [by_row[recipe, seed] for seed in seeds for recipe in recipes]


def saved_results(
    setting: TableSetting, *, recipes: Sequence[Recipe] = RECIPES, seeds: Sequence[int] = SEEDS
) -> list[Result]:
    """Those results of a race that are in the cache; nothing is trained."""
    paths = _paths(setting, [(recipe, seed) for seed in seeds for recipe in recipes])
    results = [_read(path, recipe) for (recipe, _), path in paths.items()]
    return [result for result in results if result is not None]


def run(
    recipe: Recipe, setting: TableSetting, *, seed: int, on_record: Callable[[TrainingRecord], object] | None = None
) -> Result:
    """Train one encoder for both towers by the recipe, and judge it on the test split."""
    _, held_out, tokenizer = pairs_and_tokenizer(setting)
    encoder = fresh_encoder(setting, seed)
    records = train_encoder(encoder, recipe, setting, seed=seed, on_record=on_record)
    metrics = retrieval_metrics((encoder, encoder), held_out, tokenizer, ks=KS, **setting.lengths())
    last, threads = records[-1], torch.get_num_threads()
    return Result(recipe, seed, metrics, len(held_out), last.seconds, last.examples, last.loss, threads, thin(records))


def train_encoder(
    encoder: Encoder,
    recipe: Recipe,
    setting: TableSetting,
    *,
    seed: int,
    on_record: Callable[[TrainingRecord], object] | None = None,
) -> list[TrainingRecord]:
    """Train the encoder, for both towers, by the recipe; the records of its steps."""
    pairs, _, tokenizer = pairs_and_tokenizer(setting)
    steps, towers, loss_fn = recipe.updates(len(pairs), setting), recipe.towers(encoder), recipe.loss_fn(setting)
    trained = [*encoder.parameters(), *loss_fn.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.01, fused=True)
    return train(
        towers,
        recipe.training_pairs(pairs),
        tokenizer,
        loss_fn,
        step=recipe.step_function(),
        batch_size=recipe.batch_size,
        steps=steps,
        optimizer=optimizer,
        seed=seed,
        on_record=on_record,
        on_state=lambda state: recipe.after_update(towers),
        warmup_steps=round(setting.warmup_share * steps),
        progress=False,
        **setting.lengths(),
    )


def pairs_and_tokenizer(setting: TableSetting) -> tuple[list[TextPair], list[TextPair], Any]:
    """Training pairs, test pairs, and a tokenizer trained on the former; read once for all rows of a setting.

    The tokenizer keeps the tokens of each text that a batch was made of: rows train on the same texts again and again.
    """
    return _texts(setting.train_pairs, setting.test_pairs, setting.vocab_size, *setting.lengths().values())


class _TokenizedOnce:
    """A tokenizer whose padded batches are laid out of the tokens that it keeps of each text; else the tokenizer."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.rows = tokenizer, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)

    def __call__(self, texts: Sequence[str], **options: Any) -> Any:
        if options != _BATCH | {"max_length": (length := options.get("max_length"))}:
            return self.tokenizer(texts, **options)
        if new := [text for text in dict.fromkeys(texts) if (text, length) not in self.rows]:
            tokens = self.tokenizer(new, truncation=True, max_length=length)["input_ids"]
            self.rows |= {(text, length): torch.tensor(row) for text, row in zip(new, tokens, strict=True)}
        rows = [self.rows[text, length] for text in texts]
        padded = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        ends = torch.tensor([[len(row)] for row in rows])
        return {"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) < ends).long()}


def fresh_encoder(setting: TableSetting, seed: int) -> Encoder:
    """The same first weights for every row of a seed; the caller's generators are left as they were."""
    config = bert_config(setting.size, setting.vocab_size)
    if setting.layers is not None:
        config.num_hidden_layers = positive_int("layers", setting.layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Encoder.from_config(config, pooling="mean")


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
    return pairs, load("test", test_pairs), _TokenizedOnce(train_tokenizer(pairs, vocab_size=vocab_size))


def _paths(setting: TableSetting, rows: Sequence[tuple[Recipe, int]]) -> dict[tuple[Recipe, int], Path]:
    """Where the result of each recipe and seed is kept."""
    around = _surroundings()
    return {row: cache_folder() / f"table1-{_key(setting, *row, around)}.json" for row in rows}


def _key(setting: TableSetting, recipe: Recipe, seed: int, around: dict[str, Any]) -> str:
    """16 hexadecimal digits of all that a result depends on."""
    row = {"setting": dataclasses.asdict(setting), "recipe": dataclasses.asdict(recipe), "seed": seed}
    return hashlib.sha256(json.dumps(row | around).encode()).hexdigest()[:16]


def _surroundings() -> dict[str, Any]:
    """The corpus, the versions and the code that a result depends on."""
    return {
        "corpus": fingerprint(installed_sources()),
        "versions": [torch.__version__, transformers.__version__],
        "code": code_digest("support", "", "losses", "models", "data", "training", "course/experiments"),
    }


def _read(path: Path, recipe: Recipe) -> Result | None:
    """The recipe's saved result, or None where there is none that is whole."""
    try:
        _, body = read_checked(path)
    except (FileNotFoundError, DamagedFile):
        return None
    fields = json.loads(body)
    curve = tuple(Point(*point) for point in fields["curve"])
    return Result(**{**fields, "recipe": recipe, "curve": curve, "saved": True})
