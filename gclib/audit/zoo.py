"""The zoo: is the cached step right on the architectures that people have? Each is tried, small, with the defaults.

A row is right where its gradient is the naive step's (float64, <= 1e-12), with or without the warning that its rows are
left untrimmed, or where the step refuses it in words; it is silently wrong otherwise. Memory is held to its promise
too: the forecast against the ledger of the same step.
"""

import copy
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gclib.audit.architectures import ARCHITECTURES, PAIRS, Architecture
from gclib.audit.audit import kept_graphs_step
from gclib.audit.gradients import gradients_of, worst_error
from gclib.chunks import plan_chunks
from gclib.losses.module import ContrastiveLoss
from gclib.memory.forecast import forecast_step
from gclib.memory.ledger import record_memory
from gclib.steps import grad_cache_step, naive_step
from gclib.support.processes import map_in_processes
from gclib.support.validation import one_of
from gclib.support.words import format_table

BOUND = 1e-12
SEED = 1
ROWS, WIDTH, CHUNK = 9, 20, 4
HEADINGS = ("architecture", "parameters", "padding", "error", "verification", "forecast against ledger")


@dataclass(frozen=True)
class ZooRow:
    """What one architecture came to.

    error: the worst parameter's (design: ||difference|| / max(||its gradient||, 1e-3 ||all||)), of the worst batch;
    None where the step refused. verification: "passed", or what was warned or refused. forecast: "equal", or what else.
    """

    name: str
    parameters: int
    padding: str
    error: float | None
    verification: str
    forecast: str = ""

    @property
    def right(self) -> bool:
        """Whether the gradient is the naive step's, or refused in words."""
        return self.error is None or self.error <= BOUND


def names() -> list[str]:
    """Every row of the zoo: one architecture for both towers, or a text's and a picture's."""
    return [*ARCHITECTURES, *PAIRS]


def try_architecture(name: str, *, forecast: bool = True, seeds: Sequence[int] = (0, 1)) -> ZooRow:
    """One row: the cached step against the naive one on a batch for each seed, and the forecast against the ledger."""
    one_of("name", name, tuple(names()))
    towers = [ARCHITECTURES[part] for part in PAIRS.get(name, (name, name))]
    encoders = [encoder.double() for encoder in _built(towers)]
    compared = [_compare_exactly(encoders, batches(towers, seed)) for seed in seeds]
    worst = next((each for each in compared if each.error is None), None) or max(compared, key=lambda each: each.error)
    parameters = sum(p.numel() for p in {id(p): p for e in encoders for p in e.parameters()}.values())
    padding = towers[0].padding if towers[0].kind.startswith("texts") else ""
    return ZooRow(name, parameters, padding, worst.error, str(worst), _compare_bytes(towers) if forecast else "")


def _compare_exactly(encoders: Sequence[nn.Module], inputs: Sequence[Any]) -> "Comparison":
    """As the encoders are; where that leaves rounding of their own casts to float32, once more without these."""
    plain = compare_step(_copies(encoders), inputs)
    if plain.error is None or plain.error <= BOUND:
        return plain
    with InDouble():
        exact = compare_step(_copies(encoders), inputs)
    return replace(exact, notes=(*exact.notes, f"casts to float32 kept out ({plain.error:.0e} with them)"))


@dataclass(frozen=True)
class Comparison:
    """A cached step against the one it must equal. error: None where refused; words: what verification said."""

    error: float | None
    words: str = "passed"
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join([self.words, *self.notes])


def compare_step(encoders: Sequence[nn.Module], inputs: Sequence[Any], **options: Any) -> Comparison:
    """The cached gradient against that of `naive_step`, or, of encoders that draw random numbers, of a step that keeps
    every chunk's graph. Both work on copies: what an encoder changes in itself, it changes for the cached step alone.
    """
    loss, options = ContrastiveLoss(0.1), {"chunk_size": CHUNK} | options
    truth = _gradients(naive_step, _copies(encoders), inputs, loss)
    drew = not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(SEED).get_state())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            ours = _gradients(grad_cache_step, encoders, inputs, loss, **options)
        except ValueError as error:
            return Comparison(None, f"refused: {error}")
    untrimmed = any("sort_by_length=False" in str(warning.message) for warning in caught)
    if drew:
        truth = _gradients(keep_graphs_step, _copies(encoders), inputs, loss, trimmed=not untrimmed)
    words = "left untrimmed, with a warning" if untrimmed else "passed"
    notes = ("random: against a step that keeps every graph",) if drew else ()
    if not all(bool(gradient.isfinite().all()) for gradient in truth.values()):
        return Comparison(torch.nan, words, (*notes, "not finite"))
    return Comparison(worst_error(ours, truth), words, notes)


def keep_graphs_step(
    encoders: Sequence[nn.Module], inputs: Sequence[Any], loss_fn: Callable[..., Tensor], *, trimmed: bool
) -> Tensor:
    """What the cached step must equal where random numbers are drawn: its chunks in its order, all graphs kept."""
    plan = []
    for batch in inputs:
        mask = batch.get("attention_mask")
        cut = trimmed and "input_ids" in batch and mask is not None
        width = 1 if mask is None else mask.shape[1]
        lengths = [int(row.nonzero().max()) + 1 for row in mask] if cut else [width] * ROWS
        plan.append(plan_chunks(lengths, chunk_size=CHUNK, sort=cut))
    return kept_graphs_step(encoders, inputs, loss_fn, plan=plan)


class InDouble(TorchFunctionMode):
    """What a model casts to float32 for itself (a rotation, a norm, a scan) stays float64: then 1e-12 means something.

    Rounding to float32 inside turns an order of additions that differs in the 16th digit into 1e-8 here and there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every torch function, told float64 where it is told float32."""

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def _gradients(step: Callable[..., Tensor], encoders: Sequence[nn.Module], *arguments: Any, **options: Any) -> dict:
    """By name, with random numbers that begin alike."""
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    random.seed(SEED)
    return gradients_of(lambda: step(encoders, *arguments, **options), *dict.fromkeys(encoders))


def _copies(encoders: Sequence[nn.Module]) -> list[nn.Module]:
    """Copies, of one encoder twice where it is."""
    return copy.deepcopy(list(encoders))


def batches(towers: Sequence[Architecture], seed: int) -> list[dict[str, Tensor]]:
    """Ragged rows for both towers, in float64: of even seeds the longest text fills its batch, of odd ones not."""
    generator = torch.Generator().manual_seed(seed)
    return [_batch(tower, generator, WIDTH - 3 * (seed % 2)) for tower in towers]


def _batch(tower: Architecture, generator: torch.Generator, longest: int) -> dict[str, Tensor]:
    lengths = torch.randint(3, longest + 1, (ROWS, 1), generator=generator)
    lengths[seeded_row := int(torch.randint(ROWS, (), generator=generator))] = longest
    lengths[seeded_row - 1] = 3
    if tower.kind.startswith("texts"):
        return _texts(tower, lengths, generator)
    if tower.kind == "waves":
        mask = (torch.arange(20 * WIDTH) < 20 * lengths).long()
        values = torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask
        return {"input_values": values, "attention_mask": mask}
    return _grids(tower, generator, torch.float64)


def _texts(tower: Architecture, lengths: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Tokens 4 to 63, before padding; a text ends with token 2, as CLIP's do. Left padding: turned round."""
    mask = (torch.arange(WIDTH) < lengths).long()
    ids = torch.randint(4, 64, (ROWS, WIDTH), generator=generator)
    ids = ids.scatter(1, lengths - 1, 2) * mask
    if tower.padding == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    if tower.kind == "texts without a mask":
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": mask}


def _grids(tower: Architecture, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pictures, or spectrograms, all of one size."""
    if tower.kind == "pictures":
        side = tower.settings.get("image_size", 32)
        return {"pixel_values": torch.randn(ROWS, 3, side, side, generator=generator, dtype=dtype)}
    shape, name = ((16, 16), "input_values") if tower.pooling == "own" else ((8, 16), "input_features")
    return {name: torch.randn(ROWS, *shape, generator=generator, dtype=dtype)}


def _built(towers: Sequence[Architecture]) -> list[nn.Module]:
    """The encoder of each tower, the same one where both are alike."""
    torch.manual_seed(0)
    first = towers[0].build()
    return [first, first if towers[1] is towers[0] else towers[1].build()]


def _compare_bytes(towers: Sequence[Architecture]) -> str:
    """The forecast of a padded batch in float32 against the ledger of its cached step: "equal", or words."""
    encoders, loss = _built(towers), ContrastiveLoss(0.1)
    if any(tower.kind not in ("texts", "pictures") for tower in towers):
        return "no forecast: neither texts with a mask nor pictures"
    inputs = [_padded(tower) for tower in towers]
    try:
        with record_memory(*dict.fromkeys(encoders), loss) as ledger:
            grad_cache_step(
                encoders, inputs, loss, chunk_size=CHUNK, verify="never", on_phase=ledger.on_phase, sort_by_length=False
            )
    except ValueError as error:
        return f"the step refuses: {_first_line(error)}"
    widths = [WIDTH if tower.kind == "texts" else None for tower in towers]
    try:
        forecast = forecast_step(
            "grad_cache",
            encoders=encoders,
            loss=loss,
            batch_size=ROWS,
            chunk_size=CHUNK,
            query_length=widths[0],
            passage_length=widths[1],
        )
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    if forecast.peak_bytes == ledger.peak_bytes:
        return "equal" if forecast.exact_law else "equal, without a law"
    return f"{forecast.peak_bytes:,} against {ledger.peak_bytes:,} ({forecast.peak_bytes / ledger.peak_bytes - 1:+.2%})"


def _padded(tower: Architecture) -> dict[str, Tensor]:
    """Rows of one length behind a masked column, so that models keep the mask; or pictures."""
    generator = torch.Generator().manual_seed(0)
    if tower.kind == "pictures":
        return _grids(tower, generator, torch.float32)
    mask = torch.ones(ROWS, WIDTH, dtype=torch.long)
    mask[:, 0] = 0
    ids = torch.randint(4, 64, (ROWS, WIDTH), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def run_zoo(
    chosen: Iterable[str] | None = None,
    *,
    forecast: bool = True,
    processes: int = 1,
    on_row: Callable[[ZooRow], object] | None = None,
) -> list[ZooRow]:
    """The rows of these names, or all, in as many processes; on_row is called with each as it is done."""
    chosen = [one_of("name", name, tuple(names())) for name in (names() if chosen is None else chosen)]
    work = partial(try_architecture, forecast=forecast)
    rows = []
    for row in map_in_processes(work, chosen, processes):
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def format_zoo(rows: Sequence[ZooRow], width: int = 60) -> str:
    """The rows as a table of text; long words are cut at `width`."""

    def cut(text: str) -> str:
        return text if len(text) <= width else f"{text[: width - 1]}…"

    cells = [
        (row.name, row.parameters, row.padding, "" if row.error is None else f"{row.error:.1e}")
        + (cut(row.verification), cut(row.forecast))
        for row in rows
    ]
    return format_table(HEADINGS, cells)
