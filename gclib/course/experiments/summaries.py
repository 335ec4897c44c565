"""Several seeds of a row as mean and spread, and results as markdown tables."""

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gclib.course.chapters import PROJECT as ROOT
from gclib.course.experiments.recipes import RECIPES, Recipe
from gclib.course.experiments.results import KS, Result
from gclib.support.validation import one_of, refuse

METRICS = (*(f"top-{k}" for k in KS), "mrr")
RECORDED = ROOT / "data" / "results" / "table1.csv"


@dataclass(frozen=True)
class Summary:
    """A recipe over its seeds: each metric's mean, and its spread (standard deviation with n - 1; NaN for one seed)."""

    recipe: Recipe
    seeds: tuple[int, ...]
    mean: dict[str, float]
    spread: dict[str, float]


def summarise(results: Sequence[Result]) -> list[Summary]:
    """Mean and spread of every metric over the seeds of each recipe, recipes in the order of the results."""
    if not results:
        raise refuse("results", "must be at least one", "none")
    groups: dict[Recipe, list[Result]] = {}
    for result in results:
        groups.setdefault(result.recipe, []).append(result)
    summaries = []
    for recipe, rows in groups.items():
        values = {name: [row.metrics[name] for row in rows] for name in METRICS}
        mean = {name: statistics.fmean(seeds) for name, seeds in values.items()}
        spread = {name: statistics.stdev(seeds) if len(seeds) > 1 else math.nan for name, seeds in values.items()}
        summaries.append(Summary(recipe, tuple(row.seed for row in rows), mean, spread))
    return summaries


def recorded_summaries() -> list[Summary]:
    """The rows of the full experiment (`recipes.WHOLE`), recorded where its twelve trainings ran: three digits a share.

    In the order of `RECIPES`; 2,000 test queries, seeds 0 to 2. Raises FileNotFoundError without the course's data/.
    """
    with RECORDED.open(newline="") as file:
        lines = {line["row"]: line for line in csv.DictReader(file)}
    found = []
    for recipe in RECIPES:
        line = lines[recipe.name]
        mean = {name: float(line[name]) for name in METRICS}
        spread = {name: float(line[f"{name} spread"]) for name in METRICS}
        found.append(Summary(recipe, tuple(range(int(line["seeds"]))), mean, spread))
    return found


def beyond_spread(first: Summary, second: Summary, metric: str = "top-1") -> float:
    """By how many spreads the first mean is above the second: their difference over the larger of both spreads.

    Not a test: two equal rows of three seeds (normal draws, 100,000 times) are beyond 1, up or down, in 21 % of the
    cases, and beyond 2 in 4 %. NaN with one seed.
    """
    one_of("metric", metric, METRICS)
    larger = max(first.spread[metric], second.spread[metric])
    gap = first.mean[metric] - second.mean[metric]
    return gap / larger if larger else math.copysign(math.inf, gap) if gap else 0.0


def format_results(results: Sequence[Result]) -> str:
    """The rows as a markdown table: shares in percent, MRR, seconds of training."""
    lines = [["", *(f"top-{k}" for k in KS), "MRR", "seconds"]]
    for result in results:
        seconds = f"{result.seconds:.0f}{' (saved)' if result.saved else ''}"
        lines.append([result.recipe.name, *(_in_table(name, result.metrics[name]) for name in METRICS), seconds])
    return _markdown(lines)


def format_summaries(summaries: Sequence[Summary]) -> str:
    """Mean ± spread of each row as a markdown table, shares in percent."""
    lines = [["mean ± spread", "top rate", *(f"top-{k}" for k in KS), "MRR"]]
    for row in summaries:
        cells = [f"{_in_table(name, row.mean[name])} ± {_in_table(name, row.spread[name])}" for name in METRICS]
        lines.append([row.recipe.name, f"{row.recipe.learning_rate:.2g}", *cells])
    return _markdown(lines)


def _in_table(metric: str, share: float) -> str:
    """The MRR as a number, shares in percent."""
    return f"{share:.3f}" if metric == "mrr" else f"{100 * share:.1f}"


def _markdown(lines: list[list[str]]) -> str:
    head, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])
