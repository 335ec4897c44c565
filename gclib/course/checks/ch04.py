"""Chapter 04's exercises: the gradient at the queries, the surrogate, a linear encoder in chunks, the bytes in between.

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, D dimensions.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .engine import Exercise, Misconception
from .judging import Inputs

_AUTOGRAD = frozenset({"autograd", "backward", "grad"})  # for exercises that ask for the formula itself


def _numbers(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).float()


def _reps(rng: np.random.Generator, temperature: tuple[float, float]) -> Inputs:
    rows, width = int(rng.integers(3, 8)), int(rng.integers(3, 7))
    queries, passages = _numbers(rng, rows, width), _numbers(rng, rows, width)
    return {
        "query_reps": queries / queries.norm(dim=1, keepdim=True),
        "passage_reps": passages / passages.norm(dim=1, keepdim=True),
        "temperature": round(float(rng.uniform(*temperature)), 3),
    }


def _sharp(rng: np.random.Generator) -> Inputs:
    return _reps(rng, (0.1, 0.4))


def _blunt(rng: np.random.Generator) -> Inputs:
    return _reps(rng, (1.5, 3.0))


def _differentiated(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient of a scalar function, by autograd."""
    leaf = at.detach().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


def _gradient_by_definition(query_reps: Tensor, passage_reps: Tensor, temperature: float) -> Tensor:
    """Equation (1), differentiated in double precision."""

    def loss(queries: Tensor) -> Tensor:
        logits = queries @ passage_reps.double().T / temperature
        return (logits.logsumexp(dim=1) - logits.diagonal()).mean()

    return _differentiated(loss, query_reps.double()).float()


def _pull(query_reps: Tensor, passage_reps: Tensor, temperature: float, over: int = 1) -> Tensor:
    """sum_j P_ij p_j - p_i for each query, not yet divided by anything."""
    probabilities = (query_reps @ passage_reps.T / temperature).softmax(dim=over)
    return probabilities @ passage_reps - passage_reps


def _without_positive(query_reps: Tensor, passage_reps: Tensor, temperature: float) -> Tensor:
    pulled = _pull(query_reps, passage_reps, temperature) + passage_reps
    return pulled / (len(query_reps) * temperature)


representation_gradient = Exercise(
    chapter=4,
    name="representation_gradient",
    spec="equation (5) for all queries at once: dL/dq of the contrastive loss, (B, D), without autograd.",
    line_budget=2,
    without=_AUTOGRAD,
    oracle=_gradient_by_definition,
    makers=(_sharp, _blunt),
    misconceptions=(
        Misconception(
            "temperature forgotten outside",
            "The probabilities are right, but the logits are similarities divided by the temperature, and the chain "
            "rule divides by it once more, outside the bracket.",
            lambda q, p, t: _pull(q, p, t) / len(q),
        ),
        Misconception(
            "temperature forgotten inside",
            "It looks as if the softmax is taken of the similarities: divide them by the temperature first.",
            lambda q, p, t: _pull(q, p, 1.0) / (len(q) * t),
        ),
        Misconception(
            "temperature ignored",
            "It looks as if the temperature plays no part: it divides the similarities, and the result once more.",
            lambda q, p, t: _pull(q, p, 1.0) / len(q),
        ),
        Misconception(
            "multiplied by the temperature",
            "It looks as if the bracket is multiplied by the temperature: it is divided by it.",
            lambda q, p, t: _pull(q, p, t) * t / len(q),
        ),
        Misconception(
            "mean forgotten",
            "It is B times too large: the loss is a mean over the B queries.",
            lambda q, p, t: _pull(q, p, t) / t,
        ),
        Misconception(
            "wrong sign",
            "That is minus the gradient, the direction in which the loss falls.",
            lambda q, p, t: -_pull(q, p, t) / (len(q) * t),
        ),
        Misconception(
            "softmax over the wrong axis",
            "It looks as if the softmax runs down the columns, over the queries: P_ij is query i's choice among the "
            "passages, so each row sums to 1.",
            lambda q, p, t: _pull(q, p, t, over=0) / (len(q) * t),
        ),
        Misconception(
            "positive forgotten",
            "It looks as if only the probabilities' mean of the passages is there: the query's own passage is taken "
            "off it.",
            _without_positive,
        ),
        Misconception(
            "the passages' gradient",
            "That is the gradient at the passages, equation (6): the queries are asked for.",
            lambda q, p, t: ((q @ p.T / t).softmax(dim=1).T @ q - q) / (len(q) * t),
        ),
    ),
    hints=(
        "First the matrix of probabilities, P. What does row i, times all passages, give?",
        "The mean of the passages under row i, minus the query's own passage; then the two divisions, by B and by the "
        "temperature.",
        "p = (query_reps @ passage_reps.T / temperature).softmax(dim=1), then (p @ passage_reps - passage_reps) / "
        "(B * temperature).",
    ),
)


def _surrogate_case(rng: np.random.Generator, *, rows: int) -> Inputs:
    width = int(rng.integers(3, 7))
    return {"reps": _numbers(rng, rows, width), "cached": _numbers(rng, rows, width)}


def _chunk_of_many(rng: np.random.Generator) -> Inputs:
    return _surrogate_case(rng, rows=int(rng.integers(3, 8)))


def _chunk_of_one(rng: np.random.Generator) -> Inputs:
    return _surrogate_case(rng, rows=1)


def _reference_surrogate(reps: Tensor, cached: Tensor) -> Tensor:
    """One product after the other."""
    return sum(r * u for r, u in zip(reps.flatten(), cached.detach().flatten(), strict=True))


def _value_and_gradients(result: object, reps: Tensor, cached: Tensor) -> object:
    """The surrogate with what a backward from it leaves at the representations and at the cache."""
    found: list = [None, None]
    if isinstance(result, Tensor) and result.ndim == 0 and result.requires_grad:
        found = list(torch.autograd.grad(result, [reps, cached], retain_graph=True, allow_unused=True))
        result = result.detach()
    blank = [torch.zeros_like(reps), torch.zeros_like(cached)]
    found = [zero if gradient is None else gradient for gradient, zero in zip(found, blank, strict=True)]
    return {"value": result, "gradient of reps": found[0], "gradient of cached": found[1]}


def _detached_or_not(name: str, message: str, wrong: Callable[[Tensor, Tensor], Tensor]) -> list[Misconception]:
    """The mistake alone, and together with a cache that is not detached."""
    both = f"{message} (And the cache is not detached.)"
    return [
        Misconception(name, message, lambda r, u: wrong(r, u.detach())),
        Misconception(f"{name}, cache not detached", both, wrong),
    ]


surrogate = Exercise(
    chapter=4,
    name="surrogate",
    spec="the dot product of reps and cached, (rows, D) each, as a scalar whose gradient at reps is cached; cached "
    "itself must get no gradient.",
    line_budget=1,
    oracle=_reference_surrogate,
    makers=(_chunk_of_many, _chunk_of_one),
    outcome=_value_and_gradients,
    differentiable=True,
    misconceptions=(
        *_detached_or_not(
            "mean over everything",
            "It looks as if the products are averaged: then every gradient is divided by their number. The mean over B "
            "is in the cached gradients already.",
            lambda r, u: (r * u).mean(),
        ),
        *_detached_or_not(
            "mean over the rows",
            "It looks as if the rows are averaged: then every gradient is divided by the rows of the chunk. The mean "
            "over B is in the cached gradients already.",
            lambda r, u: (r * u).sum(dim=1).mean(),
        ),
        *_detached_or_not(
            "wrong sign",
            "That is minus the surrogate: an optimizer goes down the gradient by itself.",
            lambda r, u: -(r * u).sum(),
        ),
        Misconception(
            "cosine instead of dot product",
            "It looks as if vectors are normalised: a cosine forgets how long the cached gradient is, and its own "
            "gradient points elsewhere. The surrogate is the plain dot product.",
            lambda r, u: torch.cosine_similarity(r, u.detach(), dim=1).sum(),
        ),
        Misconception(
            "cached gradient normalised",
            "It looks as if the cached gradients are brought to length 1: their lengths say how much each row counts.",
            lambda r, u: (r * torch.nn.functional.normalize(u.detach(), dim=1)).sum(),
        ),
        Misconception(
            "cache not detached",
            "The value is right, but the cache gets a gradient too: here it is a constant, so detach it. If its graph "
            "were alive, you would differentiate through the loss a second time.",
            lambda r, u: (r * u).sum(),
        ),
        Misconception(
            "representations detached",
            "No gradient can reach the encoder: the cache is the constant, not the representations.",
            lambda r, u: (r.detach() * u).sum(),
        ),
        Misconception(
            "gradient cut off",
            "The value is right and nothing else: .detach(), .item(), torch.tensor(...) or no_grad cut the graph "
            "off, and the graph is all that the surrogate is for.",
            lambda r, u: (r * u).sum().detach(),
        ),
        Misconception(
            "all pairs",
            "It looks as if every row meets every cached gradient: row i belongs with cached gradient i alone.",
            lambda r, u: (r @ u.detach().T).sum(),
        ),
        Misconception(
            "squared distance",
            "That is a distance to the cached gradient: it is no target that representations should reach. The "
            "surrogate is the plain dot product.",
            lambda r, u: ((r - u.detach()) ** 2).sum(),
        ),
    ),
    hints=(
        "Which function of reps has the constant cached as its gradient? Think of one number first: c * x.",
        "The sum of all products, reps times cached, with cached cut off from its graph.",
        "return (reps * cached.detach()).sum()",
    ),
)


def _linear_case(rng: np.random.Generator, *, ragged: bool) -> Inputs:
    wide, narrow, size = int(rng.integers(4, 6)), int(rng.integers(2, 4)), int(rng.integers(2, 5))
    sizes = [size] * int(rng.integers(2, 5)) + ([1] if ragged else [])
    return {
        "inputs": [_numbers(rng, rows, wide) for rows in sizes],
        "cached": [_numbers(rng, rows, narrow) for rows in sizes],
    }


def _even_chunks(rng: np.random.Generator) -> Inputs:
    return _linear_case(rng, ragged=False)


def _ragged_chunks(rng: np.random.Generator) -> Inputs:
    return _linear_case(rng, ragged=True)


def _linear_by_definition(inputs: list[Tensor], cached: list[Tensor]) -> Tensor:
    """The sum of all u . W x, differentiated at any W: it is linear."""

    def surrogates(weight: Tensor) -> Tensor:
        return sum((u * (x @ weight.T)).sum() for x, u in zip(inputs, cached, strict=True))

    return _differentiated(surrogates, torch.zeros(cached[0].shape[1], inputs[0].shape[1]))


def _products(inputs: list[Tensor], cached: list[Tensor]) -> list[Tensor]:
    return [u.T @ x for x, u in zip(inputs, cached, strict=True)]


linear_gradient = Exercise(
    chapter=4,
    name="linear_gradient",
    spec="equation (8) for r = W x: dL/dW, (D, X), from lists of chunks: inputs (rows, X), cached gradients (rows, D).",
    line_budget=2,
    without=_AUTOGRAD,
    oracle=_linear_by_definition,
    makers=(_even_chunks, _ragged_chunks),
    misconceptions=(
        Misconception(
            "mean over the chunks",
            "It looks as if the chunks are averaged: equation (8) is a sum, and the mean over B is in the cached "
            "gradients already.",
            lambda inputs, cached: torch.stack(_products(inputs, cached)).mean(dim=0),
        ),
        Misconception(
            "last chunk only",
            "That is the last chunk's share alone: the chunks' gradients are added, as .grad adds them.",
            lambda inputs, cached: _products(inputs, cached)[-1],
        ),
        Misconception(
            "mean over all rows",
            "It looks as if the sum is divided by the number of rows: the mean over B is in the cached gradients "
            "already.",
            lambda inputs, cached: sum(_products(inputs, cached)) / sum(map(len, inputs)),
        ),
        Misconception(
            "stacked, not summed",
            "Those are the chunks' shares side by side: equation (8) adds them up.",
            lambda inputs, cached: torch.stack(_products(inputs, cached)),
        ),
        Misconception(
            "a list, not a sum",
            "Those are the chunks' shares in a list: equation (8) adds them up.",
            _products,
        ),
        Misconception(
            "transposed",
            "It looks transposed: W is (D, X), so each row of the answer belongs to one of the D dimensions.",
            lambda inputs, cached: sum(_products(inputs, cached)).T,
        ),
        Misconception(
            "mean over the rows",
            "It looks as if each chunk is averaged over its rows: equation (8) sums over them.",
            lambda inputs, cached: sum(p / len(x) for p, x in zip(_products(inputs, cached), inputs, strict=True)),
        ),
        Misconception(
            "rows added before they are multiplied",
            "It looks as if inputs and cached gradients are each added up before they meet: each row's gradient goes "
            "with that row's input.",
            lambda inputs, cached: sum(torch.outer(u.sum(0), x.sum(0)) for x, u in zip(inputs, cached, strict=True)),
        ),
    ),
    hints=(
        "One row first: r = W x, so the gradient of u . r in W is the outer product of u and x.",
        "For a chunk, the outer products of its rows add up to u.T @ x; then add the chunks.",
        "return sum(u.T @ x for x, u in zip(inputs, cached, strict=True))",
    ),
)


def _sizes(rng: np.random.Generator, hard_negatives: tuple[int, int]) -> Inputs:
    low, high = hard_negatives
    return {
        "batch_size": int(rng.integers(20, 5000)),
        "dimensions": int(rng.choice([64, 128, 384, 768])),
        "hard_negatives": int(rng.integers(low, high + 1)),
    }


def _with_hard_negatives(rng: np.random.Generator) -> Inputs:
    return _sizes(rng, (2, 5))


def _without_hard_negatives(rng: np.random.Generator) -> Inputs:
    return _sizes(rng, (0, 0))


bytes_to_store = Exercise(
    chapter=4,
    name="bytes_to_store",
    spec="the bytes of the float32 gradient cache, an int: one cached gradient for each text of the batch.",
    line_budget=2,
    oracle=lambda batch_size, dimensions, hard_negatives: sum(
        rows * dimensions * 4 for rows in [batch_size] * (2 + hard_negatives)
    ),
    makers=(_with_hard_negatives, _without_hard_negatives),
    whole=True,
    rtol=0,
    atol=0,
    misconceptions=(
        Misconception(
            "hard negatives forgotten",
            "That counts one passage for each query: its K hard negatives are encoded too, and get a gradient each.",
            lambda b, d, k: 2 * b * d * 4,
        ),
        Misconception(
            "queries only",
            "Those are the queries alone: the passages have cached gradients too, |S| + |T| in all.",
            lambda b, d, k: b * d * 4,
        ),
        Misconception(
            "passages only",
            "Those are the passages alone: the queries have cached gradients too, |S| + |T| in all.",
            lambda b, d, k: b * (1 + k) * d * 4,
        ),
        Misconception(
            "numbers, not bytes",
            "That is how many numbers there are: a float32 number takes 4 bytes.",
            lambda b, d, k: b * (2 + k) * d,
        ),
        Misconception(
            "twice as much",
            "That is twice as much. A float32 number takes 4 bytes, not 8; and once the cache is there, the "
            "representations need not be kept beside it.",
            lambda b, d, k: 2 * b * (2 + k) * d * 4,
        ),
        Misconception(
            "the logits",
            "Those are the B x N logits: they live only while the loss does. The cache holds D numbers a text.",
            lambda b, d, k: b * b * (1 + k) * 4,
        ),
        Misconception(
            "as many queries as passages",
            "It looks as if there were as many queries as passages, 2 B (1 + K) texts: hard negatives are passages, so "
            "there are B queries and B (1 + K) passages.",
            lambda b, d, k: 2 * b * (1 + k) * d * 4,
        ),
        Misconception(
            "B + K texts",
            "It looks as if there were B + K texts: every query brings a passage and K hard negatives of its own.",
            lambda b, d, k: (b + k) * d * 4,
        ),
        Misconception(
            "MiB, not bytes",
            "That is in MiB (2**20 bytes): the answer is asked for in bytes.",
            lambda b, d, k: b * (2 + k) * d * 4 / 2**20,
        ),
        Misconception(
            "batch and negatives added",
            "It looks as if K is added to the passages once: every query brings K of its own.",
            lambda b, d, k: (2 * b + k) * d * 4,
        ),
    ),
    hints=(
        "How many texts go through an encoder in one step: queries, positives, hard negatives?",
        "B queries and B (1 + K) passages, D numbers each, 4 bytes a number.",
        "return batch_size * (2 + hard_negatives) * dimensions * 4",
    ),
)
