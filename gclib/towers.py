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
from gclib.support.modules import call, refuse_batch_norm
from gclib.support.validation import check_mask, has_values, int_at_least, positive_int, refuse

# Entries that are as long as the texts: cut with the attention mask where they are as wide as it.
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "bbox")
WRITES = "must not write into its inputs: the second forward would be given something else"
PASSED_THROUGH = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Tower:
    """One encoder, the rows that it is given, which entries are cut to a chunk's width, and the plan to encode by."""

    number: int
    encoder: Callable[..., Tensor]
    inputs: Any
    rows: int
    trimmed: tuple[str, ...]
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

    @property
    def kind(self) -> str:
        """The type of the device that the inputs are on: "cpu", "cuda"."""
        return self.tensors[0].device.type

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
    if len(devices) > 1 or "meta" in {device.type for device in devices}:
        raise refuse(name, "must be on one device, and not on meta", f"{sorted(map(str, devices))}")
    if any(tensor.is_inference() for tensor in tensors.values()):
        raise refuse(name, "must not be made under inference_mode, or be cloned outside of it", "an inference tensor")
    if isinstance(inputs, Mapping):
        _check_token_ids(inputs, name)
    return first


def trimmed_names(inputs: Any, token_inputs: Sequence[str] | None = None) -> tuple[str, ...]:
    """The entries that lose their last columns where rows are short: those of `TOKEN_INPUTS` and `token_inputs`.

    None of them where there is no attention mask (rows, T), where such an entry is not as wide as the mask, or where
    another one is (it may follow the tokens or be so wide by chance: `token_inputs`, if not None, says which do).
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return ()
    names = [name for name, value in inputs.items() if name in (*TOKEN_INPUTS, *(token_inputs or ()))]
    wide = [n for n, v in inputs.items() if isinstance(v, Tensor) and v.ndim in (2, 3) and v.shape[1] == mask.shape[1]]
    unsure = token_inputs is None and set(wide) - set(names)
    return () if unsure or not set(names) <= set(wide) else tuple(names)


def row_lengths(inputs: Any, trimmed: Sequence[str] | None = None) -> list[int] | None:
    """Each row's length: 1 + its last unmasked column, at least 1. None where nothing can be trimmed.

    Reads the mask once, before the step begins. A fake mask has no values: every row then counts as full.
    """
    if not (trimmed_names(inputs) if trimmed is None else trimmed):
        return None
    mask = inputs["attention_mask"]
    width = mask.shape[1]
    if not has_values(mask):
        return [width] * mask.shape[0]
    present = (mask.detach() != 0).cpu().numpy()
    from_the_end = present[:, ::-1].argmax(axis=1)
    return [int(width - skipped) if row.any() else 1 for skipped, row in zip(from_the_end, present, strict=True)]


def take(inputs: Any, chunk: Chunk, trimmed: Sequence[str] | None = None) -> Any:
    """The chunk's rows of every tensor, the `trimmed` entries cut to its width. Same structure as `inputs`."""

    def rows(value: Any) -> Any:
        return value[chunk.index(value.device)] if isinstance(value, Tensor) else value

    if isinstance(inputs, Tensor):
        return rows(inputs)
    if not isinstance(inputs, Mapping):
        return tuple(rows(value) for value in inputs)
    names = trimmed_names(inputs) if trimmed is None else trimmed
    return {key: rows(value[:, : chunk.width] if key in names else value) for key, value in inputs.items()}


def encode(encoder: Callable[..., Tensor], inputs: Any) -> Tensor:
    """f(x), f(*x) or f(**x); the output must be a floating point tensor with the inputs' rows first."""
    if isinstance(inputs, Tensor):
        reps = call(encoder, inputs)
    else:
        reps = call(encoder, **inputs) if isinstance(inputs, Mapping) else call(encoder, *inputs)
    rows = next(iter(named_tensors(inputs).values())).shape[0]
    if not isinstance(reps, Tensor) or not reps.is_floating_point() or reps.ndim < 2 or reps.shape[0] != rows:
        got = f"shape {tuple(reps.shape)} of {reps.dtype}" if isinstance(reps, Tensor) else type(reps).__name__
        raise refuse("encoders", f"must return floating point representations with {rows} rows first", got)
    return reps


def encode_chunk(tower: Tower, chunk: Chunk) -> Tensor:
    """The chunk's representations. Autocast's copies of the weights do not outlive it: those made without a graph
    must not serve a forward that needs one, and memory stays that of a chunk. ValueError where inputs are written to.
    """
    inputs = take(tower.inputs, chunk, tower.trimmed)
    versions = [tensor._version for tensor in named_tensors(inputs).values()]
    output = encode(tower.encoder, inputs)
    torch.clear_autocast_cache()
    if versions != [tensor._version for tensor in named_tensors(inputs).values()]:
        raise refuse(f"encoders[{tower.number}]", WRITES, "a batch that was changed in place")
    return output


def _check_token_ids(inputs: Mapping, name: str) -> None:
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise refuse(f"{name}['input_ids']", "must be whole numbers (torch.long)", str(ids.dtype))


def check_towers(
    encoders: Any,
    inputs: Any,
    loss_fn: Any,
    *,
    mask: Any,
    on_phase: Any,
    scaler: Any,
    in_chunks: bool = True,
    token_inputs: Any = None,
) -> list[Tower]:
    """The towers of a step, once all of its arguments are found to fit; ValueError naming the one that does not."""
    if not torch.is_grad_enabled():
        raise refuse("torch.no_grad()", "or inference_mode must not be around a step, which makes gradients", "one")
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
        names = trimmed_names(tower_inputs, token_inputs)
        width = tower_inputs["attention_mask"].shape[1] if names else 0
        towers.append(Tower(number, encoder, tower_inputs, rows, names, width))
        _check_devices(towers[-1])
        if in_chunks:
            refuse_batch_norm(f"encoders[{number}]", encoder, "a chunk")
            _refuse_history(towers[-1])
    _check_positives_stay(mask, towers)
    return towers


def _check_devices(tower: Tower) -> None:
    """Inputs must be on a device that the encoder's parameters are on."""
    devices = {parameter.device for parameter in tower.parameters}
    if devices and tower.tensors[0].device not in devices:
        rule = f"must be on its encoder's device {sorted(map(str, devices))}"
        raise refuse(f"inputs[{tower.number}]", rule, str(tower.tensors[0].device))


def _refuse_history(tower: Tower) -> None:
    """Each chunk would backpropagate through the graph that made the inputs, once more each time."""
    if any(tensor.requires_grad and not tensor.is_leaf for tensor in tower.tensors):
        rule = "must not have a graph of their own in a chunked step: detach them, or make that part of the encoder"
        raise refuse(f"inputs[{tower.number}]", rule, "a tensor with a grad_fn")


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
    lengths = row_lengths(tower.inputs, tower.trimmed) if sort_by_length else None
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
