"""Answers to chapter 12, in the styles and with the mistakes of readers."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch12")

# --- the pull that is left ------------------------------------------------------------------------------------


@right("net_pull")
def pull_by_autograd(logits, twins):
    z = logits.clone().detach().requires_grad_(True)
    F.cross_entropy(z[None], torch.tensor([0])).backward()
    return z.grad[[0] + list(twins)].sum().item()


@right("net_pull")
def pull_as_a_tensor(logits, twins):
    return logits.softmax(0)[[0, *twins]].sum() - 1


@right("net_pull")
def pull_in_a_loop(logits, twins):
    e = [math.exp(v) for v in logits.tolist()]
    total = e[0]
    for t in twins:
        total += e[t]
    return total / sum(e) - 1


@right("net_pull")
def pull_from_the_wrong_ones(logits, twins):
    p = torch.softmax(logits, 0)
    return -float(sum(p[j] for j in range(len(p)) if j != 0 and j not in twins))


right("net_pull")(lambda logits, twins: np.exp(logits.numpy() - logits.logsumexp(0).item())[[0, *twins]].sum() - 1)

wrong("net_pull", "twins forgotten")(lambda logits, twins: (logits.softmax(0)[0] - 1).item())
wrong("net_pull", "sign turned")(lambda logits, twins: (1 - logits.softmax(0)[[0, *twins]].sum()).item())
wrong("net_pull", "the share, not the slope")(lambda logits, twins: logits.softmax(0)[[0, *twins]].sum().item())
wrong("net_pull", "the twins' push taken off")(
    lambda logits, twins: (logits.softmax(0)[0] - 1 - logits.softmax(0)[twins].sum()).item()
)
wrong("net_pull", "twins pulled as well")(lambda logits, twins: (logits.softmax(0)[[0, *twins]] - 1).sum().item())
wrong("net_pull", "twins pulled as well")(lambda logits, twins: ((1 + len(twins)) * (logits.softmax(0)[0] - 1)).item())
wrong("net_pull", "the twins' push alone")(lambda logits, twins: logits.softmax(0)[twins].sum().item())
wrong("net_pull", "mean of the columns")(
    lambda logits, twins: (logits.softmax(0)[[0, *twins]].sum() - 1).item() / (1 + len(twins))
)
wrong("net_pull", "own share forgotten")(lambda logits, twins: (logits.softmax(0)[twins].sum() - 1).item())
wrong("net_pull", "the loss, not its slope")(lambda logits, twins: (logits.logsumexp(0) - logits[0]).item())
wrong("net_pull", None)(lambda logits, twins: (logits[[0, *twins]].softmax(0)[0] - 1).item())
wrong("net_pull", None)(lambda logits, twins: (logits.exp().softmax(0)[[0, *twins]].sum() - 1).item())
wrong("net_pull", None)(lambda logits, twins: (logits[[0, *twins]].sum() / logits.sum() - 1).item())
wrong("net_pull", "logarithms of the shares")(
    lambda logits, twins: (logits.log_softmax(0)[[0, *twins]].sum() - 1).item()
)
wrong("net_pull", "another form")(lambda logits, twins: logits.softmax(0)[[0, *twins]] - 1)
wrong("net_pull", None)(lambda logits, twins: (logits.softmax(0)[0] - 1 + len(twins) * logits.softmax(0)[0]) * 0.05)


@wrong("net_pull", "twins masked")
def pull_with_the_twins_masked(logits, twins):
    left_out = logits.clone()
    left_out[twins] = -torch.inf
    return (left_out.softmax(0)[0] - 1).item()


@wrong("net_pull", None)
def pull_that_writes_into_the_logits(logits, twins):
    logits[twins] = logits[0]
    logits -= logits.max()
    return (logits.softmax(0)[[0, *twins]].sum() - 1).item()


# --- a mask by a guide ----------------------------------------------------------------------------------------


def _cosines(queries, passages):
    return F.normalize(queries, dim=1) @ F.normalize(passages, dim=1).T


def _own(queries, passages):
    return torch.arange(len(queries)) * (len(passages) // len(queries))


def _masked_above(threshold_of, similarities=_cosines, own=_own, cut=True):
    """A mask with one part of it done otherwise."""

    def answer(queries, passages, margin):
        s, places = similarities(queries, passages), own(queries, passages)
        positive = s.gather(1, places[:, None])
        mask = s > threshold_of(positive, margin)
        return mask.scatter(1, places[:, None], False) if cut else mask

    return answer


def _relative(positive, margin):
    return positive - positive.abs() * margin


@right("guide_mask")
def guide_by_broadcasting(queries, passages, margin):
    s = F.cosine_similarity(queries[:, None, :], passages[None, :, :], dim=-1)
    own = torch.arange(len(queries)) * (len(passages) // len(queries))
    positive = s[torch.arange(len(queries)), own].unsqueeze(1)
    return (s > positive - positive.abs() * margin) & (torch.arange(len(passages)) != own.unsqueeze(1))


@right("guide_mask")
def guide_in_loops(queries, passages, margin):
    k1, mask = len(passages) // len(queries), torch.zeros(len(queries), len(passages), dtype=torch.bool)
    s = _cosines(queries, passages).tolist()
    for i in range(len(queries)):
        for j in range(len(passages)):
            mask[i, j] = j != i * k1 and s[i][j] > s[i][i * k1] - abs(s[i][i * k1]) * margin
    return mask


@right("guide_mask")
def guide_by_a_stride(queries, passages, margin):
    q, p = queries / queries.norm(dim=1, keepdim=True), passages / passages.norm(dim=1, keepdim=True)
    own = (q * p[:: len(p) // len(q)]).sum(1, keepdim=True)
    mask = q @ p.T > own - margin * abs(own)
    mask[range(len(q)), range(0, len(p), len(p) // len(q))] = False
    return mask


wrong("guide_mask", "dot products")(_masked_above(_relative, similarities=lambda q, p: q @ p.T))
wrong("guide_mask", "hard negatives forgotten")(_masked_above(_relative, own=lambda q, p: torch.arange(len(q))))
wrong("guide_mask", "absolute margin")(_masked_above(lambda s, m: s - m))
wrong("guide_mask", "(1 - margin) times s")(_masked_above(lambda s, m: s * (1 - m)))
wrong("guide_mask", "margin forgotten")(_masked_above(lambda s, m: s))
wrong("guide_mask", "margin added")(_masked_above(lambda s, m: s + s.abs() * m))
wrong("guide_mask", "positive masked")(_masked_above(_relative, cut=False))
wrong("guide_mask", "dot products")(_masked_above(_relative, similarities=lambda q, p: F.normalize(q, dim=1) @ p.T))
wrong("guide_mask", None)(
    _masked_above(_relative, similarities=lambda q, p: F.normalize(q, 2, 0) @ F.normalize(p, 2, 0).T)
)
wrong("guide_mask", "the margin as the threshold")(_masked_above(lambda s, m: m))
wrong("guide_mask", None)(_masked_above(lambda s, m: s.abs() * m))
wrong("guide_mask", "kept, not left out")(lambda q, p, margin: ~_masked_above(_relative)(q, p, margin))
wrong("guide_mask", "another form")(lambda q, p, margin: _masked_above(_relative)(q, p, margin).float())
wrong("guide_mask", None)(lambda q, p, margin: _masked_above(_relative)(q, p, margin).T)


@wrong("guide_mask", "kept, not left out")
def guide_below(queries, passages, margin):
    s = _cosines(queries, passages)
    own = s.gather(1, _own(queries, passages)[:, None])
    return s < own - own.abs() * margin


@wrong("guide_mask", "positive masked")
def guide_with_or_equal(queries, passages, margin):
    s = _cosines(queries, passages)
    own = s.gather(1, _own(queries, passages)[:, None])
    return s >= own - own.abs() * margin


@wrong("guide_mask", None)
def guide_by_column(queries, passages, margin):
    s, places = _cosines(queries, passages), _own(queries, passages)
    own = s[torch.arange(len(s)), places].repeat_interleave(len(passages) // len(queries))
    mask = s > (own - own.abs() * margin)[None]
    return mask.scatter(1, places[:, None], False)


@wrong("guide_mask", "own hard negatives spared")
def guide_never_in_the_own_group(queries, passages, margin):
    mask, k1 = _masked_above(_relative)(queries, passages, margin), len(passages) // len(queries)
    for i in range(len(queries)):
        mask[i, i * k1 : (i + 1) * k1] = False
    return mask


@wrong("guide_mask", "all positives spared")
def guide_with_the_positives_of_all_spared(queries, passages, margin):
    mask = _masked_above(_relative)(queries, passages, margin)
    mask[:, _own(queries, passages)] = False
    return mask


# --- a loss with a mask ---------------------------------------------------------------------------------------


def _targets(logits):
    return torch.arange(len(logits)) * (logits.shape[1] // len(logits))


@right("masked_loss")
def masked_by_cross_entropy(logits, mask):
    targets = torch.arange(logits.size(0)) * (logits.size(1) // logits.size(0))
    return F.cross_entropy(logits.masked_fill(mask, float("-inf")), targets)


@right("masked_loss")
def masked_by_logsumexp(logits, mask):
    own = logits[torch.arange(len(logits)), _targets(logits)]
    return (torch.where(mask, -math.inf, logits).logsumexp(1) - own).mean()


@right("masked_loss")
def masked_by_a_large_number(logits, mask):
    return F.cross_entropy(logits.masked_fill(mask, -1e9), _targets(logits))


@right("masked_loss")
def masked_row_by_row(logits, mask):
    k1, rows = logits.shape[1] // len(logits), []
    for i in range(len(logits)):
        rows.append(torch.logsumexp(logits[i][~mask[i]], 0) - logits[i, i * k1])
    return torch.stack(rows).mean()


wrong("masked_loss", "mask forgotten")(lambda logits, mask: F.cross_entropy(logits, _targets(logits)))
wrong("masked_loss", "labels without hard negatives")(
    lambda logits, mask: F.cross_entropy(logits.masked_fill(mask, -torch.inf), torch.arange(len(logits)))
)
wrong("masked_loss", "logits set to zero")(
    lambda logits, mask: F.cross_entropy(logits.masked_fill(mask, 0.0), _targets(logits))
)
wrong("masked_loss", "logits set to zero")(lambda logits, mask: F.cross_entropy(logits * ~mask, _targets(logits)))
wrong("masked_loss", "mask turned around")(
    lambda logits, mask: F.cross_entropy(logits.masked_fill(~mask, -torch.inf), _targets(logits))
)
wrong("masked_loss", "sum over the rows")(
    lambda logits, mask: F.cross_entropy(logits.masked_fill(mask, -torch.inf), _targets(logits), reduction="sum")
)
wrong("masked_loss", None)(
    lambda logits, mask: F.cross_entropy(logits.masked_fill(mask, -torch.inf), _targets(logits), reduction="none")
)
wrong("masked_loss", "mask turned around")(
    lambda logits, mask: F.cross_entropy(logits.masked_fill(mask, torch.inf), _targets(logits))
)
wrong("masked_loss", None)(lambda logits, mask: -masked_by_cross_entropy(logits, mask))
wrong("masked_loss", "graph cut off")(lambda logits, mask: masked_by_cross_entropy(logits, mask).detach())
wrong("masked_loss", "another form")(lambda logits, mask: masked_by_cross_entropy(logits, mask).item())
wrong("masked_loss", None)(lambda logits, mask: F.cross_entropy(logits.masked_fill(mask, -1.0), _targets(logits)))


@wrong("masked_loss", "mask forgotten")
def masked_probabilities(logits, mask):
    shares = logits.softmax(1).masked_fill(mask, 0)
    return -shares[torch.arange(len(logits)), _targets(logits)].log().mean()


@wrong("masked_loss", "zeros among the logarithms")
def masked_after_the_logarithm(logits, mask):
    return -logits.log_softmax(1).masked_fill(mask, 0).mean()


@wrong("masked_loss", "the positive not in the denominator")
def the_positive_not_in_the_denominator(logits, mask):
    own = logits.gather(1, _targets(logits)[:, None])
    return (
        logits.masked_fill(mask, -torch.inf).scatter(1, _targets(logits)[:, None], -torch.inf).logsumexp(1) - own[:, 0]
    ).mean()


@wrong("masked_loss", None)
def masked_and_symmetric(logits, mask):
    left, own = logits.masked_fill(mask, -torch.inf), _targets(logits)
    columns = F.cross_entropy(left.T[own], torch.arange(len(logits)))
    return (F.cross_entropy(left, own) + columns) / 2


@wrong("masked_loss", None)
def masked_over_the_negatives_left(logits, mask):
    return (
        logits.masked_fill(mask, -torch.inf).logsumexp(1) - logits.gather(1, _targets(logits)[:, None])[:, 0]
    ).sum() / (~mask).sum()


@wrong("masked_loss", "input changed in place")
def masked_in_place(logits, mask):
    logits.data[mask] = -torch.inf
    return F.cross_entropy(logits, _targets(logits)) + 0 * logits.exp().sum()


@wrong("masked_loss", "whole rows left out")
def only_rows_without_a_mask(logits, mask):
    rows = ~mask.any(1)
    return F.cross_entropy(logits[rows], _targets(logits)[rows])


# --- what tokens buy ------------------------------------------------------------------------------------------


def _bought(each, negatives, whole=lambda share: int(share // 1)):
    """Another price of a query, or another count of what it is held against."""

    def answer(budget, query_tokens, passage_tokens, hard_negatives):
        queries = whole(budget / each(query_tokens, passage_tokens, hard_negatives))
        return {"queries": queries, "negatives": negatives(queries, hard_negatives)}

    return answer


def _price(q, p, k):
    return q + (1 + k) * p


def _held(b, k):
    return b * (1 + k) - 1


@right("at_equal_tokens")
def bought_in_words(budget, query_tokens, passage_tokens, hard_negatives):
    queries = budget // (query_tokens + passage_tokens + hard_negatives * passage_tokens)
    return {"negatives": queries - 1 + queries * hard_negatives, "queries": queries}


@right("at_equal_tokens")
def bought_by_divmod(budget, query_tokens, passage_tokens, hard_negatives):
    queries, _ = divmod(budget, query_tokens + passage_tokens * (hard_negatives + 1))
    return dict(queries=queries, negatives=queries * (hard_negatives + 1) - 1)


wrong("at_equal_tokens", "positive not paid for")(_bought(lambda q, p, k: q + k * p, _held))
wrong("at_equal_tokens", "hard negatives not paid for")(_bought(lambda q, p, k: q + p, _held))
wrong("at_equal_tokens", "a query for every passage")(_bought(lambda q, p, k: (1 + k) * (q + p), _held))
wrong("at_equal_tokens", "queries not paid for")(_bought(lambda q, p, k: (1 + k) * p, _held))
wrong("at_equal_tokens", "own positive counted")(_bought(_price, lambda b, k: b * (1 + k)))
wrong("at_equal_tokens", "other positives alone")(_bought(_price, lambda b, k: b - 1))
wrong("at_equal_tokens", "only its own hard negatives")(_bought(_price, lambda b, k: b - 1 + k))
wrong("at_equal_tokens", "hard negatives alone")(_bought(_price, lambda b, k: b * k))
wrong("at_equal_tokens", "its own hard negatives left out")(_bought(_price, lambda b, k: (b - 1) * (1 + k)))
wrong("at_equal_tokens", None)(_bought(_price, lambda b, k: b * k - 1))
wrong("at_equal_tokens", "its own hard negatives alone")(_bought(_price, lambda b, k: k))
wrong("at_equal_tokens", None)(_bought(_price, _held, whole=round))
wrong("at_equal_tokens", "rounded up")(_bought(_price, _held, whole=math.ceil))
wrong("at_equal_tokens", None)(_bought(_price, _held, whole=float))
wrong("at_equal_tokens", None)(_bought(lambda q, p, k: q + 2 * (1 + k) * p, _held))
wrong("at_equal_tokens", "hard negatives of queries")(_bought(lambda q, p, k: q * (1 + k) + p, _held))
wrong("at_equal_tokens", "another form")(
    lambda budget, q, p, k: (budget // _price(q, p, k), _held(budget // _price(q, p, k), k))
)
wrong("at_equal_tokens", "another form")(lambda budget, q, p, k: {"queries": budget // _price(q, p, k)})
