"""The contrastive loss (InfoNCE), dense: the whole B x N matrix of logits at once.

Gao et al. 2021, equation (1), with the logits of query i against passage j

    z_ij = q_i . p_j / temperature,       positive of query i: passage i * (1 + K),

    L = -1/B  sum_i  log( exp(z_i,pos(i)) / sum_{j not masked} exp(z_ij) ).

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, D dimensions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gclib.losses.directions import PQ, QP, Directions, Side
from gclib.losses.masks import Rule, as_rule
from gclib.losses.tiles import Layout
from gclib.support.validation import check_representations, check_temperature


def contrastive_loss(
    query_reps: Tensor,
    passage_reps: Tensor,
    *,
    temperature: float | Tensor,
    symmetric: bool = False,
    mask: Tensor | Rule | None = None,
    directions: Sequence[str] | None = None,
    partition: str = "joint",
) -> Tensor:
    """InfoNCE over in-batch and hard negatives, in nats, averaged over the B queries.

    query_reps (B, D); passage_reps (N, D) with N = B * (1 + K), the positive of query i in row
    i * (1 + K); mask (B, N) bool, True = left out of the denominator (a false negative), or a rule that says so
    (`gclib.losses.masks`). A positive may not be left out: the steps refuse such a mask before they start, and here
    the loss would be infinite.
    `symmetric` averages in the second direction: each of the B positives against all B queries,
    with the transposed mask. Other directions, and one softmax over all of them: `gclib.losses.directions`.
    Holds three times B * N numbers at its peak; symmetric four, with a learned temperature too six.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for a temperature that is a number not above 0.
    Source: Gao et al. 2021, equation (1); the symmetric form is CLIP's (Radford et al. 2021, figure 3).
    """
    check_representations(query_reps, passage_reps)
    check_temperature(temperature)
    rule = as_rule(mask, query_reps.shape[0], passage_reps.shape[0], query_reps.device)
    group = passage_reps.shape[0] // query_reps.shape[0]
    texts = Side.of(query_reps, passage_reps, group)
    known = None if rule is None else Side.of(rule.queries, rule.passages, group)
    wanted = Directions.of(symmetric, directions, partition)
    return rows_loss(texts, texts, temperature, Layout(wanted, passage_reps.shape[0], group, 0, rule, known, known))


def rows_loss(own: Side, against: Side, temperature: float | Tensor, layout: Layout) -> Tensor:
    """Equation (1) for the queries of `own` (all, or one process's) against the texts of `against`.

    Cross-entropy of each row of logits z (`tiles.Logits.whole`), query i having its positive in the column of passage
    (layout.first + i) * (1 + K); then the same for the other directions. `unweighed`: z before a rule weighs it.
    """
    unweighed, logits = layout.logits(QP, own, against, temperature).whole()
    parts = [logits]
    for direction in layout.directions.names[1:]:
        if direction == PQ and own is against:
            parts.append(unweighed[:, :: layout.group].T)
        else:
            block = layout.logits(direction, own, against, temperature, with_positives=direction == PQ)
            parts.append(block.whole()[0])
    del unweighed
    labels = torch.arange(layout.first, layout.first + logits.shape[0], device=logits.device)
    if layout.directions.joint:
        return F.cross_entropy(torch.cat(parts, dim=1), labels * layout.group)
    loss = F.cross_entropy(logits, labels * layout.group)
    return (loss + F.cross_entropy(parts[1], labels)) / 2 if len(parts) > 1 else loss
