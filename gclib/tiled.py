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

from gclib.arguments import check_mask, check_representations, check_temperature
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

    Allocates tiles (one; one more if symmetric, and in backward one more for a learnable temperature), some vectors
    of B numbers, log2(N / tile_size) blocks (tile_size, D) and the gradients. Never allocated: the B x N logits,
    probabilities or their gradient. Logits of positives and log-sum-exps of the others stay apart, so that an easy
    positive's small loss keeps the digits that the dense loss rounds away. Probabilities under exp(-60) of a
    direction's largest (float64: exp(-600)) count as 0.

    bfloat16 and float16 are read as they are and every product, sum and exponential is float32 (the passages' gradient
    has one float32 copy); the loss is then float32. Ambient autocast is switched off inside: representations keep
    the dtype they come in, where the dense loss would round the logits to autocast's. Reads no tensor's value, so it
    runs under fake tensors and never waits for a GPU.

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
    """Autograd's view of the two passes, which share the log-sum-exps and the positives' logits."""

    @staticmethod
    def forward(ctx, query_reps, passage_reps, temperature, mask, symmetric, side):
        with torch.autocast(query_reps.device.type, enabled=False):
            logits = _Logits(query_reps, passage_reps, temperature, mask, side)
            loss, positives, directions = _forward(logits, symmetric)
        is_tensor = isinstance(temperature, Tensor)
        ctx.number, ctx.side = (None if is_tensor else temperature), side
        sums = [part for others in directions for part in (others.maximum, others.total)]
        ctx.save_for_backward(query_reps, passage_reps, temperature if is_tensor else None, mask, positives, *sums)
        return loss

    @staticmethod
    def backward(ctx, gradient_of_loss):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "tiled_contrastive_loss has no second derivative, and create_graph=True asks for one: use "
                "contrastive_loss (or tile_size=None) where a gradient is differentiated again"
            )
        query_reps, passage_reps, temperature, mask, positives, *sums = ctx.saved_tensors
        directions = [_LogSumExp(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]
        with torch.autocast(query_reps.device.type, enabled=False):
            temperature = ctx.number if temperature is None else temperature
            logits = _Logits(query_reps, passage_reps, temperature, mask, ctx.side)
            weight = gradient_of_loss / (len(directions) * logits.batch_size * temperature)
            softmax = _Softmax.of(positives, directions, weight)
            gradients = _backward(logits, softmax, ctx.needs_input_grad)
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
    """One direction's log-sum-exps over all but the positives: maximum + log(total), (B,) each.

    Apart, the two keep digits that their sum would lose; without the positive, the loss of an easy query and the
    gradient p - 1 of its positive come from what is left, not from a difference of numbers near 1.
    `maximum` starts at the lowest number there is and `total` at 0: minus infinity together. (Cheng et al.'s
    equation (4) is written from 0, which would count a logit of 0 that nobody has.)
    """

    maximum: Tensor
    total: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> "_LogSumExp":
        """Of nothing yet."""
        return cls(torch.full_like(like, torch.finfo(like.dtype).min), torch.zeros_like(like))

    def merge(self, at: slice, logits: Tensor, dim: int, out: Tensor) -> None:
        """Equations (3)-(5): take in a tile along `dim`; `out` (as big as the tile, or itself) is overwritten."""
        maximum = torch.maximum(self.maximum[at], logits.amax(dim))
        self.total[at] *= torch.exp(self.maximum[at] - maximum)
        self.maximum[at] = maximum
        self.total[at] += _exponentials(logits, maximum.unsqueeze(dim), out).sum(dim)

    def over(self, positives: Tensor) -> Tensor:
        """log-sum-exp minus the positive's logit, in the order that rounds least."""
        return (self.maximum - positives) + self.total.log()


def _forward(logits: _Logits, symmetric: bool) -> tuple[Tensor, Tensor, list[_LogSumExp]]:
    """The loss, the positives' logits, and the log-sum-exps of rows and, if symmetric, of the positives' columns.

    Equations (1)-(2): with l the log-sum-exp over the others and z the positive's logit, a query's loss is
    log(exp(z) + exp(l)) - z = -log sigmoid(z - l).
    """
    positives = logits.new_empty(logits.batch_size)
    directions = [_LogSumExp.empty(positives) for _ in range(2 if symmetric else 1)]
    scratch = torch.empty_like(logits.buffer) if symmetric else logits.buffer
    for rows in logits.row_blocks():
        queries = logits.queries(rows)
        for tile in logits.tiles(rows):
            values = logits.compute(tile, queries, logits.passages(tile))
            if tile.holds_positives:
                positives[rows] = values.diagonal()
                values.diagonal().fill_(-torch.inf)
            if symmetric and tile.slot == 0:
                directions[1].merge(tile.columns, values, 0, out=_shaped(scratch, values.shape))
            directions[0].merge(rows, values, 1, out=values)
    losses = [-F.logsigmoid(-others.over(positives)).mean() for others in directions]
    return torch.stack(losses).mean(), positives, directions


@dataclass
class _Softmax:
    """What turns a tile of logits into its gradient: exp(z - maxima[d]) * scales[d] summed over directions d, and
    `of_positives` on the diagonal; (B,) each."""

    maxima: list[Tensor]
    scales: list[Tensor]
    of_positives: Tensor

    @classmethod
    def of(cls, positives: Tensor, directions: list[_LogSumExp], weight: Tensor) -> "_Softmax":
        """With p the softmax: weight * p, and at positives weight * (p - 1) = -weight * sigmoid(l - z).

        A total holds exp(0) = 1 for its largest logit, so saturated logits divide nothing by 0.
        """
        maxima = [torch.maximum(others.maximum, positives) for others in directions]
        scales = []
        for others, maximum in zip(directions, maxima, strict=True):
            total = others.total * torch.exp(others.maximum - maximum) + torch.exp(positives - maximum)
            scales.append(weight / total)
        missing = [torch.sigmoid(others.over(positives)) for others in directions]
        return cls(maxima, scales, -weight * sum(missing[1:], missing[0]))

    @property
    def symmetric(self) -> bool:
        """Whether there is a second direction."""
        return len(self.maxima) > 1


@dataclass
class _Gradients:
    """What the backward pass fills, None where not wanted: of the queries, of the passages, and of the temperature,
    dLoss/dt = -sum(dLoss/dz z) / t."""

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

    def like_inputs(self, logits: _Logits) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the dtypes, shapes and devices of the three inputs."""
        passages, temperature = self.passages, self.temperature
        if passages is not None:
            passages = passages.to(logits.passage_reps.dtype)
        if temperature is not None:
            temperature = temperature.to(logits.temperature).reshape(logits.temperature.shape)
        return self.queries, passages, temperature


def _backward(
    logits: _Logits, softmax: _Softmax, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of queries, passages and temperature: equations (6)-(8), every tile computed a second time."""
    gradients = _Gradients.zeros(logits, wanted)
    scratch = torch.empty_like(logits.buffer) if softmax.symmetric else logits.buffer
    kept = torch.empty_like(logits.buffer) if gradients.temperature is not None else None
    of_temperature = _PairwiseSum()
    for rows in logits.row_blocks():
        queries = logits.queries(rows)
        of_rows = _PairwiseSum()
        for tile in logits.tiles(rows):
            passages = logits.passages(tile)
            values = logits.compute(tile, queries, passages)
            if kept is not None:
                finite = torch.clamp_min(values, torch.finfo(values.dtype).min, out=_shaped(kept, values.shape))
            of_logits = _gradient_of_logits(tile, values, softmax, scratch)
            if kept is not None:
                of_temperature.add(finite.mul_(of_logits).sum())
            if gradients.passages is not None:
                into = gradients.passages[tile.passages]
                torch.addmm(into, of_logits.T, queries, out=into)
            if gradients.queries is not None:
                of_rows.add(torch.mm(of_logits, passages))
        if gradients.queries is not None:
            gradients.queries[rows] = of_rows.total()
    if gradients.temperature is not None:
        gradients.temperature -= of_temperature.total()
    return gradients.like_inputs(logits)


@shape_checked
def _gradient_of_logits(
    tile: _Tile, logits: Float[Tensor, "R C"], softmax: _Softmax, scratch: Tensor
) -> Float[Tensor, "R C"]:
    """dLoss/dlogits of one tile over the temperature, in place of the logits or, with two directions, in `scratch`."""
    of_columns = None
    if softmax.symmetric and tile.slot == 0:
        maximum, scale = softmax.maxima[1][tile.columns], softmax.scales[1][tile.columns]
        of_columns = _kept_exponentials(logits, maximum.unsqueeze(0), _shaped(scratch, logits.shape)).mul_(scale)
    maximum, scale = softmax.maxima[0][tile.rows], softmax.scales[0][tile.rows].unsqueeze(1)
    of_rows = _kept_exponentials(logits, maximum.unsqueeze(1), logits)
    gradient = of_rows.mul_(scale) if of_columns is None else of_columns.addcmul_(of_rows, scale)
    if tile.holds_positives:
        gradient.diagonal().copy_(softmax.of_positives[tile.rows])
    return gradient


def _kept_exponentials(logits: Tensor, maximum: Tensor, out: Tensor) -> Tensor:
    """`_exponentials`, where what is negligible (or masked) is exactly 0."""
    smallest = math.exp(NEGLIGIBLE_EXPONENT[logits.dtype] + 1)
    return F.threshold_(_exponentials(logits, maximum, out), smallest, 0.0)


def _exponentials(logits: Tensor, maximum: Tensor, out: Tensor) -> Tensor:
    """exp(logits - maximum) into `out`, which may be the logits themselves; never below exp(NEGLIGIBLE_EXPONENT)."""
    torch.sub(logits, maximum, out=out)
    return out.clamp_min_(NEGLIGIBLE_EXPONENT[out.dtype]).exp_()


class _PairwiseSum:
    """A sum in which partial sums of equally many terms meet: rounding grows with the logarithm of their number.

    Holds as many terms as that logarithm. The terms are overwritten.
    """

    def __init__(self):
        self.partial: list[Tensor] = []
        self.count = 0

    def add(self, term: Tensor) -> None:
        """Like adding 1 to a binary number: each carry adds two partial sums of the same size."""
        self.count += 1
        for _ in range((self.count & -self.count).bit_length() - 1):
            term += self.partial.pop()
        self.partial.append(term)

    def total(self) -> Tensor:
        """The sum of all terms; smallest partial sums first."""
        total = self.partial.pop()
        while self.partial:
            total += self.partial.pop()
        return total


def _shaped(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """The first numbers of a buffer, as a matrix of that shape."""
    return buffer.view(-1)[: shape[0] * shape[1]].view(shape[0], shape[1])
