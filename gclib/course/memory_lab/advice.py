"""What the memory lab advises: whether a step fits, and where it does not, what to change.

What is advised has been forecast, and fits; where nothing does, that is said. A change is one of the lab's own values,
so that it can be followed.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from math import ceil

from gclib.course.memory_lab.answers import (
    BATCHES,
    CHUNKS,
    LENGTHS,
    LORA_RANKS,
    MOST_TILES,
    ONE_RANK,
    OPERATIONS,
    RETAINED,
    TILES,
    LabSettings,
    forecast_of,
    most_forecast,
    peak_of,
    tile_count,
)
from gclib.memory.forecast import MemoryForecast
from gclib.memory.ledger import KINDS
from gclib.memory.plan import last_true
from gclib.memory.timeline import largest_kinds
from gclib.support.words import format_bytes

MODEL_KINDS = ("parameters", "gradients", "optimizer")
HALF, LOW_RANK = {"precision": "pure bf16"}, {"lora_rank": LORA_RANKS[1]}
LORA = f"LoRA of rank {LORA_RANKS[1]}"
CHANGES = {  # what lets a query fit where the model or one row is too big
    LORA: LOW_RANK,
    f"{LORA} in pure bf16": {**HALF, **LOW_RANK},
    "8 ranks with shards (FSDP2)": {"ranks": "8 FSDP2"},
    "SGD": {"optimizer": "sgd"},
    "pure bf16": HALF,
    "pure bf16 and SGD": {**HALF, "optimizer": "sgd"},
    "checkpointing": {"checkpointing": True},
    f"texts of {LENGTHS[0]} tokens": {"length": LENGTHS[0], "query_length": None},
}


def advice(settings: LabSettings, forecast: MemoryForecast, budget_bytes: int, budget_name: str = "the card") -> str:
    """The peak, whose operations it counts, what it is made of, whether it fits, and what to change."""
    if forecast.peak_bytes <= budget_bytes:
        return f"{verdict(settings, forecast, budget_bytes, budget_name)} {_room(settings, budget_bytes)}"
    return f"{verdict(settings, forecast, budget_bytes, budget_name)} {way_out(settings, budget_bytes).words}"


def verdict(settings: LabSettings, forecast: MemoryForecast, budget_bytes: int, budget_name: str) -> str:
    """The peak, what it is made of, and whether it fits: two sentences."""
    kinds = largest_kinds(forecast.at_peak(), smallest_share=0.1)
    made_of = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in kinds)
    share = forecast.peak_bytes / budget_bytes
    rank = "" if settings.ranks == ONE_RANK else " of a rank" + ", at most" * settings.sharded
    peak_words = f"Peak{rank} {format_bytes(forecast.peak_bytes)}: {made_of}, with {OPERATIONS[settings.device]}."
    if share <= 1:
        room = "under 1 %" if share < 0.01 else f"{100 * share:.0f} %"
        return f"{peak_words} It fits within {budget_name} and takes {room} of it."
    rest = forecast.peak_bytes - budget_bytes
    over = f"{share:,.1f} times too big" if share >= 2 else f"{format_bytes(rest)} too much"
    return f"{peak_words} It does not fit within {budget_name}: {over}."


def _room(settings: LabSettings, budget_bytes: int) -> str:
    """What the room that is left is good for, where a forecast says so."""
    if settings.step == "accumulation":
        if settings.chunk_size >= settings.batch_size and settings.ranks == ONE_RANK:
            return "One chunk holds the whole batch here: this is the naive step."
        return "But accumulation loses negatives: each chunk sees only its own."
    if peak_of(settings) <= budget_bytes / 2:
        calls = ceil(settings.passages / settings.chunk_size)
        fewer = [replace(settings, chunk_size=size) for size in CHUNKS if ceil(settings.passages / size) < calls]
        if settings.step != "naive" and _fits(fewer[:1], budget_bytes):
            return f"There is room: chunks of {fewer[0].chunk_size:,} fit too, and need fewer, larger encoder calls."
        more = [size for size in BATCHES if settings.batch_size < size <= most_forecast(settings)]
        if bigger := _fits([replace(settings, batch_size=size) for size in more[:1]], budget_bytes):
            whole = ", whole and without chunks" if settings.step == "naive" else ""
            return f"There is room: a batch of {bigger.batch_size:,} fits too{whole}."
        if not more:
            return "The slider has no larger batch that is forecast here."
    return "Leave some room: an allocator takes more than live tensors alone."


@dataclass(frozen=True)
class WayOut:
    """What to change where a step does not fit, in a sentence or two, and the settings that then fit: None for none."""

    words: str
    settings: LabSettings | None = None


def way_out(settings: LabSettings, budget_bytes: int, wanted: Callable[[], bool] = lambda: True) -> WayOut:
    """What to change where a step does not fit. What is advised has been forecast, and fits.

    wanted: is asked between forecasts; once it says no, the search ends and is not remembered.
    """
    key = (settings, budget_bytes)
    if key not in _ways_out:
        found = _look_for_a_way_out(settings, budget_bytes, wanted)
        if not wanted():
            return found
        _ways_out[key] = found
    return _ways_out[key]


def knows_a_way_out(settings: LabSettings, budget_bytes: int) -> bool:
    """Whether `way_out` answers at once; otherwise it makes dozens or hundreds of forecasts first."""
    return (settings, budget_bytes) in _ways_out


_ways_out: dict[tuple[LabSettings, int], WayOut] = {}


def _look_for_a_way_out(settings: LabSettings, budget_bytes: int, wanted: Callable[[], bool]) -> WayOut:
    sizes = (1, next(size for size in CHUNKS if size > settings.negatives))
    least = [replace(settings, **_LEAST, chunk_size=size) for size in sizes]
    least += [replace(least[0], retain_chunks=1), replace(settings, batch_size=1, chunk_size=1)]  # the step itself
    smallest = _fits(least, budget_bytes)
    if smallest is None:
        steps = "the gradient cache" if settings.step == "grad_cache" else "this step or the gradient cache"
        return _nothing_fits(least[0], steps, budget_bytes, wanted)
    ways = (_retain_less, _with_the_cache, _other_chunks, _with_tiles, _smaller_batch)
    for way in ways:
        options = takewhile(lambda _: wanted(), way(settings, budget_bytes))
        if (found := _fits(options, budget_bytes)) is not None or not wanted():
            break
    else:
        found = _largest_of_all(smallest, budget_bytes)
    if found is None:
        return WayOut("")
    return WayOut(f"{_why(settings, found)}: {_change(settings, found)}.", found)


_LEAST = {"step": "grad_cache", "batch_size": 1, "retain_chunks": 0, "tile_size": None}


def _fits(options: Iterable[LabSettings], budget_bytes: int) -> LabSettings | None:
    """The first of these settings that can be forecast and fits."""
    for option in options:
        try:
            if peak_of(option) <= budget_bytes:
                return option
        except Exception:  # what can't be forecast is not advised
            continue
    return None


def _retain_less(settings: LabSettings, budget_bytes: int) -> Iterator[LabSettings]:
    if settings.retained:
        yield from (replace(settings, retain_chunks=n) for n in RETAINED[::-1] if n < settings.retained)


def _chunks(settings: LabSettings) -> list[int]:
    """Chunk sizes: with the fewest encoder calls first, then the smaller; for accumulation the most negatives first."""
    whole = settings.batch_size if settings.step == "accumulation" else settings.passages
    sizes = [size for at, size in enumerate(CHUNKS) if at == 0 or CHUNKS[at - 1] < whole]
    if settings.step == "accumulation":
        return sizes[::-1]
    return sorted(sizes, key=lambda size: ceil(settings.batch_size / size) + ceil(settings.passages / size))


def _with_the_cache(settings: LabSettings, budget_bytes: int) -> Iterator[LabSettings]:
    """The gradient cache in place of another step, in as few encoder calls as fit."""
    if settings.step != "grad_cache":
        cached = replace(settings, step="grad_cache", retain_chunks=0)
        yield from (replace(cached, chunk_size=c) for c in _chunks(cached))


def _other_chunks(settings: LabSettings, budget_bytes: int) -> Iterator[LabSettings]:
    """Other chunks of the same step, fewest calls first: they keep fewer generator states."""
    if settings.step != "naive":
        yield from (
            replace(settings, chunk_size=c, retain_chunks=0) for c in _chunks(settings) if c != settings.chunk_size
        )


def _with_tiles(settings: LabSettings, budget_bytes: int) -> Iterator[LabSettings]:
    """The gradient cache with tiles, the largest first, in these chunks or others; none that can't fit anyhow."""
    cached = replace(settings, step="grad_cache", retain_chunks=0, tile_size=None)
    sizes = dict.fromkeys([settings.chunk_size, *_chunks(cached)])
    beside = {size: _beside_the_loss(replace(cached, chunk_size=size)) for size in sizes}
    for tile in TILES[::-1]:
        smaller = tile < (settings.tile_size or settings.batch_size)
        if (
            smaller
            and 2 * tile**2 <= budget_bytes
            and tile_count(cached.batch_size, cached.passages_each, tile) <= MOST_TILES
        ):
            fitting = (size for size in sizes if beside[size] <= budget_bytes)
            yield from (replace(cached, chunk_size=size, tile_size=tile) for size in fitting)


def _beside_the_loss(cached: LabSettings) -> int:
    """The peak of all phases of a gradient-cache step but the loss."""
    return max(piece.peak_bytes for piece in forecast_of(cached).timeline if piece.phase != "loss")


def _smaller_batch(settings: LabSettings, budget_bytes: int) -> Iterator[LabSettings]:
    """The largest batch that fits: as it is, with the gradient cache, or in other chunks."""
    for size in (size for size in BATCHES[::-1] if size < settings.batch_size):
        smaller = replace(settings, batch_size=size)
        yield smaller
        yield replace(smaller, retain_chunks=0)
        yield from _with_the_cache(smaller, budget_bytes)
        yield from _other_chunks(smaller, budget_bytes)


def _largest_of_all(smallest: LabSettings, budget_bytes: int) -> LabSettings:
    """The largest batch with the smallest chunks that fit, and then the best of all chunks with it."""
    batches = [replace(smallest, batch_size=size) for size in BATCHES]
    count = last_true(lambda n: _fits([batches[n - 1]], budget_bytes) is not None, len(batches))
    largest = batches[max(1, count) - 1]
    return _fits((replace(largest, chunk_size=size) for size in _chunks(largest)), budget_bytes) or smallest


def _why(settings: LabSettings, after: LabSettings) -> str:
    """What the peak is made of beside the model and "other" (its whole layers, copies); and whether a chunk helps."""
    at_peak = forecast_of(settings).at_peak()
    largest = max((kind for kind in KINDS if kind not in (*MODEL_KINDS, "other")), key=lambda kind: at_peak[kind])
    if settings.retained > 1 and after == replace(settings, retain_chunks=after.retain_chunks):
        return f"The graphs of {settings.retained:,} retained chunks are live at once"
    own = {
        "random states": "the states of the chunks' random generators",
        "activations": _whose_activations(settings),
        "loss": "the loss" if settings.tile_size else "the logits, B by all passages",
    }
    if settings.step == "accumulation":
        own["loss"] = "the loss of one chunk"
    said = f"The largest part beside the model is {own.get(largest, largest)}"
    other_chunks = replace(settings, chunk_size=after.chunk_size, retain_chunks=after.retain_chunks)
    if after == other_chunks and after.chunk_size > settings.chunk_size:
        return f"{said}, and a larger chunk takes less here"
    elsewhere = (after.batch_size, after.tile_size) != (settings.batch_size, settings.tile_size)
    if largest == "loss" and "logits" in own["loss"] and elsewhere:
        return f"{said}, and no chunk shrinks them"
    grow = ("inputs",) if settings.step == "accumulation" else ("inputs", "representations", "cache")
    return f"{said}, and that grows with the batch" if largest in grow else said


def _whose_activations(settings: LabSettings) -> str:
    """Of what those at the peak are: the batch, one chunk, or the retained chunks too."""
    if settings.step == "naive":
        return "the whole batch's activations"
    peak = max(forecast_of(settings).timeline, key=lambda piece: piece.peak_bytes)
    with_retained = settings.retained and peak.phase != "replay"
    return "activations, with those of retained chunks" if with_retained else "one chunk's activations"


def _change(before: LabSettings, after: LabSettings) -> str:
    """From one to the other in words, and what the other takes."""
    changes = []
    if after.step != before.step:
        chunk = "one row" if after.chunk_size == 1 else f"{after.chunk_size:,} rows"
        changes.append(f"take the gradient cache, in chunks of {chunk}")
    elif after.chunk_size != before.chunk_size:
        changes.append(f"make the chunk {after.chunk_size:,}")
    if after.retained != before.retained:
        changes.append(f"retain {after.retain_chunks or 'none'}")
    if after.tile_size != before.tile_size:
        changes.append("set a tile size of " + f"{after.tile_size:,}" if after.tile_size else "take the dense loss")
    stays = "the batch may stay"
    if after.batch_size != before.batch_size:
        stays = f"make the batch {after.batch_size:,}"
    elif before.step == after.step == "accumulation":
        stays = f"each query then meets only {after.chunk_size * (1 + after.negatives) - 1:,} other passages"
    lost = (
        ". Accumulation in smaller chunks would lose negatives" if before.step == "accumulation" != after.step else ""
    )
    return f"{', '.join([*changes, stays])}. That takes {format_bytes(peak_of(after))}{lost}"


def _nothing_fits(smallest: LabSettings, steps: str, budget_bytes: int, wanted: Callable[[], bool]) -> WayOut:
    """Words for settings of which not even one query fits, and which of some changes would let one fit.

    smallest: the gradient cache of one query. steps: with which none fits.
    """
    at_peak = forecast_of(smallest).at_peak()
    alone = "Rows one by one do not fit either"
    if sum(at_peak[kind] for kind in MODEL_KINDS) > budget_bytes:
        states = ", its gradients and AdamW's states" if smallest.optimizer == "adamw" else " and its gradients"
        alone = f"The model{states} alone are too big"
    helps = []
    if at_peak["parameters"] <= 2 * budget_bytes:  # else not even half of it fits
        for name, change in takewhile(lambda _: wanted(), CHANGES.items()):
            changed = replace(smallest, **change)
            needless = changed == smallest or "lora_rank" in change and (smallest.lora_rank or LORA in helps)
            if not needless and _fits([changed], budget_bytes):
                helps.append(name)
    which = "a smaller model or a larger budget would help"
    if helps:
        which = f"{' or '.join(helps)} would let one query fit"
    takes = (
        f"with {steps} no batch and no chunk fits, as one query takes {format_bytes(peak_of(smallest))} in the cache"
    )
    return WayOut(f"{alone}: {takes}; {which}.")
