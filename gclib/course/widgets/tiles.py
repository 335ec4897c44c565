"""The B x B logits on sliders: what the loss takes dense and in tiles, forecast by a law, measured on a button.

The laws are the bytes that the ledger counts of the two losses, written down: tests hold them against it. Letters: B
queries and as many passages, D dimensions, S the side of a tile, n = ceil(B / S) tiles a side, T tokens, C rows of a
chunk; everything in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import ipywidgets as widgets
import psutil
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from torch.nn import functional as F

from gclib.course import plots
from gclib.course.timing import median_ratio, seconds_by_round
from gclib.course.widgets.base import MeasuredLab, on_change, slider
from gclib.losses.dense import contrastive_loss
from gclib.losses.tiled import tiled_contrastive_loss
from gclib.memory.devices import GPU_MEMORY_BYTES
from gclib.memory.flops import count_flops
from gclib.memory.forecast import forecast_step
from gclib.memory.ledger import record_memory
from gclib.support.validation import positive_int
from gclib.support.words import format_bytes, unit_for

BATCHES = tuple(2**power for power in range(10, 21))
TILES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
DIMENSIONS = (64, 128, 256, 512, 768, 1024)
TEMPERATURE = 0.05
ENCODER, ENCODER_DIMENSIONS, CHUNK_ROWS, TOKENS = "bert-base-uncased", 768, 32, 64
CARD = "A100 or H100 (80 GB)"
MOST_MEASURED = 4096  # queries: three B x B matrices of it are 192 MiB, four 256
ROUNDS = 3
MOST_DRAWN = 16  # tiles a side
_ALIVE, _DONE, _SUMS = plots.OKABE_ITO["vermillion"], plots.OKABE_ITO["pale grey"], plots.OKABE_ITO["sky blue"]


def dense_loss_bytes(batch_size: int, *, symmetric: bool = False) -> int:
    """Peak of `contrastive_loss` and its backward beside the representations: k B x B matrices, 4 B^2 bytes each.

    In the backward: k = 3 in one direction (log-softmax, its gradient, that of the logits), 4 in both. D <= B; K = 0.
    """
    matrices = (4 if symmetric else 3) * 4 * positive_int("batch_size", batch_size) ** 2
    return matrices + (8 * batch_size + 16 if symmetric else 8)


def tiled_loss_bytes(batch_size: int, dimensions: int, tile_size: int, *, symmetric: bool = False) -> int:
    """Peak of `tiled_contrastive_loss` and its backward beside the representations; a fixed temperature, K = 0.

    One tile, 4 S^2 (two if symmetric); some vectors of B numbers; the queries' gradient of a block of rows, summed in
    pairs: floor(log2 n) + 1 blocks (S, D); and the two gradients, 8 B D: the gradient cache itself.
    """
    batch = positive_int("batch_size", batch_size)
    side = min(positive_int("tile_size", tile_size), batch)
    tiles = (2 if symmetric else 1) * 4 * side**2
    vectors = (10 if symmetric else 6) * 4 * batch + 12
    blocks = (-(-batch // side)).bit_length() * 4 * side * positive_int("dimensions", dimensions)
    return tiles + vectors + blocks + 8 * batch * dimensions


@dataclass(frozen=True)
class TileSettings:
    """What the controls say: B, S, D, and whether the loss has both directions."""

    batch_size: int = 32_768
    tile_size: int = 1024
    dimensions: int = 768
    symmetric: bool = True

    @property
    def side(self) -> int:
        """Tiles along one side of the square."""
        return -(-self.batch_size // self.tile_size)


@dataclass(frozen=True)
class LossForecast:
    """Bytes: the model with its gradients and one chunk, what grows with B beside the loss, and the loss two ways.

    parameters: the model's own, which are there during the loss. batch: texts and representations; when a chunk is
    replayed, the gradient cache stands where the representations stood, and is as large. Left out: the generator states
    that each chunk keeps: 2 % of the tiled peak at a million pairs of 768 dimensions, 6 % at 64.
    """

    parameters: int
    chunk: int
    batch: int
    dense: int
    tiled: int

    def peak(self, *, tiled: bool) -> int:
        """The step's: its loss, or the replay of one chunk, whichever is larger."""
        loss = self.tiled if tiled else self.dense
        return self.batch + max(self.parameters + loss, self.chunk)


@dataclass(frozen=True)
class TilesMeasured:
    """What was measured on this machine: bytes of either loss, and tiled over dense in seconds and in FLOPs."""

    dense_bytes: int
    tiled_bytes: int
    time_ratio: float
    flops_ratio: float


@lru_cache(maxsize=1)
def _encoder_bytes() -> tuple[int, int]:
    """(parameters; parameters, gradients and activations while a chunk is replayed), from the step's forecast."""
    sizes = {"batch_size": CHUNK_ROWS, "chunk_size": CHUNK_ROWS, "query_length": TOKENS, "passage_length": TOKENS}
    at_peak = forecast_step("grad_cache", config=ENCODER, **sizes).at_peak()
    return at_peak["parameters"], sum(at_peak[kind] for kind in ("parameters", "gradients", "activations"))


def forecast_loss(settings: TileSettings) -> LossForecast:
    """The bytes of these settings by the laws; nothing is run but, once, the forecast of the encoder."""
    batch, dimensions, symmetric = settings.batch_size, settings.dimensions, settings.symmetric
    parameters, chunk = _encoder_bytes()
    return LossForecast(
        parameters=parameters,
        chunk=chunk,
        batch=2 * batch * (16 * TOKENS + 4 * dimensions),
        dense=dense_loss_bytes(batch, symmetric=symmetric),
        tiled=tiled_loss_bytes(batch, dimensions, settings.tile_size, symmetric=symmetric),
    )


def obstacle(settings: TileSettings, free_bytes: int) -> str | None:
    """Why these settings must not be run here, in words; None where they may."""
    needed = dense_loss_bytes(settings.batch_size, symmetric=settings.symmetric)
    if settings.batch_size > MOST_MEASURED:
        return (
            f"Not run: at B = {settings.batch_size:,} the dense loss would take {format_bytes(needed)}. Measure works "
            f"up to B = {MOST_MEASURED:,}. Nothing was allocated, and the forecast above holds all the same."
        )
    if 2 * needed > free_bytes:
        return (
            f"Not run: the dense loss would take {format_bytes(needed)}. Twice that must be free, and "
            f"{format_bytes(free_bytes)} are free here."
        )
    return None


def losses_of(settings: TileSettings) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The two losses, "dense" and "tiled", of these settings."""
    same = {"temperature": TEMPERATURE, "symmetric": settings.symmetric}
    return {
        "dense": partial(contrastive_loss, **same),
        "tiled": partial(tiled_contrastive_loss, tile_size=settings.tile_size, **same),
    }


def random_reps(batch_size: int, dimensions: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Queries and passages (B, D): unit vectors that ask for gradients, the positives alike."""
    queries = torch.randn(batch_size, dimensions, dtype=dtype)
    passages = queries + torch.randn(batch_size, dimensions, dtype=dtype)
    queries, passages = (F.normalize(reps, dim=1).requires_grad_() for reps in (queries, passages))
    return queries, passages


def loss_and_backward(loss_fn: Callable[..., Tensor], reps: Sequence[Tensor]) -> Tensor:
    """One call with its backward, from no gradients; the loss."""
    for rep in reps:
        rep.grad = None
    loss = loss_fn(*reps)
    loss.backward()
    return loss.detach()


def measured_loss_bytes(loss_fn: Callable[..., Tensor], reps: Sequence[Tensor]) -> int:
    """What the ledger counts of a loss and its backward, beside the representations."""
    for rep in reps:
        rep.grad = None
    with record_memory() as ledger:
        ledger.on_phase("loss", tensors=[("representations", rep) for rep in reps])
        loss_and_backward(loss_fn, reps)
    return ledger.peak_bytes - sum(rep.nbytes for rep in reps)


def measure(settings: TileSettings) -> TilesMeasured:
    """Run both losses on random representations: bytes once, FLOPs once, seconds in turn."""
    with torch.random.fork_rng():
        reps = random_reps(settings.batch_size, settings.dimensions)
    losses = losses_of(settings)
    counted = {name: measured_loss_bytes(loss_fn, reps) for name, loss_fn in losses.items()}
    calls = {name: partial(loss_and_backward, loss_fn, reps) for name, loss_fn in losses.items()}
    flops = {name: count_flops(call) for name, call in calls.items()}
    seconds = seconds_by_round(calls, rounds=ROUNDS)
    return TilesMeasured(
        dense_bytes=counted["dense"],
        tiled_bytes=counted["tiled"],
        time_ratio=median_ratio(seconds["tiled"], seconds["dense"]),
        flops_ratio=flops["tiled"] / flops["dense"],
    )


def plot_tiles(axes: Axes, settings: TileSettings) -> None:
    """Draw the square in the middle of the walk: tiles computed and gone, those alive, those to come, and the sums.

    More than `MOST_DRAWN` tiles a side are drawn as that many, and the title says how many there are.
    """
    side = min(settings.side, MOST_DRAWN)
    row, column = side // 2, side // 3
    for i in range(side):
        for j in range(side):
            gone = (i, j) < (row, column)
            look = {"facecolor": _DONE if gone else plots.PAPER, "edgecolor": plots.OKABE_ITO["grey"]}
            axes.add_patch(Rectangle((j, i), 1, 1, linewidth=0.4, **look))
    look = {"facecolor": _ALIVE, "edgecolor": plots.INK, "linewidth": 1.2, "hatch": "xxx"}
    axes.add_patch(Rectangle((column, row), 1, 1, zorder=3, **look))
    thick = 0.035 * side
    look = {"facecolor": _SUMS, "edgecolor": plots.INK, "linewidth": 0.6, "hatch": "//"}
    axes.add_patch(Rectangle((-2 * thick, 0), thick, side, **look))
    if settings.symmetric:
        axes.add_patch(Rectangle((0, -2 * thick), side, thick, **look))
    axes.set(xlim=(-3 * thick, 1.01 * side), ylim=(1.01 * side, -3 * thick), aspect="equal", xticks=[], yticks=[])
    drawn = "" if side == settings.side else f", drawn as {side} x {side}"
    axes.set_title(f"{settings.side:,} x {settings.side:,} tiles{drawn}", loc="left", fontsize=10)
    axes.set(xlabel="passages", ylabel="queries")
    for spine in axes.spines.values():
        spine.set_visible(False)


def bars_of(forecast: LossForecast) -> dict[str, int]:
    """What the bars show: name -> bytes."""
    return {
        "one chunk, with the model": forecast.chunk,
        "texts, representations": forecast.batch,
        "loss, dense": forecast.dense,
        "loss, tiled": forecast.tiled,
    }


def plot_bars(axes: Axes, forecast: LossForecast) -> None:
    """A bar for each part on a logarithmic axis, its bytes beside it, and a line at the card."""
    looks = zip(("sky blue", "purple", "vermillion", "green"), ("", "//", "xx", ".."), strict=True)
    bars, paper = bars_of(forecast), {"facecolor": plots.PAPER, "edgecolor": "none", "pad": 0.8}
    beside = {"textcoords": "offset points", "va": "center", "fontsize": 9, "zorder": 5, "bbox": paper}
    for (name, count), (color, hatch) in zip(bars.items(), looks, strict=True):
        look = {"color": plots.OKABE_ITO[color], "hatch": hatch, "edgecolor": plots.INK, "linewidth": 0.4}
        axes.barh([name], [count], 0.6, **look)
        axes.annotate(format_bytes(count), (count, name), (5, 0), **beside)
    card = GPU_MEMORY_BYTES[CARD]
    axes.axvline(card, color=plots.CARD_COLOR, linestyle="--", linewidth=1.3)
    look = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": plots.CARD_COLOR}
    axes.annotate("80 GB card", (card, 1), (0, 3), axes.get_xaxis_transform(), **look)
    largest = max([*bars.values(), card])
    ticks = [2**power for power in range(20, 51, 10) if 2**power <= largest * 2]
    axes.set_xscale("log", base=2)
    axes.set(xlim=(2**18, largest * 60), xlabel="bytes, logarithmic")
    axes.set_xticks(ticks, [f"1 {unit_for(tick)[0]}" for tick in ticks])
    axes.minorticks_off()
    axes.invert_yaxis()


def plot_lab(figure: Figure, panels: Sequence[Axes], settings: TileSettings) -> None:
    """Draw the square and the bars on two panels, and name the looks below them."""
    plot_tiles(panels[0], settings)
    plot_bars(panels[1], forecast_loss(settings))
    handles = [
        Patch(facecolor=_ALIVE, hatch="xxx", edgecolor=plots.INK, label="alive now"),
        Patch(facecolor=_DONE, edgecolor=plots.OKABE_ITO["grey"], label="computed, gone"),
        Patch(facecolor=plots.PAPER, edgecolor=plots.OKABE_ITO["grey"], label="to come"),
        Patch(facecolor=_SUMS, hatch="//", edgecolor=plots.INK, label="log-sum-exps, kept"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)


class TileLab(MeasuredLab):
    """Sliders for B, S and D, a switch for the second direction, and Measure. All works from the keyboard.

    Attributes, each an ipywidget: batch, tile, dimensions, symmetric, words, picture, measure, status. `table()` says
    all of it in text, with every measurement so far. The keywords set where the controls start.
    """

    compares = "the dense and the tiled loss"
    unmeasured = "Not measured with these settings."
    heads = ("B", "S", "D", "both", "dense, forecast", "counted", "tiled, forecast", "counted", "time", "FLOPs")
    note = "time and FLOPs: tiled over dense."

    def __init__(
        self, *, batch_size: int = 32_768, tile_size: int = 1024, dimensions: int = 768, symmetric: bool = True
    ):
        super().__init__("Run both losses on this machine: bytes, FLOPs, seconds")
        self.batch = slider("Batch B", BATCHES, batch_size, "Queries, and as many passages", argument="batch_size")
        self.tile = slider("Tile S", TILES, tile_size, "Side of a tile of logits", argument="tile_size")
        tooltip = "Numbers of a representation"
        self.dimensions = slider("Width D", DIMENSIONS, dimensions, tooltip, argument="dimensions")
        self.symmetric = widgets.Checkbox(symmetric, description="both directions (symmetric)", indent=False)
        classes = {"tile-batch": self.batch, "tile-tile": self.tile, "tile-dimensions": self.dimensions}
        self.arrange([self.batch, self.tile], [self.dimensions, self.symmetric], *self.outputs, classes=classes)
        on_change(self.refresh, self.batch, self.tile, self.dimensions, self.symmetric)
        self.refresh()

    def settings(self) -> TileSettings:
        """What the controls say now."""
        return TileSettings(self.batch.value, self.tile.value, self.dimensions.value, self.symmetric.value)

    def forecast(self) -> LossForecast:
        """The bytes of the controls' settings."""
        return forecast_loss(self.settings())

    def describe(self) -> str:
        """Picture and forecast in words, for an alt text."""
        settings = self.settings()
        bars = "; ".join(f"{name} {format_bytes(count)}" for name, count in bars_of(self.forecast()).items())
        sums = "rows and columns" if settings.symmetric else "rows"
        return (
            f"The square of {settings.batch_size:,} queries against {settings.batch_size:,} passages, cut into "
            f"{settings.side:,} x {settings.side:,} tiles, one of them alive, with log-sum-exps of {sums}. Bars: "
            f"{bars}. {self._prediction()}"
        )

    def _plan(self) -> tuple[list[str], list[list[object]]]:
        rows = []
        for batch in BATCHES[::2]:
            forecast = forecast_loss(replace(self.settings(), batch_size=batch))
            peaks = [forecast.peak(tiled=tiled) for tiled in (False, True)]
            rows.append([batch, *map(format_bytes, (*bars_of(forecast).values(), *peaks))])
        return ["B", "one chunk", "texts, reps", "dense loss", "tiled loss", "peak, dense", "peak, tiled"], rows

    def _row(self, settings: TileSettings, measured: TilesMeasured) -> list[object]:
        law = forecast_loss(settings)
        row = [settings.batch_size, settings.tile_size, settings.dimensions, settings.symmetric]
        row += [law.dense, measured.dense_bytes, law.tiled, measured.tiled_bytes]
        return [*row, f"{measured.time_ratio:.2f}", f"{measured.flops_ratio:.3f}"]

    def _prediction(self) -> str:
        settings, forecast, peaks = self.settings(), self.forecast(), []
        for name, tiled in (("dense", False), ("tiled", True)):
            peak = forecast.peak(tiled=tiled)
            fits = "fits" if peak <= GPU_MEMORY_BYTES[CARD] else "does not fit"
            peaks.append(f"{name} {format_bytes(peak)}, which {fits}")
        times = forecast.dense / forecast.tiled
        share = f"1/{times:,.0f}" if times >= 4.5 else f"{100 / times:.0f} %"
        ratio = f"{share} of that" if times >= 1 else "which is more"
        own = settings.dimensions == ENCODER_DIMENSIONS
        encoder = (
            ENCODER if own else f"a model as large as {ENCODER} whose representations have D = {settings.dimensions}"
        )
        return (
            f"B = {settings.batch_size:,}: the dense loss takes {format_bytes(forecast.dense)}; in tiles of "
            f"{settings.tile_size:,} it takes {format_bytes(forecast.tiled)}, {ratio}. Peak of a gradient-cache step "
            f"({encoder}, {TOKENS} tokens, chunks of {CHUNK_ROWS}; a processor's operations, no optimizer): "
            f"{'; '.join(peaks)}, on a card of 80 GB."
        )

    def _figure(self) -> Figure:
        figure, panels = plots.new_figure(1, 2, width=8.6, height=3.3)
        plot_lab(figure, panels, self.settings())
        return figure

    def _obstacle(self, settings: TileSettings) -> str | None:
        return obstacle(settings, psutil.virtual_memory().available)

    def _measure(self, settings: TileSettings) -> TilesMeasured:
        return measure(settings)

    def _compared(self, measured: TilesMeasured) -> str:
        law = self.forecast()
        return (
            f"Measured here: dense {format_bytes(measured.dense_bytes)} (forecast {format_bytes(law.dense)}), tiled "
            f"{format_bytes(measured.tiled_bytes)} (forecast {format_bytes(law.tiled)}). Tiled over dense: time "
            f"{measured.time_ratio:.2f}, FLOPs {measured.flops_ratio:.3f}."
        )
