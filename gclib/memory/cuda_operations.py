"""What a CUDA card computes differently from a processor, as far as bytes go: fake tensors take the card's operations.

PyTorch chooses an operation's form by the device. A processor keeps every attention probability where dropout falls on
them, and dropout's mask in its input's dtype; a card keeps neither: its fused attention stores one number a row, its
fused dropout one byte a number. Autocast, too, keeps other operations in float32. A fake tensor on a CUDA device needs
a PyTorch built for CUDA; so the fake tensors stay on the processor, and inside `CudaKernels` those few functions take
the form that they have on a card: attention, dropout, and of autocast's list what encoders and losses call. All else is
taken to be the same code on both devices. Tests on a card hold a step's peak to that, to 1 KiB (under autocast to 0.1 %
more), for BERT, MiniLM, DistilBERT and ModernBERT; other models' steps were not run on one.

Bytes alone are imitated, and only of operations: a card's own tests hold them against the ledger of the same step
really run there (tests/gpu/test_forecast_gpu.py). What is no tensor, workspaces and rounding, is in
`gclib.memory.devices`.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ALIGNED = 8  # columns that a fused attention kernel wants its mask to be padded to
_LOOKS = frozenset(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"))
_IN_PYTHON = ("torch.nn.functional", "torch.functional", "torch.autograd")


class CudaKernels(TorchFunctionMode):
    """Inside, fake tensors on the processor take the operations of a CUDA card: attention, dropout, autocast.

    Also inside functions of PyTorch that are written in Python: `F.multi_head_attention_forward` attends, and a
    `backward` encodes once more what was checkpointed.
    """

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = _ALWAYS.get(func) or (_UNDER_AUTOCAST.get(func) if torch.is_autocast_enabled("cpu") else None)
        if own is not None:
            return own(*args, **kwargs)
        in_python = isinstance(func, FunctionType) and (func.__module__ in _IN_PYTHON or func is Tensor.backward)
        if in_python and _LOOKS & set(func.__code__.co_names):
            with self:
                return _body(func)(*args, **kwargs)
        return func(*args, **kwargs)


def _body(func: FunctionType) -> Callable:
    """A function of PyTorch that does not look for modes, and so runs under one: else it would ask that mode again."""
    names = {**func.__globals__, **dict.fromkeys(_LOOKS, _none_given)}
    body = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def _none_given(*tensors: Any) -> bool:
    return False


def fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """One byte a number is kept, the mask; a processor keeps the mask in the input's dtype."""
    if not training or not 0 < p < 1 or inplace:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention whose probabilities are never stored: the output, and one log-sum-exp a row (Rabe and Staats 2021).

    A card's memory-efficient kernel; on newer cards in half precision another one is chosen, which keeps as much.
    """
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
    if attn_mask is not None:
        attn_mask = _additive(attn_mask, query)
    keeps_rows = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, keeps_rows, dropout_p, is_causal, scale=scale)[0]


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """The mask as numbers to add, aligned for the kernel, and a view of it for every head."""
    if mask.dtype == torch.bool:
        seen, hidden = (torch.scalar_tensor(number, dtype=query.dtype) for number in (0.0, -torch.inf))
        mask = torch.where(mask, seen, hidden)
    mask = _autocast(mask)
    columns = mask.shape[-1]
    if columns % ALIGNED:
        missing = ALIGNED - columns % ALIGNED
        mask = torch.nn.functional.pad(mask, (0, missing))[..., :columns]
    return mask.expand(*query.shape[:-1], columns)


def _autocast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else tensor


def _in_float32(function: Callable) -> Callable:
    """The function on float32 copies of its tensors, as CUDA's autocast does it."""

    def widened(*args: Any, **kwargs: Any) -> Any:
        wide = [arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
        named = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
        return function(*wide, **named)

    return widened


def _to_float32(function: Callable) -> Callable:
    """The function with a float32 result, unless its caller names another: nothing is copied before."""

    def widened(*args: Any, **kwargs: Any) -> Any:
        tensor = args[0] if args else kwargs.get("input")
        narrow = isinstance(tensor, Tensor) and tensor.is_floating_point() and kwargs.get("dtype") is None
        return function(*args, **(kwargs | {"dtype": torch.float32} if narrow else kwargs))

    return widened


def _normalized(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Tensor:
    """`F.normalize`, its norm in float32."""
    length = torch.linalg.vector_norm(input, p, dim, keepdim=True, dtype=torch.float32)
    return input / length.clamp_min(eps).expand_as(input)


def _cross_entropy(input: Tensor, target: Tensor, *args: Any, label_smoothing: float = 0.0, **named: Any) -> Tensor:
    """`F.cross_entropy`: logarithms in the logits' dtype, their mean from a float32 copy."""
    if args or label_smoothing:
        return F.cross_entropy(input.float(), target, *args, label_smoothing=label_smoothing, **named)
    return F.nll_loss(torch.ops.aten._log_softmax(input, 1, False).float(), target, **named)


_ALWAYS: dict[Any, Callable] = {
    F.dropout: fused_dropout,
    torch.dropout: fused_dropout,
    F.scaled_dot_product_attention: fused_attention,
}
_COPIED = (F.cosine_similarity, F.layer_norm, torch.layer_norm, F.group_norm)
_COPIED += (torch.exp, torch.pow, torch.rsqrt, torch.logsumexp, torch.log, torch.log1p, torch.reciprocal)
_COPIED += (Tensor.exp, Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.logsumexp, Tensor.log)
_WIDENED = (F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax)
_WIDENED += (torch.sum, Tensor.sum, torch.cumsum, Tensor.cumsum, torch.prod, Tensor.prod)
_UNDER_AUTOCAST: dict[Any, Callable] = {
    F.normalize: _normalized,
    F.cross_entropy: _cross_entropy,
    **{function: _in_float32(function) for function in _COPIED},
    **{function: _to_float32(function) for function in _WIDENED},
}
