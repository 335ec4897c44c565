"""The early experiment, small: rows, their cache, and the two commands."""

import dataclasses
import math

import pytest
import torch

from gclib import __main__ as command
from gclib.course.experiments import table1 as experiments
from gclib.course.experiments.table1 import (
    BATCH_SIZES,
    POINTS,
    RECIPES,
    Point,
    Recipe,
    Result,
    Setting,
    batch_recipe,
    beyond_spread,
    format_summaries,
    format_table,
    fresh_encoder,
    race,
    saved_results,
    scaled_rate,
    steps_for,
    summarise,
    table1,
    thin,
)
from gclib.data import card as datacard
from gclib.data.pairs import TextPair
from gclib.training.loop import TrainingRecord

TINY = Setting(train_pairs=512, test_pairs=40, epochs=1, size="tiny", vocab_size=200, query_length=8, passage_length=8)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """A corpus of numbers in words, and an empty cache."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

    def load(split, *, limit, progress):
        numbers = range(1_000) if split == "train" else range(1_000, 1_100)
        spelled = [" ".join(words[int(digit)] for digit in str(number)) for number in numbers]
        return [TextPair(f"the number {text}", f"def {text}") for text in spelled][:limit]

    monkeypatch.setattr(experiments, "load_pairs", load)
    experiments._texts.cache_clear()
    experiments._all_pairs.cache_clear()
    monkeypatch.setattr(experiments, "QUICK", TINY)
    monkeypatch.setenv("GCLIB_CACHE", str(tmp_path))
    yield
    experiments._texts.cache_clear()
    experiments._all_pairs.cache_clear()


def test_four_rows_with_the_same_number_of_examples():
    results = table1(TINY, progress=False)
    assert [result.recipe for result in results] == list(RECIPES)
    assert {result.examples for result in results} == {512}
    for result in results:
        assert set(result.metrics) == {"top-1", "top-5", "top-20", "top-100", "mrr"}
        assert 0 < result.metrics["top-5"] <= result.metrics["top-20"] <= result.metrics["top-100"] == 1.0
        assert result.seconds > 0 and result.final_loss > 0 and not result.saved
        assert len(result.curve) <= POINTS and result.curve[-1].examples == 512
    assert len({result.metrics["mrr"] for result in results}) == 4


def test_saved_rows_are_read_and_fresh_ones_are_trained_again(tmp_path, monkeypatch):
    only = RECIPES[2:3]
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
        return experiments._key(setting, recipe, seed, experiments._surroundings())

    keys = [
        key(),
        key(setting=dataclasses.replace(TINY, epochs=3)),
        key(recipe=dataclasses.replace(RECIPES[0], learning_rate=1.0)),
        key(seed=1),
    ]
    monkeypatch.setattr(experiments, "fingerprint", lambda sources: "another corpus")
    keys.append(key())
    monkeypatch.setattr(experiments, "code_digest", lambda *files: "other code")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_another_seed_is_another_run():
    only = RECIPES[2:3]
    losses = [table1(TINY, recipes=only, seed=seed, progress=False)[0].final_loss for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_the_callers_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    table1(TINY, recipes=RECIPES[2:], progress=False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("pairs", [512, 10_240, 37_409, 600])
def test_every_row_sees_the_same_number_of_examples(pairs):
    recipes = [*RECIPES, *map(batch_recipe, BATCH_SIZES)]
    assert {steps_for(pairs, 2, recipe.batch_size) * recipe.batch_size for recipe in recipes} == {
        2 * (pairs // 512) * 512
    }


@pytest.mark.parametrize(("pairs", "batch_size"), [(511, 8), (1_000, 12), (1_000, 1_024)])
def test_a_batch_that_does_not_divide_is_refused(pairs, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must divide 512.*got {batch_size}"):
        steps_for(pairs, 1, batch_size)


def test_recipes_of_a_batch_size_are_rows_of_the_table_too():
    recipes = {size: batch_recipe(size) for size in BATCH_SIZES}
    assert [recipes[8], recipes[128], recipes[512]] == [RECIPES[0], RECIPES[2], RECIPES[3]]
    for size, recipe in recipes.items():
        assert recipe.batch_size == size and (recipe.step, recipe.chunk_size) == (
            ("grad_cache", 32) if size > 32 else ("naive", None)
        )
        assert recipe.chance_loss == pytest.approx(math.log(size))
    assert RECIPES[1].chance_loss == pytest.approx(math.log(8))
    assert "rate 0.001" in batch_recipe(16, learning_rate=1e-3).name


def test_the_rate_doubles_where_the_batch_is_four_times_as_large():
    rates = [scaled_rate(size, at_128=1.0) for size in (32, 128, 512)]
    assert rates == pytest.approx([0.5, 1.0, 2.0])


def test_layers_and_first_weights():
    one, other = (fresh_encoder(dataclasses.replace(TINY, layers=layers), 3) for layers in (1, None))
    assert [encoder.model.config.num_hidden_layers for encoder in (one, other)] == [1, 2]
    again = fresh_encoder(TINY, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))


# --- seeds ----------------------------------------------------------------------------------------------------


def record(step, loss, norm=1.0):
    return TrainingRecord(step, 0, loss, norm, 1e-3, 8 * step, 0.1 * step)


def test_a_curve_is_thinned_to_means_of_equal_stretches():
    records = [record(step, float(step), 2.0 * step) for step in range(1, 11)]
    assert thin(records, 5) == tuple(Point(16 * n, 2 * n - 0.5, 4 * n - 1.0) for n in range(1, 6))
    assert thin(records[:3]) == tuple(Point(8 * n, float(n), 2.0 * n) for n in (1, 2, 3))
    uneven = thin(records, 4)
    assert len(uneven) == 4 and uneven[-1].examples == 80
    assert thin([]) == ()


def result(recipe, seed, share):
    metrics = {"top-1": share, "top-5": 0.5, "top-20": 0.75, "top-100": 1.0, "mrr": share}
    return Result(recipe, seed, metrics, 40, 61.4, 256, 1.0, 2)


def test_a_summary_has_the_sample_deviation_of_each_row():
    low, high = RECIPES[0], RECIPES[2]
    results = [result(low, 0, 0.2), result(high, 0, 0.3), result(low, 1, 0.22), result(high, 1, 0.34)]
    first, second = summarise(results)
    assert (first.recipe, first.seeds, second.recipe) == (low, (0, 1), high)
    assert first.mean["top-1"] == pytest.approx(0.21) and first.spread["top-1"] == pytest.approx(0.02 / 2**0.5)
    assert first.spread["top-5"] == 0.0
    assert beyond_spread(second, first) == pytest.approx(0.11 / (0.04 / 2**0.5))
    assert beyond_spread(first, second) == -beyond_spread(second, first)
    assert beyond_spread(first, second, "top-5") == 0.0
    assert "| sequential, B=8 | 0.0005 | 21.0 ± 1.4 | 50.0 ± 0.0 |" in format_summaries([first, second])


def test_one_seed_has_no_spread():
    (only,) = summarise([result(RECIPES[0], 0, 0.2)])
    assert math.isnan(only.spread["top-1"]) and math.isnan(beyond_spread(only, only))


@pytest.mark.slow
def test_a_race_trains_what_is_missing_and_says_how_far_it_is(monkeypatch, capsys):
    only = RECIPES[2:]
    table1(TINY, recipes=only[:1], seed=1, progress=False)
    calls, run = [], experiments.run
    monkeypatch.setattr(experiments, "run", lambda recipe, *a, **o: calls.append(o["seed"]) or run(recipe, *a, **o))
    results = race(TINY, recipes=only, seeds=(0, 1))
    assert [(r.recipe, r.seed, r.saved) for r in results] == [
        (only[0], 0, False),
        (only[1], 0, False),
        (only[0], 1, True),
        (only[1], 1, False),
    ]
    assert calls == [0, 0, 1]
    assert "1536/1536" in capsys.readouterr().err
    assert race(TINY, recipes=only, seeds=(0, 1))[1].curve == results[1].curve
    assert [(r.recipe, r.seed) for r in saved_results(TINY, seeds=(1, 5))] == [(only[0], 1), (only[1], 1)]


def test_refusals():
    with pytest.raises(ValueError, match="seeds must be at least one"):
        race(TINY, seeds=())
    with pytest.raises(ValueError, match="batch_size must divide 512, got 24"):
        batch_recipe(24)
    with pytest.raises(ValueError, match="results must be at least one"):
        summarise([])
    with pytest.raises(ValueError, match="metric must be one of 'top-1'"):
        beyond_spread(*summarise([result(RECIPES[0], 0, 0.2)]) * 2, metric="top-2")
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


@pytest.mark.slow
def test_the_command_prints_the_table(capsys):
    assert command.main(["table1", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert all(recipe.name in printed for recipe in RECIPES)
    assert "Percent of 40 test queries, each among as many passages; 512 examples a row,\nseed 0" in printed


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
    assert "Train the same small encoder four times" in told and "order of the pairs (default: 0)" in told
    assert str(command.cache_folder()) in told
