"""Answers as readers write them, right and wrong, collected by chapter: `tests/course/answers` holds them."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """A reader's function for an exercise; `name` is what a wrong one is called, "" where no name is known."""

    exercise: str
    function: Callable
    right: bool
    name: str = ""


class Answers(list):
    """The answers of a chapter: a list that two decorators fill."""

    def right(self, exercise: str) -> Callable:
        return lambda function: self._add(Answer(exercise, function, right=True))

    def wrong(self, exercise: str, name: str = "") -> Callable:
        return lambda function: self._add(Answer(exercise, function, right=False, name=name))

    def _add(self, answer: Answer) -> Callable:
        self.append(answer)
        return answer.function
