"""What FSDP2 leaves on a rank: its shards at rest, exact, and a bound for what is whole while a step runs.

A unit is a module that `fully_shard` was called on; here, as in its recipes, each entry of an encoder's longest
ModuleList (its layers), and the encoder around them, the root.

Letters: W ranks, P bytes of weights, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from gclib.memory.depth import layers_of
from gclib.memory.fake_steps import FakeStep, fake_step
from gclib.memory.forecast import MemoryForecast, forecast_workload
from gclib.memory.ledger import KINDS
from gclib.memory.workload import OPTIMIZERS, Workload
from gclib.support.validation import int_at_least, one_of, positive_int, refuse


@dataclass(frozen=True)
class ShardBytes:
    """Bytes of one rank. weights, gradients (between a step and its optimizer) and optimizer: shards, exact.

    whole: of the encoders' whole parameters, gradients and states, what a forecast holds in their place. most_whole: a
    bound for the whole weights and gradients beside them while a step runs, FSDP's own way: the root's weights and
    gradients, and of the largest layer the weights, the next one's on their way, the gradients, and the buffer in which
    they are reduced: 2 * root + 4 * layer. kept_whole: the same inside `weights_kept`: all weights, all gradients, and
    twice the largest unit.
    """

    weights: int
    gradients: int
    optimizer: int
    whole: tuple[int, int, int]
    most_whole: int
    kept_whole: int

    @property
    def at_rest(self) -> int:
        """Shards of weights, gradients and optimizer states."""
        return self.weights + self.gradients + self.optimizer

    def at_most(self, forecast: MemoryForecast, *, kept: bool = False) -> MemoryForecast:
        """A bound for a rank, from the forecast of the same step of this rank's rows with whole weights.

        The encoders' weights, gradients and optimizer states give way to the shards, and to what is whole ("other");
        what else is of these kinds (buffers, a learned temperature) stays; the average of the gradients, which is
        FSDP's own, is left out. An upper bound: activations and whole gradients need not peak at once.
        """
        places = [KINDS.index(kind) for kind in ("parameters", "gradients", "optimizer")]
        segments = [segment for segment in forecast.timeline if segment.phase != "average"]
        most = np.max([segment.kind_bytes.max(axis=0) for segment in segments], axis=0)
        rest = [max(0, most[place] - size) for place, size in zip(places, self.whole, strict=True)]
        timeline = []
        for segment in segments:
            held, net = segment.kind_bytes.copy(), segment.net_bytes.copy()
            held[:, places] = np.add((self.weights, self.gradients, self.optimizer), rest)
            net[places] = 0
            held[:, KINDS.index("other")] += self.kept_whole if kept else self.most_whole
            timeline.append(replace(segment, kind_bytes=held, net_bytes=net))
        return replace(forecast, timeline=timeline)


def forecast_sharded(step: str, *, ranks: int, kept: bool = False, **same: Any) -> MemoryForecast:
    """A bound for a step of one of `ranks` processes whose weights FSDP2 shards: `ShardBytes.at_most` of its forecast.

    kept: inside `weights_kept`. `same`: the other arguments of `forecast_step`, without parallel. Raises as that does.
    """
    return sharded_workload(Workload(step=step, ranks=ranks, **same), kept=kept)


def sharded_workload(workload: Workload, fake: FakeStep | None = None, *, kept: bool = False) -> MemoryForecast:
    """The same of a workload. fake: as in `forecast_workload`."""
    fake = fake or fake_step(workload)
    shards = rank_bytes(fake.encoders, ranks=workload.ranks, optimizer=workload.optimizer)
    return shards.at_most(forecast_workload(workload, fake), kept=kept)


def rank_bytes(encoders: Sequence[nn.Module], *, ranks: int, rank: int = 0, optimizer: str | None = None) -> ShardBytes:
    """The bytes that a rank holds of these encoders, sharded by `fully_shard` over `ranks` processes.

    A parameter is cut along its first dimension: of d rows each rank stores ceil(d / W), padded where d / W leaves a
    rest, and so it does the gradients; AdamW's two states are as long as the rank's own rows, without padding (the last
    ranks may have fewer, or none), and a count of 4 bytes. Encoders may be on any device, also meta. Source: read off
    torch.distributed.fsdp 2.13, and held against real ranks.

    Raises ValueError for what is not a module, a rank that is not among them, and an unknown optimizer.
    """
    one_of("optimizer", optimizer, OPTIMIZERS)
    if int_at_least("rank", rank, 0) >= positive_int("ranks", ranks):
        raise refuse("rank", f"must be 0 to {ranks - 1}", rank)
    for number, encoder in enumerate(encoders):
        if not isinstance(encoder, nn.Module):
            raise refuse(f"encoders[{number}]", "must be a torch module", type(encoder).__name__)
    every = list({id(p): p for encoder in encoders for p in encoder.parameters()}.values())
    trained = [p for p in every if p.requires_grad]
    states = sum(2 * _own_bytes(p, ranks, rank) + 4 for p in trained) if optimizer == "adamw" else 0
    units = [layer for encoder in dict.fromkeys(encoders) for layer in layers_of(encoder)]
    layers = [sum(p.nbytes for p in unit.parameters()) for unit in units]
    whole, asked = (sum(p.nbytes for p in some) for some in (every, trained))
    root, largest = whole - sum(layers), max(layers, default=0)
    return ShardBytes(
        weights=sum(_stored_bytes(p, ranks) for p in every),
        gradients=sum(_stored_bytes(p, ranks) for p in trained),
        optimizer=states,
        whole=(whole, asked, sum(2 * p.nbytes + 4 for p in trained) if states else 0),
        most_whole=2 * root + 4 * largest,
        kept_whole=whole + asked + 2 * max(root, largest),
    )


def _stored_bytes(parameter: nn.Parameter, ranks: int) -> int:
    """ceil(d / W) of its d rows."""
    rows = parameter.shape[0]
    return -(-rows // ranks) * (parameter.nbytes // rows)


def _own_bytes(parameter: nn.Parameter, ranks: int, rank: int) -> int:
    """Without padding."""
    rows = parameter.shape[0]
    each = -(-rows // ranks)
    return min(each, max(0, rows - rank * each)) * (parameter.nbytes // rows)
