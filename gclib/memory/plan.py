"""What fits a card: the largest batch or chunk, the most retained chunks, and the step that takes the least time.

All candidates of `best_plan` give the same gradient: the naive step, and gradient caching. Time is the cost model's: 1
for the naive step, 1 + (1 - r) / 3 for gradient caching with the share r of its tokens in retained chunks
(`gclib.memory.flops.time_ratio`). Bytes are the forecasts'. So nothing is run.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from gclib.losses.module import ContrastiveLoss
from gclib.memory.fake_steps import fake_step
from gclib.memory.flops import time_ratio
from gclib.memory.forecast import MemoryForecast, forecast_workload
from gclib.memory.workload import LENGTHS, Workload
from gclib.support.validation import one_of, positive_int, refuse
from gclib.support.words import format_bytes

TILE_SIDES = (None, 4_096, 1_024)  # the dense loss, then tiles of which one takes 64 and 4 MiB in float32
USUAL_CHUNKS = tuple(2**power for power in range(11))
MOST_TILES = 4_096  # beyond this a forecast, which runs each tile once with fake tensors, takes minutes


@dataclass(frozen=True)
class StepPlan:
    """What to run, what it takes there, and why.

    chunk_size or chunk_tokens: one int for all towers, or one a tower; of the naive step, the rows of each. tile_size:
    the loss's, None for the dense one. time_ratio: time over the naive step's, by the cost model, and 1 for the naive
    step itself.
    """

    step: str
    chunk_size: int | tuple[int, ...] | None
    retain_chunks: int
    tile_size: int | str | None
    peak_bytes: int
    time_ratio: float
    reason: str
    chunk_tokens: int | tuple[int, ...] | None = None

    def options(self) -> dict[str, Any]:
        """The keywords of `grad_cache_step` and `grad_cache_loss` for this plan.

        Of the naive step too: one chunk a tower, retained, is encoded once and as the batch stands, to `naive_step`'s
        gradient.
        """
        cut = {"chunk_size": self.chunk_size, "chunk_tokens": self.chunk_tokens}
        options = {name: value for name, value in cut.items() if value is not None}
        whole = {"sort_by_length": False} if self.step == "naive" else {}
        return {**options, "retain_chunks": self.retain_chunks, **whole}


def largest_batch(step: str, *, budget_bytes: int, largest: int = 2**20, **same: Any) -> int:
    """The largest batch_size, up to `largest`, whose forecast stays within budget_bytes; 0 where none does.

    `same`: the other arguments of `forecast_step`, without batch_size.
    """
    positive_int("budget_bytes", budget_bytes)
    smallest = Workload(step=step, batch_size=1, **same)
    return _largest("batch_size", smallest, budget_bytes, positive_int("largest", largest))


def largest_chunk(step: str = "grad_cache", *, budget_bytes: int, batch_size: int, **same: Any) -> int:
    """The largest chunk_size, up to the tower with the most rows, whose forecast stays within budget_bytes; 0 for none.

    step: "grad_cache" or "accumulation". `same`: the other arguments of `forecast_step`, without chunk_size.
    """
    positive_int("budget_bytes", budget_bytes)
    one_of("step", step, ("grad_cache", "accumulation"))
    smallest = Workload(step=step, batch_size=batch_size, chunk_size=1, **same)
    return _largest("chunk_size", smallest, budget_bytes, smallest.rows[1 if step == "grad_cache" else 0])


def choose_retained(budget_bytes: int, **same: Any) -> int:
    """The largest `retain_chunks` whose forecast stays within budget_bytes; ValueError where not even 0 does.

    `same`: the other arguments of `forecast_step` for "grad_cache", without retain_chunks.
    """
    positive_int("budget_bytes", budget_bytes)
    return _most_retained(Workload(step="grad_cache", **same), budget_bytes)


def _most_retained(workload: Workload, budget_bytes: int) -> int:
    peak = forecast_workload(workload).peak_bytes
    if peak > budget_bytes:
        raise refuse("budget_bytes", f"must be at least the {peak} bytes of a step that retains nothing", budget_bytes)
    return _largest("retain_chunks", workload, budget_bytes, workload.chunk_count)


def _largest(name: str, workload: Workload, budget_bytes: int, largest: int) -> int:
    """The largest value of this field with which the forecast of the workload stays within budget_bytes."""
    fake = fake_step(workload)
    return last_true(
        lambda n: forecast_workload(replace(workload, **{name: n}), fake).peak_bytes <= budget_bytes, largest
    )


def last_true(fits: Callable[[int], bool], largest: int) -> int:
    """The largest n up to `largest` with fits(n), for a fits that turns from True to False once; 0 where none."""
    low, high = 0, 1
    while high <= largest and fits(high):
        low, high = high, high * 2
    high = min(high, largest + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


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
    for name in LENGTHS:
        if isinstance(same.get(name), (list, tuple)):
            rule = "must be one int for all rows (or None for pictures): plans are of a padded batch"
            raise refuse(name, rule, "a list")
    for name in ("loss", "chunk_size", "chunk_tokens", "retain_chunks"):
        if name in same:
            raise refuse(name, "must be left to best_plan, which chooses it", same[name])
    smallest = None
    for tile in TILE_SIDES:
        if tile is not None and (tile >= batch_size or not fits_tiles(batch_size, tile)):
            continue
        loss = ContrastiveLoss(temperature, symmetric=symmetric, tile_size=tile)
        whole = Workload(step="naive", batch_size=batch_size, loss=loss, **same)
        naive = forecast_workload(whole)
        if naive.peak_bytes <= budget_bytes:
            return _naive(naive, whole, tile, budget_bytes)
        row_by_row = replace(whole, step="grad_cache", chunk_size=1)
        smallest = forecast_workload(row_by_row)
        if smallest.peak_bytes <= budget_bytes:
            return _cached(budget_bytes, naive.peak_bytes, tile, row_by_row)
    needed = format_bytes(smallest.peak_bytes)
    raise refuse("budget_bytes", f"must be at least the {needed} of one row a chunk", format_bytes(budget_bytes))


def fits_tiles(rows: int, tile: int) -> bool:
    """Whether the loss of so many rows is in few enough tiles of this side for a forecast."""
    return (-(-rows // tile)) ** 2 <= MOST_TILES


def _naive(naive: MemoryForecast, workload: Workload, tile: int | None, budget_bytes: int) -> StepPlan:
    logits = "" if tile is None else f", with the logits in tiles of {tile:,},"
    reason = (
        f"The whole batch at once{logits} takes {format_bytes(naive.peak_bytes)} of {format_bytes(budget_bytes)}: "
        "nothing has to be encoded twice."
    )
    return StepPlan("naive", workload.rows, len(workload.rows), tile, naive.peak_bytes, 1.0, reason)


def _cached(budget_bytes: int, naive_bytes: int, tile: int | None, row_by_row: Workload) -> StepPlan:
    """Gradient caching: the chunk with the least time."""
    largest = _largest("chunk_size", row_by_row, budget_bytes, row_by_row.rows[1])
    sizes = sorted({largest, *(size for size in USUAL_CHUNKS if size < largest)})
    plans = [_with_retained(budget_bytes, tile, replace(row_by_row, chunk_size=size)) for size in sizes]
    best = min(plans, key=lambda plan: (plan.time_ratio, -plan.chunk_size))
    tiles = "" if tile is None else f" The dense logits alone would not leave room for a row, so tiles of {tile:,}."
    reason = (
        f"The whole batch at once takes {format_bytes(naive_bytes)}, more than {format_bytes(budget_bytes)}.{tiles} "
        f"Chunks of {best.chunk_size:,} rows take {format_bytes(best.peak_bytes)} with {best.retain_chunks:,} of them "
        f"retained: {best.time_ratio:.2f} of the naive step's time, by the cost model."
    )
    return replace(best, reason=reason)


def _with_retained(budget_bytes: int, tile: int | None, workload: Workload) -> StepPlan:
    """The plan for these chunks, with as many of them retained as fit."""
    retained = _most_retained(workload, budget_bytes)
    cached = forecast_workload(replace(workload, retain_chunks=retained))
    ratio = time_ratio(1.0, retained_share(cached, workload))
    return StepPlan("grad_cache", workload.chunk_size, retained, tile, cached.peak_bytes, ratio, "")


def retained_share(cached: MemoryForecast, workload: Workload) -> float:
    """r: the share of a padded batch's tokens whose chunks are encoded once (pictures count as one token each).

    Read off the forecast's timeline: what is replayed was not retained.
    """
    widths = [width or 1 for width in workload.widths]
    tokens = sum(count * width for count, width in zip(workload.rows, widths, strict=True))
    replayed = sum(
        piece.rows * piece.repeats * widths[piece.tower]
        for piece in cached.timeline
        if piece.phase == "replay" and piece.rows
    )
    return 1 - replayed / tokens
