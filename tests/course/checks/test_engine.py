"""The engine itself: what it says of answers that raise, loop, mutate, or return something else; hints; records."""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import random
import signal
import sys
import threading
import time
import traceback

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gclib.course.checks.comparing import describe, difference
from gclib.course.checks.engine import Exercise, Misconception, Slip, count_lines
from gclib.course.checks.judging import FORMS

double = Exercise(
    chapter=1,
    name="double",
    spec="twice the tensor.",
    line_budget=1,
    oracle=lambda values, names: values * 2,
    makers=(lambda rng: {"values": torch.from_numpy(rng.standard_normal(4)).float(), "names": ["a", "b"]},),
    misconceptions=(Misconception("squared", "It squares.", lambda values, names: values**2),),
    hints=("first", "second", "third"),
    differentiable=True,
)


@pytest.fixture(autouse=True)
def own_progress(monkeypatch, tmp_path):
    monkeypatch.setenv("GCLIB_PROGRESS_FOLDER", str(tmp_path))
    monkeypatch.delenv("GCLIB_STRICT", raising=False)
    return tmp_path / "exercises.json"


def explain(answer, exercise=double):
    verdict = exercise.judge(answer)
    assert verdict.status == "wrong" and verdict.misconception in {None, *FORMS}
    return verdict.explanation


def stub(values, names):
    raise NotImplementedError


def stub_with_words(values, names):
    raise NotImplementedError("write this one")


def stub_calling_nothing(values, names): ...


def ellipsis_stub(values, names):
    return ...


@pytest.mark.parametrize("answer", [None, ..., stub, stub_with_words, stub_calling_nothing, ellipsis_stub])
def test_stubs_are_not_attempted(answer, capsys, own_progress):
    double(answer)
    told = capsys.readouterr().out
    assert told.startswith("double: not attempted yet.") and "twice the tensor" in told
    assert not own_progress.exists()


def test_an_answer_above_the_stubs_last_line_is_told_so():
    def answer(values, names):
        values.mul_(2)
        raise NotImplementedError

    def without_names(values, names):
        if len(names) > 99:
            return values * 2
        raise NotImplementedError

    def through_another(values, names):
        return stub(values, names)

    assert all("if that is the stub's last line" in explain(one) for one in (answer, without_names))
    assert "It calls stub, which is still a stub." in explain(through_another)


def test_a_missing_kernel_is_an_error_and_no_stub():
    def answer(values, names):
        return torch.zeros(2, dtype=torch.int64).softmax(0)  # NotImplementedError, from PyTorch

    assert "It raised NotImplementedError" in explain(answer)


def test_a_call_instead_of_the_function_is_told():
    assert "ch01.double(double)" in explain(torch.zeros(4))


def test_a_wrong_signature_is_told():
    assert "double(values, names)" in explain(lambda values: values)


def test_an_error_is_told_with_the_answers_own_line():
    def answer(values, names):
        wide = torch.ones(3)
        return values @ wide

    told = explain(answer)
    assert "It raised RuntimeError" in told and "line 3 of your function: return values @ wide" in told
    assert "Input: values = the float32 tensor" in told


def helper(values):
    return values.no_such_thing


def test_an_error_in_a_helper_names_the_helper():
    told = explain(lambda values, names: helper(values))
    assert "of helper: return values.no_such_thing" in told


def test_an_error_of_a_built_in_answer_is_told():
    assert "It raised TypeError" in explain(lambda *given: int(given))
    assert "It raised" in explain(max)


def test_sys_exit_in_an_answer_is_told():
    assert "It raised SystemExit" in explain(lambda values, names: exit(3))


def test_endless_recursion_is_told():
    def answer(values, names):
        return answer(values, names)

    assert "RecursionError" in explain(answer)


def test_an_endless_loop_is_stopped():
    def answer(values, names):
        while True:
            with contextlib.suppress(Exception):
                values = values + 1

    told = explain(answer, dataclasses.replace(double, seconds=0.2))
    assert "no answer after 0.2 seconds" in told and "still running" not in told
    assert_no_answer_runs()


def assert_no_answer_runs():
    """The frames of all threads, not `threading`'s own list: that can be wrong."""
    end = time.monotonic() + 5
    while any(inspect.getfile(frame) == __file__ and frame.f_code.co_name == "answer" for frame in all_frames()):
        assert time.monotonic() < end
        time.sleep(0.01)


def all_frames():
    for newest in sys._current_frames().values():
        yield from (frame for frame, _ in traceback.walk_stack(newest))


@pytest.mark.skipif(os.name == "nt", reason="no signal goes to one thread there")
def test_an_endless_answer_that_is_interrupted_within_its_time_ends(capsys):
    begun = threading.Event()

    def answer(values, names):
        begun.set()
        while True:
            with contextlib.suppress(Exception):
                values = values + 1

    def press_stop():
        begun.wait(10)
        time.sleep(0.1)  # until the check waits
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=press_stop).start()
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        double(answer)
    assert_no_answer_runs()
    assert torch.equal(before, torch.get_rng_state()) and capsys.readouterr().out == ""
    assert double.judge(double.oracle).status == "correct"


@pytest.mark.slow
def test_an_answer_that_cannot_be_stopped_is_told():
    told = explain(lambda values, names: time.sleep(2.5), dataclasses.replace(double, seconds=0.1))
    assert "restart the kernel" in told


def test_changed_inputs_are_told():
    def answer(values, names):
        return values.mul_(2)

    def of_list(values, names):
        names.pop()
        return values * 2

    assert "changes its input `values` in place" in explain(answer)
    assert "changes its input `names` in place" in explain(of_list)


def test_a_changed_input_may_be_allowed():
    allowed = dataclasses.replace(double, may_change=frozenset({"values"}), differentiable=False)
    assert allowed.judge(lambda values, names: values.mul_(2)).status == "correct"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda v, n: (v * 2).tolist(), "got a list, not a tensor"),
        (lambda v, n: (v * 2)[None], "Expected shape (4,), got shape (1, 4)"),
        (lambda v, n: (v * 2).sum(), "got shape () (a scalar)"),
        (lambda v, n: (v * 2).half(), "Expected dtype torch.float32, got torch.float16"),
        (lambda v, n: v * 3, "4 of 4 values differ; the first is at [0]"),
        (lambda v, n: v * torch.nan, "got nan"),
        (lambda v, n: (v * 2).detach(), "no gradient reaches `values`"),
        (lambda v, n: v * 3 - v.detach(), "the gradient of `values` is not"),
    ],
)
def test_a_wrong_result_is_described(answer, words):
    assert words in explain(answer)


def test_misconceptions_are_recognised_by_behaviour():
    verdict = double.judge(lambda values, names: torch.stack([value * value for value in values]))
    assert verdict.misconception == "squared"
    told = "What it gives is what a known mistake gives. It squares.\n    4 of 4 values differ"
    assert verdict.explanation.startswith(told)


def test_the_misconception_is_looked_for_where_the_answer_first_fails():
    zero = lambda rng: {"values": torch.zeros(4), "names": []}  # noqa: E731
    later = dataclasses.replace(double, makers=(zero, *double.makers))
    assert later.judge(lambda values, names: values * values).misconception == "squared"


def test_inputs_are_fresh_at_every_try_and_repeat_by_seed():
    seen = []

    def answer(values, names):
        seen.append(values.detach().clone())
        return values * 2

    double.judge(answer)
    double.judge(answer)
    assert len({tuple(values.tolist()) for values in seen}) == len(seen) == 10
    seen.clear()
    double.judge(answer, seed=3)
    double.judge(answer, seed=3)
    assert torch.equal(torch.stack(seen[:5]), torch.stack(seen[5:]))


def test_answer_and_oracle_draw_the_same_random_numbers():
    noisy = dataclasses.replace(double, oracle=lambda values, names: values * torch.rand(4))
    assert noisy.judge(lambda values, names: torch.rand(4) * values).status == "correct"


def test_random_generators_are_left_as_they_were():
    def draw(values, names):
        random.random(), np.random.rand(), torch.rand(1)
        raise ValueError

    for answer in (draw, lambda values, names: values * 2 + torch.rand(4) * 0, None):
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        wanted = random.random(), np.random.rand(), torch.rand(1).item()
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        double.judge(answer)
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == wanted


def test_effects_are_judged_where_they_are_what_counts():
    def fill(module, value):
        torch.nn.init.constant_(module.weight, value)

    filling = Exercise(
        chapter=5,
        name="fill",
        spec="fill the weight.",
        line_budget=1,
        oracle=fill,
        makers=(lambda rng: {"module": torch.nn.Linear(2, 2), "value": float(rng.standard_normal())},),
        misconceptions=(Misconception("negated", "Minus.", lambda module, value: fill(module, -value)),),
        hints=("1", "2", "3"),
        outcome=lambda result, module, value: {"weight": module.weight.detach()},
        may_change=frozenset({"module"}),
    )
    assert filling.judge(fill).status == "correct"
    assert filling.judge(lambda module, value: None).status == "not attempted"
    assert filling.judge(lambda module, value: fill(module, -1 * value)).misconception == "negated"
    kept = dataclasses.replace(filling, may_change=frozenset())
    assert "leaves its input `module` changed" in kept.judge(fill).explanation


def told(answer, capsys, exercise=double):
    exercise(answer)
    return capsys.readouterr().out


def test_hints_advance_with_wrong_tries_and_start_again_when_solved(capsys):
    assert "Hint 1 of 3: first" in told(lambda values, names: values, capsys)
    assert "Hint" not in told(stub, capsys)
    assert "Hint 2 of 3: second" in told(lambda values, names: values * 3, capsys)
    assert "Hint 3 of 3: third" in told(lambda values, names: values * 4, capsys)
    last = told(lambda values, names: values * 5, capsys)
    assert "Hint 3 of 3: third" in last and "in the folder solutions, beside this chapter: 01_*.ipynb" in last
    right = told(lambda values, names: values * 2, capsys)
    assert "double: correct. It agrees with the reference on 5 random inputs" in right
    assert "Hint 1 of 3" in told(lambda values, names: values, capsys)


def test_the_same_answer_again_earns_no_hint(capsys):
    wrong = lambda values, names: values  # noqa: E731
    for _ in range(3):
        assert "Hint 1 of 3" in told(wrong, capsys)
    assert "Hint 2 of 3" in told(lambda values, names: values.abs(), capsys)


@pytest.mark.parametrize("answer", [5, lambda values: values, lambda values, names: values.no_such_thing])
def test_what_reaches_no_value_earns_no_hint(answer, capsys):
    assert "Hint" not in told(answer, capsys)
    assert "Hint 1 of 3" in told(lambda values, names: values, capsys)
    assert "Hint 1 of 3" in told(answer, capsys)


def test_a_callable_without_code_earns_hints(capsys):
    for tier in (1, 2):
        assert f"Hint {tier} of 3" in told(functools.partial(lambda values, names: values), capsys)


def test_a_right_value_with_wrong_gradients_is_no_misconception_that_is_right_there():
    """On these inputs squaring is right but for its gradient, and halving right in everything."""
    twos = lambda rng: {"values": torch.full((4,), 2.0), "names": []}  # noqa: E731
    halved = Misconception("halved", "It halves.", lambda values, names: values * 2 if values[0] == 2 else values / 2)
    exercise = dataclasses.replace(
        double, makers=(twos, *double.makers), misconceptions=(halved, *double.misconceptions)
    )
    cut = exercise.judge(lambda values, names: (values * 2).detach())
    assert cut.misconception == "graph cut off" and cut.explanation.startswith(
        "The value is right, but no gradient reaches"
    )
    assert exercise.judge(lambda values, names: values * values).misconception == "squared"


def test_a_misconception_that_fails_on_these_inputs_is_passed_over():
    def broken(values, names):
        raise ZeroDivisionError

    exercise = dataclasses.replace(
        double, misconceptions=(Misconception("broken", "It breaks.", broken), *double.misconceptions)
    )
    assert exercise.judge(lambda values, names: values**2).misconception == "squared"


def test_a_backward_inside_the_answer_is_told():
    def answer(values, names):
        (values * 2).sum().backward()

    verdict = double.judge(answer)
    assert verdict.misconception == "backward inside" and "calls backward itself" in verdict.explanation


def test_a_slip_names_the_error():
    slip = Slip("upside down", "It divides by nothing.", "by zero")
    exercise = dataclasses.replace(double, slips=(slip,))
    verdict = exercise.judge(lambda values, names: values * (1 // 0))
    assert (verdict.misconception, verdict.earns_hint) == ("upside down", True)
    told = "A known mistake ends in this error. It divides by nothing.\n    It raised ZeroDivisionError"
    assert verdict.explanation.startswith(told)


def test_forbidden_names_are_told_wherever_they_stand():
    exercise = dataclasses.replace(double, without=frozenset({"add"}))

    def hidden(values, names):
        return [torch.add(values, values) for _ in range(1)][0]

    assert "`add` does the work" in exercise.judge(hidden).explanation
    assert exercise.judge(lambda values, names: values + values).status == "correct"


def test_a_float_is_not_a_whole_number():
    count = Exercise(
        chapter=1,
        name="count",
        spec="how many.",
        line_budget=1,
        oracle=lambda number: number,
        makers=(lambda rng: {"number": int(rng.integers(9))},),
        misconceptions=(Misconception("same", "It is the same.", lambda number: number),),
        hints=("1", "2", "3"),
        whole=True,
    )
    for right in (lambda number: number, torch.tensor, np.int64):
        assert count.judge(right).status == "correct"
    for packed in (lambda number: number / 1, lambda number: torch.tensor(float(number))):
        assert "it is a float, and an int is asked for" in explain(packed, count)


def test_a_note_is_added_to_a_difference():
    exercise = dataclasses.replace(double, note=lambda expected, got, values, names: f"Names: {names}.")
    assert "values differ; the first is at [0]" in explain(lambda values, names: values, exercise)
    assert "Names: ['a', 'b']. On all of these inputs yours is the right value divided by 2.\n" in explain(
        lambda values, names: values, exercise
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (26_523_600.0, "26,523,600"),
        (25.29, "25.29"),
        (123_456.789, "123,456.79"),
        (float("inf"), "inf"),
        (1e300, "1e+300"),
        (None, "nothing (None)"),
        (torch.tensor([[1 / 3, 2.0]]), "the float32 tensor [[0.3333, 2.0]]"),
        (torch.zeros(3, 4, dtype=torch.int64), "an int64 tensor of shape (3, 4)"),
        ([torch.zeros(3, 4), torch.zeros(1, 4)], "a list of 2: a tensor (3, 4), a tensor (1, 4)"),
        ([torch.zeros(3, 4)] * 9, "a list of 9, starting with a float32 tensor of shape (3, 4)"),
    ],
)
def test_values_are_described_for_people(value, words):
    assert describe(value) == words


def test_kinds_carry_their_article():
    assert "got an int, not a tensor" in difference(torch.ones(2), 3, rtol=0, atol=0)
    assert "got nothing (None), not a tensor" in difference(torch.ones(2), None, rtol=0, atol=0)


def test_progress_is_recorded(own_progress, capsys):
    double(lambda values, names: values**2)
    double(lambda values, names: values * 2)
    double(stub)
    entry = json.loads(own_progress.read_text())["ch01.double"]
    assert entry["status"] == "correct" and entry["tries"] == 2 and entry["hints"] == 0
    assert entry["misconceptions"] == {"squared": 1} and entry["solved"]
    assert [path.name for path in own_progress.parent.iterdir()] == ["exercises.json"]


@pytest.mark.parametrize("damaged", ["", "{", "[1]", '{"ch01.double": 3}', "\x00\xff"])
def test_a_damaged_record_is_started_again(own_progress, capsys, damaged):
    own_progress.write_text(damaged, "utf-8")
    double(lambda values, names: values * 2)
    assert json.loads(own_progress.read_text())["ch01.double"]["tries"] == 1


def test_a_folder_that_cannot_be_written_costs_no_verdict(own_progress, monkeypatch, capsys):
    own_progress.parent.joinpath("file").write_text("")
    monkeypatch.setenv("GCLIB_PROGRESS_FOLDER", str(own_progress.parent / "file" / "below"))
    double(lambda values, names: values * 2)
    told = capsys.readouterr().out
    assert "could not be saved" in told and "double: correct" in told


def test_strict_mode_raises_and_records_nothing(own_progress, monkeypatch, capsys):
    monkeypatch.setenv("GCLIB_STRICT", "1")
    double(lambda values, names: values * 2)
    assert "double: correct" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="It squares"):
        double(lambda values, names: values**2)
    with pytest.raises(AssertionError, match="not attempted"):
        double(stub)
    assert not own_progress.exists()


def test_lines_are_counted_without_docstring_comments_and_blanks():
    def answer(values, names):
        """Two lines.

        And a paragraph.
        """
        # a comment

        both = (
            values + values  # of which this is the second of three
        )
        return both

    assert count_lines(answer) == 4
    assert count_lines(max) is None
    assert "4 lines; 1 would do" in double.judge(answer).explanation


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(-1e3, 1e3)
    | st.text(max_size=5)
    | st.lists(st.floats(-9, 9, width=32), max_size=3).map(torch.tensor),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(values, values)
def test_any_two_values_can_be_compared_and_described(expected, got):
    assert difference(expected, expected, rtol=0, atol=0) is None
    found = difference(expected, got, rtol=0, atol=0)
    assert found is None or isinstance(found, str)
    assert describe(got)


def test_numbers_may_be_packed_as_scalars():
    assert difference(1.5, torch.tensor(1.5), rtol=0, atol=0) is None
    assert difference(2, np.float64(2), rtol=0, atol=0) is None
    assert difference(1.0, True, rtol=0, atol=0) is not None
    assert difference((1, "a"), [1, "a"], rtol=0, atol=0) is None
    assert difference([1, {"k": torch.ones(2)}], [1, {"k": torch.zeros(2)}], rtol=0, atol=0).startswith(
        "at [1]: at 'k': 2 of 2 values differ"
    )
