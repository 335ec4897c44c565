"""Tiles of logits: the log-sum-exps and the gradients that pass through them, one tile at a time.

Queries stand against a block of passages. On one device the block holds all of them (`gclib.losses.tiled`), around a
ring it holds one process's (`gclib.losses.ring`); the walk over the tiles is the same.

Passage j = i * (1 + K) + slot belongs to query i. Taken slot by slot, the logits are 1 + K matrices of queries against
queries' own passages; the positives are on a diagonal of slot 0, and slot 0 alone has a second direction. Other
directions (`gclib.losses.directions`) are blocks of the same kind, with other texts for rows and columns.

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, D dimensions; b queries and n of the
queries' passages of this block; R x C the sides of a tile. Source: Cheng et al. 2024 (arXiv 2410.17243).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gclib.losses.directions import QP, TEXTS, Directions, Side
from gclib.losses.masks import Restriction, Rule
from gclib.support.shapes import shape_checked

# exp(x) is not told from less below these x: far under one rounding of a sum that holds exp(0) = 1, and far above the
# subnormal numbers on which a CPU's exp and matrix product are 10 to 100 times slower.
NEGLIGIBLE_EXPONENT = {torch.float32: -60.0, torch.float64: -600.0}


@dataclass(frozen=True)
class Tile:
    """Queries `rows` against the passages that hold place `slot` among the 1 + K of the block's queries `columns`.

    own: the tile's diagonal is each query against its own; holds_positives: against its positive.
    """

    rows: slice
    columns: slice
    slot: int
    passages: slice
    own: bool
    holds_positives: bool


class Logits:
    """The (b, n * (1 + K)) logits of one block: one tile at a time, in one buffer, or `whole`.

    first: query i's positive is the first of the 1 + K passages at place first + i; None where this block of passages
    holds no positive of these queries. group: 1 + K. restriction: what is left out or weighed (`losses.masks`).
    without_own: a row's own texts are left out, for the block is one of texts that are no positives of each other.
    """

    def __init__(
        self,
        query_reps: Tensor,
        passage_reps: Tensor,
        temperature: float | Tensor,
        side: int,
        *,
        group: int,
        restriction: Restriction | None = None,
        first: int | None = 0,
        without_own: bool = False,
    ):
        self.query_reps, self.passage_reps = query_reps, passage_reps
        self.temperature, self.restriction, self.side = temperature, restriction, side
        self.group, self.first, self.without_own = group, first, without_own
        self.rows, self.columns = query_reps.shape[0], passage_reps.shape[0] // group
        self.dtype = torch.promote_types(query_reps.dtype, torch.float32)

    @cached_property
    def buffer(self) -> Tensor:
        """Room for one tile."""
        return self.new_empty(min(self.side, self.rows) * min(self.side, self.columns))

    def new_empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor of the dtype that everything is accumulated in."""
        return self.query_reps.new_empty(shape, dtype=self.dtype)

    def new_zeros(self, *shape: int) -> Tensor:
        """Zeros of that dtype."""
        return self.query_reps.new_zeros(shape, dtype=self.dtype)

    def row_blocks(self) -> Iterator[slice]:
        """Slices of at most `side` queries; the last may be short."""
        return _cut(0, self.rows, self.side)

    def column_blocks(self) -> Iterator[slice]:
        """Slices of at most `side` of the block's places; those of the positives are cut as the rows are."""
        first = 0 if self.first is None else self.first
        last = self.columns if self.first is None else first + self.rows
        for start, stop in ((0, first), (first, last), (last, self.columns)):
            yield from _cut(start, stop, self.side)

    def tiles(self, rows: slice) -> Iterator[Tile]:
        """The tiles of one block of queries, slot by slot."""
        own = None if self.first is None else slice(self.first + rows.start, self.first + rows.stop)
        for slot in range(self.group):
            for columns in self.column_blocks():
                start, stop = columns.start * self.group + slot, columns.stop * self.group
                positives = slot == 0 and columns == own and not self.without_own
                yield Tile(rows, columns, slot, slice(start, stop, self.group), columns == own, positives)

    def queries(self, rows: slice) -> Tensor:
        """(R, D): one block of queries, as they are."""
        return self.query_reps[rows].to(self.dtype)

    def passages(self, tile: Tile) -> Tensor:
        """(C, D): the tile's passages, as they are."""
        return self.passage_reps[tile.passages].to(self.dtype)

    def compute(self, tile: Tile, queries: Tensor, passages: Tensor) -> Tensor:
        """(R, C): the tile's logits in the buffer (the next tile overwrites it), masked ones at minus infinity."""
        shape = queries.shape[0], passages.shape[0]
        logits = torch.mm(queries, passages.T, out=_shaped(self.buffer, shape)).div_(self.temperature)
        mask = None if self.restriction is None else self.restriction.left_out(tile)
        if mask is not None:
            logits.masked_fill_(mask, -torch.inf)
        if self.without_own and tile.own:
            logits.diagonal().fill_(-torch.inf)
        return logits

    def weigh(self, tile: Tile, logits: Tensor) -> Tensor:
        """The tile's logits as the rows' sums take them, in place: hard ones made larger where a rule says so."""
        if self.restriction is not None:
            self.restriction.weigh(tile, logits)
        return logits

    def whole(self) -> tuple[Tensor, Tensor]:
        """(b, n * (1 + K)) with their graph: as the columns' sums take them, and weighed, as the rows' do."""
        logits = self.query_reps @ self.passage_reps.T / self.temperature
        if self.restriction is None and not self.without_own:
            return logits, logits
        mask, weight = torch.zeros_like(logits, dtype=torch.bool), None
        if self.restriction is not None and self.restriction.weighs:
            weight = logits.detach().clone()
        for tile in self.tiles(slice(0, self.rows)):
            left_out = None if self.restriction is None else self.restriction.left_out(tile)
            if left_out is not None:
                mask[:, tile.passages] = left_out
            if self.without_own and tile.own:
                mask[:, tile.passages].diagonal().fill_(True)
            if weight is not None:
                self.restriction.weigh(tile, weight[:, tile.passages])
        masked = logits.masked_fill(mask, -torch.inf)
        return masked, masked if weight is None else masked + (weight - logits.detach())


@dataclass(frozen=True)
class Layout:
    """What the two passes know beside representations: directions, tiles, and the rule with what it knows.

    first: the place of the rows' queries in the batch; group: 1 + K; own, against: what the rule knows of the texts in
    rows and in columns, None without a rule.
    """

    directions: Directions
    side: int
    group: int
    first: int | None
    rule: Rule | None
    own: Side | None
    against: Side | None

    def logits(
        self, direction: str, own: Side, against: Side, temperature: float | Tensor, *, with_positives: bool = False
    ) -> Logits:
        """The logits of one direction: this part's rows against the batch's columns. The positives' logits are those
        of query to passage; with_positives: they are left in passage to query too.
        """
        rows, columns = TEXTS[direction]
        restriction = None
        if self.rule is not None:
            restriction = Restriction(self.rule, direction, self.own, self.against, temperature)
        group = self.group if columns == "passages" else 1
        without_own = direction != QP and not with_positives
        placed = {"group": group, "first": self.first, "restriction": restriction, "without_own": without_own}
        return Logits(getattr(own, rows), getattr(against, columns), temperature, self.side, **placed)


@dataclass
class LogSumExp:
    """One direction's log-sum-exps over all but the positives: maximum + log(total), (B,) each.

    Apart, the two keep digits that their sum would lose; without the positive, the loss of an easy query and the
    gradient p - 1 of its positive come from what is left, not from a difference of numbers near 1.
    `maximum` starts at the lowest number there is and `total` at 0: minus infinity together. (Cheng et al.'s
    equation (4) is written from 0, which would count a logit of 0 that nobody has.)
    """

    maximum: Tensor
    total: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> "LogSumExp":
        """The log-sum-exp of no logits yet, minus infinity, for rows like these."""
        return cls(torch.full_like(like, torch.finfo(like.dtype).min), torch.zeros_like(like))

    def merge(self, at: slice, logits: Tensor, dim: int, out: Tensor) -> None:
        """Equations (3)-(5): take in a tile along `dim`; `out` (as big as the tile, or itself) is overwritten."""
        maximum = torch.maximum(self.maximum[at], logits.amax(dim))
        self.total[at] *= torch.exp(self.maximum[at] - maximum)
        self.maximum[at] = maximum
        self.total[at] += _exponentials(logits, maximum.unsqueeze(dim), out).sum(dim)

    def join(self, other: "LogSumExp") -> None:
        """Take in the sums over others of the same rows."""
        maximum = torch.maximum(self.maximum, other.maximum)
        self.total *= torch.exp(self.maximum - maximum)
        self.total += other.total * torch.exp(other.maximum - maximum)
        self.maximum.copy_(maximum)

    def over(self, positives: Tensor, copies: int = 1) -> Tensor:
        """log-sum-exp minus that of the positive's logit, counted so often, in the order that rounds least."""
        over = (self.maximum - positives) + self.total.log()
        return over if copies == 1 else over - math.log(copies)

    def losses(self, positives: Tensor, copies: int = 1) -> Tensor:
        """(B,): each query's loss, equations (1)-(2). With l the log-sum-exp over the others and z the positive's
        logit it is log(c exp(z) + exp(l)) - z = log c - log sigmoid(z + log c - l), for c copies of the positive."""
        losses = -F.logsigmoid(-self.over(positives, copies))
        return losses if copies == 1 else losses + math.log(copies)


def merge_logits(logits: Logits, positives: Tensor, directions: Sequence[LogSumExp]) -> None:
    """Take one block's logits into the log-sum-exps of its rows and, if there is a second direction, its columns (they
    may be the same sums).

    positives (b,): filled where the block holds them; they are left out of the log-sum-exps.
    """
    symmetric = len(directions) > 1
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
            directions[0].merge(rows, logits.weigh(tile, values), 1, out=values)


@dataclass
class Softmax:
    """What turns a tile of logits into its gradient: exp(z - maxima[d]) * scales[d] summed over directions d, and
    `of_positives` on the diagonal; (B,) each."""

    maxima: list[Tensor]
    scales: list[Tensor]
    of_positives: Tensor

    @classmethod
    def of(cls, positives: Tensor, directions: list[LogSumExp], weight: Tensor, copies: int = 1) -> "Softmax":
        """With p the softmax: weight * p, and at positives weight * (p - 1) = -weight * sigmoid(l - z).

        copies: how often a direction counts the positive; p is then all of them. A total holds exp(0) = 1 for its
        largest logit, so saturated logits divide nothing by 0.
        """
        maxima = [torch.maximum(others.maximum, positives) for others in directions]
        scales = []
        for others, maximum in zip(directions, maxima, strict=True):
            total = others.total * torch.exp(others.maximum - maximum)
            scales.append(weight / torch.add(total, torch.exp(positives - maximum), alpha=copies))
        missing = [torch.sigmoid(others.over(positives, copies)) for others in directions]
        return cls(maxima, scales, -weight * sum(missing[1:], missing[0]))

    def facing(self, *directions: int) -> "Softmax":
        """For a block whose rows, and columns if named, are summed in these directions."""
        return Softmax([self.maxima[d] for d in directions], [self.scales[d] for d in directions], self.of_positives)

    @property
    def symmetric(self) -> bool:
        """Whether there is a second direction."""
        return len(self.maxima) > 1

    @shape_checked
    def of_tile(self, block: Logits, tile: Tile, logits: Float[Tensor, "R C"], scratch: Tensor) -> Float[Tensor, "R C"]:
        """dLoss/dlogits of one tile over the temperature: the logits or, with two directions, `scratch` hold it."""
        of_columns = None
        if self.symmetric and tile.slot == 0:
            maximum, scale = self.maxima[1][tile.columns], self.scales[1][tile.columns]
            of_columns = _kept_exponentials(logits, maximum.unsqueeze(0), _shaped(scratch, logits.shape)).mul_(scale)
        maximum, scale = self.maxima[0][tile.rows], self.scales[0][tile.rows].unsqueeze(1)
        of_rows = _kept_exponentials(block.weigh(tile, logits), maximum.unsqueeze(1), logits)
        gradient = of_rows.mul_(scale) if of_columns is None else of_columns.addcmul_(of_rows, scale)
        if tile.holds_positives:
            gradient.diagonal().copy_(self.of_positives[tile.rows])
        return gradient


@dataclass
class Gradients:
    """What the backward pass adds to, None where not wanted: of the queries, of the block's passages, and of the
    temperature, dLoss/dt = -sum(dLoss/dz z) / t."""

    queries: Tensor | None
    passages: Tensor | None
    temperature: Tensor | None


def add_gradients(logits: Logits, softmax: Softmax, gradients: Gradients) -> None:
    """Add one block's gradients of queries, passages and temperature: equations (6)-(8), every tile computed again."""
    scratch = torch.empty_like(logits.buffer) if softmax.symmetric else logits.buffer
    finite_values = torch.empty_like(logits.buffer) if gradients.temperature is not None else None
    of_temperature = PairwiseSum()
    for rows in logits.row_blocks():
        queries = logits.queries(rows)
        of_rows = PairwiseSum()
        for tile in logits.tiles(rows):
            passages = logits.passages(tile)
            values = logits.compute(tile, queries, passages)
            if finite_values is not None:
                finite = torch.clamp_min(
                    values, torch.finfo(values.dtype).min, out=_shaped(finite_values, values.shape)
                )
            of_logits = softmax.of_tile(logits, tile, values, scratch)
            if finite_values is not None:
                of_temperature.add(finite.mul_(of_logits).sum())
            if gradients.passages is not None:
                into = gradients.passages[tile.passages]
                torch.addmm(into, of_logits.T, queries, out=into)
            if gradients.queries is not None:
                of_rows.add(torch.mm(of_logits, passages))
        if gradients.queries is not None:
            gradients.queries[rows] += of_rows.total()
    if gradients.temperature is not None:
        gradients.temperature -= of_temperature.total()


def _kept_exponentials(logits: Tensor, maximum: Tensor, out: Tensor) -> Tensor:
    """`_exponentials`, where what is negligible (or masked) is exactly 0."""
    smallest = math.exp(NEGLIGIBLE_EXPONENT[logits.dtype] + 1)
    return F.threshold_(_exponentials(logits, maximum, out), smallest, 0.0)


def _exponentials(logits: Tensor, maximum: Tensor, out: Tensor) -> Tensor:
    """exp(logits - maximum) into `out`, which may be the logits themselves; never below exp(NEGLIGIBLE_EXPONENT)."""
    torch.sub(logits, maximum, out=out)
    return out.clamp_min_(NEGLIGIBLE_EXPONENT[out.dtype]).exp_()


class PairwiseSum:
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


def _cut(start: int, stop: int, side: int) -> Iterator[slice]:
    """[start, stop) in slices of at most `side`."""
    for place in range(start, stop, side):
        yield slice(place, min(place + side, stop))
