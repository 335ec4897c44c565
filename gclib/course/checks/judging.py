"""The judging itself: run an answer, find its first fault, and recognise the misconception behind it."""

import copy
import inspect
import math
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from .comparing import describe, difference, other_form
from .running import TooSlow, is_stub, is_stub_error, run_limited, seed_generators, tell_error

Inputs = dict[str, object]  # an answer's arguments by name, in the order of its signature
Maker = Callable[[np.random.Generator], Inputs]


@dataclass(frozen=True)
class Misconception:
    """A wrong answer that people give: `wrong(*inputs)` does what they do, `message` says what that is."""

    name: str
    message: str
    wrong: Callable


@dataclass(frozen=True)
class Slip:
    """A mistake that ends in an error: `pattern` is searched for in its type and text, `message` says what it means."""

    name: str
    message: str
    pattern: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an answer is judged by.

    oracle          the right answer; it shares no code with the solution in the notebook
    makers          functions of a numpy Generator that return inputs, from ordinary to extreme: the answer is judged on
                    draws of each in turn, and compared with the misconceptions, in order, on the first that it fails
    outcome         outcome(result, *inputs afterwards) -> the values to compare; by default the result itself
    note            note(expected, got, *inputs) -> a sentence about their first difference, or ""
    slips           mistakes that end in an error, known by its text
    differentiable  the gradients of the float inputs must agree too: ||difference|| <= gradient_error * ||gradient||
    may_change      names of inputs that the answer is allowed to change
    whole           an int is asked for: a float of the same value is not enough
    seconds         the most that one call of the answer may take
    """

    name: str
    oracle: Callable
    makers: Sequence[Maker]
    misconceptions: Sequence[Misconception]
    outcome: Callable | None = None
    note: Callable | None = None
    slips: Sequence[Slip] = ()
    differentiable: bool = False
    may_change: frozenset[str] = frozenset()
    whole: bool = False
    rtol: float = 1e-4
    atol: float = 1e-5
    gradient_error: float = 1e-3
    seconds: float = 10.0


FORMS = ("another form", "input changed in place", "a float for an int", "graph cut off", "nothing returned")


@dataclass(frozen=True)
class Verdict:
    """What was found: `explanation` in words; `misconception` is the one recognised, or one of FORMS, if any.

    earns_hint: the answer came as far as a value, or to a mistake with a name.
    """

    status: Literal["correct", "not attempted", "wrong"]
    explanation: str
    misconception: str | None = None
    earns_hint: bool = False


@dataclass(frozen=True)
class Draw:
    """One set of random inputs, and the seed of whatever is run on them."""

    inputs: Inputs
    seed: int


@dataclass(frozen=True)
class Case(Draw):
    """A draw with the oracle's outcome on it, and its gradients if they count."""

    expected: object
    gradients: dict[str, Tensor]


class CalledBackward(Exception):
    """An answer that should return a number with its graph has backpropagated it already."""


class GradientsOff(Exception):
    """An answer has switched gradients off, and not on again."""


class OtherForm(Exception):
    """What an answer returned can't be taken apart as the form that is asked for."""


def run_case(task: Task, function: Callable, inputs: Inputs, seed: int) -> tuple[object, dict, str | None]:
    """What `function` does with a copy of `inputs`: outcome, gradients, name of an input it changed.

    Raises what `function` raises, and CalledBackward where gradients count and it has taken them itself.
    """
    leaves, arguments = {}, {}
    for name, value in inputs.items():
        arguments[name] = _copied(value)
        if task.differentiable and isinstance(value, Tensor) and value.is_floating_point():
            leaves[name] = arguments[name].requires_grad_()
            arguments[name] = leaves[name].clone()
    seed_generators(seed)
    try:
        result = function(*arguments.values())
        if not torch.is_grad_enabled():
            raise GradientsOff
    finally:
        torch.set_grad_enabled(True)
    if any(leaf.grad is not None for leaf in leaves.values()):
        raise CalledBackward
    changed = next((name for name in inputs if _changed(task, name, inputs, arguments)), None)
    try:
        outcome = result if task.outcome is None else task.outcome(result, *arguments.values())
    except RuntimeError:  # a backward of what is returned, say: its own words tell more
        raise
    except Exception as error:
        raise OtherForm(describe(result)) from error
    gradients = {} if changed else _gradients(result, leaves)
    return outcome, gradients, changed


def _copied(value: object) -> object:
    """A deep copy; a module's parameters keep what is in their `.grad`, which PyTorch's copy leaves out."""
    found = copy.deepcopy(value)
    if isinstance(value, nn.Module):
        for old, new in zip(value.parameters(), found.parameters(), strict=True):
            new.grad = None if old.grad is None else old.grad.clone()
    return found


def _changed(task: Task, name: str, before: Inputs, after: Inputs) -> bool:
    old, new = before[name], after[name]
    if name in task.may_change or callable(old) and not isinstance(old, nn.Module):
        return False
    if isinstance(old, nn.Module):
        old, new = _state_of(old), _state_of(new)
    return difference(old, new, rtol=0, atol=0) is not None


def _state_of(module: nn.Module) -> dict[str, object]:
    """Its tensors, which parts are in training mode, and which parameters ask for a gradient."""
    modes = {f"{name}.training": part.training for name, part in module.named_modules()}
    asks = {f"{name}.requires_grad": parameter.requires_grad for name, parameter in module.named_parameters()}
    return dict(module.state_dict()) | modes | asks


def _gradients(result: object, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    if not leaves or not isinstance(result, Tensor) or not result.requires_grad or result.numel() == 0:
        return {}
    gradients = torch.autograd.grad(result.sum(), list(leaves.values()), allow_unused=True)
    return {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}


def judge_cases(
    task: Task, answer: Callable, cases: list[Case], others: Sequence[Draw] = (), *, answered: bool = False
) -> Verdict | None:
    """The verdict on the draws of one maker; None when the answer is right on all of them.

    others: draws of the other makers; a misconception is named only if it does there what the answer does.
    answered: the answer has returned values before, for another maker.
    """
    outcomes = []
    for case in cases:
        verdict, outcome = _attempt(task, answer, case, others, answered=answered or bool(outcomes))
        if verdict is not None:
            return verdict
        outcomes.append(outcome)
    faults = [_fault(task, case, outcome) for case, outcome in zip(cases, outcomes, strict=True)]
    if not any(faults):
        return None
    place, fault = next((i, fault) for i, fault in enumerate(faults) if fault)
    where = _describe_inputs(cases[place].inputs)
    recognised = _recognise(task, answer, cases, outcomes, others)
    if recognised is None:
        fault += _ratio(cases, outcomes)
        kind = _kind_of_fault(task, cases[place], outcomes[place])
        return Verdict("wrong", f"{fault}\n    Input: {where}.", kind, earns_hint=True)
    said = f"What it gives is what a known mistake gives. {recognised.message}\n    {fault}\n    Input: {where}."
    return Verdict("wrong", said, recognised.name, earns_hint=True)


def _attempt(
    task: Task, answer: Callable, case: Case, others: Sequence[Draw], *, answered: bool
) -> tuple[Verdict | None, tuple]:
    """Run the answer once: a verdict when it does not come back with a value, else its outcome."""
    where = f"\n    Input: {_describe_inputs(case.inputs)}."
    try:
        inspect.signature(answer).bind(*case.inputs.values())
    except TypeError as error:
        takes = f"{task.name}({', '.join(case.inputs)})"
        return Verdict("wrong", f"The check calls {takes}, and your function cannot be ({error})."), ()
    except ValueError:
        pass  # a callable without a signature: call it and see
    try:
        outcome = run_limited(lambda: run_case(task, answer, case.inputs, case.seed), task.seconds)
    except TooSlow as error:
        rest = " It is still running: restart the kernel to stop it." if error.still_running else ""
        return Verdict("wrong", f"It gave {error}: does a loop never end?{rest}{where}"), ()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if is_stub_error(error):
            if is_stub(answer):
                return Verdict("not attempted", "The function above is still the stub."), ()
            *_, (raising, _) = traceback.walk_tb(error.__traceback__)
            said = f"It calls {raising.f_code.co_name}, which is still a stub."
            if raising.f_code is inspect.unwrap(answer).__code__:
                said = "It raises NotImplementedError: if that is the stub's last line, take it away."
            return Verdict("wrong", f"{said}{where}"), ()
        return _judge_error(task, tell_error(answer, error) + where, error), ()
    if _did_nothing(task, outcome[0], case):
        elsewhere = answered or any(_does_something(task, answer, other) for other in others)
        return _judge_nothing(task, case, where, elsewhere=elsewhere), outcome
    return None, outcome


def _judge_nothing(task: Task, case: Case, where: str, *, elsewhere: bool) -> Verdict | None:
    """The verdict on an answer that did nothing here; None where only effects count, and it has some elsewhere."""
    by_effect = task.outcome is not None and task.oracle(*map(_copied, case.inputs.values())) is None
    if elsewhere and by_effect:
        return None
    if elsewhere:
        said = "It returns nothing for this input, and a value for others: does every way through it end in `return`?"
        return Verdict("wrong", f"{said}{where}", "nothing returned", earns_hint=True)
    nothing = "The function above returns nothing; if you have written it: does it end in `return`?"
    if by_effect:
        nothing = (
            "The function above does nothing that is asked for; if you have written it: does it change what came in "
            "(a new value with its name is no change)?"
        )
    return Verdict("not attempted", nothing)


_BACKWARD_INSIDE = (
    "Your function calls backward itself. Only the number is asked for, with its graph: return that, and let whoever "
    "calls the function backpropagate it."
)


_GRADIENTS_OFF = (
    "Gradients are switched off when your function returns, for every cell that follows. Use the context: `with "
    "torch.no_grad():` switches them on again at its end."
)


def _judge_error(task: Task, told: str, error: BaseException) -> Verdict:
    """The verdict on an answer that raised: with the name of the slip behind it, where it is known."""
    if isinstance(error, CalledBackward):
        return Verdict("wrong", _BACKWARD_INSIDE, "backward inside", earns_hint=True)
    if isinstance(error, GradientsOff):
        return Verdict("wrong", _GRADIENTS_OFF, "gradients left off", earns_hint=True)
    cause = error.__cause__ if isinstance(error, OtherForm) else error
    for slip in task.slips:
        if re.search(slip.pattern, f"{type(cause).__name__}: {cause}"):
            said = f"A known mistake ends in this error. {slip.message}\n    {told}"
            return Verdict("wrong", said, slip.name, earns_hint=True)
    if isinstance(error, OtherForm):
        form = f"It returned {error}, and that is not the form asked for: {getattr(task, 'spec', task.name)}"
        return Verdict("wrong", form, "another form", earns_hint=True)
    return Verdict("wrong", told)


def _did_nothing(task: Task, found: object, case: Draw) -> bool:
    """True for None or Ellipsis, and where effects count instead of a result, for no effect at all."""
    if task.outcome is None:
        return found is None or found is ...
    untouched = task.outcome(None, *map(_copied, case.inputs.values()))
    return difference(untouched, found, rtol=0, atol=0) is None


def _fault(task: Task, case: Case, outcome: tuple) -> str | None:
    """What is wrong with one outcome, in words; None when nothing is."""
    found, gradients, changed = outcome
    if changed is not None and isinstance(case.inputs[changed], nn.Module):
        what = "its weights, its mode (train or eval), or what asks for a gradient"
        return f"It leaves its input `{changed}` changed: {what}. Whoever calls it goes on with that."
    if changed is not None:
        return f"It changes its input `{changed}` in place, and this exercise does not allow that: work on a copy."
    if fault := _difference(task, case.expected, found):
        note = "" if task.note is None else task.note(case.expected, found, *case.inputs.values())
        return f"{fault[0].upper()}{fault[1:]}.{note and f' {note}'}"
    if task.whole and _is_fraction(case.expected, found):
        return (
            "The value is right, but it is a float, and an int is asked for: stay with whole numbers (// divides them)."
        )
    for name, gradient in case.gradients.items():
        if name not in gradients:
            cut = ".item(), .detach(), torch.tensor(...), no_grad or the like"
            return f"The value is right, but no gradient reaches `{name}`: {cut} cuts it off."
        error = (gradients[name] - gradient).norm() / gradient.norm().clamp(min=task.atol)
        if not error <= task.gradient_error:
            return f"The value is right, but the gradient of `{name}` is not: it is off by {error:.1%} of its length."
    return None


def _difference(task: Task, expected: object, found: object) -> str | None:
    return difference(expected, found, rtol=task.rtol, atol=task.atol)


def _is_fraction(expected: object, found: object) -> bool:
    """Whether a number that is an int in `expected` is packed as a float."""
    if isinstance(expected, dict):
        return any(_is_fraction(value, found[key]) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        return any(map(_is_fraction, expected, found))
    if not isinstance(expected, int):
        return False
    return found.is_floating_point() if isinstance(found, Tensor) else isinstance(found, float | np.floating)


def _kind_of_fault(task: Task, case: Case, outcome: tuple) -> str | None:
    """The name of a fault that lies in the answer's form and not in its values; None for any other."""
    found, _, changed = outcome
    if changed is not None:
        return "input changed in place"
    if _difference(task, case.expected, found) is not None:
        return "another form" if other_form(case.expected, found) else None
    if task.whole and _is_fraction(case.expected, found):
        return "a float for an int"
    missing = any(name not in outcome[1] for name in case.gradients)
    return "graph cut off" if missing else None


def _ratio(cases: list[Case], outcomes: list[tuple]) -> str:
    """A sentence where every value is the same multiple of the right one, on all of these inputs; else ""."""
    ratios = []
    for case, (found, *_) in zip(cases, outcomes, strict=True):
        try:
            right, got = (torch.as_tensor(value).detach().double().flatten() for value in (case.expected, found))
        except (TypeError, ValueError, RuntimeError):
            return ""
        if right.shape != got.shape or not right.isfinite().all() or not got.isfinite().all():
            return ""
        if right.norm() > 0:
            ratios.append((got @ right / (right @ right)).item())
            if not torch.allclose(got, ratios[-1] * right, rtol=1e-4, atol=1e-6 * right.abs().max().item()):
                return ""
    if len(ratios) < 2 or not all(math.isclose(ratio, ratios[0], rel_tol=1e-4) for ratio in ratios):
        return ""
    ratio = ratios[0]
    if ratio == 0 or math.isclose(ratio, 1, rel_tol=1e-3):
        return ""
    if math.isclose(ratio, -1, rel_tol=1e-4):
        return " On all of these inputs yours is right but for its sign."
    inverse = 1 / ratio
    if abs(inverse) > 1 and math.isclose(inverse, round(inverse), rel_tol=1e-4):
        return f" On all of these inputs yours is the right value divided by {describe(round(inverse))}."
    return f" On all of these inputs yours is {describe(float(f'{ratio:.4g}'))} times the right value."


def _recognise(
    task: Task, answer: Callable, cases: list[Case], outcomes: list[tuple], others: Sequence[Draw]
) -> Misconception | None:
    """The first misconception that does what the answer did, on every one of these inputs, and is wrong there.

    On the other makers' draws it must do the same as the answer, too: the same value, or an error where that has one.

    Values decide. Where all of them are right, and the fault lies in the gradients, the gradients must be the same.
    """
    pairs = list(zip(cases, outcomes, strict=True))
    by_gradients = all(_difference(task, case.expected, outcome[0]) is None for case, outcome in pairs)
    elsewhere = None
    for misconception in task.misconceptions:
        if all(_does_the_same(task, misconception, *pair, by_gradients) for pair in pairs):
            elsewhere = [_value_of(task, answer, case) for case in others] if elsewhere is None else elsewhere
            theirs = (_value_of(task, misconception.wrong, case) for case in others)
            if all(_same_value(task, *both) for both in zip(theirs, elsewhere, strict=True)):
                return misconception
    return None


_NO_VALUE = object()


def _value_of(task: Task, function: Callable, case: Draw) -> object:
    """What `function` comes to on this input; _NO_VALUE where it raises or takes too long."""
    try:
        return run_limited(lambda: run_case(task, function, case.inputs, case.seed), task.seconds)[0]
    except (Exception, TooSlow):
        return _NO_VALUE


def _does_something(task: Task, function: Callable, case: Draw) -> bool:
    value = _value_of(task, function, case)
    return value is not _NO_VALUE and not _did_nothing(task, value, case)


def _same_value(task: Task, one: object, other: object) -> bool:
    if one is _NO_VALUE or other is _NO_VALUE:
        return one is other
    try:
        return _difference(task, one, other) is None
    except TypeError:
        return False


def _does_the_same(task: Task, misconception: Misconception, case: Case, outcome: tuple, by_gradients: bool) -> bool:
    try:
        theirs = run_case(task, misconception.wrong, case.inputs, case.seed)
    except Exception:  # a wrong reference may fail on inputs that another maker made
        return False
    if _difference(task, theirs[0], outcome[0]) is not None:
        return False
    if not by_gradients:
        return True
    alike = difference(theirs[1], outcome[1], rtol=task.gradient_error, atol=task.gradient_error) is None
    as_faulty = (_fault(task, case, theirs) is None) == (_fault(task, case, outcome) is None)
    return alike and theirs[2] == outcome[2] and as_faulty


def _describe_inputs(inputs: Inputs) -> str:
    return ", ".join(f"{name} = {describe(value)}" for name, value in inputs.items())
