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
            "base 10, not e",
            "That is the logarithm to base 10: nats are to base e, math.log.",
            lambda batch_size, hard_negatives: math.log10(batch_size * (1 + hard_negatives)),
        ),
        Misconception(
            "own group only",
            "It looks as if a query chose among its own 1 + K passages: it meets those of all queries.",
            lambda batch_size, hard_negatives: math.log(1 + hard_negatives),
        ),
        Misconception(
            "no logarithm",
            "That is the number of passages: the loss is minus the logarithm of the probability 1 / N.",
            lambda batch_size, hard_negatives: batch_size * (1 + hard_negatives),
        ),
        Misconception(
            "added over the queries",
            "That is the sum over the B queries: the loss is their mean.",
            lambda batch_size, hard_negatives: batch_size * math.log(batch_size * (1 + hard_negatives)),
        ),
        Misconception(
            "divided by B once more",
            "Every query has the same loss, so their mean is that loss: nothing is left to divide.",
            lambda batch_size, hard_negatives: math.log(batch_size * (1 + hard_negatives)) / batch_size,
        ),
        Misconception(
            "positive counted twice",
            "There are N passages in the denominator, the positive among them: not N + 1.",
            lambda batch_size, hard_negatives: math.log1p(batch_size * (1 + hard_negatives)),
        ),
        Misconception(
            "factor outside the logarithm",
            "1 + K belongs inside the logarithm: it multiplies the number of passages, and not the loss.",
            lambda batch_size, hard_negatives: math.log(batch_size) * (1 + hard_negatives),
        ),
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
        "Every row has the same loss, so the mean over rows changes nothing: one logarithm, of one product.",
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


def _long_reps(rng: np.random.Generator) -> Inputs:
    """Representations of any length: no sentence says that they are normalised."""
    inputs = _ordinary_reps(rng)
    lengths = {name: torch.from_numpy(rng.uniform(0.5, 2.0, (len(inputs[name]), 1))).float() for name in _TOWERS}
    return inputs | {name: inputs[name] * length for name, length in lengths.items()}


_TOWERS = ("query_reps", "passage_reps")


def _sharp_reps(rng: np.random.Generator) -> Inputs:
    """Close pairs at a low temperature: exp(logit) is beyond what float32 can hold, the loss is not."""
    inputs = _ordinary_reps(rng) | {"temperature": round(float(rng.uniform(0.002, 0.003)), 5)}
    queries = inputs["query_reps"]
    close = F.normalize(queries + 0.2 * _reps(rng, *queries.shape), dim=1)
    close[1] = F.normalize(queries[0] + 0.2 * _reps(rng, 1, queries.shape[1])[0], dim=0)
    close[2] = -queries[2]  # one query is far from its own passage: a softmax of it is 0 in float32, its loss is not
    return inputs | {"passage_reps": close}


def _close_reps(rng: np.random.Generator) -> Inputs:
    """All texts nearly alike, as a fresh encoder has them, at a low temperature: all logits are large together."""
    inputs = _ordinary_reps(rng) | {"temperature": round(float(rng.uniform(0.004, 0.006)), 4)}
    axis = F.normalize(torch.ones(inputs["query_reps"].shape[1]), dim=0)
    return inputs | {name: F.normalize(axis + 0.1 * inputs[name], dim=1) for name in _TOWERS}


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


def _overflowing(logits: Tensor) -> Tensor:
    """The loss of these logits with exponentials as they are."""
    return -(logits.exp().diagonal() / logits.exp().sum(dim=1)).log().mean()


info_nce = Exercise(
    chapter=1,
    name="info_nce",
    spec="the loss of equation (1), averaged over the B queries; passage i is the positive of query i (a scalar).",
    line_budget=3,
    oracle=_reference_info_nce,
    makers=(_ordinary_reps, _long_reps, _sharp_reps, _close_reps),
    differentiable=True,
    without=frozenset({"contrastive_loss", "ContrastiveLoss"}),
    atol=1e-3,  # logits of 200 carry float32 rounding of 1e-5 each
    gradient_error=1e-2,
    misconceptions=(
        Misconception(
            "logarithm of a softmax",
            "Right at mild temperatures. A softmax is 0 in float32 where the own passage is far behind, and its "
            "logarithm infinite: take both in one step (log_softmax, cross_entropy).",
            lambda q, p, t: -_logits(q, p, t).softmax(dim=1).diagonal().log().mean(),
        ),
        Misconception(
            "a loss for each query",
            "Those are the queries' own losses: their mean is asked for.",
            lambda q, p, t: _cross_entropy(_logits(q, p, t), reduction="none"),
        ),
        Misconception(
            "both directions, added",
            "It looks as if the loss of the passages, choosing among the queries, was added: equation (1) has one "
            "direction.",
            lambda q, p, t: _cross_entropy(_logits(q, p, t)) + _cross_entropy(_logits(p, q, t)),
        ),
        Misconception(
            "queries normalised",
            "It looks as if the queries are normalised once more: equation (1) takes them as they come.",
            lambda q, p, t: _cross_entropy(_logits(F.normalize(q, dim=1), p, t)),
        ),
        Misconception(
            "passage 0 right for all",
            "It looks as if passage 0 is the right answer for every query: passage i belongs to query i.",
            lambda q, p, t: F.cross_entropy(_logits(q, p, t), torch.zeros(len(q), dtype=torch.long)),
        ),
        Misconception(
            "distances instead of dot products",
            "It looks as if distances are compared: equation (1) has dot products.",
            lambda q, p, t: _cross_entropy(-torch.cdist(q, p) / t),
        ),
        Misconception(
            "a yes or no for each pair",
            "That is a binary cross entropy over all pairs: the softmax runs over each query's row.",
            lambda q, p, t: F.binary_cross_entropy_with_logits(_logits(q, p, t), torch.eye(len(q))),
        ),
        Misconception(
            "divided by the root of the width",
            "It looks as if the logits are divided by the root of D, as in attention: only the temperature divides.",
            lambda q, p, t: _cross_entropy(_logits(q, p, t * q.shape[1] ** 0.5)),
        ),
        Misconception(
            "positives added, not averaged",
            "The denominators are averaged, but the positives' logits are added: both are means over the B queries.",
            lambda q, p, t: _logits(q, p, t).logsumexp(dim=1).mean() - (q * p).sum() / t,
        ),
        Misconception(
            "passages detached",
            "The value is right, but the passages are detached: both towers learn from this loss.",
            lambda q, p, t: _cross_entropy(_logits(q, p.detach(), t)),
        ),
        Misconception(
            "half precision",
            "Nearly: it looks as if the logits were computed in half precision, too coarse at low temperatures.",
            lambda q, p, t: _cross_entropy((q.half() @ p.half().T / t).float()),
        ),
        Misconception(
            "one number taken off all rows",
            "It looks as if one number is taken off all rows (the largest logit of all, or 1 / temperature): a row far "
            "below it underflows. Each row has its own maximum (logsumexp and cross_entropy see to that).",
            lambda q, p, t: _overflowing(_logits(q, p, t) - _logits(q, p, t).max()),
        ),
        Misconception(
            "logits clamped",
            "It looks as if large logits are cut (clamp): then they are others.",
            lambda q, p, t: _cross_entropy(_logits(q, p, t).clamp(-80, 80)),
        ),
        *(
            Misconception(
                "a small number inside the logarithm",
                f"It looks as if {small:g} is added inside the logarithm, or is the least that it is taken of: "
                "that hides the underflow, and no query's loss can grow beyond minus its logarithm. Take the logarithm "
                "of the softmax in one step.",
                lambda q, p, t, small=small: -(_logits(q, p, t).softmax(1).diagonal() + small).log().mean(),
            )
            for small in (1e-12, 1e-10, 1e-8, 1e-6)
        ),
        *(
            Misconception(
                "temperature kept away from 0",
                f"It looks as if the temperature is never below {least:g}: it is asked to survive low ones.",
                lambda q, p, t, least=least: _cross_entropy(_logits(q, p, max(t, least))),
            )
            for least in (0.01, 0.05, 0.1)
        ),
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
        "It takes logits, not probabilities, and the number of the right column for each row. Look up what its second "
        "argument is when row i's answer is i.",
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
            "query 0 forgotten",
            "Those begin with query 1: query 0 has its positive in column 0.",
            lambda batch_size, hard_negatives: torch.arange(1, batch_size + 1) * (1 + hard_negatives),
        ),
        Misconception(
            "stretched to the last column",
            "Those are spread from the first column to the last (linspace): the steps are 1 + K.",
            lambda batch_size, hard_negatives: torch.linspace(
                0, batch_size * (1 + hard_negatives) - 1, batch_size
            ).long(),
        ),
        *(
            Misconception(
                f"one-hot rows of {numbers}",
                "Those are rows of zeros with a one: the number of the column is asked for.",
                lambda batch_size, hard_negatives, dtype=dtype: torch.eye(
                    batch_size * (1 + hard_negatives), dtype=dtype
                )[:: 1 + hard_negatives],
            )
            for numbers, dtype in {"integers": torch.int64, "floats": torch.float32}.items()
        ),
        Misconception(
            "every passage's query",
            "That says for each passage whose it is: for each query, the column of its positive is asked for.",
            lambda batch_size, hard_negatives: torch.arange(batch_size).repeat_interleave(1 + hard_negatives),
        ),
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
        "An arange in steps: where does it begin, where must it end, and of which dtype is it?",
    ),
)


def _texts_with_twins(rng: np.random.Generator) -> Inputs:
    """Two equal queries, two equal positives, and two hard negatives that are right answers for somebody.

    And texts that are nearly the same, which is not the same: in capitals, with a blank behind, inside a longer one.
    """
    batch, hard = int(rng.integers(6, 9)), int(rng.integers(1, 4))
    first, second, third, fourth, fifth, sixth = rng.permutation(batch)[:6].tolist()
    group = 1 + hard
    queries = [f"question {n}" for n in rng.permutation(100)[:batch].tolist()]
    passages = [f"answer {n}" for n in rng.permutation(1000)[: batch * group].tolist()]
    queries[second] = queries[first]
    passages[fourth * group] = passages[third * group]
    passages[fifth * group + 1] = passages[third * group]
    passages[third * group + 1] = passages[first * group]
    queries[sixth] = queries[first].upper() if rng.integers(2) else queries[first] + " "
    passages[sixth * group + 1] = (
        passages[second * group].upper() if rng.integers(2) else passages[second * group] + " "
    )
    passages[second * group + 1] = f"an {passages[first * group]} or more"
    passages[fourth * group + 1] = queries[fourth]
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
            "capitals ignored",
            "It looks as if texts are compared without their capitals: the same text is asked for.",
            lambda queries, passages: _reference_mask([q.lower() for q in queries], [p.lower() for p in passages]),
        ),
        Misconception(
            "queries' capitals ignored",
            "It looks as if queries are compared without their capitals: the same text is asked for.",
            lambda queries, passages: _reference_mask([q.lower() for q in queries], passages),
        ),
        Misconception(
            "passages' capitals ignored",
            "It looks as if passages are compared without their capitals: the same text is asked for.",
            lambda queries, passages: _reference_mask(queries, [p.lower() for p in passages]),
        ),
        Misconception(
            "blanks ignored",
            "It looks as if blanks at the ends are cut off first: the same text is asked for.",
            lambda queries, passages: _reference_mask([q.strip() for q in queries], [p.strip() for p in passages]),
        ),
        Misconception(
            "part of a text taken for it",
            "It looks as if `in` compares the texts: a longer passage that holds a right answer is another text.",
            lambda queries, passages: _mask(
                queries,
                passages,
                lambda i, j, group: (
                    j != i * group
                    and any(q == queries[i] and passages[k * group] in passages[j] for k, q in enumerate(queries))
                ),
            ),
        ),
        Misconception(
            "only the last of equal queries",
            "It looks as if a dict keeps one positive for each text, the last one: equal queries have several.",
            lambda queries, passages: _mask(
                queries,
                passages,
                lambda i, j, group: (
                    j != i * group
                    and passages[j] == {q: passages[k * group] for k, q in enumerate(queries)}[queries[i]]
                ),
            ),
        ),
        Misconception(
            "later queries only",
            "It looks as if only later queries are looked at: an earlier one with the same text counts too.",
            lambda queries, passages: _mask(
                queries,
                passages,
                lambda i, j, group: (
                    j != i * group
                    and any(
                        queries[k] == queries[i] and passages[k * group] == passages[j] for k in range(i, len(queries))
                    )
                ),
            ),
        ),
        Misconception(
            "column i spared",
            "It looks as if column i is spared in row i (fill_diagonal_): the query's own positive is in i(1 + K).",
            lambda queries, passages: _mask_with_positives(queries, passages).fill_diagonal_(False),
        ),
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
            "nothing masked",
            "Nothing is masked: some queries are asked twice, and some right answers stand twice. Compare queries with "
            "queries, and passages with positives.",
            lambda queries, passages: _mask(queries, passages, lambda i, j, group: False),
        ),
        Misconception(
            "queries compared with passages",
            "It looks as if a passage was masked where it reads like the query. Compare queries with queries, and "
            "passages with positives.",
            lambda queries, passages: _mask(queries, passages, lambda i, j, group: queries[i] == passages[j]),
        ),
    ),
    hints=(
        "1 + K is len(passages) // len(queries), so the positives are passages[:: 1 + K]. Which of them are right "
        "answers to query i?",
        "For each query collect the set of right texts: the positives of all queries with its text. A passage is "
        "masked when its text is in that set, but for the query's own positive.",
        "A dict from query text to the set of its positives' texts is made in one pass; then one row of the mask for "
        "each query; at last the one cell that must stay False, in column i(1 + K).",
    ),
)
