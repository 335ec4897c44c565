"""The contrastive loss of a batch that several processes share: each takes its own queries' loss of all passages.

Letters: W ranks, B queries of the whole batch, b of one rank, K hard negatives per query, N = B * (1 + K) passages, D
dimensions.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gclib.distributed import gather_with_grad, mean_over_ranks, own_rows, rows_of_ranks, world_size
from gclib.losses.dense import contrastive_loss
from gclib.losses.tiled import tiled_contrastive_loss, tiled_rows_loss
from gclib.support.validation import check_representations, check_temperature


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
        return local_loss(
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


def local_loss(
    query_reps: Tensor,
    passage_reps: Tensor,
    *,
    temperature: float | Tensor,
    symmetric: bool,
    mask: Tensor | None,
    tile_size: int | str | None,
) -> Tensor:
    """`contrastive_loss` where tile_size is None, `tiled_contrastive_loss` else: the loss of one process's batch."""
    options = {"temperature": temperature, "symmetric": symmetric, "mask": mask}
    if tile_size is None:
        return contrastive_loss(query_reps, passage_reps, **options)
    return tiled_contrastive_loss(query_reps, passage_reps, tile_size=tile_size, **options)
