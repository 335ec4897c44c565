"""The two encoders of a run: checked, and fed on their own device."""

from typing import Any

import torch
from torch import nn

from gclib.support.validation import refuse


def check_encoders(encoders: Any) -> None:
    """Two callables, the queries' encoder and the passages'; ValueError otherwise."""
    if not isinstance(encoders, (list, tuple)) or len(encoders) != 2:
        got = f"{len(encoders)} of them" if isinstance(encoders, (list, tuple)) else type(encoders).__name__
        raise refuse("encoders", "must be two, the queries' and the passages' (twice the same: tied)", got)
    for number, encoder in enumerate(encoders):
        if not callable(encoder):
            raise refuse(f"encoders[{number}]", "must be callable", type(encoder).__name__)


def device_of(encoder: Any) -> torch.device:
    """Where the encoder's parameters are; the CPU for a callable without any."""
    parameters = encoder.parameters() if isinstance(encoder, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch's tensors on the device."""
    return {key: tensor.to(device) for key, tensor in batch.items()}
