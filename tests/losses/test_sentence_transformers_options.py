"""Every option of sentence-transformers' ranking losses, and gclib's settings that are the same number, to 1e-12."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gclib import ContrastiveLoss
from gclib.losses.masks import GuideFilter, HardnessWeight

pytest.importorskip("sentence_transformers", reason="sentence-transformers is of the dev extra")

NAMES = {  # theirs: ours
    "query_to_doc": "query_to_passage",
    "doc_to_query": "passage_to_query",
    "query_to_query": "query_to_query",
    "doc_to_doc": "passage_to_passage",
}
TWO_WAYS = ("query_to_doc", "doc_to_query")
DIRECTIONS = [
    ({}, {}),
    ({"directions": TWO_WAYS, "partition_mode": "per_direction"}, {"symmetric": True}),
    *(
        ({"directions": names}, {"directions": [NAMES[name] for name in names]})
        for names in (
            TWO_WAYS,
            ("query_to_doc", "query_to_query"),
            ("query_to_doc", "doc_to_doc"),
            ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
        )
    ),
]
HARDNESS = [None, "in_batch_negatives", "hard_negatives", "all_negatives"]
B, D, SCALE, STRENGTH = 7, 5, 4.0, 3.0


class Stub(nn.Module):
    """A model whose representations are handed over: what `key` names among its inputs."""

    max_seq_length = 8

    def __init__(self, key):
        super().__init__()
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        self.key = key
        words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a")

    def __getitem__(self, place):
        return self

    def forward(self, features):
        return {"sentence_embedding": features[self.key]}


def columns(hard, dimensions):
    """Queries, positives, and `hard` columns of hard negatives."""
    return [torch.randn(B, dimensions, dtype=torch.float64) for _ in range(2 + hard)]


def ours(loss_fn, reps, mask=None):
    """The loss and the gradient of each column, for unit vectors: passages stand beside their positive here."""
    leaves = [rep.clone().requires_grad_() for rep in reps]
    units = [F.normalize(leaf, dim=1) for leaf in leaves]
    passages = torch.stack(units[1:], dim=1).flatten(0, 1)
    loss = loss_fn(units[0], passages, mask=mask)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def theirs(compute, reps):
    leaves = [rep.clone().requires_grad_() for rep in reps]
    loss = compute(leaves)
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def difference(one, other):
    scale = torch.stack([gradient.norm() for gradient in other[1]]).norm()
    gradients = [(a - b).norm() / b.norm().clamp_min(1e-3 * scale) for a, b in zip(one[1], other[1], strict=True)]
    return max(float((one[0] - other[0]).abs() / other[0].abs()), *map(float, gradients))


@pytest.mark.parametrize("tile_size", [None, 3])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("hardness", HARDNESS)
@pytest.mark.parametrize(("options", "settings"), DIRECTIONS)
@pytest.mark.parametrize("hard", [0, 2])
def test_multiple_negatives_ranking(hard, options, settings, hardness, cached, tile_size):
    from sentence_transformers.sentence_transformer import losses

    reps = columns(hard, D)
    options = {
        "scale": SCALE,
        "hardness_mode": hardness,
        "hardness_strength": STRENGTH * (hardness is not None),
    } | options
    if cached:
        loss = losses.CachedMultipleNegativesRankingLoss(Stub("reps"), mini_batch_size=3, **options)
        truth = theirs(lambda leaves: loss.calculate_loss([[leaf] for leaf in leaves], with_backward=True), reps)
    else:
        loss = losses.MultipleNegativesRankingLoss(Stub("reps"), **options)
        truth = theirs(lambda leaves: loss([{"reps": leaf} for leaf in leaves], None), reps)
    rule = None if hardness is None else HardnessWeight(STRENGTH, hardness)
    loss_fn = ContrastiveLoss(1 / SCALE, tile_size=tile_size, **settings)
    assert difference(ours(loss_fn, reps, rule), truth) <= 1e-12


@pytest.mark.parametrize("cached", [False, True])
def test_the_symmetric_loss_under_its_old_name(cached):
    from sentence_transformers.sentence_transformer import losses

    reps = columns(0, D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if cached:
            loss = losses.CachedMultipleNegativesSymmetricRankingLoss(Stub("reps"), scale=SCALE, mini_batch_size=3)
            truth = theirs(lambda leaves: loss.calculate_loss([[leaf] for leaf in leaves], with_backward=True), reps)
        else:
            loss = losses.MultipleNegativesSymmetricRankingLoss(Stub("reps"), scale=SCALE)
            truth = theirs(lambda leaves: loss([{"reps": leaf} for leaf in leaves], None), reps)
    assert difference(ours(ContrastiveLoss(1 / SCALE, symmetric=True, tile_size=4), reps), truth) <= 1e-12


@pytest.mark.parametrize("tile_size", [None, 3])
@pytest.mark.parametrize(("cached", "hard"), [(False, 0), (False, 1), (True, 0), (True, 2)])
@pytest.mark.parametrize(("kind", "margin"), [("absolute", 0.1), ("absolute", 0.0), ("relative", 0.3)])
@pytest.mark.parametrize(("anchors", "positives"), [(True, True), (False, False), (True, False), (False, True)])
def test_gist_embed(cached, hard, kind, margin, anchors, positives, tile_size):
    from sentence_transformers.sentence_transformer import losses

    reps, guide = columns(hard, D), columns(hard, 4)
    guide[1] = guide[0] + 0.9 * guide[1]  # a guide that finds most positives near
    options = {"temperature": 1 / SCALE, "margin_strategy": kind, "margin": margin}
    options |= {"contrast_anchors": anchors, "contrast_positives": positives}
    if cached:
        loss = losses.CachedGISTEmbedLoss(Stub("reps"), Stub("guide"), mini_batch_size=3, **options)
        guided = [[text] for text in guide]
        truth = theirs(lambda leaves: loss.calculate_loss([[r] for r in leaves], guided, with_backward=True), reps)
    else:
        loss = losses.GISTEmbedLoss(Stub("reps"), Stub("guide"), **options)
        truth = theirs(
            lambda leaves: loss([{"reps": a, "guide": b} for a, b in zip(leaves, guide, strict=True)], None), reps
        )
    rule = GuideFilter(guide[0], torch.stack(guide[1:], dim=1).flatten(0, 1), margin=margin, kind=kind)
    names = ["query_to_passage", *["query_to_query"] * anchors, *["positive_to_positive"] * positives]
    loss_fn = ContrastiveLoss(1 / SCALE, directions=names, tile_size=tile_size)
    assert difference(ours(loss_fn, reps, rule), truth) <= 1e-12
    assert difference(ours(loss_fn, reps), truth) > 1e-6  # the filter leaves something out


def test_a_difference_a_query_stands_against_itself_where_the_margin_lets_it():
    """GISTEmbedLoss leaves a text out of its own negatives only where the guide's threshold does, gclib always."""
    from sentence_transformers.sentence_transformer import losses

    query, passage = (torch.randn(1, D, dtype=torch.float64) for _ in range(2))
    loss = losses.GISTEmbedLoss(
        Stub("reps"), Stub("reps"), temperature=1 / SCALE, margin=-2.0, contrast_positives=False
    )
    itself = SCALE * (1 - F.cosine_similarity(query, passage))
    assert float(loss([{"reps": query}, {"reps": passage}], None) - F.softplus(itself)) == pytest.approx(0, abs=1e-12)
    names = ["query_to_passage", "query_to_query"]
    rule = GuideFilter(query, passage, margin=-2.0)
    assert ours(ContrastiveLoss(1 / SCALE, directions=names), [query, passage], rule)[0] == 0
