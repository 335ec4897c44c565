"""The contrastive loss around a ring of processes: passages travel, logits are never gathered.

Cheng et al. 2024 (arXiv 2410.17243), section 3.2, algorithms 1 and 3. Each of W ranks keeps its b queries. Blocks of
passages move from rank to rank; at each of W hops a rank takes one block's logits, tile by tile, into its rows'
log-sum-exps (`gclib.losses.tiles`). If symmetric, the block's columns' log-sum-exps travel with it; what a rule knows
of the block's texts does, and the block's queries where queries are contrasted with queries. In the backward
pass the blocks travel once more, and with them the gradient of their texts, which comes home after W hops.

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
from gclib.losses.directions import POSITIVES, PP, PQ, QP, QQ, TEXTS, Directions, Side
from gclib.losses.masks import Rule, as_rule, refuse_matrix
from gclib.losses.tiled import like, refuse_second_derivative, tile_side, tiled_contrastive_loss
from gclib.losses.tiles import Gradients, Layout, Logits, LogSumExp, Softmax, add_gradients, merge_logits
from gclib.support.validation import check_representations, check_temperature, refuse


def ring_contrastive_loss(
    query_reps: Tensor,
    passage_reps: Tensor,
    *,
    temperature: float | Tensor,
    symmetric: bool = False,
    mask: Rule | None = None,
    directions: Sequence[str] | None = None,
    partition: str = "joint",
    tile_size: int | str,
    group: Any = None,
) -> Tensor:
    """The whole batch's contrastive loss from each rank's own rows, its logits neither whole nor gathered.

    query_reps (b, D), passage_reps (b * (1 + K), D), the positive of query i in row i * (1 + K); ranks may have unlike
    b, with the same K, D and dtype. Every rank returns the loss of all B queries; the gradient is W times this rank's
    share, so that after `average_gradients` it is one process's gradient of the whole batch. Equal to
    `ContrastiveLoss(across="gather")`, up to rounding. mask: a rule for the rank's own rows, of the same kind on every
    rank; directions, partition as in `contrastive_loss`. Alone: `tiled_contrastive_loss`.

    Sends each block of passages W - 1 times forward and again backward, its gradient W times, and vectors of b numbers.
    While a block's tiles are computed the next block is on its way. Holds, beside tiles, at most six blocks of
    b * (1 + K) * D numbers: two of passages (in use, arriving), the queries' gradient, and three of the passages'
    (being filled, arriving, leaving); more where queries or what a rule knows of texts travel too. O(B / W * D) bytes
    a rank, not the O(b / n^2) that the paper's text claims: its own table falls as 1 / W.

    Raises ValueError as `tiled_contrastive_loss` does (on all ranks where their shapes differ) and for CUDA tensors in
    a group of gloo, which sends none; RuntimeError for a second derivative and where a rank does not answer.
    Source: Cheng et al. 2024, section 3.2, algorithms 1 and 3.
    """
    refuse_matrix(mask)
    asked = {"symmetric": symmetric, "directions": directions, "partition": partition}
    if world_size(group) == 1:
        asked |= {"mask": mask, "temperature": temperature, "tile_size": tile_size}
        return tiled_contrastive_loss(query_reps, passage_reps, **asked)
    check_representations(query_reps, passage_reps)
    check_temperature(temperature)
    refuse_gloo_on_cuda(passage_reps, group)
    rule = as_rule(mask, query_reps.shape[0], passage_reps.shape[0], query_reps.device)
    wanted, side = Directions.of(symmetric, directions, partition), tile_side(tile_size, query_reps)
    rows = rows_of_ranks(query_reps, passage_reps, group=group)
    ring = Ring(rank_of(group), rows, passage_reps.shape[0] // query_reps.shape[0], side, wanted, rule, group)
    share = _RingLoss.apply(query_reps, passage_reps, temperature, ring)
    return share + (mean_over_ranks(share, group=group) - share.detach())


def refuse_gloo_on_cuda(reps: Tensor, group: Any) -> None:
    """ValueError for CUDA tensors in a group of gloo."""
    if is_gloo_on_cuda(reps, group):
        rule = "must be on the processor where the group is gloo's, which sends no CUDA tensors: take nccl, or gather"
        raise refuse("representations", rule, str(reps.device))


@dataclass(frozen=True)
class Ring:
    """This rank's place among W, every rank's number of queries, how a block is tiled, and what is contrasted."""

    rank: int
    rows: list[int]
    group_size: int
    side: int
    directions: Directions
    rule: Rule | None
    group: Any

    @property
    def size(self) -> int:
        """W."""
        return len(self.rows)

    def owner(self, hop: int) -> int:
        """Whose block is here at a hop: each hop it moves to the next rank."""
        return (self.rank - hop) % self.size

    @property
    def names(self) -> list[str]:
        """The directions whose tiles are walked; passage to query are the columns of query to passage."""
        return [name for name in self.directions.names if name != PQ]

    def texts(self, queries: Tensor, passages: Tensor) -> list[Tensor]:
        """What travels of representations: the passages, and the queries where others' are contrasted with them."""
        return [passages, *([queries.contiguous()] if QQ in self.directions.names else [])]

    def known(self) -> list[Tensor]:
        """What travels of what the rule knows, of passages and of queries."""
        if self.rule is None:
            return []
        parts = [*self.rule.passages, *(self.rule.queries if QQ in self.directions.names else ())]
        return [part.contiguous() for part in parts]

    def side_of(self, texts: Sequence[Tensor]) -> Side:
        """What came of a block, representations or their gradients, by its kind."""
        return Side.of(texts[1] if len(texts) > 1 else None, texts[0], self.group_size)

    def logits(self, hop: int, direction: str, own: Side, texts: Sequence[Tensor], temperature: Any) -> Logits:
        """One direction's logits of this rank's rows against the block that is here; the own one holds the positives.

        texts: the block's representations, and behind them what the rule knows of it.
        """
        first = 0 if self.owner(hop) == self.rank else None
        count, known = len(self.texts(own.queries, own.passages)), (None, None)
        if self.rule is not None:
            parts = tuple(texts[count:])
            split = len(self.rule.passages)
            known = (
                Side.of(self.rule.queries, self.rule.passages, self.group_size),
                Side.of(parts[split:], parts[:split], self.group_size),
            )
        layout = Layout(self.directions, self.side, self.group_size, first, self.rule, *known)
        return layout.logits(direction, own, self.side_of(texts[:count]), temperature)

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
        """The neighbour's tensor, once it has arrived and this rank's own has been sent."""
        with waiting_for_ranks("the ring"):
            for request in self.pending:
                request.wait()
        return self.tensor


class _RingLoss(torch.autograd.Function):
    """W / B times the sum of this rank's losses: of its queries, or the mean of each direction's."""

    @staticmethod
    def forward(ctx, query_reps, passage_reps, temperature, ring):
        ctx.ring, copies = ring, ring.directions.copies
        with torch.autocast(query_reps.device.type, enabled=False):
            positives, sums = _once_around(ring, query_reps, passage_reps.contiguous(), temperature)
            losses = torch.stack([others.losses(positives, copies).sum() for others in sums])
        is_tensor = isinstance(temperature, Tensor)
        ctx.number = None if is_tensor else temperature
        parts = [part for others in sums for part in (others.maximum, others.total)]
        ctx.save_for_backward(query_reps, passage_reps, temperature if is_tensor else None, positives, *parts)
        return losses.mean() * (ring.size / sum(ring.rows))

    @staticmethod
    def backward(ctx, gradient_of_loss):
        refuse_second_derivative("ring_contrastive_loss")
        query_reps, passage_reps, temperature, positives, *parts = ctx.saved_tensors
        sums, ring = [LogSumExp(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)], ctx.ring
        temperature = ctx.number if temperature is None else temperature
        with torch.autocast(query_reps.device.type, enabled=False):
            weight = (gradient_of_loss * ring.size / (len(sums) * sum(ring.rows) * temperature)).reshape(())
            softmax = Softmax.of(positives, sums, weight, ring.directions.copies)
            block, wanted = passage_reps.contiguous(), ctx.needs_input_grad[2]
            gradients = _once_more_around(ring, query_reps, block, temperature, softmax, wanted)
        inputs = query_reps, passage_reps, temperature
        return *(like(*pair) for pair in zip(inputs, gradients, strict=True)), None


def _once_around(ring: Ring, queries: Tensor, passages: Tensor, temperature: Any) -> tuple[Tensor, list[LogSumExp]]:
    """Algorithm 1: the positives' logits, and the log-sum-exps of this rank's rows and (back home) its columns."""
    own = Side.of(queries, passages, ring.group_size)
    here = [*ring.texts(queries, passages), *ring.known()]
    positives = ring.logits(0, QP, own, here, temperature).new_empty(queries.shape[0])
    rows = LogSumExp.empty(positives)
    columns = torch.stack([rows.maximum, rows.total], dim=1) if ring.directions.both else None
    for hop in range(ring.size):
        coming = [ring.travel(hop, part) for part in here] if hop + 1 < ring.size else []
        of_columns = [] if columns is None else [LogSumExp(*columns.unbind(1))]
        for name in ring.names:
            sums = [rows, *of_columns] if name == QP else [rows]
            merge_logits(ring.logits(hop, name, own, here, temperature), positives, sums)
        if columns is not None:
            columns = ring.travel(hop, columns).wait()
        here = [arrival.wait() for arrival in coming] or here
    if columns is None:
        return positives, [rows]
    of_columns = LogSumExp(*(part.clone() for part in columns.unbind(1)))
    if not ring.directions.joint:
        return positives, [rows, of_columns]
    rows.join(of_columns)
    return positives, [rows]


def _once_more_around(
    ring: Ring, queries: Tensor, passages: Tensor, temperature: Any, softmax: Softmax, with_temperature: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Algorithm 3: a rank adds its part to its own texts' gradient and to that of the block that is here.

    A block's gradient so far arrives while the tiles of the block are computed; the two meet afterwards.
    """
    own = Side.of(queries, passages, ring.group_size)
    texts = ring.texts(queries, passages)
    here, count = [*texts, *ring.known()], len(texts)
    new_zeros = ring.logits(0, QP, own, here, temperature).new_zeros
    of_positives = new_zeros(*own.positives.shape) if set(ring.names) & {PP, POSITIVES} else None
    of_own = Side(new_zeros(*queries.shape), of_positives, None)
    of_temperature = new_zeros() if with_temperature else None
    # (b, 2): maximum and scale of this rank's columns, as they travel
    columns = torch.stack([softmax.maxima[-1], softmax.scales[-1]], dim=1) if ring.directions.both else None
    arriving = []
    for hop in range(ring.size):
        last = hop + 1 == ring.size
        leaving = [*here, *([] if columns is None else [columns])]
        coming = [] if last else [ring.travel(hop, part) for part in leaving]
        room = [new_zeros(*part.shape) for part in here[:count]]
        for name in ring.names:
            rows, of_columns = TEXTS[name]
            add_gradients(
                ring.logits(hop, name, own, here, temperature),
                _with_columns(softmax, columns if name == QP else None),
                Gradients(getattr(of_own, rows), getattr(ring.side_of(room), of_columns), of_temperature),
            )
        for part in range(len(arriving)):
            room[part] += arriving.pop(0).wait()  # let go of both its blocks before the next two are there
        arriving = [ring.travel(hop, part) for part in room]
        del room
        back = [arrival.wait() for arrival in coming]
        here, columns = (back[: len(here)] or here), (back[len(here)] if len(back) > len(here) else columns)
    of_texts = [arrival.wait() for arrival in arriving]
    if len(of_texts) > 1:
        of_own.queries.add_(of_texts[1])
    if of_positives is not None:
        of_texts[0][:: ring.group_size] += of_positives
    return of_own.queries, of_texts[0], of_temperature


def _with_columns(softmax: Softmax, columns: Tensor | None) -> Softmax:
    """This rank's rows, and the columns of the block that is here, None for rows alone."""
    if columns is None:
        return softmax.facing(0)
    maximum, scale = columns.unbind(1)
    return Softmax([softmax.maxima[0], maximum], [softmax.scales[0], scale], softmax.of_positives)
