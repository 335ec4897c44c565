"""MaxSim against a loop over tokens; its loss through the cached step, whose padding is not the naive step's."""

from functools import partial

import pytest
import torch
from helpers.oracles import gradients, token_batch, worst_error
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from gclib import Encoder, grad_cache_step, naive_step
from gclib.losses.max_sim import MaxSimLoss, max_sim
from gclib.memory.ledger import record_memory


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


def by_choice(queries, passages, query_mask, passage_mask, of_scores):
    """The scores, and the gradients of sum(of_scores * scores): each token and those nearest to it, one at a time."""
    scores = torch.zeros_like(of_scores)
    of_queries, of_passages = torch.zeros_like(queries), torch.zeros_like(passages)
    for i, j in [(i, j) for i in range(len(queries)) for j in range(len(passages))]:
        for s in query_mask[i].nonzero().flatten().tolist():
            near = {t: float(queries[i, s] @ passages[j, t]) for t in passage_mask[j].nonzero().flatten().tolist()}
            chosen = [t for t, product in near.items() if product == max(near.values())]
            scores[i, j] += max(near.values())
            for t in chosen:
                of_queries[i, s] += of_scores[i, j] * passages[j, t] / len(chosen)
                of_passages[j, t] += of_scores[i, j] * queries[i, s] / len(chosen)
    return scores, [of_queries, of_passages]


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5), st.sampled_from([1, 2, 3, 9]), st.booleans())
def test_tiles_give_the_same_scores_and_gradients_ties_too(seed, batch, count, tile_size, whole_numbers):
    torch.manual_seed(seed)
    queries, passages = torch.randn(batch, 3, 2).double(), torch.randn(count, 4, 2).double()
    if whole_numbers:
        queries, passages = queries.round(), passages.round()
    masks = [torch.rand(tokens.shape[:2]) < 0.7 for tokens in (queries, passages)]
    for mask in masks:
        mask[:, 0] = True
    of_scores = torch.randn(batch, count).double()
    scores, truth = by_choice(queries, passages, *masks, of_scores)
    leaves = [queries.requires_grad_(), passages.requires_grad_()]
    for side in (None, tile_size):
        values = max_sim(*leaves, *masks, tile_size=side)
        torch.testing.assert_close(values, scores, rtol=1e-12, atol=1e-12)
        assert worst_error(torch.autograd.grad(values, leaves, of_scores), truth) <= 1e-12


def test_the_loss_in_tiles_is_the_loss(encoder, towers):
    masks = [tower["attention_mask"] for tower in towers]
    truth, tiled = (
        gradients(
            [encoder], partial(naive_step, [encoder] * 2, towers, MaxSimLoss(*masks, temperature=0.3, tile_size=n))
        )
        for n in (None, 2)
    )
    assert abs(truth[0] - tiled[0]) <= 1e-12 and worst_error(tiled[1], truth[1]) <= 1e-12


@pytest.mark.slow
def test_a_batch_of_128_takes_a_twentieth_of_the_untiled_form():
    """32 tokens against 128: peak bytes beside tokens and their gradients, by the ledger."""
    peaks = {}
    for tile_size in (None, 16):
        with FakeTensorMode():
            tokens = [torch.empty(128, length, 64, requires_grad=True) for length in (32, 128)]
            masks = [torch.empty(128, length, dtype=torch.bool) for length in (32, 128)]
            with record_memory() as ledger:
                ledger.on_phase("loss", tensors=[("inputs", tensor) for tensor in (*tokens, *masks)])
                start = ledger.events[-1].total_bytes
                MaxSimLoss(*masks, tile_size=tile_size)(*tokens).backward()
            gradients_bytes = sum(4 * tensor.numel() for tensor in tokens)
            peaks[tile_size] = ledger.peak_bytes - start - gradients_bytes
    assert peaks[None] >= 4 * 128 * 128 * 32 * 128
    assert 0 < peaks[16] <= peaks[None] / 20


@pytest.mark.parametrize("tile_size", [None, 2])
def test_a_passage_without_a_token_is_no_negative_of_any_query(tile_size):
    """Padding of the queries included, and masks of other numbers than 0 and 1 in no form a weight."""
    reps = [torch.randn(rows, 3, 2, dtype=torch.float64, requires_grad=True) for rows in (2, 4)]
    masks = [torch.ones(2, 3), torch.ones(4, 3)]
    masks[0][0, 1:], masks[1][1] = 0, 0
    loss = MaxSimLoss(masks[0] * 0.5, masks[1], tile_size=tile_size)(*reps)
    scores = scores_by_loops(*(rep.detach() for rep in reps), masks[0], torch.ones(4, 3)).where(
        masks[1].any(1), -torch.inf
    )
    assert loss.item() == pytest.approx(F.cross_entropy(scores, torch.tensor([0, 2])).item(), rel=1e-12)
    of_reps = torch.autograd.grad(loss, reps)
    assert all(gradient.isfinite().all() for gradient in of_reps) and not of_reps[1][1].any()


def test_what_does_not_fit_is_refused():
    tokens, mask = torch.randn(3, 4, 2), torch.ones(3, 4)
    for wrong in (torch.randn(3, 4, 1), tokens.double(), tokens.to("meta")):
        with pytest.raises(ValueError, match="passage_tokens must have query_tokens' D 2"):
            max_sim(tokens, wrong, mask, mask)
    with pytest.raises(ValueError, match="query_tokens must be a Tensor, and its mask"):
        max_sim(tokens, tokens, mask.tolist(), mask)
    with pytest.raises(ValueError, match="passage_tokens must have a multiple of B = 0"):
        MaxSimLoss(mask[:0], mask)(tokens[:0], tokens)
    with pytest.raises(ValueError, match="query_tokens must be"):
        max_sim(tokens[:, 0], tokens, mask, mask)
    with pytest.raises(ValueError, match="passage_tokens must be"):
        max_sim(tokens, tokens, mask, mask[:, :3])
    with pytest.raises(ValueError, match="passage_tokens must have a multiple of B = 2"):
        MaxSimLoss(mask[:2], mask)(tokens[:2], tokens)
    with pytest.raises(ValueError, match="temperature"):
        MaxSimLoss(mask, mask, temperature=0)
    with pytest.raises(ValueError, match="tile_size must be an int of at least 1"):
        MaxSimLoss(mask, mask, tile_size=0)
    with pytest.raises(RuntimeError, match="max_sim in tiles has no second derivative"):
        leaf = tokens.requires_grad_()
        torch.autograd.grad(max_sim(leaf, tokens, mask, mask, tile_size=2).sum(), leaf, create_graph=True)
