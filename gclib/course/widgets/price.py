"""The price of a step on sliders: what sorting and retained chunks save, predicted at once, measured on a button.

A view and nothing more: tokens, FLOPs and the time's formula are `gclib.memory.flops`, the plan is the step's own. The
texts are random tokens of chosen lengths, from all alike to a few very long ones.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from gclib.chunks import Chunk, schedule
from gclib.course import plots
from gclib.course.timing import median_ratio, seconds_by_round
from gclib.course.widgets.base import MeasuredLab, on_change, slider
from gclib.losses.module import ContrastiveLoss
from gclib.memory.flops import (
    TokenCount,
    count_flops,
    count_tokens,
    encoder_cost,
    forecast_flops,
    plan_towers,
)
from gclib.models.encoder import Encoder
from gclib.steps import grad_cache_step, naive_step
from gclib.support.validation import int_at_least, positive_int, refuse

BATCH = 64
TOWERS = ("queries", "passages")
MEDIANS, LONGEST = (20, 48), (64, 128)  # tokens of a tower's middle row, and the most that one may have
CHUNKS = (4, 8, 16, 32, 64)
SPREADS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROUNDS = 3
VOCABULARY = 1000
_USED, _PADDING = plots.OKABE_ITO["sky blue"], plots.OKABE_ITO["pale grey"]


@dataclass(frozen=True)
class PriceSettings:
    """What the controls say: C, R, the spread of the lengths, and whether rows are sorted and trimmed."""

    chunk_size: int = 8
    retain_chunks: int = 0
    spread: float = 0.5
    sort: bool = True

    def options(self) -> dict[str, Any]:
        """The same as arguments of `grad_cache_step`."""
        return {
            "chunk_size": self.chunk_size,
            "retain_chunks": self.retain_chunks,
            "sort_by_length": self.sort,
        }


@dataclass(frozen=True)
class Price:
    """A step against the padded naive step: time and FLOPs as ratios, with the tokens behind them."""

    tokens: TokenCount
    flops_ratio: float


@dataclass(frozen=True)
class Measured:
    """What was measured on this machine: the median ratio of seconds, and the ratio of the FLOPs that torch counts."""

    time_ratio: float
    flops_ratio: float


def spread_lengths(rows: int, spread: float, *, median: int, longest: int, seed: int = 0) -> list[int]:
    """Row lengths at the quantiles of a log-normal distribution, in an order that looks random, always the same.

    spread: the standard deviation of the logarithm; 0 makes all rows equally long. No row is shorter than 2 tokens or
    longer than `longest`. Raises ValueError for a spread below 0.
    """
    positive_int("rows", rows)
    if not spread >= 0:
        raise refuse("spread", "must be at least 0", spread)
    normal = NormalDist().inv_cdf
    quantiles = [normal((row + 0.5) / rows) for row in range(rows)]
    lengths = [min(longest, max(2, round(median * float(np.exp(spread * z))))) for z in quantiles]
    random.Random(seed).shuffle(lengths)
    return lengths


def lengths_of(settings: PriceSettings) -> list[list[int]]:
    """Both towers' row lengths."""
    return [
        spread_lengths(BATCH, settings.spread, median=median, longest=longest, seed=tower)
        for tower, (median, longest) in enumerate(zip(MEDIANS, LONGEST, strict=True))
    ]


def plan_of(settings: PriceSettings) -> tuple[list[list[Chunk]], set[tuple[int, int]]]:
    """Each tower's chunks, and which of them, as (tower, chunk), keep their graph."""
    plans = plan_towers(lengths_of(settings), chunk_size=settings.chunk_size, sort_by_length=settings.sort)
    return plans, {(tower, chunk) for tower, chunk, retained in schedule(plans, settings.retain_chunks) if retained}


def plot_plan(axes: Axes, lengths: Sequence[int], plan: Sequence[Chunk], kept: Sequence[int], *, name: str) -> None:
    """Draw one tower's chunks as rectangles, rows down and tokens across, the first chunk on top.

    Used tokens are hatched, padding is pale; a chunk whose graph is kept has a thick outline and says so. The dashed
    frame is what the naive step encodes.
    """
    top, used = 0, [lengths[row] for chunk in plan for row in chunk.rows]
    for number, chunk in enumerate(plan):
        bold = number in kept
        axes.add_patch(Rectangle((0, top), chunk.width, len(chunk), facecolor=_PADDING, edgecolor="none"))
        edge = {"edgecolor": plots.INK, "linewidth": 2.6 if bold else 0.7, "zorder": 4 if bold else 3}
        axes.add_patch(Rectangle((0, top), chunk.width, len(chunk), fill=False, **edge))
        if bold:
            look = {"va": "center", "fontsize": 8, "zorder": 5}
            look["bbox"] = {"facecolor": plots.PAPER, "edgecolor": "none", "pad": 0.6}
            axes.text(chunk.width + 0.015 * max(lengths), top + len(chunk) / 2, "kept", **look)
        top += len(chunk)
    look = {"facecolor": _USED, "hatch": "///", "edgecolor": plots.INK, "linewidth": 0.0, "zorder": 2}
    axes.fill_betweenx(range(len(used) + 1), 0, [*used, used[-1]], step="post", **look)
    frame = {"linestyle": "--", "edgecolor": plots.CARD_COLOR, "linewidth": 1.2, "zorder": 3}
    axes.add_patch(Rectangle((0, 0), max(lengths), len(lengths), fill=False, **frame))
    axes.set(xlim=(0, max(lengths) * 1.14), ylim=(len(lengths) + 0.8, -0.8), xlabel="tokens", ylabel="rows")
    axes.set_title(name, loc="left", fontsize=10)


def plot_plans(figure: Figure, panels: Sequence[Axes], settings: PriceSettings) -> None:
    """Draw both towers' plans on two panels, and name the looks below them."""
    plans, retained = plan_of(settings)
    for tower, (axes, lengths) in enumerate(zip(panels, lengths_of(settings), strict=True)):
        mine = [chunk for place, chunk in retained if place == tower]
        plot_plan(axes, lengths, plans[tower], mine, name=TOWERS[tower])
    handles = [
        Patch(facecolor=_USED, hatch="///", edgecolor=plots.INK, linewidth=0.3, label="used tokens"),
        Patch(facecolor=_PADDING, edgecolor=plots.INK, linewidth=0.7, label="padding, encoded all the same"),
        Patch(facecolor=plots.PAPER, edgecolor=plots.INK, linewidth=2.6, label="graph kept"),
        Patch(facecolor=plots.PAPER, edgecolor=plots.CARD_COLOR, linestyle="--", label="naive"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)


class PriceLab(MeasuredLab):
    """Sliders for C, R and the spread of lengths, a switch for sorting, and Measure. All works from the keyboard.

    Attributes, each an ipywidget: chunk_size, retain, spread, sort, words, picture, measure, status. `table()` says all
    of it in text, with every measurement so far. The keywords set where the controls start.
    """

    compares = "the naive and the cached step"
    unmeasured = "Not measured with these settings. Measure takes some seconds."
    heads = ("C", "R", "spread", "sorted", "time, predicted", "measured", "FLOPs, predicted", "counted")

    def __init__(self, *, chunk_size: int = 8, retain_chunks: int = 0, spread: float = 0.5, sort: bool = True):
        super().__init__("Run the naive and the cached step on this machine, a few times in turn")
        tooltip = "The most rows that are encoded at once"
        self.chunk_size = slider("Chunk", CHUNKS, chunk_size, tooltip, argument="chunk_size")
        self.spread = slider("Spread", SPREADS, spread, "How unlike the lengths are: 0 is all alike")
        chunks = _chunks(PriceSettings(chunk_size, 0, spread, sort))
        if int_at_least("retain_chunks", retain_chunks, 0) > chunks:
            raise refuse("retain_chunks", f"must be at most the {chunks} chunks of this plan", retain_chunks)
        tooltip = "Chunks that keep their graph"
        self.retain = widgets.IntSlider(retain_chunks, 0, chunks, description="Retained", tooltip=tooltip)
        self.sort = widgets.Checkbox(sort, description="sort by length, trim each chunk", indent=False)
        with torch.random.fork_rng():
            self._encoder = Encoder.from_config("mini", vocab_size=VOCABULARY).train()
        self._cost = encoder_cost(self._encoder)
        classes = {"price-chunk": self.chunk_size, "price-retained": self.retain, "price-spread": self.spread}
        self.arrange([self.chunk_size, self.retain], [self.spread, self.sort], *self.outputs, classes=classes)
        on_change(self.refresh, self.retain)
        on_change(self._on_plan, self.chunk_size, self.spread, self.sort)
        self.refresh()

    def settings(self) -> PriceSettings:
        """What the controls say now."""
        return PriceSettings(self.chunk_size.value, self.retain.value, self.spread.value, self.sort.value)

    def predict(self, settings: PriceSettings | None = None) -> Price:
        """The predicted price of these settings, by default those of the controls. Nothing is run."""
        settings = settings or self.settings()
        lengths, costs = lengths_of(settings), [self._cost, self._cost]
        cached = forecast_flops("grad_cache", costs, lengths, **settings.options())
        tokens = count_tokens(lengths, **settings.options())
        return Price(tokens, cached.total / forecast_flops("naive", costs, lengths).total)

    def describe(self) -> str:
        """Picture and prediction in words, for an alt text."""
        settings, (plans, retained) = self.settings(), plan_of(self.settings())
        parts = []
        for tower, (name, plan) in enumerate(zip(TOWERS, plans, strict=True)):
            widths = [chunk.width for chunk in plan]
            bold = sum(place[0] == tower for place in retained)
            sides = f"{min(widths)} to {max(widths)}" if len(set(widths)) > 1 else widths[0]
            parts.append(f"{name}: {_count(len(plan), 'chunk')}, {sides} tokens wide, {bold} of them kept")
        named = f"The plan of {BATCH} pairs in chunks of at most {settings.chunk_size}"
        return f"{named}. {'; '.join(parts)}. {self._prediction()}"

    def _plan(self) -> tuple[list[str], list[list[object]]]:
        plans, retained = plan_of(self.settings())
        rows = []
        for tower, (name, plan, lengths) in enumerate(zip(TOWERS, plans, lengths_of(self.settings()), strict=True)):
            tokens = sum(chunk.tokens for chunk in plan)
            padding = f"{1 - sum(lengths) / tokens:.0%}"
            bold = sum(place[0] == tower for place in retained)
            rows.append([name, len(plan), bold, len(lengths) * max(lengths), tokens, sum(lengths), padding])
        return ["tower", "chunks", "kept", "naive tokens", "encoded", "used", "padding"], rows

    def _row(self, settings: PriceSettings, measured: Measured) -> list[object]:
        price = self.predict(settings)
        row = [settings.chunk_size, settings.retain_chunks, f"{settings.spread:g}", settings.sort]
        ratios = (price.tokens.time_ratio, measured.time_ratio, price.flops_ratio, measured.flops_ratio)
        return [*row, *(f"{ratio:.3f}" for ratio in ratios)]

    def _prediction(self) -> str:
        price = self.predict()
        tokens = price.tokens
        return (
            f"Predicted: time {tokens.time_ratio:.2f} of the padded naive step's, FLOPs {price.flops_ratio:.2f}. One "
            f"forward encodes {tokens.encoded:,} of {tokens.padded:,} padded tokens (rho = {tokens.rho:.2f}); "
            f"{tokens.retained_share:.0%} of them keep their graph (r = {tokens.retained_share:.2f})."
        )

    def _figure(self) -> Figure:
        figure, panels = plots.new_figure(1, 2, width=7.8, height=3.1)
        plot_plans(figure, panels, self.settings())
        return figure

    def _on_plan(self) -> None:
        before = self.retain.value
        self.retain.max = _chunks(self.settings())
        if self.retain.value == before:
            self.refresh()

    def _measure(self, settings: PriceSettings) -> Measured:
        loss_fn, towers = ContrastiveLoss(0.05), [self._encoder, self._encoder]
        with torch.random.fork_rng():
            batch = [random_tokens(lengths) for lengths in lengths_of(settings)]
            calls = {
                "naive": lambda: naive_step(towers, batch, loss_fn),
                "cached": lambda: grad_cache_step(towers, batch, loss_fn, verify="never", **settings.options()),
            }
            flops = {name: count_flops(call) for name, call in calls.items()}
            seconds = seconds_by_round(calls, rounds=ROUNDS)
            self._encoder.zero_grad()
        return Measured(median_ratio(seconds["cached"], seconds["naive"]), flops["cached"] / flops["naive"])

    def _compared(self, measured: Measured) -> str:
        price = self.predict()
        return (
            f"Measured here: time {measured.time_ratio:.2f} (predicted {price.tokens.time_ratio:.2f}); FLOPs counted "
            f"{measured.flops_ratio:.4f} (predicted {price.flops_ratio:.4f})."
        )


def random_tokens(lengths: Sequence[int]) -> dict[str, Tensor]:
    """A batch of random token ids of these lengths, padded to the longest."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(5, VOCABULARY, mask.shape) * mask, "attention_mask": mask}


def _chunks(settings: PriceSettings) -> int:
    """How many chunks both towers have."""
    return sum(map(len, plan_of(settings)[0]))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
