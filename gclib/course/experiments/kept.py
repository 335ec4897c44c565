"""Rows of an experiment: each is trained once and kept on disk, as many at a time as there are cores."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from gclib.support.files import write_checked
from gclib.support.processes import map_in_processes
from gclib.support.validation import int_at_least, refuse
from gclib.support.words import GiB

Row = tuple[Any, int]  # a recipe, which has a name, and a seed


def read_or_train(
    train: Callable[[Row], Any],
    paths: Mapping[Row, Path],
    read: Callable[[Path, Any], Any],
    *,
    queries: Callable[[Any], int],
    progress: bool,
    fresh: bool = False,
) -> list[Any]:
    """The result of each row, in their order: what read(path, recipe) finds, else train(row), which is kept.

    Rows are trained in processes of one thread each: as many as PyTorch has threads here, as far as free memory has a
    GiB for each. So a row comes to the same numbers on one core and on eight. Picklable: train, rows and results
    (dataclasses). Interrupted, the rows at work are lost, and no others. fresh: train all of them. progress: a bar over
    queries(recipe), the examples that each row still takes.
    """
    results = {row: None if fresh else read(path, row[0]) for row, path in paths.items()}
    sizes = {row: queries(row[0]) for row, result in results.items() if result is None}
    rooms = psutil.virtual_memory().available // GiB
    processes = max(1, min(len(sizes), torch.get_num_threads(), rooms))
    trained = map_in_processes(functools.partial(_keep, train), [(row, paths[row]) for row in sizes], processes)
    off = not (progress and sizes)
    with tqdm(desc="training", total=sum(sizes.values()), unit="query", disable=off, mininterval=0.5) as bar:
        for ((recipe, seed), size), result in zip(sizes.items(), trained, strict=True):
            results[recipe, seed] = result
            bar.set_description(f"after {recipe.name}, seed {seed}", refresh=False)
            bar.update(size)
    return list(results.values())


def check_chosen(seeds: Sequence[int], **chosen: Sequence[Any]) -> None:
    """Raises ValueError for nothing chosen, or a seed below 0."""
    for seed in seeds:
        int_at_least("seed", seed, 0)
    for name, some in {**chosen, "seeds": seeds}.items():
        if not some:
            raise refuse(name, "must be at least one", "none")


def _keep(train: Callable[[Row], Any], work: tuple[Row, Path]) -> Any:
    """Train the row and write its result, at once: an interruption later leaves it."""
    row, path = work
    result = train(row)
    with suppress(OSError):  # where nothing can be written, it is trained again
        write_checked(path, {"row": row[0].name}, json.dumps(dataclasses.asdict(result)).encode())
    return result
