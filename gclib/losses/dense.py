"""The contrastive loss (InfoNCE): dense, the whole B x N matrix of logits at once, and as a module with its settings.

Gao et al. 2021, equation (1), with the logits of query i against passage j

    z_ij = q_i . p_j / temperature,       positive of query i: passage i * (1 + K),

    L = -1/B  sum_i  log( exp(z_i,pos(i)) / sum_{j not masked} exp(z_ij) ).

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, D dimensions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.distributed import gather_with_grad, mean_over_ranks, own_rows, rows_of_ranks, world_size
from gclib.losses.ring import ring_contrastive_loss
from gclib.losses.tiled import check_tile_size, tiled_contrastive_loss, tiled_rows_loss
from gclib.support.arguments import check_mask, check_representations, check_temperature
from gclib.support.validation import positive_number, refuse


def contrastive_loss(
    query_reps: Tensor,
    passage_reps: Tensor,
    *,
    temperature: float | Tensor,
    symmetric: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """InfoNCE over in-batch and hard negatives, in nats, averaged over the B queries.

    query_reps (B, D); passage_reps (N, D) with N = B * (1 + K), the positive of query i in row
    i * (1 + K); mask (B, N) bool, True = left out of the denominator (a false negative). A positive may not be
    left out: the steps refuse such a mask before they start, and here the loss would be infinite.
    `symmetric` averages in the second direction: each of the B positives against all B queries,
    with the transposed mask. Allocates B * N logits and as many for their gradient.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for a temperature that is not above 0.
    Source: Gao et al. 2021, equation (1); the symmetric form as in Cheng et al. 2024, section 3.1.
    """
    check_representations(query_reps, passage_reps)
    check_temperature(temperature)
    check_mask(mask, query_reps.shape[0], passage_reps.shape[0], query_reps.device)
    logits = query_reps @ passage_reps.T / temperature
    if mask is not None:
        logits = logits.masked_fill(mask, -torch.inf)
    group = passage_reps.shape[0] // query_reps.shape[0]
    labels = torch.arange(query_reps.shape[0], device=logits.device)
    loss = F.cross_entropy(logits, labels * group)
    if symmetric:
        loss = (loss + F.cross_entropy(logits[:, ::group].T, labels)) / 2
    return loss


def gathered_contrastive_loss(
    query_reps: Tensor,
    passage_reps: Tensor,
    *,
    temperature: float | Tensor,
    symmetric: bool = False,
    tile_size: int | str | None = None,
) -> Tensor:
    """The loss of the whole batch, of which each of W ranks gives its own rows: (b, D) and (b * (1 + K), D).

    Each rank gathers the passages and takes the loss of its own queries; if symmetric it gathers the queries too, and
    takes the second direction of its own positives. So a rank has b * N logits, and no logit is computed twice
    over the ranks but once for each direction. Returns the mean over all B queries, the same on every rank, with
    W times this rank's share of the gradient: see `gclib.distributed`. Alone: `contrastive_loss`, or the tiled one.

    Raises ValueError for shapes or dtypes that do not fit, on all ranks where theirs differ.
    Source: Gao et al. 2021, section 3.4.
    """
    if world_size() == 1:
        return _local_loss(
            query_reps, passage_reps, temperature=temperature, symmetric=symmetric, mask=None, tile_size=tile_size
        )
    check_representations(query_reps, passage_reps)
    check_temperature(temperature)
    rows = rows_of_ranks(query_reps, passage_reps)
    group, first = passage_reps.shape[0] // query_reps.shape[0], own_rows(rows).start
    settings = {"temperature": temperature, "tile_size": tile_size, "first": first}
    passages = gather_with_grad(passage_reps, rows=[group * count for count in rows])
    share = _rows_loss(query_reps, passages, group=group, **settings)
    if symmetric:
        queries = gather_with_grad(query_reps, rows=rows)
        share = (share + _rows_loss(passage_reps[::group], queries, group=1, **settings)) / 2
    share = share * (query_reps.shape[0] * world_size() / sum(rows))
    return share + (mean_over_ranks(share) - share.detach())


def _rows_loss(
    reps: Tensor, against: Tensor, *, temperature: float | Tensor, tile_size: int | str | None, first: int, group: int
) -> Tensor:
    """One direction, the mean over `reps`: the positive of row i is row (first + i) * group of `against`."""
    if tile_size is not None:
        return tiled_rows_loss(reps, against, temperature=temperature, tile_size=tile_size, first=first, group=group)
    labels = torch.arange(first, first + reps.shape[0], device=reps.device)
    return F.cross_entropy(reps @ against.T / temperature, labels * group)


def _local_loss(
    query_reps: Tensor,
    passage_reps: Tensor,
    *,
    temperature: float | Tensor,
    symmetric: bool,
    mask: Tensor | None,
    tile_size: int | str | None,
) -> Tensor:
    """The loss of one process's batch, dense or tiled."""
    options = {"temperature": temperature, "symmetric": symmetric, "mask": mask}
    if tile_size is None:
        return contrastive_loss(query_reps, passage_reps, **options)
    return tiled_contrastive_loss(query_reps, passage_reps, tile_size=tile_size, **options)


class ContrastiveLoss(nn.Module):
    """`contrastive_loss` with its settings, as a module that every step takes for its `loss_fn`.

    temperature: a number above 0. learnable: then the module owns one parameter, `log_temperature`
    (the logarithm keeps the temperature above 0), whose gradient a step gives exactly once.
    tile_size: None computes the dense loss; an int computes it tile by tile (`gclib.losses.tiled`), "auto" in tiles
    that fit the cache. gather: the loss of the whole batch of several processes, passages gathered
    (`gathered_contrastive_loss`). ring: the same with passages that travel (`gclib.losses.ring`), which needs a
    tile_size. Both want `average_gradients` after the step, and are the plain loss in a process alone. They take no
    mask.

    Raises ValueError for a setting that can't be, or a ring without tile_size.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        *,
        learnable: bool = False,
        symmetric: bool = False,
        tile_size: int | str | None = None,
        gather: bool = False,
        ring: bool = False,
    ):
        super().__init__()
        start = positive_number("temperature", temperature)
        if ring and tile_size is None:
            raise refuse("tile_size", 'must be an int or "auto" for a ring, which has no dense form', None)
        if ring and gather:
            raise refuse("ring", "must not be given with gather: it takes its place", "both")
        self.fixed_temperature = None if learnable else start
        self.log_temperature = nn.Parameter(torch.tensor(start).log()) if learnable else None
        self.symmetric, self.gather, self.ring = symmetric, gather, ring
        self.tile_size = None if tile_size is None else check_tile_size(tile_size)

    @property
    def temperature(self) -> float | Tensor:
        """The number itself, or exp(log_temperature) where it is learnable."""
        return self.fixed_temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(self, query_reps: Tensor, passage_reps: Tensor, mask: Tensor | None = None) -> Tensor:
        """query_reps (B, D), passage_reps (N, D), mask (B, N) or None -> scalar."""
        if mask is not None and (self.gather or self.ring):
            raise refuse("mask", "must be None with gather or ring: it would have to know all ranks' rows", "a mask")
        settings = {"temperature": self.temperature, "symmetric": self.symmetric, "tile_size": self.tile_size}
        if self.ring:
            return ring_contrastive_loss(query_reps, passage_reps, **settings)
        if self.gather:
            return gathered_contrastive_loss(query_reps, passage_reps, **settings)
        return _local_loss(query_reps, passage_reps, mask=mask, **settings)

    def extra_repr(self) -> str:
        """The settings, for print(loss)."""
        temperature = "learnable" if self.fixed_temperature is None else f"{self.fixed_temperature:g}"
        ranks = ", ring=True" if self.ring else ", gather=True" if self.gather else ""
        return f"temperature={temperature}, symmetric={self.symmetric}, tile_size={self.tile_size}{ranks}"
