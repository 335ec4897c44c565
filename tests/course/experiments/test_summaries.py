"""Mean and spread over seeds, and the tables as text: `gclib.course.experiments.summaries`."""

import dataclasses
import math

import pytest
import torch

from gclib.course.experiments.recipes import RECIPES, Recipe
from gclib.course.experiments.results import Result
from gclib.course.experiments.summaries import beyond_spread, format_results, format_summaries, summarise


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


def test_equal_rows_of_three_seeds_lie_apart_as_often_as_the_docstring_says():
    draws = torch.randn(100_000, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    apart = torch.tensor([beyond_spread(*map(of_three, pair)) for pair in draws[:2_000].tolist()]).abs()
    directly = (draws.mean(2).diff()[:, 0] / draws.std(2).amax(1)).abs()
    torch.testing.assert_close(apart, directly[:2_000].float())
    assert [round(float((directly > bound).double().mean()), 2) for bound in (1, 2)] == [0.21, 0.04]
    assert " 21 % " in beyond_spread.__doc__ and " 4 %" in beyond_spread.__doc__


def of_three(shares):
    (summary,) = summarise([result(RECIPES[0], seed, share) for seed, share in enumerate(shares)])
    return summary


def test_one_seed_has_no_spread():
    (only,) = summarise([result(RECIPES[0], 0, 0.2)])
    assert math.isnan(only.spread["top-1"]) and math.isnan(beyond_spread(only, only))


def test_refusals():
    with pytest.raises(ValueError, match="results must be at least one"):
        summarise([])
    with pytest.raises(ValueError, match="metric must be one of 'top-1'"):
        beyond_spread(*summarise([result(RECIPES[0], 0, 0.2)]) * 2, metric="top-2")


def test_the_table_as_text():
    metrics = {"top-1": 0.3444, "top-5": 0.5, "top-20": 0.75, "top-100": 1.0, "mrr": 0.45678}
    result = Result(Recipe("row", "naive", 8, None, 1e-3), 0, metrics, 40, 61.4, 256, 1.0, 2)
    saved = dataclasses.replace(result, saved=True)
    assert format_results([result, saved]).splitlines() == [
        "|  | top-1 | top-5 | top-20 | top-100 | MRR | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| row | 34.4 | 50.0 | 75.0 | 100.0 | 0.457 | 61 |",
        "| row | 34.4 | 50.0 | 75.0 | 100.0 | 0.457 | 61 (saved) |",
    ]
