"""What a step does while it runs, noted from outside: each call of its encoders and of its loss.

The step is given stand-ins that pass everything on. They note what went in and came out, whether a graph was kept,
under which autocast, from which state of the random generators, and which gradient came back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass
class Call:
    """One forward of an encoder, from a state of the generators; drew: whether it moved them.

    gradient: what came back to its representations, if anything did.
    """

    inputs: list[Tensor]
    reps: Tensor
    with_graph: bool
    autocast: torch.dtype | None
    state: Tensor
    drew: bool
    gradient: Tensor | None = None

    def note_gradient(self, gradient: Tensor) -> None:
        """A hook on the representations; several backward passes add up."""
        self.gradient = gradient.clone() if self.gradient is None else self.gradient + gradient

    def same_inputs(self, other: "Call") -> bool:
        """Whether another forward had the same inputs."""
        return len(self.inputs) == len(other.inputs) and all(map(same_numbers, self.inputs, other.inputs))


@dataclass
class CallLog:
    """All calls of one step in their order; loss_rows: the rows of each tower at each call of the loss; before_loss:
    how many calls came before its first one.
    """

    calls: list[Call] = field(default_factory=list)
    loss_rows: list[tuple[int, ...]] = field(default_factory=list)
    before_loss: int = 0

    @property
    def first(self) -> list[Call]:
        """Forwards without a graph."""
        return [call for call in self.calls if not call.with_graph]

    @property
    def second(self) -> list[Call]:
        """Forwards with a graph."""
        return [call for call in self.calls if call.with_graph]

    def replays(self) -> list[tuple[Call, Call]]:
        """(first, second) for each forward with a graph behind the loss that was given what one without was given.

        Of several that were given the same it is the one from the same state of the generators, if there is one. A
        forward with a graph before the loss is a retained chunk's only one.
        """
        waiting, pairs = self.first, []
        for call in (call for call in self.calls[self.before_loss :] if call.with_graph):
            twins = [earlier for earlier in waiting if earlier.same_inputs(call)]
            if twins:
                match = next((twin for twin in twins if torch.equal(twin.state, call.state)), twins[0])
                waiting = [earlier for earlier in waiting if earlier is not match]
                pairs.append((match, call))
        return pairs


class StandIn(nn.Module):
    """Passes everything on to an encoder or a loss: the same parameters, attributes and results."""

    def __init__(self, original: Callable[..., Any], call_log: CallLog):
        super().__init__()
        self.original, self.call_log = original, call_log
        self.training = getattr(original, "training", True)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


class LoggedEncoder(StandIn):
    """Stands in for an encoder."""

    @property
    def _orig_mod(self) -> nn.Module:
        """Where a step looks at an encoder before it trusts it: not at this stand-in, for that is none of its calls."""
        return getattr(self.original, "_orig_mod", self.original)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's representations; the call is noted."""
        state = generator_states(self)
        given = [leaf.detach().clone() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        reps = self.original(*args, **kwargs)
        if isinstance(reps, Tensor):
            kind = reps.device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            drew = not torch.equal(state, generator_states(self))
            call = Call(given, reps.detach().clone(), reps.requires_grad, autocast, state, drew)
            self.call_log.calls.append(call)
            if reps.requires_grad:
                reps.register_hook(call.note_gradient)
        return reps


class LoggedLoss(StandIn):
    """Stands in for a loss, a module or any other callable."""

    def forward(self, *reps: Tensor, **kwargs: Any) -> Tensor:
        """The loss; the rows of its representations are noted."""
        if not self.call_log.loss_rows:
            self.call_log.before_loss = len(self.call_log.calls)
        self.call_log.loss_rows.append(tuple(len(rep) for rep in reps if isinstance(rep, Tensor)))
        return self.original(*reps, **kwargs)


def generator_states(*modules: nn.Module) -> Tensor:
    """The random generators of the CPU and of the CUDA devices that the modules' parameters are on, as one tensor."""
    devices = {parameter.device for module in modules for parameter in module.parameters()}
    cuda = sorted((device for device in devices if device.type == "cuda"), key=str)
    return torch.cat([torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda)])


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, NaN to NaN; sparse ones by what they stand for."""
    one, other = one.to_dense(), other.to_dense()
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def logged(encoders: Sequence[nn.Module], loss_fn: Callable, log: CallLog) -> tuple[list[nn.Module], nn.Module]:
    """Stand-ins for the encoders (tied ones stay tied) and the loss."""
    stand_ins: dict[int, nn.Module] = {}
    for encoder in encoders:
        stand_ins.setdefault(id(encoder), LoggedEncoder(encoder, log))
    return [stand_ins[id(encoder)] for encoder in encoders], LoggedLoss(loss_fn, log)
