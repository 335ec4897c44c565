"""What a processor's operations leave otherwise than fake tensors say.

Fake tensors give a normalization's mean and inverse deviation the dtype of its input. On a processor they have that of
its parameters where the two differ, as under autocast to bfloat16, where a layer's weights stay in float32 (ELECTRA and
RoFormer, whose embeddings pass a linear layer first, normalize bfloat16 throughout).
"""

from typing import Any

import torch
from torch import Tensor

from gclib.memory.ledger import UncompiledMode

_PARAMETERS = {  # where the weight and the bias stand among the operation's arguments
    torch.ops.aten.native_layer_norm.default: (2, 3),
    torch.ops.aten.native_group_norm.default: (1, 2),
}


class CpuKernels(UncompiledMode):
    """Inside, normalizations of fake tensors return what a processor's return."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _PARAMETERS:
            return result
        dtypes = {args[place].dtype for place in _PARAMETERS[func] if isinstance(args[place], Tensor)}
        if not dtypes or dtypes == {args[0].dtype}:
            return result
        output, *statistics = result
        return output, *(one.to(max(dtypes, key=lambda dtype: dtype.itemsize)) for one in statistics)
