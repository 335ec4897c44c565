"""What the memory lab knows, without any widget: settings, their forecast, and what to say about it.

Everything here answers in words or numbers, so that a slider, a table and a test share one source.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from gclib.encoder import SIZES
from gclib.forecast import GPU_MEMORY_BYTES, STEPS, MemoryForecast, forecast_step
from gclib.ledger import KINDS
from gclib.losses import ContrastiveLoss
from gclib.tiled import tiled_contrastive_loss
from gclib.timeline import largest_kinds
from gclib.units import GiB, MiB, format_bytes
from gclib.validation import one_of, positive_int, refuse

TEMPERATURE = 0.05
MOST_TILES = 64  # the forecast of a tiled loss runs every tile once, with fake tensors
EVENT_BYTES = 500  # what one recorded event takes in the ledger itself
SLOW_SECONDS = 60.0
BUDGETS = {
    **{format_bytes(size, digits=1): size for size in (64 * MiB, 128 * MiB, 256 * MiB, 512 * MiB)},
    **{format_bytes(n * GiB, digits=1): n * GiB for n in (1, 2, 4, 8)},
    **GPU_MEMORY_BYTES,
}
MODEL_KINDS = ("parameters", "gradients", "optimizer")
STEP_WORDS = {
    "naive": "whole batch at once (naive)",
    "accumulation": "gradient accumulation",
    "grad_cache": "gradient cache",
}
_fitted: set[tuple] = set()


@dataclass(frozen=True)
class LabSettings:
    """One position of all controls.

    length: tokens that every query and passage is padded to. tile_size: None for the dense loss.
    """

    step: str = "grad_cache"
    model: str = "mini"
    batch_size: int = 64
    chunk_size: int = 8
    length: int = 64
    tile_size: int | None = None

    def __post_init__(self) -> None:
        one_of("step", self.step, tuple(STEPS))
        one_of("model", self.model, tuple(SIZES))
        for name in ("batch_size", "chunk_size", "length"):
            positive_int(name, getattr(self, name))
        if self.tile_size is not None:
            positive_int("tile_size", self.tile_size)
            if self.tiles > MOST_TILES:
                rule = f"must cut the {self.batch_size:,} x {self.batch_size:,} logits into at most {MOST_TILES} tiles"
                raise refuse("tile_size", rule, f"{self.tile_size:,}, which makes {self.tiles:,}")

    @property
    def tiles(self) -> int:
        """Tiles that the B x B logits are cut into; 1 for the dense loss."""
        return 1 if self.tile_size is None else (-(-self.batch_size // self.tile_size)) ** 2

    @property
    def law(self) -> tuple:
        """Settings with the same law are forecast without another fake run of the encoder."""
        single_rows = 1 in (self.rows_at_once, self.batch_size % self.rows_at_once)
        tiled = self.tile_size and (self.batch_size, self.tile_size)
        return (self.step, self.model, self.length, single_rows, tiled)

    @property
    def rows_at_once(self) -> int:
        """Rows of one encoder call with a graph: the chunk's, or the whole batch's."""
        return self.batch_size if self.step == "naive" else min(self.chunk_size, self.batch_size)

    def described(self) -> str:
        """The settings in words."""
        chunk = "" if self.step == "naive" else f" in chunks of {self.chunk_size:,}"
        tile = "" if self.tile_size is None else f", logits in tiles of {self.tile_size:,}"
        return (
            f"{STEP_WORDS[self.step]}, {self.model} model, batch {self.batch_size:,}{chunk}, "
            f"{self.length:,} tokens a text{tile}"
        )


@lru_cache(maxsize=64)
def loss_of(tile_size: int | None) -> Any:
    """The lab's loss: dense, or a tile at a time. The same object each time, so that laws are found again."""
    if tile_size is None:
        return ContrastiveLoss(TEMPERATURE)
    return partial(tiled_contrastive_loss, temperature=TEMPERATURE, tile_size=tile_size)


def is_ready(settings: LabSettings) -> bool:
    """Whether `forecast_of` answers in milliseconds; otherwise it reads off a law first, which takes seconds."""
    return settings.law in _fitted


@lru_cache(maxsize=512)
def forecast_of(settings: LabSettings) -> MemoryForecast:
    """The exact forecast, one encoder for both towers, AdamW's states included, every text padded to `length`."""
    found = forecast_step(
        settings.step,
        config=settings.model,
        loss=loss_of(settings.tile_size),
        batch_size=settings.batch_size,
        chunk_size=None if settings.step == "naive" else settings.chunk_size,
        query_length=settings.length,
        passage_length=settings.length,
        optimizer="adamw",
    )
    _fitted.add(settings.law)
    return found


def advice(settings: LabSettings, forecast: MemoryForecast, budget_bytes: int, budget_name: str = "the card") -> str:
    """The peak, what it is made of, whether it fits, and what to change: three sentences."""
    at_peak = forecast.at_peak()
    made_of = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in largest_kinds(at_peak, smallest_share=0.1))
    share = forecast.peak_bytes / budget_bytes
    said = f"Peak {format_bytes(forecast.peak_bytes)}: {made_of}."
    if share <= 1:
        room = "under 1 %" if share < 0.01 else f"{100 * share:.0f} %"
        return f"{said} It fits within {budget_name} and takes {room} of it. {_room(settings, share)}"
    way_out = _way_out(settings, at_peak, budget_bytes)
    return f"{said} It does not fit within {budget_name}: {share:,.1f} times too big. {way_out}"


def _room(settings: LabSettings, share: float) -> str:
    if settings.step == "accumulation":
        return "But accumulation loses negatives: each chunk sees only its own."
    if share > 0.5:
        return "Leave some room: a GPU takes more than live tensors alone."
    if settings.step == "naive":
        return "There is room: a bigger batch still fits whole, and needs no chunks."
    return "There is room: bigger chunks would need fewer, larger encoder calls."


def _way_out(settings: LabSettings, at_peak: dict[str, int], budget_bytes: int) -> str:
    """What to change, from what dominates the peak."""
    if sum(at_peak[kind] for kind in MODEL_KINDS) > budget_bytes:
        return "The model, its gradients and AdamW's states alone are too big: only a smaller model helps."
    largest = max((kind for kind in KINDS if kind not in MODEL_KINDS), key=lambda kind: at_peak[kind])
    if largest == "loss":
        if settings.tile_size is not None:
            return "The loss dominates: smaller tiles, or a smaller batch."
        return "The B × B logits dominate, and no chunk makes them smaller: set a tile size, or a smaller batch."
    if largest == "activations":
        if settings.step == "naive":
            return "The whole batch's activations are live at once: take the gradient cache, which holds one chunk's."
        if settings.rows_at_once > 1:
            return "One chunk's activations dominate: make the chunk smaller; the batch may stay."
        return (
            "One row alone does not fit, and there is no smaller chunk. Batch and chunk cannot help: shorten the "
            "texts, or take a smaller model."
        )
    return f"The {largest} grow with the batch, not with the chunk: make the batch smaller, or the chunks bigger."


def obstacle(forecast: MemoryForecast, free_bytes: int) -> str | None:
    """Why this step must not run here, in words; None where it may. A quarter is kept for what a ledger can't see."""
    needed = int(1.25 * forecast.peak_bytes) + EVENT_BYTES * operations(forecast)
    if needed <= free_bytes:
        return None
    return (
        f"Not run: the forecast is {format_bytes(forecast.peak_bytes)}, with room for the rest "
        f"{format_bytes(needed)}, and this machine has {format_bytes(free_bytes)} free. Nothing was allocated. "
        "The forecast above holds all the same."
    )


def operations(forecast: MemoryForecast) -> int:
    """How many events the ledger of the real step will hold."""
    return sum(len(segment.kind_bytes) * segment.repeats for segment in forecast.timeline)


def seconds_here(settings: LabSettings, forecast: MemoryForecast) -> float:
    """A rough estimate of the step's seconds on this machine, from its multiplications and its operations.

    A transformer layer costs 24 W^2 + 4 T W operations a token forward and twice that backward; the gradient cache runs
    the forward twice.
    """
    layers, width, _ = SIZES[settings.model]
    tokens = 2 * settings.batch_size * settings.length
    forwards = 4 if settings.step == "grad_cache" else 3
    flops = forwards * tokens * layers * (24 * width**2 + 4 * settings.length * width)
    flops += 6 * settings.batch_size**2 * width
    return flops / _flops_per_second() + 60e-6 * operations(forecast)


@lru_cache(maxsize=1)
def _flops_per_second() -> float:
    """A third of what a few matrix products reach here; a step's smaller ones come near that."""
    a = torch.ones(512, 512)
    a @ a
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 512**3 / (time.perf_counter() - start) / 3


def comparison(settings: Sequence[LabSettings], budget_bytes: int) -> list[dict[str, Any]]:
    """A row for each of the settings: its peak, its largest kind, and whether it fits. Plain data for a table."""
    rows = []
    for one in settings:
        forecast = forecast_of(one)
        kind, count = largest_kinds(forecast.at_peak(), smallest_share=0)[0]
        fits = forecast.peak_bytes <= budget_bytes
        row = {"step": one.step, "batch": one.batch_size, "chunk": None if one.step == "naive" else one.chunk_size}
        row |= {"tokens": one.length, "peak_bytes": forecast.peak_bytes, "largest": kind, "largest_bytes": count}
        rows.append(row | {"fits": fits})
    return rows


def format_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows of text under headings, in columns: words left, numbers right."""
    texts = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *texts, strict=True)]
    right = [all(_is_number(row[n]) for row in texts) for n in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(headings), line(["-" * width for width in widths]), *map(line, texts)])


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _is_number(text: str) -> bool:
    return text == "–" or text[:1].isdigit()
