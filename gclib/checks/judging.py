"""The judging itself: run an answer, find its first fault, and recognise the misconception behind it."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .comparing import describe, difference
from .running import TooSlow, is_stub_error, run_limited, seed_generators, tell_error

if TYPE_CHECKING:
    from .engine import Exercise

Inputs = dict[str, object]  # an answer's arguments by name, in the order of its signature
Maker = Callable[[np.random.Generator], Inputs]


@dataclass(frozen=True)
class Misconception:
    """A wrong answer that people give: `wrong(*inputs)` does what they do, `message` says what that is."""

    name: str
    message: str
    wrong: Callable


@dataclass(frozen=True)
class Verdict:
    """What was found: `explanation` in words; `misconception` is the name of the one recognised, if any."""

    status: Literal["correct", "not attempted", "wrong"]
    explanation: str
    misconception: str | None = None


@dataclass(frozen=True)
class Case:
    """One set of random inputs with the oracle's outcome on them, and its gradients if they count."""

    inputs: Inputs
    expected: object
    gradients: dict[str, Tensor]
    seed: int


def run_case(exercise: "Exercise", function: Callable, inputs: Inputs, seed: int) -> tuple[object, dict, str | None]:
    """What `function` does with a copy of `inputs`: outcome, gradients, name of an input it changed."""
    leaves, given = {}, {}
    for name, value in inputs.items():
        given[name] = copy.deepcopy(value)
        if exercise.differentiable and isinstance(value, Tensor) and value.is_floating_point():
            leaves[name] = given[name].requires_grad_()
            given[name] = leaves[name].clone()
    seed_generators(seed)
    result = function(*given.values())
    changed = next((name for name in inputs if _changed(exercise, name, inputs, given)), None)
    found = result if exercise.outcome is None else exercise.outcome(result, *given.values())
    gradients = {} if changed else _gradients(result, leaves)
    return found, gradients, changed


def _changed(exercise: "Exercise", name: str, before: Inputs, after: Inputs) -> bool:
    old, new = before[name], after[name]
    if name in exercise.may_change or callable(old) and not isinstance(old, nn.Module):
        return False
    if isinstance(old, nn.Module):
        old, new = dict(old.state_dict()), dict(new.state_dict())
    return difference(old, new, rtol=0, atol=0) is not None


def _gradients(result: object, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    if not leaves or not isinstance(result, Tensor) or not result.requires_grad or result.numel() == 0:
        return {}
    found = torch.autograd.grad(result.sum(), list(leaves.values()), allow_unused=True)
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def judge_cases(exercise: "Exercise", answer: Callable, cases: list[Case]) -> Verdict | None:
    """The verdict on the draws of one maker; None when the answer is right on all of them."""
    outcomes = []
    for case in cases:
        verdict, outcome = _attempt(exercise, answer, case)
        if verdict is not None:
            return verdict
        outcomes.append(outcome)
    faults = [_fault(exercise, case, outcome) for case, outcome in zip(cases, outcomes, strict=True)]
    if not any(faults):
        return None
    place, fault = next((i, fault) for i, fault in enumerate(faults) if fault)
    where = _describe_inputs(cases[place].inputs)
    recognised = _recognise(exercise, cases, [outcome[0] for outcome in outcomes])
    if recognised is None:
        return Verdict("wrong", f"{fault}\n    Input: {where}.")
    return Verdict("wrong", f"{recognised.message}\n    {fault}\n    Input: {where}.", recognised.name)


def _attempt(exercise: "Exercise", answer: Callable, case: Case) -> tuple[Verdict | None, tuple]:
    """Run the answer once: a verdict when it does not come back with a value, else its outcome."""
    where = f"\n    Input: {_describe_inputs(case.inputs)}."
    try:
        inspect.signature(answer).bind(*case.inputs.values())
    except TypeError as error:
        takes = f"{exercise.name}({', '.join(case.inputs)})"
        return Verdict("wrong", f"The check calls {takes}, and your function cannot be ({error})."), ()
    except ValueError:
        pass  # a callable without a signature: call it and see
    try:
        outcome = run_limited(lambda: run_case(exercise, answer, case.inputs, case.seed), exercise.seconds)
    except TooSlow as error:
        rest = " It is still running: restart the kernel to stop it." if error.still_running else ""
        return Verdict("wrong", f"It gave {error}: does a loop never end?{rest}{where}"), ()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if is_stub_error(error):
            return Verdict("not attempted", "The function above is still the stub."), ()
        return Verdict("wrong", tell_error(answer, error) + where), ()
    if _did_nothing(exercise, outcome[0], case):
        said = "The function above returns nothing; if you have written it, does it end in `return`?"
        return Verdict("not attempted", said), ()
    return None, outcome


def _did_nothing(exercise: "Exercise", found: object, case: Case) -> bool:
    """True for None or Ellipsis, and where effects count instead of a result, for no effect at all."""
    if exercise.outcome is None:
        return found is None or found is ...
    untouched = exercise.outcome(None, *copy.deepcopy(case.inputs).values())
    return difference(untouched, found, rtol=0, atol=0) is None


def _fault(exercise: "Exercise", case: Case, outcome: tuple) -> str | None:
    """What is wrong with one outcome, in words; None when nothing is."""
    found, gradients, changed = outcome
    if changed is not None:
        return f"It changes its input `{changed}` in place: work on a copy."
    if fault := _difference(exercise, case.expected, found):
        return fault[0].upper() + fault[1:] + "."
    for name, gradient in case.gradients.items():
        if name not in gradients:
            cut = ".item(), .detach(), torch.tensor(...) or no_grad"
            return f"The value is right, but no gradient reaches `{name}`: {cut} cuts it off."
        error = (gradients[name] - gradient).norm() / gradient.norm().clamp(min=exercise.atol)
        if not error <= exercise.gradient_error:
            return f"The value is right, but the gradient of `{name}` is not: it is off by {error:.1%} of its length."
    return None


def _difference(exercise: "Exercise", expected: object, found: object) -> str | None:
    return difference(expected, found, rtol=exercise.rtol, atol=exercise.atol)


def _recognise(exercise: "Exercise", cases: list[Case], found: list[object]) -> Misconception | None:
    """The first misconception that gives what the answer gave, on every one of these inputs."""
    for misconception in exercise.misconceptions:
        same = (
            _difference(exercise, run_case(exercise, misconception.wrong, case.inputs, case.seed)[0], value) is None
            for case, value in zip(cases, found, strict=True)
        )
        if all(same):
            return misconception
    return None


def _describe_inputs(inputs: Inputs) -> str:
    return ", ".join(f"{name} = {describe(value)}" for name, value in inputs.items())
