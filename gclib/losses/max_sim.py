"""Many vectors a text: the late interaction of ColBERT, and a loss over it that every step takes.

MaxSim: each token of the query looks for the passage token nearest to it, and the query adds up what it found,

    d_ij = sum_s max_t  q_is . p_jt        over the tokens s of query i and t of passage j that are no padding.

Source: Khattab and Zaharia 2020 (arXiv 2004.12832), section 3.2. Letters: B queries, N passages, Tq and Tp tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gclib.support.validation import positive_number, refuse


def max_sim(query_tokens: Tensor, passage_tokens: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
    """(B, Tq, D) and (N, Tp, D) with masks (B, Tq) and (N, Tp), 1 for a token -> (B, N). Allocates B * N * Tq * Tp."""
    for name, tokens, mask in (
        ("query_tokens", query_tokens, query_mask),
        ("passage_tokens", passage_tokens, passage_mask),
    ):
        if tokens.ndim != 3 or tokens.shape[:2] != mask.shape:
            raise refuse(name, f"must be (rows, T, D) with a mask of (rows, T), here {tuple(mask.shape)}", tokens.shape)
    products = torch.einsum("isd,jtd->ijst", query_tokens, passage_tokens)
    products = products.masked_fill(~passage_mask.bool()[None, :, None, :], -torch.inf)
    return (products.amax(dim=3) * query_mask[:, None, :].to(products.dtype)).sum(dim=2)


class MaxSimLoss:
    """InfoNCE over MaxSim; the masks of the batch are kept by closure, the step hands over representations alone.

    The positive of query i is passage i * (1 + K). A new object for each batch: it holds the batch's masks.
    """

    def __init__(self, query_mask: Tensor, passage_mask: Tensor, *, temperature: float = 1.0):
        self.query_mask, self.passage_mask = query_mask, passage_mask
        self.temperature = positive_number("temperature", temperature)

    def __call__(self, query_tokens: Tensor, passage_tokens: Tensor) -> Tensor:
        """(B, Tq, D) and (N, Tp, D), zeros or anything at padding -> scalar."""
        if passage_tokens.shape[0] % query_tokens.shape[0]:
            rule = f"must have a multiple of B = {query_tokens.shape[0]} rows"
            raise refuse("passage_tokens", rule, f"{passage_tokens.shape[0]} rows")
        scores = max_sim(query_tokens, passage_tokens, self.query_mask, self.passage_mask)
        labels = torch.arange(scores.shape[0], device=scores.device) * (scores.shape[1] // scores.shape[0])
        return F.cross_entropy(scores / self.temperature, labels)
