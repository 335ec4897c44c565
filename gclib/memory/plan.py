"""What fits a card: the largest batch or chunk, the most retained chunks, and the step that takes the least time.

All candidates of `best_plan` give the same gradient: the naive step, and gradient caching. Time is counted FLOPs, each
chunk's second forward among them unless it is retained, and the price of each call (`gclib.chunks.price_of_a_call`).
Bytes are the forecasts'. So nothing is run. Plans whose times are within 1 % of the least count as equally quick: of
them the one with the largest chunk is taken.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from gclib.chunks import price_of_a_call
from gclib.losses.module import ContrastiveLoss
from gclib.memory.fake_steps import FakeStep, fake_step
from gclib.memory.forecast import MemoryForecast, chunk_groups, forecast_workload
from gclib.memory.workload import LENGTHS, Workload
from gclib.support.validation import one_of, positive_int, refuse
from gclib.support.words import format_bytes

TILE_SIDES = (None, 4_096, 1_024)  # the dense loss, then tiles of which one takes 64 and 4 MiB in float32
USUAL_CHUNKS = tuple(sorted({*range(1, 17), *(round(2 ** (n / 8)) for n in range(32, 105))}))  # up to 8,192
NEARLY = 1.01  # of the least time: such plans count as equally quick
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


def _most_retained(workload: Workload, budget_bytes: int, fake: FakeStep | None = None) -> int:
    peak = forecast_workload(workload, fake).peak_bytes
    if peak > budget_bytes:
        raise refuse("budget_bytes", f"must be at least the {peak} bytes of a step that retains nothing", budget_bytes)
    return _largest("retain_chunks", workload, budget_bytes, workload.chunk_count, fake)


def _largest(name: str, workload: Workload, budget_bytes: int, largest: int, fake: FakeStep | None = None) -> int:
    """The largest value of this field with which the forecast of the workload stays within budget_bytes."""
    fake = fake or fake_step(workload)
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
    two and steps between, the largest that fits, and all next to the best) the one that is quickest with as many
    chunks retained as fit; of nearly equal ones the largest, because it asks the least of a device. `same`: the other
    arguments of `forecast_step`, without step, loss, chunks and retained chunks; lengths are those of a padded batch.

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
    """Gradient caching: the chunk with the least time; of nearly equal ones the largest."""
    fake, workload = fake_step(row_by_row), row_by_row
    largest = _largest("chunk_size", workload, budget_bytes, workload.rows[1])
    price = StepPrice.of(workload, fake)

    @cache
    def plan(size: int) -> StepPlan:
        return _with_retained(budget_bytes, tile, replace(workload, chunk_size=size), fake, price)

    sizes = [size for size in USUAL_CHUNKS if size < largest] + [largest]
    limit = NEARLY * min(plan(size).time_ratio for size in sizes)
    coarse = max(size for size in sizes if plan(size).time_ratio <= limit)
    between = range(coarse, min(size for size in [*sizes, largest + 1] if size > coarse))
    best = plan(max(size for size in between if plan(size).time_ratio <= limit))
    tiles = "" if tile is None else f" The dense logits alone would not leave room for a row, so tiles of {tile:,}."
    reason = (
        f"The whole batch at once takes {format_bytes(naive_bytes)}, more than {format_bytes(budget_bytes)}.{tiles} "
        f"Chunks of {best.chunk_size:,} rows take {format_bytes(best.peak_bytes)} with {best.retain_chunks:,} of them "
        f"retained: {best.time_ratio:.2f} of the naive step's time, by counted FLOPs and the price of calls."
    )
    return replace(best, reason=reason)


def _with_retained(
    budget_bytes: int, tile: int | None, workload: Workload, fake: FakeStep, price: "StepPrice"
) -> StepPlan:
    """The plan for these chunks, with as many of them retained as fit."""
    retained = _most_retained(workload, budget_bytes, fake)
    workload = replace(workload, retain_chunks=retained)
    peak = forecast_workload(workload, fake).peak_bytes
    return StepPlan("grad_cache", workload.chunk_size, retained, tile, peak, price.time_ratio(workload), "")


@dataclass(frozen=True)
class StepPrice:
    """The time of a padded batch's steps, in FLOPs: a row's forward and backward of each tower, as they are counted
    (texts and pictures alike), and a forward that could be done in the time of a call.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    call: tuple[float, ...]

    @classmethod
    def of(cls, workload: Workload, fake: FakeStep) -> "StepPrice":
        """Counted with fake tensors, once for the encoders."""
        widths = workload.widths
        counts = [fake.row_flops(tower, width) for tower, width in enumerate(widths)]
        tokens = price_of_a_call(workload.device)
        calls = tuple(tokens * fake.token_flops(tower, width) for tower, width in enumerate(widths))
        return cls(tuple(f for f, _ in counts), tuple(b for _, b in counts), calls)

    def time_ratio(self, workload: Workload) -> float:
        """Time of a "grad_cache" workload over the naive step's."""
        groups = chunk_groups(workload.rows, workload.widths, workload.chunk_rows, workload.retain_chunks)
        time = sum(self._chunk(tower, rows, retained) * count for tower, rows, count, retained in groups)
        return time / sum(self._chunk(tower, rows, retained=True) for tower, rows in enumerate(workload.rows))

    def _chunk(self, tower: int, rows: int, retained: bool) -> float:
        """One chunk: a forward, a backward (twice a forward's calls), and a second forward unless it is retained."""
        trained = self.backward[tower] > 0
        forwards = 1 + (trained and not retained)
        calls = self.call[tower] * (forwards + 2 * trained)
        return rows * (forwards * self.forward[tower] + self.backward[tower]) + calls
