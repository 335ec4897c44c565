"""Nested representations: the first numbers of a vector are a good shorter vector.

Kusupati et al. 2022 (arXiv 2205.13147), equation (1): the loss of every prefix, added up. Letters: D dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gclib.support.validation import positive_int, refuse


class MatryoshkaLoss(nn.Module):
    """sum_d loss_fn(query_reps[:, :d], passage_reps[:, :d]), each prefix made a unit vector again.

    loss_fn: any loss of representations, a `ContrastiveLoss` say; dims: the prefixes' lengths. Every step takes it for
    its loss. Raises ValueError for no prefix, and for a prefix longer than the representations.
    """

    def __init__(self, loss_fn: Callable[..., Tensor], dims: Sequence[int]):
        super().__init__()
        if not callable(loss_fn):
            raise refuse("loss_fn", "must be callable", type(loss_fn).__name__)
        if isinstance(dims, str) or not isinstance(dims, Sequence) or not dims:
            raise refuse("dims", "must be a list of at least one length", dims)
        self.loss_fn = loss_fn
        self.dims = [positive_int("dims", dim) for dim in dims]

    @property
    def needs_whole_batch(self) -> bool:
        """As the loss of a prefix says of itself."""
        return getattr(self.loss_fn, "needs_whole_batch", False)

    def forward(self, *reps: Tensor, **options: Any) -> Tensor:
        """Representations (rows, D), one tensor a tower -> scalar."""
        width = min(rep.shape[1] for rep in reps)
        if max(self.dims) > width:
            raise refuse("dims", f"must be at most the {width} dimensions of the representations", self.dims)
        return sum(self.loss_fn(*(F.normalize(rep[:, :dim], dim=1) for rep in reps), **options) for dim in self.dims)
