"""A tower: one encoder and the rows that it is given; what a step checks of its towers, and plans for them.

Inputs are a Tensor, a tuple of Tensors or a mapping of Tensors, with rows first. All of this is settled before a step
begins, in plain Python values, so that the step itself reads no tensor's value.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gclib.chunks import Chunk, check_plan, plan_chunks, price_of_a_call, schedule
from gclib.distributed import world_size
from gclib.randomness import RandomState
from gclib.support.validation import check_mask, has_values, int_at_least, positive_int, refuse

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
PASSED_THROUGH = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Tower:
    """One encoder, the rows that it is given, and the plan to encode them by."""

    number: int
    encoder: Callable[..., Tensor]
    inputs: Any
    rows: int
    width: int
    plan: tuple[Chunk, ...] = ()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The encoder's; none of what is not a module."""
        return list(self.encoder.parameters()) if isinstance(self.encoder, nn.Module) else []

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the inputs."""
        return list(named_tensors(self.inputs).values())

    def needs_gradient(self) -> bool:
        """False where a second forward would change nothing: a frozen tower. Unknown of what is not a module: True."""
        leaves = [*self.parameters, *self.tensors]
        return not isinstance(self.encoder, nn.Module) or any(leaf.requires_grad for leaf in leaves)


@dataclass(frozen=True)
class Job:
    """One chunk of one tower, and whether its graph is kept after the first forward."""

    tower: Tower
    number: int
    chunk: Chunk
    retained: bool

    def named(self) -> dict[str, int]:
        """How on_phase names this piece of work."""
        return {"tower": self.tower.number, "chunk": self.number, "chunks": len(self.tower.plan)}


# --- what a tower is fed ------------------------------------------------------------------------------------------


def named_tensors(inputs: Any) -> dict[str, Tensor]:
    """The tensors of one tower's inputs under the names that an error message uses."""
    if isinstance(inputs, Tensor):
        return {"the input": inputs}
    items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return {f"[{key!r}]": value for key, value in items if isinstance(value, Tensor)}


def check_inputs(inputs: Any, tower: int) -> int:
    """The number of rows, where `inputs` is well formed; ValueError naming tower and entry where not."""
    name = f"inputs[{tower}]"
    if not isinstance(inputs, (Tensor, tuple, list, Mapping)):
        raise refuse(name, "must be a Tensor, a tuple of Tensors or a mapping of Tensors", type(inputs).__name__)
    if not isinstance(inputs, Tensor):
        items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
        for key, value in items:
            if not isinstance(value, (Tensor, *PASSED_THROUGH)):
                rule = "must be a Tensor with rows first or a plain value (put anything else into a lambda)"
                raise refuse(f"{name}[{key!r}]", rule, type(value).__name__)
    tensors = named_tensors(inputs)
    if not tensors:
        raise refuse(name, "must hold at least one Tensor", "no tensor")
    rows = {f"{name}{key}" if key.startswith("[") else name: t.shape[0] if t.ndim else 0 for key, t in tensors.items()}
    first = next(iter(rows.values()))
    for key, count in rows.items():
        if count == 0:
            raise refuse(key, "must have at least one row", "an empty batch or a tensor without rows")
        if count != first:
            raise refuse(key, f"must have the {first} rows that its tower's first tensor has", f"{count} rows")
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        raise refuse(name, "must be on one device", f"{sorted(map(str, devices))}")
    if isinstance(inputs, Mapping):
        _check_token_ids(inputs, name)
    return first


def token_width(inputs: Any) -> int | None:
    """Columns of a two-dimensional attention mask; None where there is none, and nothing can be trimmed."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else None


def row_lengths(inputs: Any) -> list[int] | None:
    """Each row's length: 1 + its last unmasked column, at least 1. None without an attention mask.

    Reads the mask once, before the step begins. A fake mask has no values: every row then counts as full.
    """
    width = token_width(inputs)
    if width is None:
        return None
    mask = inputs["attention_mask"]
    if not has_values(mask):
        return [width] * mask.shape[0]
    present = (mask.detach() != 0).cpu().numpy()
    from_the_end = present[:, ::-1].argmax(axis=1)
    return [int(width - skipped) if row.any() else 1 for skipped, row in zip(from_the_end, present, strict=True)]


def take(inputs: Any, chunk: Chunk) -> Any:
    """The chunk's rows of every tensor, trailing token columns cut to its width. Same structure as `inputs`."""
    full = token_width(inputs)

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if full is not None and chunk.width < full and value.ndim in (2, 3) and value.shape[1] == full:
            value = value[:, : chunk.width]
        return value[chunk.index(value.device)]

    if isinstance(inputs, Tensor):
        return cut(inputs)
    if isinstance(inputs, Mapping):
        return {key: cut(value) for key, value in inputs.items()}
    return tuple(cut(value) for value in inputs)


def encode(encoder: Callable[..., Tensor], inputs: Any) -> Tensor:
    """f(x), f(*x) or f(**x); the output must be a floating point tensor with the inputs' rows first."""
    if isinstance(inputs, Tensor):
        reps = encoder(inputs)
    else:
        reps = encoder(**inputs) if isinstance(inputs, Mapping) else encoder(*inputs)
    rows = next(iter(named_tensors(inputs).values())).shape[0]
    if not isinstance(reps, Tensor) or not reps.is_floating_point() or reps.ndim < 2 or reps.shape[0] != rows:
        got = f"shape {tuple(reps.shape)} of {reps.dtype}" if isinstance(reps, Tensor) else type(reps).__name__
        raise refuse("encoders", f"must return floating point representations with {rows} rows first", got)
    return reps


def _check_token_ids(inputs: Mapping, name: str) -> None:
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise refuse(f"{name}['input_ids']", "must be whole numbers (torch.long)", str(ids.dtype))


# --- what every step asks of its arguments ------------------------------------------------------------------------


def check_towers(
    encoders: Any, inputs: Any, loss_fn: Any, *, mask: Any, on_phase: Any, scaler: Any, batch_norm_allowed: bool = False
) -> list[Tower]:
    """The towers of a step, once all of its arguments are found to fit; ValueError naming the one that does not."""
    for name, value in (("encoders", encoders), ("inputs", inputs)):
        if not isinstance(value, (list, tuple)) or len(value) == 0:
            raise refuse(name, "must be a list or tuple with one entry for each tower", type(value).__name__)
    if len(encoders) != len(inputs):
        raise refuse("inputs", f"must be one for each of the {len(encoders)} towers", f"{len(inputs)} inputs")
    for name, value in (("loss_fn", loss_fn), ("on_phase", on_phase)):
        if not callable(value) and not (name == "on_phase" and value is None):
            raise refuse(name, "must be callable", type(value).__name__)
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise refuse("scaler", "must have a scale(loss) method, as torch.amp.GradScaler has", type(scaler).__name__)
    towers = []
    for number, (encoder, tower_inputs) in enumerate(zip(encoders, inputs, strict=True)):
        if not callable(encoder):
            raise refuse(f"encoders[{number}]", "must be callable", type(encoder).__name__)
        rows = check_inputs(tower_inputs, number)
        towers.append(Tower(number, encoder, tower_inputs, rows, token_width(tower_inputs) or 0))
        _check_devices(towers[-1])
        if not batch_norm_allowed:
            refuse_batch_norm(f"encoders[{number}]", encoder, "a chunk")
    _check_positives_stay(mask, towers)
    return towers


def _check_devices(tower: Tower) -> None:
    """Inputs must be on a device that the encoder's parameters are on."""
    devices = {parameter.device for parameter in tower.parameters}
    if devices and tower.tensors[0].device not in devices:
        rule = f"must be on its encoder's device {sorted(map(str, devices))}"
        raise refuse(f"inputs[{tower.number}]", rule, str(tower.tensors[0].device))


def refuse_batch_norm(argument: str, module: Any, piece: str) -> None:
    """ValueError for a module in which BatchNorm is in training mode, which chunks would give other statistics."""
    modules = module.modules() if isinstance(module, nn.Module) else ()
    if any(isinstance(part, BATCH_NORMS) and part.training for part in modules):
        rule = (
            f"must not hold BatchNorm in training mode: its statistics would be those of {piece}, updated twice. "
            "Put these layers into eval mode, or use LayerNorm or GroupNorm"
        )
        raise refuse(argument, rule, "BatchNorm in training mode")


def _check_positives_stay(mask: Tensor | None, towers: Sequence[Tower]) -> None:
    """A mask (B, N) of the first two towers' rows leaves out no positive; its values are read, where it has any."""
    if mask is None:
        return
    queries = towers[0].rows
    passages = towers[1].rows if len(towers) > 1 else queries
    check_mask(mask, queries, passages, towers[0].tensors[0].device)
    if not has_values(mask) or passages % queries:
        return
    if bool(mask[torch.arange(queries), torch.arange(queries) * (passages // queries)].any()):
        raise refuse("mask", "must not leave out a positive (query i, passage i * (1 + K))", "a mask that does")


# --- which rows are encoded together ------------------------------------------------------------------------------


def plan_jobs(
    towers: Sequence[Tower], *, chunk_size: Any, chunk_tokens: Any, plan: Any, sort_by_length: bool, retain_chunks: int
) -> list[Job]:
    """Every chunk of every tower, in the order of the first forward; arguments as `gclib.steps.grad_cache_step`'s."""
    retain = int_at_least("retain_chunks", retain_chunks, 0)
    cuts = {"chunk_size": chunk_size, "chunk_tokens": chunk_tokens, "plan": plan}
    names = [name for name, value in cuts.items() if value is not None]
    if len(names) != 1:
        raise refuse("chunk_size", "chunk_tokens or plan: exactly one must be given", ", ".join(names) or None)
    if plan is None:
        values = as_tower_list(names[0], cuts[names[0]], len(towers))
        values = [positive_int(names[0], value) for value in values]
        plans = [_cut(tower, names[0], value, sort_by_length) for tower, value in zip(towers, values, strict=True)]
    else:
        plans = _split_plan(plan, towers)
    towers = [_with_plan(tower, chunks) for tower, chunks in zip(towers, plans, strict=True)]
    places = schedule([tower.plan for tower in towers], retain)
    return [Job(towers[tower], number, towers[tower].plan[number], kept) for tower, number, kept in places]


def _cut(tower: Tower, by: str, value: int, sort_by_length: bool) -> list[Chunk]:
    """The tower's rows cut `by` chunk_size or chunk_tokens. Among several processes every one must call its encoder
    equally often, for a sharded encoder (FSDP) communicates at each call: their chunks are cut evenly.
    """
    lengths = row_lengths(tower.inputs) if sort_by_length else None
    call_tokens = price_of_a_call(tower.tensors[0].device) if world_size() == 1 else None
    widths = lengths or [tower.width or 1] * tower.rows
    return plan_chunks(widths, **{by: value}, sort=lengths is not None, call_tokens=call_tokens)


def _split_plan(plan: Any, towers: Sequence[Tower]) -> list[Sequence[Chunk]]:
    if not isinstance(plan, (list, tuple)) or len(plan) == 0:
        raise refuse("plan", "must be a list of Chunk for each tower", type(plan).__name__)
    parts = [plan] if all(isinstance(entry, Chunk) for entry in plan) else list(plan)
    if len(parts) != len(towers) or not all(isinstance(part, (list, tuple)) for part in parts):
        raise refuse("plan", f"must be a list of Chunk for each of the {len(towers)} towers", f"{len(parts)} parts")
    return parts


def _with_plan(tower: Tower, plan: Sequence[Chunk]) -> Tower:
    widest = tower.width or max((chunk.width for chunk in plan), default=1)
    return replace(tower, plan=tuple(check_plan(plan, tower.rows, widest)))


def as_tower_list(name: str, value: Any, towers: int) -> list[Any]:
    """One value for each tower: a list or tuple of that many, or a single value for all."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != towers:
            raise refuse(name, f"must be one value or one for each of the {towers} towers", value)
        return list(value)
    return [value] * towers


# --- the generators that towers draw from -------------------------------------------------------------------------


def generators_of(towers: Sequence[Tower]) -> RandomState:
    """The generators' present states, on the devices of the towers' inputs and parameters."""
    return RandomState.record([tensor for tower in towers for tensor in (*tower.tensors, *tower.parameters)])


@contextmanager
def generators_back_on_error(towers: Sequence[Tower]) -> Iterator[RandomState]:
    """After an error or an interrupt, the generators are as at entry. After success they have moved on."""
    before = generators_of(towers)
    try:
        yield before
    except BaseException:
        before.restore()
        raise
