"""Fake tensors that are made at once are those that PyTorch makes: by FakeTensorMode, and by the operation itself."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from gclib import forecast_step
from gclib.memory import fake_mode, fake_steps
from gclib.memory.fake_mode import FakeMode
from tests.memory.test_forecast_models import small

LENGTHS = {"batch_size": 8, "chunk_size": 4, "query_length": 6, "passage_length": 9}


def facts(result, given_values):
    """What a ledger, and the next operation, can see of each tensor in a result."""
    before = [each.untyped_storage()._cdata for each in tree_leaves(given_values) if isinstance(each, Tensor)]
    found = []
    for part in tree_leaves(result):
        if isinstance(part, Tensor):
            storage = part.untyped_storage()
            shared = before.index(storage._cdata) if storage._cdata in before else None
            strides = [stride for size, stride in zip(part.shape, part.stride(), strict=True) if size > 1]
            whole = (tuple(part.shape), strides, part.storage_offset(), part.dtype, storage.nbytes())
            found.append((*whole, str(part.device), part.layout, part.requires_grad, shared))
        else:
            found.append(part)
    return found


class Twice(FakeMode):
    """Does each operation that changes nothing by `FakeTensorMode` too."""

    compared = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            return super().__torch_dispatch__(func, types, args, kwargs)
        expected = FakeTensorMode.__torch_dispatch__(self, func, types, args, kwargs)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            assert facts(result, (args, kwargs)) == facts(expected, (args, kwargs)), func
        Twice.compared += 1
        return result


STEPS = {
    "tiny": ("tiny", {}),
    "tiny on a card": ("tiny", {"autocast": torch.bfloat16, "device": "cuda", "gradient_checkpointing": True}),
    "ModernBERT": (small("modernbert-base"), {"dtype": torch.bfloat16, "device": "cuda", "pooling": "mean"}),
    "Qwen3": (small("qwen3-0.6b"), {"dtype": torch.bfloat16, "pooling": "last"}),
    "pictures": (small("clip-vit-b-32-vision"), {"pooling": "cls", "query_length": None, "passage_length": None}),
}


@pytest.mark.parametrize("name", ["tiny", *(pytest.param(n, marks=pytest.mark.slow) for n in STEPS if n != "tiny")])
def test_every_operation_of_a_step_gives_what_fake_tensor_mode_gives(name, monkeypatch, tmp_path):
    config, options = STEPS[name]
    monkeypatch.setenv("GCLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(fake_steps, "FakeMode", Twice)
    monkeypatch.setattr(Twice, "compared", 0)
    fake_steps._made.cache_clear()
    try:
        forecast_step("grad_cache", config=config, **(LENGTHS | options))
    finally:
        fake_steps._made.cache_clear()
    assert Twice.compared > 500


ONE = {"neg": torch.neg, "rsqrt": torch.rsqrt, "power": lambda x: x**3, "silu": F.silu, "gelu": F.gelu}
ONE |= {"softmax": partial(torch.softmax, dim=-1), "doubled": lambda x: x * 2, "halves": lambda x: x / 2}
ONE |= {"mean": lambda x: x.mean(0), "sum": lambda x: x.sum(-1, keepdim=True), "dropout": partial(F.dropout, p=0.5)}
TWO = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "product": lambda x, y: x @ y.mT}


@st.composite
def laid_out(draw, shape):
    """A float tensor of this shape as steps have them: whole, turned, cut from a larger one, or one row for all."""
    kind = draw(st.sampled_from(["whole", "turned", "cut", "expanded"]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    if kind == "turned":
        return torch.ones(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))
    if kind == "cut":
        return torch.ones(*shape[:-1], shape[-1] + 3, dtype=dtype)[..., 1 : 1 + shape[-1]]
    return (
        torch.ones(1, *shape[1:], dtype=dtype).expand(shape) if kind == "expanded" else torch.ones(shape, dtype=dtype)
    )


@given(st.data(), st.sampled_from([*ONE, *TWO]), st.lists(st.integers(1, 4), min_size=2, max_size=3))
def test_the_second_answer_is_the_first_and_the_real_operations(data, name, shape):
    """Shape, strides, dtype and bytes of the real one; and what is kept is another tensor each time."""
    function, count = (ONE[name], 1) if name in ONE else (TWO[name], 2)
    real = [data.draw(laid_out(shape)) for _ in range(count)]
    if name == "product":
        real = [each.to(torch.float32) for each in real]
    mode = FakeMode()
    fakes = [mode.from_tensor(each) for each in real]
    with mode:
        first, second = function(*fakes), function(*fakes)
    expected = facts(function(*real), real)
    assert facts(first, fakes) == facts(second, fakes) == expected
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_what_differs_in_a_result_differs_in_the_key():
    mode = FakeMode()
    with mode:
        whole = torch.ones(3, dtype=torch.int64)
        assert [(whole * each).dtype for each in (True, 2, 2.0)] == [torch.int64, torch.int64, torch.float32]
        torch.set_default_dtype(torch.float64)
        try:
            assert (whole * 2.0).dtype == (whole / 2).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
        assert (whole * 2.0).dtype == torch.float32
        assert torch.cat([torch.ones(2, 3)] * 2).shape == (4, 3) and torch.cat([torch.ones(2, 3)] * 3).shape == (6, 3)


def test_what_changes_or_asks_values_goes_to_fake_tensor_mode():
    aten = torch.ops.aten
    assert fake_mode._makes_new(aten.mul.Tensor) and fake_mode._makes_new(aten.native_layer_norm.default)
    for each in (
        aten.add_.Tensor,
        aten.view.default,
        aten.nonzero.default,
        aten.lift_fresh_copy.default,
        aten.to.dtype,
    ):
        assert not fake_mode._makes_new(each)
    with FakeMode(), pytest.raises(torch._subclasses.fake_tensor.DynamicOutputShapeException):
        torch.ones(3).nonzero()
    with FakeMode():
        stays = torch.ones(2, 2)
        assert stays.add_(1) is stays
        assert torch.reshape(stays, (4,)).untyped_storage()._cdata == stays.untyped_storage()._cdata


def test_what_was_seen_before_does_not_ask_fake_tensor_mode(monkeypatch):
    """Of one result and of several; another width is asked for."""
    mode = FakeMode()
    layer, row, wide = (mode.from_tensor(torch.ones(*shape)) for shape in ((4,), (3, 4), (5, 4)))
    ways = (lambda x: F.layer_norm(x, (4,), layer, layer), torch.tanh, lambda x: torch.var_mean(x, dim=0))
    with mode:
        first = [way(row) for way in ways]
        monkeypatch.setattr(FakeTensorMode, "__torch_dispatch__", lambda *_: pytest.fail("asked"))
        assert [facts(way(row), row) for way in ways] == [facts(each, row) for each in first]
        with pytest.raises(pytest.fail.Exception):
            torch.tanh(wide)
