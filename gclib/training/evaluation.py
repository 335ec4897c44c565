"""`python -m gclib evaluate`: does a kept model find the right passages? Nothing is trained or written."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from gclib.distributed import process_group
from gclib.models.pretrained import check_reads_text
from gclib.support.validation import one_of, refuse
from gclib.support.words import format_table
from gclib.training.build import check_config, fitted, loader, prefixed, saved_model, with_prompts
from gclib.training.command import error_line, fewer_words, is_of_the_machine
from gclib.training.retrieval import retrieval_metrics
from gclib.training.session import CONFIG, read_config
from gclib.training.settings import Settings, add_options, typed_settings

SPLITS = ("test", "train")
OPTIONS = ("data", "query_column", "passage_column", "test_pairs", "query_length", "passage_length", "pooling")
PREFIXES = ("query_prefix", "passage_prefix")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m gclib evaluate`."""
    parser.add_argument(
        "model", metavar="MODEL", help="a folder that holds a model, a run's folder (its model/), or a name on the hub"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="which of the data's pairs (default: test)")
    add_options(parser, OPTIONS + PREFIXES)


def command(arguments: argparse.Namespace) -> int:
    """Evaluate what was typed and print a table; the exit status: 0; 2: refused; 1: the machine failed."""
    try:
        settings = settings_for(typed_settings(arguments))
        with fewer_words(quiet=True):
            metrics = evaluate(settings, arguments.split)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        refused = isinstance(error, ValueError)
        if not refused and not is_of_the_machine(error):
            raise
        print(error_line("evaluate", error), file=sys.stderr)
        return 2 if refused else 1
    print(format_table(["metric", settings.model], [[name, f"{value:.3f}"] for name, value in metrics.items()]))
    return 0


def settings_for(typed: dict[str, Any]) -> Settings:
    """What was typed; of a run's folder its model, over that run's own data, lengths and prefixes."""
    folder = Path(typed["model"])
    if (folder / CONFIG).is_file() and (folder / "records.jsonl").is_file():
        if not (folder / "model").is_dir():
            raise refuse("MODEL", "must be a run that has ended and left model/", typed["model"])
        saved = read_config(folder)["settings"]
        typed = {**{name: saved[name] for name in OPTIONS + PREFIXES}, **typed, "model": str(folder / "model")}
    settings = Settings(**typed)
    if settings.is_fresh:
        raise refuse("MODEL", "must be a folder that holds a model, or a name on the hub", settings.model)
    if settings.test_pairs == 0:
        raise refuse("--test-pairs", "must be at least 1", 0)
    settings.check()
    settings.check_new()
    return settings


def evaluate(settings: Settings, split: str = "test") -> dict[str, float]:
    """`retrieval_metrics` of the model that the settings name, on the first --test-pairs pairs of a split.

    Uses the settings for data, texts and model alone; prefixes that are None are the model's own prompts. Raises
    ValueError for data or a model that are not there or don't fit.
    """
    one_of("split", split, SPLITS)
    check_config(settings)
    settings = with_prompts(settings)
    load = loader(settings, progress=False)
    pairs = [dataclasses.replace(pair, negatives=()) for pair in load(split=split, limit=settings.test_pairs)]
    with process_group() as rank:
        encoder, tokenizer = saved_model(settings)
        settings = fitted(settings, encoder, tokenizer)
        check_reads_text(encoder, tokenizer, max(settings.query_length, settings.passage_length), "--model")
        encoder.to(rank.device)
        lengths = {"query_length": settings.query_length, "passage_length": settings.passage_length}
        return retrieval_metrics((encoder, encoder), prefixed(pairs, settings), tokenizer, **lengths)
