"""The contrastive loss one tile of logits at a time: its value and its gradients without the B x N matrix.

Cheng et al. 2024 (arXiv 2410.17243) write the loss as a positive term and a log-sum-exp (equations 1-2), merge the
log-sum-exps of tiles (equations 3-5), and compute each tile again in the backward pass, where the stored
log-sum-exps are all that a softmax needs (equations 6-8). Here one walk over the tiles serves the rows and, if
symmetric, the columns too, so a symmetric loss costs 2 B N D FLOPs forward and 6 B N D backward.

Passage j = i * (1 + K) + slot belongs to query i. Taken slot by slot, the logits are 1 + K square matrices (B, B);
the positives are the diagonal of slot 0, and slot 0 alone has a second direction.

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, D dimensions; R x C the sides of a tile.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gclib.losses import check_mask, check_representations, check_temperature
from gclib.shapes import shape_checked
from gclib.validation import positive_int

# exp(x) is taken for 0 below these x: far under one rounding of a sum that holds exp(0) = 1, and far above the
# subnormal numbers on which a CPU's exp and matrix product are 10 to 100 times slower.
NEGLIGIBLE_EXPONENT = {torch.float32: -60.0, torch.float64: -600.0}


def tiled_contrastive_loss(
    query_reps: Tensor,
    passage_reps: Tensor,
    *,
    temperature: float | Tensor,
    symmetric: bool = False,
    mask: Tensor | None = None,
    tile_size: int,
) -> Tensor:
    """`contrastive_loss`, value and gradients, computed in tiles of at most tile_size x tile_size logits.

    query_reps (B, D); passage_reps (N, D) with N = B * (1 + K), the positive of query i in row i * (1 + K); mask
    (B, N) bool, True = left out of the denominator; temperature a number or a tensor of one element, which gets its
    gradient. Any strides. No size has to divide another.

    Allocates two tiles, four vectors of B numbers, one block (tile_size, D) and the gradients. Never allocated: the
    B x N logits, probabilities or their gradient. bfloat16 and float16 are read as they are and every product,
    sum and exponential is float32 (the passages' gradient has one float32 copy); the loss is then float32. Ambient
    autocast is switched off inside: representations keep the dtype they come in, where the dense loss would round the
    logits to autocast's. Reads no tensor's value, so it runs under fake tensors and never waits for a GPU.

    A positive may not be left out: the loss is then infinite, as in the dense form. Raises ValueError as
    `contrastive_loss` does, and for a tile_size that is not a positive int; RuntimeError where a second
    derivative is asked for (create_graph=True), which the closed-form backward does not have.
    Source: Cheng et al. 2024, equations (1)-(8).
    """
    check_representations(query_reps, passage_reps)
    check_temperature(temperature)
    check_mask(mask, query_reps.shape[0], passage_reps.shape[0], query_reps.device)
    side = min(positive_int("tile_size", tile_size), query_reps.shape[0])
    return _TiledLoss.apply(query_reps, passage_reps, temperature, mask, symmetric, side)


class _TiledLoss(torch.autograd.Function):
    """Autograd's view of the two passes, which share the log-sum-exps and nothing else."""

    @staticmethod
    def forward(ctx, query_reps, passage_reps, temperature, mask, symmetric, side):
        with torch.autocast(query_reps.device.type, enabled=False):
            logits = _Logits(query_reps, passage_reps, temperature, mask, side)
            loss, directions = _forward(logits, symmetric)
        is_tensor = isinstance(temperature, Tensor)
        ctx.number, ctx.side = (None if is_tensor else temperature), side
        sums = [part for direction in directions for part in (direction.maximum, direction.total)]
        ctx.save_for_backward(query_reps, passage_reps, temperature if is_tensor else None, mask, *sums)
        return loss

    @staticmethod
    def backward(ctx, gradient_of_loss):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "tiled_contrastive_loss has no second derivative, and create_graph=True asks for one: use "
                "contrastive_loss (or tile_size=None) where a gradient is differentiated again"
            )
        query_reps, passage_reps, temperature, mask, *sums = ctx.saved_tensors
        directions = [_LogSumExp(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]
        with torch.autocast(query_reps.device.type, enabled=False):
            temperature = ctx.number if temperature is None else temperature
            logits = _Logits(query_reps, passage_reps, temperature, mask, ctx.side)
            gradients = _backward(logits, directions, gradient_of_loss, ctx.needs_input_grad)
        return *gradients, None, None, None


@dataclass(frozen=True)
class _Tile:
    """Queries `rows` against the passages that hold place `slot` among the 1 + K of queries `columns`."""

    rows: slice
    columns: slice
    slot: int
    passages: slice

    @property
    def holds_positives(self) -> bool:
        """Whether the tile's diagonal is the positives' logits."""
        return self.slot == 0 and self.rows == self.columns


class _Logits:
    """The (B, N) logits, never whole: blocks of representations, and one tile at a time in one buffer."""

    def __init__(self, query_reps, passage_reps, temperature, mask, side: int):
        self.query_reps, self.passage_reps = query_reps, passage_reps
        self.temperature, self.mask, self.side = temperature, mask, side
        self.batch_size = query_reps.shape[0]
        self.group = passage_reps.shape[0] // self.batch_size
        self.dtype = torch.promote_types(query_reps.dtype, torch.float32)
        self.buffer = self.new_empty(side * side)

    def new_empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor of the dtype that everything is accumulated in."""
        return self.query_reps.new_empty(shape, dtype=self.dtype)

    def row_blocks(self) -> Iterator[slice]:
        """Slices of at most `side` queries; the last may be short."""
        for start in range(0, self.batch_size, self.side):
            yield slice(start, min(start + self.side, self.batch_size))

    def tiles(self, rows: slice) -> Iterator[_Tile]:
        """The tiles of one block of queries, slot by slot."""
        for slot in range(self.group):
            for columns in self.row_blocks():
                start, stop = columns.start * self.group + slot, columns.stop * self.group
                yield _Tile(rows, columns, slot, slice(start, stop, self.group))

    def queries(self, rows: slice) -> Tensor:
        """(R, D): one block of queries, as they are."""
        return self.query_reps[rows].to(self.dtype)

    def passages(self, tile: _Tile) -> Tensor:
        """(C, D): the tile's passages, as they are."""
        return self.passage_reps[tile.passages].to(self.dtype)

    def compute(self, tile: _Tile, queries: Tensor, passages: Tensor) -> Tensor:
        """(R, C): the tile's logits in the buffer (the next tile overwrites it), masked ones at minus infinity."""
        shape = queries.shape[0], passages.shape[0]
        logits = torch.mm(queries, passages.T, out=_shaped(self.buffer, shape)).div_(self.temperature)
        if self.mask is not None:
            logits.masked_fill_(self.mask[tile.rows, tile.passages], -torch.inf)
        return logits


@dataclass
class _LogSumExp:
    """One direction's log-sum-exps, as maximum + log(total): apart, they keep the digits that their sum would lose.

    `maximum` starts at the lowest number there is and `total` at 0: minus infinity together. (Cheng et al.'s
    equation (4) is written from 0, which would count a logit of 0 that nobody has.)
    """

    maximum: Tensor
    total: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> "_LogSumExp":
        return cls(torch.full_like(like, torch.finfo(like.dtype).min), torch.zeros_like(like))

    def merge(self, at: slice, logits: Tensor, dim: int, out: Tensor) -> None:
        """Equations (3)-(5): take in a tile along `dim`; `out` (as big as the tile) is overwritten."""
        maximum = torch.maximum(self.maximum[at], logits.amax(dim))
        self.total[at] *= torch.exp(self.maximum[at] - maximum)
        self.maximum[at] = maximum
        self.total[at] += self.numerators(at, logits, dim, out).sum(dim)

    def numerators(self, at: slice, logits: Tensor, dim: int, out: Tensor) -> Tensor:
        """exp(logit - maximum), which `total` makes a softmax; `out` may be the logits themselves."""
        torch.sub(logits, self.maximum[at].unsqueeze(dim), out=out)
        return out.clamp_min_(NEGLIGIBLE_EXPONENT[out.dtype]).exp_()

    def mean_loss(self, positives: Tensor) -> Tensor:
        """Equations (1)-(2): the mean of log-sum-exp minus the positive's logit."""
        return ((self.maximum - positives) + self.total.log()).mean()


def _forward(logits: _Logits, symmetric: bool) -> tuple[Tensor, list[_LogSumExp]]:
    """The loss, and the log-sum-exps of the rows and, if symmetric, of the positives' columns."""
    positives = logits.new_empty(logits.batch_size)
    directions = [_LogSumExp.empty(positives) for _ in range(2 if symmetric else 1)]
    scratch = torch.empty_like(logits.buffer) if symmetric else logits.buffer
    for rows in logits.row_blocks():
        queries = logits.queries(rows)
        for tile in logits.tiles(rows):
            values = logits.compute(tile, queries, logits.passages(tile))
            if tile.holds_positives:
                positives[rows] = values.diagonal()
            _merge(tile, values, directions, scratch)
    losses = [direction.mean_loss(positives) for direction in directions]
    return sum(losses[1:], losses[0]) / len(losses), directions


@shape_checked
def _merge(tile: _Tile, logits: Float[Tensor, "R C"], directions: list[_LogSumExp], scratch: Tensor) -> None:
    """Count one tile in: its columns if it has a second direction, then its rows, over the logits themselves."""
    rows, *columns = directions
    if columns and tile.slot == 0:
        columns[0].merge(tile.columns, logits, 0, out=_shaped(scratch, logits.shape))
    rows.merge(tile.rows, logits, 1, out=logits)


@dataclass
class _Gradients:
    """What the backward pass fills: of the queries, the passages and the temperature, None where not wanted."""

    queries: Tensor | None
    passages: Tensor | None
    temperature: Tensor | None

    @classmethod
    def zeros(cls, logits: _Logits, wanted: Sequence[bool]) -> "_Gradients":
        return cls(
            torch.empty_like(logits.query_reps, memory_format=torch.contiguous_format) if wanted[0] else None,
            logits.new_empty(*logits.passage_reps.shape).zero_() if wanted[1] else None,
            logits.new_empty().zero_() if wanted[2] else None,
        )

    def take_rows(self, rows: slice, of_rows: Tensor, queries: Tensor) -> None:
        """A finished block of dLoss/dq holds its share of dLoss/dt = -sum(dLoss/dz z) / t = -sum(dLoss/dq q) / t."""
        if self.queries is not None:
            self.queries[rows] = of_rows
        if self.temperature is not None:
            self.temperature -= (of_rows * queries).sum()

    def like_inputs(self, logits: _Logits) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the dtypes, shapes and devices of the three inputs."""
        passages, temperature = self.passages, self.temperature
        if passages is not None:
            passages = passages.to(logits.passage_reps.dtype)
        if temperature is not None:
            temperature = (temperature / logits.temperature).to(logits.temperature)
        return self.queries, passages, temperature


def _backward(
    logits: _Logits, directions: list[_LogSumExp], gradient_of_loss: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of queries, passages and temperature: equations (6)-(8), every tile computed a second time."""
    weight = gradient_of_loss / (len(directions) * logits.batch_size) / logits.temperature
    scales = [weight / direction.total for direction in directions]
    scratch = torch.empty_like(logits.buffer) if len(directions) > 1 else logits.buffer
    gradients = _Gradients.zeros(logits, wanted)
    for rows in logits.row_blocks():
        queries = logits.queries(rows)
        of_rows = torch.zeros_like(queries)
        for tile in logits.tiles(rows):
            passages = logits.passages(tile)
            values = logits.compute(tile, queries, passages)
            of_logits = _gradient_of_logits(tile, values, directions, scales, scratch)
            if gradients.passages is not None:
                _add_product(gradients.passages[tile.passages], of_logits.T, queries)
            if gradients.queries is not None or gradients.temperature is not None:
                _add_product(of_rows, of_logits, passages)
        gradients.take_rows(rows, of_rows, queries)
    return gradients.like_inputs(logits)


@shape_checked
def _gradient_of_logits(
    tile: _Tile,
    logits: Float[Tensor, "R C"],
    directions: list[_LogSumExp],
    scales: list[Tensor],
    scratch: Tensor,
) -> Float[Tensor, "R C"]:
    """dLoss/dlogits of one tile, in place of the logits or in `scratch`.

    Over the temperature already: the sum over directions of weight * (p - 1[positive]), where p = numerator / total,
    weight = 1 / (temperature * directions * B) and scale = weight / total. A total holds exp(0) = 1 for its
    largest logit, so saturated logits divide nothing by 0.
    """
    of_columns = None
    if len(directions) > 1 and tile.slot == 0:
        of_columns = _numerators_less_positives(tile, tile.columns, directions[1], logits, 0, scratch)
        of_columns *= scales[1][tile.columns]
    of_rows = _numerators_less_positives(tile, tile.rows, directions[0], logits, 1, logits)
    scale = scales[0][tile.rows].unsqueeze(1)
    return of_rows.mul_(scale) if of_columns is None else of_columns.addcmul_(of_rows, scale)


def _numerators_less_positives(
    tile: _Tile, at: slice, direction: _LogSumExp, logits: Tensor, dim: int, scratch: Tensor
) -> Tensor:
    """total * (p - 1[positive]) in one direction, negligible numerators exactly 0."""
    numerators = direction.numerators(at, logits, dim, out=_shaped(scratch, logits.shape))
    smallest = math.exp(NEGLIGIBLE_EXPONENT[logits.dtype] + 1)
    F.threshold_(numerators, smallest, 0.0)
    if tile.holds_positives:
        numerators.diagonal().sub_(direction.total[at])
    return numerators


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left @ right, in place."""
    torch.addmm(into, left, right, out=into)


def _shaped(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """The first numbers of a buffer, as a matrix of that shape."""
    return buffer.view(-1)[: shape[0] * shape[1]].view(shape[0], shape[1])
