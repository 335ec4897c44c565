"""What a tower is fed: a Tensor, a tuple of Tensors or a mapping of Tensors, all with rows first."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gclib.chunks import Chunk
from gclib.support.validation import refuse

PASSED_THROUGH = (bool, int, float, str, type(None))


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
    if isinstance(mask, FakeTensor):
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


def check_devices(encoder: Any, inputs: Any, tower: int) -> None:
    """Inputs must be on a device that a module's parameters are on."""
    parameters = list(encoder.parameters()) if isinstance(encoder, torch.nn.Module) else []
    devices = {parameter.device for parameter in parameters}
    found = next(iter(named_tensors(inputs).values())).device
    if devices and found not in devices:
        raise refuse(f"inputs[{tower}]", f"must be on its encoder's device {sorted(map(str, devices))}", str(found))


def _check_token_ids(inputs: Mapping, name: str) -> None:
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise refuse(f"{name}['input_ids']", "must be whole numbers (torch.long)", str(ids.dtype))


def as_tower_list(name: str, value: Any, towers: int) -> list[Any]:
    """One value for each tower: a list or tuple of that many, or a single value for all."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != towers:
            raise refuse(name, f"must be one value or one for each of the {towers} towers", value)
        return list(value)
    return [value] * towers
