"""Every chapter's exercises: solutions pass, stubs are not attempted, each wrong answer gets its own message."""

import ast
import importlib
import inspect
import json
import math
import pkgutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch.nn import functional as F

import gclib.course.checks
from gclib.course.checks import ch01
from gclib.course.checks.engine import Exercise, exercises_of
from gclib.support import ROOT

NOTEBOOKS = ROOT / "notebooks"
CHAPTERS = {
    found.name: importlib.import_module(f"gclib.course.checks.{found.name}")
    for found in pkgutil.iter_modules(gclib.course.checks.__path__)
    if found.name.startswith("ch") and found.name[2:].isdigit()
}
EXERCISES = [exercise for module in CHAPTERS.values() for exercise in exercises_of(module)]
WRONG = [
    pytest.param(exercise, misconception, id=f"{exercise.key}: {misconception.name}")
    for exercise in EXERCISES
    for misconception in exercise.misconceptions
]
every_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.key)


def functions_in(path: Path) -> dict[str, tuple[ast.FunctionDef, str]]:
    """Functions at the top level of a notebook's code cells: name -> (its definition, its cell's source)."""
    found = {}
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or not source.strip() or source.lstrip().startswith("%"):
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                found[node.name] = node, source
    return found


def notebook(folder: Path, exercise: Exercise) -> Path:
    """The one notebook of an exercise's chapter in `folder`."""
    (path,) = folder.glob(f"{exercise.chapter:02d}_*.ipynb")
    return path


def run_definition(path: Path, name: str):
    """The function `name` as a notebook defines it, with the notebook's imports, and nothing else run."""
    imports = [
        node
        for cell in json.loads(path.read_text("utf-8"))["cells"]
        if cell["cell_type"] == "code"
        for node in ast.parse("".join(cell["source"])).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    namespace: dict = {}
    body = [*imports, functions_in(path)[name][0]]
    exec(compile(ast.Module(body=body, type_ignores=[]), f"<{name}>", "exec"), namespace)
    return namespace[name]


def draws(most: int) -> range:
    """`most` sets of inputs, or the share of them that `make check` takes of all random cases; at least one."""
    return range(max(1, most * min(settings().max_examples, 100) // 100))


@every_exercise
def test_the_oracle_passes_its_own_check(exercise):
    for seed in draws(5):
        assert exercise.judge(exercise.oracle, seed=seed).status == "correct"


@every_exercise
def test_the_solution_passes(exercise):
    solution = run_definition(notebook(NOTEBOOKS / "solutions", exercise), exercise.name)
    for _ in draws(10):
        verdict = exercise.judge(solution)
        assert verdict.status == "correct", verdict.explanation


@every_exercise
def test_the_solution_keeps_to_the_line_budget(exercise):
    path = notebook(NOTEBOOKS / "solutions", exercise)
    node, source = functions_in(path)[exercise.name]
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    lines = source.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    assert sum(1 for line in lines if line.strip() and not line.strip().startswith("#")) <= exercise.line_budget


@every_exercise
def test_the_stub_is_not_attempted(exercise, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GCLIB_PROGRESS_FOLDER", str(tmp_path))
    monkeypatch.delenv("GCLIB_STRICT", raising=False)
    exercise(run_definition(notebook(NOTEBOOKS, exercise), exercise.name))
    assert capsys.readouterr().out.startswith(f"{exercise.name}: not attempted yet.")
    assert list(tmp_path.iterdir()) == []


@every_exercise
def test_stub_solution_and_check_agree_on_the_signature(exercise):
    stub = functions_in(notebook(NOTEBOOKS, exercise))[exercise.name][0]
    solution = functions_in(notebook(NOTEBOOKS / "solutions", exercise))[exercise.name][0]
    assert ast.dump(stub.args) == ast.dump(solution.args)
    inputs = exercise.makers[0](np.random.default_rng(0))
    assert [argument.arg for argument in stub.args.args] == list(inputs)


def assert_named(exercise, misconception, *, seed):
    verdict = exercise.judge(lambda *inputs: misconception.wrong(*inputs), seed=seed)  # run afresh, not remembered
    assert verdict.status == "wrong"
    assert misconception.message in verdict.explanation, verdict.explanation  # two of one fault share theirs


@pytest.mark.parametrize(("exercise", "misconception"), WRONG)
def test_every_listed_wrong_answer_gets_its_own_message(exercise, misconception):
    assert_named(exercise, misconception, seed=0)


@pytest.mark.deep
@every_exercise
def test_listed_wrong_answers_get_their_messages_whatever_the_seed(exercise):
    for misconception in exercise.misconceptions:
        for seed in range(1, 20):
            assert_named(exercise, misconception, seed=seed)


@every_exercise
def test_an_exercise_is_fully_declared(exercise):
    assert vars(CHAPTERS[f"ch{exercise.chapter:02d}"])[exercise.name] is exercise
    assert len({misconception.name for misconception in exercise.misconceptions}) >= 3
    assert len(exercise.hints) == len(set(exercise.hints)) == 3


@pytest.mark.parametrize("number", sorted(CHAPTERS))
def test_a_chapter_has_three_exercises(number):
    assert len(exercises_of(CHAPTERS[number])) >= 3 or number in ("ch00", "ch11", "ch15")


# Wrong answers of chapter 01, written in other words than the misconceptions that they must be recognised as.


def in_batch_only(batch_size, hard_negatives):
    probability = 1.0 / batch_size
    return -math.log(probability)


def base_two(batch_size, hard_negatives):
    passages = sum(1 + hard_negatives for _ in range(batch_size))
    return torch.tensor(float(passages)).log2()


def times_temperature(query_reps, passage_reps, temperature):
    scores = torch.einsum("id,jd->ij", query_reps, passage_reps).mul(temperature)
    return -scores.log_softmax(-1).diagonal().mean()


def columns(query_reps, passage_reps, temperature):
    z = query_reps @ passage_reps.T / temperature
    return -(z.diagonal() - z.logsumexp(dim=0)).mean()


def loop_of_negatives(query_reps, passage_reps, temperature):
    total = torch.zeros(())
    for i, query in enumerate(query_reps):
        z = passage_reps @ query / temperature
        total = total - z[i] + torch.cat([z[:i], z[i + 1 :]]).logsumexp(dim=0)
    return total / len(query_reps)


def eye_times_log(query_reps, passage_reps, temperature):
    log_p = F.log_softmax(query_reps @ passage_reps.T / temperature, dim=1)
    return -(torch.eye(len(log_p)) * log_p).mean()


def plain_exponentials(query_reps, passage_reps, temperature):
    z = (query_reps @ passage_reps.T / temperature).exp()
    return -(z.diagonal() / z.sum(dim=1)).log().mean()


def counted(batch_size, hard_negatives):
    return torch.tensor(list(range(batch_size)))


def last_of_group(batch_size, hard_negatives):
    grid = torch.arange(batch_size * (1 + hard_negatives)).reshape(batch_size, -1)
    return grid[:, -1]


def own_text_only(queries, passages):
    group = len(passages) // len(queries)
    mask = torch.zeros(len(queries), len(passages), dtype=torch.bool)
    for i in range(len(queries)):
        for j, passage in enumerate(passages):
            mask[i, j] = passage == passages[i * group]
        mask[i, i * group] = False
    return mask


def with_own_positive(queries, passages):
    group = len(passages) // len(queries)
    answers = {}
    for query, positive in zip(queries, passages[::group], strict=True):
        answers.setdefault(query, []).append(positive)
    return torch.tensor([[passage in answers[query] for passage in passages] for query in queries])


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch01.chance_loss, in_batch_only, "hard negatives forgotten"),
        (ch01.chance_loss, base_two, "bits, not nats"),
        (ch01.info_nce, times_temperature, "multiplied by the temperature"),
        (ch01.info_nce, columns, "softmax over the queries"),
        (ch01.info_nce, loop_of_negatives, "positive left out of the denominator"),
        (ch01.info_nce, eye_times_log, "mean over all pairs"),
        (ch01.info_nce, plain_exponentials, "overflow, divided"),
        (ch01.labels_with_hard_negatives, counted, "labels without hard negatives"),
        (ch01.labels_with_hard_negatives, last_of_group, "positive last"),
        (ch01.false_negative_mask, own_text_only, "same queries forgotten"),
        (ch01.false_negative_mask, with_own_positive, "positive masked"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    assert exercise.judge(answer).misconception == name


def test_right_answers_in_other_words_are_right():
    def info_nce(query_reps, passage_reps, temperature):
        z = query_reps @ passage_reps.T / temperature
        z = z - z.max(dim=1, keepdim=True).values
        return (z.exp().sum(1).log() - z.diagonal()).mean()

    def labels(batch_size, hard_negatives):
        return torch.arange(0, batch_size * (1 + hard_negatives), 1 + hard_negatives)

    for seed in range(20):  # float32 rounding at low temperatures is no mistake
        assert ch01.info_nce.judge(info_nce, seed=seed).status == "correct"
    assert ch01.labels_with_hard_negatives.judge(labels).status == "correct"
    assert ch01.chance_loss.judge(lambda b, k: torch.tensor(b * (1.0 + k)).log()).status == "correct"


def test_a_detached_passage_side_is_told():
    def info_nce(query_reps, passage_reps, temperature):
        return F.cross_entropy(query_reps @ passage_reps.detach().T / temperature, torch.arange(len(query_reps)))

    assert "no gradient reaches `passage_reps`" in ch01.info_nce.judge(info_nce).explanation


def test_exercises_show_their_signature_and_task():
    assert "equation (1)" in repr(ch01.info_nce) and "3 lines" in repr(ch01.info_nce)
    assert inspect.signature(ch01.info_nce).parameters.keys() == {"answer"}
