"""Exercises that name the misconception: an oracle, random inputs, and wrong answers known by what they do.

An `Exercise` is declared in some twenty lines (see `ch01`), and called with the learner's function:

    ch01.info_nce(info_nce)

It runs the function on fresh random inputs, in a thread with a time limit, holds every outcome against
the oracle's, and prints one verdict: correct; not attempted (the stub still runs, so the notebook does
too); or wrong. A wrong answer is compared with each known misconception *on the same inputs*: a
misconception is a wrong reference implementation, so it is recognised by behaviour however the learner
wrote it. A wrong try earns the next of three hints, if it came as far as a value, or to a mistake with a
name, and is another answer than the last. Under GCLIB_STRICT=1 whatever is not correct raises
AssertionError, and nothing is recorded.
"""

import ast
import hashlib
import inspect
import os
import secrets
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import CodeType, ModuleType

import numpy as np

from . import progress
from .comparing import describe
from .judging import Case, Draw, Maker, Misconception, Slip, Task, Verdict, judge_cases, run_case
from .running import generators_kept

__all__ = ["Exercise", "Misconception", "Slip", "Verdict", "count_lines", "exercises_of"]


@dataclass(frozen=True, kw_only=True)
class Exercise(Task):
    """A task with its words. Calling it with an answer prints the verdict; `judge` returns it and prints nothing.

    without  names that the answer's code must not use: those would do the exercise for the learner
    repeats  draws of each maker that the answer is judged on
    """

    chapter: int
    spec: str
    line_budget: int
    hints: tuple[str, str, str]
    without: frozenset[str] = frozenset()
    repeats: int = 5

    @property
    def key(self) -> str:
        """The exercise's name in the record of progress: "ch01.info_nce"."""
        return f"ch{self.chapter:02d}.{self.name}"

    def __repr__(self) -> str:
        return f"{self.key}: {self.spec} (at most {_lines(self.line_budget)})"

    def __call__(self, answer: Callable) -> None:
        """Judge `answer`, print the verdict and record it (strict mode: raise instead of recording)."""
        verdict = self.judge(answer)
        if os.environ.get("GCLIB_STRICT") == "1":
            if verdict.status != "correct":
                raise AssertionError(self._tell(verdict, hints=0))
            print(self._tell(verdict, hints=0))
            return
        print(self._tell(verdict, hints=_record(self.key, verdict, _fingerprint(answer))))

    def judge(self, answer: Callable, *, seed: int | None = None) -> Verdict:
        """The verdict on `answer`, on fresh random inputs or those of `seed`; nothing is printed."""
        if answer is None or answer is ...:
            return Verdict("not attempted", "There is no function yet.")
        if not callable(answer):
            said = f"The check needs the function itself, not a call of it: got {describe(answer)}."
            return Verdict("wrong", f"{said} Write {self.key}({self.name}).")
        rng = np.random.default_rng(secrets.randbits(64) if seed is None else seed)
        with generators_kept():
            drawn = [[self._draw(maker, rng) for _ in range(self.repeats)] for maker in self.makers]
            for number, draws in enumerate(drawn):
                others = [group[0] for place, group in enumerate(drawn) if place != number]
                verdict = judge_cases(self, answer, list(map(self._case, draws)), others, answered=number > 0)
                if verdict is not None:
                    return verdict
        if used := sorted(self.without & _names(getattr(answer, "__code__", None))):
            said = f"The values are right, but `{used[0]}` does the work: the exercise is to write it out yourself."
            return Verdict("wrong", said, "left to a function that does it", earns_hint=True)
        return Verdict("correct", self._praise(answer))

    @staticmethod
    def _draw(maker: Maker, rng: np.random.Generator) -> Draw:
        return Draw(maker(rng), int(rng.integers(2**31)))

    def _case(self, draw: Draw) -> Case:
        expected, gradients, _ = run_case(self, self.oracle, draw.inputs, draw.seed)
        return Case(draw.inputs, draw.seed, expected, gradients)

    def _praise(self, answer: Callable) -> str:
        tried = len(self.makers) * self.repeats
        said = f"It agrees with the reference on {tried} random inputs"
        said += ", gradients included." if self.differentiable else "."
        used = count_lines(answer)
        if used is None:
            return said
        if used <= self.line_budget:
            return f"{said} Lines: {used} of at most {self.line_budget}."
        return f"{said} It takes {_lines(used)}; {self.line_budget} would do: can you shorten it?"

    def _tell(self, verdict: Verdict, *, hints: int) -> str:
        if verdict.status == "not attempted":
            todo = f"To do, in at most {_lines(self.line_budget)}: {self.spec}"
            return f"{self.name}: not attempted yet. {verdict.explanation}\n{todo}\nThen run this cell again."
        if verdict.status == "correct":
            return f"{self.name}: correct. {verdict.explanation}"
        lines = [f"{self.name}: wrong. {verdict.explanation}"]
        if hints:
            tier = min(hints, len(self.hints))
            lines.append(f"Hint {tier} of {len(self.hints)}: {self.hints[tier - 1]}")
        if hints > len(self.hints):
            lines.append(
                f"A worked answer is in the folder solutions, beside this chapter: {self.chapter:02d}_*.ipynb."
            )
        return "\n".join(lines)


def exercises_of(module: ModuleType) -> list[Exercise]:
    """The exercises that a chapter's module declares, in its order."""
    return [value for value in vars(module).values() if isinstance(value, Exercise)]


def _lines(count: int) -> str:
    return f"{count} line" if count == 1 else f"{count} lines"


def count_lines(answer: Callable) -> int | None:
    """Lines of code in the body of `answer`; docstring, comments and blanks are free. None without source."""
    try:
        source = textwrap.dedent(inspect.getsource(answer))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(function, ast.FunctionDef):
        return None
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    text = source.splitlines()
    numbers = {n for part in body for n in range(part.lineno, part.end_lineno + 1)}
    return sum(1 for n in numbers if text[n - 1].strip() and not text[n - 1].strip().startswith("#"))


def _names(code: CodeType | None) -> set[str]:
    """Every global name and attribute that a function's code uses, functions inside it included."""
    if code is None:
        return set()
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _fingerprint(answer: Callable) -> str | None:
    """Changes when the answer's code does, and not with its comments. None where there is no code to look at."""
    code = getattr(answer, "__code__", None)
    return None if code is None else hashlib.sha256(repr(_told_code(code)).encode()).hexdigest()[:16]


def _told_code(code: CodeType) -> tuple:
    parts = [_told_code(part) if isinstance(part, CodeType) else part for part in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, parts


def _record(key: str, verdict: Verdict, fingerprint: str | None) -> int:
    """Note the verdict for the dashboard; returns the number of hints earned since the last correct answer."""
    if verdict.status == "not attempted":
        return 0
    now = datetime.now(UTC).isoformat(timespec="seconds")

    def change(record: dict) -> None:
        entry = record.get(key)
        if not isinstance(entry, dict):
            entry = record[key] = {"tries": 0, "solved": None, "misconceptions": {}}
        again = fingerprint is not None and fingerprint == entry.get("answer")
        entry |= {"status": verdict.status, "last": now, "tries": entry["tries"] + 1, "answer": fingerprint}
        entry.setdefault("hints", 0)
        if verdict.status == "correct":
            entry |= {"solved": entry["solved"] or now, "hints": 0}
            return
        entry["hints"] += verdict.earns_hint and not again
        if verdict.misconception is not None:
            seen = entry["misconceptions"]
            seen[verdict.misconception] = seen.get(verdict.misconception, 0) + 1

    return progress.update("exercises", change)[key]["hints"]
