"""Which step, chunk, tile and how many retained chunks fit a card, and take the least time.

All candidates give the same gradient: the naive step, and gradient caching. Time is the cost model's: 1 for the naive
step, 1 + (1 - r) / 3 for gradient caching with the share r of its tokens in retained chunks
(`gclib.memory.flops.time_ratio`). Bytes are the forecasts'. So nothing is run.
"""

from dataclasses import dataclass, replace
from typing import Any

from gclib.losses.module import ContrastiveLoss
from gclib.memory.flops import time_ratio
from gclib.memory.forecast import MemoryForecast, choose_retained, forecast_step, largest_chunk
from gclib.support.validation import positive_int, refuse
from gclib.support.words import format_bytes

TILE_SIDES = (None, 4_096, 1_024)  # the dense loss, then tiles of which one takes 64 and 4 MiB in float32
USUAL_CHUNKS = tuple(2**power for power in range(11))
MOST_TILES = 4_096  # beyond this a forecast, which runs each tile once with fake tensors, takes minutes


@dataclass(frozen=True)
class StepPlan:
    """What to run on a card, what it takes there, and why.

    chunk_size: None for the naive step. tile_size: None for the dense loss. time_ratio: time over the naive step's, by
    the cost model, and 1 for the naive step itself.
    """

    step: str
    chunk_size: int | None
    retain_chunks: int
    tile_size: int | None
    peak_bytes: int
    time_ratio: float
    reason: str

    def options(self) -> dict[str, Any]:
        """The step's own keywords, as `grad_cache_step` takes them; none for the naive step."""
        if self.step == "naive":
            return {}
        return {"chunk_size": self.chunk_size, "retain_chunks": self.retain_chunks}


def best_plan(
    budget_bytes: int, *, batch_size: int, temperature: float = 0.05, symmetric: bool = False, **same: Any
) -> StepPlan:
    """The plan that takes the least time among those whose forecast stays within budget_bytes.

    The naive step where it fits. Else gradient caching: dense logits before tiles, and of the usual chunks (powers of
    two, and the largest that fits) the one whose memory leaves room to retain the largest share of the tokens; of
    equals the largest chunk, because it asks the least of a device. `same`: the other arguments of `forecast_step`,
    without step, loss, chunks and retained chunks; lengths are those of a padded batch.

    Raises ValueError where nothing fits, and names the bytes of the smallest step.
    """
    positive_int("budget_bytes", budget_bytes)
    positive_int("batch_size", batch_size)
    for name in ("query_length", "passage_length"):
        if isinstance(same.get(name), (list, tuple)):
            raise refuse(
                name, "must be one int for all rows (or None for pictures): plans are of a padded batch", "a list"
            )
    for name in ("loss", "chunk_size", "chunk_tokens", "retain_chunks"):
        if name in same:
            raise refuse(name, "must be left to best_plan, which chooses it", same[name])
    smallest = None
    for tile in TILE_SIDES:
        if tile is not None and (tile >= batch_size or (-(-batch_size // tile)) ** 2 > MOST_TILES):
            continue
        loss = ContrastiveLoss(temperature, symmetric=symmetric, tile_size=tile)
        given = {"batch_size": batch_size, "loss": loss, **same}
        naive = forecast_step("naive", **given)
        if naive.peak_bytes <= budget_bytes:
            return _naive(naive, tile, budget_bytes)
        smallest = forecast_step("grad_cache", chunk_size=1, **given)
        if smallest.peak_bytes <= budget_bytes:
            return _cached(budget_bytes, naive.peak_bytes, tile, given)
    needed = format_bytes(smallest.peak_bytes)
    raise refuse("budget_bytes", f"must be at least the {needed} of one row a chunk", format_bytes(budget_bytes))


def _naive(forecast: MemoryForecast, tile: int | None, budget_bytes: int) -> StepPlan:
    logits = "" if tile is None else f", with the logits in tiles of {tile:,},"
    reason = (
        f"The whole batch at once{logits} takes {format_bytes(forecast.peak_bytes)} of {format_bytes(budget_bytes)}: "
        "nothing has to be encoded twice."
    )
    return StepPlan("naive", None, 0, tile, forecast.peak_bytes, 1.0, reason)


def _cached(budget_bytes: int, naive_bytes: int, tile: int | None, given: dict[str, Any]) -> StepPlan:
    """Gradient caching: the chunk with the least time."""
    largest = largest_chunk(budget_bytes=budget_bytes, **given)
    sizes = sorted({largest, *(size for size in USUAL_CHUNKS if size < largest)})
    plans = [_with_retained(budget_bytes, size, tile, given) for size in sizes]
    best = min(plans, key=lambda plan: (plan.time_ratio, -plan.chunk_size))
    tiles = "" if tile is None else f" The dense logits alone would not leave room for a row, so tiles of {tile:,}."
    reason = (
        f"The whole batch at once takes {format_bytes(naive_bytes)}, more than {format_bytes(budget_bytes)}.{tiles} "
        f"Chunks of {best.chunk_size:,} rows take {format_bytes(best.peak_bytes)} with {best.retain_chunks:,} of them "
        f"retained: {best.time_ratio:.2f} of the naive step's time, by the cost model."
    )
    return replace(best, reason=reason)


def _with_retained(budget_bytes: int, size: int, tile: int | None, given: dict[str, Any]) -> StepPlan:
    """The plan for this chunk size, with as many chunks retained as fit."""
    retained = choose_retained(budget_bytes, chunk_size=size, **given)
    forecast = forecast_step("grad_cache", chunk_size=size, retain_chunks=retained, **given)
    share = retained_share(forecast, given)
    return StepPlan("grad_cache", size, retained, tile, forecast.peak_bytes, time_ratio(1.0, share), "")


def retained_share(forecast: MemoryForecast, given: dict[str, Any]) -> float:
    """r: the share of a padded batch's tokens whose chunks are encoded once (pictures count as one token each).

    Read off the forecast's timeline: what is replayed was not retained.
    """
    widths = [given[name] or 1 for name in ("query_length", "passage_length")]
    rows = (given["batch_size"], given["batch_size"] * (1 + given.get("negatives", 0)))
    tokens = sum(count * width for count, width in zip(rows, widths, strict=True))
    replayed = sum(
        piece.rows * piece.repeats * widths[piece.tower]
        for piece in forecast.timeline
        if piece.phase == "replay" and piece.rows
    )
    return 1 - replayed / tokens
