"""Work on many things in several processes."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

from gclib.support.validation import positive_int

Item = TypeVar("Item")
Done = TypeVar("Done")


def map_in_processes(work: Callable[[Item], Done], items: Iterable[Item], processes: int) -> Iterator[Done]:
    """work(item) of each item, in order, in as many new processes of one thread each; for 1, in this process.

    work and items must be picklable where there are several. A process that has threads is never copied: it may hang.
    Raises ValueError for processes that are no positive int, before any work.
    """
    if positive_int("processes", processes) == 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(work, items)
