"""Fake tensors that are made quickly: they have shapes, dtypes and devices, and no numbers."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
VIEWS = frozenset((_aten.view.default, _aten._unsafe_view.default, _aten.t.default, _aten.transpose.int))
VIEWS |= {_aten.permute.default, _aten.expand.default, _aten.unsqueeze.default, _aten.squeeze.dim}
VIEWS |= {_aten.select.int, _aten.slice.Tensor, _aten.detach.default, _aten.alias.default}
# PyTorch computes the shapes of these without Python.
DIRECT = frozenset((_aten.addmm.default, _aten.mm.default, _aten.bmm.default, _aten.add.Tensor, _aten.sub.Tensor))
DIRECT |= {_aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.neg.default, _aten.rsqrt.default}
DIRECT |= {_aten.pow.Tensor_Scalar, _aten.mean.dim, _aten.sum.dim_IntList, _aten.gelu.default, _aten.silu.default}
DIRECT |= {_aten.gelu_backward.default, _aten._softmax.default, _aten._softmax_backward_data.default}
PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))
UNSURE = frozenset((torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view))


class FakeMode(FakeTensorMode):
    """Fake tensors that are made at once where these are views, or what an operation gave before.

    `FakeTensorMode` looks at each anew, in Python, though many of a model's operations are views and its layers are
    alike. A result is kept where it shares memory neither with what was given nor in itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._given: dict[tuple[Any, ...], tuple[bool, list[Any]] | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in VIEWS and self._knows(args[0]):
            return self._take(func, args, kwargs)
        described = [func, torch.get_default_dtype(), torch._C._get_default_device(), torch.is_inference_mode_enabled()]
        if not _makes_new(func) or not self._describe((args, kwargs), described):
            return super().__torch_dispatch__(func, types, args, kwargs)
        key = tuple(described)
        if given := self._given.get(key):
            several, parts = given
            made = [self._make(*part) if isinstance(part, tuple) else part for part in parts]
            return tuple(made) if several else made[0]
        one_device = len({each for each in described if isinstance(each, torch.device)}) == 1
        if func in DIRECT and one_device and self._knows(args[0]):
            result = self._take(func, args, kwargs)
        else:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        if key not in self._given:
            self._given[key] = self._again(result, (args, kwargs))
        return result

    def _take(self, func: Any, args: Any, kwargs: Any) -> FakeTensor:
        """Do an operation on what stands behind fake tensors, of "meta"; the result is on the device of the first."""
        with in_kernel_invocation_manager(self):
            result = func(*args, **kwargs)
        return FakeTensor(self, result, args[0].fake_device)

    def _knows(self, value: Any) -> bool:
        """Whether this is a plain fake tensor of this mode."""
        own = isinstance(value, FakeTensor) and value.fake_mode is self and value.constant is None
        return own and value.layout == torch.strided and not value.dtype.is_complex

    def _describe(self, value: Any, described: list[Any]) -> bool:
        """Add to `described` what a result depends on; False where a part of the value is of an unknown kind."""
        if self._knows(value):
            described += (value.shape, value.stride(), value.dtype, value.fake_device)
            return True
        if isinstance(value, dict):
            return self._describe(tuple(value.items()), described)
        described += (type(value), len(value) if isinstance(value, (list, tuple)) else value)  # 1 == 1.0 == True
        if isinstance(value, (list, tuple)):
            return all(self._describe(part, described) for part in value)
        return type(value) in PLAIN

    def _again(self, result: Any, given: Any) -> tuple[bool, list[Any]] | None:
        """What makes a result again: whether it is several, and of each tensor shape, strides, dtype and device. None
        where it shares memory, or has parts of other kinds.
        """
        parts, made = list(result) if isinstance(result, tuple) else [result], []
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if not all(self._knows(part) if isinstance(part, Tensor) else type(part) in PLAIN for part in parts):
            return None
        old = {leaf.untyped_storage()._cdata for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
        if len({tensor.untyped_storage()._cdata for tensor in tensors} - old) < len(tensors):
            return None
        for part in parts:
            if isinstance(part, Tensor):
                like = (part.shape, part.stride(), part.dtype, part.fake_device)
                if self._make(*like).untyped_storage().nbytes() != part.untyped_storage().nbytes():
                    return None
                part = like
            made.append(part)
        return isinstance(result, tuple), made

    def _make(self, shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> FakeTensor:
        with in_kernel_invocation_manager(self):
            return FakeTensor(self, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)


@lru_cache(maxsize=4096)
def _makes_new(func: Any) -> bool:
    """Whether PyTorch's own operation says that it changes nothing, gives no view, and asks no value."""
    if not isinstance(func, OpOverload) or func.namespace not in ("aten", "prims") or func in VIEWS:
        return False
    changes = func._schema.is_mutable or any(
        each.alias_info for each in (*func._schema.arguments, *func._schema.returns)
    )
    return not changes and UNSURE.isdisjoint(func.tags) and func not in FakeTensorMode.lift_fns
