"""Chapter 03's exercises: the negatives that accumulation keeps, the cells it sees, and accumulation itself.

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, C queries of a chunk.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .engine import Exercise, Misconception, Slip
from .judging import Inputs


def _sizes(rng: np.random.Generator, *, ragged: bool, hard_negatives: tuple[int, int]) -> Inputs:
    """Chunks of 4 to 6 queries; at least three whole ones, and with `ragged` a short one of 2 or more behind them."""
    chunk = int(rng.integers(4, 7))
    rest = int(rng.integers(2, chunk)) if ragged else 0
    low, high = hard_negatives
    return {
        "batch_size": chunk * int(rng.integers(3, 5)) + rest,
        "chunk_size": chunk,
        "hard_negatives": int(rng.integers(low, high + 1)),
    }


def _even(rng: np.random.Generator) -> Inputs:
    return _sizes(rng, ragged=False, hard_negatives=(0, 0))


def _even_with_hard_negatives(rng: np.random.Generator) -> Inputs:
    return _sizes(rng, ragged=False, hard_negatives=(2, 4))


def _ragged(rng: np.random.Generator) -> Inputs:
    return _sizes(rng, ragged=True, hard_negatives=(2, 4))


def _larger_than_the_batch(rng: np.random.Generator) -> Inputs:
    inputs = _sizes(rng, ragged=False, hard_negatives=(1, 3))
    return inputs | {"chunk_size": inputs["batch_size"] + int(rng.integers(1, 5))}


def _rows_of(batch_size: int, chunk_size: int) -> list[range]:
    """The queries of each chunk; the last may be short."""
    return [range(start, min(start + chunk_size, batch_size)) for start in range(0, batch_size, chunk_size)]


def _counts(rule: Callable[[int, int], int], batch_size: int, chunk_size: int) -> list[int]:
    """rule(queries of the chunk, queries up to its end) for every query."""
    return [rule(len(rows), rows.stop) for rows in _rows_of(batch_size, chunk_size) for _ in rows]


def _reference_negatives(batch_size: int, chunk_size: int, hard_negatives: int) -> list[int]:
    seen = _reference_block_mask(batch_size, chunk_size, hard_negatives)
    return [int(row.sum()) - 1 for row in seen]


negatives_seen = Exercise(
    chapter=3,
    name="negatives_seen",
    spec="for each of the B queries, against how many wrong passages accumulation holds it (a list of B ints).",
    line_budget=3,
    oracle=_reference_negatives,
    makers=(_even_with_hard_negatives, _ragged, _larger_than_the_batch),
    whole=True,
    misconceptions=(
        Misconception(
            "short last chunk counted whole",
            "Right for whole chunks, and where C is larger than B. Where C does not divide B the last chunk is short.",
            lambda b, c, k: [min(c, b) * (1 + k) - 1] * b,
        ),
        Misconception(
            "groups of K",
            "It looks as if each query brings K passages: its positive is one more, 1 + K.",
            lambda b, c, k: _counts(lambda rows, i: rows * k - 1, b, c),
        ),
        Misconception(
            "hard negatives only",
            "Those are the hard negatives of the chunk: the other queries' positives are negatives too.",
            lambda b, c, k: _counts(lambda rows, i: rows * k, b, c),
        ),
        Misconception(
            "short last chunk dropped",
            "The queries of the short last chunk are missing: they are trained too.",
            lambda b, c, k: [c * (1 + k) - 1] * (b // c * c),
        ),
        Misconception(
            "chunks counted, not their rows",
            "It looks as if the number of chunks stands where their size belongs.",
            lambda b, c, k: [-(-b // c) * (1 + k) - 1] * b,
        ),
        Misconception(
            "short chunk first",
            "The numbers are right, but not their order: the last chunk is the short one.",
            lambda b, c, k: sorted(_reference_negatives(b, c, k)),
        ),
        Misconception(
            "one number for all",
            "That is the sum: a number for each query is asked for.",
            lambda b, c, k: sum(_reference_negatives(b, c, k)),
        ),
        Misconception(
            "negatives of the full batch",
            "Those are the negatives of the full batch. Accumulating gradients does not bring the chunks' passages "
            "together: a query is held against those of its own chunk only.",
            lambda b, c, k: [b * (1 + k) - 1] * b,
        ),
        Misconception(
            "earlier chunks remembered",
            "It looks as if a query also sees the passages of the chunks before its own. They are gone: every chunk "
            "has a loss of its own, and nothing is kept but gradients.",
            lambda b, c, k: _counts(lambda rows, stop: stop * (1 + k) - 1, b, c),
        ),
        Misconception(
            "hard negatives forgotten",
            "That is C - 1: every query of the chunk brings its K hard negatives too, and they count for all.",
            lambda b, c, k: _counts(lambda rows, stop: rows - 1, b, c),
        ),
        Misconception(
            "own hard negatives only",
            "That is C - 1 + K: a query is held against the hard negatives of every query of its chunk, not only its "
            "own.",
            lambda b, c, k: _counts(lambda rows, stop: rows - 1 + k, b, c),
        ),
        Misconception(
            "own hard negatives left out",
            "That is (C - 1) (1 + K): the query's own K hard negatives are wrong passages as well.",
            lambda b, c, k: _counts(lambda rows, stop: (rows - 1) * (1 + k), b, c),
        ),
        Misconception(
            "positive counted",
            "That is one too many: one of the C (1 + K) passages is the query's own positive.",
            lambda b, c, k: _counts(lambda rows, stop: rows * (1 + k), b, c),
        ),
        Misconception(
            "one number a chunk",
            "Those are the right numbers, but one for each chunk: give one for each query.",
            lambda b, c, k: [len(rows) * (1 + k) - 1 for rows in _rows_of(b, c)],
        ),
        Misconception(
            "short last chunk forgotten",
            "Right for whole chunks. Where C does not divide B the last chunk is short (and a chunk holds at most B "
            "queries): its queries have fewer passages beside them.",
            lambda b, c, k: [c * (1 + k) - 1] * b,
        ),
    ),
    hints=(
        "Take B = 7, C = 3, K = 1. Which queries share a chunk? How many passages do they bring, all together?",
        "A query in a chunk of n queries sees n (1 + K) passages, and one of them is right. n is C, but for the last "
        "chunk.",
        "Query i's chunk starts at row i // C * C. How many rows are left from there to B, and what if that "
        "is less than C?",
    ),
)


def _cells(batch_size: int, hard_negatives: int, rule: Callable[[int, int], bool]) -> Tensor:
    """bool (B, N): rule(i, owner) for query i and the query that passage j came with."""
    group = 1 + hard_negatives
    return torch.tensor([[rule(i, j // group) for j in range(batch_size * group)] for i in range(batch_size)])


def _by_column(batch_size: int, hard_negatives: int, rule: Callable[[int, int], bool]) -> Tensor:
    """The (B, N) table of `rule(i, j)`, for query i and passage j."""
    columns = range(batch_size * (1 + hard_negatives))
    return torch.tensor([[rule(i, j) for j in columns] for i in range(batch_size)])


def _reference_block_mask(batch_size: int, chunk_size: int, hard_negatives: int) -> Tensor:
    parts = [torch.ones(len(rows), len(rows) * (1 + hard_negatives)) for rows in _rows_of(batch_size, chunk_size)]
    return torch.block_diag(*parts).bool()


def _columns_cut_by_chunk_size(batch_size: int, chunk_size: int, hard_negatives: int) -> Tensor:
    """Passages dealt out C to a chunk, as if there were no hard negatives."""
    columns = torch.arange(batch_size * (1 + hard_negatives)) // chunk_size
    return torch.arange(batch_size)[:, None] // chunk_size == columns


block_mask = Exercise(
    chapter=3,
    name="block_mask",
    spec="bool (B, N): True where accumulation computes the logit of query i and passage j.",
    line_budget=3,
    oracle=_reference_block_mask,
    makers=(_even, _ragged, _larger_than_the_batch),
    misconceptions=(
        Misconception(
            "groups side by side",
            "It looks as if the square stands 1 + K times side by side (repeat): a query's group stands together "
            "(repeat_interleave).",
            lambda b, c, k: _reference_block_mask(b, c, 0).repeat(1, 1 + k),
        ),
        Misconception(
            "positives of the chunk only",
            "Only positives are lit: the hard negatives of the chunk's queries are in the chunk as well.",
            lambda b, c, k: _by_column(b, k, lambda i, j: i // c == j // (1 + k) // c and j % (1 + k) == 0),
        ),
        Misconception(
            "others' hard negatives left out",
            "The hard negatives of the other queries of the chunk are dark: a query is held against all passages "
            "of its chunk.",
            lambda b, c, k: _by_column(
                b, k, lambda i, j: i // c == j // (1 + k) // c and (j % (1 + k) == 0 or j // (1 + k) == i)
            ),
        ),
        Misconception(
            "positive left dark",
            "The query's own passage is dark: its logit is computed too.",
            lambda b, c, k: _by_column(b, k, lambda i, j: i // c == j // (1 + k) // c and j != i * (1 + k)),
        ),
        Misconception(
            "short last chunk dropped",
            "The short last chunk is dark: its logits are computed too.",
            lambda b, c, k: _by_column(b, k, lambda i, j: i // c == j // (1 + k) // c and i // c < b // c),
        ),
        Misconception(
            "C chunks, not chunks of C",
            "It looks as if there are C chunks: C is the number of queries in one.",
            lambda b, c, k: _by_column(b, k, lambda i, j: i * c // b == j // (1 + k) * c // b),
        ),
        Misconception(
            "groups of K",
            "It looks as if a group has K passages: it has 1 + K, the positive too.",
            lambda b, c, k: _by_column(b, k, lambda i, j: i // c == j // max(k, 1) // c),
        ),
        Misconception(
            "everything seen",
            "That is the full batch's matrix. Accumulation computes a logit only where query and passage share a "
            "chunk.",
            lambda b, c, k: torch.ones(b, b * (1 + k), dtype=torch.bool),
        ),
        Misconception(
            "lost cells, not seen ones",
            "That is the opposite: True must mean that accumulation computes the logit.",
            lambda b, c, k: ~_reference_block_mask(b, c, k),
        ),
        Misconception(
            "own passages only",
            "Only each query's own passages are True: the other queries of its chunk bring negatives too.",
            lambda b, c, k: _cells(b, k, lambda i, owner: i == owner),
        ),
        Misconception(
            "earlier chunks remembered",
            "It looks as if a query also sees the chunks before its own. Nothing of them is left but their gradients.",
            lambda b, c, k: _cells(b, k, lambda i, owner: owner // c <= i // c),
        ),
        Misconception(
            "a band, not blocks",
            "It looks as if a query sees the C - 1 neighbours on either side. A chunk has an edge: the first query of "
            "a chunk doesn't see the last one of the chunk before.",
            lambda b, c, k: _cells(b, k, lambda i, owner: abs(i - owner) < c),
        ),
        Misconception(
            "every C-th query",
            "It looks as if queries with the same place in their chunks go together (i % C). A chunk is C neighbours: "
            "i // C.",
            lambda b, c, k: _cells(b, k, lambda i, owner: i % c == owner % c),
        ),
        Misconception(
            "hard negatives left out",
            "That is the matrix of the B positives: with K hard negatives it has N = B (1 + K) columns.",
            lambda b, c, k: _reference_block_mask(b, c, 0),
        ),
        Misconception(
            "columns in steps of C",
            "The columns are cut every C passages: C queries bring C (1 + K) of them.",
            _columns_cut_by_chunk_size,
        ),
    ),
    hints=(
        "Query i is in chunk i // C. Which query does passage j belong to, and so which chunk?",
        "Passage j came with query j // (1 + K). Compare the two chunk numbers in all B x N cells: a column against a "
        "row.",
        "torch.arange(B) and torch.arange(B (1 + K)), each turned into chunk numbers by //; [:, None] makes a column "
        "of one of them, and == compares every cell.",
    ),
)

_TEMPERATURE = 0.3


class _MeanInfoNCE:
    """The loss that the exercise passes in: InfoNCE, averaged over the rows that it is given."""

    def __call__(self, queries: Tensor, passages: Tensor) -> Tensor:
        group = len(passages) // len(queries)
        return F.cross_entropy(queries @ passages.T / _TEMPERATURE, torch.arange(len(queries)) * group)

    def __repr__(self) -> str:
        return f"<InfoNCE, the mean over its queries, temperature {_TEMPERATURE}>"

    def __deepcopy__(self, memo: dict) -> "_MeanInfoNCE":
        return self


def _reps(rng: np.random.Generator, rows: int) -> Tensor:
    return F.normalize(torch.from_numpy(rng.standard_normal((rows, 6))).float(), dim=1)


def _batch(rng: np.random.Generator, sizes: Inputs) -> Inputs:
    queries = sizes["batch_size"]
    return {
        "loss_fn": _MeanInfoNCE(),
        "queries": _reps(rng, queries),
        "passages": _reps(rng, queries * (1 + sizes["hard_negatives"])),
        "chunk_size": sizes["chunk_size"],
    }


def _parts(loss_fn: Callable, queries: Tensor, passages: Tensor, chunk_size: int) -> list[tuple[Tensor, int]]:
    """(loss, queries) of each chunk."""
    group = len(passages) // len(queries)
    return [
        (loss_fn(queries[rows.start : rows.stop], passages[rows.start * group : rows.stop * group]), len(rows))
        for rows in _rows_of(len(queries), chunk_size)
    ]


def _reference_accumulate(loss_fn: Callable, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    """The mean over all queries of each query's loss among the passages of its chunk, a row at a time."""
    hard_negatives = len(passages) // len(queries) - 1
    lost = ~_reference_block_mask(len(queries), chunk_size, hard_negatives)
    logits = (queries @ passages.T / _TEMPERATURE).masked_fill(lost, -torch.inf)
    own = torch.arange(len(queries))
    return (logits.logsumexp(dim=1) - logits[own, own * (1 + hard_negatives)]).mean()


def _unweighted_mean(loss_fn: Callable, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    return torch.stack([loss for loss, _ in _parts(loss_fn, queries, passages, chunk_size)]).mean()


def _passages_by_query_rows(loss_fn: Callable, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    losses = [
        loss_fn(queries[rows.start : rows.stop], passages[rows.start : rows.stop]) * len(rows)
        for rows in _rows_of(len(queries), chunk_size)
    ]
    return sum(losses) / len(queries)


def _split_alike(loss_fn: Callable, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    """C passages for C queries; what is left of the passages meets nobody."""
    pairs = zip(queries.split(chunk_size), passages.split(chunk_size), strict=False)
    return sum(loss_fn(q, p) * len(q) for q, p in pairs) / len(queries)


def _weighted_by_chunk_size(loss_fn: Callable, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    return sum(loss for loss, _ in _parts(loss_fn, queries, passages, chunk_size)) * chunk_size / len(queries)


def _all_passages(loss_fn: Callable, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    losses = [
        loss_fn(queries[rows.start : rows.stop], passages) * len(rows) for rows in _rows_of(len(queries), chunk_size)
    ]
    return sum(losses) / len(queries)


def _without_short_chunk(loss_fn: Callable, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    parts = [loss for loss, rows in _parts(loss_fn, queries, passages, chunk_size) if rows == chunk_size]
    return torch.stack(parts).mean() if parts else torch.zeros(())


_CUT = "C queries bring C (1 + K) passages, so passages.split(chunk_size * (1 + K))."

accumulate = Exercise(
    chapter=3,
    name="accumulate",
    spec="the loss whose gradient accumulation adds up: the chunks' own losses, each weighted by its share of the "
    "queries.",
    line_budget=8,
    oracle=_reference_accumulate,
    makers=(
        lambda rng: _batch(rng, _even(rng)),
        lambda rng: _batch(rng, _ragged(rng) | {"hard_negatives": 0}),
        lambda rng: _batch(rng, _ragged(rng)),
        lambda rng: _batch(rng, _larger_than_the_batch(rng)),
    ),
    differentiable=True,
    misconceptions=(
        Misconception(
            "divided by the passages",
            "The chunks are weighted right, but divided by the N passages: the loss is a mean over the B queries.",
            lambda f, q, p, c: _reference_accumulate(f, q, p, c) * len(q) / len(p),
        ),
        Misconception(
            "weighted by the passages",
            "The chunks are weighted with their passages and divided by the queries: take one of them for both.",
            lambda f, q, p, c: _reference_accumulate(f, q, p, c) * len(p) / len(q),
        ),
        Misconception(
            "hard negatives left out",
            "Only the positives go into the loss: the hard negatives belong to the chunk too.",
            lambda f, q, p, c: _reference_accumulate(f, q, p[:: len(p) // len(q)], c),
        ),
        Misconception(
            "divided by the whole chunks",
            "It looks as if the sum is divided by B // C, which does not count the short last chunk.",
            lambda f, q, p, c: sum(loss for loss, _ in _parts(f, q, p, c)) / max(1, len(q) // c),
        ),
        Misconception(
            "C chunks, not chunks of C",
            "It looks as if the batch is cut into C chunks (torch.chunk): C is the number of queries in one.",
            lambda f, q, p, c: _reference_accumulate(f, q, p, -(-len(q) // c)),
        ),
        Misconception(
            "short last chunk dropped, its share too",
            "The short last chunk is left out: its queries are trained too.",
            lambda f, q, p, c: sum(loss * n for loss, n in _parts(f, q, p, c) if n == c) / len(q) + 0 * q.sum(),
        ),
        Misconception(
            "loss of the full batch",
            "That is the loss of the full batch, which is what accumulation does not compute: each chunk's queries "
            "may see the chunk's passages only.",
            lambda loss_fn, q, p, c: loss_fn(q, p),
        ),
        Misconception(
            "full batch divided by the chunk size",
            "That is the loss of the full batch divided by C. Dividing does not cut a batch: call loss_fn once a "
            "chunk.",
            lambda loss_fn, q, p, c: loss_fn(q, p) / c,
        ),
        Misconception(
            "sum instead of mean",
            "It looks as if the chunks' losses are added up. Each is a mean already: their sum, and its gradient, "
            "would grow with the number of chunks.",
            lambda loss_fn, q, p, c: sum(loss for loss, _ in _parts(loss_fn, q, p, c)),
        ),
        Misconception(
            "sum over the queries",
            "It looks as if each chunk's loss is multiplied by its queries, and the sum never divided by B.",
            lambda loss_fn, q, p, c: sum(loss * rows for loss, rows in _parts(loss_fn, q, p, c)),
        ),
        Misconception(
            "sum divided by the chunk size",
            "It looks as if the sum of the chunks' losses is divided by C. There are B / C of them, not C.",
            lambda loss_fn, q, p, c: sum(loss for loss, _ in _parts(loss_fn, q, p, c)) / c,
        ),
        Misconception(
            "last chunk only",
            "That is the loss of the last chunk alone: add the chunks up inside the loop.",
            lambda loss_fn, q, p, c: _parts(loss_fn, q, p, c)[-1][0],
        ),
        Misconception(
            "every chunk sees all passages",
            "It looks as if each chunk of queries meets all passages: then its positives stand in the wrong columns, "
            "and nothing is saved. Cut the passages too.",
            _all_passages,
        ),
        Misconception(
            "short last chunk weighted like a whole one",
            "Right where C divides B. A short last chunk must count by its share of the queries, len(chunk) / B; in "
            "the plain mean of the chunks its few queries would weigh more than the others.",
            _unweighted_mean,
        ),
        Misconception(
            "every chunk weighted with C / B",
            "Right where C divides B. It looks as if each chunk is weighted with C / B: a short last chunk, or one "
            "that is the whole batch, has len(chunk) queries, not C.",
            _weighted_by_chunk_size,
        ),
        Misconception(
            "short last chunk dropped",
            "It looks as if the short last chunk is left out: it holds queries too. (range(0, B, C) reaches it.)",
            _without_short_chunk,
        ),
        Misconception(
            "passages cut like queries",
            "Right without hard negatives. With K of them, queries start:stop bring passages start * (1 + K) : stop * "
            "(1 + K).",
            _passages_by_query_rows,
        ),
        Misconception(
            "passages split like queries",
            f"Right without hard negatives. It looks as if the passages are split every C, like the queries: {_CUT}",
            _split_alike,
        ),
    ),
    slips=(
        Slip(
            "more pieces of passages",
            f"zip(..., strict=True) finds more pieces in its second argument than in its first: {_CUT}",
            r"zip\(\) argument 2 is longer",
        ),
    ),
    hints=(
        "Loop over start = 0, C, 2C, ... below B. Which rows of the passages belong to the queries start : start + C?",
        "1 + K is len(passages) // len(queries): passages start * (1 + K) : (start + C) * (1 + K). loss_fn gives "
        "their mean, so weight it by the number of queries in the chunk, over B.",
        "The weight is the chunk's real length over B, so the last chunk has its own. Begin with 0 and add tensors: no "
        "item(), no backward, or the gradient is lost.",
    ),
)
