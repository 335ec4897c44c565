"""Answers as readers write them, chapters 06 to 15: right ones pass, wrong ones don't, and keep their names."""

from importlib import import_module

import pytest

from tests.course.checks.test_checks import CHAPTERS

ANSWERS = [
    answer
    for chapter in ("ch06", "ch07", "ch08", "ch09", "ch10", "ch11", "ch13", "ch15")
    for answer in import_module(f"tests.course.checks.answers_{chapter}").ANSWERS
]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # wrong answers do what torch warns of


def exercise_of(answer):
    chapter, name = answer.exercise.split(".")
    return getattr(CHAPTERS[chapter], name)


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: f"{answer.exercise}.{answer.function.__name__}")
def test_an_answer_gets_the_verdict_that_it_deserves(answer):
    verdict = exercise_of(answer).judge(answer.function, seed=0)
    assert verdict.status == ("correct" if answer.right else "wrong"), verdict.explanation
    assert verdict.misconception == answer.name, verdict.explanation


def test_ten_and_more_for_each_exercise_and_most_of_the_wrong_named():
    wrong = [answer for answer in ANSWERS if not answer.right]
    assert sum(answer.name is not None for answer in wrong) >= 0.85 * len(wrong)
    exercises = {answer.exercise for answer in ANSWERS}
    assert len(exercises) == 31 and all(sum(a.exercise == e for a in ANSWERS) >= 10 for e in exercises)
