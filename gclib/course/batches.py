"""What comes with a big batch: false negatives in it, and the short batch at an epoch's end.

Letters: B queries of a batch, n pairs of the corpus, m pairs that are twins of a pair.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, lgamma, log
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from gclib.data.negatives import normal_form, right_passages
from gclib.data.pairs import TextPair, check_pairs
from gclib.data.tokens import tokenize_pairs
from gclib.support.modules import training_mode
from gclib.support.validation import int_at_least, positive_int, refuse


def same_passage(pairs: Sequence[TextPair]) -> list[int]:
    """For each pair, the other pairs with a twin of its passage (`gclib.data.negatives` says what a twin is)."""
    return _others([normal_form(pair.passage) for pair in check_pairs(pairs)])


def same_query(pairs: Sequence[TextPair]) -> list[int]:
    """For each pair, the other pairs whose query is its query's twin."""
    return _others([normal_form(pair.query) for pair in check_pairs(pairs)])


def false_negatives(pairs: Sequence[TextPair]) -> list[int]:
    """For each pair, the other pairs whose passage is right for its query: what `false_negative_mask` would mask.

    right: the positive of a pair whose query is a twin of this one's, or such a positive's twin.
    """
    right = right_passages(check_pairs(pairs))
    counts = Counter(normal_form(pair.passage) for pair in pairs)
    return [sum(counts[passage] for passage in right[normal_form(pair.query)]) - 1 for pair in pairs]


def same_words(pairs: Sequence[TextPair]) -> list[int]:
    """For each pair, the other pairs whose query has the same words, in any order and number, signs left out."""
    words = ["".join(sign if sign.isalnum() else " " for sign in pair.query.lower()) for pair in check_pairs(pairs)]
    return _others([" ".join(sorted(set(text.split()))) for text in words])


def same_beginning(pairs: Sequence[TextPair], tokenizer: Any, length: int) -> list[int]:
    """For each pair, the other pairs whose passage is the same in its first `length` tokens: all that the encoder sees.

    No encoder can tell such passages apart, and the loss asks it to. Read are 10 characters a token, which is enough
    for code but for a few passages that are mostly white space.
    """
    texts = [pair.passage[: 10 * positive_int("length", length)] for pair in check_pairs(pairs)]
    rows = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    return _others([tuple(row) for row in rows])


def expected_share(twins: Sequence[int], batch_size: int) -> float:
    """Share of the queries of a random batch with at least one of their twins in it, expected.

    twins: m of each of the n pairs. The mean over pairs of 1 - C(n - 1 - m, B - 1) / C(n - 1, B - 1): a batch that
    holds the pair draws its other B - 1 rows from n - 1. Raises ValueError for a batch above n.
    """
    total = len(twins)
    if not 1 <= positive_int("batch_size", batch_size) <= total:
        raise refuse("batch_size", f"must be at most the number of pairs, {total}", batch_size)
    missed = {m: _probability_of_none(total - 1, int_at_least("twins", m, 0), batch_size - 1) for m in set(twins)}
    return fmean(1 - missed[m] for m in twins)


@dataclass(frozen=True)
class RowsMeasured:
    """Batches of `rows` rows at the same weights: mean loss in nats, the loss of chance (no hard negatives), mean
    gradient norm.
    """

    rows: int
    loss: float
    chance: float
    gradient_norm: float


def measure_rows(
    encoder: Any,
    pairs: Sequence[TextPair],
    tokenizer: Any,
    loss_fn: Callable[..., Tensor],
    rows: Sequence[int],
    *,
    draws: int = 4,
    **lengths: int,
) -> list[RowsMeasured]:
    """Loss and gradient norm of batches of each size, weights as they are: what an epoch's short last batch shows.

    The encoder is both towers, in eval mode (dropout off), and no weight changes. `draws` batches of each size, from
    the start of `pairs` on. lengths: query_length and passage_length. Raises ValueError where there are too few pairs.
    """
    check_pairs(pairs)
    if max(rows) * positive_int("draws", draws) > len(pairs):
        raise refuse("rows", f"times draws must be at most the {len(pairs)} pairs", f"{max(rows)} times {draws}")
    measured = []
    with training_mode((encoder, encoder), False):
        for size in rows:
            batches = [pairs[start : start + size] for start in range(0, size * draws, size)]
            measures = [_loss_and_norm(encoder, batch, tokenizer, loss_fn, lengths) for batch in batches]
            losses, norms = zip(*measures, strict=True)
            measured.append(RowsMeasured(size, fmean(losses), log(size), fmean(norms)))
    return measured


def _loss_and_norm(
    encoder: Any, batch: Sequence[TextPair], tokenizer: Any, loss_fn: Callable[..., Tensor], lengths: dict[str, int]
) -> tuple[float, float]:
    reps = [encoder(**tower) for tower in tokenize_pairs(batch, tokenizer, **lengths)]
    loss = loss_fn(*reps)
    gradients = torch.autograd.grad(loss, [p for p in encoder.parameters() if p.requires_grad], allow_unused=True)
    return loss.item(), float(torch.stack([g.norm() for g in gradients if g is not None]).norm())


def _others(keys: Sequence[Any]) -> list[int]:
    """For each key, how often it stands elsewhere."""
    counts = Counter(keys)
    return [counts[key] - 1 for key in keys]


def _probability_of_none(others: int, twins: int, drawn: int) -> float:
    """C(others - twins, drawn) / C(others, drawn): that none of the twins is among the drawn."""
    if drawn > others - twins:
        return 0.0
    return exp(_log_choose(others - twins, drawn) - _log_choose(others, drawn))


def _log_choose(total: int, chosen: int) -> float:
    return lgamma(total + 1) - lgamma(chosen + 1) - lgamma(total - chosen + 1)
