"""The early experiment, small: rows, their cache, and the two commands."""

import dataclasses

import pytest
import torch

from gclib import __main__ as command
from gclib import datacard, experiments
from gclib.data import TextPair
from gclib.experiments import RECIPES, Recipe, Result, Setting, format_table, steps_for, table1

TINY = Setting(train_pairs=256, test_pairs=40, epochs=1, size="tiny", vocab_size=200, query_length=8, passage_length=8)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """A corpus of numbers in words, and an empty cache."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

    def load(split, *, limit, progress):
        numbers = range(1_000) if split == "train" else range(1_000, 1_100)
        spelled = [" ".join(words[int(digit)] for digit in str(number)) for number in numbers]
        return [TextPair(f"the number {text}", f"def {text}") for text in spelled][:limit]

    monkeypatch.setattr(experiments, "load_pairs", load)
    monkeypatch.setattr(experiments, "QUICK", TINY)
    monkeypatch.setenv("GCLIB_CACHE", str(tmp_path))


def test_three_rows_with_the_same_number_of_examples():
    results = table1(TINY, progress=False)
    assert [result.recipe for result in results] == list(RECIPES)
    assert {result.examples for result in results} == {256}
    for result in results:
        assert set(result.metrics) == {"top-1", "top-5", "top-20", "top-100", "mrr"}
        assert 0 < result.metrics["top-5"] <= result.metrics["top-20"] <= result.metrics["top-100"] == 1.0
        assert result.seconds > 0 and result.final_loss > 0 and not result.saved
    assert len({result.metrics["mrr"] for result in results}) == 3


def test_saved_rows_are_read_and_fresh_ones_are_trained_again(tmp_path, monkeypatch):
    only = RECIPES[2:]
    (first,) = table1(TINY, recipes=only, progress=False)
    train = experiments.run
    monkeypatch.setattr(experiments, "run", None)  # calling it would raise
    (again,) = table1(TINY, recipes=only, progress=False)
    assert again == dataclasses.replace(first, saved=True)
    calls = []
    monkeypatch.setattr(experiments, "run", lambda *args, **options: calls.append(1) or train(*args, **options))
    (fresh,) = table1(TINY, recipes=only, progress=False, fresh=True)
    assert len(calls) == 1
    assert fresh.metrics == first.metrics  # the same seed, the same row
    (path,) = tmp_path.glob("table1-*.json")
    path.write_bytes(path.read_bytes()[:-5])
    assert not table1(TINY, recipes=only, progress=False)[0].saved
    assert len(calls) == 2


def test_a_row_is_saved_under_all_that_it_depends_on(monkeypatch):
    def key(setting=TINY, recipe=RECIPES[0], seed=0):
        return experiments._key(setting, recipe, seed)

    keys = [
        key(),
        key(setting=dataclasses.replace(TINY, epochs=2)),
        key(recipe=dataclasses.replace(RECIPES[0], learning_rate=1.0)),
        key(seed=1),
    ]
    monkeypatch.setattr(experiments, "fingerprint", lambda sources: "another corpus")
    keys.append(key())
    monkeypatch.setattr(experiments, "code_digest", lambda *files: "other code")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_another_seed_is_another_run():
    only = RECIPES[2:]
    losses = [table1(TINY, recipes=only, seed=seed, progress=False)[0].final_loss for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_the_callers_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    table1(TINY, recipes=RECIPES[2:], progress=False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("pairs", [128, 10_240, 37_409, 200])
def test_every_row_sees_the_same_number_of_examples(pairs):
    assert {steps_for(pairs, 2, recipe.batch_size) * recipe.batch_size for recipe in RECIPES} == {
        2 * (pairs // 128) * 128
    }


@pytest.mark.parametrize(("pairs", "batch_size"), [(127, 8), (1_000, 12), (1_000, 256)])
def test_a_batch_that_does_not_divide_is_refused(pairs, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must divide 128.*got {batch_size}"):
        steps_for(pairs, 1, batch_size)


def test_refusals():
    with pytest.raises(ValueError, match="recipes must be at least one"):
        table1(TINY, recipes=())
    with pytest.raises(ValueError, match="seed must be an int of at least 0, got -1"):
        table1(TINY, seed=-1)


def test_the_table_as_text():
    metrics = {"top-1": 0.3444, "top-5": 0.5, "top-20": 0.75, "top-100": 1.0, "mrr": 0.45678}
    result = Result(Recipe("row", "naive", 8, None, 1e-3), 0, metrics, 40, 61.4, 256, 1.0, 2)
    saved = dataclasses.replace(result, saved=True)
    assert format_table([result, saved]).splitlines() == [
        "|  | top-1 | top-5 | top-20 | top-100 | MRR | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| row | 34.4 | 50.0 | 75.0 | 100.0 | 0.457 | 61 |",
        "| row | 34.4 | 50.0 | 75.0 | 100.0 | 0.457 | 61 (saved) |",
    ]


def test_the_command_prints_the_table(capsys):
    assert command.main(["table1", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert all(recipe.name in printed for recipe in RECIPES)
    assert "Percent of 40 test queries, each among as many passages; 256 examples a row,\nseed 0" in printed


def test_the_command_prints_the_figures_and_writes_them_when_asked(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(command, "load_corpus", lambda: "corpus")
    monkeypatch.setattr(datacard, "figures", lambda corpus: f"figures of the {corpus}")
    monkeypatch.setattr(datacard, "write_figures", calls.append)
    assert command.main(["data-card"]) == 0
    assert capsys.readouterr().out == "figures of the corpus\n"
    assert calls == []
    command.main(["data-card", "--write"])
    assert calls == ["figures of the corpus"]


@pytest.mark.parametrize("arguments", [[], ["table2"], ["table1", "--seed", "x"]])
def test_the_command_says_how_to_use_it(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m gclib" in capsys.readouterr().err


def test_the_help_says_what_is_trained_and_where_it_is_kept(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        command.main(["table1", "--help"])
    told = capsys.readouterr().out
    assert "Train the same small encoder three times" in told and "order of the pairs (default: 0)" in told
    assert str(command.cache_folder()) in told
