"""Chapter 01's exercises, answered as readers do."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch01")

right("chance_loss")(lambda batch_size, hard_negatives: math.log(batch_size * (1 + hard_negatives)))
right("chance_loss")(lambda B, K: math.log(B) + math.log1p(K))
right("chance_loss")(lambda B, K: -math.log(1 / (B + B * K)))
right("chance_loss")(lambda B, K: torch.log(torch.tensor(float(B * (1 + K)))))
right("chance_loss")(lambda B, K: np.log(B * (1 + K)))
right("chance_loss")(lambda B, K: F.cross_entropy(torch.zeros(B, B * (1 + K)), torch.arange(B) * (1 + K)))
right("chance_loss")(lambda B, K: math.log2(B * (1 + K)) * math.log(2))

wrong("chance_loss", "hard negatives forgotten", "no K")(lambda B, K: math.log(B))
wrong("chance_loss", "positive left out", "negatives only")(lambda B, K: math.log(B * (1 + K) - 1))
wrong("chance_loss", "bits, not nats", "base 2")(lambda B, K: math.log2(B * (1 + K)))
wrong("chance_loss", "base 10, not e", "base 10")(lambda B, K: math.log10(B * (1 + K)))
wrong("chance_loss", "sign lost", "sign")(lambda B, K: -math.log(B * (1 + K)))
wrong("chance_loss", None, "B*K")(lambda B, K: math.log(B * K) if K else 0.0)
wrong("chance_loss", "hard negatives of one query only", "B + K")(lambda B, K: math.log(B + K))
wrong("chance_loss", "own group only", "own only")(lambda B, K: math.log(1 + K))
wrong("chance_loss", "probability, not loss", "probability")(lambda B, K: 1 / (B * (1 + K)))
wrong("chance_loss", "no logarithm", "no log")(lambda B, K: B * (1 + K))
wrong("chance_loss", "added over the queries", "sum over rows")(lambda B, K: B * math.log(B * (1 + K)))
wrong("chance_loss", "divided by B once more", "divided by B")(lambda B, K: math.log(B * (1 + K)) / B)
wrong("chance_loss", "positive counted twice", "1 plus")(lambda B, K: math.log1p(B * (1 + K)))
wrong("chance_loss", None, "others' positives")(lambda B, K: math.log(B - 1 + K) if B + K > 1 else 0.0)
wrong("chance_loss", "factor outside the logarithm", "log B times")(lambda B, K: math.log(B) * (1 + K))


def ce(q, p, t):
    return F.cross_entropy(q @ p.T / t, torch.arange(len(q)))


right("info_nce")(ce)
right("info_nce")(lambda q, p, t: -torch.log_softmax(q @ p.T / t, 1).diagonal().mean())
right("info_nce")(lambda q, p, t: (torch.logsumexp(q @ p.T / t, 1) - (q * p).sum(1) / t).mean())
right("info_nce")(lambda q, p, t: F.nll_loss((q @ p.T / t).log_softmax(-1), torch.arange(len(q))))
right("info_nce")(lambda q, p, t: -(torch.einsum("id,jd->ij", q, p) / t).log_softmax(dim=-1).trace() / len(q))
right("info_nce")(lambda q, p, t: ce(q.double(), p.double(), t))
right("info_nce")(lambda q, p, t: F.cross_entropy(q @ p.T / t, torch.eye(len(q))))


@right("info_nce")
def shifted(q, p, t):
    z = q @ p.T / t
    z = z - z.max(dim=1, keepdim=True).values.detach()
    return (z.exp().sum(1).log() - z.diagonal()).mean()


@right("info_nce")
def loop(q, p, t):
    rows = [torch.logsumexp(q[i] @ p.T / t, 0) - q[i] @ p[i] / t for i in range(len(q))]
    return torch.stack(rows).mean()


@right("info_nce")
def softplus(q, p, t):
    z = q @ p.T / t
    return (z - z.diagonal()[:, None]).logsumexp(1).mean()


wrong("info_nce", "logarithm of a softmax", "softmax log")(
    lambda q, p, t: -(q @ p.T / t).softmax(1).diagonal().log().mean()
)
wrong("info_nce", "overflow, divided", "exp")(
    lambda q, p, t: -((q @ p.T / t).exp().diagonal() / (q @ p.T / t).exp().sum(1)).log().mean()
)
wrong("info_nce", "overflow, then the logarithm", "exp, apart")(
    lambda q, p, t: ((q @ p.T / t).exp().sum(1).log() - (q * p).sum(1) / t).mean()
)
wrong("info_nce", "a small number inside the logarithm", "eps")(
    lambda q, p, t: -((q @ p.T / t).softmax(1).diagonal() + 1e-8).log().mean()
)
wrong("info_nce", "a small number inside the logarithm", "eps 1e-12")(
    lambda q, p, t: -((q @ p.T / t).softmax(1).diagonal() + 1e-12).log().mean()
)
wrong("info_nce", "multiplied by the temperature", "times")(
    lambda q, p, t: F.cross_entropy(q @ p.T * t, torch.arange(len(q)))
)
wrong("info_nce", "temperature ignored", "no temperature")(
    lambda q, p, t: F.cross_entropy(q @ p.T, torch.arange(len(q)))
)
wrong("info_nce", "softmax over the queries", "columns")(
    lambda q, p, t: F.cross_entropy(p @ q.T / t, torch.arange(len(q)))
)
wrong("info_nce", "softmax over the queries", "softmax dim 0")(
    lambda q, p, t: -(q @ p.T / t).log_softmax(0).diagonal().mean()
)
wrong("info_nce", "sum instead of mean", "sum")(
    lambda q, p, t: F.cross_entropy(q @ p.T / t, torch.arange(len(q)), reduction="sum")
)
wrong("info_nce", "a loss for each query", "reduction none")(
    lambda q, p, t: F.cross_entropy(q @ p.T / t, torch.arange(len(q)), reduction="none")
)
wrong("info_nce", "positive left out of the denominator", "positive left out")(
    lambda q, p, t: (
        (q @ p.T / t).masked_fill(torch.eye(len(q)).bool(), -math.inf).logsumexp(1) - (q * p).sum(1) / t
    ).mean()
)
wrong("info_nce", "sign lost", "sign")(lambda q, p, t: (q @ p.T / t).log_softmax(1).diagonal().mean())
wrong("info_nce", "passages detached", "detached passages")(lambda q, p, t: ce(q, p.detach(), t))
wrong("info_nce", "graph cut off", "detached")(lambda q, p, t: ce(q, p, t).detach())
wrong("info_nce", "another form", "item")(lambda q, p, t: ce(q, p, t).item())
wrong("info_nce", "normalised once more", "normalised")(
    lambda q, p, t: ce(F.normalize(q, dim=1), F.normalize(p, dim=1), t)
)
wrong("info_nce", "queries normalised", "queries normalised")(lambda q, p, t: ce(F.normalize(q, dim=1), p, t))
wrong("info_nce", "normalised once more", "cosine_similarity")(
    lambda q, p, t: F.cross_entropy(torch.cosine_similarity(q[:, None], p[None], dim=-1) / t, torch.arange(len(q)))
)
wrong("info_nce", "both directions", "both directions")(lambda q, p, t: (ce(q, p, t) + ce(p, q, t)) / 2)
wrong("info_nce", "both directions, added", "both, summed")(lambda q, p, t: ce(q, p, t) + ce(p, q, t))
wrong("info_nce", "passage 0 right for all", "labels zero")(
    lambda q, p, t: F.cross_entropy(q @ p.T / t, torch.zeros(len(q), dtype=torch.long))
)
wrong("info_nce", "softmax twice", "softmax before cross_entropy")(
    lambda q, p, t: F.cross_entropy((q @ p.T / t).softmax(1), torch.arange(len(q)))
)
wrong("info_nce", "distances instead of dot products", "euclid")(
    lambda q, p, t: F.cross_entropy(-torch.cdist(q, p) / t, torch.arange(len(q)))
)
wrong("info_nce", "logits clamped", "clamped logits")(
    lambda q, p, t: F.cross_entropy((q @ p.T / t).clamp(-80, 80), torch.arange(len(q)))
)
wrong("info_nce", "one number taken off all rows", "max of all, not of the row")(
    lambda q, p, t: (
        -torch.log(
            ((q @ p.T / t) - (q @ p.T / t).max()).exp().diagonal() / ((q @ p.T / t) - (q @ p.T / t).max()).exp().sum(1)
        ).mean()
    )
)
wrong("info_nce", "divided by the root of the width", "logits / sqrt D")(
    lambda q, p, t: F.cross_entropy(q @ p.T / (t * q.shape[1] ** 0.5), torch.arange(len(q)))
)
wrong("info_nce", "one number taken off all rows", "cosine is bounded: minus 1/t")(
    lambda q, p, t: -torch.log(((q @ p.T - 1) / t).exp().diagonal() / ((q @ p.T - 1) / t).exp().sum(1)).mean()
)
wrong("info_nce", "positives added, not averaged", "no mean of positive")(
    lambda q, p, t: (q @ p.T / t).logsumexp(1).mean() - (q * p).sum() / t
)
wrong("info_nce", "a yes or no for each pair", "bce")(
    lambda q, p, t: F.binary_cross_entropy_with_logits(q @ p.T / t, torch.eye(len(q)))
)
wrong("info_nce", "backward inside", "needs .backward inside")(
    lambda q, p, t: (lambda loss: (loss.backward(), loss)[1])(ce(q, p, t))
)
wrong("info_nce", "half precision", "half")(
    lambda q, p, t: F.cross_entropy((q.half() @ p.half().T / t).float(), torch.arange(len(q)))
)
wrong("info_nce", "temperature kept away from 0", "eps temperature")(lambda q, p, t: ce(q, p, max(t, 0.01)))
wrong("info_nce", None, "eps in t")(lambda q, p, t: ce(q, p, t + 1e-3))


@wrong("info_nce", "input changed in place", "in place")
def in_place(q, p, t):
    q /= t
    return F.cross_entropy(q @ p.T, torch.arange(len(q)))


right("labels_with_hard_negatives")(lambda B, K: torch.arange(B) * (1 + K))
right("labels_with_hard_negatives")(lambda B, K: torch.arange(0, B * (1 + K), 1 + K))
right("labels_with_hard_negatives")(lambda B, K: torch.tensor([i * (K + 1) for i in range(B)]))
right("labels_with_hard_negatives")(lambda B, K: torch.arange(B * (1 + K)).view(B, 1 + K)[:, 0])
right("labels_with_hard_negatives")(lambda B, K: torch.arange(B * (1 + K))[:: 1 + K])
right("labels_with_hard_negatives")(lambda B, K: torch.from_numpy(np.arange(B, dtype=np.int64) * (1 + K)))
right("labels_with_hard_negatives")(lambda B, K: torch.eye(B).repeat_interleave(1 + K, 1).argmax(1))

wrong("labels_with_hard_negatives", "labels without hard negatives", "arange")(lambda B, K: torch.arange(B))
wrong("labels_with_hard_negatives", "group of K", "times K")(lambda B, K: torch.arange(B) * K)
wrong("labels_with_hard_negatives", "another form", "int32")(lambda B, K: torch.arange(B, dtype=torch.int32) * (1 + K))
wrong("labels_with_hard_negatives", "another form", "float")(lambda B, K: torch.arange(0.0, B) * (1 + K))
wrong("labels_with_hard_negatives", "another form", "list")(lambda B, K: [i * (1 + K) for i in range(B)])
wrong("labels_with_hard_negatives", "another form", "numpy")(lambda B, K: np.arange(B) * (1 + K))
wrong("labels_with_hard_negatives", "another form", "range")(lambda B, K: range(0, B * (1 + K), 1 + K))
wrong("labels_with_hard_negatives", "positive last", "last of the group")(lambda B, K: torch.arange(B) * (1 + K) + K)
wrong("labels_with_hard_negatives", "a label per passage", "all")(lambda B, K: torch.arange(B * (1 + K)))
wrong("labels_with_hard_negatives", None, "column")(lambda B, K: (torch.arange(B) * (1 + K))[:, None])
wrong("labels_with_hard_negatives", "counted from one", "first negative")(lambda B, K: torch.arange(B) * (1 + K) + 1)
wrong("labels_with_hard_negatives", "stopped at B", "to B by step")(lambda B, K: torch.arange(0, B, 1 + K))
wrong("labels_with_hard_negatives", "hard negatives skipped once", "positives first, then negatives B stride")(
    lambda B, K: torch.arange(B) + K
)
wrong("labels_with_hard_negatives", "one-hot rows of integers", "one-hot")(
    lambda B, K: F.one_hot(torch.arange(B) * (1 + K), B * (1 + K))
)
wrong("labels_with_hard_negatives", "one-hot rows of floats", "one-hot, float")(
    lambda B, K: F.one_hot(torch.arange(B) * (1 + K), B * (1 + K)).float()
)
wrong("labels_with_hard_negatives", "another form", "whole groups at one")(
    lambda B, K: torch.eye(B).repeat_interleave(1 + K, 1)
)
wrong("labels_with_hard_negatives", "place within the group", "zeros")(lambda B, K: torch.zeros(B, dtype=torch.long))
wrong("labels_with_hard_negatives", "every passage's query", "repeated")(
    lambda B, K: torch.arange(B).repeat_interleave(1 + K)
)
wrong("labels_with_hard_negatives", "stretched to the last column", "linspace")(
    lambda B, K: torch.linspace(0, B * (1 + K) - 1, B).long()
)
wrong("labels_with_hard_negatives", "query 0 forgotten", "from 1")(lambda B, K: torch.arange(1, B + 1) * (1 + K))


@right("false_negative_mask")
def by_sets(queries, passages):
    K = len(passages) // len(queries)
    answers = {}
    for i, query in enumerate(queries):
        answers.setdefault(query, set()).add(passages[i * K])
    mask = torch.tensor([[p in answers[q] for p in passages] for q in queries])
    mask[torch.arange(len(queries)), torch.arange(len(queries)) * K] = False
    return mask


@right("false_negative_mask")
def by_loops(queries, passages):
    B, N = len(queries), len(passages)
    mask = torch.zeros(B, N, dtype=torch.bool)
    for i in range(B):
        for k in range(B):
            if queries[k] == queries[i]:
                for j in range(N):
                    mask[i, j] |= passages[j] == passages[k * (N // B)] and j != i * (N // B)
    return mask


@right("false_negative_mask")
def by_product(queries, passages):
    step = len(passages) // len(queries)
    same_query = torch.tensor([[a == b for b in queries] for a in queries]).float()
    same_passage = torch.tensor([[a == b for b in passages] for a in passages[::step]]).float()
    mask = (same_query @ same_passage) > 0
    mask[range(len(queries)), range(0, len(passages), step)] = False
    return mask


def masked(queries, passages, right_answer, spare=lambda i, j, step: j == i * step):
    step = len(passages) // len(queries)
    rows = range(len(queries))
    return torch.tensor(
        [[bool(right_answer(i, j, step)) and not spare(i, j, step) for j in range(len(passages))] for i in rows]
    )


@wrong("false_negative_mask", "same passages forgotten", "twin columns only")
def twins(queries, passages):
    return masked(queries, passages, lambda i, j, s: j % s == 0 and queries[j // s] == queries[i])


@wrong("false_negative_mask", "same queries forgotten", "own text only")
def own_text(queries, passages):
    return masked(queries, passages, lambda i, j, s: passages[j] == passages[i * s])


@wrong("false_negative_mask", "positive masked", "own positive masked too")
def own_masked(queries, passages):
    return masked(
        queries,
        passages,
        lambda i, j, s: any(queries[k] == queries[i] and passages[j] == passages[k * s] for k in range(len(queries))),
        lambda i, j, s: False,
    )


@wrong("false_negative_mask", "own text spared everywhere", "all copies of own positive kept")
def copies_kept(queries, passages):
    return masked(
        queries,
        passages,
        lambda i, j, s: any(queries[k] == queries[i] and passages[j] == passages[k * s] for k in range(len(queries))),
        lambda i, j, s: passages[j] == passages[i * s],
    )


@wrong("false_negative_mask", "True means keep", "inverted")
def inverted(queries, passages):
    return ~by_sets(queries, passages)


@wrong("false_negative_mask", "capitals ignored", "lower")
def lowered(queries, passages):
    return by_sets([q.lower() for q in queries], [p.lower() for p in passages])


@wrong("false_negative_mask", "queries' capitals ignored", "queries lower")
def queries_lowered(queries, passages):
    return by_sets([q.lower() for q in queries], passages)


@wrong("false_negative_mask", "passages' capitals ignored", "passages lower")
def passages_lowered(queries, passages):
    return by_sets(queries, [p.lower() for p in passages])


@wrong("false_negative_mask", "blanks ignored", "stripped")
def stripped(queries, passages):
    return by_sets([q.strip() for q in queries], [p.strip() for p in passages])


@wrong("false_negative_mask", "hard negatives not looked at", "hard negatives never")
def positives_only(queries, passages):
    return masked(
        queries,
        passages,
        lambda i, j, s: (
            j % s == 0 and any(queries[k] == queries[i] and passages[j] == passages[k * s] for k in range(len(queries)))
        ),
    )


@wrong("false_negative_mask", "column i spared", "diagonal spared at i, not i(1+K)")
def diagonal(queries, passages):
    mask = own_masked(queries, passages)
    mask.fill_diagonal_(False)
    return mask


@wrong("false_negative_mask", None, "K taken for the ratio")
def by_k(queries, passages):
    K = len(passages) // len(queries) - 1
    return masked(
        queries,
        passages,
        lambda i, j, s: any(queries[k] == queries[i] and passages[j] == passages[k * K] for k in range(len(queries))),
        lambda i, j, s: j == i * K,
    )


@wrong("false_negative_mask", None, "same passage across different queries, transposed dims")
def transposed(queries, passages):
    return by_sets(queries, passages).T


@wrong("false_negative_mask", None, "B by B")
def square(queries, passages):
    return torch.tensor([[a == b for b in queries] for a in queries]) & ~torch.eye(len(queries)).bool()


@wrong("false_negative_mask", "another form", "ints")
def ints(queries, passages):
    return by_sets(queries, passages).long()


@wrong("false_negative_mask", "another form", "lists")
def lists(queries, passages):
    return by_sets(queries, passages).tolist()


@wrong("false_negative_mask", "part of a text taken for it", "substring")
def substring(queries, passages):
    return masked(
        queries,
        passages,
        lambda i, j, s: any(queries[k] == queries[i] and passages[k * s] in passages[j] for k in range(len(queries))),
    )


@wrong("false_negative_mask", "later queries only", "only later twins")
def later(queries, passages):
    return masked(
        queries,
        passages,
        lambda i, j, s: any(
            queries[k] == queries[i] and passages[j] == passages[k * s] for k in range(i, len(queries))
        ),
    )


@wrong("false_negative_mask", "whole group of a twin masked", "whole group of a twin")
def whole_group(queries, passages):
    return masked(queries, passages, lambda i, j, s: j // s != i and queries[j // s] == queries[i])


@wrong("false_negative_mask", "only the last of equal queries", "dict overwrites earlier twins")
def last_twin(queries, passages):
    s = len(passages) // len(queries)
    of = {q: passages[i * s] for i, q in enumerate(queries)}
    return masked(queries, passages, lambda i, j, s: passages[j] == of[queries[i]])


@wrong("false_negative_mask", "nothing masked", "none")
def nothing(queries, passages):
    return torch.zeros(len(queries), len(passages), dtype=torch.bool)


@wrong("false_negative_mask", "queries compared with passages", "query text compared with passage")
def query_in_passages(queries, passages):
    return masked(queries, passages, lambda i, j, s: queries[i] == passages[j])


@wrong("false_negative_mask", "own text spared everywhere", "itself excluded: own text in another's place not masked")
def others_only(queries, passages):
    return masked(
        queries,
        passages,
        lambda i, j, s: any(
            k != i and queries[k] == queries[i] and passages[j] == passages[k * s] for k in range(len(queries))
        ),
    )
