"""Other ways to many negatives: representations of earlier batches, kept without their graph.

A kept representation costs D numbers instead of an encoder's activations, and is stale: it is what the encoder said
some steps ago, and no gradient reaches the encoder through it. So the gradient is another one than that of a batch as
large as batch and bank together. Each loss is any step's `loss_fn`. With a bank of size 0 it is the plain loss. What is
encoded enters the bank when the loss is taken, after it; the oldest batches leave first. A chunk of `accumulation_step`
is a batch of its own, so the banks fill there chunk by chunk, as in ContAccum. A bank is a buffer that the ledger
counts, and no part of a checkpoint.

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, D dimensions, M entries of a bank.
"""

import copy
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.losses.dense import contrastive_loss
from gclib.support.validation import check_representations, describe, int_at_least, positive_number, refuse


class QueueLoss(nn.Module):
    """InfoNCE against the batch's passages and a queue of the last M passages that were encoded.

        L = -1/B  sum_i  log( exp(z_i,pos(i)) / (sum_{j < N} exp(z_ij) + sum_{m < M} exp(q_i . k_m / temperature)) ),

    k_m constants. With passages by the encoder that is trained this is cross-batch memory (Wang et al. 2020, arXiv
    1912.06798); with those of a `MomentumEncoder` the queue of MoCo (He et al. 2020, arXiv 1911.05722). There the queue
    alone holds the negatives; here the batch's own stay in.

    size: M, in passages. Raises ValueError for a size below 0 or a temperature that is not above 0.
    """

    def __init__(self, size: int, temperature: float = 0.05):
        super().__init__()
        self.size = int_at_least("size", size, 0)
        self.temperature = positive_number("temperature", temperature)
        self.register_buffer("passages", None, persistent=False)

    def forward(self, query_reps: Tensor, passage_reps: Tensor) -> Tensor:
        """(B, D) and (N, D) -> scalar; the passages stand in the queue afterwards."""
        check_representations(query_reps, passage_reps)
        _check_like(passage_reps, self.passages)
        group = passage_reps.shape[0] // query_reps.shape[0]
        against = passage_reps if self.passages is None else torch.cat([passage_reps, self.passages])
        labels = torch.arange(query_reps.shape[0], device=query_reps.device) * group
        loss = F.cross_entropy(query_reps @ against.T / self.temperature, labels)
        self.passages = newest(self.passages, passage_reps, self.size)
        return loss


class TwoSidedBankLoss(nn.Module):
    """The loss of a batch and of the M pairs before it, whose queries and passages are constants: ContAccum.

    loss_fn(cat(queries, bank's queries), cat(passages, bank's passages)), the mean over B + M queries: kept queries
    push the batch's passages as kept passages push its queries, so that neither tower's gradient outgrows the other's.
    loss_fn: any loss of pairs, a `ContrastiveLoss` say, in tiles if you like; None for the dense one at a temperature
    of 0.05.

    size: M, in pairs, each with its K hard negatives. Raises ValueError for a size below 0 or no callable.
    Source: Kim et al. 2024 (arXiv 2406.12356).
    """

    def __init__(self, size: int, loss_fn: Callable[..., Tensor] | None = None):
        super().__init__()
        if loss_fn is not None and not callable(loss_fn):
            raise refuse("loss_fn", "must be callable", type(loss_fn).__name__)
        self.size, self.loss_fn = int_at_least("size", size, 0), loss_fn or _plain
        self.register_buffer("queries", None, persistent=False)
        self.register_buffer("passages", None, persistent=False)

    @property
    def needs_whole_batch(self) -> bool:
        """As the loss that is taken says of itself."""
        return getattr(self.loss_fn, "needs_whole_batch", False)

    def forward(self, query_reps: Tensor, passage_reps: Tensor) -> Tensor:
        """(B, D) and (N, D) -> scalar; the pairs stand in the bank afterwards."""
        check_representations(query_reps, passage_reps)
        _check_like(passage_reps, self.passages)
        group = passage_reps.shape[0] // query_reps.shape[0]
        if self.queries is None:
            loss = self.loss_fn(query_reps, passage_reps)
        else:
            if len(self.passages) != group * len(self.queries):
                kept = len(self.passages) // len(self.queries)
                raise refuse("passage_reps", f"must have {kept} for each query, as the bank's pairs have", group)
            loss = self.loss_fn(torch.cat([query_reps, self.queries]), torch.cat([passage_reps, self.passages]))
        self.queries = newest(self.queries, query_reps, self.size)
        self.passages = newest(self.passages, passage_reps, self.size * group)
        return loss


class MomentumEncoder(nn.Module):
    """A copy of an encoder that is not trained but follows it: w' = momentum * w' + (1 - momentum) * w.

    MoCo's key encoder: a tower of a step beside the trained one, whose representations change slowly enough to be kept.
    Call `follow()` after the optimizer's step. Raises ValueError for a momentum that is not in [0, 1).
    """

    def __init__(self, encoder: nn.Module, momentum: float = 0.999):
        super().__init__()
        if isinstance(momentum, bool) or not isinstance(momentum, Real) or not 0 <= momentum < 1:
            raise refuse("momentum", "must be at least 0 and below 1", momentum)
        self.momentum, self._followed = momentum, [encoder]  # in a list: no submodule, so no second set of parameters
        self.copy = copy.deepcopy(encoder).requires_grad_(False)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """What the copy says."""
        return self.copy(*inputs, **named)

    @torch.no_grad()
    def follow(self) -> None:
        """One step after the encoder; buffers are taken over as they are."""
        (encoder,) = self._followed
        for own, followed in zip(self.copy.parameters(), encoder.parameters(), strict=True):
            own.mul_(self.momentum).add_(followed, alpha=1 - self.momentum)
        for own, followed in zip(self.copy.buffers(), encoder.buffers(), strict=True):
            own.copy_(followed)


def newest(kept: Tensor | None, reps: Tensor, size: int) -> Tensor | None:
    """The last `size` rows, the newest batch first, as a new tensor: the graph of a loss may still need the old one."""
    if not size:
        return None
    rows = reps.detach()
    return (rows if kept is None else torch.cat([rows, kept]))[:size].clone()


def _check_like(reps: Tensor, kept: Tensor | None) -> None:
    """ValueError for representations that can't stand beside those of the bank: a bank is of one encoder's."""
    if kept is not None and (reps.shape[1], reps.dtype, reps.device) != (kept.shape[1], kept.dtype, kept.device):
        rule = f"must have the bank's {kept.shape[1]} dimensions of {kept.dtype} on {kept.device}"
        raise refuse("passage_reps", rule, f"{describe(reps)} on {reps.device}")


def _plain(queries: Tensor, passages: Tensor) -> Tensor:
    """The dense loss at the temperature that a `ContrastiveLoss` has by itself."""
    return contrastive_loss(queries, passages, temperature=0.05)
