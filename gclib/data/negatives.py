"""Hard negatives (passages that look right and are not) and false negatives (right, and not said to be).

Two texts are twins where they are the same but for case, white space and what closes a sentence at their end: code
is told apart by its signs, so `f(x)` and `f(-x)` are no twins. The right passages of a query are the positives of
every pair whose query is its twin, and their twins. A right passage is never mined as a negative, and is masked where
it stands in the batch as another query's.

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages.
"""

import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gclib.data.pairs import TextPair, check_pairs, texts_of
from gclib.support.validation import int_at_least, positive_int, refuse

DEPTH = 4  # candidates that each hard negative is drawn from: the best DEPTH * per_query
_WORD = re.compile(r"[^\W_]+")
_SIGN = re.compile(r"\w+|[^\w\s]")
_CLOSING = " .,;:!?"
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def mine_hard_negatives(pairs: Sequence[TextPair], *, per_query: int, seed: int) -> list[TextPair]:
    """The pairs again, each with `per_query` hard negatives: other pairs' passages that BM25 ranks high for its query.

    The pool is the pairs' distinct passages. For each query its right passages are left out (this module's docstring
    says which), and `per_query` of the best 4 * per_query others are drawn, best first. Where fewer share a word with
    the query, the rest are drawn from the whole pool. `seed` decides the draws; the pairs' order decides only which of
    twins stands there. Negatives that a pair already has are replaced. Words are parted at punctuation, underscores and
    the humps of camelCase; English stop words are skipped.

    Gao et al. 2021, like Karpukhin et al. 2020 (DPR), train with one BM25 negative for each question. Raises ValueError
    for no pairs, a per_query below 1, or a pool without that many wrong passages for some query.
    """
    check_pairs(pairs, same_negatives=False)
    positive_int("per_query", per_query)
    seed = int_at_least("seed", seed, 0)
    right = right_passages(pairs)
    pool = {normal_form(pair.passage): pair.passage for pair in reversed(pairs)}
    forms, passages = zip(*sorted(pool.items()), strict=True)
    most_right = max(map(len, right.values()))
    if per_query > len(pool) - most_right:
        rule = f"must be at most {len(pool) - most_right}, the wrong passages that the query with the fewest has"
        raise refuse("per_query", rule, per_query)
    mined = []
    for pair, ranking in zip(pairs, _rankings(pairs, passages, DEPTH * per_query + most_right), strict=True):
        right_forms = right[normal_form(pair.query)]
        wrong = [number for number in ranking if forms[number] not in right_forms]
        generator = random.Random(f"{seed}\n{pair.query}\n{pair.passage}")
        drawn = _draw(generator, wrong[: DEPTH * per_query], per_query, forms, right_forms)
        mined.append(replace(pair, negatives=tuple(passages[number] for number in drawn)))
    return mined


def false_negative_mask(pairs: Sequence[TextPair]) -> Tensor:
    """(B, N) bool, True where passage j is right for query i although it is not query i's own positive.

    Passages stand as everywhere: pair i's positive in column i * (1 + K), then its K negatives. Right passages: as this
    module's docstring says. Never True for a query's own positive. A loss takes it as `mask`.

    Raises ValueError for no pairs, or pairs with unlike numbers of negatives.
    """
    group = 1 + len(check_pairs(pairs)[0].negatives)
    right = right_passages(pairs)
    columns = defaultdict(list)
    for number, text in enumerate(text for pair in pairs for text in (pair.passage, *pair.negatives)):
        columns[normal_form(text)].append(number)
    mask = torch.zeros(len(pairs), len(pairs) * group, dtype=torch.bool)
    for row, pair in enumerate(pairs):
        mask[row, [column for form in right[normal_form(pair.query)] for column in columns[form]]] = True
        mask[row, row * group] = False
    return mask


def normal_form(text: str) -> str:
    """The words and signs of a text, lower case, one space between, without what closes its last sentence.

    Of a text that holds nothing else than closing signs, those.
    """
    signs = " ".join(_SIGN.findall(text.lower()))
    return signs.rstrip(_CLOSING) or signs


def pair_ids(pairs: Sequence[TextPair]) -> tuple[list[int], list[int]]:
    """(query ids (B,), passage ids (N,)) of a batch, equal for twins: what `gclib.losses.masks.SameIds` takes.

    Passages stand as in `false_negative_mask`, whose B x N numbers the ids replace; that mask leaves out too what is
    right for a query by way of a third pair. Raises ValueError for no pairs, or unlike numbers of negatives.
    """
    size = 2 + len(check_pairs(pairs)[0].negatives)
    numbers = twin_numbers(texts_of(pairs))
    return numbers[::size], [number for place, number in enumerate(numbers) if place % size]


def twin_numbers(texts: Sequence[str]) -> list[int]:
    """A number for each text, the same for twins: texts of one `normal_form`.

    Twins are alike once all white space is gone, so that only of texts that are so the (slow) normal form is taken.
    """
    tight = ["".join(text.lower().split()) for text in texts]
    tight = [text.rstrip(_CLOSING) or text for text in tight]
    counts, forms = Counter(tight), {}
    for text, key in zip(texts, tight, strict=True):
        if counts[key] > 1 and text not in forms:
            forms[text] = normal_form(text)
    numbers: dict[str, int] = {}
    keys = (forms.get(text, key) for text, key in zip(texts, tight, strict=True))
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def right_passages(pairs: Sequence[TextPair]) -> dict[str, set[str]]:
    """For each query's normal form, the normal forms of all passages that are right for it."""
    right = defaultdict(set)
    for pair in pairs:
        right[normal_form(pair.query)].add(normal_form(pair.passage))
    return dict(right)


def _rankings(pairs: Sequence[TextPair], passages: Sequence[str], depth: int) -> list[list[int]]:
    """For each pair the passages that share a word with its query, best first, at most `depth`; ties by number."""
    with _absent("jax"):
        import bm25s

    def words_of(texts: Sequence[str]) -> list[list[str]]:
        without_humps = [_HUMP.sub(" ", text) for text in texts]
        same = {"token_pattern": _WORD.pattern, "stopwords": "english"}
        return bm25s.tokenize(without_humps, return_ids=False, show_progress=False, **same)

    words = words_of(passages)
    if not any(words):
        return [[] for _ in pairs]
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    rankings = []
    for words in words_of([pair.query for pair in pairs]):
        known = index.get_tokens_ids(words)
        scores = index.get_scores(known) if known else np.zeros(1, np.float32)
        # The depth-th best score and not its place decides: which of equal ones a partial sort finds, a processor does.
        least = np.partition(scores, -depth)[-depth] if depth < len(scores) else 0
        found = np.flatnonzero((scores > 0) & (scores >= least))
        rankings.append(found[np.lexsort((found, -scores[found]))][:depth].tolist())
    return rankings


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """Inside, a module that was not imported yet can't be.

    bm25s starts JAX where it is installed, for a faster sort; and JAX takes three quarters of a GPU's memory for itself
    as soon as it starts.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None
    try:
        yield
    finally:
        del sys.modules[module]


def _draw(
    generator: random.Random, candidates: list[int], count: int, forms: Sequence[str], right: set[str]
) -> list[int]:
    """`count` of the candidates, in their order; then, where they do not suffice, others that are not right."""
    if len(candidates) >= count:
        return [candidates[place] for place in sorted(generator.sample(range(len(candidates)), count))]
    sample = generator.sample(range(len(forms)), min(len(forms), count + len(right)))
    others = [number for number in sample if number not in candidates and forms[number] not in right]
    return [*candidates, *others[: count - len(candidates)]]
