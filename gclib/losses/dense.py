"""The contrastive loss (InfoNCE), dense: the whole B x N matrix of logits at once.

Gao et al. 2021, equation (1), with the logits of query i against passage j

    z_ij = q_i . p_j / temperature,       positive of query i: passage i * (1 + K),

    L = -1/B  sum_i  log( exp(z_i,pos(i)) / sum_{j not masked} exp(z_ij) ).

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, D dimensions.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gclib.support.validation import check_mask, check_representations, check_temperature


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
