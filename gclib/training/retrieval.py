"""Does the encoder find the right passage? Top-k accuracy and MRR over a pool of passages."""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gclib.data.negatives import twin_numbers
from gclib.data.pairs import TextPair, check_pairs
from gclib.data.tokens import check_tokenizer, tokenize_texts
from gclib.support.modules import training_mode
from gclib.support.shapes import shape_checked
from gclib.support.validation import positive_int, refuse
from gclib.towers import encode
from gclib.training.modules import check_encoders, device_of, to_device


def retrieval_metrics(
    encoders: Sequence[Callable[..., Tensor]],
    pairs: Sequence[TextPair],
    tokenizer: Any,
    *,
    right: Sequence[Collection[int]] | None = None,
    ks: Sequence[int] = (1, 5, 20, 100),
    chunk_size: int = 128,
    query_length: int = 64,
    passage_length: int = 256,
) -> dict[str, float]:
    """{"top-1": ..., "top-5": ..., "mrr": ...}: each query searches the distinct passages of all pairs.

    rank = 1 + the number of wrong passages whose dot product with the query is not below that of its best right one, so
    ties (and NaN) count against the encoder: one that gives every text the same representation ranks last, not first.
    Right for a query are the passages of all pairs with this query or a twin of it, and the twins of these passages
    (`gclib.data.negatives` says what twins are); or, where `right` is given, its own passage and those of the pairs
    whose numbers right[i] holds. All others count as wrong.
    top-k is the share of queries with rank <= k; MRR is the mean of 1 / rank; both from 0 to 1, each pair a query. The
    pool holds each `pair.passage` once, however often it stands in the pairs; hard negatives are not part of it. With k
    at or above the pool's size, top-k is 1 whatever the encoder does.

    encoders: (queries', passages'), called as f(**batch) with rows of at most `chunk_size` texts, in eval mode and
    without gradients; their training modes are put back, the random generators are not touched. Holds
    (queries + passages) * D representations and chunk_size * passages scores.

    Raises ValueError for no pairs, no k, a `right` that doesn't hold numbers of pairs for each pair, or lengths and
    sizes that can't be. Source: top-k accuracy as in Karpukhin et al. 2020 (arXiv 2004.04906), section 5.
    """
    check_encoders(encoders)
    check_pairs(pairs)
    if not isinstance(ks, (list, tuple)) or len(ks) == 0:
        raise refuse("ks", "must be a list or tuple of at least one k", ks)
    for k in ks:
        positive_int("ks", k)
    check_tokenizer(tokenizer, query_length, "query_length")
    check_tokenizer(tokenizer, passage_length, "passage_length")
    positive_int("chunk_size", chunk_size)
    place = {text: row for row, text in enumerate(dict.fromkeys(pair.passage for pair in pairs))}
    positives = _right_places(pairs, place, right)
    with training_mode(encoders, False), torch.no_grad():
        queries = encode_texts(encoders[0], [pair.query for pair in pairs], tokenizer, query_length, chunk_size)
        passages = encode_texts(encoders[1], list(place), tokenizer, passage_length, chunk_size)
        chunks = [_ranks(queries[rows], passages, positives[rows]) for rows in _spans(len(pairs), chunk_size)]
    ranks = torch.cat(chunks).double()
    metrics = {f"top-{k}": (ranks <= k).double().mean().item() for k in ks}
    return {**metrics, "mrr": (1 / ranks).mean().item()}


def encode_texts(
    encoder: Callable[..., Tensor], texts: Sequence[str], tokenizer: Any, length: int, chunk_size: int
) -> Tensor:
    """Representations (texts, D) in the order of `texts`; texts of like length are encoded together."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    reps = []
    for span in _spans(len(order), chunk_size):
        batch = tokenize_texts([texts[row] for row in order[span]], tokenizer, length)
        reps.append(encode(encoder, to_device(batch, device_of(encoder))))
    return torch.cat(reps)[torch.tensor(order).argsort().to(reps[0].device)]


def _right_places(pairs: Sequence[TextPair], place: dict[str, int], right: Any) -> Tensor:
    """(pairs, R) int64: the places in the pool of what is right for each query, filled up with one of them."""
    own = [place[pair.passage] for pair in pairs]
    if right is None:
        queries, passages = twin_numbers([pair.query for pair in pairs]), twin_numbers(list(place))
        twins, by_query = defaultdict(list), defaultdict(set)
        for row, number in enumerate(passages):
            twins[number].append(row)
        for number, row in zip(queries, own, strict=True):
            by_query[number].update(twins[passages[row]])
        rows = [by_query[number] for number in queries]
    else:
        rule = f"must hold, for each of the {len(pairs)} pairs, the numbers of the pairs whose passages are right"
        if not isinstance(right, Sequence) or isinstance(right, str) or len(right) != len(pairs):
            raise refuse(
                "right", rule, f"{len(right)} of them" if isinstance(right, Sequence) else type(right).__name__
            )
        for row, numbers in enumerate(right):
            known = isinstance(numbers, Collection) and not isinstance(numbers, (str, bytes))
            if not known or any(type(number) is not int or not 0 <= number < len(pairs) for number in numbers):
                raise refuse(f"right[{row}]", f"must be numbers of pairs, from 0 to {len(pairs) - 1}", numbers)
        rows = [{own[number] for number in numbers} for numbers in right]
    rows = [sorted({*places, first}) for places, first in zip(rows, own, strict=True)]
    most = max(map(len, rows))
    return torch.tensor([[*places, *[places[0]] * (most - len(places))] for places in rows])


@shape_checked
def _ranks(
    queries: Float[Tensor, "rows D"], passages: Float[Tensor, "P D"], right: Int64[Tensor, "rows R"]
) -> Int64[Tensor, " rows"]:
    """The rank of each row's best right passage, 1 the best; ties and NaN count against it."""
    scores, right = queries @ passages.T, right.to(passages.device)
    best = scores.gather(1, right).amax(dim=1, keepdim=True)
    ahead = (~(scores < best)).scatter(1, right, False)
    return 1 + ahead.sum(dim=1).cpu()


def _spans(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
