"""The tiled loss against a long-double oracle, against the dense loss, and against what it says it never allocates."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gclib.losses.dense import contrastive_loss
from gclib.losses.tiled import tiled_contrastive_loss
from gclib.losses.tiles import NEGLIGIBLE_EXPONENT
from gclib.steps import grad_cache_step, naive_step

NAMES = ("loss", "queries", "passages", "temperature")


# --- The oracle: dense, long double, its own formulas -------------------------------------------------------------


def oracle(queries, passages, temperature, symmetric, mask):
    """The loss and its three gradients in numpy's long double; a positive's p - 1 is minus the sum of the others."""
    q, p = (np.asarray(reps.detach().numpy(), dtype=np.longdouble) for reps in (queries, passages))
    t = np.longdouble(temperature.item())
    group = len(p) // len(q)
    z = (q[:, None, :] * p[None]).sum(-1) / t
    hidden = np.zeros(z.shape, dtype=bool) if mask is None else mask.numpy()
    loss, of_logits = oracle_direction(z, hidden, np.arange(len(q)) * group)
    if symmetric:
        second, of_columns = oracle_direction(z[:, ::group].T, hidden[:, ::group].T, np.arange(len(q)))
        loss, of_logits = (loss + second) / 2, of_logits / 2
        of_logits[:, ::group] += of_columns.T / 2
    return loss, of_logits @ p / t, of_logits.T @ q / t, -(of_logits * z).sum() / t


def oracle_direction(z, hidden, positives):
    rows = np.arange(len(z))
    margin = z - z[rows, positives][:, None]
    margin = np.where(hidden, -np.inf, margin)
    margin[rows, positives] = -np.inf
    top = np.maximum(margin.max(1), 0)
    others = np.exp(margin - top[:, None])
    rest = others.sum(1)
    loss = np.where(top > 0, top + np.log(np.exp(-top) + rest), np.log1p(rest))
    gradient = others / (np.exp(-top) + rest)[:, None]
    gradient[rows, positives] = -gradient.sum(1)
    return loss.mean(), gradient / len(z)


def value_and_gradients(loss_function, queries, passages, temperature, **settings):
    leaves = [tensor.detach().requires_grad_() for tensor in (queries, passages, temperature)]
    loss = loss_function(leaves[0], leaves[1], temperature=leaves[2], **settings)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def errors(found, expected):
    return [float(np.linalg.norm(np.ravel(f.numpy() - np.asarray(e)))) for f, e in zip(found, expected, strict=True)]


def dense_errors(queries, passages, temperature, symmetric, mask, neighbours=8):
    """What the dense loss of the same dtype gets wrong, at worst, on this problem and on its neighbours.

    A neighbour has the rows and dimensions in another order and the inputs' last digits changed, and is judged by
    its own oracle: one problem alone may be rounded well by luck. No version is asked for less than half a unit in
    the last place of the result (a gradient's scale is at least 1e-3 of all gradients), nor for probabilities that
    the tiled loss documents to count as 0.
    """
    exact = oracle(queries, passages, temperature, symmetric, mask)
    norms = [float(np.linalg.norm(np.ravel(value))) for value in exact]
    scales = [norms[0], *(max(norm, 1e-3 * float(np.linalg.norm(norms[1:]))) for norm in norms[1:])]
    eps = torch.finfo(queries.dtype).eps
    largest = 1 + float(max(queries.abs().max(), passages.abs().max()))
    negligible = math.exp(NEGLIGIBLE_EXPONENT[queries.dtype] + 1) * len(passages) * (largest / temperature.item()) ** 2
    worst = [max(eps / 2 * scale, negligible) for scale in scales]
    for number in range(1 + neighbours):
        problem = (
            (queries, passages, temperature, mask) if number == 0 else neighbour(queries, passages, temperature, mask)
        )
        found = value_and_gradients(contrastive_loss, *problem[:3], symmetric=symmetric, mask=problem[3])
        own = errors(found, oracle(*problem[:3], symmetric, problem[3]))
        worst = [max(pair) for pair in zip(worst, own, strict=True)]
    return worst


def neighbour(queries, passages, temperature, mask):
    batch_size, group = len(queries), len(passages) // len(queries)
    order, dimensions = torch.randperm(batch_size), torch.randperm(queries.shape[1])
    passage_order = (order[:, None] * group + torch.arange(group)).reshape(-1)
    shaken = [last_digits_changed(reps) for reps in (queries[order], passages[passage_order])]
    mask = None if mask is None else mask[order][:, passage_order]
    return shaken[0][:, dimensions], shaken[1][:, dimensions], last_digits_changed(temperature), mask


def last_digits_changed(tensor):
    return tensor * (1 + torch.finfo(tensor.dtype).eps * torch.randint(-4, 5, tensor.shape).to(tensor))


# --- Problems -----------------------------------------------------------------------------------------------------


def make_reps(kind, batch_size, hard, dimensions, dtype):
    """Queries and passages of one kind of difficulty."""
    queries = torch.randn(batch_size, dimensions, dtype=dtype)
    passages = torch.randn(batch_size * (1 + hard), dimensions, dtype=dtype)
    if kind == "unit":
        queries, passages = F.normalize(queries, dim=1), F.normalize(passages, dim=1)
    elif kind == "extreme":
        queries = queries * 1000
    elif kind == "saturated":
        passages[:: 1 + hard] = queries
        passages = passages * 5
    elif kind == "hopeless":
        passages[:: 1 + hard] = -queries * 20
    elif kind == "whole numbers":
        queries, passages = (queries * 3).round(), (passages * 3).round()
    return queries, passages


def make_mask(batch_size, hard, share):
    mask = torch.rand(batch_size, batch_size * (1 + hard)) < share
    mask[torch.arange(batch_size), torch.arange(batch_size) * (1 + hard)] = False
    return mask


def relaid(reps, layout):
    """The same numbers with other strides."""
    if layout == "transposed":
        return reps.T.contiguous().T
    if layout == "every other":
        room = reps.new_full((2 * len(reps), 2 * reps.shape[1]), torch.nan)
        room[::2, 1::2] = reps
        return room[::2, 1::2]
    if layout == "part of wider":
        return torch.cat([reps, reps.new_full((len(reps), 3), torch.nan)], dim=1)[:, : reps.shape[1]]
    return reps


KINDS = ("normal", "unit", "extreme", "saturated", "hopeless", "whole numbers")
LAYOUTS = ("contiguous", "transposed", "every other", "part of wider")


@st.composite
def problems(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    batch_size, hard = draw(st.integers(1, 24)), draw(st.integers(0, 3))
    queries, passages = make_reps(draw(st.sampled_from(KINDS)), batch_size, hard, draw(st.integers(1, 9)), dtype)
    queries, passages = (relaid(reps, draw(st.sampled_from(LAYOUTS))) for reps in (queries, passages))
    share = draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]))
    return {
        "queries": queries,
        "passages": passages,
        "temperature": torch.tensor(draw(st.sampled_from([0.01, 0.05, 0.07, 0.3, 1.0])), dtype=dtype),
        "mask": None if share is None else make_mask(batch_size, hard, share),
        "symmetric": draw(st.booleans()),
        "tile_size": draw(st.integers(1, 30)),
    }


# --- The proof ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(problems())
def test_loss_and_gradients_err_at_most_4_times_as_much_as_the_dense_version(problem):
    tile_size = problem.pop("tile_size")
    inputs = problem["queries"], problem["passages"], problem["temperature"]
    settings = {"symmetric": problem["symmetric"], "mask": problem["mask"]}
    found = value_and_gradients(tiled_contrastive_loss, *inputs, **settings, tile_size=tile_size)
    own = errors(found, oracle(*inputs, **settings))
    for name, error, allowed in zip(NAMES, own, dense_errors(*inputs, **settings), strict=True):
        assert error <= 4 * allowed, f"{name}: error {error:.3g}, the dense version's own {allowed:.3g}"


@pytest.mark.slow
@pytest.mark.parametrize("tile_size", [1, 3, 4, 64])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hard", [0, 2])
def test_finite_differences_agree(tile_size, symmetric, hard):
    queries, passages = make_reps("normal", 5, hard, 3, torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (queries, passages, torch.tensor(0.4, dtype=torch.float64))]
    mask = make_mask(5, hard, 0.3)

    def loss(queries, passages, temperature):
        return tiled_contrastive_loss(
            queries, passages, temperature=temperature, symmetric=symmetric, mask=mask, tile_size=tile_size
        )

    assert torch.autograd.gradcheck(loss, leaves)


# --- Extremes -----------------------------------------------------------------------------------------------------


def test_the_merged_log_sum_exp_starts_at_minus_infinity_not_at_0():
    """From 0, logits of -400 would vanish beside a phantom logit of 0: the loss would be 400, not log 6."""
    queries = torch.full((6, 1), 20.0)
    loss = tiled_contrastive_loss(queries, -queries, temperature=1.0, symmetric=True, tile_size=2)
    assert loss.item() == pytest.approx(np.log(6), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_a_million_give_no_0_over_0(dtype):
    queries, passages = make_reps("hopeless", 9, 1, 4, dtype)
    inputs = queries * 1e4, passages, torch.tensor(0.01, dtype=dtype)
    found = value_and_gradients(tiled_contrastive_loss, *inputs, symmetric=True, mask=None, tile_size=4)
    expected = oracle(*inputs, symmetric=True, mask=None)
    assert expected[0] > 1e6
    for value, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(value.numpy(), np.asarray(exact, dtype=float), rtol=1e-4, atol=1e-30)


def test_easy_positives_keep_the_digits_that_1_minus_p_loses():
    """The dense loss of logits 40 and 0 is 0 in float32: 1 + exp(-40) rounds to 1. What is left over does not."""
    queries = 40**0.5 * torch.eye(4)
    inputs = queries, queries.clone(), torch.tensor(1.0)
    found = value_and_gradients(tiled_contrastive_loss, *inputs, symmetric=True, tile_size=3)
    assert value_and_gradients(contrastive_loss, *inputs, symmetric=True)[0] == 0
    for value, exact in zip(found, oracle(*inputs, symmetric=True, mask=None), strict=True):
        np.testing.assert_allclose(value.numpy(), np.asarray(exact, dtype=float), rtol=1e-5, atol=1e-30)


def test_what_is_masked_everywhere_gets_exactly_no_gradient():
    queries, passages = make_reps("normal", 7, 1, 4, torch.float32)
    mask = torch.zeros(7, 14, dtype=torch.bool)
    mask[:, 5] = True
    _, _, of_passages, _ = value_and_gradients(
        tiled_contrastive_loss, queries, passages, torch.tensor(1.0), symmetric=True, mask=mask, tile_size=3
    )
    assert of_passages[5].count_nonzero() == 0
    assert (of_passages.abs().sum(1) > 0).sum() == 13


def test_a_batch_of_one_without_negatives_has_loss_0_and_gradient_0():
    found = value_and_gradients(
        tiled_contrastive_loss, torch.randn(1, 4), torch.randn(1, 4), torch.tensor(0.05), symmetric=True, tile_size=8
    )
    assert all(value.abs().max() == 0 for value in found)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_none_is_not_hidden(bad):
    queries, passages = make_reps("unit", 6, 0, 3, torch.float32)
    queries[4, 1] = bad
    inputs = queries, passages, torch.tensor(0.05)
    loss, of_queries, _, _ = value_and_gradients(tiled_contrastive_loss, *inputs, symmetric=True, tile_size=4)
    assert not loss.isfinite()
    assert not of_queries.isfinite().all()


def test_a_positive_left_out_makes_the_loss_infinite_as_in_the_dense_form():
    queries, passages = make_reps("unit", 5, 0, 3, torch.float32)
    mask = torch.eye(5, dtype=torch.bool)
    for symmetric in (False, True):
        settings = {"temperature": 0.1, "symmetric": symmetric, "mask": mask}
        assert contrastive_loss(queries, passages, **settings) == torch.inf
        assert tiled_contrastive_loss(queries, passages, **settings, tile_size=2) == torch.inf


def test_a_ragged_last_tile_reads_nothing_beyond_the_batch():
    """A public kernel's mask ignores where its tile starts, and reads on when B % 64 is not 0."""
    room = torch.full((128, 8), torch.nan, dtype=torch.float64)
    room[:65] = torch.randn(65, 8, dtype=torch.float64)
    inputs = room[:65], room[:65].flip(0).contiguous(), torch.tensor(0.5, dtype=torch.float64)
    tiled = value_and_gradients(tiled_contrastive_loss, *inputs, symmetric=True, tile_size=64)
    dense = value_and_gradients(contrastive_loss, *inputs, symmetric=True)
    torch.testing.assert_close(tiled, dense, rtol=1e-11, atol=1e-12)


# --- What it costs ------------------------------------------------------------------------------------------------


class LargestAllocation(TorchDispatchMode):
    """The most elements that any operation's output storage had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


@pytest.mark.parametrize("symmetric", [False, True])
def test_nothing_as_big_as_the_logits_is_ever_allocated(symmetric):
    queries, passages = make_reps("unit", 200, 1, 8, torch.float32)
    inputs = queries, passages, torch.tensor(0.05)
    with LargestAllocation() as tiled:
        value_and_gradients(tiled_contrastive_loss, *inputs, symmetric=symmetric, tile_size=32)
    with LargestAllocation() as dense:
        value_and_gradients(contrastive_loss, *inputs, symmetric=symmetric)
    assert tiled.elements == passages.numel() == 3200
    assert dense.elements == 200 * 400


@pytest.mark.parametrize("tile_size", [16, 24, 1000])
@pytest.mark.parametrize("hard", [0, 1])
def test_flops_are_8_b_n_d_in_all_symmetric_or_not(tile_size, hard):
    queries, passages = make_reps("unit", 40, hard, 8, torch.float32)
    for symmetric in (False, True):
        with FlopCounterMode(display=False) as counter:
            inputs = queries, passages, torch.tensor(0.05)
            value_and_gradients(tiled_contrastive_loss, *inputs, symmetric=symmetric, tile_size=tile_size)
        assert counter.get_total_flops() == 8 * 40 * len(passages) * 8


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_gradients_that_are_wanted_are_computed(wanted):
    values = *make_reps("normal", 10, 1, 4, torch.float64), torch.tensor(0.3, dtype=torch.float64)
    whole = value_and_gradients(tiled_contrastive_loss, *values, symmetric=True, tile_size=4)[1:]
    leaves = [value.clone().requires_grad_(needed) for value, needed in zip(values, wanted, strict=True)]
    with FlopCounterMode(display=False) as counter:
        loss = tiled_contrastive_loss(leaves[0], leaves[1], temperature=leaves[2], symmetric=True, tile_size=4)
        loss.backward()
    for leaf, needed, expected in zip(leaves, wanted, whole, strict=True):
        assert torch.equal(leaf.grad, expected) if needed else leaf.grad is None
    products = 2 if wanted[2] else 3
    assert counter.get_total_flops() == products * 2 * 10 * 20 * 4


def test_inputs_are_left_as_they_were():
    queries, passages = make_reps("normal", 9, 1, 4, torch.float32)
    mask = make_mask(9, 1, 0.4)
    before = [tensor.clone() for tensor in (queries, passages, mask)]
    value_and_gradients(
        tiled_contrastive_loss, queries, passages, torch.tensor(0.1), symmetric=True, mask=mask, tile_size=4
    )
    assert all(torch.equal(now, then) for now, then in zip((queries, passages, mask), before, strict=True))


# --- Dtypes, autocast, fake tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is_and_accumulated_in_float32(dtype):
    queries, passages = (reps.to(dtype) for reps in make_reps("unit", 33, 1, 16, torch.float32))
    temperature = torch.tensor(0.05)
    settings = {"symmetric": True, "mask": make_mask(33, 1, 0.2), "tile_size": 8}
    half = value_and_gradients(tiled_contrastive_loss, queries, passages, temperature, **settings)
    full = value_and_gradients(tiled_contrastive_loss, queries.float(), passages.float(), temperature, **settings)
    assert half[0].dtype == torch.float32 and half[1].dtype == half[2].dtype == dtype
    assert torch.equal(half[0], full[0]) and torch.equal(half[3], full[3])
    assert torch.equal(half[1], full[1].to(dtype)) and torch.equal(half[2], full[2].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ambient_autocast_changes_nothing(dtype):
    inputs = *make_reps("unit", 20, 1, 16, torch.float32), torch.tensor(0.05)
    plain = value_and_gradients(tiled_contrastive_loss, *inputs, symmetric=True, tile_size=8)
    with torch.autocast("cpu", dtype=dtype):
        inside = value_and_gradients(tiled_contrastive_loss, *inputs, symmetric=True, tile_size=8)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert all(torch.equal(left, right) for left, right in zip(plain, inside, strict=True))


@pytest.mark.parametrize("temperature", [0.05, torch.tensor(0.05), torch.tensor([0.05])])
def test_temperature_is_a_number_or_a_tensor_of_one_element(temperature):
    queries, passages = make_reps("unit", 8, 0, 4, torch.float32)
    expected = contrastive_loss(queries, passages, temperature=0.05)
    loss = tiled_contrastive_loss(queries, passages, temperature=temperature, tile_size=3)
    torch.testing.assert_close(loss, expected)
    assert loss.shape == ()
    if isinstance(temperature, torch.Tensor):
        leaf = temperature.clone().requires_grad_()
        tiled_contrastive_loss(queries, passages, temperature=leaf, tile_size=3).backward()
        assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_read_so_fake_tensors_pass_through(dtype):
    with FakeTensorMode():
        queries = torch.empty(20, 8, dtype=dtype, requires_grad=True)
        passages = torch.empty(40, 8, dtype=dtype, requires_grad=True)
        temperature = torch.empty((), requires_grad=True)
        mask = torch.empty(20, 40, dtype=torch.bool)
        loss = tiled_contrastive_loss(
            queries, passages, temperature=temperature, symmetric=True, mask=mask, tile_size=8
        )
        loss.backward()
    assert loss.shape == () and temperature.grad.shape == ()
    assert queries.grad.shape == (20, 8) and passages.grad.shape == (40, 8) and passages.grad.dtype == dtype


# --- In a step, and what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_as_the_loss_of_a_gradient_cache_step_it_gives_the_dense_naive_gradient(symmetric):
    encoder = torch.nn.Linear(6, 4).double()
    log_temperature = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    inputs = [torch.randn(7, 6, dtype=torch.float64), torch.randn(14, 6, dtype=torch.float64)]
    mask = make_mask(7, 1, 0.3)
    leaves = [*encoder.parameters(), log_temperature]

    def loss_with(function, **settings):
        return lambda queries, passages, mask: (
            3
            * function(queries, passages, temperature=log_temperature.exp(), symmetric=symmetric, mask=mask, **settings)
        )

    def gradients(step, loss_fn, **settings):
        for leaf in leaves:
            leaf.grad = None
        loss = step([encoder, encoder], inputs, loss_fn, mask=mask, **settings)
        return [loss, *(leaf.grad for leaf in leaves)]

    naive = gradients(naive_step, loss_with(contrastive_loss))
    cached = gradients(grad_cache_step, loss_with(tiled_contrastive_loss, tile_size=3), chunk_size=[3, 4])
    torch.testing.assert_close(cached, naive, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused_in_words():
    queries = torch.randn(4, 3, requires_grad=True)
    loss = tiled_contrastive_loss(queries, torch.randn(4, 3), temperature=0.1, tile_size=2)
    with pytest.raises(RuntimeError, match="no second derivative.*create_graph=True.*use contrastive_loss"):
        torch.autograd.grad(loss, queries, create_graph=True)


@pytest.mark.parametrize("tile_size", [0, -1, 2.5, True, None, "8"])
def test_a_tile_size_that_is_no_positive_int_is_refused(tile_size):
    with pytest.raises(ValueError, match="tile_size must be an int of at least 1"):
        tiled_contrastive_loss(torch.randn(4, 3), torch.randn(4, 3), temperature=0.1, tile_size=tile_size)


@pytest.mark.parametrize(
    ("argument", "changed"),
    [
        ("query_reps", {"query_reps": torch.randn(0, 3)}),
        ("query_reps", {"query_reps": torch.randn(4)}),
        ("query_reps", {"query_reps": torch.ones(4, 3, dtype=torch.long)}),
        ("passage_reps", {"passage_reps": torch.randn(5, 3)}),
        ("passage_reps", {"passage_reps": torch.randn(4, 2)}),
        ("passage_reps", {"passage_reps": torch.randn(4, 3, dtype=torch.float64)}),
        ("passage_reps", {"passage_reps": [[1.0]]}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": torch.ones(2)}),
        ("mask", {"mask": torch.zeros(4, 5, dtype=torch.bool)}),
        ("mask", {"mask": torch.zeros(4, 4)}),
    ],
)
def test_what_the_dense_loss_refuses_is_refused_in_the_same_words(argument, changed):
    given = {"query_reps": torch.randn(4, 3), "passage_reps": torch.randn(4, 3), "temperature": 0.1} | changed
    with pytest.raises(ValueError, match=f"^{argument} must") as tiled:
        tiled_contrastive_loss(given.pop("query_reps"), given.pop("passage_reps"), **given, tile_size=2)
    given = {"query_reps": torch.randn(4, 3), "passage_reps": torch.randn(4, 3), "temperature": 0.1} | changed
    with pytest.raises(ValueError) as dense:
        contrastive_loss(given.pop("query_reps"), given.pop("passage_reps"), **given)
    assert str(tiled.value) == str(dense.value)
