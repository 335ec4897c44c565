"""Chapters 00 to 05: right answers in many styles pass, wrong ones are refused, and called what they are.

The tables `answers_ch*.py` were written from the chapters' sentences alone, before the checks were read.
"""

import importlib

import pytest

from gclib.course.checks.engine import exercises_of
from tests.course.checks.test_checks import CHAPTERS

TABLES = [f"ch{number:02d}" for number in range(6)]
ANY = "?"  # no name is demanded of this answer
LEAST_NAMED = 0.75  # of the wrong ones; the others are of a wrong type or form, or told by their first difference


def answers_of(chapter):
    return importlib.import_module(f"tests.course.checks.answers_{chapter}").ANSWERS


CASES = [
    pytest.param(answer, marks=pytest.mark.slow if chapter == "ch05" else (), id=f"{answer.exercise}-{number}")
    for chapter in TABLES
    for number, answer in enumerate(answers_of(chapter))
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("answer", CASES)
def test_an_answer_is_judged_as_what_it_is(answer):
    exercises = {exercise.key: exercise for exercise in exercises_of(CHAPTERS[answer.exercise[:4]])}
    verdict = exercises[answer.exercise].judge(answer.function, seed=0)
    assert verdict.status == ("correct" if answer.right else "wrong"), answer.words
    if answer.name != ANY:
        assert verdict.misconception == answer.name, answer.words


@pytest.mark.parametrize("chapter", TABLES)
def test_every_exercise_has_many_answers_and_most_wrong_ones_a_name(chapter):
    answers = answers_of(chapter)
    for exercise in exercises_of(CHAPTERS[chapter]):
        assert sum(answer.exercise == exercise.key for answer in answers) >= 10
    wrong = [answer for answer in answers if not answer.right]
    assert sum(answer.name is not None for answer in wrong) >= LEAST_NAMED * len(wrong)
