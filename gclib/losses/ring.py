"""The contrastive loss around a ring of processes: passages travel, logits are never gathered.

Cheng et al. 2024 (arXiv 2410.17243), equation (9) and algorithms 1-2. Each of W ranks keeps its b queries. Blocks of
passages move from rank to rank; at each of W hops a rank takes one block's logits, tile by tile, into its rows'
log-sum-exps (`gclib.losses.tiles`). If symmetric, the block's columns' log-sum-exps travel with it. In the backward
pass the blocks travel once more, and with them the gradient of their passages, which comes home after W hops.

Letters: W ranks, B queries of the whole batch, b of this rank, N = B * (1 + K) passages, D dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gclib.distributed import (
    is_gloo_on_cuda,
    is_rehearsal,
    mean_over_ranks,
    rank_of,
    rows_of_ranks,
    waiting_for_ranks,
    world_size,
)
from gclib.losses.tiled import like_inputs, refuse_second_derivative, tile_side, tiled_contrastive_loss
from gclib.losses.tiles import Gradients, Logits, LogSumExp, Softmax, add_gradients, merge_logits
from gclib.support.validation import check_representations, check_temperature, refuse


def ring_contrastive_loss(
    query_reps: Tensor,
    passage_reps: Tensor,
    *,
    temperature: float | Tensor,
    symmetric: bool = False,
    tile_size: int | str,
    group: Any = None,
) -> Tensor:
    """The whole batch's contrastive loss from each rank's own rows, its logits neither whole nor gathered.

    query_reps (b, D), passage_reps (b * (1 + K), D), the positive of query i in row i * (1 + K); ranks may have unlike
    b, with the same K, D and dtype. Every rank returns the loss of all B queries; the gradient is W times this rank's
    share, so that after `average_gradients` it is one process's gradient of the whole batch. Equal to
    `ContrastiveLoss(across="gather")`, up to rounding. Alone: `tiled_contrastive_loss`.

    Sends each block of passages W - 1 times forward and again backward, its gradient W times, and vectors of b
    numbers. While a block's tiles are computed the next block is on its way. Holds, beside tiles, at most six blocks of
    b * (1 + K) * D numbers: two of passages (in use, arriving), the queries' gradient, and three of the passages'
    (being filled, arriving, leaving). O(B / W * D) bytes a rank, not the O(b / n^2) that the paper's text claims: its
    own table falls as 1 / W.

    Raises ValueError as `tiled_contrastive_loss` does (on all ranks where their shapes differ) and for CUDA tensors in
    a group of gloo, which sends none; RuntimeError for a second derivative and where a rank does not answer.
    Source: Cheng et al. 2024, equation (9), algorithms 1 and 2.
    """
    if world_size(group) == 1:
        return tiled_contrastive_loss(
            query_reps, passage_reps, temperature=temperature, symmetric=symmetric, tile_size=tile_size
        )
    check_representations(query_reps, passage_reps)
    check_temperature(temperature)
    if is_gloo_on_cuda(passage_reps, group):
        rule = "must be on the processor where the group is gloo's, which sends no CUDA tensors: take nccl, or gather"
        raise refuse("representations", rule, str(passage_reps.device))
    side = tile_side(tile_size, query_reps)
    rows = rows_of_ranks(query_reps, passage_reps, group=group)
    ring = Ring(rank_of(group), rows, passage_reps.shape[0] // query_reps.shape[0], side, group)
    share = _RingLoss.apply(query_reps, passage_reps, temperature, symmetric, ring)
    return share + (mean_over_ranks(share, group=group) - share.detach())


@dataclass(frozen=True)
class Ring:
    """This rank's place among W, every rank's number of queries, and how a block is tiled."""

    rank: int
    rows: list[int]
    group_size: int
    side: int
    group: Any

    @property
    def size(self) -> int:
        """W."""
        return len(self.rows)

    def owner(self, hop: int) -> int:
        """Whose block is here at a hop: each hop it moves to the next rank."""
        return (self.rank - hop) % self.size

    def logits(self, hop: int, queries: Tensor, passages: Tensor, temperature: Any) -> Logits:
        """The logits of this rank's queries against the block that is here; the own block holds the positives."""
        first = 0 if self.owner(hop) == self.rank else None
        return Logits(queries, passages, temperature, self.side, group=self.group_size, first=first)

    def travel(self, hop: int, tensor: Tensor) -> "Arrival":
        """Send what is here at `hop` to the next rank, and start to receive what will be here at the next hop.

        The tensor's rows are its block's, times 1 or 1 + K. It must not change before the arrival was waited for.
        """
        per_row = tensor.shape[0] // self.rows[self.owner(hop)]
        arriving = tensor.new_empty(self.rows[self.owner(hop + 1)] * per_row, *tensor.shape[1:])
        if is_rehearsal():
            return Arrival(arriving, (), tensor)
        after, before = ((self.rank + step) % self.size for step in (1, -1))
        if self.group is not None:
            after, before = (dist.get_global_rank(self.group, rank) for rank in (after, before))
        moves = [
            dist.P2POp(dist.isend, tensor, after, self.group),
            dist.P2POp(dist.irecv, arriving, before, self.group),
        ]
        with waiting_for_ranks("the ring"):
            return Arrival(arriving, dist.batch_isend_irecv(moves), tensor)


@dataclass
class Arrival:
    """A tensor on its way here, and the one that leaves meanwhile."""

    tensor: Tensor
    pending: Sequence[Any]
    leaving: Tensor

    def wait(self) -> Tensor:
        """The tensor, once it is here and the other has left."""
        with waiting_for_ranks("the ring"):
            for request in self.pending:
                request.wait()
        return self.tensor


class _RingLoss(torch.autograd.Function):
    """W / B times the sum of this rank's losses: of its queries and, if symmetric, of its positives' columns."""

    @staticmethod
    def forward(ctx, query_reps, passage_reps, temperature, symmetric, ring):
        ctx.ring, ctx.symmetric = ring, symmetric
        with torch.autocast(query_reps.device.type, enabled=False):
            positives, directions = _once_around(ring, query_reps, passage_reps.contiguous(), temperature, symmetric)
            losses = torch.stack([others.losses(positives).sum() for others in directions])
        is_tensor = isinstance(temperature, Tensor)
        ctx.number = None if is_tensor else temperature
        sums = [part for others in directions for part in (others.maximum, others.total)]
        ctx.save_for_backward(query_reps, passage_reps, temperature if is_tensor else None, positives, *sums)
        return losses.mean() * (ring.size / sum(ring.rows))

    @staticmethod
    def backward(ctx, gradient_of_loss):
        refuse_second_derivative("ring_contrastive_loss")
        query_reps, passage_reps, temperature, positives, *sums = ctx.saved_tensors
        directions = [LogSumExp(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]
        temperature = ctx.number if temperature is None else temperature
        with torch.autocast(query_reps.device.type, enabled=False):
            weight = gradient_of_loss * ctx.ring.size / (len(directions) * sum(ctx.ring.rows) * temperature)
            softmax = Softmax.of(positives, directions, weight)
            block, wanted = passage_reps.contiguous(), ctx.needs_input_grad[2]
            gradients = _once_more_around(ctx.ring, query_reps, block, temperature, softmax, wanted)
            logits = ctx.ring.logits(0, query_reps, passage_reps, temperature)
        return *like_inputs(gradients, logits), None, None


def _once_around(
    ring: Ring, queries: Tensor, passages: Tensor, temperature: Any, symmetric: bool
) -> tuple[Tensor, list[LogSumExp]]:
    """Algorithm 1: the positives' logits, and the log-sum-exps of this rank's rows and (back home) its columns."""
    positives = ring.logits(0, queries, passages, temperature).new_empty(queries.shape[0])
    rows = LogSumExp.empty(positives)
    columns = torch.stack([rows.maximum, rows.total], dim=1) if symmetric else None
    block = passages
    for hop in range(ring.size):
        coming = ring.travel(hop, block) if hop + 1 < ring.size else None
        directions = [rows] if columns is None else [rows, LogSumExp(*columns.unbind(1))]
        merge_logits(ring.logits(hop, queries, block, temperature), positives, directions)
        if columns is not None:
            columns = ring.travel(hop, columns).wait()
        if coming is not None:
            block = coming.wait()
    return positives, [rows] if columns is None else [rows, LogSumExp(*(part.clone() for part in columns.unbind(1)))]


def _once_more_around(
    ring: Ring, queries: Tensor, passages: Tensor, temperature: Any, softmax: Softmax, with_temperature: bool
) -> Gradients:
    """Algorithm 2: a rank adds its part to its own queries' gradient and to that of the block that is here.

    A block's gradient so far arrives while the tiles of the block are computed; the two meet afterwards.
    """
    own = ring.logits(0, queries, passages, temperature)
    of_queries = own.new_empty(*queries.shape).zero_()
    of_temperature = own.new_empty().zero_() if with_temperature else None
    block, columns = passages, _columns_of(softmax)
    arriving: Arrival | None = None
    for hop in range(ring.size):
        last = hop + 1 == ring.size
        coming = [] if last else [ring.travel(hop, part) for part in (block, columns) if part is not None]
        gradients = Gradients(of_queries, own.new_empty(*block.shape).zero_(), of_temperature)
        add_gradients(ring.logits(hop, queries, block, temperature), _with_columns(softmax, columns), gradients)
        if arriving is not None:
            gradients.passages += arriving.wait()
            arriving = None  # let go of both its blocks before the next two are there
        arriving = ring.travel(hop, gradients.passages)
        here = [arrival.wait() for arrival in coming]
        block, columns = (here + [None])[:2] if here else (block, columns)
    return Gradients(of_queries, arriving.wait(), of_temperature)


def _columns_of(softmax: Softmax) -> Tensor | None:
    """(b, 2): maximum and scale of this rank's columns, as they travel; None for one direction."""
    return torch.stack([softmax.maxima[1], softmax.scales[1]], dim=1) if softmax.symmetric else None


def _with_columns(softmax: Softmax, columns: Tensor | None) -> Softmax:
    """This rank's rows, and the columns of the block that is here."""
    if columns is None:
        return softmax
    maximum, scale = columns.unbind(1)
    return Softmax([softmax.maxima[0], maximum], [softmax.scales[0], scale], softmax.of_positives)
