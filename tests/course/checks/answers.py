"""Answers as readers write them, kept as tests: `right` ones pass, `wrong` ones are refused, most with a name.

An answer is registered by a decorator, or by a call with a lambda:

    right, wrong, ANSWERS = answers_to("ch00")
    right("tensor_bytes")(lambda shape, bits: ...)
    @wrong("tensor_bytes", "bits for bytes")     # the misconception or slip that must be named; None: none has a name
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """`name`: of the misconception that must be told, None where the first difference is told instead."""

    exercise: str
    function: Callable
    right: bool
    name: str | None = None
    words: str = ""


def answers_to(chapter: str) -> tuple[Callable, Callable, list[Answer]]:
    """(decorator of right answers, decorator of wrong ones, the list that both fill)."""
    answers: list[Answer] = []

    def right(exercise: str) -> Callable:
        def keep(function: Callable) -> Callable:
            answers.append(Answer(f"{chapter}.{exercise}", function, right=True))
            return function

        return keep

    def wrong(exercise: str, name: str | None, words: str = "") -> Callable:
        def keep(function: Callable) -> Callable:
            answers.append(Answer(f"{chapter}.{exercise}", function, right=False, name=name, words=words))
            return function

        return keep

    return right, wrong, answers
