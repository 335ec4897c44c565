"""The options of `python -m gclib train`: one dataclass, from which command line, checks and config.json are made."""

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gclib.models.adapters import check_peft
from gclib.models.encoder import SIZES
from gclib.models.presets import PRESETS
from gclib.steps import STEPS
from gclib.support.validation import refuse
from gclib.training.loop import SCHEDULES

POOLED = ("mean", "cls", "last")
DEFAULT_CHUNK = "auto"
LENGTHS = {"query_length": 64, "passage_length": 256}
FRESH_RATE, TRAINED_RATE = 1e-3, 2e-5  # the first moves trained weights so far that they forget
LORA_RATE = 2e-4  # of pairs beside frozen weights, which forget nothing: about ten times as high
WARMUP_PART = 10  # trained weights: the rate rises over one step in so many
# What may differ from the run that is resumed: nothing of it changes what a step computes.
FREE = ("test_pairs", "checkpoint_every", "keep", "evaluate_every", "timeout_seconds")


def int_or_auto(text: str) -> int | str:
    """An option's value: a whole number, or the word auto."""
    return text if text == "auto" else int(text)


def option(default: Any, group: str, text: str, kind: Callable | None = None, choices: tuple | None = None) -> Any:
    """A field that is an option of the command line too."""
    return field(default=default, metadata={"group": group, "help": text, "type": kind, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a training run computes, and how often it writes. None: not set."""

    data: str | None = option(
        None,
        "data",
        "folder of train.jsonl and test.jsonl, or what `datasets` loads; else the mined corpus",
    )
    query_column: str = option("query", "data", "name of the queries' column in --data")
    passage_column: str = option("passage", "data", "name of the passages' column in --data")
    query_prefix: str | None = option(
        None, "data", "put before every query; else the model's own prompt, if it has one", str
    )
    passage_prefix: str | None = option(None, "data", "put before every passage; else the model's own prompt", str)
    train_pairs: int | None = option(None, "data", "train on the first so many pairs; else all", int)
    test_pairs: int = option(1_000, "data", "evaluate on the first so many pairs; train takes 0 for none", int)
    negatives: int = option(0, "data", "hard negatives to mine with BM25 for each query", int)
    query_length: int | None = option(None, "data", "tokens that a query is cut to; else 64, or the model's most", int)
    passage_length: int | None = option(None, "data", "the same of a passage; else 256, or the model's most", int)

    model: str = option(
        "mini", "model", f"{', '.join(SIZES)} or a preset, with fresh weights; or a folder to start from"
    )
    pooling: str | None = option(
        None, "model", "how tokens become one vector; else as a folder says, the preset's, or mean", str, POOLED
    )
    lora_rank: int | None = option(
        None, "model", "freeze the weights, and train pairs of this rank beside the attention's (LoRA; needs peft)", int
    )
    vocab_size: int = option(8_000, "model", "tokens of a fresh model's vocabulary", int)
    dropout: float = option(0.1, "model", f"of a fresh {', '.join(SIZES)}; other models have their own", float)

    temperature: float = option(0.05, "loss", "divides the dot products", float)
    learnable_temperature: bool = option(False, "loss", "train the temperature too, from --temperature on")
    symmetric: bool = option(False, "loss", "also ask each passage for its query")
    tile_size: int | str | None = option(
        None, "loss", "compute the loss in tiles of this side, or auto; else all logits at once", int_or_auto
    )
    ring: bool = option(False, "loss", "several processes: pass passages around, gather none (needs --tile-size)")

    step: str = option("grad_cache", "step", "how the gradient of a batch is made", str, tuple(STEPS))
    batch_size: int = option(128, "step", "queries an update, over all processes", int)
    chunk_size: int | str | None = option(
        None,
        "step",
        "rows encoded at once (accumulation: queries, with their passages), or auto: as memory allows; "
        "grad_cache without either: auto",
        int_or_auto,
    )
    chunk_tokens: int | None = option(None, "step", "instead: padded tokens encoded at once (grad_cache)", int)
    retain_chunks: int = option(0, "step", "chunks that keep their graph and are encoded once (grad_cache)", int)
    autocast: str = option("none", "step", "compute in bfloat16 where torch thinks it safe", str, ("bf16", "none"))

    steps: int | None = option(None, "updates", "how many; else as --epochs says", int)
    epochs: int | None = option(None, "updates", "times that the pairs are seen; without either: 1", int)
    learning_rate: float | None = option(
        None,
        "updates",
        f"the highest, of AdamW; else {FRESH_RATE:g} for fresh weights, {TRAINED_RATE:g} for others, "
        f"{LORA_RATE:g} with --lora-rank",
        float,
    )
    warmup_steps: int | None = option(
        None, "updates", f"over which the rate rises; else none for fresh weights, 1 in {WARMUP_PART} for others", int
    )
    schedule: str = option("linear", "updates", "the rate after the warm-up: falling, or constant", str, SCHEDULES)
    clip_norm: float = option(1.0, "updates", "the longest gradient allowed; 0: any", float)
    weight_decay: float = option(0.01, "updates", "of matrices; biases and norms have none", float)
    seed: int = option(0, "updates", "of fresh weights, dropout and the order of the pairs", int)

    checkpoint_every: int = option(100, "files", "steps between checkpoints; 0: only at the end", int)
    keep: int = option(2, "files", "checkpoints to keep, the newest", int)
    evaluate_every: int = option(
        0, "files", "steps between evaluations; 0: only before the first and after the last", int
    )
    timeout_seconds: float = option(1_800.0, "files", "how long a process waits for another one", float)

    def check(self, processes: int = 1) -> None:
        """Refuse what can't be, or doesn't go together, in one line; nothing is loaded for it."""
        for name, smallest in SMALLEST.items():
            value = getattr(self, name)
            if value not in (None, "auto") and value < smallest:
                raise refuse(flag(name), f"must be at least {smallest}", value)
        for name in ("temperature", "learning_rate", "timeout_seconds"):
            if getattr(self, name) is not None and not (0 < getattr(self, name) < math.inf):
                raise refuse(flag(name), "must be a finite number above 0", getattr(self, name))
        for name in ("clip_norm", "weight_decay"):
            if not (0 <= getattr(self, name) < math.inf):
                raise refuse(flag(name), "must be a finite number, 0 or more", getattr(self, name))
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if value is not None and value > largest:
                raise refuse(flag(name), f"must be at most {largest:,}", value)
        self._check_step(processes)
        self._check_data()
        self._check_model()
        self._check_loss_and_length()

    def check_new(self) -> None:
        """Refuse what would be without effect on a run that begins; one that is resumed has it behind it."""
        if self.data is None and (self.query_column != "query" or self.passage_column != "passage"):
            raise refuse("--query-column and --passage-column", "must be given with --data", "them alone")
        if self.query_column == self.passage_column:
            raise refuse("--passage-column", "must be another column than --query-column", self.passage_column)
        if self.vocab_size != DEFAULTS["vocab_size"] and self.model not in SIZES:
            raise refuse("--vocab-size", f"must be left out but for {', '.join(SIZES)}: others have their own", "it")

    def completed(self) -> "Settings":
        """With what is understood where nothing was said: the chunk of grad_cache, one epoch."""
        chunk = self.chunk_size
        if self.step == "grad_cache" and chunk is None and self.chunk_tokens is None:
            chunk = DEFAULT_CHUNK
        epochs = 1 if self.steps is None and self.epochs is None else self.epochs
        return dataclasses.replace(self, chunk_size=chunk, epochs=epochs)

    def with_rates(self, steps: int) -> "Settings":
        """With the rate and the warm-up that suit the weights, where nothing was said, for a run of so many steps."""
        rate, warmup = (FRESH_RATE, 0) if self.is_fresh else (TRAINED_RATE, math.ceil(steps / WARMUP_PART))
        rate = rate if self.lora_rank is None else LORA_RATE
        return dataclasses.replace(
            self,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            warmup_steps=warmup if self.warmup_steps is None else self.warmup_steps,
        )

    def with_lengths(self, room: int) -> "Settings":
        """With texts as long as usual, or as the model reads, where nothing was said."""
        lengths = {name: getattr(self, name) or min(usual, room) for name, usual in LENGTHS.items()}
        return dataclasses.replace(self, **lengths)

    @property
    def is_fresh(self) -> bool:
        """Whether the model starts from fresh weights, and not from a folder or a name on the hub."""
        return self.model in SIZES or self.model in PRESETS or self.model.endswith(".json")

    def _check_step(self, processes: int) -> None:
        sizes = [flag(name) for name in ("chunk_size", "chunk_tokens") if getattr(self, name) is not None]
        chunk_options = sizes + ["--retain-chunks"] * (self.retain_chunks > 0)
        if self.step == "naive" and chunk_options:
            raise refuse(chunk_options[0], "must not be given with --step naive, which has no chunks", "it")
        if self.step == "accumulation" and chunk_options != ["--chunk-size"]:
            rule = "must be given --chunk-size alone of the chunks' options"
            raise refuse("--step accumulation", rule, chunk_options)
        if self.step == "accumulation" and processes > 1:
            raise refuse("--step", "must be naive or grad_cache in several processes", "accumulation")
        if self.chunk_size == "auto" and (self.step != "grad_cache" or self.retain_chunks):
            rule = "must be a number with --retain-chunks or another step than grad_cache: auto chooses both"
            raise refuse("--chunk-size", rule, "auto")
        if len(sizes) > 1:
            raise refuse("--chunk-tokens", "must not be given with --chunk-size: it takes its place", "both")
        if self.batch_size < processes:
            raise refuse("--batch-size", f"must give each of {processes} processes a row", self.batch_size)

    def _check_data(self) -> None:
        if self.data is None:
            return
        path = Path(self.data)
        if path.is_dir():
            if not any(path.iterdir()):
                raise refuse("--data", "must be a folder that holds train.jsonl", f"{path}, which is empty")
        elif path.exists():
            raise refuse("--data", "must be the folder that holds train.jsonl and test.jsonl", f"{path}, a file")
        elif not is_hub_name(self.data) or find_spec("datasets") is None:
            rule = "must be a folder, or a name that `datasets` (if it is installed) knows"
            raise refuse("--data", rule, f"{self.data}, and no such folder is in {Path.cwd()}")

    def _check_model(self) -> None:
        if not 0 <= self.dropout < 1:
            raise refuse("--dropout", "must be a number from 0 to below 1", self.dropout)
        if self.dropout != DEFAULTS["dropout"] and self.model not in SIZES:
            raise refuse("--dropout", f"must be left out but for {', '.join(SIZES)}: other models have their own", "it")
        if self.lora_rank is not None:
            check_peft("--lora-rank")
            if self.is_fresh:
                rule = "must be given with trained weights (--model a folder or a name), for they are frozen"
                raise refuse("--lora-rank", rule, f"it with --model {self.model}")
        path, known = Path(self.model), ", ".join([*SIZES, *PRESETS])
        if self.model in SIZES or self.model in PRESETS:
            return
        if self.is_fresh or path.is_file():
            if not (self.is_fresh and path.is_file()):
                raise refuse("--model", f"must be one of {known}, a config.json that exists, or a folder", self.model)
        elif path.is_dir():
            if not any((path / name).is_file() for name in ("config.json", "modules.json", "adapter_config.json")):
                raise refuse("--model", "must be a folder that holds a model's config.json", self.model)
        elif "/" not in self.model or not is_hub_name(self.model):
            raise refuse("--model", f"must be one of {known}, a folder, a config.json or a name with /", self.model)

    def _check_loss_and_length(self) -> None:
        if isinstance(self.tile_size, int) and self.tile_size < 1:
            raise refuse("--tile-size", "must be auto or at least 1", self.tile_size)
        if self.ring and self.tile_size is None:
            raise refuse("--ring", "must be given with --tile-size, as the ring's loss is taken in tiles", "it alone")
        if self.steps is not None and self.epochs is not None:
            raise refuse("--epochs", "must not be given with --steps: one of them decides", "both")
        if self.steps is not None and self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise refuse("--warmup-steps", f"must be at most --steps, {self.steps}", self.warmup_steps)


DEFAULTS = {item.name: item.default for item in dataclasses.fields(Settings)}
SMALLEST = {
    **dict.fromkeys(("test_pairs", "negatives", "retain_chunks", "warmup_steps", "seed"), 0),
    **dict.fromkeys(("checkpoint_every", "evaluate_every"), 0),
    **dict.fromkeys(
        ("train_pairs", "lora_rank", "batch_size", "chunk_size", "chunk_tokens", "steps", "epochs", "keep"), 1
    ),
    **dict.fromkeys(("query_length", "passage_length"), 3),
    "vocab_size": 64,
}
# What torch and the system can count; more is a mistyped number
LARGEST = {"seed": 2**62, "steps": 10**7, "epochs": 10**5, "vocab_size": 10**7, "timeout_seconds": 10**7}


def is_hub_name(text: str) -> bool:
    """Whether it may be the name of a model or a data set on the hub, and not a folder that was mistyped."""
    looks_so = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", text) is not None
    return looks_so and not ("/" in text and Path(text).parent.is_dir())


def flag(name: str) -> str:
    """A field's name as it is typed."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """Every setting (or these) as an option, in groups; those that are not typed leave nothing behind."""
    groups: dict[str, Any] = {}
    for item in dataclasses.fields(Settings):
        about = item.metadata
        if names is not None and item.name not in names:
            continue
        if about["group"] not in groups:
            groups[about["group"]] = parser.add_argument_group(about["group"])
        options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": about["help"]}
        if isinstance(item.default, bool):
            options["action"] = "store_true"
        else:
            metavar = None if about["choices"] else "X"
            options |= {"type": about["type"], "choices": about["choices"], "metavar": metavar}
            if item.default is not None:
                options["help"] += f" (default: {item.default})"
        groups[about["group"]].add_argument(flag(item.name), **options)


def typed_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were typed, and no others; folders by their whole path: a run goes on from anywhere."""
    typed = {name: getattr(arguments, name) for name in DEFAULTS if hasattr(arguments, name)}
    for name in ("data", "model"):
        value = typed.get(name)
        if value is not None and value not in SIZES and value not in PRESETS and Path(value).exists():
            typed[name] = str(Path(value).resolve())
    return typed


def resumed(saved: Settings, typed: dict[str, Any]) -> Settings:
    """The saved settings, with those typed that a resumed run may change; ValueError for any other that differs.

    `--chunk-size auto` stands for the chunks that were chosen then. A run can be made longer (or shorter) too, by the
    one of --steps and --epochs that it was begun with.
    """
    length = ("steps",) if saved.epochs is None else ("epochs",)
    for name, value in typed.items():
        as_before = value == getattr(saved, name) or (name, value) == ("chunk_size", "auto")
        if name not in FREE + length and not as_before:
            before = "left out" if getattr(saved, name) in (None, False) else getattr(saved, name)
            raise refuse(flag(name), f"must be {before}, as in the run that is resumed", value)
    return dataclasses.replace(saved, **{name: typed[name] for name in FREE + length if name in typed})
