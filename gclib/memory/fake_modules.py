"""A workload's encoders and loss as modules of fake tensors: shapes, dtypes and devices, and no memory.

And what a law depends on in them, as a text by which it is found again.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gclib.memory.workload import LENGTHS, Workload
from gclib.models.encoder import Encoder
from gclib.support.validation import refuse


def fake_encoders(workload: Workload, mode: FakeTensorMode) -> list[nn.Module]:
    """The encoder of each tower, the same one twice where they are tied: copies of those given, or made of configs."""
    if workload.encoders is not None:
        copies = {id(encoder): fake_copy(encoder, mode) for encoder in workload.encoders}
        return [copies[id(encoder)] for encoder in workload.encoders]
    encoders = [fake_copy(_on_meta(workload, *made), mode) for made in workload.configs]
    return [encoders[0], encoders[-1]]


def _on_meta(workload: Workload, config: Any, pooling: str) -> Encoder:
    """An encoder in training mode that takes no memory."""
    with torch.device("meta"):
        encoder = Encoder.from_config(config, pooling=pooling).to(workload.dtype).train()
    return encoder.checkpoint_activations() if workload.gradient_checkpointing else encoder


def fake_copy(module: Any, mode: FakeTensorMode) -> Any:
    """A module with fake parameters and buffers; the real ones (or those on "meta") are neither copied nor changed."""
    if not isinstance(module, nn.Module):
        return module
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_meta:
            with mode:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        else:
            fake = mode.from_tensor(tensor.detach())
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(module, memo)


def picture_shape(encoder: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) of what an encoder for pictures is given; None for one that reads tokens."""
    for part in encoder.modules():
        config = getattr(part, "config", None)
        if getattr(part, "main_input_name", None) == "pixel_values" and hasattr(config, "image_size"):
            size = config.image_size
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            return (getattr(config, "num_channels", 3), height, width)
    return None


def padded_batch(encoder: nn.Module, rows: int, width: int | None) -> dict[str, Tensor]:
    """Rows of this many tokens; for width None, pictures of the size that the encoder's config states, in float32."""
    if width is not None:
        return padded_tokens(rows, width)
    return {"pixel_values": torch.zeros(rows, *picture_shape(encoder), dtype=torch.float32)}


def padded_tokens(rows: int, width: int) -> dict[str, Tensor]:
    """A padded batch as the tokenizer makes it, without numbers worth reading."""
    return {
        "input_ids": torch.zeros(rows, width, dtype=torch.long),
        "attention_mask": torch.ones(rows, width, dtype=torch.long),
    }


def check_inputs(workload: Workload, encoders: Sequence[nn.Module]) -> None:
    """Tokens have a length, pictures have none; ValueError where an encoder reads the other kind."""
    for name, encoder, length in zip(LENGTHS, encoders, workload.lengths, strict=True):
        pictures = picture_shape(encoder) is not None
        if pictures and length is not None:
            raise refuse(name, "must be None for a tower that is given pictures", length)
        if not pictures and length is None:
            raise refuse(name, "must be a number of tokens, or one a row, for a tower that reads tokens", length)


def encoders_text(workload: Workload) -> str:
    """What a law depends on in the encoders, and in how they are made."""
    if workload.encoders is not None:
        first, second = workload.encoders
        return f"{module_text(first)} {module_text(second)} {first is second}"
    made = [f"{_config_text(config)} {pooling}" for config, pooling in workload.configs]
    return f"{made} {workload.dtype} {workload.gradient_checkpointing}"


def module_text(module: Any) -> str:
    """What a law depends on: structure, shapes, dtypes, what is trained, training mode."""
    if not isinstance(module, nn.Module):
        return f"{id(module)}"
    tensors = [*module.named_parameters(), *module.named_buffers()]
    described = [(name, tuple(t.shape), str(t.dtype), str(t.device), t.requires_grad) for name, t in tensors]
    configs = [getattr(part, "config", None) for part in module.modules()]
    config_texts = {_config_text(config) for config in configs if hasattr(config, "to_json_string")}
    modes = [part.training for part in module.modules()]
    plain = [
        sorted((name, value) for name, value in vars(part).items() if isinstance(value, (bool, int, float, str, tuple)))
        for part in module.modules()
    ]
    return f"{module!r} {sorted(config_texts)} {described} {modes} {plain}"


def _config_text(config: Any) -> str:
    """All that a law depends on in a config: its fields, and the attention, which its JSON leaves out."""
    attention = getattr(config, "_attn_implementation", None)
    return f"{type(config).__name__} {attention} {config.to_json_string(use_diff=False)}"
