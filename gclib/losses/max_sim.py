"""Many vectors a text: the late interaction of ColBERT, and a loss over it for the naive and the cached step.

MaxSim: each token of the query looks for the passage token nearest to it, and the query adds up what it found,

    d_ij = sum_s max_t  q_is . p_jt        over the tokens s of query i and t of passage j that are no padding.

Its gradient is closed: token s of query i and the token t that it chose in passage j pull at each other with dL/dd_ij.
In tiles of some queries and passages the products of their tokens are there for a moment, and made again in the
backward pass, where the choices are read off them.

Source: Khattab and Zaharia 2020 (arXiv 2004.12832), section 3.3. Letters: B queries, N passages, Tq and Tp tokens, D
dimensions; R queries and C passages of a tile.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from gclib.losses.tiled import like, refuse_second_derivative
from gclib.support.validation import describe, positive_int, positive_number, refuse


def max_sim(
    query_tokens: Tensor,
    passage_tokens: Tensor,
    query_mask: Tensor,
    passage_mask: Tensor,
    *,
    tile_size: int | None = None,
) -> Tensor:
    """(B, Tq, D) and (N, Tp, D) with masks (B, Tq) and (N, Tp), 1 for a token -> (B, N).

    A passage without a token is infinitely far from every query: -inf. What stands at padding has to be finite.
    tile_size: None allocates B * N * Tq * Tp products, some times over; an int takes so many queries against as many
    passages at once, tile_size^2 * Tq * Tp products, and has no second derivative. Half precision is summed in float32
    in tiles. Where tokens of a passage are equally near, each gets its share of the gradient, in both forms.

    Raises ValueError for shapes or dtypes that don't fit, a mask on another device, and a tile_size that is no positive
    int.
    """
    for name, tokens, mask in (
        ("query_tokens", query_tokens, query_mask),
        ("passage_tokens", passage_tokens, passage_mask),
    ):
        if not isinstance(tokens, Tensor) or not isinstance(mask, Tensor):
            raise refuse(name, "must be a Tensor, and its mask", f"{type(tokens).__name__}, {type(mask).__name__}")
        if tokens.ndim != 3 or tokens.shape[:2] != mask.shape:
            raise refuse(name, f"must be (rows, T, D) with a mask of (rows, T), here {tuple(mask.shape)}", tokens.shape)
        if (tokens.shape[2], tokens.dtype, tokens.device) != (query_tokens.shape[2], query_tokens.dtype, mask.device):
            rule = f"must have query_tokens' D {query_tokens.shape[2]} and {query_tokens.dtype}, on its mask's device"
            raise refuse(name, rule, f"{describe(tokens)} on {tokens.device}, the mask on {mask.device}")
    query_mask, passage_mask = query_mask.bool(), passage_mask.bool()
    if tile_size is not None:
        side = positive_int("tile_size", tile_size)
        return _TiledMaxSim.apply(query_tokens, passage_tokens, query_mask, passage_mask, side)
    products = torch.einsum("isd,jtd->ijst", query_tokens, passage_tokens)
    products = products.masked_fill(~passage_mask[None, :, None, :], -torch.inf)
    return products.amax(dim=3).masked_fill(~query_mask[:, None, :], 0.0).sum(dim=2)


class _TiledMaxSim(torch.autograd.Function):
    """The scores, and the gradient of the tokens, one tile of products at a time."""

    @staticmethod
    def forward(ctx, queries, passages, query_mask, passage_mask, side):
        ctx.save_for_backward(queries, passages, query_mask, passage_mask)
        ctx.side = side
        dtype = torch.promote_types(queries.dtype, torch.float32)
        scores = queries.new_empty((queries.shape[0], passages.shape[0]), dtype=dtype)
        with torch.autocast(queries.device.type, enabled=False):
            for rows, columns in _tiles(queries, passages, side):
                products = _products(queries[rows].to(dtype), passages[columns].to(dtype), passage_mask[columns])
                nearest = products.amax(dim=3).masked_fill_(~query_mask[rows].unsqueeze(2), 0.0)
                torch.sum(nearest, dim=1, out=scores[rows, columns])
        return scores

    @staticmethod
    def backward(ctx, of_scores):
        refuse_second_derivative("max_sim in tiles")
        queries, passages, query_mask, passage_mask = ctx.saved_tensors
        of_queries, of_passages = (
            torch.zeros(reps.shape, dtype=of_scores.dtype, device=reps.device) if wanted else None
            for reps, wanted in zip((queries, passages), ctx.needs_input_grad, strict=False)
        )
        with torch.autocast(queries.device.type, enabled=False):
            for rows, columns in _tiles(queries, passages, ctx.side):
                left, right = (part.to(of_scores.dtype) for part in (queries[rows], passages[columns]))
                products = _products(left, right, passage_mask[columns])
                of_nearest = of_scores[rows, None, columns] * query_mask[rows].unsqueeze(2)
                pull = _shared(products, of_nearest, passage_mask[columns]).view(left.shape[0] * left.shape[1], -1)
                if of_queries is not None:
                    of_queries[rows] += (pull @ right.flatten(0, 1)).view_as(left)
                if of_passages is not None:
                    of_passages[columns] += (pull.T @ left.flatten(0, 1)).view_as(right)
        return like(queries, of_queries), like(passages, of_passages), None, None, None


def _tiles(queries: Tensor, passages: Tensor, side: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most `side` queries against at most as many passages."""
    for row in range(0, queries.shape[0], side):
        for column in range(0, passages.shape[0], side):
            yield slice(row, row + side), slice(column, column + side)


def _products(queries: Tensor, passages: Tensor, passage_mask: Tensor) -> Tensor:
    """(R, Tq, C, Tp): every token against every token, minus infinity at the passages' padding."""
    products = torch.mm(queries.flatten(0, 1), passages.flatten(0, 1).T)
    products = products.view(*queries.shape[:2], *passages.shape[:2])
    return products.masked_fill_(~passage_mask, -torch.inf)


def _shared(products: Tensor, of_nearest: Tensor, passage_mask: Tensor) -> Tensor:
    """(R, Tq, C, Tp) in place of the products: the gradient (R, Tq, C) of the nearest, shared where several are."""
    torch.eq(products, products.amax(dim=3, keepdim=True), out=products)
    products.mul_(passage_mask)
    return products.mul_((of_nearest / products.sum(dim=3).clamp_min_(1)).unsqueeze(3))


class MaxSimLoss:
    """InfoNCE over MaxSim; the masks of the batch are kept by closure, the step hands over representations alone.

    The positive of query i is passage i * (1 + K). A new object for each batch: it holds the batch's masks.
    tile_size: as in `max_sim`.
    """

    def __init__(
        self, query_mask: Tensor, passage_mask: Tensor, *, temperature: float = 1.0, tile_size: int | None = None
    ):
        self.query_mask, self.passage_mask = query_mask, passage_mask
        self.temperature = positive_number("temperature", temperature)
        self.tile_size = None if tile_size is None else positive_int("tile_size", tile_size)

    def __call__(self, query_tokens: Tensor, passage_tokens: Tensor) -> Tensor:
        """(B, Tq, D) and (N, Tp, D), any finite numbers at padding -> scalar."""
        if not query_tokens.shape[0] or passage_tokens.shape[0] % query_tokens.shape[0]:
            rule = f"must have a multiple of B = {query_tokens.shape[0]} rows"
            raise refuse("passage_tokens", rule, f"{passage_tokens.shape[0]} rows")
        masks = self.query_mask, self.passage_mask
        scores = max_sim(query_tokens, passage_tokens, *masks, tile_size=self.tile_size)
        labels = torch.arange(scores.shape[0], device=scores.device) * (scores.shape[1] // scores.shape[0])
        return F.cross_entropy(scores / self.temperature, labels)
