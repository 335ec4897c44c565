"""Chapter 01's exercises: the loss of no idea, InfoNCE, labels with hard negatives, the false-negative mask.

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, D dimensions; the positive of
query i is passage i * (1 + K).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .engine import Exercise, Misconception
from .judging import Inputs


def _batch(rng: np.random.Generator, *, hard_negatives: tuple[int, int]) -> Inputs:
    low, high = hard_negatives
    return {
        "batch_size": int(rng.integers(5, 12)),
        "hard_negatives": int(rng.integers(low, high + 1)),
    }


def _some_hard_negatives(rng: np.random.Generator) -> Inputs:
    return _batch(rng, hard_negatives=(2, 5))


def _no_hard_negatives(rng: np.random.Generator) -> Inputs:
    return _batch(rng, hard_negatives=(0, 0))


chance_loss = Exercise(
    chapter=1,
    name="chance_loss",
    spec="the loss, in nats, of an encoder that gives all B * (1 + K) passages the same logit (a float).",
    line_budget=1,
    oracle=lambda batch_size, hard_negatives: math.log(batch_size + batch_size * hard_negatives),
    makers=(_some_hard_negatives, _no_hard_negatives),
    misconceptions=(
        Misconception(
            "hard negatives forgotten",
            "That is log B: each query is compared with its in-batch negatives and with all hard negatives.",
            lambda batch_size, hard_negatives: math.log(batch_size),
        ),
        Misconception(
            "hard negatives of one query only",
            "That is log(B + K): a query sees the hard negatives of every query in the batch, not only its own.",
            lambda batch_size, hard_negatives: math.log(batch_size + hard_negatives),
        ),
        Misconception(
            "only the hard negatives",
            "That is log(B K): the B positives of the batch are among the passages too.",
            lambda batch_size, hard_negatives: math.log(batch_size * hard_negatives),
        ),
        Misconception(
            "positive left out",
            "That is log(N - 1): the positive is in the denominator too.",
            lambda batch_size, hard_negatives: math.log(batch_size * (1 + hard_negatives) - 1),
        ),
        Misconception(
            "bits, not nats",
            "That is the logarithm to base 2, so it is in bits: the loss uses the natural logarithm.",
            lambda batch_size, hard_negatives: math.log2(batch_size * (1 + hard_negatives)),
        ),
        Misconception(
            "sign lost",
            "That is the logarithm of the probability: the loss is minus that.",
            lambda batch_size, hard_negatives: -math.log(batch_size * (1 + hard_negatives)),
        ),
        Misconception(
            "probability, not loss",
            "That is the probability 1 / N of the positive: the loss is minus its logarithm.",
            lambda batch_size, hard_negatives: 1 / (batch_size * (1 + hard_negatives)),
        ),
    ),
    hints=(
        "All logits equal: which probability does the softmax give to each of the N passages?",
        "The probability is 1 / N with N = B * (1 + K); the loss is -log of it.",
        "return math.log(batch_size * (1 + hard_negatives))",
    ),
)


def _reps(rng: np.random.Generator, rows: int, width: int) -> Tensor:
    return F.normalize(torch.from_numpy(rng.standard_normal((rows, width))).float(), dim=1)


def _ordinary_reps(rng: np.random.Generator) -> Inputs:
    rows, width = int(rng.integers(3, 8)), int(rng.integers(4, 9))
    return {
        "query_reps": _reps(rng, rows, width),
        "passage_reps": _reps(rng, rows, width),
        "temperature": round(float(rng.uniform(0.2, 0.6)), 3),
    }


def _sharp_reps(rng: np.random.Generator) -> Inputs:
    """Close pairs at a low temperature: exp(logit) is beyond what float32 can hold, the loss is not."""
    inputs = _ordinary_reps(rng) | {"temperature": round(float(rng.uniform(0.004, 0.006)), 4)}
    queries = inputs["query_reps"]
    close = F.normalize(queries + 0.2 * _reps(rng, *queries.shape), dim=1)
    close[1] = F.normalize(queries[0] + 0.2 * _reps(rng, 1, queries.shape[1])[0], dim=0)
    return inputs | {"passage_reps": close}


def _reference_info_nce(query_reps: Tensor, passage_reps: Tensor, temperature: float) -> Tensor:
    logits = query_reps.double() @ passage_reps.double().T / temperature
    return (logits.logsumexp(dim=1) - logits.diagonal()).mean().float()


def _logits(query_reps: Tensor, passage_reps: Tensor, temperature: float) -> Tensor:
    return query_reps @ passage_reps.T / temperature


def _cross_entropy(logits: Tensor, **options: str) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)), **options)


def _without_positive(query_reps: Tensor, passage_reps: Tensor, temperature: float) -> Tensor:
    logits = _logits(query_reps, passage_reps, temperature)
    others = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool), -torch.inf)
    return (others.logsumexp(dim=1) - logits.diagonal()).mean()


info_nce = Exercise(
    chapter=1,
    name="info_nce",
    spec="the loss of equation (1), averaged over the B queries; passage i is the positive of query i (a scalar).",
    line_budget=3,
    oracle=_reference_info_nce,
    makers=(_ordinary_reps, _sharp_reps),
    differentiable=True,
    without=frozenset({"contrastive_loss", "ContrastiveLoss"}),
    atol=1e-3,  # logits of 200 carry float32 rounding of 1e-5 each
    gradient_error=1e-2,
    misconceptions=(
        Misconception(
            "multiplied by the temperature",
            "It looks as if the similarities are multiplied by the temperature: they are divided by it, so "
            "that a low temperature makes large logits.",
            lambda q, p, t: _cross_entropy(q @ p.T * t),
        ),
        Misconception(
            "temperature ignored",
            "It looks as if the temperature plays no part: divide the similarities by it.",
            lambda q, p, t: _cross_entropy(q @ p.T),
        ),
        Misconception(
            "divided by the temperature twice",
            "It looks as if the similarities are divided by the temperature twice.",
            lambda q, p, t: _cross_entropy(q @ p.T / t**2),
        ),
        Misconception(
            "softmax over the queries",
            "It looks as if the softmax runs down the columns, over the queries: each query chooses among "
            "the passages, along its row.",
            lambda q, p, t: _cross_entropy(_logits(q, p, t).T),
        ),
        Misconception(
            "sum instead of mean",
            "It looks as if the losses of the queries are summed: average them over the B queries.",
            lambda q, p, t: _cross_entropy(_logits(q, p, t), reduction="sum"),
        ),
        Misconception(
            "mean over all pairs",
            "It looks as if the sum is divided by B * B: only B of the entries are positives, so divide by B.",
            lambda q, p, t: _cross_entropy(_logits(q, p, t)) / len(q),
        ),
        Misconception(
            "positive left out of the denominator",
            "It looks as if the denominator holds the negatives only: the positive belongs to it too.",
            _without_positive,
        ),
        Misconception(
            "both directions",
            "That is the symmetric loss: the mean of rows and columns. Equation (1) asks the queries only.",
            lambda q, p, t: (_cross_entropy(_logits(q, p, t)) + _cross_entropy(_logits(q, p, t).T)) / 2,
        ),
        Misconception(
            "normalised once more",
            "The value is right because these representations have length 1 already, but F.normalize takes a part of "
            "the gradient away: the loss takes representations as they are.",
            lambda q, p, t: _cross_entropy(_logits(F.normalize(q, dim=1), F.normalize(p, dim=1), t)),
        ),
        Misconception(
            "softmax twice",
            "It looks as if a softmax is taken before the cross entropy: F.cross_entropy takes the logits themselves.",
            lambda q, p, t: _cross_entropy(_logits(q, p, t).softmax(dim=1)),
        ),
        Misconception(
            "probability, not its logarithm",
            "It looks as if the probability of the positive is averaged: take its logarithm first.",
            lambda q, p, t: -_logits(q, p, t).softmax(dim=1).diagonal().mean(),
        ),
        Misconception(
            "sign lost",
            "That is minus the loss: the logarithm of a probability is negative, the loss is not.",
            lambda q, p, t: -_cross_entropy(_logits(q, p, t)),
        ),
        Misconception(
            "overflow, divided",
            "At a low temperature exp(logit) overflows, and inf / inf is nan: use log_softmax, logsumexp or "
            "cross_entropy, which subtract the largest logit first.",
            lambda q, p, t: -(_logits(q, p, t).exp().diagonal() / _logits(q, p, t).exp().sum(1)).log().mean(),
        ),
        Misconception(
            "overflow, then the logarithm",
            "At a low temperature the sum of exp(logit) overflows to inf: logsumexp subtracts the largest "
            "logit before it exponentiates.",
            lambda q, p, t: (_logits(q, p, t).exp().sum(1).log() - _logits(q, p, t).diagonal()).mean(),
        ),
    ),
    hints=(
        "First the B x B matrix of logits: every query with every passage, divided by the temperature.",
        "Row i is a classification among B passages whose right answer is i: which PyTorch loss does that?",
        "logits = query_reps @ passage_reps.T / temperature, then F.cross_entropy(logits, torch.arange(B)).",
    ),
)

labels_with_hard_negatives = Exercise(
    chapter=1,
    name="labels_with_hard_negatives",
    spec="the column of each query's positive, int64 of shape (B,); passages come as positive, K hard "
    "negatives, next positive, ...",
    line_budget=1,
    oracle=lambda batch_size, hard_negatives: torch.tensor(
        [query * (1 + hard_negatives) for query in range(batch_size)]
    ),
    makers=(_some_hard_negatives, _no_hard_negatives),
    misconceptions=(
        Misconception(
            "labels without hard negatives",
            "Those are 0, 1, 2, ...: right without hard negatives, but with K > 0 column 1 is a hard negative.",
            lambda batch_size, hard_negatives: torch.arange(batch_size),
        ),
        Misconception(
            "group of K",
            "Those are i * K: a query brings K hard negatives and its positive, 1 + K passages.",
            lambda batch_size, hard_negatives: torch.arange(batch_size) * hard_negatives,
        ),
        Misconception(
            "positive last",
            "Those are the last columns of each group: the positive comes first, its hard negatives after it.",
            lambda batch_size, hard_negatives: torch.arange(1, batch_size + 1) * (1 + hard_negatives) - 1,
        ),
        Misconception(
            "counted from one",
            "Those are one too far to the right: columns are counted from 0.",
            lambda batch_size, hard_negatives: torch.arange(batch_size) * (1 + hard_negatives) + 1,
        ),
        Misconception(
            "hard negatives skipped once",
            "Those are consecutive columns, moved by K: every query brings K hard negatives, so the steps are 1 + K.",
            lambda batch_size, hard_negatives: torch.arange(batch_size) + hard_negatives,
        ),
        Misconception(
            "place within the group",
            "All zero: that is the positive's place in its own group, but the softmax runs over all N columns.",
            lambda batch_size, hard_negatives: torch.zeros(batch_size, dtype=torch.int64),
        ),
        Misconception(
            "a label per passage",
            "That is a label for every passage: only the B queries choose, so B labels.",
            lambda batch_size, hard_negatives: torch.arange(batch_size * (1 + hard_negatives)),
        ),
        Misconception(
            "stopped at B",
            "The steps are right, but they stop before column B: they must run to column N = B * (1 + K).",
            lambda batch_size, hard_negatives: torch.arange(0, batch_size, 1 + hard_negatives),
        ),
    ),
    hints=(
        "Write down the columns for B = 3 and K = 2: which of 0 ... 8 are positives?",
        "Each query brings 1 + K columns, its positive first: the positives are 0, 1 + K, 2 (1 + K), ...",
        "return torch.arange(batch_size) * (1 + hard_negatives)",
    ),
)


def _texts_with_twins(rng: np.random.Generator) -> Inputs:
    """Two equal queries, two equal positives, and two hard negatives that are right answers for somebody."""
    batch, hard = int(rng.integers(6, 9)), int(rng.integers(1, 4))
    first, second, third, fourth, fifth = rng.permutation(batch)[:5].tolist()
    group = 1 + hard
    queries = [f"question {n}" for n in rng.permutation(100)[:batch].tolist()]
    passages = [f"answer {n}" for n in rng.permutation(1000)[: batch * group].tolist()]
    queries[second] = queries[first]
    passages[fourth * group] = passages[third * group]
    passages[fifth * group + 1] = passages[third * group]
    passages[third * group + 1] = passages[first * group]
    return {"queries": queries, "passages": passages}


def _texts_without_hard_negatives(rng: np.random.Generator) -> Inputs:
    inputs = _texts_with_twins(rng)
    batch = len(inputs["queries"])
    return inputs | {"passages": inputs["passages"][:: len(inputs["passages"]) // batch]}


def _mask(queries: list[str], passages: list[str], rule: Callable[[int, int, int], bool]) -> Tensor:
    """The (B, N) mask of `rule(i, j, group)`, for query i and passage j."""
    group = len(passages) // len(queries)
    return torch.tensor([[rule(i, j, group) for j in range(len(passages))] for i in range(len(queries))])


def _is_right(queries: list[str], passages: list[str], i: int, j: int, group: int) -> bool:
    """Whether passage j has the text of the positive of some query with the text of query i."""
    return any(query == queries[i] and passages[k * group] == passages[j] for k, query in enumerate(queries))


def _reference_mask(queries: list[str], passages: list[str]) -> Tensor:
    return _mask(queries, passages, lambda i, j, group: j != i * group and _is_right(queries, passages, i, j, group))


def _mask_with_positives(queries: list[str], passages: list[str]) -> Tensor:
    return _mask(queries, passages, lambda i, j, group: _is_right(queries, passages, i, j, group))


def _mask_of_own_text(queries: list[str], passages: list[str]) -> Tensor:
    return _mask(queries, passages, lambda i, j, group: j != i * group and passages[j] == passages[i * group])


def _mask_of_twin_queries(queries: list[str], passages: list[str]) -> Tensor:
    return _mask(
        queries,
        passages,
        lambda i, j, group: j % group == 0 and j != i * group and queries[j // group] == queries[i],
    )


def _mask_without_hard_negatives(queries: list[str], passages: list[str]) -> Tensor:
    return _mask(
        queries,
        passages,
        lambda i, j, group: j % group == 0 and j != i * group and _is_right(queries, passages, i, j, group),
    )


def _mask_with_whole_groups(queries: list[str], passages: list[str]) -> Tensor:
    return _mask(
        queries,
        passages,
        lambda i, j, group: (
            j != i * group
            and (_is_right(queries, passages, i, j, group) or (j // group != i and queries[j // group] == queries[i]))
        ),
    )


def _mask_of_twin_groups(queries: list[str], passages: list[str]) -> Tensor:
    """All passages of other queries with the same text, and no other."""
    return _mask(queries, passages, lambda i, j, group: j // group != i and queries[j // group] == queries[i])


def _mask_of_same_groups(queries: list[str], passages: list[str]) -> Tensor:
    """All passages of every query with the same text, but for the query's own positive."""
    return _mask(queries, passages, lambda i, j, group: j != i * group and queries[j // group] == queries[i])


def _mask_without_own_text(queries: list[str], passages: list[str]) -> Tensor:
    return _mask(
        queries,
        passages,
        lambda i, j, group: passages[j] != passages[i * group] and _is_right(queries, passages, i, j, group),
    )


def _mask_of_column_i(queries: list[str], passages: list[str]) -> Tensor:
    """Right but for one thing: passage i is taken for the positive of query i."""
    return _mask(queries, passages, lambda i, j, group: j != i and _is_right(queries, passages, i, j, 1))


def _texts_of_first_difference(expected: Tensor, got: object, queries: list[str], passages: list[str]) -> str:
    if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return ""
    i, j = (expected != got).nonzero()[0].tolist()
    own = i * (len(passages) // len(queries))
    return (
        f"Query {i} is {queries[i]!r}, its own positive, passage {own}, is {passages[own]!r}; passage {j} is "
        f"{passages[j]!r}."
    )


false_negative_mask = Exercise(
    chapter=1,
    name="false_negative_mask",
    spec="bool (B, N), True where passage j is not query i's own positive, but has the text of a right answer: of the "
    "positive of any query with the same text as query i.",
    line_budget=8,
    oracle=_reference_mask,
    makers=(_texts_with_twins, _texts_without_hard_negatives),
    note=_texts_of_first_difference,
    misconceptions=(
        Misconception(
            "positive masked",
            "The query's own positive is masked too: then the loss has no numerator, and is infinite.",
            _mask_with_positives,
        ),
        Misconception(
            "True means keep",
            "The mask is the wrong way round: True leaves a passage out of the denominator.",
            lambda queries, passages: ~_reference_mask(queries, passages),
        ),
        Misconception(
            "same queries forgotten",
            "Only the query's own positive is looked for: when a query is asked twice in a batch, the other's positive "
            "is right as well.",
            _mask_of_own_text,
        ),
        Misconception(
            "same passages forgotten",
            "Only queries are compared: a right passage that stands in the batch a second time is right there too.",
            _mask_of_twin_queries,
        ),
        Misconception(
            "hard negatives not looked at",
            "Only the columns of positives are looked at: a hard negative with the text of a right answer is a false "
            "negative too.",
            _mask_without_hard_negatives,
        ),
        Misconception(
            "hard negatives of a twin masked",
            "For a query that is asked twice, the other's hard negatives are masked too: only its positive is right.",
            _mask_with_whole_groups,
        ),
        Misconception(
            "whole group of a twin masked",
            "For a query that is asked twice, the other's whole group is masked: only its positive is right, its hard "
            "negatives are wrong answers. And texts are to be compared, wherever they stand.",
            _mask_of_twin_groups,
        ),
        Misconception(
            "own hard negatives masked",
            "Whole groups are masked, the query's own hard negatives among them: those are wrong answers. Compare the "
            "texts of passages.",
            _mask_of_same_groups,
        ),
        Misconception(
            "own text spared everywhere",
            "No passage with the text of the query's own positive is masked. Only the one in column i * (1 + K) stays: "
            "the same text elsewhere is a false negative.",
            _mask_without_own_text,
        ),
        Misconception(
            "positive looked for in column i",
            "It looks as if passage i is taken for the positive of query i: with K hard negatives it is passage "
            "i * (1 + K).",
            _mask_of_column_i,
        ),
        Misconception(
            "queries compared with passages",
            "Nothing is masked: a question never reads like its answer. Compare queries with queries, and passages "
            "with positives.",
            lambda queries, passages: _mask(queries, passages, lambda i, j, group: False),
        ),
    ),
    hints=(
        "1 + K is len(passages) // len(queries), so the positives are passages[:: 1 + K]. Which of them are right "
        "answers to query i?",
        "For each query collect the set of right texts: the positives of all queries with its text. A passage is "
        "masked when its text is in that set, but for the query's own positive.",
        "In a loop over the queries: right = {p for q, p in zip(queries, passages[::group]) if q == query}; then "
        "mask[i] = torch.tensor([passage in right for passage in passages]); then mask[i, i * group] = False.",
    ),
)
