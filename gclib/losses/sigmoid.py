"""SigLIP's loss: every pair of a query and a passage is a yes-or-no question of its own.

    L = -1/B  sum_ij  log sigmoid( y_ij (q_i . p_j / temperature + bias) ),     y_ij = 1 for i's positive, else -1.

No softmax, so no sum over a row is needed before a pair's loss and gradient are known: a tile is forgotten as soon as
it is added, and around a ring a block of passages is met, paid for, and sent on. Its gradient is closed: with
s = sigmoid(z + bias), dL/dz = s / B for negatives and -(1 - s) / B for positives.

Zhai et al. 2023 (arXiv 2303.15343), sections 3.2 and 3.3. Letters: W ranks, B queries, b of one rank, K hard
negatives per query, N = B * (1 + K) passages, D dimensions.
"""

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.distributed import gather_with_grad, mean_over_ranks, own_rows, rank_of, rows_of_ranks, world_size
from gclib.losses.directions import QP, Directions, Side
from gclib.losses.gathered import known_of_all
from gclib.losses.masks import Rule, as_rule, refuse_matrix
from gclib.losses.module import BatchLoss
from gclib.losses.ring import Ring, refuse_gloo_on_cuda
from gclib.losses.tiled import like, refuse_second_derivative, tile_side
from gclib.losses.tiles import Gradients, Layout, Logits, PairwiseSum, Tile, add_gradients
from gclib.support.validation import check_representations, check_temperature, describe, one_of, refuse


class SigmoidLoss(BatchLoss):
    """SigLIP's loss with its settings, for any step's `loss_fn`.

    temperature, bias: where they start (as in the paper, t = 10 and b = -10); learnable: then the module owns
    `log_temperature` and `bias`, whose gradients a step gives exactly once. tile_size, across: as in `ContrastiveLoss`;
    a ring is the paper's exchange with neighbours. mask: a rule (`gclib.losses.masks`), whose pairs are left out
    of the sum, or with across="none" a (B, N) bool tensor, which may leave out no positive: the loss is then infinite.
    Divided by B, as the paper and open_clip do, not by B * N.

    Raises ValueError for a setting that can't be, a ring without tile_size, and a rule that weighs logits.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        bias: float = -10.0,
        *,
        learnable: bool = True,
        tile_size: int | str | None = None,
        across: str = "none",
    ):
        super().__init__(temperature, learnable, tile_size, across)
        _check_bias(bias)
        self.bias = nn.Parameter(torch.tensor(float(bias))) if learnable else float(bias)

    def forward(self, query_reps: Tensor, passage_reps: Tensor, mask: Tensor | Rule | None = None) -> Tensor:
        """query_reps (b, D), passage_reps (b * (1 + K), D), mask a rule or (B, N) or None -> scalar."""
        settings = {"temperature": self.temperature, "bias": self.bias, "tile_size": self.tile_size}
        return sigmoid_loss(query_reps, passage_reps, mask=mask, across=self.across, **settings)


def sigmoid_loss(
    query_reps: Tensor,
    passage_reps: Tensor,
    *,
    temperature: float | Tensor,
    bias: float | Tensor,
    mask: Tensor | Rule | None = None,
    tile_size: int | str | None = None,
    across: str = "none",
) -> Tensor:
    """The loss of `SigmoidLoss`. Dense it allocates b * N logits some times over; in tiles two or three tiles,
    some blocks (tile_size, D) and the gradients.

    Across ranks every rank returns the whole batch's loss, with W times its share of the gradient: `gclib.distributed`.
    Raises ValueError as `contrastive_loss` and `ring_contrastive_loss` do; RuntimeError for tiles' second derivative.
    """
    check_representations(query_reps, passage_reps)
    check_temperature(temperature)
    _check_bias(bias)
    if one_of("across", across, ("none", "gather", "ring")) == "ring" and tile_size is None:
        raise refuse("tile_size", 'must be an int or "auto" for a ring, which has no dense form', None)
    rule = as_rule(mask, query_reps.shape[0], passage_reps.shape[0], query_reps.device)
    if rule is not None and rule.weighs:
        raise refuse(
            "mask", "must be a rule that leaves pairs out: no softmax is here to weigh them in", type(mask).__name__
        )
    if across != "none":
        refuse_matrix(mask)
    ranks = 1 if across == "none" else world_size()
    group = passage_reps.shape[0] // query_reps.shape[0]
    side = query_reps.shape[0] * group if tile_size is None else tile_side(tile_size, query_reps)
    rows = [query_reps.shape[0]] if ranks == 1 else rows_of_ranks(query_reps, passage_reps)
    if ranks > 1 and across == "ring":
        refuse_gloo_on_cuda(passage_reps, None)
        ring = Ring(rank_of(), rows, group, side, Directions(), rule, None)
        share = _SigmoidLoss.apply(query_reps, passage_reps, temperature, bias, ring)
    else:
        known, first = known_of_all(rule, rows, group), 0 if ranks == 1 else own_rows(rows).start
        passages = passage_reps
        if ranks > 1:
            passages = gather_with_grad(passage_reps, rows=[group * count for count in rows])
        layout = Layout(Directions(), max(side, 1), group, first, rule, *known)
        share = (_dense if tile_size is None else _SigmoidLoss.apply)(query_reps, passages, temperature, bias, layout)
    share = share * (ranks / sum(rows))
    return share if ranks == 1 else share + (mean_over_ranks(share) - share.detach())


def _check_bias(bias: Any) -> None:
    """A finite number, or a floating point tensor of one element (its value is not read)."""
    if isinstance(bias, Tensor):
        if bias.numel() != 1 or bias.ndim > 2 or not bias.is_floating_point():
            raise refuse("bias", "must be a floating point tensor of one element, of at most 2 axes", describe(bias))
    elif isinstance(bias, bool) or not isinstance(bias, Real) or not math.isfinite(bias):
        raise refuse("bias", "must be a finite number", bias)


def _dense(queries: Tensor, passages: Tensor, temperature: Any, bias: Any, layout: Layout) -> Tensor:
    """The sum over all pairs, with autograd's own gradient."""
    logits = _logits(layout, 0, queries, [passages], temperature).whole()[0] + bias
    signs = torch.full_like(logits, -1.0)
    signs[:, layout.first * layout.group :: layout.group].diagonal().fill_(1.0)
    return -F.logsigmoid(signs * logits).sum()


def _logits(plan: Layout | Ring, hop: int, queries: Tensor, here: list[Tensor], temperature: Any) -> Logits:
    """This rank's queries against the passages that are here: all of them, or around a ring one rank's."""
    own = Side(queries, None, None)
    if isinstance(plan, Ring):
        return plan.logits(hop, QP, own, here, temperature)
    return plan.logits(QP, own, Side.of(None, here[0], plan.group), temperature)


class _SigmoidLoss(torch.autograd.Function):
    """The sum over this rank's queries and all passages, in tiles; around a ring passages and their gradient travel."""

    @staticmethod
    def forward(ctx, query_reps, passage_reps, temperature, bias, plan):
        ctx.plan, ctx.numbers = plan, [None if isinstance(part, Tensor) else part for part in (temperature, bias)]
        size = plan.size if isinstance(plan, Ring) else 1
        here = [passage_reps.contiguous(), *(plan.known() if size > 1 else [])]
        total = PairwiseSum()
        with torch.autocast(query_reps.device.type, enabled=False):
            for hop in range(size):
                coming = [plan.travel(hop, part) for part in here] if hop + 1 < size else []
                _add_losses(_logits(plan, hop, query_reps, here, temperature), bias, total)
                here = [arrival.wait() for arrival in coming] or here
            loss = total.total()
        tensors = [part if isinstance(part, Tensor) else None for part in (temperature, bias)]
        ctx.save_for_backward(query_reps, passage_reps, *tensors)
        return loss

    @staticmethod
    def backward(ctx, gradient_of_loss):
        refuse_second_derivative("sigmoid_loss in tiles")
        queries, passages, *tensors = ctx.saved_tensors
        temperature, bias = (n if t is None else t for n, t in zip(ctx.numbers, tensors, strict=True))
        with torch.autocast(queries.device.type, enabled=False):
            sigmoid = Sigmoid(bias, gradient_of_loss / temperature)
            gradients = _gradients(ctx.plan, queries, passages.contiguous(), temperature, sigmoid)
            of_bias = sigmoid.of_bias.total() * temperature if isinstance(bias, Tensor) else None
        parts = gradients.queries, gradients.passages, gradients.temperature, of_bias
        inputs = queries, passages, temperature, bias
        return *(
            like(tensor, part) if wanted else None
            for tensor, part, wanted in zip(inputs, parts, ctx.needs_input_grad, strict=False)
        ), None


def _gradients(
    plan: Layout | Ring, queries: Tensor, passages: Tensor, temperature: Any, sigmoid: "Sigmoid"
) -> Gradients:
    """Every tile once more. Around a ring the gradient so far arrives while a block's tiles are computed."""
    size = plan.size if isinstance(plan, Ring) else 1
    here = [passages, *(plan.known() if size > 1 else [])]
    new_zeros = _logits(plan, 0, queries, here, temperature).new_zeros
    of_temperature = new_zeros() if isinstance(temperature, Tensor) else None
    gradients, arriving = Gradients(new_zeros(*queries.shape), None, of_temperature), None
    for hop in range(size):
        coming = [plan.travel(hop, part) for part in here] if hop + 1 < size else []
        gradients.passages = new_zeros(*here[0].shape)
        add_gradients(_logits(plan, hop, queries, here, temperature), sigmoid, gradients)
        if arriving is not None:
            gradients.passages += arriving.wait()
        arriving = plan.travel(hop, gradients.passages) if size > 1 else None
        here = [arrival.wait() for arrival in coming] or here
    if arriving is not None:
        gradients.passages = arriving.wait()
    return gradients


def _add_losses(logits: Logits, bias: float | Tensor, total: PairwiseSum) -> None:
    """-log sigmoid of every pair of one block, signed."""
    for rows in logits.row_blocks():
        queries = logits.queries(rows)
        for tile in logits.tiles(rows):
            values = logits.compute(tile, queries, logits.passages(tile)).add_(bias).neg_()
            if tile.holds_positives:
                values.diagonal().neg_()
            total.add(F.logsigmoid(values).sum().neg_())


@dataclass
class Sigmoid:
    """What turns a tile of logits into its gradient, as `tiles.Softmax` does: weight * (sigmoid(z + bias) - positive?).

    of_bias: the sum of these, for the bias's gradient.
    """

    bias: float | Tensor
    weight: Tensor
    of_bias: PairwiseSum = field(default_factory=PairwiseSum)
    symmetric = False

    def of_tile(self, block: Logits, tile: Tile, logits: Tensor, scratch: Tensor) -> Tensor:
        """dLoss/dlogits of one tile over the temperature, in place of the logits."""
        logits.add_(self.bias)
        missing = torch.sigmoid(-logits.diagonal()) if tile.holds_positives else None
        gradient = logits.sigmoid_()
        if missing is not None:
            gradient.diagonal().copy_(missing.neg_())
        gradient.mul_(self.weight)
        self.of_bias.add(gradient.sum())
        return gradient
