"""Ways to take one contrastive loss over several processes: three that are right, and the mistakes that are around.

A way is what a rank backpropagates, given its own queries and passages, and whether gradients are averaged over the
ranks afterwards. Chapter 09 runs them on real ranks (`gclib.course.ranks.demo`) and holds each against one process.

Letters: W ranks, b pairs of this rank, B of all, D dimensions. No hard negatives: as many passages as queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.distributed import gather_with_grad, own_rows, rank_of, world_size
from gclib.losses.gathered import gathered_contrastive_loss
from gclib.losses.ring import ring_contrastive_loss
from gclib.support.validation import one_of

TEMPERATURE, TILE = 0.4, 2
Reps = tuple[Tensor, Tensor, Tensor]  # this rank's queries (b, D), its passages (b, D), the temperature


def gathered(reps: Reps, rows: Sequence[int]) -> Tensor:
    """Passages gathered with their gradient, own queries: the library's loss."""
    queries, passages, temperature = reps
    return gathered_contrastive_loss(queries, passages, temperature=temperature)


def around_the_ring(reps: Reps, rows: Sequence[int]) -> Tensor:
    """Passages travel: the library's ring."""
    queries, passages, temperature = reps
    return ring_contrastive_loss(queries, passages, temperature=temperature, tile_size=TILE)


def own_batch_alone(reps: Reps, rows: Sequence[int]) -> Tensor:
    """Nothing gathered: negatives of this rank alone."""
    queries, passages, temperature = reps
    return _loss(queries, passages, temperature)


def share_without_ranks(reps: Reps, rows: Sequence[int]) -> Tensor:
    """This rank's share of the loss, b / B of its queries' mean: the factor W is forgotten."""
    return gathered(reps, rows) / world_size()


def ranks_twice(reps: Reps, rows: Sequence[int]) -> Tensor:
    """The factor W once more, where the loss has it already."""
    return gathered(reps, rows) * world_size()


def plain_mean(reps: Reps, rows: Sequence[int]) -> Tensor:
    """The mean over this rank's queries, whatever their number."""
    queries, passages, temperature = reps
    return _loss(queries, gather_with_grad(passages, rows=rows), temperature, first=own_rows(rows).start)


def gathered_without_gradient(reps: Reps, rows: Sequence[int]) -> Tensor:
    """Own queries against gathered passages, of which only this rank's own rows have a gradient."""
    queries, passages, temperature = reps
    share = _loss(queries, gather_own_alive(passages, rows), temperature, first=own_rows(rows).start)
    return share * (len(queries) * world_size() / sum(rows))


def whole_loss_with_gradient(reps: Reps, rows: Sequence[int]) -> Tensor:
    """Queries and passages gathered with their gradient, and the whole loss on every rank: B * B logits each."""
    queries, passages, temperature = reps
    return _loss(*(gather_with_grad(rep, rows=rows) for rep in (queries, passages)), temperature)


def whole_loss_without_gradient(reps: Reps, rows: Sequence[int]) -> Tensor:
    """The same, and only own rows have a gradient: how GradCache's distributed loss does it."""
    queries, passages, temperature = reps
    return _loss(*(gather_own_alive(rep, rows) for rep in (queries, passages)), temperature)


def whole_loss_times_ranks(reps: Reps, rows: Sequence[int]) -> Tensor:
    """And multiplied by W, which puts the encoder's gradient right and the temperature's wrong."""
    return whole_loss_without_gradient(reps, rows) * world_size()


@dataclass(frozen=True)
class Way:
    """What a rank backpropagates, and whether its gradients are averaged over the ranks afterwards."""

    loss: Callable[[Reps, Sequence[int]], Tensor]
    averaged: bool = True


WAYS = {
    "gather": Way(gathered),
    "ring": Way(around_the_ring),
    "whole loss on every rank": Way(whole_loss_with_gradient),
    "not averaged": Way(gathered, averaged=False),
    "share without W": Way(share_without_ranks),
    "W twice": Way(ranks_twice),
    "mean of means": Way(plain_mean),
    "nothing gathered": Way(own_batch_alone),
    "own queries, no gradient": Way(gathered_without_gradient),
    "whole loss, no gradient": Way(whole_loss_without_gradient),
    "the same, times W": Way(whole_loss_times_ranks),
}


class RankLoss(nn.Module):
    """One of `WAYS` as a loss for a step, with a learnable temperature (float64). rows: pairs of each rank."""

    def __init__(self, way: str, rows: Sequence[int]):
        super().__init__()
        self.way, self.rows = WAYS[one_of("way", way, tuple(WAYS))], list(rows)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE, dtype=torch.float64))

    def forward(self, queries: Tensor, passages: Tensor) -> Tensor:
        """This rank's queries (b, D) and passages (b, D) -> scalar."""
        return self.way.loss((queries, passages, self.temperature), self.rows)


def gather_own_alive(reps: Tensor, rows: Sequence[int]) -> Tensor:
    """Every rank's rows (B, D), of which only this rank's have a gradient: `torch.distributed.all_gather` is no
    operation of autograd."""
    padded = reps.new_zeros(max(rows), *reps.shape[1:])
    padded[: len(reps)] = reps.detach()
    received = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(received, padded)
    parts = [part[:count] for part, count in zip(received, rows, strict=True)]
    parts[rank_of()] = reps
    return torch.cat(parts)


def _loss(queries: Tensor, passages: Tensor, temperature: Tensor, *, first: int = 0) -> Tensor:
    """The mean over `queries`, the positive of row i in row first + i of `passages`."""
    labels = torch.arange(first, first + len(queries))
    return F.cross_entropy(queries @ passages.T / temperature, labels)
