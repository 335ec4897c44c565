"""Every step against plain autograd: every parameter, absolute scale, float64."""

import math
from functools import partial
from unittest import mock

import pytest
import torch
from helpers.cases import cases, whole_batch
from helpers.oracles import InfoNCE, TinyEncoder, gradients, token_batch, worst_error
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import BaseModelOutput

from gclib import ContrastiveLoss, Encoder, accumulation_step, grad_cache_step, naive_step, plan_chunks
from gclib.chunks import CALL_TOKENS
from gclib.towers import row_lengths

STEPS = [naive_step, partial(accumulation_step, chunk_size=2), partial(grad_cache_step, chunk_size=2)]
CACHED = partial(grad_cache_step, chunk_size=2)


def cached(*arguments, price, **options):
    """The step with that price of a call: a low one lets chunks of few tokens end early too."""
    with mock.patch.dict(CALL_TOKENS, cpu=price):
        return grad_cache_step(*arguments, **options)


@settings(max_examples=2 * settings().max_examples)
@given(cases())
def test_gradient_cache_gives_the_naive_gradient(case):
    encoders, inputs, loss, mask, options = case
    modules = [*encoders, loss]
    truth = gradients(modules, lambda: whole_batch(encoders, inputs, loss, mask))
    found = gradients(modules, lambda: cached(encoders, inputs, loss, mask=mask, **options))
    assert found[0].item() == pytest.approx(truth[0].item(), rel=1e-12)
    assert worst_error(found[1], truth[1]) <= 1e-12


def formula(loss, query_reps, passage_reps, mask):
    """The oracle of ContrastiveLoss: equation (1) from logsumexp alone, on the module's own temperature."""
    logits = query_reps @ passage_reps.T / loss.temperature
    if mask is not None:
        logits = torch.where(mask, -torch.inf, logits)
    rows = torch.arange(len(query_reps))
    positives = rows * (len(passage_reps) // len(query_reps))
    right, ways = logits[rows, positives], [logits.logsumexp(dim=1)]
    if loss.symmetric:
        ways.append(logits[:, positives].logsumexp(dim=0))
    return sum((way - right).mean() for way in ways) / len(ways)


@pytest.mark.slow
@given(cases(), st.booleans(), st.booleans(), st.one_of(st.none(), st.integers(1, 12)))
def test_gradient_cache_with_our_loss_dense_and_in_tiles(case, learnable, symmetric, tile_size):
    encoders, inputs, _, mask, options = case
    loss = ContrastiveLoss(4.0, learnable=learnable, symmetric=symmetric, tile_size=tile_size).double()
    modules = [*encoders, loss]
    truth = gradients(modules, lambda: whole_batch(encoders, inputs, partial(formula, loss), mask))
    # Where every query has long found its positive, 1 - p has few digits, in each formula others: no step's doing.
    assume(len(inputs[1]["input_ids"]) == 1 or sum(change.norm() ** 2 for change in truth[1]) > 1e-6)
    found = gradients(modules, lambda: cached(encoders, inputs, loss, mask=mask, **options))
    assert found[0].item() == pytest.approx(truth[0].item(), rel=1e-12, abs=1e-14)
    assert worst_error(found[1], truth[1]) <= 1e-12


@pytest.mark.slow
@given(cases())
def test_naive_gives_the_naive_gradient(case):
    encoders, inputs, loss, mask, _ = case
    truth = gradients([*encoders, loss], lambda: whole_batch(encoders, inputs, loss, mask))
    found = gradients([*encoders, loss], lambda: naive_step(encoders, inputs, loss, mask=mask))
    assert worst_error(found[1], truth[1]) <= 1e-13


def kept_graphs(encoders, inputs, loss, mask, plans, order):
    """The oracle with dropout: encode these chunks in this order, keep every graph, put rows back, one backward."""
    pieces = [[None] * len(plan) for plan in plans]
    for tower, number in order:
        rows = torch.tensor(plans[tower][number].rows)
        width = plans[tower][number].width
        chunk = {name: value[rows, :width] for name, value in inputs[tower].items()}
        pieces[tower][number] = encoders[tower](**chunk)
    reps = []
    for plan, parts in zip(plans, pieces, strict=True):
        order_of_rows = torch.tensor([row for chunk in plan for row in chunk.rows])
        reps.append(torch.cat(parts)[order_of_rows.argsort()])
    value = loss(*reps, mask)
    value.backward()
    return value


@pytest.mark.slow
@given(cases(dropout=True))
def test_dropout_is_replayed(case):
    encoders, inputs, loss, mask, options = case
    modules = [*encoders, loss]
    size, tokens = options.pop("chunk_size", None), options.pop("chunk_tokens", None)
    sizes = size if isinstance(size, tuple) else (size, size)
    cut = {"sort": options.pop("sort_by_length"), "call_tokens": options.pop("price")}
    plans = [
        plan_chunks(row_lengths(given), chunk_size=part, chunk_tokens=tokens, **cut)
        for given, part in zip(inputs, sizes, strict=True)
    ]
    order = []

    def watch(phase, *, tower=None, chunk=None, **rest):
        if phase == "first_forward" and chunk is not None and (tower, chunk) not in order:
            order.append((tower, chunk))

    torch.manual_seed(7)
    step = partial(grad_cache_step, encoders, inputs, loss, plan=plans, mask=mask, on_phase=watch, **options)
    found = gradients(modules, step)
    left = torch.get_rng_state()
    torch.manual_seed(7)
    truth = gradients(modules, lambda: kept_graphs(encoders, inputs, loss, mask, plans, order))
    assert worst_error(found[1], truth[1]) <= 1e-12
    assert torch.equal(left, torch.get_rng_state())  # each forward drew once


@given(cases(), st.integers(1, 10))
def test_accumulation_is_the_mean_of_the_chunks_own_losses(case, size):
    encoders, inputs, loss, mask, _ = case
    modules, batch = [*encoders, loss], len(inputs[0]["input_ids"])
    group = len(inputs[1]["input_ids"]) // batch

    def chunk_by_chunk():
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, batch, size):
            queries = slice(start, min(start + size, batch))
            passages = slice(queries.start * group, queries.stop * group)
            own = [{k: v[rows] for k, v in t.items()} for t, rows in zip(inputs, (queries, passages), strict=True)]
            reps = [encoder(**chunk) for encoder, chunk in zip(encoders, own, strict=True)]
            part = loss(*reps, None if mask is None else mask[queries, passages])
            total = total + part * (queries.stop - queries.start) / batch
        total.backward()
        return total

    truth = gradients(modules, chunk_by_chunk)
    step = partial(accumulation_step, encoders, inputs, loss, chunk_size=size, mask=mask)
    found = gradients(modules, step)
    assert found[0].item() == pytest.approx(truth[0].item(), rel=1e-12, abs=1e-14)
    scale = sum(gradient.norm() for gradient in truth[1])
    if scale > 1e-9:  # a chunk of one pair has loss 0 and no gradient
        assert worst_error(found[1], truth[1]) <= 1e-12


def bert_batch(rows, width):
    batch = token_batch(rows, width, torch.Generator().manual_seed(rows), vocabulary=200)
    batch["attention_mask"][0] = 1
    return batch


@pytest.fixture
def bert():
    return Encoder.from_config("tiny", vocab_size=200, dropout=0.0)


def test_accumulation_gives_another_gradient(bert):
    inputs, loss = [bert_batch(8, 6), bert_batch(8, 9)], ContrastiveLoss(0.05)
    whole = gradients([bert], lambda: naive_step([bert] * 2, inputs, loss))
    parts = gradients([bert], lambda: accumulation_step([bert] * 2, inputs, loss, chunk_size=2))
    assert worst_error(parts[1], whole[1]) > 0.1


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_a_real_encoder(bert, dtype, bound):
    bert, loss = bert.to(dtype), ContrastiveLoss(0.05, learnable=True, symmetric=True).to(dtype)
    inputs = [bert_batch(9, 6), bert_batch(18, 9)]
    truth = gradients([bert, loss], lambda: whole_batch([bert] * 2, inputs, loss, None))
    options = {"chunk_size": 4, "retain_chunks": 2}
    found = gradients([bert, loss], lambda: grad_cache_step([bert] * 2, inputs, loss, **options))
    assert worst_error(found[1], truth[1]) <= bound


def test_each_row_is_encoded_as_often_as_promised():
    encoder, rows = TinyEncoder(), []
    encoder.register_forward_hook(lambda module, args, kwargs, out: rows.append(len(out)), with_kwargs=True)
    inputs = [token_batch(n, 5, torch.Generator()) for n in (10, 10)]
    CACHED([encoder] * 2, inputs, InfoNCE())  # the first step looks at some rows more
    for retain, retained_rows in ((0, 0), (1, 4), (3, 12), (99, 20)):
        rows.clear()
        grad_cache_step([encoder] * 2, inputs, InfoNCE(), chunk_size=4, retain_chunks=retain, sort_by_length=False)
        assert sum(rows) == (2 - retained_rows / 20) * 20


@pytest.mark.parametrize("kind", ["tensor", "tuple"])
def test_inputs_without_a_mask_are_left_as_they_are(kind):
    encoder = nn.Bilinear(3, 3, 4).double() if kind == "tuple" else nn.Linear(3, 4).double()
    features = [torch.randn(7, 3).double() for _ in range(4)]
    inputs = [(features[0], features[1]), (features[2], features[3])] if kind == "tuple" else features[:2]
    loss = InfoNCE().double()
    call = (lambda given: encoder(*given)) if kind == "tuple" else encoder

    def oracle():
        value = loss(call(inputs[0]), call(inputs[1]))
        value.backward()
        return value

    truth = gradients([encoder, loss], oracle)
    found = gradients([encoder, loss], lambda: grad_cache_step([encoder] * 2, inputs, loss, chunk_size=3))
    assert worst_error(found[1], truth[1]) <= 1e-12


def test_token_representations_are_padded_back():
    table = nn.Embedding(23, 4).double()
    inputs = [token_batch(5, 6, torch.Generator().manual_seed(n)) for n in (1, 2)]
    for given_ in inputs:
        given_["attention_mask"][0] = 1

    def encode(input_ids, attention_mask):
        return table(input_ids) * attention_mask.unsqueeze(-1)

    def max_sim(queries, passages):
        scores = torch.einsum("qid,pjd->qpij", queries, passages).amax(dim=3).sum(dim=2)
        return nn.functional.cross_entropy(scores, torch.arange(len(queries)))

    def oracle():
        value = max_sim(encode(**inputs[0]), encode(**inputs[1]))
        value.backward()
        return value

    truth = gradients([table], oracle)
    found = gradients([table], lambda: grad_cache_step([encode] * 2, inputs, max_sim, chunk_size=2, retain_chunks=1))
    assert worst_error(found[1], truth[1]) <= 1e-12


def test_three_towers():
    towers = [TinyEncoder().double() for _ in range(3)]
    inputs = [token_batch(6, 5, torch.Generator().manual_seed(n)) for n in range(3)]

    def loss(queries, positives, negatives):
        logits = queries @ torch.cat([positives, negatives]).T
        return nn.functional.cross_entropy(logits, torch.arange(len(queries)))

    def oracle():
        value = loss(*(tower(**given) for tower, given in zip(towers, inputs, strict=True)))
        value.backward()
        return value

    truth = gradients(towers, oracle)
    found = gradients(towers, lambda: grad_cache_step(towers, inputs, loss, chunk_size=(2, 3, 4)))
    assert worst_error(found[1], truth[1]) <= 1e-12


def test_a_frozen_tower_is_encoded_once_and_keeps_no_gradient():
    trained, frozen = TinyEncoder(), TinyEncoder().requires_grad_(False)
    calls = []
    frozen.register_forward_hook(lambda *args: calls.append(1))
    inputs = [token_batch(4, 5, torch.Generator()) for _ in range(2)]
    grad_cache_step([trained, frozen], inputs, InfoNCE(), chunk_size=2, verify="never")
    assert len(calls) == 2
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert all(parameter.grad is not None for parameter in trained.parameters())


@pytest.mark.parametrize("step", STEPS)
def test_gradients_are_added_and_the_loss_is_detached(step):
    encoder = TinyEncoder().double()
    inputs = [token_batch(4, 5, torch.Generator().manual_seed(n)) for n in (1, 2)]
    loss = step([encoder] * 2, inputs, InfoNCE().double())
    once = [parameter.grad.clone() for parameter in encoder.parameters()]
    step([encoder] * 2, inputs, InfoNCE().double())
    assert not loss.requires_grad
    for parameter, gradient in zip(encoder.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


class Doubling:
    """Scales like a GradScaler, and counts."""

    def __init__(self):
        self.calls = 0

    def scale(self, loss):
        self.calls += 1
        return loss * 1024


@pytest.mark.parametrize("step", STEPS)
def test_a_scaler_scales_the_gradient_once_and_not_the_loss(step):
    encoder, loss = TinyEncoder().double(), InfoNCE().double()
    inputs = [token_batch(4, 5, torch.Generator().manual_seed(n)) for n in (1, 2)]
    plain = gradients([encoder, loss], lambda: step([encoder] * 2, inputs, loss))
    scaled = gradients([encoder, loss], lambda: step([encoder] * 2, inputs, loss, scaler=Doubling()))
    assert scaled[0].item() == pytest.approx(plain[0].item(), rel=1e-12)
    assert worst_error(scaled[1], [1024 * gradient for gradient in plain[1]]) <= 1e-12


@pytest.mark.parametrize("retain", [0, 2, 99])
def test_autocast_is_the_same_in_both_forwards(retain):
    """bf16: the error against float32 is no larger than the naive step's own, plus a tenth."""
    encoder, loss = Encoder.from_config("tiny", vocab_size=200, dropout=0.0), ContrastiveLoss(0.1)
    inputs = [bert_batch(12, 8), bert_batch(12, 10)]
    truth = gradients([encoder], lambda: naive_step([encoder] * 2, inputs, loss))

    def under_autocast(step):
        with torch.autocast("cpu", torch.bfloat16):
            return step([encoder] * 2, inputs, loss)

    def error(changes):
        return math.sqrt(sum(float((a - b).norm() ** 2) for a, b in zip(changes, truth[1], strict=True)))

    naive = gradients([encoder], lambda: under_autocast(naive_step))
    step = partial(grad_cache_step, chunk_size=5, retain_chunks=retain)
    cached = gradients([encoder], lambda: under_autocast(step))
    assert all(change.abs().sum() > 0 for change in cached[1][:5])
    assert error(cached[1]) <= 1.1 * error(naive[1])


class NoValues(TorchDispatchMode):
    """Fails where a tensor's value is read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("step", STEPS)
def test_no_value_is_read_inside_a_step(step):
    encoder = Encoder.from_config("tiny", vocab_size=200)
    inputs = [bert_batch(4, 6), bert_batch(4, 6)]
    for given_ in inputs:  # transformers reads a mask to drop it where it is all ones; that is not ours to forbid
        given_.pop("attention_mask")
    loss = ContrastiveLoss(0.05, learnable=True, symmetric=True)
    step([encoder] * 2, inputs, loss)  # the first step of an encoder looks
    with NoValues():
        step([encoder] * 2, inputs, loss)


@pytest.mark.parametrize("at", ["first_forward", "loss", "replay"])
def test_a_stop_in_the_middle_leaves_things_as_they_were(at):
    encoder = TinyEncoder(0.5).train()
    inputs = [token_batch(6, 5, torch.Generator().manual_seed(n)) for n in (1, 2)]
    before = torch.get_rng_state()

    def stop(phase, **rest):
        if phase == at:
            raise KeyboardInterrupt

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KeyboardInterrupt):
            CACHED([encoder] * 2, inputs, InfoNCE(), on_phase=stop)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert encoder.training and torch.is_grad_enabled()


@pytest.mark.parametrize("step", STEPS[1:])
def test_batch_norm_in_training_mode_is_refused_with_what_to_do(step):
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    inputs = [torch.randn(4, 3), torch.randn(4, 3)]
    with pytest.raises(ValueError, match="eval mode, or use LayerNorm or GroupNorm"):
        step([encoder] * 2, inputs, InfoNCE())
    step([encoder.eval()] * 2, inputs, InfoNCE())


TOKENS = {"input_ids": torch.ones(4, 3, dtype=torch.long), "attention_mask": torch.ones(4, 3)}
EXCLUDED = torch.eye(4, dtype=torch.bool)
BAD = [
    ({"encoders": []}, "encoders"),
    ({"encoders": 3}, "encoders"),
    ({"encoders": [None, None]}, r"encoders\[0\]"),
    ({"inputs": [TOKENS]}, "inputs"),
    ({"inputs": "text"}, "inputs"),
    ({"inputs": [TOKENS, "text"]}, r"inputs\[1\]"),
    ({"inputs": [TOKENS, {}]}, r"inputs\[1\].*at least one Tensor"),
    ({"inputs": [TOKENS, {"a": {"nested": TOKENS}}]}, r"inputs\[1\]\['a'\]"),
    ({"inputs": [TOKENS, {k: v[:0] for k, v in TOKENS.items()}]}, "at least one row"),
    ({"inputs": [TOKENS, TOKENS | {"attention_mask": torch.ones(3, 3)}]}, "must have the 4 rows"),
    ({"inputs": [TOKENS, TOKENS | {"scalar": torch.tensor(1.0)}]}, "at least one row"),
    ({"inputs": [TOKENS, TOKENS | {"input_ids": torch.ones(4, 3)}]}, "whole numbers"),
    ({"inputs": [TOKENS, {k: v.to("meta") for k, v in TOKENS.items()}]}, "device"),
    ({"loss_fn": None}, "loss_fn"),
    ({"loss_fn": lambda q, p, mask=None: 3.0}, "loss_fn must return one"),
    ({"loss_fn": lambda q, p, mask=None: q}, "loss_fn must return one"),
    ({"loss_fn": lambda q, p, mask=None: torch.tensor(1.0)}, "depends on the representations"),
    ({"mask": torch.zeros(4, 3, dtype=torch.bool)}, "mask"),
    ({"mask": torch.zeros(4, 4)}, "mask"),
    ({"mask": [[False]]}, "mask"),
    ({"mask": EXCLUDED}, "mask must not leave out a positive"),
    ({"on_phase": 3}, "on_phase"),
    ({"scaler": 2.0}, "scaler"),
]
BAD_CHUNKS = [
    ({"chunk_size": 0}, "chunk_size"),
    ({"chunk_size": -1}, "chunk_size"),
    ({"chunk_size": 2.5}, "chunk_size"),
    ({"chunk_size": None}, "chunk_size"),
    ({"chunk_size": "4"}, "chunk_size"),
]
BAD_CACHED = [
    ({"chunk_tokens": 5}, "chunk_size, chunk_tokens or plan: exactly one must be given, got chunk_size, chunk_tokens"),
    ({"chunk_size": None, "chunk_tokens": 0}, "chunk_tokens"),
    ({"chunk_size": (2, 2, 2)}, "chunk_size"),
    ({"retain_chunks": -1}, "retain_chunks"),
    ({"retain_chunks": 0.5}, "retain_chunks"),
    ({"chunk_size": None, "plan": []}, "plan"),
    ({"chunk_size": None, "plan": 4}, "plan"),
    ({"chunk_size": None, "plan": plan_chunks([3] * 4, chunk_size=2)}, "plan"),
    ({"chunk_size": None, "plan": [plan_chunks([3] * 5, chunk_size=2)] * 2}, "plan"),
]


def refused(step, change, names):
    encoder = TinyEncoder()
    given_ = {"encoders": [encoder] * 2, "inputs": [TOKENS] * 2, "loss_fn": InfoNCE()} | change
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=names):
        step(**given_)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("change", "names"), BAD)
def test_bad_input_is_refused_before_anything_changes(step, change, names):
    refused(step, change, names)


@pytest.mark.parametrize("step", [accumulation_step, grad_cache_step])
@pytest.mark.parametrize(("change", "names"), BAD_CHUNKS)
def test_bad_chunks_are_refused(step, change, names):
    refused(step, change, names)


@pytest.mark.parametrize(("change", "names"), BAD_CACHED)
def test_bad_plans_are_refused(change, names):
    refused(grad_cache_step, {"chunk_size": 2} | change, names)


def test_an_encoder_with_the_wrong_output_is_refused():
    for encoder in (lambda **given: torch.ones(4), lambda **given: torch.ones(3, 2), lambda **given: None):
        with pytest.raises(ValueError, match="encoders must return"):
            CACHED([encoder] * 2, [TOKENS] * 2, InfoNCE())
    words = r"got BaseModelOutput \(wrap it: a pooled tensor alone\)"
    with pytest.raises(ValueError, match=words):
        CACHED([lambda **given: BaseModelOutput(torch.ones(4, 2, 3))] * 2, [TOKENS] * 2, InfoNCE())
