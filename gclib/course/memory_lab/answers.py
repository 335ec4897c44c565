"""What the memory lab knows, without any widget: settings, their forecast, and what to say about it.

Everything here answers in words or numbers, so that a slider, a table and a test share one source.
"""

import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from gclib.losses.module import ContrastiveLoss
from gclib.losses.tiled import tiled_contrastive_loss
from gclib.memory.devices import DEVICES, GPU_MEMORY_BYTES
from gclib.memory.forecast import MemoryForecast, forecast_workload
from gclib.memory.ledger import KINDS
from gclib.memory.plan import last_true
from gclib.memory.timeline import largest_kinds
from gclib.memory.workload import OPTIMIZERS, Workload
from gclib.models.encoder import SIZES, bert_config
from gclib.models.presets import PRESETS, config_of
from gclib.steps import STEPS
from gclib.support.validation import int_at_least, one_of, positive_int, refuse
from gclib.support.words import GiB, MiB, format_bytes

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
BATCH_KINDS = ("inputs", "representations", "cache", "loss", "random states")
MODELS = (*SIZES, *(name for name, preset in PRESETS.items() if "Vision" not in preset.config))
PRECISIONS: dict[str, dict[str, torch.dtype]] = {
    "float32": {},
    "bf16 autocast": {"autocast": torch.bfloat16},
    "pure bf16": {"dtype": torch.bfloat16},
}
LARGEST_BATCH = 2**20
TILES_REASON = "That is a limit of this forecast, which runs every tile once, and not of the method."
STEP_WORDS = {
    "naive": "whole batch at once (naive)",
    "accumulation": "gradient accumulation",
    "grad_cache": "gradient cache",
}
_fitted: set[tuple] = set()


@dataclass(frozen=True)
class LabSettings:
    """One position of all controls.

    length: tokens that every passage is padded to; query_length: every query, None for the same. tile_size: None for
    the dense loss. retain_chunks: R of the gradient cache; the other steps have none. device: whose operations are
    counted, a processor's ("cpu") or a graphics card's ("cuda").
    """

    step: str = "grad_cache"
    model: str = "mini"
    batch_size: int = 64
    chunk_size: int = 8
    length: int = 64
    tile_size: int | None = None
    query_length: int | None = None
    retain_chunks: int = 0
    precision: str = "float32"
    optimizer: str = "adamw"
    device: str = "cpu"

    def __post_init__(self) -> None:
        one_of("step", self.step, tuple(STEPS))
        one_of("model", self.model, MODELS)
        one_of("precision", self.precision, tuple(PRECISIONS))
        one_of("optimizer", self.optimizer, OPTIMIZERS[1:])
        one_of("device", self.device, DEVICES)
        for name in ("batch_size", "chunk_size", "length"):
            positive_int(name, getattr(self, name))
        int_at_least("retain_chunks", self.retain_chunks, 0)
        if self.query_length is not None:
            positive_int("query_length", self.query_length)
        if self.tile_size is not None:
            positive_int("tile_size", self.tile_size)
            if self.tiles > MOST_TILES:
                rule = f"must cut the {self.batch_size:,} x {self.batch_size:,} logits into at most {MOST_TILES} tiles"
                raise refuse("tile_size", rule, f"{self.tile_size:,}, which makes {self.tiles:,}")

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of a query and of a passage."""
        return self.query_length or self.length, self.length

    @property
    def tiles(self) -> int:
        """Tiles that the B x B logits are cut into; 1 for the dense loss."""
        return 1 if self.tile_size is None else (-(-self.batch_size // self.tile_size)) ** 2

    @property
    def retained(self) -> int:
        """Chunks whose graph is kept: at most as many as there are."""
        chunks = 2 * -(-self.batch_size // self.chunk_size)
        return min(self.retain_chunks, chunks) if self.step == "grad_cache" else 0

    @property
    def law(self) -> tuple:
        """Settings with the same law are forecast without another fake run of the encoder."""
        single_rows = 1 in (self.rows_at_once, self.batch_size % self.rows_at_once)
        tiled = self.tile_size and (self.batch_size, self.tile_size)
        return (self.step, self.model, self.lengths, self.precision, single_rows, tiled, self.device)

    @property
    def rows_at_once(self) -> int:
        """Rows of one encoder call with a graph: the chunk's, or the whole batch's."""
        return self.batch_size if self.step == "naive" else min(self.chunk_size, self.batch_size)

    @property
    def workload(self) -> Workload:
        """What is forecast: one encoder for both towers, every text padded to its length."""
        query_length, passage_length = self.lengths
        return Workload(
            step=self.step,
            config=self.model,
            loss=loss_of(self.tile_size),
            batch_size=self.batch_size,
            chunk_size=None if self.step == "naive" else self.chunk_size,
            retain_chunks=self.retained,
            query_length=query_length,
            passage_length=passage_length,
            optimizer=self.optimizer,
            device=self.device,
            **PRECISIONS[self.precision],
        )

    def described(self) -> str:
        """The settings in words."""
        chunk = "" if self.step == "naive" else f" in chunks of {self.chunk_size:,}"
        kept = f", {self.retained:,} of them retained" if self.retained else ""
        tile = "" if self.tile_size is None else f", logits in tiles of {self.tile_size:,}"
        short, long = self.lengths
        tokens = f"{long:,} tokens a text" if short == long else f"{short:,} tokens a query and {long:,} a passage"
        rest = "" if self.precision == "float32" else f", {self.precision}"
        rest += "" if self.optimizer == "adamw" else ", SGD"
        rest += "" if self.device == "cpu" else ", on a CUDA card"
        return (
            f"{STEP_WORDS[self.step]}, {self.model} model, batch {self.batch_size:,}{chunk}{kept}, {tokens}{tile}{rest}"
        )

    def as_code(self) -> str:
        """A program that prints this forecast: for copying out of the lab."""
        lines = ["import torch", ""] if PRECISIONS[self.precision] else []
        if self.tile_size is not None:
            lines.append("from gclib import ContrastiveLoss")
        lines += ["from gclib.memory.forecast import forecast_step", "", "forecast = forecast_step("]
        lines.append(f'    "{self.step}",')
        for name, value in self.workload.keywords().items():
            if name != "loss":
                lines.append(f'    {name}="{value}",' if isinstance(value, str) else f"    {name}={value},")
        if self.tile_size is not None:
            lines.append(f"    loss=ContrastiveLoss(tile_size={self.tile_size}),")
        return "\n".join([*lines, ")", 'print(f"{forecast.peak_bytes:,} bytes at the peak")'])


@lru_cache(maxsize=64)
def loss_of(tile_size: int | None) -> Any:
    """The lab's loss: dense, or a tile at a time. The same object each time, so that laws are found again."""
    if tile_size is None:
        return ContrastiveLoss(TEMPERATURE)
    return partial(tiled_contrastive_loss, temperature=TEMPERATURE, tile_size=tile_size)


def is_ready(settings: LabSettings) -> bool:
    """Whether `forecast_of` answers in milliseconds; otherwise it reads off a law first, which takes seconds."""
    return settings.law in _fitted


@lru_cache(maxsize=96)  # some hundreds of kilobytes each
def forecast_of(settings: LabSettings) -> MemoryForecast:
    """The exact forecast of the settings' workload, the optimizer's states too."""
    exact = forecast_workload(settings.workload)
    _fitted.add(settings.law)
    return exact


def advice(settings: LabSettings, forecast: MemoryForecast, budget_bytes: int, budget_name: str = "the card") -> str:
    """The peak, what it is made of, whether it fits, and what to change: three sentences."""
    at_peak = forecast.at_peak()
    made_of = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in largest_kinds(at_peak, smallest_share=0.1))
    share = forecast.peak_bytes / budget_bytes
    peak_words = f"Peak {format_bytes(forecast.peak_bytes)}: {made_of}."
    if share <= 1:
        room = "under 1 %" if share < 0.01 else f"{100 * share:.0f} %"
        return f"{peak_words} It fits within {budget_name} and takes {room} of it. {_room(settings, share)}"
    rest = forecast.peak_bytes - budget_bytes
    over = f"{share:,.1f} times too big" if share >= 2 else f"{format_bytes(rest)} too much"
    return f"{peak_words} It does not fit within {budget_name}: {over}. {way_out(settings, at_peak, budget_bytes)}"


def _room(settings: LabSettings, share: float) -> str:
    if settings.step == "accumulation":
        return "But accumulation loses negatives: each chunk sees only its own."
    if share > 0.5:
        return "Leave some room: a GPU takes more than live tensors alone."
    if settings.step == "naive":
        return "There is room: a bigger batch still fits whole, and needs no chunks."
    if settings.chunk_size >= settings.batch_size:
        return "There is room: a bigger batch fits too."
    return "There is room: bigger chunks would need fewer, larger encoder calls."


def way_out(settings: LabSettings, at_peak: dict[str, int], budget_bytes: int) -> str:
    """What to change where a step does not fit, from what dominates its peak: one sentence."""
    if sum(at_peak[kind] for kind in MODEL_KINDS) > budget_bytes:
        return _smaller_model(settings)
    largest = max((kind for kind in KINDS if kind not in MODEL_KINDS), key=lambda kind: at_peak[kind])
    if largest == "loss":
        if settings.tile_size is not None:
            return "The loss dominates: smaller tiles, or a smaller batch."
        return "The B × B logits dominate, and no chunk makes them smaller: set a tile size, or a smaller batch."
    if largest == "activations":
        if settings.retained and (change := _retain_less(settings, sum(at_peak.values()), budget_bytes)):
            return change
        if settings.step == "naive":
            return "The whole batch's activations are live at once: take the gradient cache, which holds one chunk's."
        if settings.rows_at_once > 1:
            return "One chunk's activations dominate: make the chunk smaller; the batch may stay."
        if sum(at_peak.values()) - sum(at_peak[kind] for kind in BATCH_KINDS) <= budget_bytes:
            return "A chunk is one row already, and what grows with the batch is too much: make the batch smaller."
        return (
            "One row alone does not fit, and there is no smaller chunk. Batch and chunk cannot help: shorten the "
            "texts, or take a smaller model."
        )
    if largest == "random states":
        return "Each chunk keeps the state of its random generators: make the chunks bigger, or the batch smaller."
    return f"Most of the rest is {largest}, and that grows with the batch, not with the chunk: make the batch smaller."


def _smaller_model(settings: LabSettings) -> str:
    adamw = settings.optimizer == "adamw"
    alone = "The model, its gradients and AdamW's states" if adamw else "The model and its gradients"
    least = not adamw and settings.precision == "pure bf16"
    others = "" if least else ", or fewer bytes for each parameter (numbers, optimizer)"
    return f"{alone} alone are too big: only a smaller model helps{others}."


def _retain_less(settings: LabSettings, peak_bytes: int, budget_bytes: int) -> str | None:
    """What to change where retained graphs make the peak; None where the step is as big without them."""
    without = forecast_of(replace(settings, retain_chunks=0)).peak_bytes
    if without >= peak_bytes:
        return None
    change = "retain fewer" if without <= budget_bytes else "retain none, and look again"
    return f"The graphs of {settings.retained:,} retained chunks are live at once: {change}."


def largest_that_fits(settings: LabSettings, budget_bytes: int) -> int:
    """The largest batch of these settings within the budget, at most `LARGEST_BATCH` (with tiles, as many as are
    forecast); 0 where none fits."""

    def fits(batch_size: int) -> bool:
        return forecast_of(replace(settings, batch_size=batch_size)).peak_bytes <= budget_bytes

    return last_true(fits, most_forecast(settings))


def most_forecast(settings: LabSettings) -> int:
    """The largest batch that is forecast for these settings: of a tiled loss every tile is run once."""
    if settings.tile_size is None:
        return LARGEST_BATCH
    return min(LARGEST_BATCH, int(MOST_TILES**0.5) * settings.tile_size)


def compared(pinned: LabSettings, now: LabSettings) -> str:
    """Two settings against each other, in words: their peaks, and the kind of bytes that moved most."""
    before, after = forecast_of(pinned), forecast_of(now)
    peaks = f"Pinned: {pinned.described()}: {format_bytes(before.peak_bytes)}. Now: {format_bytes(after.peak_bytes)}"
    if after.peak_bytes == before.peak_bytes:
        return f"{peaks}, the same to the byte."
    moved = {kind: count - before.at_peak()[kind] for kind, count in after.at_peak().items()}
    kind = max(moved, key=lambda kind: abs(moved[kind]))
    sign = "more" if moved[kind] > 0 else "less"
    ratio = after.peak_bytes / before.peak_bytes
    share = f"{ratio:.3g} times as much" if ratio > 1 else f"{100 * ratio:.3g} % of that"
    return f"{peaks}, {share}. Most of it: {format_bytes(abs(moved[kind]))} {sign} {kind}."


def obstacle(forecast: MemoryForecast, free_bytes: int, *, card_free_bytes: int | None = None) -> str | None:
    """Why this step must not run here, in words; None where it may. A quarter is kept for what a ledger can't see.

    free_bytes: of this machine. card_free_bytes: of the CUDA card that would run the step, which then holds its
    tensors, while the machine holds the ledger's notes; None where the processor runs it.
    """
    tensors, notes = int(1.25 * forecast.peak_bytes), EVENT_BYTES * operations(forecast)
    refusal = f"Not run: the forecast is {format_bytes(forecast.peak_bytes)}. With a quarter more for what it can't see"
    end = "Nothing was allocated. The forecast above holds all the same."
    if card_free_bytes is None:
        tensors, notes, counted = tensors + notes, 0, ", and the ledger's own notes,"
        where, room = "this machine", free_bytes
    else:
        counted, where, room = "", "the card", card_free_bytes
    if tensors > room:
        return f"{refusal}{counted} that is {format_bytes(tensors)}; {where} has {format_bytes(room)} free. {end}"
    if notes > free_bytes:
        has = f"this machine has {format_bytes(free_bytes)} free"
        return f"Not run: the ledger's own notes of this step would take {format_bytes(notes)}; {has}. {end}"
    return None


def operations(forecast: MemoryForecast) -> int:
    """How many events the ledger of the real step will hold."""
    return sum(len(segment.kind_bytes) * segment.repeats for segment in forecast.timeline)


def seconds_here(settings: LabSettings, forecast: MemoryForecast, device: str = "cpu") -> float:
    """A rough estimate of the step's seconds on this device, from its multiplications and its operations.

    A transformer layer costs 24 W^2 + 4 T W operations a token forward and twice that backward; the gradient cache runs
    the forward twice.
    """
    layers, width = _layers_and_width(settings.model)
    forwards = 4 if settings.step == "grad_cache" else 3
    a_pair = sum(tokens * layers * (24 * width**2 + 4 * tokens * width) for tokens in settings.lengths)
    flops = forwards * settings.batch_size * a_pair + 6 * settings.batch_size**2 * width
    return flops / _flops_per_second(device) + 60e-6 * operations(forecast)


@lru_cache(maxsize=64)
def _layers_and_width(model: str) -> tuple[int, int]:
    config = bert_config(model) if model in SIZES else config_of(model)
    return config.num_hidden_layers, config.hidden_size


@lru_cache(maxsize=4)
def _flops_per_second(device: str) -> float:
    """A third of what a few matrix products reach here; a step's smaller ones come near that."""
    side = 512 if device == "cpu" else 2048  # three of them: 48 MiB of a card
    a = torch.ones(side, side, device=device)
    (a @ a).sum().item()  # the sum's value is there when the product is
    start = time.perf_counter()
    for _ in range(4):
        last = a @ a
    last[0, 0].item()
    return 4 * 2 * side**3 / (time.perf_counter() - start) / 3
