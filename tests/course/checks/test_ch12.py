"""Chapter 12's checks: they ask for what the library does, and mistakes written in other words are recognised."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gclib.course.checks import ch12
from gclib.losses.dense import contrastive_loss
from gclib.losses.masks import GuideFilter


def draws(exercise, seed=0):
    rng = np.random.default_rng(seed)
    return [list(maker(rng).values()) for maker in exercise.makers for _ in range(4)]


def test_the_mask_by_a_guide_is_the_librarys():
    for queries, passages, margin in draws(ch12.guide_mask):
        mask = ch12.guide_mask.oracle(queries, passages, margin)
        rule = GuideFilter(queries, passages, margin=margin, kind="relative")
        losses = [contrastive_loss(queries, passages, temperature=0.3, mask=given) for given in (mask, rule)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)


def test_the_loss_with_a_mask_is_the_librarys():
    for logits, mask in draws(ch12.masked_loss):
        eye = torch.eye(len(logits), dtype=logits.dtype)  # the products of unit vectors with anything are that thing
        loss = contrastive_loss(eye, logits.T.contiguous(), temperature=1.0, mask=mask)
        torch.testing.assert_close(loss, ch12.masked_loss.oracle(logits, mask), rtol=1e-12, atol=1e-12)


def test_a_twin_shortens_the_pull_and_never_turns_it():
    for logits, twins in draws(ch12.net_pull):
        rest = [value for place, value in enumerate(logits.tolist()) if place not in (0, *twins)]
        own, others = math.exp(logits[0]), sum(map(math.exp, rest))
        factor = (own + others) / ((1 + len(twins)) * own + others)
        alone = -others / (own + others)
        assert ch12.net_pull.oracle(logits, twins) == pytest.approx(alone * factor)
        assert 1 / (1 + len(twins)) <= factor <= 1


def first_column(logits, twins):
    return F.softmax(logits, dim=-1)[0].item() - 1.0


def taken_out(logits, twins):
    left = [place for place in range(len(logits)) if place not in twins]
    return logits[left].log_softmax(0)[0].exp().item() - 1


def every_copy_positive(logits, twins):
    places = [0, *twins]
    target = torch.zeros_like(logits)
    target[places] = 1.0
    return (logits.softmax(0) - target)[places].sum().item()


def averaged(logits, twins):
    slopes = logits.softmax(0) - F.one_hot(torch.tensor(0), len(logits))
    return slopes[[0, *twins]].mean().item()


def plain_products(queries, passages, margin):
    s = torch.einsum("id,jd->ij", queries, passages)
    k = len(passages) // len(queries)
    own = torch.stack([s[i, i * k] for i in range(len(queries))])
    mask = s > (own - margin * own.abs())[:, None]
    for i in range(len(queries)):
        mask[i, i * k] = False
    return mask


def of_cosines(queries, passages):
    return F.cosine_similarity(queries[:, None], passages[None], dim=2)


def share_of_s(queries, passages, margin):
    s = of_cosines(queries, passages)
    columns = torch.arange(len(s)) * (s.shape[1] // len(s))
    own = s.gather(1, columns[:, None])
    return (s > (1 - margin) * own).scatter(1, columns[:, None], False)


def absolute(queries, passages, margin):
    s = of_cosines(queries, passages)
    columns = torch.arange(len(s)) * (s.shape[1] // len(s))
    return (s > s.gather(1, columns[:, None]) - margin).scatter(1, columns[:, None], False)


def own_too(queries, passages, margin):
    s = of_cosines(queries, passages)
    own = s[:, :: s.shape[1] // len(s)].diagonal()
    return s > (own - margin * own.abs())[:, None]


def diagonal_positive(queries, passages, margin):
    s = of_cosines(queries, passages)
    own = s.diagonal()[:, None]
    mask = s > own - margin * own.abs()
    return mask & ~torch.eye(*s.shape, dtype=torch.bool)


def zeroed(logits, mask):
    group = logits.shape[1] // logits.shape[0]
    z = logits * (~mask)
    return (z.logsumexp(1) - z[:, ::group].diagonal()).mean()


def unmasked(logits, mask):
    group = logits.shape[1] // logits.shape[0]
    return (logits.logsumexp(1) - logits[:, ::group].diagonal()).mean()


def clean_rows(logits, mask):
    group, losses = logits.shape[1] // logits.shape[0], []
    for i, row in enumerate(logits):
        if not mask[i].any():
            losses.append(row.logsumexp(0) - row[i * group])
    return torch.stack(losses).mean()


def summed(logits, mask):
    group, total = logits.shape[1] // logits.shape[0], 0.0
    for i, row in enumerate(logits):
        total = total + row[~mask[i]].logsumexp(0) - row[i * group]
    return total


def diagonal_labels(logits, mask):
    own = torch.eye(*logits.shape, dtype=torch.bool)
    z = logits.masked_fill(mask & ~own, -torch.inf)
    return (z.logsumexp(1) - z.diagonal()).mean()


def without_positive(budget, query_tokens, passage_tokens, hard_negatives):
    each = query_tokens + passage_tokens * (hard_negatives if hard_negatives else 1)
    return {"queries": budget // each, "negatives": (budget // each) * (hard_negatives + 1) - 1}


def with_own(budget, query_tokens, passage_tokens, hard_negatives):
    each = query_tokens + passage_tokens + passage_tokens * hard_negatives
    return {"negatives": budget // each * (hard_negatives + 1), "queries": int(budget / each)}


def own_hard_only(budget, query_tokens, passage_tokens, hard_negatives):
    queries = math.floor(budget / (query_tokens + passage_tokens * (1 + hard_negatives)))
    return {"queries": queries, "negatives": hard_negatives + (queries - 1)}


def ceiling(budget, query_tokens, passage_tokens, hard_negatives):
    queries = math.ceil(budget / (query_tokens + passage_tokens * (1 + hard_negatives)))
    return {"queries": queries, "negatives": queries + queries * hard_negatives - 1}


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch12.net_pull, first_column, "twins forgotten"),
        (ch12.net_pull, taken_out, "twins masked"),
        (ch12.net_pull, every_copy_positive, "twins pulled as well"),
        (ch12.net_pull, averaged, "mean of the columns"),
        (ch12.guide_mask, plain_products, "dot products"),
        (ch12.guide_mask, share_of_s, "(1 - margin) times s"),
        (ch12.guide_mask, absolute, "absolute margin"),
        (ch12.guide_mask, own_too, "positive masked"),
        (ch12.guide_mask, diagonal_positive, "hard negatives forgotten"),
        (ch12.masked_loss, zeroed, "logits set to zero"),
        (ch12.masked_loss, unmasked, "mask forgotten"),
        (ch12.masked_loss, clean_rows, "whole rows left out"),
        (ch12.masked_loss, summed, "sum over the rows"),
        (ch12.masked_loss, diagonal_labels, "labels without hard negatives"),
        (ch12.at_equal_tokens, without_positive, "positive not paid for"),
        (ch12.at_equal_tokens, with_own, "own positive counted"),
        (ch12.at_equal_tokens, own_hard_only, "only its own hard negatives"),
        (ch12.at_equal_tokens, ceiling, "rounded up"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    for seed in range(3):
        assert exercise.judge(answer, seed=seed).misconception == name


def test_right_answers_in_other_words_are_right():
    def pull(logits, twins):
        weights = logits.exp()
        wrong = weights.sum() - weights[0] * (1 + len(twins))
        return -(wrong / weights.sum()).item()

    def guided(queries, passages, margin):
        s = of_cosines(queries, passages)
        columns = torch.arange(len(s))[:, None] * (s.shape[1] // len(s))
        own = s.gather(1, columns)
        return s.scatter(1, columns, -2.0) > torch.where(own > 0, own * (1 - margin), own * (1 + margin))

    def masked(logits, mask):
        group = logits.shape[1] // logits.shape[0]
        shifted = logits - logits[:, ::group].diagonal()[:, None]
        return shifted.exp().masked_fill(mask, 0.0).sum(1).log().mean()

    def bought(budget, query_tokens, passage_tokens, hard_negatives):
        queries, _ = divmod(budget, query_tokens + passage_tokens + hard_negatives * passage_tokens)
        return {"negatives": queries - 1 + hard_negatives * queries, "queries": queries}

    for seed in range(5):
        assert ch12.net_pull.judge(pull, seed=seed).status == "correct"
        assert ch12.guide_mask.judge(guided, seed=seed).status == "correct"
        assert ch12.masked_loss.judge(masked, seed=seed).status == "correct"
        assert ch12.at_equal_tokens.judge(bought, seed=seed).status == "correct"
