"""MaxSim against a loop over tokens; its loss through the cached step, whose padding is not the naive step's."""

from functools import partial

import pytest
import torch
from helpers.oracles import gradients, token_batch, worst_error
from torch.nn import functional as F

from gclib import Encoder, grad_cache_step, naive_step
from gclib.losses.max_sim import MaxSimLoss, max_sim


@pytest.fixture
def towers():
    generator = torch.Generator().manual_seed(0)
    return token_batch(5, 6, generator), token_batch(10, 9, generator)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder.from_config("tiny", vocab_size=32, dropout=0.0, pooling="tokens").double()


def scores_by_loops(queries, passages, query_mask, passage_mask):
    def score(query, mask, passage, kept):
        tokens = passage[kept.bool()]
        return sum(max(float(token @ other) for other in tokens) for token in query[mask.bool()])

    rows = [
        score(*query, *passage)
        for query in zip(queries, query_mask, strict=True)
        for passage in zip(passages, passage_mask, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(queries), len(passages))


def test_max_sim_is_what_its_formula_says(encoder, towers):
    with torch.no_grad():
        reps = [encoder(**tower) for tower in towers]
    masks = [tower["attention_mask"] for tower in towers]
    torch.testing.assert_close(max_sim(*reps, *masks), scores_by_loops(*reps, *masks))


@pytest.mark.parametrize("options", [{}, {"sort_by_length": False}, {"retain_chunks": 2}])
@pytest.mark.parametrize("size", [1, 4])
def test_the_cached_step_gives_its_gradient_with_hard_negatives(encoder, towers, size, options):
    loss_fn = MaxSimLoss(*(tower["attention_mask"] for tower in towers), temperature=0.3)
    both = [encoder, encoder]
    truth = gradients([encoder], partial(naive_step, both, towers, loss_fn))
    found = gradients([encoder], partial(grad_cache_step, both, towers, loss_fn, chunk_size=size, **options))
    assert found[0].item() == pytest.approx(truth[0].item(), rel=1e-12)
    assert worst_error(found[1], truth[1]) <= 1e-12
    scores = max_sim(*(encoder(**tower) for tower in towers), loss_fn.query_mask, loss_fn.passage_mask)
    assert truth[0].item() == pytest.approx(F.cross_entropy(scores / 0.3, torch.arange(0, 10, 2)).item())


def test_what_does_not_fit_is_refused():
    tokens, mask = torch.randn(3, 4, 2), torch.ones(3, 4)
    with pytest.raises(ValueError, match="query_tokens must be"):
        max_sim(tokens[:, 0], tokens, mask, mask)
    with pytest.raises(ValueError, match="passage_tokens must be"):
        max_sim(tokens, tokens, mask, mask[:, :3])
    with pytest.raises(ValueError, match="passage_tokens must have a multiple of B = 2"):
        MaxSimLoss(mask[:2], mask)(tokens[:2], tokens)
    with pytest.raises(ValueError, match="temperature"):
        MaxSimLoss(mask, mask, temperature=0)
