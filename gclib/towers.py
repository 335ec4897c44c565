"""A tower: one encoder, its rows, and the chunks that a step plans for it.

Inputs are a Tensor, a tuple of Tensors or a mapping of Tensors, with rows first. All of this is settled before a step
begins, in plain Python values, so that the step itself reads no tensor's value (but for what `verify` compares).
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
from gclib.support.modules import call
from gclib.support.validation import describe, has_values, int_at_least, positive_int, refuse

# Entries that are as long as the texts: cut with the attention mask where they are as wide as it.
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "bbox")
WRITES = "must not write into its inputs: the second forward would be given something else"


@dataclass(frozen=True)
class Tower:
    """One encoder, its rows, which entries are cut to a chunk's width (of `width` at most; 0: none), and its chunks."""

    number: int
    encoder: Callable[..., Tensor]
    inputs: Any
    rows: int
    trimmed: tuple[str, ...]
    width: int
    chunks: tuple[Chunk, ...] = ()

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
        return {"tower": self.tower.number, "chunk": self.number, "chunks": len(self.tower.chunks)}


def named_tensors(inputs: Any) -> dict[str, Tensor]:
    """The tensors of one tower's inputs under the names that an error message uses."""
    if isinstance(inputs, Tensor):
        return {"the input": inputs}
    items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return {f"[{key!r}]": value for key, value in items if isinstance(value, Tensor)}


def trimmed_names(inputs: Any, token_inputs: Sequence[str] | None = None) -> tuple[str, ...]:
    """The entries that lose their last columns where rows are short: those of `TOKEN_INPUTS` and `token_inputs`.

    Empty where there is no attention mask (rows, T), where such an entry is not as wide as the mask, or where
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
        got = describe(reps) if isinstance(reps, Tensor) else f"{type(reps).__name__} (wrap it: a pooled tensor alone)"
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


def plan_jobs(
    towers: Sequence[Tower], *, chunk_size: Any, chunk_tokens: Any, plan: Any, sort_by_length: bool, retain_chunks: int
) -> list[Job]:
    """Every chunk of every tower, in the order of the first forward; arguments as `gclib.steps.grad_cache_step`'s."""
    retain = int_at_least("retain_chunks", retain_chunks, 0)
    cuts = {"chunk_size": chunk_size, "chunk_tokens": chunk_tokens, "plan": plan}
    names = [name for name, value in cuts.items() if value is not None]
    if len(names) != 1:
        raise refuse("chunk_size,", "chunk_tokens or plan: exactly one must be given", ", ".join(names) or "none")
    if plan is None:
        values = as_tower_list(names[0], cuts[names[0]], len(towers))
        values = [positive_int(names[0], value) for value in values]
        plans = [_cut(tower, names[0], value, sort_by_length) for tower, value in zip(towers, values, strict=True)]
    else:
        plans = _split_plan(plan, towers)
    towers = [_with_chunks(tower, chunks) for tower, chunks in zip(towers, plans, strict=True)]
    places = schedule([tower.chunks for tower in towers], retain)
    return [Job(towers[tower], number, towers[tower].chunks[number], kept) for tower, number, kept in places]


def _cut(tower: Tower, by: str, value: int, sort_by_length: bool) -> list[Chunk]:
    """The tower's rows cut `by` chunk_size or chunk_tokens. Among several processes every one must call its encoder
    equally often, for a sharded encoder (FSDP) communicates at each call: by chunk_size their chunks are cut evenly.
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


def _with_chunks(tower: Tower, chunks: Sequence[Chunk]) -> Tower:
    widest = tower.width or max((chunk.width for chunk in chunks), default=1)
    return replace(tower, chunks=tuple(check_plan(chunks, tower.rows, widest)))


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
