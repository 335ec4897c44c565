"""Call an answer safely: in a time limit, with its errors told in words and all random generators kept.

An answer runs in a thread of its own, because a thread can be stopped on every platform (a signal cannot on
Windows). Code that never comes back from C cannot be stopped so: the learner is told to restart the kernel.
"""

import dis
import inspect
import linecache
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from gclib.course.threads import Worker


class StoppedAnswer(BaseException):
    """Thrown into the thread of a late answer. Not an Exception, so `except Exception` does not stop it."""


class TooSlow(Exception):
    """The answer did not come back in time. `still_running` says that it could not be stopped either."""

    def __init__(self, seconds: float, *, still_running: bool) -> None:
        super().__init__(f"no answer after {seconds:g} seconds")
        self.still_running = still_running


def run_limited(function: Callable[[], object], seconds: float) -> object:
    """`function()`, in a thread. Raises what it raises, or `TooSlow` after `seconds`."""
    outcome: dict[str, object] = {}

    def work() -> None:
        try:
            outcome["value"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = Worker(work, name="answer")
    try:
        thread.start()
        thread.join(seconds)
    finally:
        stopped = thread.throw(StoppedAnswer)
    if not stopped or not outcome or isinstance(outcome.get("error"), StoppedAnswer):
        raise TooSlow(seconds, still_running=not stopped)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


@contextmanager
def generators_kept() -> Iterator[None]:
    """Python's, NumPy's and PyTorch's random generators are afterwards as they were."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


def seed_generators(seed: int) -> None:
    """The same random numbers for whoever is called next: the answer, the oracle, a misconception.

    Where there is no accelerator, `torch.manual_seed` would do no more than this, but note a traceback for each that
    might come, which takes a third of an exercise's time.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


# Operations of a body that is one raise, with words or without.
RAISING = {"RESUME", "NOP", "LOAD_GLOBAL", "LOAD_CONST", "PUSH_NULL", "PRECALL", "CALL", "RAISE_VARARGS"}


def is_stub_error(error: BaseException) -> bool:
    """True for a stub's own `raise NotImplementedError`; PyTorch raises that type for a missing kernel."""
    if not isinstance(error, NotImplementedError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    line = frames[-1].line if frames else ""
    return not error.args or (line or "").startswith("raise NotImplementedError")


def is_stub(answer: Callable) -> bool:
    """Whether a function does nothing but raise NotImplementedError; True of what has no code of its own."""
    code = getattr(inspect.unwrap(answer), "__code__", None)
    return code is None or {step.opname for step in dis.get_instructions(code)} <= RAISING


def tell_error(answer: Callable, error: BaseException) -> str:
    """`error` in words, with the last line of the answer's own that it passed through."""
    text = "".join(traceback.format_exception_only(error)).strip()
    code = getattr(inspect.unwrap(answer), "__code__", None)
    own = [
        (frame, number)
        for frame, number in traceback.walk_tb(error.__traceback__)
        if code is not None and frame.f_code.co_filename == code.co_filename
    ]
    if not own:
        return f"It raised {text}"
    frame, number = own[-1]
    line = linecache.getline(frame.f_code.co_filename, number).strip()
    place = f"line {number - code.co_firstlineno + 1} of your function"
    if frame.f_code is not code:
        place = f"line {number} of {frame.f_code.co_name}"
    return f"It raised {text}\n    {place}: {line}" if line else f"It raised {text}\n    {place}"
