"""A thread whose end is known for sure.

`threading.Thread.join` may be interrupted (by the stop button of a notebook). In Python 3.11 the thread then counts as
dead while it still works: it can't be waited for, found busy or stopped any more. `Worker` keeps an event of its own.
"""

import ctypes
import sys
import threading
from collections.abc import Callable


class Worker(threading.Thread):
    """A daemon thread that does `work(*arguments)`. `is_alive` and `join` are right after an interrupted `join` too."""

    def __init__(self, work: Callable[..., object], *arguments: object, name: str):
        super().__init__(target=work, args=arguments, name=name, daemon=True)
        self._ended = threading.Event()

    def run(self) -> None:
        """The work, and then the note that it has ended."""
        try:
            super().run()
        finally:
            self._ended.set()

    def is_alive(self) -> bool:
        """Whether it was started and has not ended."""
        return self.ident is not None and not self._ended.is_set() and self.ident in sys._current_frames()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, at most `timeout` seconds."""
        self._ended.wait(timeout)

    def throw(self, error: type[BaseException], tries: int = 20) -> bool:
        """Raise `error` in the thread, again and again, until it ends. False where it does not, as in code of C."""
        for _ in range(tries):
            if not self.is_alive():
                return True
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(error))
            self.join(0.05)
        return not self.is_alive()
