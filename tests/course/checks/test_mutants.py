"""No mutant of a solution that changes what it does passes its check; listed wrong answers keep their names reworded.

`python tests/course/checks/test_mutants.py ch05` lists every mutant of a chapter that changes nothing, and any that
wrongly passes.
"""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType

import numpy as np
import pytest
from helpers.mutants import Mutant, differs, mutants_of, observe
from helpers.rewriting import is_other_code, rewritten

from gclib.course.checks.engine import Exercise, Misconception, exercises_of
from tests.course.checks.test_checks import CHAPTERS, EXERCISES, NOTEBOOKS, functions_in, notebook, run_definition

SHARE = 10  # mutants of each exercise in `make test`; all of them under `make test-deep`
LEAST = {"share": 5, "all": 18}  # mutants of each exercise, of which most must be told from the solution
SECONDS = 30.0  # a mutant may loop for ever
UNCOUNTED = {  # costs that an exercise does not ask about
    "ch08.tiled_loss": frozenset({"computed", "counter"}),  # tiles made twice, and a few held at once, are allowed
}
every_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.key)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # mutants do what torch warns of


@dataclasses.dataclass
class Tally:
    """What became of an exercise's mutants, in words each: those that pass and change something should not be."""

    exercise: str
    told: list[str] = dataclasses.field(default_factory=list)
    alike: list[str] = dataclasses.field(default_factory=list)
    passed: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        count = f"{len(self.told)} told, {len(self.alike)} change nothing, {len(self.passed)} pass wrongly"
        lines = [f"    {kind}: {what}" for kind in ("alike", "passed") for what in getattr(self, kind)]
        return "\n".join([f"{self.exercise}: {count}", *lines])


@cache
def solution_and_mutants(exercise_key: str) -> tuple[Callable, tuple[Mutant, ...]]:
    """The function of the solutions' notebook, and its mutants."""
    exercise = next(exercise for exercise in EXERCISES if exercise.key == exercise_key)
    path = notebook(NOTEBOOKS / "solutions", exercise)
    inputs = exercise.makers[0](np.random.default_rng(0))
    texts = frozenset(name for name, value in inputs.items() if isinstance(value, str))
    mutants = mutants_of(functions_in(path)[exercise.name][0], texts)
    return run_definition(path, exercise.name), tuple(mutants)


def tally(exercise: Exercise, mutants: Sequence[Mutant], *, seeds: int, draws: int) -> Tally:
    """Judge each mutant on `seeds` seeds. One that passes any of them must do what the solution does on all inputs."""
    solution, found = solution_and_mutants(exercise.key)[0], Tally(exercise.key)
    patient = dataclasses.replace(exercise, seconds=SECONDS)
    rng = np.random.default_rng(sum(map(ord, exercise.key)))
    inputs = [maker(rng) for _ in range(draws) for maker in exercise.makers]
    uncounted = UNCOUNTED.get(exercise.key, frozenset())
    look = {"gradients": exercise.differentiable, "seconds": SECONDS, "uncounted": uncounted}
    expected = [observe(solution, given, seed=place, **look) for place, given in enumerate(inputs)]
    assert not any("error" in seen for seen in expected)
    for mutant in mutants:
        answer = mutant.compiled(solution.__globals__)
        if all(patient.judge(answer, seed=seed).status != "correct" for seed in range(seeds)):
            found.told.append(mutant.what)
            continue
        pairs = zip(inputs, expected, strict=True)
        seen = (differs(e, observe(answer, i, seed=n, **look), whole=exercise.whole) for n, (i, e) in enumerate(pairs))
        (found.passed if any(seen) else found.alike).append(mutant.what)
    return found


@every_exercise
def test_a_mutant_that_changes_the_result_never_passes(exercise):
    mutants = solution_and_mutants(exercise.key)[1]
    found = tally(exercise, mutants[:: max(1, len(mutants) // SHARE)][:SHARE], seeds=1, draws=6)
    assert not found.passed, str(found)
    assert len(found.told) >= LEAST["share"] and len(found.told) > 2 * len(found.alike), str(found)


@pytest.mark.deep
@every_exercise
def test_no_mutant_at_all_that_changes_the_result_passes(exercise):
    found = tally(exercise, solution_and_mutants(exercise.key)[1], seeds=3, draws=30)
    print(found)
    assert not found.passed, str(found)
    assert len(found.told) >= LEAST["all"] and len(found.told) > 3 * len(found.alike), str(found)


# Listed wrong answers in other words.


@cache
def reworded(exercise_key: str) -> tuple[Misconception, ...]:
    """The exercise's misconceptions out of its chapter's module, rewritten."""
    others = exercises_of(reworded_chapter(exercise_key.split(".")[0]))
    return next(tuple(exercise.misconceptions) for exercise in others if exercise.key == exercise_key)


@cache
def reworded_chapter(name: str) -> ModuleType:
    return rewritten(CHAPTERS[name])


@every_exercise
def test_a_listed_wrong_answer_in_other_words_keeps_its_name(exercise):
    for listed, other in zip(exercise.misconceptions, reworded(exercise.key), strict=True):
        verdict = exercise.judge(other.wrong, seed=0)
        assert (verdict.status, verdict.misconception) == ("wrong", listed.name)


def test_most_listed_wrong_answers_are_reworded():
    pairs = [pair for e in EXERCISES for pair in zip(e.misconceptions, reworded(e.key), strict=True)]
    others = sum(is_other_code(listed.wrong, other.wrong) for listed, other in pairs)
    assert len(pairs) >= 400 and others >= 0.9 * len(pairs), f"{others} of {len(pairs)} are other code"


def main(chapter: str) -> None:
    """Print what became of every mutant of the chapter's exercises."""
    warnings.simplefilter("ignore")
    for exercise in EXERCISES:
        if exercise.key.startswith(chapter):
            print(tally(exercise, solution_and_mutants(exercise.key)[1], seeds=3, draws=30), flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "ch")
