"""Rows of an experiment: each is trained once and kept on disk."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gclib.support.files import write_checked
from gclib.support.validation import int_at_least, refuse


def check_chosen(seeds: Sequence[int], **chosen: Sequence[Any]) -> None:
    """Raises ValueError for nothing chosen, or a seed below 0."""
    for seed in seeds:
        int_at_least("seed", seed, 0)
    for name, some in {**chosen, "seeds": seeds}.items():
        if not some:
            raise refuse(name, "must be at least one", "none")


def read_or_train(
    train: Callable[[Any, int, Callable[[int], object]], Any],
    paths: Mapping[tuple[Any, int], Path],
    read: Callable[[Path, Any], Any],
    *,
    queries: Callable[[Any], int],
    progress: bool,
    fresh: bool = False,
) -> list[Any]:
    """The result of each recipe and seed, in their order: what read(path, recipe) finds, else a training's.

    train(recipe, seed, advance) says by advance(queries) how far it is, and gives a dataclass, which is kept before the
    next row begins. fresh: train all of them. progress: one bar over the queries(recipe) of all rows still to train.
    """
    results = {row: None if fresh else read(path, row[0]) for row, path in paths.items()}
    missing = [row for row, result in results.items() if result is None]
    total, off = sum(queries(recipe) for recipe, _ in missing), not (progress and missing)
    with tqdm(total=total, unit="query", disable=off, mininterval=0.5) as bar:
        for recipe, seed in missing:
            bar.set_description(f"{recipe.name}, seed {seed}")
            results[recipe, seed] = train(recipe, seed, bar.update)
            body = json.dumps(dataclasses.asdict(results[recipe, seed])).encode()
            with suppress(OSError):  # where nothing can be written, it is trained again
                write_checked(paths[recipe, seed], {"row": recipe.name}, body)
    return list(results.values())
