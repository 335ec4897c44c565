"""`grad_cache_loss`, the step as a loss: against plain autograd, and against `grad_cache_step` to the last bit."""

import gc
import weakref
from functools import partial
from unittest import mock

import pytest
import torch
from helpers.cases import cases, whole_batch
from helpers.counting import Counting
from helpers.oracles import InfoNCE, TinyEncoder, token_batch, unique_parameters, worst_error
from helpers.ranks import message_of, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gclib import (
    ContrastiveLoss,
    Encoder,
    average_gradients,
    contrastive_loss,
    grad_cache_loss,
    grad_cache_step,
)
from gclib.chunks import CALL_TOKENS
from gclib.losses.max_sim import MaxSimLoss

LOSS = partial(grad_cache_loss, chunk_size=2)


def batch(seed=0, rows=(5, 5), widths=(5, 6)):
    return [
        token_batch(count, width, torch.Generator().manual_seed(2 * seed + place))
        for place, (count, width) in enumerate(zip(rows, widths, strict=True))
    ]


def ready(seed=0, dropout=0.0):
    """A tied encoder, a batch, and a loss with a temperature that learns."""
    encoder, loss_fn = TinyEncoder(dropout).double(), InfoNCE().double()
    return [encoder] * 2, batch(seed), loss_fn


def left(modules, run, earlier=None):
    """What `run` leaves in .grad, where `earlier` stood before."""
    parameters = unique_parameters(*modules)
    for number, parameter in enumerate(parameters):
        parameter.grad = None if earlier is None else earlier[number].clone()
    run()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


def alike(one, other):
    """To the last bit."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


@settings(max_examples=5 * settings().max_examples)
@given(st.data())
def test_its_gradient_is_the_naive_one_and_the_steps_own_to_the_last_bit(data):
    dropout, there, weight = (data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.sampled_from([1, 3, 7])))
    encoders, inputs, loss_fn, mask, options = data.draw(cases(dropout=dropout))
    modules, price = [*encoders, loss_fn], options.pop("price")
    earlier = [torch.randn_like(p) for p in unique_parameters(*modules)] if there else None
    values, drawn = [], []

    def by_loss():
        torch.manual_seed(3)
        loss = grad_cache_loss(encoders, inputs, loss_fn, mask=mask, **options)
        drawn.append(torch.get_rng_state())
        (loss * weight / weight).backward()
        values.append(loss.detach())
        drawn.append(torch.get_rng_state())

    def by_step():
        torch.manual_seed(3)
        values.append(grad_cache_step(encoders, inputs, loss_fn, mask=mask, **options))
        drawn.append(torch.get_rng_state())

    with mock.patch.dict(CALL_TOKENS, cpu=price):
        assert alike(left(modules, by_loss, earlier), left(modules, by_step, earlier))
        assert torch.equal(*values) and torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])
        if not dropout:
            truth = left(modules, lambda: whole_batch(encoders, inputs, loss_fn, mask))
            assert worst_error(left(modules, by_loss), truth) <= 1e-12


def test_what_it_returns_is_a_number_with_a_graph():
    encoders, inputs, loss_fn = ready()
    loss = LOSS(encoders, inputs, loss_fn)
    assert loss.shape == () and loss.requires_grad and not loss.is_leaf and loss.dtype == torch.float64
    assert all(p.grad is None for p in unique_parameters(*encoders, loss_fn))
    with pytest.raises(ValueError, match="no_grad"), torch.no_grad():
        LOSS(encoders, inputs, loss_fn)


# --- in trainers' hands -----------------------------------------------------------------------------------------


def plain(encoders, inputs, loss_fn, scale=1.0):
    """The oracle's loss, with its graph."""
    return loss_fn(*(encoder(**rows) for encoder, rows in zip(encoders, inputs, strict=True))) * scale


@pytest.mark.parametrize("retain", [0, 1])
def test_several_losses_are_added_up_in_one_backward_or_in_many(retain):
    encoders, one, loss_fn = ready()
    other, modules = batch(1, rows=(4, 8)), [encoders[0], loss_fn]
    loss = partial(LOSS, retain_chunks=retain)

    def naive():
        (plain(encoders, one, loss_fn) / 2 + plain(encoders, other, loss_fn) * 3).backward()

    def at_once():
        (loss(encoders, one, loss_fn) / 2 + loss(encoders, other, loss_fn) * 3).backward()

    def one_by_one():
        (loss(encoders, one, loss_fn) / 2).backward()
        (loss(encoders, other, loss_fn) * 3).backward()

    def beside_another():
        weights = sum(p.square().sum() for p in encoders[0].parameters())
        (loss(encoders, one, loss_fn) / 2 + plain(encoders, other, loss_fn) * 3 + weights).backward()

    truth = left(modules, naive)
    assert worst_error(left(modules, at_once), truth) <= 1e-12
    assert worst_error(left(modules, one_by_one), truth) <= 1e-12
    decayed = [g + 2 * p.detach() for g, p in zip(truth[:-1], encoders[0].parameters(), strict=True)] + truth[-1:]
    assert worst_error(left(modules, beside_another), decayed) <= 1e-12


def test_under_a_grad_scaler():
    encoders, inputs, loss_fn = ready()
    modules = [encoders[0], loss_fn]
    optimizer = torch.optim.SGD(unique_parameters(*modules), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def scaled():
        scaler.scale(LOSS(encoders, inputs, loss_fn)).backward()
        scaler.unscale_(optimizer)

    assert alike(left(modules, scaled), left(modules, lambda: LOSS(encoders, inputs, loss_fn).backward()))
    scaler.step(optimizer)
    scaler.update()
    before = [p.detach().clone() for p in unique_parameters(*modules)]
    optimizer.zero_grad()
    scaler.scale(LOSS(encoders, inputs, loss_fn) * torch.inf).backward()
    scaler.step(optimizer)  # left out: gradients are infinite
    scaler.update()
    assert alike(before, [p.detach() for p in unique_parameters(*modules)]) and scaler.get_scale() == 2.0**9


def test_the_scale_reaches_a_loss_in_half_precision_before_anything_underflows():
    encoder, inputs = TinyEncoder(), batch()

    def faint(queries, passages):
        return (queries.half() * passages.half()).sum() * 1e-3 * torch.tensor(1e-5, dtype=torch.float16)

    def under_scale(loss):
        (loss() * 2.0**14).backward()

    with_naive = left([encoder], lambda: under_scale(lambda: plain([encoder] * 2, inputs, faint)))
    cached = left([encoder], lambda: under_scale(lambda: LOSS([encoder] * 2, inputs, faint)))
    assert worst_error(cached, with_naive) <= 2e-3 and any(g.abs().sum() > 0 for g in cached)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.LBFGS])
def test_in_a_closure_as_lightning_hands_it_to_the_optimizer(optimizer):
    def trained(loss):
        torch.manual_seed(1)
        encoders, inputs, loss_fn = ready()
        chosen = optimizer(unique_parameters(encoders[0], loss_fn), lr=0.01)

        def closure():
            chosen.zero_grad()
            value = loss(encoders, inputs, loss_fn)
            value.backward()
            return value

        for _ in range(3):
            chosen.step(closure)
        return [p.detach() for p in unique_parameters(encoders[0], loss_fn)]

    assert worst_error(trained(LOSS), trained(plain)) <= 1e-10  # LBFGS looks along a line: rounding grows


@pytest.mark.parametrize("retain", [0, 2])
def test_autocast_around_the_call_is_that_of_the_replay(retain):
    encoder, loss_fn = Encoder.from_config("tiny", vocab_size=23, dropout=0.1), ContrastiveLoss(0.1)
    arguments, options = ([encoder] * 2, batch(), loss_fn), {"chunk_size": 2, "retain_chunks": retain}

    def by_loss():
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = grad_cache_loss(*arguments, **options)
        assert not torch.is_autocast_enabled("cpu")
        loss.backward()

    def by_step():
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            grad_cache_step(*arguments, **options)

    assert alike(left([encoder], by_loss), left([encoder], by_step))
    full = left([encoder], lambda: (torch.manual_seed(0), LOSS(*arguments).backward()))
    assert not alike(full, left([encoder], by_loss))  # so bf16 there was


def test_with_an_autocast_around_backward_alone_there_is_none_in_the_replay():
    encoders, inputs, loss_fn = ready()
    modules = [encoders[0].float(), loss_fn.float()]

    def backward_within():
        loss = LOSS(encoders, inputs, loss_fn)
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()

    assert alike(left(modules, backward_within), left(modules, lambda: LOSS(encoders, inputs, loss_fn).backward()))


def test_late_interaction_with_a_vector_a_token():
    """As PyLate has it: MaxSim of ColBERT over token representations, whose padding the loss leaves out."""
    table, inputs = nn.Embedding(23, 4).double(), batch(rows=(5, 10))
    loss_fn = MaxSimLoss(*(rows["attention_mask"] for rows in inputs), temperature=0.5)

    def encode(input_ids, attention_mask):
        return table(input_ids) * attention_mask.unsqueeze(-1)  # nothing at padding

    def naive():
        scores = torch.einsum("qid,pjd->qpij", *(table(rows["input_ids"]) for rows in inputs))
        present = inputs[1]["attention_mask"].bool()[None, :, None, :]
        best = torch.where(present, scores, -torch.inf).amax(dim=3) * inputs[0]["attention_mask"][:, None, :]
        nn.functional.cross_entropy(best.sum(dim=2) / 0.5, torch.arange(5) * 2).backward()

    cached = left([table], lambda: LOSS([encode] * 2, inputs, loss_fn).backward())
    assert worst_error(cached, left([table], naive)) <= 1e-12


# --- what is refused --------------------------------------------------------------------------------------------


def test_a_second_backward_is_refused():
    encoders, inputs, loss_fn = ready()
    loss = LOSS(encoders, inputs, loss_fn)
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in encoders[0].parameters()]
    with pytest.raises(ValueError, match="loss must be backpropagated once.*second backward"):
        loss.backward()
    assert alike(first, [p.grad for p in encoders[0].parameters()])


def test_a_graph_of_the_gradient_is_refused():
    encoders, inputs, loss_fn = ready()
    with pytest.raises(ValueError, match="create_graph must be False"):
        LOSS(encoders, inputs, loss_fn).backward(create_graph=True)
    assert all(p.grad is None for p in unique_parameters(*encoders, loss_fn))


def step_weights(encoders, inputs):
    with torch.no_grad():
        encoders[0].out.weight.mul_(0.9)


def change_mode(encoders, inputs):
    encoders[0].drop.eval()


def change_inputs(encoders, inputs):
    inputs[1]["input_ids"].zero_()


@pytest.mark.parametrize(
    ("change", "words"),
    [(step_weights, "weights or inputs"), (change_mode, "encoders' modes"), (change_inputs, "weights or inputs")],
)
def test_what_changed_before_backward_is_refused(change, words):
    encoders, inputs, loss_fn = ready(dropout=0.3)
    loss = LOSS(encoders, inputs, loss_fn)
    change(encoders, inputs)
    with pytest.raises(ValueError, match=f"{words} must be at backward.. what they were"):
        loss.backward()
    assert all(p.grad is None for p in unique_parameters(*encoders, loss_fn))


def test_a_frozen_tower_may_be_made_under_inference_mode():
    encoder, inputs = TinyEncoder().double(), batch()
    with torch.inference_mode():
        frozen = TinyEncoder().double().requires_grad_(False)
    twin = TinyEncoder().double().requires_grad_(False)
    twin.load_state_dict(frozen.state_dict())
    found = left([encoder], lambda: LOSS([encoder, frozen], inputs, InfoNCE().double()).backward())
    truth = left([encoder], lambda: plain([encoder, twin], inputs, InfoNCE().double()).backward())
    assert worst_error(found, truth) <= 1e-12


def test_a_loss_of_before_the_optimizers_step_is_refused_after_it():
    encoders, inputs, loss_fn = ready()
    early, late = LOSS(encoders, inputs, loss_fn), LOSS(encoders, batch(1), loss_fn)
    early.backward()
    torch.optim.AdamW(encoders[0].parameters()).step()
    with pytest.raises(ValueError, match="weights or inputs"):
        late.backward()


# --- what it holds, and for how long ----------------------------------------------------------------------------


def watched(retain=1):
    """A loss, and weak references to what it holds: the batch, representations, a retained graph, random states."""
    encoder, loss_fn, seen = TinyEncoder(0.2).double(), InfoNCE().double(), []
    inputs = batch()

    def watch(phase, *, tensors=(), **place):
        seen.extend(weakref.ref(t) for kind, t in tensors if kind in ("representations", "random states", "cache"))

    hook = encoder.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    loss = LOSS([encoder] * 2, inputs, loss_fn, retain_chunks=retain, on_phase=watch, verify="never")
    hook.remove()
    seen.extend(weakref.ref(t) for rows in inputs for t in rows.values())
    return encoder, loss, seen


def alive(references):
    gc.collect()
    return sum(reference() is not None for reference in references)


@pytest.mark.slow
def test_a_loss_that_is_never_backpropagated_leaves_nothing():
    encoder, loss, held = watched()
    assert alive(held) > 4
    del loss
    assert alive(held) == 0 and all(p.grad is None for p in encoder.parameters())


def test_a_loss_that_was_backpropagated_holds_nothing_even_where_it_is_kept():
    encoder, loss, held = watched()
    loss.backward()
    assert alive(held) == 0 and loss.requires_grad and encoder.out.weight.grad is not None


def live_tensors():
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [True, False])
def test_200_steps_leak_nothing(backward):
    encoders, inputs, loss_fn = ready(dropout=0.2)
    optimizer = torch.optim.SGD(unique_parameters(encoders[0], loss_fn), lr=1e-3)
    kept = torch.zeros(200, dtype=torch.float64)

    def train(steps):
        for number in range(steps):
            loss = LOSS(encoders, inputs, loss_fn, retain_chunks=1)
            kept[number] = loss.detach()
            if backward:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        del loss
        return live_tensors()

    first = train(5)
    assert train(200) == first


# --- several processes ------------------------------------------------------------------------------------------

ROWS = [3, 2]


def own_rows_of(inputs, rank):
    start = sum(ROWS[:rank])
    return [
        {key: value[start * group : (start + ROWS[rank]) * group] for key, value in rows.items()}
        for rows, group in zip(inputs, (1, 2), strict=True)
    ]


def reductions_and_errors(here):
    """{how a model under DDP is trained: [all-reduces of its gradient, the worst parameter's error]}."""
    torch.manual_seed(1)
    encoder = TinyEncoder().double()
    wrapped = nn.parallel.DistributedDataParallel(encoder)
    whole = [batch(seed, rows=(5, 10)) for seed in (0, 1)]
    own = [own_rows_of(inputs, here.rank) for inputs in whole]

    def loss(number, loss_fn=None, retain_chunks=1):
        loss_fn = loss_fn or ContrastiveLoss(0.4, across="gather")
        return LOSS([wrapped] * 2, own[number], loss_fn, retain_chunks=retain_chunks)

    def right(number):
        return plain([encoder] * 2, whole[number], partial(contrastive_loss, temperature=0.4))

    def mean_of_ranks():
        parts = [own_rows_of(whole[0], rank) for rank in range(2)]
        return sum(plain([encoder] * 2, part, partial(contrastive_loss, temperature=0.4)) for part in parts) / 2

    def accumulated():
        with wrapped.no_sync():
            loss(0).backward()
        loss(1).backward()

    ways = {
        "DDP itself": (lambda: plain([wrapped] * 2, own[0], ContrastiveLoss(0.4)).backward(), mean_of_ranks),
        "one loss": (lambda: loss(0).backward(), lambda: right(0)),
        "one loss of its own rows": (lambda: loss(0, ContrastiveLoss(0.4)).backward(), mean_of_ranks),
        "all retained, scaled": (lambda: (loss(0, None, 99) * 8).backward(), lambda: right(0) * 8),
        "two losses": (lambda: (loss(0) + 2 * loss(1)).backward(), lambda: right(0) + 2 * right(1)),
        "two backwards": (lambda: (loss(0).backward(), loss(1).backward()), lambda: right(0) + right(1)),
        "accumulated": (accumulated, lambda: right(0) + right(1)),
    }
    results, numbers = {}, sum(p.numel() for p in encoder.parameters())
    for name, (way, truth) in ways.items():
        with Counting(numbers) as counted:
            found = left([encoder], way)
        results[name] = [counted.count, worst_error(found, left([encoder], lambda truth=truth: truth().backward()))]
    with wrapped.no_sync(), Counting(numbers) as counted:
        left([encoder], lambda: loss(0).backward())
    average_gradients(wrapped)
    averaged = [p.grad.clone() for p in encoder.parameters()]
    error = worst_error(averaged, left([encoder], lambda: right(0).backward()))
    return results | {"no_sync, then average_gradients": [counted.count, error]}


@pytest.mark.slow
def test_ddp_reduces_once_a_backward_and_gives_one_processs_gradient(tmp_path):
    for measured in run_ranks(reductions_and_errors, 2, tmp_path):
        assert {name: count for name, (count, _) in measured.items()} == {
            "DDP itself": 1,
            "one loss": 1,
            "one loss of its own rows": 1,
            "all retained, scaled": 1,
            "two losses": 1,
            "two backwards": 2,
            "accumulated": 1,
            "no_sync, then average_gradients": 0,
        }
        assert max(error for _, error in measured.values()) <= 1e-12, measured


def after_an_error(here):
    """A backward pass that fails on every rank after a loss asked for an average; the next one averages its own. Last,
    DDP's own loss beside a cached one: its forward may come before, and is refused after.
    """
    encoder = TinyEncoder().double()
    wrapped = nn.parallel.DistributedDataParallel(encoder)
    own = own_rows_of(batch(rows=(5, 10)), here.rank)
    loss_fn, broken = ContrastiveLoss(0.4, across="gather"), torch.zeros((), dtype=torch.float64, requires_grad=True)
    failing = Broken.apply(broken)
    told = message_of(lambda: (failing + LOSS([wrapped] * 2, own, loss_fn)).backward())
    found = left([encoder], lambda: LOSS([wrapped] * 2, own, loss_fn).backward())
    whole = batch(rows=(5, 10))

    def right():
        return plain([encoder] * 2, whole, partial(contrastive_loss, temperature=0.4))

    def own_and_cached():
        return plain([wrapped] * 2, own, loss_fn) + LOSS([wrapped] * 2, own, loss_fn)

    def cached_and_own():
        return LOSS([wrapped] * 2, own, loss_fn) + plain([wrapped] * 2, own, loss_fn)

    errors = [worst_error(found, left([encoder], lambda: right().backward()))]
    both = left([encoder], lambda: own_and_cached().backward())
    errors.append(worst_error(both, left([encoder], lambda: (2 * right()).backward())))
    return told[:2], errors, message_of(lambda: cached_and_own().backward())[:2]


class Broken(torch.autograd.Function):
    """Raises where it is backpropagated."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("out of luck")


@pytest.mark.slow
def test_a_backward_that_failed_leaves_nothing_for_the_next_one(tmp_path):
    for told, errors, refused in run_ranks(after_an_error, 2, tmp_path):
        assert list(told) == ["RuntimeError", "out of luck"] and max(errors) <= 1e-12
        assert refused[0] == "ValueError" and "forwards of other losses before grad_cache_loss" in refused[1]
