"""Rows trained several at a time, kept one by one: `gclib.course.experiments.kept`."""

import json
import os
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from gclib.course.experiments import kept
from gclib.course.experiments.kept import read_or_train


@dataclass(frozen=True)
class Recipe:
    name: str


@dataclass(frozen=True)
class Result:
    recipe: Recipe
    process: int
    threads: int


FAILS = Recipe("fails")
ROWS = [(Recipe(name), seed) for seed in (0, 1) for name in ("a", "b")]


def train(row):
    if row[0] == FAILS:
        raise FloatingPointError("training stopped")
    return Result(row[0], os.getpid(), torch.get_num_threads())


def read(path, recipe):
    return Result(**json.loads(path.read_bytes().splitlines()[-1]) | {"recipe": recipe}) if path.exists() else None


def results(folder, rows=ROWS, **options):
    paths = {row: folder / f"{row[0].name}-{row[1]}.json" for row in rows}
    return read_or_train(train, paths, read, queries=lambda recipe: 8, **{"progress": False} | options)


@pytest.fixture
def cores(monkeypatch):
    """Two threads here, and free memory of so many GiB."""

    def of_memory(gib):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        monkeypatch.setattr(kept.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(gib * 2**30)))

    return of_memory


@pytest.mark.slow
def test_rows_are_trained_in_processes_of_one_thread_and_read_the_next_time(cores, tmp_path, capsys):
    cores(8)
    first = results(tmp_path, progress=True)
    assert [result.recipe for result in first] == [recipe for recipe, _ in ROWS]
    assert os.getpid() not in {result.process for result in first} and {result.threads for result in first} == {1}
    assert "32/32" in capsys.readouterr().err
    assert results(tmp_path, progress=True) == first
    assert capsys.readouterr().err == ""
    assert {result.process for result in results(tmp_path, fresh=True)}.isdisjoint(one.process for one in first)


@pytest.mark.slow
def test_an_error_comes_out_and_what_was_trained_is_kept(cores, tmp_path):
    cores(8)
    with pytest.raises(FloatingPointError, match="training stopped"):
        results(tmp_path, [(FAILS, 0), *ROWS[:1]])
    assert [path.name for path in tmp_path.iterdir()] == ["a-0.json"]


def test_little_memory_and_one_core_train_here(cores, tmp_path):
    assert {result.process for result in results(tmp_path)} == {os.getpid()}
    cores(1.5)
    assert {result.process for result in results(tmp_path, fresh=True)} == {os.getpid()}


def test_nothing_chosen_is_refused():
    kept.check_chosen((0, 1), rows=ROWS)
    with pytest.raises(ValueError, match="seeds must be at least one"):
        kept.check_chosen((), rows=ROWS)
