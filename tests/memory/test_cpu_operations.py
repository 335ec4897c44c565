"""Statistics of normalizations: what fake tensors say under `CpuKernels` against what a processor returns."""

from contextlib import ExitStack

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gclib.memory.cpu_operations import CpuKernels


def dtypes(kind, numbers, weights, biases, fake):
    with ExitStack() as stack:
        for mode in (FakeTensorMode(), CpuKernels()) if fake else ():
            stack.enter_context(mode)
        given = torch.empty(3, 4, 8, dtype=numbers)
        size = 8 if kind == "layer" else 4
        weight, bias = (None if dtype is None else torch.empty(size, dtype=dtype) for dtype in (weights, biases))
        if kind == "layer":
            outputs = torch.ops.aten.native_layer_norm(given, [8], weight, bias, 1e-5)
        else:
            outputs = torch.ops.aten.native_group_norm(given, weight, bias, 3, 4, 8, 2, 1e-5)
        return [output.dtype for output in outputs]


@pytest.mark.parametrize("kind", ["layer", "group"])
@pytest.mark.parametrize("numbers", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", ["float32", "same", None])
@pytest.mark.parametrize("with_bias", [True, False])
def test_statistics_have_the_dtype_that_a_processor_gives_them(kind, numbers, weights, with_bias):
    if weights == "float32" and numbers == torch.float64:
        weights = "same"  # a processor does not take these together
    dtype = {"float32": torch.float32, "same": numbers, None: None}[weights]
    arguments = kind, numbers, dtype, dtype if with_bias else None
    assert dtypes(*arguments, fake=True) == dtypes(*arguments, fake=False)
