"""Real processes for the tests: W ranks on this machine, or one alone, each running one function of a test module.

A process is new and its own, but torch is imported for it once a session where the system allows that (Linux): it is
forked off a server that has imported and done nothing else. What uses a CUDA card wants a process of its own making.
"""

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from gclib.distributed import process_group

TIMEOUT_SECONDS = 60.0
START = "forkserver" if sys.platform == "linux" else "spawn"
IMPORTED = ["torch._dynamo", "torch.distributed", "gclib.training.command", "gclib.losses.ring", "pytest", "hypothesis"]


def run_ranks(
    work: Callable[..., Any],
    ranks: int,
    folder: Path,
    *arguments: Any,
    timeout: float = TIMEOUT_SECONDS,
    backend: str = "gloo",
    on_card: bool = False,
):
    """[work(rank, *arguments) of each rank], computed in as many new processes; what it returns must fit JSON.

    on_card: whether work uses CUDA, which no process that was forked can count on.
    Raises torch.multiprocessing.ProcessRaisedException with the traceback of the first rank that failed.
    """
    start = "spawn" if on_card else START
    _start(_enter, ranks, work, str(folder), timeout, arguments, backend, start_method=start)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def run_commands(arguments: Sequence[str], ranks: int) -> None:
    """`python -m gclib` with these arguments in as many new processes as torchrun would start; each must end with 0."""
    _start(_type, ranks, list(arguments))


def exit_code(work: Callable[..., Any], *arguments: Any) -> int:
    """work(*arguments) in a new process, and how that ended: 0, or minus the signal that killed it."""
    process = _context().Process(target=work, args=arguments)
    process.start()
    process.join()
    return process.exitcode


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


@cache
def _context() -> Any:
    """How processes are started; the server, where there is one, imports when it starts the first."""
    context = multiprocessing.get_context(START)
    if START == "forkserver":
        context.set_forkserver_preload(IMPORTED)
    return context


def _start(enter: Callable[..., None], ranks: int, *arguments: Any, start_method: str = START) -> None:
    """enter(*arguments) in each rank's process, with the environment that torchrun would give it."""
    _context()
    given = (enter, ranks, _free_port(), arguments)
    torch.multiprocessing.start_processes(_as_rank, given, nprocs=ranks, start_method=start_method)


def _as_rank(rank: int, enter: Callable[..., None], ranks: int, port: int, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    enter(*arguments)


def _enter(work: Callable, folder: str, timeout: float, arguments: tuple, backend: str) -> None:
    with process_group(backend=backend, timeout_seconds=timeout) as here:
        found = work(here, *arguments)
    Path(folder, f"rank{here.rank}.json").write_text(json.dumps(found))


def _type(arguments: list[str]) -> None:
    from gclib import __main__ as commands

    assert commands.main(arguments) == 0


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
