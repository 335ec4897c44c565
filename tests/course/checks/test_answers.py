"""Answers as readers write them: right ones in many styles pass, wrong ones are refused, and called what they are.

The tables `answers_ch*.py` were written from the chapters' sentences alone, before the checks were read.
"""

from importlib import import_module
from pathlib import Path

import pytest

from gclib.course.checks.engine import exercises_of
from tests.course.checks.test_checks import CHAPTERS

TABLES = sorted(path.stem.removeprefix("answers_") for path in Path(__file__).parent.glob("answers_ch*.py"))
ANSWERS = [answer for chapter in TABLES for answer in import_module(f"tests.course.checks.answers_{chapter}").ANSWERS]
EXERCISES = {exercise.key: exercise for chapter in TABLES for exercise in exercises_of(CHAPTERS[chapter])}
LEAST_NAMED = 0.85  # of the wrong ones; the others are told by their first difference

pytestmark = pytest.mark.filterwarnings("ignore")  # wrong answers do what torch warns of


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ANSWERS)), ids=lambda number: f"{ANSWERS[number].exercise}-{number}")
def test_an_answer_is_judged_as_what_it_is(number):
    answer = ANSWERS[number]
    verdict = EXERCISES[answer.exercise].judge(answer.function, seed=0)
    assert verdict.status == ("correct" if answer.right else "wrong"), (answer.words, verdict.explanation)
    assert verdict.misconception == answer.name, (answer.words, verdict.explanation)


def test_every_exercise_has_many_answers_and_most_wrong_ones_a_name():
    for key in EXERCISES:
        assert sum(answer.exercise == key for answer in ANSWERS) >= 10, key
    wrong = [answer for answer in ANSWERS if not answer.right]
    assert sum(answer.name is not None for answer in wrong) >= LEAST_NAMED * len(wrong)
