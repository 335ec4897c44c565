"""Does a bigger batch help? The published table's three rows, on mined pairs, in minutes.

Gao et al. 2021, table 1 (Natural Questions; top-20: sequential 71.9, accumulated 77.2, gradient cache 79.3), repeated
with a small BERT from scratch: every row sees as many examples, in as many epochs, from the same first weights.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import gclib
from gclib.cache import DamagedFile, cache_folder, code_digest, read_checked, write_checked
from gclib.corpus import fingerprint, installed_sources
from gclib.data import load_pairs, train_tokenizer
from gclib.encoder import Encoder
from gclib.losses import ContrastiveLoss
from gclib.retrieval import retrieval_metrics
from gclib.steps import accumulation_step, grad_cache_step, naive_step
from gclib.training import train
from gclib.validation import int_at_least, refuse

KS = (1, 5, 20, 100)
# What a result depends on, beside the settings: change one of these modules, and saved rows no longer count.
CODE = "experiments data corpus mining encoder inputs losses chunking randomness steps towers training retrieval"


@dataclass(frozen=True)
class Setting:
    """Everything but the row: the data, the model, the length of training. Pairs None: all that there are."""

    train_pairs: int | None = 10_240
    test_pairs: int | None = None
    epochs: int = 2
    size: str = "mini"
    vocab_size: int = 8_000
    query_length: int = 32
    passage_length: int = 96
    temperature: float = 0.05
    warmup_share: float = 0.1


@dataclass(frozen=True)
class Recipe:
    """One row: how many queries an update sees, how the gradient is made, and the schedule's highest learning rate."""

    name: str
    step: str
    batch_size: int
    chunk_size: int | None
    learning_rate: float

    def step_function(self) -> Callable[..., torch.Tensor]:
        """The step with its chunk size settled, as `train` takes it."""
        if self.step == "naive":
            return naive_step
        function = {"accumulation": accumulation_step, "grad_cache": grad_cache_step}[self.step]
        return functools.partial(function, chunk_size=self.chunk_size)


QUICK = Setting()
WHOLE = Setting(train_pairs=None)
# Highest rates of a linear schedule. At these all three rows have been run; a batch of 128 still gains from 2e-3.
RECIPES = (
    Recipe("sequential, B=8", "naive", 8, None, 3e-4),
    Recipe("accumulation, 16 x 8", "accumulation", 128, 8, 1e-3),
    Recipe("gradient cache, B=128", "grad_cache", 128, 32, 1e-3),
)


@dataclass(frozen=True)
class Result:
    """A row that was trained and judged: `pool` queries, each among as many passages.

    metrics: shares from 0 to 1; seconds: of training, with `threads` threads; final_loss: the last step's, in nats.
    """

    recipe: Recipe
    seed: int
    metrics: dict[str, float]
    pool: int
    seconds: float
    examples: int
    final_loss: float
    threads: int
    saved: bool = False


def table1(
    setting: Setting = QUICK,
    *,
    recipes: tuple[Recipe, ...] = RECIPES,
    seed: int = 0,
    fresh: bool = False,
    progress: bool = True,
) -> list[Result]:
    """One result a recipe. Those already trained with the same data, settings and code are read from the cache.

    fresh: train all of them again. Raises ValueError where a setting can't be.
    """
    int_at_least("seed", seed, 0)
    if not recipes:
        raise refuse("recipes", "must be at least one", "none")
    results = []
    for recipe in recipes:
        path = cache_folder() / f"table1-{_key(setting, recipe, seed)}.json"
        saved = None if fresh else _read(path)
        if saved is None:
            saved = run(recipe, setting, seed=seed, progress=progress)
            write_checked(path, {"row": recipe.name}, json.dumps(dataclasses.asdict(saved)).encode())
        results.append(saved)
    return results


def run(recipe: Recipe, setting: Setting, *, seed: int, progress: bool = True) -> Result:
    """Train one encoder for both towers by the recipe, and judge it on the test split."""
    pairs = load_pairs("train", limit=setting.train_pairs, progress=progress)
    held_out = load_pairs("test", limit=setting.test_pairs, progress=progress)
    tokenizer = train_tokenizer(pairs, vocab_size=setting.vocab_size)
    encoder = _fresh_encoder(setting, seed)
    lengths = {"query_length": setting.query_length, "passage_length": setting.passage_length}
    steps = steps_for(len(pairs), setting.epochs, recipe.batch_size)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    records = train(
        (encoder, encoder),
        pairs,
        tokenizer,
        ContrastiveLoss(setting.temperature),
        step=recipe.step_function(),
        batch_size=recipe.batch_size,
        steps=steps,
        optimizer=optimizer,
        seed=seed,
        warmup_steps=round(setting.warmup_share * steps),
        progress=progress,
        **lengths,
    )
    metrics = retrieval_metrics((encoder, encoder), held_out, tokenizer, ks=KS, **lengths)
    last = records[-1]
    threads = torch.get_num_threads()
    return Result(recipe, seed, metrics, len(held_out), last.seconds, last.examples, last.loss, threads)


def steps_for(pairs: int, epochs: int, batch_size: int) -> int:
    """Updates that see `epochs` times the pairs, rounded down to whole batches of the biggest row, 128.

    So every row sees the same number of examples.
    """
    biggest = max(recipe.batch_size for recipe in RECIPES)
    examples = epochs * (pairs // biggest) * biggest
    if examples == 0 or examples % batch_size:
        raise refuse("batch_size", f"must divide {biggest}, with at least {biggest} pairs to train on", batch_size)
    return examples // batch_size


def format_table(results: list[Result]) -> str:
    """The rows as a markdown table: shares in percent, MRR, seconds of training."""
    header = ["", *(f"top-{k}" for k in KS), "MRR", "seconds"]
    lines = [header, ["---"] * len(header)]
    for result in results:
        shares = [f"{100 * result.metrics[f'top-{k}']:.1f}" for k in KS]
        seconds = f"{result.seconds:.0f}{' (saved)' if result.saved else ''}"
        lines.append([result.recipe.name, *shares, f"{result.metrics['mrr']:.3f}", seconds])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _fresh_encoder(setting: Setting, seed: int) -> Encoder:
    """The same first weights for every row of a seed; the caller's generators are left as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Encoder.from_config(setting.size, vocab_size=setting.vocab_size)


def _key(setting: Setting, recipe: Recipe, seed: int) -> str:
    """16 hexadecimal digits of all that a result depends on."""
    folder = Path(gclib.__file__).parent
    described = {
        "setting": dataclasses.asdict(setting),
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "corpus": fingerprint(installed_sources()),
        "versions": [torch.__version__, transformers.__version__],
        "code": code_digest(*(str(folder / f"{name}.py") for name in CODE.split())),
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _read(path: Path) -> Result | None:
    """The saved result, or None where there is none that is whole."""
    try:
        _, body = read_checked(path)
    except (FileNotFoundError, DamagedFile):
        return None
    fields = json.loads(body)
    return Result(**{**fields, "recipe": Recipe(**fields["recipe"]), "saved": True})
