"""Real processes for the tests: W ranks on this machine, each running one function of a test module."""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from gclib.distributed import process_group

TIMEOUT_SECONDS = 60.0


def run_ranks(
    work: Callable[..., Any],
    ranks: int,
    folder: Path,
    *arguments: Any,
    timeout: float = TIMEOUT_SECONDS,
    backend: str = "gloo",
):
    """[work(rank, *arguments) of each rank], computed in as many new processes; what it returns must fit JSON.

    Raises torch.multiprocessing.ProcessRaisedException with the traceback of the first rank that failed.
    """
    port = _free_port()
    given = (work, ranks, str(folder), port, timeout, arguments, backend)
    torch.multiprocessing.spawn(_enter, given, nprocs=ranks)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def message_of(call: Callable[[], Any]) -> list[Any]:
    """[the error's type, its message, the seconds until then]; ["none", "", 0.0] where there was none."""
    start = time.perf_counter()
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return [type(error).__name__, str(error), time.perf_counter() - start]
    return ["none", "", 0.0]


def die(rank: int, folder: Path) -> None:
    """Leave at once, as a killed process does, with nothing said to the other ranks."""
    Path(folder, f"rank{rank}.json").write_text("null")
    os._exit(0)


def _enter(
    rank: int, work: Callable, ranks: int, folder: str, port: int, timeout: float, arguments: tuple, backend: str
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with process_group(backend=backend, timeout_seconds=timeout) as here:
        found = work(here, *arguments)
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
