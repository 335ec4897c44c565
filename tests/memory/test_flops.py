"""The cost model against torch's own counter on the real step: equal to the last FLOP, whatever the plan."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gclib import ContrastiveLoss, Encoder, grad_cache_step, naive_step, plan_chunks
from gclib.chunks import Chunk
from gclib.memory.flops import (
    EncoderCost,
    FlopsLaw,
    TokenCount,
    count_flops,
    count_tokens,
    encoder_cost,
    forecast_flops,
    plan_towers,
    time_ratio,
)

LENGTHS = [[5, 9, 3, 7, 1, 8, 2], [12, 4, 9, 16, 11, 2, 1, 7, 7, 9, 3, 4, 5, 11]]
# Without attention and pooling, a backward is exactly two forwards.
LINEAR = EncoderCost(FlopsLaw(per_token=1000), FlopsLaw(per_token=2000), dimensions=1)


def batch_of(lengths):
    """Random tokens of these lengths, padded to the longest."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(5, 50, mask.shape) * mask, "attention_mask": mask}


def encoder_of(dropout=0.1, size="tiny"):
    return Encoder.from_config(size, vocab_size=50, dropout=dropout).train()


def torch_counts(call):
    """torch's counter as it is."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def towers():
    """Two encoders with dropout, so that torch knows every kernel that they take, and their costs."""
    encoders = [encoder_of(), Encoder.from_config("mini", vocab_size=50)]
    encoders[1].model.encoder.layer = encoders[1].model.encoder.layer[:1]
    projected = nn.Linear(128, 32)
    encoders[1] = Projected(encoders[1], projected).train()
    return encoders, [encoder_cost(encoder) for encoder in encoders]


class Projected(nn.Module):
    """An encoder with a linear layer on top."""

    def __init__(self, encoder, projected):
        super().__init__()
        self.encoder, self.projected = encoder, projected

    def forward(self, input_ids, attention_mask):
        return self.projected(self.encoder(input_ids, attention_mask))


# --- the law --------------------------------------------------------------------------------------------------


def test_a_law_is_the_parabola_through_its_values():
    law = FlopsLaw(7, 5, 3)
    assert FlopsLaw.through({width: law.at(1, width) for width in (1, 4, 6, 11)}) == law
    assert law.at(4, 10) == 4 * (7 + 50 + 300) and law.at(0, 10) == 0


@pytest.mark.parametrize("values", [{1: 1, 2: 8, 3: 27, 4: 64}, {2: 1, 4: 2, 6: 4, 8: 7}])
def test_values_that_lie_on_no_parabola_are_refused(values):
    with pytest.raises(ValueError, match="flops must lie on one parabola in the width"):
        FlopsLaw.through(values)


def test_three_widths_would_prove_nothing():
    with pytest.raises(ValueError, match="at least four widths"):
        FlopsLaw.through({1: 1, 2: 2, 3: 3})


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_law_gives_what_a_real_forward_and_backward_cost(dropout, training):
    encoder = encoder_of(dropout, "mini").train(training)
    cost = encoder_cost(encoder)
    for rows, width in ((1, 1), (5, 33), (2, 64)):
        batch = batch_of([width] * (rows - 1) + [max(1, width - 1)]) if rows > 1 else batch_of([width])
        forward = cost.forward.at(rows, width)
        with torch.no_grad():
            assert count_flops(lambda: encoder(**batch)) == forward  # noqa: B023
        both = count_flops(lambda: encoder(**batch).sum().backward())  # noqa: B023
        assert both == forward + cost.backward.at(rows, width)


@pytest.mark.slow
def test_a_backward_is_two_forwards_but_for_the_pooling():
    """Mean pooling multiplies by weights that ask for no gradient: its one product of 2 T D has one in the backward."""
    cost = encoder_cost(encoder_of())
    assert cost.backward.per_pair == 2 * cost.forward.per_pair
    assert 2 * cost.forward.per_token - cost.backward.per_token == 2 * cost.dimensions
    assert cost.forward.constant == cost.backward.constant == 0


def test_the_cpus_attention_kernel_is_counted_where_torch_does_not_know_it():
    """2 products of 2 T T D a layer forward; 5 backward, with the scores computed once more."""
    encoder, batch = encoder_of(dropout=0.0), batch_of([6, 8, 7])
    pairs = 2 * 3 * 8 * 8 * 32 * 2
    with torch.no_grad():
        unknown = count_flops(lambda: encoder(**batch)) - torch_counts(lambda: encoder(**batch))
    assert unknown == 2 * pairs
    both = count_flops(lambda: encoder(**batch).sum().backward())
    assert both - torch_counts(lambda: encoder(**batch).sum().backward()) == (2 + 5) * pairs


@pytest.mark.slow
def test_reading_off_the_laws_touches_nothing():
    encoder = encoder_of()
    encoder(**batch_of([3, 4])).sum().backward()
    before, state = copy.deepcopy([(p, p.grad) for p in encoder.parameters()]), torch.get_rng_state()
    encoder_cost(encoder)
    assert torch.equal(torch.get_rng_state(), state)
    for (parameter, gradient), now in zip(before, encoder.parameters(), strict=True):
        assert torch.equal(parameter, now) and (gradient is None) == (now.grad is None)
        assert gradient is None or torch.equal(gradient, now.grad)


class Cubic(nn.Module):
    """Costs T^3: a product of (T, T) matrices for each row."""

    def forward(self, input_ids, attention_mask):
        square = attention_mask.float()[:, :, None] * attention_mask.float()[:, None, :]
        return (square @ square).sum(dim=2)[:, :3]


class AcrossRows(nn.Module):
    """Costs rows^2: every row looks at every other."""

    def forward(self, input_ids, attention_mask):
        return attention_mask.float() @ attention_mask.float().T


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Cubic(), "must lie on one parabola"),
        (AcrossRows(), "must cost FLOPs that are linear in the rows"),
        (lambda **batch: batch, "encoder must be a torch module, got 'function'"),
    ],
)
def test_a_module_without_such_laws_is_refused(module, message):
    with pytest.raises(ValueError, match=message):
        encoder_cost(module)


def test_representations_must_be_one_vector_a_row():
    class Tokens(nn.Module):
        def forward(self, input_ids, attention_mask):
            return torch.zeros(*input_ids.shape, 4)

    with pytest.raises(ValueError, match=r"must return representations \(rows, D\)"):
        encoder_cost(Tokens())


# --- the step -------------------------------------------------------------------------------------------------


@st.composite
def steps(draw):
    """Row lengths of two towers, and arguments of a gradient-cache step."""
    queries, hard = draw(st.integers(1, 6)), draw(st.integers(0, 2))
    lengths = [draw(st.lists(st.integers(1, 12), min_size=n, max_size=n)) for n in (queries, queries * (1 + hard))]
    chunks = draw(
        st.one_of(
            st.fixed_dictionaries({"chunk_size": st.integers(1, 12)}),
            st.fixed_dictionaries({"chunk_size": st.lists(st.integers(1, 12), min_size=2, max_size=2)}),
            st.fixed_dictionaries({"chunk_tokens": st.integers(1, 40)}),
        )
    )
    options = {"sort_by_length": draw(st.booleans()), "retain_chunks": draw(st.integers(0, 6))}
    return lengths, chunks | options


@pytest.mark.slow
@settings(max_examples=max(5, settings.default.max_examples // 3))
@given(case=steps(), tied=st.booleans(), symmetric=st.booleans())
def test_the_forecast_is_what_torch_counts_of_the_real_step(towers, case, tied, symmetric):
    lengths, options = case
    encoders, costs = ([part[0], part[0 if tied else 1]] for part in towers)
    batch, loss_fn = [batch_of(rows) for rows in lengths], ContrastiveLoss(0.05, learnable=True, symmetric=symmetric)
    counted = torch_counts(lambda: grad_cache_step(encoders, batch, loss_fn, verify="never", **options))
    assert forecast_flops("grad_cache", costs, lengths, **options).total == counted
    counted = torch_counts(lambda: naive_step(encoders, batch, loss_fn))
    assert forecast_flops("naive", costs, lengths).total == counted


@pytest.mark.slow
def test_a_ready_plan_is_counted_as_it_is():
    encoder, loss_fn = encoder_of(), ContrastiveLoss(0.05)
    batch, cost = [batch_of(rows) for rows in LENGTHS], encoder_cost(encoder)
    plan = [plan_chunks(rows, chunk_size=3, sort=False) for rows in LENGTHS]
    counted = torch_counts(
        lambda: grad_cache_step([encoder] * 2, batch, loss_fn, plan=plan, retain_chunks=2, verify="never")
    )
    assert forecast_flops("grad_cache", [cost] * 2, LENGTHS, plan=plan, retain_chunks=2).total == counted


@pytest.mark.slow
@pytest.mark.parametrize("step", ["naive", "grad_cache"])
def test_a_frozen_tower_is_encoded_once_and_never_backpropagated(step):
    encoders, loss_fn = [encoder_of(), encoder_of().requires_grad_(False)], ContrastiveLoss(0.05)
    costs, batch = [encoder_cost(encoder) for encoder in encoders], [batch_of(rows) for rows in LENGTHS]
    assert costs[0].trained and not costs[1].trained
    trusting, options = partial(grad_cache_step, verify="never"), {} if step == "naive" else {"chunk_size": 4}
    run = naive_step if step == "naive" else trusting
    counted = torch_counts(lambda: run(encoders, batch, loss_fn, **options))
    assert forecast_flops(step, costs, LENGTHS, **options).total == counted


def test_a_plan_is_the_one_that_the_step_makes():
    """Every row stands in one chunk; the step's own plans are compared by what they encode, above."""
    for options in ({"chunk_size": 4}, {"chunk_size": [2, 5]}, {"chunk_tokens": 20}):
        plans = plan_towers(LENGTHS, **options)
        assert [sorted(row for chunk in plan for row in chunk.rows) for plan in plans] == [
            list(range(len(rows))) for rows in LENGTHS
        ]
    unsorted = plan_towers(LENGTHS, chunk_size=4, sort_by_length=False)
    assert {chunk.width for chunk in unsorted[1]} == {16} and unsorted[0][0].rows == (0, 1, 2, 3)


# --- tokens and time ------------------------------------------------------------------------------------------


def test_tokens_are_counted_as_an_encoder_is_given_them():
    """The oracle: a hook that adds up what the encoder is fed in its two forwards."""
    encoder, seen = encoder_of(), {True: 0, False: 0}
    encoder.register_forward_pre_hook(
        lambda module, args, named: seen.__setitem__(
            torch.is_grad_enabled(), seen[torch.is_grad_enabled()] + named["input_ids"].numel()
        ),
        with_kwargs=True,
    )
    batch = [batch_of(rows) for rows in LENGTHS]
    for retained in (0, 1, 3, 99):
        seen.update({True: 0, False: 0})
        grad_cache_step(
            [encoder] * 2, batch, ContrastiveLoss(0.05), chunk_size=4, retain_chunks=retained, verify="never"
        )
        tokens = count_tokens(LENGTHS, chunk_size=4, retain_chunks=retained)
        assert tokens.padded == sum(tower["input_ids"].numel() for tower in batch)
        assert (seen[True], seen[False]) == (tokens.encoded, tokens.encoded - tokens.retained)


def test_time_goes_from_four_thirds_down_to_one():
    assert time_ratio(1.0) == pytest.approx(4 / 3)
    assert time_ratio(1.0, 1.0) == 1.0
    assert time_ratio(0.3, 0.25) == pytest.approx(0.3 * 1.25)
    assert TokenCount(padded=100, encoded=60, retained=15).time_ratio == pytest.approx(0.6 * (1 + 0.75 / 3))


def test_time_and_flops_agree_where_flops_go_with_tokens():
    """Where a backward is two forwards, the formula is exact but for the loss."""
    for retained in range(8):
        options = {"chunk_size": 4, "retain_chunks": retained}
        cached = forecast_flops("grad_cache", [LINEAR] * 2, LENGTHS, **options)
        naive = forecast_flops("naive", [LINEAR] * 2, LENGTHS)
        ratio = (cached.total - cached.loss) / (naive.total - naive.loss)
        assert ratio == pytest.approx(count_tokens(LENGTHS, **options).time_ratio)


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda costs: forecast_flops("fast", costs, LENGTHS), "step must be one of 'naive', 'grad_cache'"),
        (lambda costs: forecast_flops("naive", costs[:1], LENGTHS), "costs must be two"),
        (lambda costs: forecast_flops("naive", [1, 2], LENGTHS), "costs must be two"),
        (lambda costs: forecast_flops("naive", costs, LENGTHS, chunk_size=2), "chunk_size must not be given"),
        (lambda costs: forecast_flops("naive", costs, LENGTHS, retain_chunks=2), "retain_chunks must not be given"),
        (lambda costs: forecast_flops("naive", costs, [[1], []]), "lengths must hold a list of row lengths"),
        (lambda costs: forecast_flops("grad_cache", costs, LENGTHS), "exactly one of them must be given"),
        (lambda costs: count_tokens([[1, 0]], chunk_size=1), "lengths must be an int of at least 1"),
        (lambda costs: count_tokens(LENGTHS, chunk_size=[1, 2, 3]), "chunk_size must be one value or one for each"),
        (lambda costs: count_tokens(LENGTHS, chunk_size=2, retain_chunks=-1), "retain_chunks must be an int"),
        (
            lambda costs: forecast_flops("grad_cache", costs, LENGTHS, chunk_size=2, retain_chunks=-1),
            "retain_chunks must",
        ),
        (lambda costs: count_tokens(LENGTHS, plan=[[]]), "plan must be 2 lists of Chunk"),
        (lambda costs: count_tokens([[1, 1]], plan=[[Chunk((0,), 1)]]), "must hold each of the 2 rows exactly once"),
        (lambda costs: time_ratio(0), "rho must be a finite number above 0"),
        (lambda costs: time_ratio(1, 1.1), "retained_share must be from 0 to 1"),
        (lambda costs: count_flops(3), "call must be callable"),
    ],
)
def test_bad_arguments_are_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call([LINEAR] * 2)
