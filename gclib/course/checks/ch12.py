"""Chapter 12's exercises: what an identical passage does to the pull, two masks, and what a budget of tokens buys.

Letters: B queries of a batch, K hard negatives of a query, N = B (1 + K) passages, D numbers of a representation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .engine import Exercise, Misconception
from .judging import Inputs

# --- the pull on a query whose positive stands there several times ------------------------------------------------


def _row_with_twins(rng: np.random.Generator, *, twins: tuple[int, int]) -> Inputs:
    """A row of logits whose first is the positive's; its twins have the same logit, anywhere among the others."""
    count, size = int(rng.integers(*twins)), int(rng.integers(7, 12))
    logits = rng.normal(0, 1.5, size)
    columns = np.sort(1 + rng.permutation(size - 1)[:count])
    logits[columns] = logits[0]
    return {"logits": torch.from_numpy(logits), "twins": columns.tolist()}


def _slope_of_one_text(logits: Tensor, twins: list[int]) -> float:
    """By autograd: one number stands in all places of the text, and the loss is differentiated by it."""
    text = logits[0].clone().requires_grad_()
    places = {0, *twins}
    row = torch.stack([text if place in places else logit for place, logit in enumerate(logits)])
    (slope,) = torch.autograd.grad(row.logsumexp(0) - text, text)
    return slope.item()


def _shares(logits: Tensor, twins: list[int]) -> tuple[float, list[float]]:
    """The softmax at the positive, and at its twins."""
    shares = [math.exp(value) for value in logits.tolist()]
    return shares[0] / sum(shares), [shares[twin] / sum(shares) for twin in twins]


def _by_shares(combine: Callable[[float, list[float]], float]) -> Callable[[Tensor, list[int]], float]:
    """A wrong answer: combine(the positive's share, the twins' shares)."""
    return lambda logits, twins: combine(*_shares(logits, twins))


net_pull = Exercise(
    chapter=12,
    name="net_pull",
    spec="the derivative of the row's loss by the logit of the positive's text, which stands in column 0 and in the "
    "columns of its twins (a float; negative where the query is pulled).",
    line_budget=2,
    oracle=_slope_of_one_text,
    makers=(partial(_row_with_twins, twins=(2, 5)), partial(_row_with_twins, twins=(0, 1))),
    rtol=1e-5,
    atol=1e-8,
    misconceptions=(
        Misconception(
            "twins forgotten",
            "That is the slope of column 0 alone. Its twins are the same text: what pushes them away pushes the "
            "positive away.",
            _by_shares(lambda own, others: own - 1),
        ),
        Misconception(
            "twins masked",
            "That is the pull with the twins masked. Here they stand in the denominator.",
            _by_shares(lambda own, others: own / (1 - sum(others)) - 1),
        ),
        Misconception(
            "sign turned",
            "The size is right. A loss falls where the positive's logit grows: its slope is negative.",
            _by_shares(lambda own, others: 1 - own - sum(others)),
        ),
        Misconception(
            "twins pulled as well",
            "It looks as if every twin had a 1 taken off, like a positive. Only column 0 stands in the numerator.",
            _by_shares(lambda own, others: own + sum(others) - 1 - len(others)),
        ),
        Misconception(
            "only one twin",
            "It looks as if one twin counted. All of them are the same text.",
            _by_shares(lambda own, others: own + sum(others[:1]) - 1),
        ),
        Misconception(
            "the share, not the slope",
            "That is the text's share of the softmax. The slope has 1 less, for the numerator.",
            _by_shares(lambda own, others: own + sum(others)),
        ),
        Misconception(
            "mean of the columns",
            "It looks as if the columns' slopes were averaged. The text stands in all of them: they add up.",
            _by_shares(lambda own, others: (own + sum(others) - 1) / (1 + len(others))),
        ),
        Misconception(
            "the twins' push alone",
            "That is how hard the twins are pushed away. The positive's own pull belongs to it.",
            _by_shares(lambda own, others: sum(others)),
        ),
        Misconception(
            "the twins' push taken off",
            "It looks as if the twins' shares were taken off. They push the text away, and the positive's column pulls "
            "it: the shares add to the slope, and what is left of the pull is less.",
            _by_shares(lambda own, others: own - 1 - sum(others)),
        ),
        Misconception(
            "own share forgotten",
            "Column 0 stands in the denominator too: its own share is missing.",
            _by_shares(lambda own, others: sum(others) - 1),
        ),
        Misconception(
            "the loss, not its slope",
            "That is the row's loss. Asked for is how it changes with the logit of one text.",
            _by_shares(lambda own, others: -math.log(own)),
        ),
        Misconception(
            "logarithms of the shares",
            "It looks as if log_softmax were added up. The slope of log-sum-exp is the share itself: softmax.",
            _by_shares(lambda own, others: sum(map(math.log, (own, *others))) - 1),
        ),
    ),
    hints=(
        "What is the slope of log-sum-exp by one logit? In how many columns does this text stand?",
        "The softmax's share of each column of the text, added up, and 1 off for the numerator.",
        "shares = logits.softmax(0); return (shares[0] + shares[twins].sum() - 1).item()",
    ),
)

# --- a mask by a guide --------------------------------------------------------------------------------------------


def _guided(rng: np.random.Generator, *, hard: bool) -> Inputs:
    """Vectors of unlike lengths, about half of them leaning away from their positive."""
    rows, group, width = int(rng.integers(5, 9)), 1 + (int(rng.integers(1, 4)) if hard else 0), 3
    queries, passages = rng.normal(size=(rows, width)), rng.normal(size=(rows * group, width))
    queries *= rng.uniform(0.3, 3, (rows, 1))
    passages *= rng.uniform(0.3, 3, (rows * group, 1))
    return {
        "queries": torch.from_numpy(queries),
        "passages": torch.from_numpy(passages),
        "margin": round(float(rng.uniform(0.2, 0.6)), 3),
    }


def _guide_by_hand(queries: Tensor, passages: Tensor, margin: float) -> Tensor:
    """Cell by cell, with angles."""

    def cosine(left: list[float], right: list[float]) -> float:
        return sum(a * b for a, b in zip(left, right, strict=True)) / (math.hypot(*left) * math.hypot(*right))

    rows, columns = queries.tolist(), passages.tolist()
    group, mask = len(columns) // len(rows), []
    for place, row in enumerate(rows):
        own = cosine(row, columns[place * group])
        least = own - margin * abs(own)
        mask.append([j != place * group and cosine(row, columns[j]) > least for j in range(len(columns))])
    return torch.tensor(mask)


@dataclass(frozen=True)
class _Guide:
    """Right but for the fields that are changed.

    length: what a vector is divided by its norm for. least(own similarity, margin, whole row's). first: the positive
    stands in the query's own column number. own: the positive is left out too. kept: the mask says what stays.
    """

    length: Callable[[Tensor], Tensor] = lambda vectors: F.normalize(vectors, dim=1)
    least: Callable[[Tensor, float, Tensor], Tensor] = lambda own, margin, row: own - own.abs() * margin
    first: bool = False
    own: bool = False
    kept: bool = False

    def __call__(self, queries: Tensor, passages: Tensor, margin: float) -> Tensor:
        similarities = self.length(queries) @ self.length(passages).T
        group = 1 if self.first else len(passages) // len(queries)
        rows = torch.arange(len(queries))
        own = similarities[rows, rows * group]
        mask = similarities > self.least(own, margin, similarities).unsqueeze(1)
        if self.kept:
            return ~mask
        if not self.own:
            mask[rows, rows * group] = False
        return mask


def _own_group_spared(queries: Tensor, passages: Tensor, margin: float) -> Tensor:
    group = torch.arange(len(passages)) // (len(passages) // len(queries))
    return _Guide()(queries, passages, margin) & (group != torch.arange(len(queries)).unsqueeze(1))


def _positives_spared(queries: Tensor, passages: Tensor, margin: float) -> Tensor:
    return _Guide()(queries, passages, margin) & (torch.arange(len(passages)) % (len(passages) // len(queries)) != 0)


guide_mask = Exercise(
    chapter=12,
    name="guide_mask",
    spec="(B, N) bool, True where the guide's cosine similarity is above s - |s| * margin, with s that of the query "
    "and its own positive; never True for the own positive.",
    line_budget=6,
    oracle=_guide_by_hand,
    makers=(partial(_guided, hard=True), partial(_guided, hard=False)),
    misconceptions=(
        Misconception(
            "dot products",
            "The vectors are not of length 1: divide by their lengths first, or products tell of lengths too.",
            _Guide(length=lambda vectors: vectors),
        ),
        Misconception(
            "hard negatives forgotten",
            "It looks as if query i's positive stood in column i. With K hard negatives it is column i (1 + K).",
            _Guide(first=True),
        ),
        Misconception(
            "positive masked",
            "The own positive is left out too: it is always above its own threshold. Without it there is no loss.",
            _Guide(own=True),
        ),
        Misconception(
            "margin added",
            "The threshold lies above the positive's similarity: so a passage as good as the positive stays a "
            "negative. The margin is taken off.",
            _Guide(least=lambda own, margin, row: own + own.abs() * margin),
        ),
        Misconception(
            "absolute margin",
            "It looks as if the margin itself were taken off. Asked for is the relative one: margin times |s|.",
            _Guide(least=lambda own, margin, row: own - margin),
        ),
        Misconception(
            "(1 - margin) times s",
            "For a positive with a negative similarity, (1 - margin) s lies above s. The margin is taken of |s|.",
            _Guide(least=lambda own, margin, row: own * (1 - margin)),
        ),
        Misconception(
            "margin forgotten",
            "It looks as if a passage had to beat the positive itself. With a margin, nearly as near is near enough.",
            _Guide(least=lambda own, margin, row: own),
        ),
        Misconception(
            "the row's best",
            "It looks as if the threshold came from the nearest passage. It comes from the query's own positive.",
            _Guide(least=lambda own, margin, row: row.amax(dim=1) - row.amax(dim=1).abs() * margin),
        ),
        Misconception(
            "kept, not left out",
            "The mask is turned around: True is what is left out.",
            _Guide(kept=True),
        ),
        Misconception(
            "kept, not left out",
            "The mask is turned around: True is what is left out.",
            lambda queries, passages, margin: ~_Guide()(queries, passages, margin),
        ),
        Misconception(
            "the margin as the threshold",
            "It looks as if similarities were held against the margin. It says how far below its own positive.",
            _Guide(least=lambda own, margin, row: torch.full_like(own, margin)),
        ),
        Misconception(
            "own hard negatives spared",
            "It looks as if a query's own hard negatives could not be left out. Mined passages are right more often "
            "than others: only column i (1 + K) is spared.",
            _own_group_spared,
        ),
        Misconception(
            "all positives spared",
            "It looks as if no query's positive could be left out. Another query's positive may be right for this one "
            "too: only the own is spared.",
            _positives_spared,
        ),
    ),
    hints=(
        "Which similarity is the measure for a whole row? Where does it stand when there are hard negatives?",
        "Normalise both, take the products; own = those at columns i (1 + K); compare each row with its own threshold; "
        "then set the own positives to False.",
        "s = F.normalize(queries, dim=1) @ F.normalize(passages, dim=1).T; rows = torch.arange(len(s)); columns = rows "
        "* (len(passages) // len(queries)); own = s[rows, columns, None]; mask = s > own - own.abs() * margin; "
        "mask[rows, columns] = False",
    ),
)

# --- a loss with a mask -------------------------------------------------------------------------------------------


def _masked(rng: np.random.Generator, *, hard: bool) -> Inputs:
    """A third of the cells masked, no positive, none at [i, i], and the first row not at all."""
    rows, group = int(rng.integers(4, 9)), 1 + (int(rng.integers(1, 4)) if hard else 0)
    logits = rng.normal(1.0, 1.0, (rows, rows * group))
    mask = rng.random((rows, rows * group)) < 1 / 3
    mask[0] = False
    mask[-1, 1] = True
    mask[np.arange(rows), np.arange(rows)] = mask[np.arange(rows), np.arange(rows) * group] = False
    return {"logits": torch.from_numpy(logits), "mask": torch.from_numpy(mask)}


def _row_by_row(logits: Tensor, mask: Tensor) -> Tensor:
    """The sum of what is left, row by row."""
    group, losses = logits.shape[1] // logits.shape[0], []
    for place, row in enumerate(logits):
        own = row[place * group]
        left = [row[j] for j in range(len(row)) if not mask[place, j]]
        losses.append(torch.stack([(other - own).exp() for other in left]).sum().log())
    return torch.stack(losses).mean()


def _labels(logits: Tensor) -> Tensor:
    return torch.arange(len(logits)) * (logits.shape[1] // logits.shape[0])


def _cross_entropy(change: Callable[[Tensor, Tensor], Tensor], reduction: str = "mean") -> Callable:
    """A wrong answer: cross entropy of change(logits, mask)."""
    return lambda logits, mask: F.cross_entropy(change(logits, mask), _labels(logits), reduction=reduction)


def _without(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(mask, -math.inf)


def _positives(logits: Tensor) -> Tensor:
    return F.one_hot(_labels(logits), logits.shape[1]).bool()


def _rows_dropped(logits: Tensor, mask: Tensor) -> Tensor:
    clean = ~mask.any(dim=1)
    return F.cross_entropy(logits[clean], _labels(logits)[clean])


masked_loss = Exercise(
    chapter=12,
    name="masked_loss",
    spec="the mean over the rows of -log softmax at the positive (column i (1 + K)), with what the mask says left out "
    "of the row's denominator; a scalar with its graph.",
    line_budget=3,
    oracle=_row_by_row,
    makers=(partial(_masked, hard=True), partial(_masked, hard=False)),
    differentiable=True,
    rtol=1e-6,
    atol=1e-9,
    misconceptions=(
        Misconception(
            "logits set to zero",
            "It looks as if masked logits became 0. exp(0) is 1: they still stand in the denominator. Minus infinity "
            "takes them out.",
            _cross_entropy(lambda logits, mask: logits.masked_fill(mask, 0.0)),
        ),
        Misconception(
            "mask forgotten",
            "That is the loss without a mask.",
            _cross_entropy(lambda logits, mask: logits),
        ),
        Misconception(
            "whole rows left out",
            "It looks as if a query with a false negative were dropped. Only the cells are: the query still learns "
            "from all its other negatives.",
            _rows_dropped,
        ),
        Misconception(
            "left out for everyone",
            "It looks as if a passage that is masked for one query were gone for all. For the others it is a negative "
            "like any.",
            _cross_entropy(lambda z, mask: _without(z, mask.any(dim=0).expand_as(mask) & ~_positives(z))),
        ),
        Misconception(
            "mask turned around",
            "It looks as if the masked cells stayed and the others went. True is what is left out.",
            _cross_entropy(lambda logits, mask: _without(logits, ~mask & ~_positives(logits))),
        ),
        Misconception(
            "mask turned around",
            "It looks as if the masked cells stayed and the others went, the positive with them. True is what is left "
            "out.",
            _cross_entropy(lambda logits, mask: _without(logits, ~mask)),
        ),
        Misconception(
            "the positive not in the denominator",
            "It looks as if only negatives were summed. The softmax's denominator has the positive too.",
            lambda z, mask: (_without(z, mask | _positives(z)).logsumexp(dim=1) - z[_positives(z)]).mean(),
        ),
        Misconception(
            "zeros among the logarithms",
            "It looks as if the mask came after the softmax, and all cells were averaged. What is left out must go "
            "before, so that the denominator lacks it; and only the positive's logarithm counts.",
            lambda z, mask: -z.log_softmax(dim=1).masked_fill(mask, 0).mean(),
        ),
        Misconception(
            "labels without hard negatives",
            "It looks as if query i's positive stood in column i. With K hard negatives it is column i (1 + K).",
            lambda z, mask: F.cross_entropy(_without(z, mask), torch.arange(len(z))),
        ),
        Misconception(
            "sum over the rows",
            "That is the sum over the rows. Asked for is their mean.",
            _cross_entropy(_without, "sum"),
        ),
        Misconception(
            "masked cells counted in the mean",
            "It looks as if each row were weighed with the cells that are left in it. Every query counts once.",
            lambda z, mask: (
                (F.cross_entropy(_without(z, mask), _labels(z), reduction="none") * (~mask).sum(dim=1)).sum()
                / (~mask).sum()
            ),
        ),
    ),
    hints=(
        "What must a logit be so that its exponential is 0?",
        "masked_fill with minus infinity, then cross entropy. Where is the positive of query i if N = B (1 + K)?",
        "labels = torch.arange(len(logits)) * (logits.shape[1] // len(logits)); "
        "return F.cross_entropy(logits.masked_fill(mask, float('-inf')), labels)",
    ),
)

# --- what a budget of tokens buys ---------------------------------------------------------------------------------


def _budget(rng: np.random.Generator, *, hard: bool) -> Inputs:
    query, passage = int(rng.integers(8, 40)), int(rng.integers(50, 120))
    hard_negatives = int(rng.integers(2, 9)) if hard else 0
    one = query + passage * (1 + hard_negatives)
    budget = one * int(rng.integers(9, 60)) + int(rng.integers(1, one))
    return {
        "budget": budget,
        "query_tokens": query,
        "passage_tokens": passage,
        "hard_negatives": hard_negatives,
    }


def _spend(budget: int, query_tokens: int, passage_tokens: int, hard_negatives: int) -> dict[str, int]:
    """One query after the other, with its passages, until the tokens are spent."""
    passages, queries = [], 0
    while True:
        new = [passage_tokens for _ in range(1 + hard_negatives)]
        if query_tokens + sum(new) > budget:
            return {"queries": queries, "negatives": len(passages[1:])}
        budget -= query_tokens + sum(new)
        queries, passages = queries + 1, passages + new


def _spent(
    cost: Callable[[int, int, int], int] = lambda q, p, k: q + p * (1 + k),
    negatives: Callable[[int, int], int] = lambda b, k: b * (1 + k) - 1,
    up: bool = False,
) -> Callable[[int, int, int, int], dict[str, int]]:
    """Right but for what is given: a query's cost in tokens, the negatives among B queries, rounding."""

    def answer(budget: int, query_tokens: int, passage_tokens: int, hard_negatives: int) -> dict[str, int]:
        queries = (budget - up) // cost(query_tokens, passage_tokens, hard_negatives) + up
        return {"queries": queries, "negatives": negatives(queries, hard_negatives)}

    return answer


at_equal_tokens = Exercise(
    chapter=12,
    name="at_equal_tokens",
    spec='{"queries": how many fit into the budget with all their passages, "negatives": the passages that each of '
    "them is held against beside its own positive}, ints.",
    line_budget=3,
    oracle=_spend,
    makers=(partial(_budget, hard=True), partial(_budget, hard=False)),
    whole=True,
    misconceptions=(
        Misconception(
            "positive not paid for",
            "It looks as if a query cost its own tokens and those of its hard negatives. Its positive is encoded too.",
            _spent(cost=lambda q, p, k: q + p * k),
        ),
        Misconception(
            "positive not paid for",
            "It looks as if a query cost its own tokens and those of its hard negatives. Its positive is encoded too.",
            _spent(cost=lambda q, p, k: q + p * max(k, 1)),
        ),
        Misconception(
            "hard negatives not paid for",
            "It looks as if hard negatives cost nothing. Each of them is a passage to encode, and most of the price.",
            _spent(cost=lambda q, p, k: q + p),
        ),
        Misconception(
            "queries not paid for",
            "It looks as if only passages were encoded. The query is a text as well.",
            _spent(cost=lambda q, p, k: p * (1 + k)),
        ),
        Misconception(
            "a query for every passage",
            "It looks as if every hard negative brought a query of its own along.",
            _spent(cost=lambda q, p, k: (q + p) * (1 + k)),
        ),
        Misconception(
            "own positive counted",
            "One too many: the query's own positive stands in the loss too, and is no negative.",
            _spent(negatives=lambda b, k: b * (1 + k)),
        ),
        Misconception(
            "only its own hard negatives",
            "It looks as if a query met the other positives and its own K hard negatives. It meets those of all other "
            "queries too.",
            _spent(negatives=lambda b, k: b - 1 + k),
        ),
        Misconception(
            "other positives alone",
            "It looks as if only the other queries' positives were negatives.",
            _spent(negatives=lambda b, k: b - 1),
        ),
        Misconception(
            "hard negatives alone",
            "It looks as if only hard negatives were negatives: B K of them. The other queries' positives are too.",
            _spent(negatives=lambda b, k: b * k),
        ),
        Misconception(
            "its own hard negatives left out",
            "It looks as if a query did not meet its own hard negatives. It is for this query that they were mined.",
            _spent(negatives=lambda b, k: (b - 1) * (1 + k)),
        ),
        Misconception(
            "its own hard negatives alone",
            "It looks as if a query met nothing but its K hard negatives. It meets every passage of the batch.",
            _spent(negatives=lambda b, k: k),
        ),
        Misconception(
            "hard negatives of queries",
            "It looks as if a hard negative had a query's length. It is a passage.",
            _spent(cost=lambda q, p, k: q * (1 + k) + p),
        ),
        Misconception(
            "rounded up",
            "The last query does not fit any more: round down.",
            _spent(up=True),
        ),
    ),
    hints=(
        "What does one query cost, with everything that is encoded for it? And what stands in the loss?",
        "query_tokens + (1 + K) * passage_tokens each; all passages but one are negatives.",
        'queries = budget // (query_tokens + passage_tokens * (1 + hard_negatives)); return {"queries": queries, '
        '"negatives": queries * (1 + hard_negatives) - 1}',
    ),
)
