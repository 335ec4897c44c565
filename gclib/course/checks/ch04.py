"""Chapter 04's exercises: the gradient at the passages, the surrogate, a linear encoder, the bytes in between.

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, D dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .engine import Exercise, Misconception, Slip
from .judging import Inputs

_AUTOGRAD = frozenset({"autograd", "backward", "grad"})  # for exercises that ask for the formula itself


def _numbers(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).float()


def _reps(rng: np.random.Generator, temperature: tuple[float, float], hard: tuple[int, int] = (1, 3)) -> Inputs:
    rows, width = int(rng.integers(3, 8)), int(rng.integers(3, 7))
    queries, passages = (_numbers(rng, count, width) for count in (rows, rows * (1 + int(rng.integers(*hard)))))
    return {
        "query_reps": queries * torch.from_numpy(rng.uniform(0.5, 1.5, (rows, 1))).float(),
        "passage_reps": passages / passages.norm(dim=1, keepdim=True),
        "temperature": round(float(rng.uniform(*temperature)), 3),
    }


def _sharp(rng: np.random.Generator) -> Inputs:
    return _reps(rng, (0.1, 0.4))


def _blunt(rng: np.random.Generator) -> Inputs:
    return _reps(rng, (1.5, 3.0))


def _no_hard_negatives(rng: np.random.Generator) -> Inputs:
    return _reps(rng, (0.1, 0.4), hard=(0, 1))


def _very_sharp(rng: np.random.Generator) -> Inputs:
    """Similarities above 1 at a temperature of a hundredth: their exponentials are beyond float32."""
    inputs = _reps(rng, (0.01, 0.015))
    group = len(inputs["passage_reps"]) // len(inputs["query_reps"])
    own = inputs["query_reps"] * 2 + 0.5 * _numbers(rng, *inputs["query_reps"].shape)
    inputs["passage_reps"][::group] = own / own.norm(dim=1, keepdim=True) * 1.5
    return inputs


def _differentiated(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient of a scalar function, by autograd."""
    leaf = at.detach().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


def _gradient_by_definition(query_reps: Tensor, passage_reps: Tensor, temperature: float) -> Tensor:
    """Equation (1) with hard negatives, differentiated in double precision."""

    def loss(passages: Tensor) -> Tensor:
        logits, rows = query_reps.double() @ passages.T / temperature, torch.arange(len(query_reps))
        return (logits.logsumexp(dim=1) - logits[rows, rows * (len(passages) // len(query_reps))]).mean()

    return _differentiated(loss, passage_reps.double()).float()


@dataclass(frozen=True)
class _Gradient:
    """The gradient at the passages, right but for what is changed: P.T @ q - own.T @ q, over B times temperature.

    own: "first" of each group, the "group", the first "B" passages, or "none"
    """

    weights: Callable[[Tensor, float], Tensor] = lambda z, t: (z / t).softmax(dim=1)
    own: str = "first"
    divisor: Callable[[int, int, float], float] = lambda rows, passages, t: rows * t

    def __call__(self, q: Tensor, p: Tensor, t: float) -> Tensor:
        group, one = len(p) // len(q), torch.eye(len(q))
        found = self.weights(q @ p.T, t).T @ q
        if self.own == "first":
            found[::group] -= q
        elif self.own == "group":
            found -= one.repeat_interleave(group, dim=1).T @ q
        elif self.own == "B":
            found[: len(q)] -= q
        return found / self.divisor(len(q), len(p), t)


def _queries_gradient(q: Tensor, p: Tensor, t: float) -> Tensor:
    return ((q @ p.T / t).softmax(dim=1) @ p - p[:: len(p) // len(q)]) / (len(q) * t)


representation_gradient = Exercise(
    chapter=4,
    name="representation_gradient",
    spec="equation (6) with K hard negatives for each query: dL/dp of the contrastive loss at all N = B * (1 + K) "
    "passages, (N, D), without autograd.",
    line_budget=4,
    without=_AUTOGRAD,
    oracle=_gradient_by_definition,
    makers=(_sharp, _blunt, _no_hard_negatives, _very_sharp),
    rtol=1e-3,
    atol=5e-4,
    misconceptions=(
        Misconception(
            "-q for the whole group",
            "It looks as if -q_i is added to all passages of a query's group: only its positive is pulled, its hard "
            "negatives are not.",
            _Gradient(own="group"),
        ),
        Misconception(
            "the first B passages are the positives",
            "It looks as if the first B passages were the positives: they stand first in their groups, in rows 0, "
            "1 + K, 2 (1 + K), ...",
            _Gradient(own="B"),
        ),
        Misconception(
            "positive forgotten",
            "It looks as if -q_i is missing: a positive is pulled towards its query.",
            _Gradient(own="none"),
        ),
        Misconception(
            "positives only",
            "It looks as if the probabilities are missing: every passage is pushed away, in proportion to them.",
            _Gradient(weights=lambda z, t: torch.zeros_like(z)),
        ),
        Misconception(
            "temperature forgotten outside",
            "The probabilities are right, but the logits are similarities divided by the temperature, and the chain "
            "rule divides by it once more, outside the bracket.",
            _Gradient(divisor=lambda rows, passages, t: rows),
        ),
        Misconception(
            "temperature forgotten inside",
            "It looks as if the softmax is taken of the similarities: divide them by the temperature first.",
            _Gradient(weights=lambda z, t: z.softmax(dim=1)),
        ),
        Misconception(
            "temperature ignored",
            "It looks as if the temperature plays no part: it divides the similarities, and the result once more.",
            _Gradient(weights=lambda z, t: z.softmax(dim=1), divisor=lambda rows, passages, t: rows),
        ),
        Misconception(
            "multiplied by the temperature",
            "It looks as if the bracket is multiplied by the temperature: it is divided by it.",
            _Gradient(divisor=lambda rows, passages, t: rows / t),
        ),
        Misconception(
            "mean forgotten",
            "It is B times too large: the loss is a mean over the B queries.",
            _Gradient(divisor=lambda rows, passages, t: t),
        ),
        Misconception(
            "mean over the passages",
            "It looks as if it is divided by the N passages: the loss is a mean over the B queries.",
            _Gradient(divisor=lambda rows, passages, t: passages * t),
        ),
        Misconception(
            "wrong sign",
            "That is minus the gradient, the direction in which the loss falls.",
            _Gradient(divisor=lambda rows, passages, t: -rows * t),
        ),
        Misconception(
            "softmax over the wrong axis",
            "It looks as if the softmax runs down the columns, over the queries: P_ij is query i's choice among the "
            "passages, so each row sums to 1.",
            _Gradient(weights=lambda z, t: (z / t).softmax(dim=0)),
        ),
        Misconception(
            "logits for probabilities",
            "It looks as if the logits stand where the probabilities belong: softmax along each row.",
            _Gradient(weights=lambda z, t: z / t),
        ),
        Misconception(
            "exponentials as they are",
            "Right at mild temperatures. Exponentials of large logits overflow: softmax takes the maximum off first.",
            _Gradient(weights=lambda z, t: (z / t).exp() / (z / t).exp().sum(dim=1, keepdim=True)),
        ),
        Misconception(
            "normalised once more",
            "It looks as if representations are normalised first: take them as they come.",
            lambda q, p, t: _Gradient()(*(torch.nn.functional.normalize(r, dim=1) for r in (q, p)), t),
        ),
        Misconception(
            "half divided",
            "The probabilities' part is divided by B and the temperature, -q_i is not: the bracket is.",
            lambda q, p, t: _Gradient(own="none")(q, p, t) + _Gradient(lambda z, t: 0 * z)(q, p, t) * len(q) * t,
        ),
        Misconception(
            "the queries' gradient",
            "That is the gradient at the queries, equation (5): the passages are asked for.",
            _queries_gradient,
        ),
    ),
    slips=(
        Slip(
            "shapes of queries and passages",
            "The shapes do not fit: there are B queries and N = B (1 + K) passages, and P is (B, N). Every "
            "passage sums over queries, P.T @ q; and there are only B positives to take -q_i off.",
            "shapes cannot be multiplied|must match the size of tensor",
        ),
    ),
    hints=(
        "First P, one row for each query over all N passages. Which matrix product sums over the queries?",
        "P.T @ query_reps has a row for each passage. Which of these rows belong to a positive, and what is taken off "
        "them? Then the two divisions.",
        "The positives are every (1 + K)-th row, with K from the two lengths; hard negatives have nobody's "
        "-q_i. A slice with a step reaches them all at once.",
    ),
)


def _surrogate_case(rng: np.random.Generator, *, rows: int) -> Inputs:
    width = int(rng.integers(3, 7))
    loss = torch.tensor(float(rng.uniform(0.5, 6.0)))
    return {"reps": _numbers(rng, rows, width), "cached": _numbers(rng, rows, width), "loss": loss}


def _chunk_of_many(rng: np.random.Generator) -> Inputs:
    return _surrogate_case(rng, rows=int(rng.integers(3, 8)))


def _chunk_of_one(rng: np.random.Generator) -> Inputs:
    return _surrogate_case(rng, rows=1)


def _dot(reps: Tensor, cached: Tensor) -> Tensor:
    """One product after the other."""
    return sum(r * u for r, u in zip(reps.flatten(), cached.detach().flatten(), strict=True))


def _shown(number: Tensor, loss: Tensor) -> Tensor:
    """`number` with its gradients, and the value of `loss`."""
    return number + (loss - number).detach()


def _value_and_gradients(result: object, reps: Tensor, cached: Tensor, loss: Tensor) -> object:
    """The number, with what a backward from it leaves at the representations, at the cache and at the loss."""
    found: list = [None, None, None]
    inputs = [reps, cached, loss]
    if isinstance(result, Tensor) and result.ndim == 0 and result.requires_grad:
        found = list(torch.autograd.grad(result, inputs, retain_graph=True, allow_unused=True))
        result = result.detach()
    found = [torch.zeros_like(x) if gradient is None else gradient for gradient, x in zip(found, inputs, strict=True)]
    names = ("gradient of reps", "gradient of cached", "gradient of loss")
    return {"value": result, **dict(zip(names, found, strict=True))}


def _shown_or_not(name: str, message: str, wrong: Callable[[Tensor, Tensor], Tensor]) -> list[Misconception]:
    """The mistake with the loss's value, without it, and with a cache that is not detached."""
    return [
        Misconception(name, message, lambda r, u, loss: _shown(wrong(r, u.detach()), loss)),
        Misconception(
            f"{name}, another value",
            f"{message} (And its value is not the loss.)",
            lambda r, u, loss: wrong(r, u.detach()),
        ),
        Misconception(
            f"{name}, cache not detached",
            f"{message} (And the cache is not detached.)",
            lambda r, u, loss: _shown(wrong(r, u), loss),
        ),
    ]


surrogate = Exercise(
    chapter=4,
    name="surrogate",
    spec="a scalar with the value of loss, whose gradient at reps is cached, (rows, D) each; cached and loss get none.",
    line_budget=2,
    oracle=lambda reps, cached, loss: _shown(_dot(reps, cached), loss),
    makers=(_chunk_of_many, _chunk_of_one),
    outcome=_value_and_gradients,
    differentiable=True,
    misconceptions=(
        Misconception(
            "value of the dot product",
            "The gradient is right, but the value is that of the dot product, which is not the loss. A constant "
            "changes a value and no gradient: which one is missing?",
            lambda r, u, loss: _dot(r, u),
        ),
        Misconception(
            "loss on top of the dot product",
            "The gradient is right, but the value is the loss plus the dot product: take its value off first, as a "
            "constant.",
            lambda r, u, loss: _dot(r, u) + loss.detach(),
        ),
        Misconception(
            "loss not detached",
            "Value and gradient at reps are right, but the loss gets a gradient too: only its value is wanted. If its "
            "graph were alive, it would be backpropagated a second time.",
            lambda r, u, loss: _dot(r - r.detach(), u) + loss,
        ),
        Misconception(
            "the loss itself",
            "That is the loss: its gradient does not reach reps, which were encoded after it.",
            lambda r, u, loss: loss,
        ),
        Misconception(
            "gradient cut off",
            "The value is right and nothing else: .detach(), .item(), torch.tensor(...) or no_grad cut the graph off, "
            "or the dot product is taken off with its gradient.",
            lambda r, u, loss: loss.detach(),
        ),
        Misconception(
            "scaled to the loss",
            "The value is right, but by a factor: it scales the gradient as well. A constant that is added does not.",
            lambda r, u, loss: _dot(r, u) / _dot(r, u).detach() * loss.detach(),
        ),
        Misconception(
            "times the loss",
            "It looks as if the dot product is multiplied with the loss: so is its gradient. Only add.",
            lambda r, u, loss: _dot(r, u) * loss.detach(),
        ),
        Misconception(
            "dot product taken off the loss",
            "It looks as if the dot product is taken off the loss: the gradient has the wrong sign.",
            lambda r, u, loss: loss.detach() - _dot(r, u),
        ),
        *_shown_or_not(
            "mean over everything",
            "It looks as if the products are averaged: then every gradient is divided by their number. The mean over B "
            "is in the cached gradients already.",
            lambda r, u: (r * u).mean(),
        ),
        *_shown_or_not(
            "mean over the rows",
            "It looks as if the rows are averaged: then every gradient is divided by the rows of the chunk. The mean "
            "over B is in the cached gradients already.",
            lambda r, u: (r * u).sum(dim=1).mean(),
        ),
        *_shown_or_not(
            "wrong sign",
            "The gradient has the wrong sign: an optimizer goes down the gradient by itself.",
            lambda r, u: -(r * u).sum(),
        ),
        *_shown_or_not(
            "cosine instead of dot product",
            "It looks as if vectors are normalised: a cosine forgets how long the cached gradient is, and its own "
            "gradient points elsewhere. The surrogate is the plain dot product.",
            lambda r, u: torch.cosine_similarity(r, u, dim=1).sum(),
        ),
        *_shown_or_not(
            "all pairs",
            "It looks as if every row meets every cached gradient: row i belongs with cached gradient i alone.",
            lambda r, u: (r @ u.T).sum(),
        ),
        *_shown_or_not(
            "squared distance",
            "That is a distance to the cached gradient: it is no target that representations should reach.",
            lambda r, u: ((r - u) ** 2).sum(),
        ),
        *_shown_or_not(
            "half the squared distance",
            "That is a distance to the cached gradient: it is no target that representations should reach.",
            lambda r, u: ((r - u) ** 2).sum() / 2,
        ),
        Misconception(
            "cache not detached",
            "The value is right, but the cache gets a gradient too: here it is a constant, so detach it. If its graph "
            "were alive, you would differentiate through the loss a second time.",
            lambda r, u, loss: _shown((r * u).sum(), loss),
        ),
        Misconception(
            "representations detached",
            "No gradient can reach the encoder: the cache is the constant, not the representations.",
            lambda r, u, loss: loss.detach() + (r.detach() * u.detach()).sum() - (r.detach() * u).sum(),
        ),
        Misconception(
            "dot product's value added",
            "The dot product was detached whole, and added to the loss: then nothing has a gradient.",
            lambda r, u, loss: (r * u).sum().detach() + loss.detach(),
        ),
    ),
    hints=(
        "Which function of reps has the constant cached as its gradient? Think of one number first: c * x.",
        "The sum of all products, reps times cached, cached cut off from its graph, has the gradient. Which "
        "constant turns its value into that of the loss?",
        "x - x.detach() is 0, and its gradient is that of x. What must be added to such a zero?",
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
    slips=(
        Slip(
            "shapes of a product",
            "The shapes do not fit: u is (rows, D), x is (rows, X), and the sum runs over the rows: u.T @ x.",
            "shapes cannot be multiplied",
        ),
        Slip(
            "stack of unequal chunks",
            "Right until a chunk is short: torch.stack wants equal shapes. torch.cat joins chunks of any length.",
            "stack expects each tensor to be equal size",
        ),
    ),
    misconceptions=(
        Misconception(
            "first chunk only",
            "That is the first chunk's part: the chunks add up.",
            lambda inputs, cached: _products(inputs, cached)[0],
        ),
        Misconception(
            "all rows added before they are multiplied",
            "It looks as if all rows are added before they are multiplied: each row's u meets its own x.",
            lambda inputs, cached: torch.outer(sum(u.sum(dim=0) for u in cached), sum(x.sum(dim=0) for x in inputs)),
        ),
        Misconception(
            "last chunk left out",
            "It looks as if the last chunk is left out.",
            lambda inputs, cached: sum(_products(inputs, cached)[:-1]),
        ),
        Misconception(
            "short chunk left out",
            "Right until a chunk is short: it looks as if the short one is left out.",
            lambda inputs, cached: sum(
                product
                for product, x in zip(_products(inputs, cached), inputs, strict=True)
                if len(x) == len(inputs[0])
            ),
        ),
        Misconception(
            "chunks weighted by their rows",
            "It looks as if the chunks are weighted with their share of the rows: the cached gradients are those "
            "of one loss over all rows, so add them up.",
            lambda inputs, cached: (
                sum(product * len(x) for product, x in zip(_products(inputs, cached), inputs, strict=True))
                / sum(map(len, inputs))
            ),
        ),
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
        "Check the shape: dL/dW is (D, X), u is (rows, D), x is (rows, X). Which of the two is transposed?",
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
        "Add the texts up first, then two factors. Does anything of the encoder itself come in?",
    ),
)
