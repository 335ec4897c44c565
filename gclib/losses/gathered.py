"""The contrastive loss of a batch that several processes share: each takes its own queries' loss of all passages.

Letters: W ranks, B queries of the whole batch, b of one rank, K hard negatives per query, N = B * (1 + K) passages, D
dimensions.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gclib.distributed import gather_with_grad, mean_over_ranks, own_rows, rows_of_ranks, world_size
from gclib.losses.dense import contrastive_loss, rows_loss
from gclib.losses.directions import POSITIVES, PP, PQ, QQ, Directions, Side
from gclib.losses.masks import Rule, as_rule, refuse_matrix
from gclib.losses.tiled import tile_side, tiled_contrastive_loss, tiled_rows_loss
from gclib.losses.tiles import Layout
from gclib.support.validation import check_representations, check_temperature


def gathered_contrastive_loss(
    query_reps: Tensor,
    passage_reps: Tensor,
    *,
    temperature: float | Tensor,
    symmetric: bool = False,
    mask: Rule | None = None,
    directions: Sequence[str] | None = None,
    partition: str = "joint",
    tile_size: int | str | None = None,
) -> Tensor:
    """The loss of the whole batch, of which each of W ranks gives its own rows: (b, D) and (b * (1 + K), D).

    Each rank gathers the passages and takes the loss of its own queries; if symmetric it gathers the queries too, and
    takes the second direction of its own positives. So a rank has b * N logits, and no logit is computed twice
    over the ranks but once for each direction. mask: a rule for the rank's own rows, of the same kind on every rank;
    what it knows of the others' is gathered. Returns the mean over all B queries, the same on every rank, with
    W times this rank's share of the gradient: see `gclib.distributed`. Alone: `contrastive_loss`, or the tiled one.

    Raises ValueError for shapes or dtypes that do not fit, on all ranks where theirs differ, and for a (B, N) mask.
    Source: Gao et al. 2021, section 3.4.
    """
    refuse_matrix(mask)
    asked = {"symmetric": symmetric, "directions": directions, "partition": partition}
    if world_size() == 1:
        return local_loss(query_reps, passage_reps, temperature=temperature, mask=mask, tile_size=tile_size, **asked)
    check_representations(query_reps, passage_reps)
    check_temperature(temperature)
    rule = as_rule(mask, query_reps.shape[0], passage_reps.shape[0], query_reps.device)
    wanted = Directions.of(symmetric, directions, partition)
    rows = rows_of_ranks(query_reps, passage_reps)
    group, first = passage_reps.shape[0] // query_reps.shape[0], own_rows(rows).start
    passages = gather_with_grad(passage_reps, rows=[group * count for count in rows])
    all_queries = gather_with_grad(query_reps, rows=rows) if {PQ, QQ} & set(wanted.names) else None
    positives = passage_reps[::group] if set(wanted.names) & {PQ, PP, POSITIVES} else None
    known = known_of_all(rule, rows, group)
    side = passages.shape[0] if tile_size is None else tile_side(tile_size, query_reps)
    layout = Layout(wanted, side, group, first, rule, *known)
    if tile_size is None:
        own = Side(query_reps, positives, None)
        share = rows_loss(own, Side.of(all_queries, passages, group), temperature, layout)
    else:
        share = tiled_rows_loss(query_reps, passages, positives, all_queries, temperature=temperature, layout=layout)
    share = share * (query_reps.shape[0] * world_size() / sum(rows))
    return share + (mean_over_ranks(share) - share.detach())


def known_of_all(rule: Rule | None, rows: Sequence[int], group: int) -> tuple[Side | None, Side | None]:
    """What the rule knows of this rank's queries and passages, and of all ranks'; rows: each rank's."""
    if rule is None:
        return None, None
    own = Side.of(rule.queries, rule.passages, group)
    if len(rows) == 1:
        return own, own
    queries = tuple(gather_with_grad(tensor, rows=rows) for tensor in rule.queries)
    passages = tuple(gather_with_grad(tensor, rows=[group * count for count in rows]) for tensor in rule.passages)
    return own, Side.of(queries, passages, group)


def local_loss(query_reps: Tensor, passage_reps: Tensor, *, tile_size: int | str | None, **options: Any) -> Tensor:
    """`contrastive_loss` where tile_size is None, `tiled_contrastive_loss` else: the loss of one process's batch."""
    if tile_size is None:
        return contrastive_loss(query_reps, passage_reps, **options)
    return tiled_contrastive_loss(query_reps, passage_reps, tile_size=tile_size, **options)
