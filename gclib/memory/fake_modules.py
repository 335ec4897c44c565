"""A workload's encoders and loss as modules of fake tensors: shapes, dtypes and devices, and no memory."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gclib.memory.fake_mode import FakeMode
from gclib.memory.fingerprint import Indescribable, fingerprint
from gclib.memory.workload import LENGTHS, Workload
from gclib.models.adapters import add_lora
from gclib.models.encoder import Encoder
from gclib.support.validation import refuse

MASKS_OF_THEIR_OWN = frozenset(("canine",))  # a mask of groups of characters, dropped where it hides none


def fake_encoders(workload: Workload, mode: FakeMode) -> list[nn.Module]:
    """The encoder of each tower, the same one twice where they are tied: copies of those given, or made of configs."""
    encoders = encoders_of(workload)
    copies = {id(encoder): fake_copy(encoder, mode) for encoder in encoders}
    return [copies[id(encoder)] for encoder in encoders]


def encoders_of(workload: Workload) -> list[nn.Module]:
    """The encoder of each tower, as given; those of configs on "meta", where they take no memory."""
    if workload.encoders is not None:
        return list(workload.encoders)
    options = (workload.dtype, workload.gradient_checkpointing, workload.lora)
    made = [_Made(place, *each, *options).encoder() for place, each in enumerate(workload.configs)]
    return [made[0], made[-1]]


class _Made:
    """An encoder of a config, in training mode, made once for all that describes it; towers have their own."""

    def __init__(self, place: int, *options: Any):
        self.options = options  # config, pooling, dtype, gradient checkpointing, LoRA
        try:
            self.key: Any = place, fingerprint(*self.options)
        except Indescribable:
            self.key = object()  # equal to no other: made anew each time

    def encoder(self) -> Encoder:
        """The encoder; made again where the code of its classes was changed since."""
        try:
            encoder, described = _kept(self)
            if fingerprint(encoder) == described:
                return encoder
        except Indescribable:
            pass
        return self.make()

    def make(self) -> Encoder:
        """On "meta", where it takes no memory."""
        config, pooling, dtype, checkpointing, lora = self.options
        with torch.device("meta"):
            encoder = Encoder.from_config(config, pooling=pooling).to(dtype).train()
            if lora is not None:
                add_lora(encoder, lora)
        return encoder.checkpoint_activations(reentrant=checkpointing == "reentrant") if checkpointing else encoder

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Made) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=8)
def _kept(made: _Made) -> tuple[Encoder, str]:
    encoder = made.make()
    return encoder, fingerprint(encoder)


def fake_copy(module: Any, mode: FakeMode) -> Any:
    """A module with fake parameters and buffers; the real ones (or those on "meta") are neither copied nor changed.

    ValueError for one that holds what cannot be copied (a lock, a file).
    """
    if not isinstance(module, nn.Module):
        return module
    memo = {id(tensor): _fake(tensor, mode) for tensor in (*module.parameters(), *module.buffers())}
    for part in module.modules():
        memo |= {id(tensor): _fake(tensor, mode) for tensor in _plain_tensors(vars(part)) if id(tensor) not in memo}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        rule = "must be modules that copy.deepcopy copies: a forecast runs a copy, and leaves yours as it is"
        raise refuse("encoders and loss", rule, f"{type(error).__name__}: {str(error)[:200]}") from error


def _fake(tensor: Tensor, mode: FakeMode) -> Tensor:
    """A tensor of the same shape and dtype that is trained or not as this one is. A card's are faked as a processor's,
    whose operations `gclib.memory.cuda_operations` turns into the card's.
    """
    if tensor.is_meta or tensor.is_cuda:
        with mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    else:
        fake = mode.from_tensor(tensor.detach())
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _plain_tensors(attributes: Any) -> Iterator[Tensor]:
    """Tensors that a module holds beside its parameters and buffers: attributes, and lists of them."""
    if isinstance(attributes, Tensor):
        yield attributes
    elif isinstance(attributes, (list, tuple, Mapping)):
        for value in attributes.values() if isinstance(attributes, Mapping) else attributes:
            yield from _plain_tensors(value)


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
    """Tokens have a length, pictures have none; ValueError where an encoder reads the other kind, or where its bytes
    depend on values.
    """
    for name, encoder, length in zip(LENGTHS, encoders, workload.lengths, strict=True):
        kinds = {getattr(getattr(part, "config", None), "model_type", None) for part in encoder.modules()}
        if read := sorted(kinds & MASKS_OF_THEIR_OWN):
            rule = "must not choose their operations by a mask of their own making: a forecast does not know its values"
            raise refuse("encoders", rule, read[0])
        pictures = picture_shape(encoder) is not None
        if pictures and length is not None:
            raise refuse(name, "must be None for a tower that is given pictures", length)
        if not pictures and length is None:
            raise refuse(name, "must be a number of tokens, or one a row, for a tower that reads tokens", length)
