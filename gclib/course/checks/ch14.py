"""Chapter 14's exercises: the loss of chunk and bank, SigLIP's loss, what a budget pays for, and a momentum encoder.

Letters: B queries, C queries of a chunk, M kept pairs, K hard negatives of a query, N = B * (1 + K) passages.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .engine import Exercise, Misconception, Slip
from .judging import Inputs

# --- the loss of a chunk and of what is kept ------------------------------------------------------------------


def _rows(rng: np.random.Generator, count: int, dimensions: int) -> Tensor:
    return torch.from_numpy(rng.normal(size=(count, dimensions))).div(math.sqrt(dimensions)).requires_grad_()


def _chunk_and_bank(rng: np.random.Generator, *, kept: bool = True) -> Inputs:
    chunk, dimensions = int(rng.integers(3, 7)), int(rng.integers(4, 8))
    bank = int(rng.integers(chunk + 1, 3 * chunk)) if kept else int(rng.integers(1, chunk))
    rows = {"queries": chunk, "passages": chunk, "kept_queries": bank, "kept_passages": bank}
    inputs = {name: _rows(rng, count, dimensions) for name, count in rows.items()}
    return {**inputs, "temperature": round(float(rng.uniform(0.2, 0.6)), 3)}


def _reference_bank(
    queries: Tensor, passages: Tensor, kept_queries: Tensor, kept_passages: Tensor, temperature: float
) -> Tensor:
    """Query by query, each against every passage there is."""
    constants = [part.detach() for part in kept_passages]
    asked = [*zip(queries, passages, strict=True), *zip(kept_queries.detach(), constants, strict=True)]
    against = [*passages, *constants]
    losses = []
    for query, own in asked:
        exponents = torch.stack([query.dot(other) for other in against]) / temperature
        losses.append(torch.logsumexp(exponents, 0) - query.dot(own) / temperature)
    return sum(losses) / len(losses)


def _value_and_gradients(
    loss: object, queries: Tensor, passages: Tensor, kept_queries: Tensor, kept_passages: Tensor, temperature: float
) -> dict:
    parts = {"queries": queries, "passages": passages, "kept queries": kept_queries, "kept passages": kept_passages}
    slopes = [None] * len(parts)
    if isinstance(loss, Tensor) and loss.requires_grad and loss.ndim == 0:
        slopes = torch.autograd.grad(loss, list(parts.values()), allow_unused=True)
    filled = [torch.zeros_like(p) if s is None else s for p, s in zip(parts.values(), slopes, strict=True)]
    value = loss.detach() if isinstance(loss, Tensor) else loss
    return {"loss": value} | {f"gradient of {name}": slope for name, slope in zip(parts, filled, strict=True)}


def _mean_loss(q: Tensor, p: Tensor, temperature: float, labels: Tensor | None = None) -> Tensor:
    labels = torch.arange(len(q)) if labels is None else labels
    return F.cross_entropy(q @ p.T / temperature, labels)


def _kept_first(q: Tensor, p: Tensor, kq: Tensor, kp: Tensor, t: float) -> Tensor:
    """Passages in the other order than queries: the labels are another pair's."""
    return _mean_loss(torch.cat([q, kq.detach()]), torch.cat([kp.detach(), p]), t)


def _each_apart(q: Tensor, p: Tensor, kq: Tensor, kp: Tensor, t: float) -> Tensor:
    kept = _mean_loss(kq.detach(), kp.detach(), t)
    return (len(q) * _mean_loss(q, p, t) + len(kq) * kept) / (len(q) + len(kq))


bank_loss = Exercise(
    chapter=14,
    name="bank_loss",
    spec="InfoNCE over chunk and bank together, as a scalar: the mean over all C + M queries, each against all C + M "
    "passages; what is kept gets no gradient.",
    line_budget=4,
    oracle=_reference_bank,
    makers=(_chunk_and_bank, partial(_chunk_and_bank, kept=False)),
    outcome=_value_and_gradients,
    rtol=1e-6,
    atol=1e-9,
    slips=(
        Slip(
            "labels of the chunk alone",
            "There are C + M queries, the kept ones too, and so C + M rows of logits and C + M labels: query i's own "
            "passage stands at place i of all passages.",
            "Expected input batch_size|batch size",
        ),
    ),
    misconceptions=(
        Misconception(
            "one side kept",
            "It looks as if only passages were kept: that is a queue. Kept queries stand in the loss too: they push "
            "the chunk's passages, beside the chunk's own queries.",
            lambda q, p, kq, kp, t: _mean_loss(q, torch.cat([p, kp.detach()]), t),
        ),
        Misconception(
            "the bank trained too",
            "The value is right, but a gradient flows into what is kept. Those rows have no graph any more: detach "
            "them, and they are constants.",
            lambda q, p, kq, kp, t: _mean_loss(torch.cat([q, kq]), torch.cat([p, kp]), t),
        ),
        Misconception(
            "chunk and bank apart",
            "It looks as if chunk and bank had a loss each. Then they never meet, and the bank brings no negative.",
            _each_apart,
        ),
        Misconception(
            "the chunk alone",
            "That is the chunk's own loss: accumulation. What is kept is not used.",
            lambda q, p, kq, kp, t: _mean_loss(q, p, t),
        ),
        Misconception(
            "passages in another order",
            "The kept passages stand before the chunk's, and the kept queries after it: then query i's label is "
            "another pair's passage. Put both sides in one order.",
            _kept_first,
        ),
        Misconception(
            "a mean over the chunk",
            "The sum over all C + M queries is divided by C. The loss is the mean over those that are in it.",
            lambda q, p, kq, kp, t: (
                _mean_loss(torch.cat([q, kq.detach()]), torch.cat([p, kp.detach()]), t) * (len(q) + len(kq)) / len(q)
            ),
        ),
        Misconception(
            "sum over the queries",
            "That is the sum over all C + M queries. Asked for is their mean.",
            lambda q, p, kq, kp, t: (
                _mean_loss(torch.cat([q, kq.detach()]), torch.cat([p, kp.detach()]), t) * (len(q) + len(kq))
            ),
        ),
        Misconception(
            "temperature forgotten",
            "The similarities are not divided by the temperature.",
            lambda q, p, kq, kp, t: _mean_loss(torch.cat([q, kq.detach()]), torch.cat([p, kp.detach()]), 1.0),
        ),
        Misconception(
            "one side trained",
            "One side of the bank is detached, and a gradient flows into the other. Neither has a graph any more.",
            lambda q, p, kq, kp, t: _mean_loss(torch.cat([q, kq]), torch.cat([p, kp.detach()]), t),
        ),
        Misconception(
            "one side trained",
            "One side of the bank is detached, and a gradient flows into the other. Neither has a graph any more.",
            lambda q, p, kq, kp, t: _mean_loss(torch.cat([q, kq.detach()]), torch.cat([p, kp]), t),
        ),
        Misconception(
            "no graph at all",
            "The value is right, and no gradient comes back from it: the chunk's own rows must keep their graph. "
            "Detach what is kept, and nothing else.",
            lambda q, p, kq, kp, t: _mean_loss(torch.cat([q, kq]), torch.cat([p, kp]), t).detach(),
        ),
        Misconception(
            "the chunk detached",
            "The chunk is detached and the bank is not. It is the chunk's rows that have a graph.",
            lambda q, p, kq, kp, t: _mean_loss(torch.cat([q.detach(), kq]), torch.cat([p.detach(), kp]), t),
        ),
        Misconception(
            "both directions",
            "It looks as if passages were asked for their queries too. Here every query is asked, and no passage.",
            lambda q, p, kq, kp, t: sum(
                _mean_loss(torch.cat([a, ka.detach()]), torch.cat([b, kb.detach()]), t) / 2
                for a, ka, b, kb in ((q, kq, p, kp), (p, kp, q, kq))
            ),
        ),
        Misconception(
            "multiplied by the temperature",
            "It looks as if similarities were multiplied by the temperature. It divides them.",
            lambda q, p, kq, kp, t: _mean_loss(torch.cat([q, kq.detach()]), torch.cat([p, kp.detach()]), 1 / t),
        ),
    ),
    hints=(
        "Make one batch of chunk and bank first. Which rows of it may carry a gradient?",
        "torch.cat the queries with the kept ones, detached, and the passages in the same order; then it is the loss "
        "of chapter 01 with labels 0 .. C + M - 1.",
        "q = torch.cat([queries, kept_queries.detach()]), p likewise; return F.cross_entropy(q @ p.T / temperature, "
        "torch.arange(len(q)))",
    ),
)

# --- SigLIP's loss --------------------------------------------------------------------------------------------


def _pairs(rng: np.random.Generator, *, least: int, far: float) -> Inputs:
    rows, dimensions = int(rng.integers(least, least + 6)), int(rng.integers(3, 8))
    reps = [_rows(rng, rows, dimensions).detach() * far for _ in range(2)]
    temperature, bias = round(float(rng.uniform(0.3, 0.7)), 3), round(float(-rng.uniform(1.0, 3.0)), 3)
    return {"queries": reps[0], "passages": reps[1], "temperature": temperature, "bias": bias}


def _reference_sigmoid(queries: Tensor, passages: Tensor, temperature: float, bias: float) -> Tensor:
    """Pair by pair: log(1 + exp(-z)) for a positive, log(1 + exp(z)) for another one."""
    total = queries.new_zeros(())
    for i, query in enumerate(queries):
        for j, passage in enumerate(passages):
            z = query.dot(passage) / temperature + bias
            total = total + torch.logaddexp(torch.zeros_like(z), -z if i == j else z)
    return total / len(queries)


@dataclass(frozen=True)
class _Sigmoid:
    """Right but for what is changed. logits: of (similarities, t, b); negative: its sign; mean: of all terms."""

    logits: Callable[[Tensor, float, float], Tensor] = lambda s, t, b: s / t + b
    negative: float = -1.0
    mean: Callable[[Tensor], Tensor] = lambda terms: terms.sum() / len(terms)

    def __call__(self, queries: Tensor, passages: Tensor, temperature: float, bias: float) -> Tensor:
        signs = torch.full((len(queries), len(passages)), self.negative, dtype=queries.dtype)
        signs.fill_diagonal_(1.0)
        return self.mean(-F.logsigmoid(signs * self.logits(queries @ passages.T, temperature, bias)))


sigmoid_loss = Exercise(
    chapter=14,
    name="sigmoid_loss",
    spec="SigLIP's loss, a scalar: -1/B times the sum over all pairs of log sigmoid(y (q . p / temperature + bias)), "
    "with y = 1 for a query's own passage and -1 for another one.",
    line_budget=4,
    oracle=_reference_sigmoid,
    makers=(partial(_pairs, least=3, far=1.0), partial(_pairs, least=6, far=4.0)),
    differentiable=True,
    misconceptions=(
        Misconception(
            "mean over all pairs",
            "That is divided by B * B. The paper divides by B: a query's loss is the sum over its pairs.",
            _Sigmoid(mean=lambda terms: terms.mean()),
        ),
        Misconception(
            "not divided",
            "That is the sum over all pairs. Divide by B, the queries.",
            _Sigmoid(mean=lambda terms: terms.sum()),
        ),
        Misconception(
            "bias divided too",
            "The bias is divided by the temperature as well. It is added afterwards.",
            _Sigmoid(logits=lambda s, t, b: (s + b) / t),
        ),
        Misconception(
            "bias forgotten",
            "There is no bias. With it a pair is taken for a wrong one until something speaks for it, which most are.",
            _Sigmoid(logits=lambda s, t, b: s / t),
        ),
        Misconception(
            "bias subtracted",
            "The bias has the wrong sign: it is negative already, and is added.",
            _Sigmoid(logits=lambda s, t, b: s / t - b),
        ),
        Misconception(
            "every pair a positive",
            "It looks as if y were 1 everywhere. For another query's passage it is -1.",
            _Sigmoid(negative=1.0),
        ),
        Misconception(
            "signs turned round",
            "The signs are the wrong way round: the loss would push a query's own passage away.",
            _Sigmoid(logits=lambda s, t, b: -(s / t + b)),
        ),
        Misconception(
            "positives alone",
            "Only the diagonal is in it. Each of the B * B pairs has a term.",
            _Sigmoid(mean=lambda terms: terms.diagonal().mean()),
        ),
        Misconception(
            "negatives alone",
            "The diagonal is left out. A query's own passage has a term too: it is the one that pulls.",
            _Sigmoid(mean=lambda terms: (terms.sum() - terms.diagonal().sum()) / len(terms)),
        ),
        Misconception(
            "a softmax",
            "That is InfoNCE: a softmax over a query's passages. Here every pair stands for itself, and no other pair "
            "is in its term.",
            lambda q, p, t, b: _mean_loss(q, p, t),
        ),
        Misconception(
            "multiplied by the temperature",
            "It looks as if similarities were multiplied by the temperature. It divides them.",
            _Sigmoid(logits=lambda s, t, b: s * t + b),
        ),
        Misconception(
            "temperature forgotten",
            "The similarities are not divided by the temperature.",
            _Sigmoid(logits=lambda s, t, b: s + b),
        ),
        Misconception(
            "zeros for the other passages",
            "It looks as if y were 0 for another query's passage: then its term says nothing. y is -1 there.",
            _Sigmoid(negative=0.0),
        ),
        Misconception(
            "bias outside the sign",
            "It looks as if the bias were added after the sign. It belongs to the logit: y times all of it.",
            lambda q, p, t, b: (
                -F.logsigmoid((2 * torch.eye(len(q), dtype=q.dtype) - 1) * (q @ p.T / t) + b).sum() / len(q)
            ),
        ),
        Misconception(
            "no logarithm",
            "It looks as if the sigmoids themselves were added up. The loss is of their logarithms.",
            _Sigmoid(mean=lambda terms: -(-terms).exp().sum() / len(terms)),
        ),
    ),
    hints=(
        "B * B numbers first: the logit of each pair, with the bias. Then the sign of each.",
        "A matrix of -1 with 1 on its diagonal, times the logits; F.logsigmoid of that; summed, and divided by -B.",
        "signs = 2 * torch.eye(len(queries)) - 1; z = queries @ passages.T / temperature + bias; "
        "return -F.logsigmoid(signs * z).sum() / len(queries)",
    ),
)

# --- what a budget pays for -----------------------------------------------------------------------------------


def _budget(rng: np.random.Generator, *, way: str, hard: bool) -> Inputs:
    batch, negatives = int(rng.integers(4, 33)), int(rng.integers(2, 8)) if hard else 0
    dearest = batch * 4 * (2 + negatives)
    budget = dearest * int(rng.integers(40, 120)) + int(rng.integers(1, dearest))
    return {"budget": budget, "batch_size": batch, "hard_negatives": negatives, "way": way}


def _reference_updates(budget: int, batch_size: int, hard_negatives: int, way: str) -> int:
    """By spending: text by text, forward by forward, until the next update can't be paid."""
    query = {"naive": 1 + 2, "cache": 1 + 1 + 2, "queue": 1 + 2}[way]
    passage = {"naive": 1 + 2, "cache": 1 + 1 + 2, "queue": 1}[way]
    price = sum(query + sum(passage for _ in range(1 + hard_negatives)) for _ in range(batch_size))
    updates = 0
    while budget >= price:
        budget, updates = budget - price, updates + 1
    return updates


@dataclass(frozen=True)
class _Price:
    """Right but for what is changed: forwards of a text by way and side, its texts, and how the share is rounded."""

    backward: int = 2
    replay: int = 1
    copied: int = 1
    passages: Callable[[int], int] = lambda hard: 1 + hard
    queries: int = 1
    rounded: Callable[[float], int] = math.floor

    def __call__(self, budget: int, batch_size: int, hard_negatives: int, way: str) -> int:
        text = 1 + self.backward + (self.replay if way == "cache" else 0)
        passage = self.copied if way == "queue" else text
        return self.rounded(budget / (batch_size * (self.queries * text + self.passages(hard_negatives) * passage)))


def _queue_of(price: Callable[[int], int]) -> Callable[[int, int, int, str], int]:
    """Right but for a queue, whose query costs price(K) with its passages."""

    def answer(budget: int, batch_size: int, hard_negatives: int, way: str) -> int:
        if way != "queue":
            return _Price()(budget, batch_size, hard_negatives, way)
        return budget // (batch_size * price(hard_negatives))

    return answer


updates_paid = Exercise(
    chapter=14,
    name="updates_paid",
    spec="the whole updates (an int) that `budget` forwards of one text pay for; a backward costs as much as two "
    'forwards. "naive": one forward and one backward for each text; "cache": one forward more; "queue": passages go '
    "through a copy, forward alone.",
    line_budget=4,
    oracle=_reference_updates,
    makers=tuple(partial(_budget, way=way, hard=hard) for hard in (True, False) for way in ("naive", "cache", "queue")),
    whole=True,
    misconceptions=(
        Misconception(
            "second forward forgotten",
            "The cache is taken for as cheap as the naive step. Each text is encoded twice: once for the cache, once "
            "with its graph.",
            _Price(replay=0),
        ),
        Misconception(
            "second backward counted",
            "It looks as if the cache ran everything twice. It encodes each text twice, and backpropagates once.",
            _Price(replay=3),
        ),
        Misconception(
            "queue's passages backpropagated",
            "It looks as if the queue's passages cost a backward. They are encoded by a copy that is not trained.",
            _Price(copied=3),
        ),
        Misconception(
            "queue's passages for nothing",
            "It looks as if the queue's passages cost nothing. What is kept is free; the own batch is encoded first.",
            _Price(copied=0),
        ),
        Misconception(
            "a backward for a forward",
            "A backward costs as much as two forwards: a gradient for what comes in, and one for the weights.",
            _Price(backward=1),
        ),
        Misconception(
            "forwards alone",
            "It looks as if only forwards were paid for. Training has a backward, twice as dear.",
            _Price(backward=0),
        ),
        Misconception(
            "hard negatives forgotten",
            "It looks as if each query brought one passage. With K hard negatives it brings 1 + K, all encoded.",
            _Price(passages=lambda hard: 1),
        ),
        Misconception(
            "queries forgotten",
            "It looks as if only passages were encoded. Queries go through the encoder too.",
            _Price(queries=0),
        ),
        Misconception(
            "queue's sides changed over",
            "It looks as if the queries went through the copy, and the passages had the backward. It is the other way "
            "round: a queue keeps passages.",
            _queue_of(lambda hard: 1 + 3 * (1 + hard)),
        ),
        Misconception(
            "nothing trained in the queue",
            "It looks as if the queue's queries had a forward alone. They are what is trained: a backward is theirs.",
            _queue_of(lambda hard: 2 + hard),
        ),
        Misconception(
            "queue's hard negatives for nothing",
            "It looks as if the copy encoded one passage a query. It encodes all 1 + K of them.",
            _queue_of(lambda hard: 3 + 1),
        ),
        Misconception(
            "rounded to the nearest",
            "An update that is not paid for in full is not taken: round down.",
            _Price(rounded=lambda share: math.floor(share + 0.5)),
        ),
        Misconception(
            "rounded up",
            "The last update is not paid for in full: round down.",
            _Price(rounded=math.ceil),
        ),
    ),
    hints=(
        "What does one query cost, what one passage, in forwards? How many of each does an update have?",
        "Trained text: 1 + 2 forwards, with the cache 1 + 1 + 2. A queue's passage: 1. An update: B queries and "
        "B * (1 + K) passages.",
        'text = 4 if way == "cache" else 3; passage = 1 if way == "queue" else text; return budget // (batch_size * '
        "(text + (1 + hard_negatives) * passage))",
    ),
)

# --- a momentum encoder ---------------------------------------------------------------------------------------


def _two_encoders(rng: np.random.Generator, *, deep: bool) -> Inputs:
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    width = int(rng.integers(3, 6))
    layers = [nn.Linear(width, width) for _ in range(3 if deep else 1)]
    encoder = nn.Sequential(*layers).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    follower = copy.deepcopy(encoder).requires_grad_(False)
    for parameter in follower.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return {"encoder": encoder, "follower": follower, "momentum": round(float(rng.uniform(0.6, 0.95)), 3)}


def _reference_follow(encoder: nn.Module, follower: nn.Module, momentum: float) -> None:
    mixed = {
        name: momentum * value + (1 - momentum) * encoder.state_dict()[name]
        for name, value in follower.state_dict().items()
    }
    follower.load_state_dict(mixed)


def _weights_after(result: object, encoder: nn.Module, follower: nn.Module, momentum: float) -> dict:
    return {
        "follower": [parameter.detach() for parameter in follower.parameters()],
        "encoder": [parameter.detach() for parameter in encoder.parameters()],
        "follower in a graph": any(parameter.requires_grad for parameter in follower.parameters()),
    }


def _mix(own: Callable, other: Callable, *, which: slice = slice(None), into: str = "follower") -> Callable:
    """A wrong answer: some parameters mixed in shares that are functions of the momentum."""

    def follow(encoder: nn.Module, follower: nn.Module, momentum: float) -> None:
        with torch.no_grad():
            pairs = list(zip(follower.parameters(), encoder.parameters(), strict=True))[which]
            for mine, theirs in pairs:
                mixed = own(momentum) * mine + other(momentum) * theirs
                (mine if into == "follower" else theirs).copy_(mixed)

    return follow


def _in_a_graph(encoder: nn.Module, follower: nn.Module, momentum: float) -> None:
    for mine, theirs in zip(follower.parameters(), encoder.parameters(), strict=True):
        mine.mul_(momentum).add_(theirs, alpha=1 - momentum)


follow = Exercise(
    chapter=14,
    name="follow",
    spec="MoCo's step of a momentum encoder, in place: each weight of the follower becomes momentum times itself plus "
    "(1 - momentum) times the encoder's; no graph, and the encoder stays as it is.",
    line_budget=4,
    oracle=_reference_follow,
    makers=(partial(_two_encoders, deep=False), partial(_two_encoders, deep=True)),
    outcome=_weights_after,
    may_change=frozenset({"follower", "encoder"}),
    rtol=1e-6,
    atol=1e-9,
    slips=(
        Slip(
            "an encoder in a graph",
            "Autograd stands in the way: the update is no part of any loss. Do it under torch.no_grad().",
            "leaf Variable|requires grad",
        ),
    ),
    misconceptions=(
        Misconception(
            "momentum on the wrong side",
            "It looks as if the momentum stood at the encoder's weights. Then the follower is nearly the encoder, and "
            "changes as fast: momentum is what it keeps of itself.",
            _mix(lambda m: 1 - m, lambda m: m),
        ),
        Misconception(
            "a plain copy",
            "The follower became the encoder itself. It should move a small step towards it.",
            _mix(lambda m: 0.0, lambda m: 1.0),
        ),
        Misconception(
            "added, not mixed",
            "It looks as if the encoder's weights were added in full. The two shares add up to 1.",
            _mix(lambda m: m, lambda m: 1.0),
        ),
        Misconception(
            "kept in full",
            "It looks as if the follower kept all of itself, and got a share on top. The two shares add up to 1.",
            _mix(lambda m: 1.0, lambda m: 1 - m),
        ),
        Misconception(
            "only shrunk",
            "It looks as if the follower were multiplied by the momentum, and nothing came from the encoder.",
            _mix(lambda m: m, lambda m: 0.0),
        ),
        Misconception(
            "matrices without biases",
            "The first parameter of each layer moved, and the other did not: biases follow too.",
            _mix(lambda m: m, lambda m: 1 - m, which=slice(None, None, 2)),
        ),
        Misconception(
            "the first weight alone",
            "Only the first parameter moved: go through all of them.",
            _mix(lambda m: m, lambda m: 1 - m, which=slice(1)),
        ),
        Misconception(
            "taken off, not added",
            "It looks as if the encoder's share were taken off. It is added.",
            _mix(lambda m: m, lambda m: m - 1),
        ),
        Misconception(
            "half and half",
            "It looks as if the plain mean were taken. The shares are the momentum and 1 minus the momentum.",
            _mix(lambda m: 0.5, lambda m: 0.5),
        ),
        Misconception(
            "the encoder follows",
            "The encoder's weights were changed, and the follower's were not: it is the follower that moves.",
            _mix(lambda m: m, lambda m: 1 - m, into="encoder"),
        ),
        Misconception(
            "follower in a graph",
            "The weights are right, but the follower's are now results of an operation on the encoder's, with a graph "
            "that grows by a step each time. Do it under torch.no_grad().",
            _in_a_graph,
        ),
    ),
    hints=(
        "Go through the parameters of both at once. Which of the two may change?",
        "zip(follower.parameters(), encoder.parameters()), under torch.no_grad(), and an operation in place: "
        "mul_ and add_, or lerp_.",
        "with torch.no_grad(): for mine, theirs in zip(...): mine.lerp_(theirs, 1 - momentum)",
    ),
)
