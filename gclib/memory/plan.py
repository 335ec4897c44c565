"""What fits a card: the largest batch or chunk, the most retained chunks, and the step that takes the least time.

All candidates of `best_plan` give the same gradient: the naive step, and gradient caching. Time is counted FLOPs, each
chunk's second forward among them unless it is retained, and the price of each call (`gclib.chunks.price_of_a_call`).
Bytes are the forecasts'. So nothing is run. Plans whose times are within 1 % of the least count as equally quick: of
them the one with the largest chunk is taken.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
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
MOST_TRIED = 64  # counts of retained chunks, where each forecast runs the whole step with fake tensors
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
    fake = fake_step(smallest)
    return last_true(
        lambda n: forecast_workload(replace(smallest, batch_size=n), fake).peak_bytes <= budget_bytes,
        positive_int("largest", largest),
    )


def largest_chunk(step: str = "grad_cache", *, budget_bytes: int, batch_size: int, **same: Any) -> int:
    """The largest chunk_size, up to the rows of the larger tower, whose forecast stays within budget_bytes; 0 for none.

    step: "grad_cache", or "accumulation" (up to the queries). `same`: the other arguments of `forecast_step`, without
    chunk_size.
    """
    positive_int("budget_bytes", budget_bytes)
    one_of("step", step, ("grad_cache", "accumulation"))
    smallest = Workload(step=step, batch_size=batch_size, chunk_size=1, **same)
    return _Chunks(smallest).largest(budget_bytes)


def choose_retained(budget_bytes: int, **same: Any) -> int:
    """The largest `retain_chunks` whose forecast stays within budget_bytes; ValueError where none does.

    `same`: the other arguments of `forecast_step` for "grad_cache", without retain_chunks.
    """
    positive_int("budget_bytes", budget_bytes)
    return _most_retained(Workload(step="grad_cache", **same), budget_bytes)


def _most_retained(workload: Workload, budget_bytes: int, fake: FakeStep | None = None) -> int:
    """The peak rises with what is retained, but for one fall where a tower's last full chunk is. Chunks of unlike rows
    are tried one by one, up to `MOST_TRIED`; of more it is taken to rise.
    """
    fake = fake or fake_step(workload)

    def peak(count: int) -> int:
        return forecast_workload(replace(workload, retain_chunks=count), fake).peak_bytes

    starts = [0]
    if workload.padded:
        groups = chunk_groups(workload.rows, workload.widths, workload.chunk_rows, 0)
        groups.sort(key=lambda group: -group[1] * (workload.widths[group[0]] or 1))
        starts = [0, *accumulate(count for _, _, count, _ in groups)]
    elif workload.chunk_count <= MOST_TRIED:
        starts = list(range(workload.chunk_count + 1))
    for start, stop in reversed(list(zip(starts, [*starts[1:], workload.chunk_count + 1], strict=True))):
        if peak(start) <= budget_bytes:
            return start + last_true(lambda n, start=start: peak(start + n) <= budget_bytes, stop - start - 1)
    least = min(map(peak, starts))
    raise refuse(
        "budget_bytes", f"must be at least the {least} bytes of the smallest step with this chunk", budget_bytes
    )


class _Chunks:
    """The peaks of a workload by its chunk size.

    A larger chunk has more activations and fewer generators' states, and where a tower has a single full chunk left,
    no later one adds to gradients: so the peak may fall as well as rise. What surely does not fall is that of each
    tower's first chunk in a phase, and of the loss, but for the states; where chunks are retained, that of the loss,
    for which chunks these are, and whether a tower has others, goes with the size.
    """

    def __init__(self, workload: Workload, fake: FakeStep | None = None):
        self.workload, self.fake = workload, fake or fake_step(workload)
        self.most = workload.rows[1 if workload.step == "grad_cache" else 0]
        self.state_bytes = self.fake.state_bytes() if workload.step == "grad_cache" else 0
        self.forecast = cache(lambda size: forecast_workload(self.of(size), self.fake))

    def of(self, size: int) -> Workload:
        """The workload in chunks of this size."""
        return replace(self.workload, chunk_size=size)

    def fits(self, size: int, budget_bytes: int) -> bool:
        """Whether the step stays within the budget."""
        return self.forecast(size).peak_bytes <= budget_bytes

    def largest(self, budget_bytes: int) -> int:
        """The largest size that fits; 0 where none does. One row takes operations of its own, and bounds nothing."""
        last = self._last(2, self.most, budget_bytes) if self.most > 2 else 0
        return last or next((size for size in (2, 1) if size <= self.most and self.fits(size, budget_bytes)), 0)

    def least(self) -> int:
        """The size of the lowest peak."""
        sizes = [size for size in USUAL_CHUNKS if size < self.most] + [self.most]
        size = min(sizes, key=lambda size: self.forecast(size).peak_bytes)
        while lower := self.largest(self.forecast(size).peak_bytes - 1):
            size = lower
        return size

    def _last(self, low: int, high: int, budget_bytes: int) -> int:
        """The largest size above `low`, up to `high`, that fits; 0 where none does."""
        if self.fits(high, budget_bytes):
            return high
        fewer = self.of(low).chunk_count - self.of(high).chunk_count
        if high - low == 1 or self._lasting(low) - fewer * self.state_bytes > budget_bytes:
            return 0
        middle = (low + high) // 2
        return self._last(middle, high, budget_bytes) or self._last(low, middle, budget_bytes)

    def _lasting(self, size: int) -> int:
        """The highest of what there is of larger chunks too."""
        first = {(segment.phase, segment.tower): segment.peak_bytes for segment in self.forecast(size).timeline[::-1]}
        return first["loss", None] if self.workload.retain_chunks else max(first.values())


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
    for tile in TILE_SIDES:
        if tile is not None and (tile >= batch_size or not fits_tiles(batch_size, tile)):
            continue
        loss = ContrastiveLoss(temperature, symmetric=symmetric, tile_size=tile)
        whole = Workload(step="naive", batch_size=batch_size, loss=loss, **same)
        naive = forecast_workload(whole)
        if naive.peak_bytes <= budget_bytes:
            return _naive(naive, whole, tile, budget_bytes)
        chunks = _Chunks(replace(whole, step="grad_cache", chunk_size=1))
        if largest := chunks.largest(budget_bytes):
            return _cached(budget_bytes, naive.peak_bytes, tile, chunks, largest)
    size = chunks.least()
    needed = f"{format_bytes(chunks.forecast(size).peak_bytes)} of {'one row' if size == 1 else f'{size} rows'} a chunk"
    raise refuse("budget_bytes", f"must be at least the {needed}", format_bytes(budget_bytes))


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


def _cached(budget_bytes: int, naive_bytes: int, tile: int | None, chunks: _Chunks, largest: int) -> StepPlan:
    """Gradient caching: the chunk with the least time; of nearly equal ones the largest."""
    price = StepPrice.of(chunks.workload, chunks.fake)

    @cache
    def plan(size: int) -> StepPlan:
        """For these chunks, with as many of them retained as fit."""
        retained = _most_retained(chunks.of(size), budget_bytes, chunks.fake)
        workload = replace(chunks.of(size), retain_chunks=retained)
        peak = forecast_workload(workload, chunks.fake).peak_bytes
        return StepPlan("grad_cache", workload.chunk_size, retained, tile, peak, price.time_ratio(workload), "")

    def quick(sizes: Iterable[int], limit: float) -> int:
        return max(size for size in sizes if chunks.fits(size, budget_bytes) and plan(size).time_ratio <= limit)

    sizes = [size for size in (*USUAL_CHUNKS, largest) if size <= largest and chunks.fits(size, budget_bytes)]
    limit = NEARLY * min(plan(size).time_ratio for size in sizes)
    coarse = quick(sizes, limit)
    best = plan(quick(range(coarse, min(size for size in [*sizes, largest + 1] if size > coarse)), limit))
    tiles = "" if tile is None else f" Beside the dense logits no chunk fits, so tiles of {tile:,}."
    reason = (
        f"The whole batch at once takes {format_bytes(naive_bytes)}, more than {format_bytes(budget_bytes)}.{tiles} "
        f"Chunks of {best.chunk_size:,} rows take {format_bytes(best.peak_bytes)} with {best.retain_chunks:,} of them "
        f"retained: {best.time_ratio:.2f} of the naive step's time, by counted FLOPs and the price of calls."
    )
    return replace(best, reason=reason)


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
