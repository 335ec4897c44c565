"""Record and replay the random generators that a forward draws from: how dropout is replayed.

Dropout in the second forward must draw the masks of the first. The code of Gao et al. 2021 does this by putting the
generators back (the paper does not speak of it); the state of *every* device that inputs and weights are on belongs to
it. Python's and numpy's own generators are not recorded: a forward that draws from them cannot be replayed.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gclib.support.validation import has_values


class RandomState:
    """The states of the CPU generator and of every other device given, as they were at `record`.

    The CPU is tested, CUDA where there is one (tests/gpu); MPS follows torch's documentation and was never run.
    """

    def __init__(self, states: dict[torch.device, Tensor], *, pretended: bool = False):
        self._states = states
        self.pretended = pretended

    @classmethod
    def record(cls, tensors: Iterable[Tensor]) -> "RandomState":
        """The present states of the CPU's generator and of the devices that `tensors` are on.

        Fake tensors draw nothing: their states are recorded, so that a forecast counts their bytes, and never put
        back, so that it disturbs no step that runs in another thread.
        """
        tensors = list(tensors)
        pretended = not all(has_values(tensor) for tensor in tensors)
        devices = {torch.device("cpu")} | {tensor.device for tensor in tensors}
        ordered = sorted((device for device in devices if device.type in ("cpu", "cuda", "mps")), key=str)
        return cls({device: _read(device) for device in ordered}, pretended=pretended)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The recorded states: uint8 tensors, a few bytes on CUDA and some thousands for the CPU."""
        return tuple(self._states.values())

    def restore(self) -> None:
        """Put every recorded generator back to its recorded state: how a step replays a chunk's dropout."""
        if not self.pretended:
            for device, state in self._states.items():
                _write(device, state)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Inside, the generators draw again what followed `record`; afterwards they are as before."""
        before = RandomState({} if self.pretended else {device: _read(device) for device in self._states})
        self.restore()
        try:
            yield
        finally:
            before.restore()


def _read(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.mps.get_rng_state()


def _write(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    elif device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.mps.set_rng_state(state)
