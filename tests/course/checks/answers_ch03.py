"""Chapter 03's exercises, answered as readers do."""

import math

import numpy as np
import torch

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch03")

right("negatives_seen")(lambda B, C, K: [min(C, B - i // C * C) * (1 + K) - 1 for i in range(B)])
right("negatives_seen")(lambda B, C, K: [n * (1 + K) - 1 for n in [C] * (B // C) + [B % C] for _ in range(n)])
right("negatives_seen")(lambda B, C, K: tuple(min(C, B - i // C * C) * (1 + K) - 1 for i in range(B)))
right("negatives_seen")(lambda B, C, K: [(min((i // C + 1) * C, B) - i // C * C) * (K + 1) - 1 for i in range(B)])


@right("negatives_seen")
def by_numpy(B, C, K):
    chunk = np.arange(B) // C
    return list((chunk[:, None] == chunk).sum(axis=1) * (1 + K) - 1)


@right("negatives_seen")
def by_loop(B, C, K):
    counts = []
    for start in range(0, B, C):
        rows = len(range(start, min(start + C, B)))
        counts.extend([rows * (1 + K) - 1] * rows)
    return counts


def per_chunk(B, C, K, count):
    return [count(min(C, B - s)) for s in range(0, B, C) for _ in range(min(C, B - s))]


wrong("negatives_seen", "short last chunk forgotten", "last chunk whole")(lambda B, C, K: [C * (1 + K) - 1] * B)
wrong("negatives_seen", "short last chunk counted whole", "min(C, B)")(lambda B, C, K: [min(C, B) * (1 + K) - 1] * B)
wrong("negatives_seen", "hard negatives forgotten", "no K")(lambda B, C, K: per_chunk(B, C, K, lambda n: n - 1))
wrong("negatives_seen", "positive counted", "positive counted")(
    lambda B, C, K: per_chunk(B, C, K, lambda n: n * (1 + K))
)
wrong("negatives_seen", "own hard negatives only", "own K only")(
    lambda B, C, K: per_chunk(B, C, K, lambda n: n - 1 + K)
)
wrong("negatives_seen", "own hard negatives left out", "(n-1)(1+K)")(
    lambda B, C, K: per_chunk(B, C, K, lambda n: (n - 1) * (1 + K))
)
wrong("negatives_seen", "negatives of the full batch", "full batch")(lambda B, C, K: [B * (1 + K) - 1] * B)
wrong("negatives_seen", "one number a chunk", "one per chunk")(
    lambda B, C, K: [min(C, B - s) * (1 + K) - 1 for s in range(0, B, C)]
)
wrong("negatives_seen", "groups of K", "nK - 1")(lambda B, C, K: per_chunk(B, C, K, lambda n: n * K - 1))
wrong("negatives_seen", "another form", "tensor")(
    lambda B, C, K: torch.tensor(per_chunk(B, C, K, lambda n: n * (1 + K) - 1))
)
wrong("negatives_seen", "another form", "numpy")(
    lambda B, C, K: np.array(per_chunk(B, C, K, lambda n: n * (1 + K) - 1))
)
wrong("negatives_seen", "a float for an int", "floats")(
    lambda B, C, K: per_chunk(B, C, K, lambda n: float(n * (1 + K) - 1))
)
wrong("negatives_seen", "one number for all", "sum")(lambda B, C, K: sum(per_chunk(B, C, K, lambda n: n * (1 + K) - 1)))
wrong("negatives_seen", "short last chunk dropped", "last chunk dropped")(
    lambda B, C, K: [C * (1 + K) - 1] * (B // C * C)
)
wrong("negatives_seen", "earlier chunks remembered", "earlier chunks")(
    lambda B, C, K: [min((i // C + 1) * C, B) * (1 + K) - 1 for i in range(B)]
)
wrong("negatives_seen", "hard negatives only", "nK")(lambda B, C, K: per_chunk(B, C, K, lambda n: n * K))
wrong("negatives_seen", "positive counted", "remainder at every")(
    lambda B, C, K: [(C if i < B // C * C else B % C) * (1 + K) for i in range(B)]
)
wrong("negatives_seen", "chunks counted, not their rows", "number of chunks as size")(
    lambda B, C, K: [-(-B // C) * (1 + K) - 1] * B
)
wrong("negatives_seen", "short chunk first", "remainder first")(
    lambda B, C, K: sorted(per_chunk(B, C, K, lambda n: n * (1 + K) - 1))
)
wrong("negatives_seen", "own hard negatives left out", "negatives off: -1-K")(
    lambda B, C, K: per_chunk(B, C, K, lambda n: n * (1 + K) - 1 - K)
)


@right("block_mask")
def repeated(B, C, K):
    chunk = torch.arange(B) // C
    return (chunk[:, None] == chunk).repeat_interleave(1 + K, 1)


right("block_mask")(lambda B, C, K: torch.arange(B)[:, None] // C == torch.arange(B * (1 + K)) // (C * (1 + K)))
right("block_mask")(
    lambda B, C, K: torch.tensor([[i // C == j // (1 + K) // C for j in range(B * (1 + K))] for i in range(B)])
)
right("block_mask")(
    lambda B, C, K: torch.block_diag(*[torch.ones(n, n * (1 + K)) for n in [C] * (B // C) + [B % C] if n]).bool()
)


@right("block_mask")
def filled(B, C, K):
    mask = torch.zeros(B, B * (1 + K), dtype=torch.bool)
    for s in range(0, B, C):
        mask[s : s + C, s * (1 + K) : (s + C) * (1 + K)] = True
    return mask


@right("block_mask")
def from_numpy(B, C, K):
    chunk = np.arange(B) // C
    return torch.from_numpy(np.equal.outer(chunk, np.repeat(chunk, 1 + K)))


wrong("block_mask", "hard negatives left out", "no K")(lambda B, C, K: repeated(B, C, 0))
wrong("block_mask", "columns in steps of C", "columns cut by C")(
    lambda B, C, K: torch.arange(B)[:, None] // C == torch.arange(B * (1 + K)) // C
)
wrong("block_mask", "groups side by side", "tiled")(lambda B, C, K: repeated(B, C, 0).repeat(1, 1 + K))
wrong("block_mask", "lost cells, not seen ones", "inverted")(lambda B, C, K: ~repeated(B, C, K))
wrong("block_mask", "another form", "ints")(lambda B, C, K: repeated(B, C, K).long())
wrong("block_mask", "another form", "floats")(lambda B, C, K: repeated(B, C, K).float())
wrong("block_mask", "another form", "numpy")(lambda B, C, K: repeated(B, C, K).numpy())
wrong("block_mask", "another form", "list")(lambda B, C, K: repeated(B, C, K).tolist())
wrong("block_mask", None, "transposed")(lambda B, C, K: repeated(B, C, K).T)
wrong("block_mask", "everything seen", "full")(lambda B, C, K: torch.ones(B, B * (1 + K), dtype=torch.bool))
wrong("block_mask", "earlier chunks remembered", "earlier chunks")(
    lambda B, C, K: torch.arange(B)[:, None] // C >= torch.arange(B * (1 + K)) // (C * (1 + K))
)
wrong("block_mask", "own passages only", "positive only")(
    lambda B, C, K: torch.eye(B).repeat_interleave(1 + K, 1).bool()
)
wrong("block_mask", "others' hard negatives left out", "own negatives, others' positives")(
    lambda B, C, K: torch.tensor(
        [
            [i // C == j // (1 + K) // C and (j % (1 + K) == 0 or j // (1 + K) == i) for j in range(B * (1 + K))]
            for i in range(B)
        ]
    )
)
wrong("block_mask", "positive left dark", "positive not lit")(
    lambda B, C, K: torch.tensor(
        [[i // C == j // (1 + K) // C and j != i * (1 + K) for j in range(B * (1 + K))] for i in range(B)]
    )
)
wrong("block_mask", "short last chunk dropped", "last chunk dropped")(
    lambda B, C, K: torch.tensor(
        [[i // C == j // (1 + K) // C and i // C < B // C for j in range(B * (1 + K))] for i in range(B)]
    )
)
wrong("block_mask", "every C-th query", "modulo")(
    lambda B, C, K: torch.arange(B)[:, None] % C == (torch.arange(B * (1 + K)) // (1 + K)) % C
)
wrong("block_mask", "C chunks, not chunks of C", "C chunks instead of chunks of C")(
    lambda B, C, K: torch.arange(B)[:, None] * C // B == torch.arange(B * (1 + K)) // (1 + K) * C // B
)
wrong("block_mask", "a band, not blocks", "band")(
    lambda B, C, K: (torch.arange(B)[:, None] - torch.arange(B * (1 + K)) // (1 + K)).abs() < C
)
wrong("block_mask", "positives of the chunk only", "positives of the chunk only")(
    lambda B, C, K: torch.tensor(
        [[i // C == j // (1 + K) // C and j % (1 + K) == 0 for j in range(B * (1 + K))] for i in range(B)]
    )
)
wrong("block_mask", "groups of K", "K columns to a query")(
    lambda B, C, K: torch.tensor([[i // C == j // max(K, 1) // C for j in range(B * (1 + K))] for i in range(B)])
)


def cut(q, p, C):
    group = len(p) // len(q)
    return list(zip(q.split(C), p.split(C * group), strict=True))


right("accumulate")(lambda f, q, p, C: sum(f(a, b) * len(a) for a, b in cut(q, p, C)) / len(q))
right("accumulate")(lambda f, q, p, C: sum(f(a, b) * (len(a) / len(q)) for a, b in cut(q, p, C)))
right("accumulate")(lambda f, q, p, C: torch.stack([f(a, b) * len(a) / len(q) for a, b in cut(q, p, C)]).sum())


@right("accumulate")
def by_index(loss_fn, queries, passages, chunk_size):
    total, group = queries.new_zeros(()), len(passages) // len(queries)
    for start in range(0, len(queries), chunk_size):
        end = min(start + chunk_size, len(queries))
        total = total + loss_fn(queries[start:end], passages[start * group : end * group]) * (end - start)
    return total / len(queries)


@right("accumulate")
def in_place_total(loss_fn, queries, passages, chunk_size):
    total = torch.zeros((), dtype=queries.dtype)
    for a, b in cut(queries, passages, chunk_size):
        total += len(a) / len(queries) * loss_fn(a, b)
    return total


@right("accumulate")
def by_view(loss_fn, queries, passages, chunk_size):
    grouped = passages.view(len(queries), -1, passages.shape[1])
    parts = zip(queries.split(chunk_size), grouped.split(chunk_size), strict=True)
    return sum(loss_fn(a, b.flatten(0, 1)) * len(a) for a, b in parts) / len(queries)


wrong("accumulate", "sum instead of mean", "sum")(lambda f, q, p, C: sum(f(a, b) for a, b in cut(q, p, C)))
wrong("accumulate", "short last chunk weighted like a whole one", "plain mean")(
    lambda f, q, p, C: torch.stack([f(a, b) for a, b in cut(q, p, C)]).mean()
)
wrong("accumulate", "short last chunk weighted like a whole one", "divided by ceil")(
    lambda f, q, p, C: sum(f(a, b) for a, b in cut(q, p, C)) / math.ceil(len(q) / C)
)
wrong("accumulate", "divided by the whole chunks", "divided by B // C")(
    lambda f, q, p, C: sum(f(a, b) for a, b in cut(q, p, C)) / max(1, len(q) // C)
)
wrong("accumulate", "every chunk weighted with C / B", "C / B for each")(
    lambda f, q, p, C: sum(f(a, b) * C / len(q) for a, b in cut(q, p, C))
)
wrong("accumulate", "loss of the full batch", "full batch")(lambda f, q, p, C: f(q, p))
wrong("accumulate", "sum over the queries", "weights forgotten to normalise")(
    lambda f, q, p, C: sum(f(a, b) * len(a) for a, b in cut(q, p, C))
)
wrong("accumulate", "divided by the passages", "divided by N")(
    lambda f, q, p, C: sum(f(a, b) * len(a) for a, b in cut(q, p, C)) / len(p)
)
wrong("accumulate", "every chunk sees all passages", "all passages")(
    lambda f, q, p, C: sum(f(a, p) * len(a) for a in q.split(C)) / len(q)
)
wrong("accumulate", "passages split like queries", "same slices")(
    lambda f, q, p, C: sum(f(q[s : s + C], p[s : s + C]) * len(q[s : s + C]) for s in range(0, len(q), C)) / len(q)
)
wrong("accumulate", "graph cut off", "detached")(
    lambda f, q, p, C: sum(f(a, b).detach() * len(a) for a, b in cut(q, p, C)) / len(q)
)
wrong("accumulate", "another form", "item")(
    lambda f, q, p, C: sum(f(a, b).item() * len(a) for a, b in cut(q, p, C)) / len(q)
)
wrong("accumulate", "another form", "list")(lambda f, q, p, C: [f(a, b) * len(a) / len(q) for a, b in cut(q, p, C)])
wrong("accumulate", "hard negatives left out", "positives only")(
    lambda f, q, p, C: (
        sum(f(a, b) * len(a) for a, b in zip(q.split(C), p[:: len(p) // len(q)].split(C), strict=True)) / len(q)
    )
)
wrong("accumulate", "graph cut off", "detached passages")(
    lambda f, q, p, C: sum(f(a, b.detach()) * len(a) for a, b in cut(q, p, C)) / len(q)
)
wrong("accumulate", None, "group K instead of 1 + K")(
    lambda f, q, p, C: (
        sum(
            f(a, p[s * (len(p) // len(q) - 1) :][: len(a) * (len(p) // len(q))]) * len(a)
            for s, a in zip(range(0, len(q), C), q.split(C), strict=True)
        )
        / len(q)
    )
)
wrong("accumulate", "short last chunk dropped, its share too", "short chunk dropped")(
    lambda f, q, p, C: sum(f(a, b) * len(a) for a, b in cut(q, p, C) if len(a) == C) / len(q) + 0 * q.sum()
)
wrong("accumulate", "last chunk only", "last loss")(lambda f, q, p, C: [f(a, b) for a, b in cut(q, p, C)][-1])
wrong("accumulate", "weighted by the passages", "passages wrapped: rest of the matrix")(
    lambda f, q, p, C: sum(f(a, b) * len(b) for a, b in cut(q, p, C)) / len(q)
)
wrong("accumulate", "C chunks, not chunks of C", "chunk(C): C chunks")(
    lambda f, q, p, C: (
        sum(
            f(a, b) * len(a)
            for a, b in zip(q.chunk(C), p.view(len(q), -1, p.shape[1]).chunk(C), strict=True)
            for b in [b.flatten(0, 1)]
        )
        / len(q)
    )
)


@wrong("accumulate", "backward inside", "backward inside")
def backward_inside(loss_fn, queries, passages, chunk_size):
    total = 0
    for a, b in cut(queries, passages, chunk_size):
        loss = loss_fn(a, b) * len(a) / len(queries)
        loss.backward()
        total += loss.detach()
    return total


@wrong("accumulate", "graph cut off", "under no_grad")
def no_grad(loss_fn, queries, passages, chunk_size):
    with torch.no_grad():
        return sum(loss_fn(a, b) * len(a) for a, b in cut(queries, passages, chunk_size)) / len(queries)
