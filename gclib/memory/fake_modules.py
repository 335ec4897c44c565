"""Encoders and a loss as fake modules, one `FakeStep` for each configuration, found again by what a law depends on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from gclib.losses.module import ContrastiveLoss
from gclib.memory.cuda_operations import DEVICES
from gclib.memory.law_files import LawFiles
from gclib.memory.laws import FakeStep, fake_copy
from gclib.models.encoder import Encoder, config_for, pooling_for
from gclib.support.validation import one_of, refuse


@dataclass(frozen=True)
class Built:
    """How encoders are built from configs: what a law depends on beside the configs themselves."""

    poolings: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = False


class Keyed:
    """A value that is cached by a text of what matters in it, and that the cache lets go of once it was used."""

    def __init__(self, text: str, value: Any):
        self.text, self.value = text, value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyed) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def take(self) -> Any:
        """The value, once."""
        value, self.value = self.value, None
        return value


def fake_step(
    config: Any,
    encoders: Any,
    loss: Any,
    tied: bool,
    dtype: torch.dtype,
    autocast: Any,
    *,
    pooling: str | None = None,
    gradient_checkpointing: bool = False,
    device: str = "cpu",
) -> FakeStep:
    """The fake encoders and loss of a configuration, with the laws that were found for it so far.

    Arguments as in `gclib.memory.forecast.forecast_step`; ValueError where they do not fit.
    """
    if (config is None) == (encoders is None):
        raise refuse("config", "or encoders: exactly one of them must be given", f"config={config!r}")
    for name, value in (("dtype", dtype), ("autocast", autocast)):
        if not (name == "autocast" and value is None) and not (
            isinstance(value, torch.dtype) and value.is_floating_point
        ):
            raise refuse(name, "must be a floating point torch.dtype", value)
    one_of("gradient_checkpointing", gradient_checkpointing, (False, True))
    one_of("device", device, DEVICES)
    loss = ContrastiveLoss() if loss is None else loss
    if not callable(loss):
        raise refuse("loss", "must be callable", type(loss).__name__)
    keyed_loss = Keyed(_signature(loss), loss)
    if encoders is None:
        sizes = _sizes(config, tied)
        configs = tuple(config_for(size) for size in sizes)
        built = Built(tuple(pooling_for(size, pooling) for size in sizes), dtype, gradient_checkpointing)
        return _from_configs(Keyed(_written(configs), configs), built, keyed_loss, autocast, device)
    if pooling is not None or gradient_checkpointing:
        rule = "and gradient_checkpointing must be left alone where encoders are given: they have their own"
        raise refuse("pooling", rule, f"pooling={pooling!r}, gradient_checkpointing={gradient_checkpointing}")
    if len(encoders) != 2 or not all(isinstance(encoder, nn.Module) for encoder in encoders):
        raise refuse("encoders", "must be two modules, the same one twice where tied", encoders)
    signature = tuple(_signature(encoder) for encoder in encoders), encoders[0] is encoders[1]
    return _from_modules(Keyed(str(signature), tuple(encoders)), keyed_loss, autocast, device)


def _sizes(config: Any, tied: bool) -> list[Any]:
    """One config for tied towers; two for towers of their own."""
    if isinstance(config, (list, tuple)):
        if len(config) != 2:
            raise refuse("config", "must be one config, or one for each of the two towers", config)
        return list(config)
    return [config] * (1 if tied else 2)


def _written(configs: Sequence[Any]) -> str:
    """All that a law depends on in the configs: their fields, and the attention, which their JSON leaves out."""
    return "\n".join(
        " ".join(
            (
                type(config).__name__,
                str(getattr(config, "_attn_implementation", None)),
                config.to_json_string(use_diff=False),
            )
        )
        for config in configs
    )


def _signature(module: Any) -> str:
    """What a law depends on: structure, shapes, dtypes, what is trained, training mode."""
    if not isinstance(module, nn.Module):
        return f"{id(module)}"
    tensors = [*module.named_parameters(), *module.named_buffers()]
    described = [(name, tuple(t.shape), str(t.dtype), str(t.device), t.requires_grad) for name, t in tensors]
    configs = [getattr(part, "config", None) for part in module.modules()]
    written = {_written([config]) for config in configs if hasattr(config, "to_json_string")}
    modes = [part.training for part in module.modules()]
    plain = [
        sorted((name, value) for name, value in vars(part).items() if isinstance(value, (bool, int, float, str, tuple)))
        for part in module.modules()
    ]
    return f"{module!r} {sorted(written)} {described} {modes} {plain}"


@lru_cache(maxsize=16)
def _from_configs(configs: Keyed, built: Built, loss: Keyed, autocast: Any, device: str) -> FakeStep:
    given, loss_fn = configs.take(), loss.take()
    files = LawFiles(
        f"{configs.text} {built} {autocast} {device}", loss.text if isinstance(loss_fn, nn.Module) else None
    )

    def make(mode: Any) -> tuple[list[nn.Module], Any]:
        fakes = [fake_copy(_on_meta(*each, built), mode) for each in zip(given, built.poolings, strict=True)]
        return [fakes[0], fakes[-1]], fake_copy(loss_fn, mode)

    return FakeStep(make, autocast, files, device)


def _on_meta(config: Any, pooling: str, built: Built) -> Encoder:
    """An encoder in training mode that takes no memory."""
    with torch.device("meta"):
        encoder = Encoder.from_config(config, pooling=pooling).to(built.dtype).train()
    return encoder.checkpoint_activations() if built.gradient_checkpointing else encoder


@lru_cache(maxsize=16)
def _from_modules(encoders: Keyed, loss: Keyed, autocast: Any, device: str) -> FakeStep:
    given, loss_fn = encoders.take(), loss.take()

    def make(mode: Any) -> tuple[list[nn.Module], Any]:
        copies = {id(encoder): fake_copy(encoder, mode) for encoder in given}
        return [copies[id(encoder)] for encoder in given], fake_copy(loss_fn, mode)

    return FakeStep(make, autocast, device=device)
