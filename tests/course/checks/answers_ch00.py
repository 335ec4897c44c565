"""Chapter 00's exercises, answered as readers do."""

import math
from functools import reduce

import numpy as np
import torch

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch00")

right("tensor_bytes")(lambda shape, bits: math.prod(shape) * bits // 8)
right("tensor_bytes")(lambda shape, bits: bits * math.prod(shape) >> 3)
right("tensor_bytes")(lambda shape, bits: int(np.prod(shape, dtype=np.int64)) * bits // 8)
right("tensor_bytes")(lambda shape, bits: torch.Size(shape).numel() * bits // 8)
right("tensor_bytes")(lambda shape, bits: np.prod([*shape, bits], dtype=np.int64) // 8)


@right("tensor_bytes")
def loop(shape, bits):
    count = 1
    for side in shape:
        count *= side
    return count * bits // 8


wrong("tensor_bytes", "bits, not bytes", "in bits")(lambda shape, bits: math.prod(shape) * bits)
wrong("tensor_bytes", "sides added", "sum")(lambda shape, bits: sum(shape) * bits // 8)
wrong("tensor_bytes", None, "two sides")(lambda shape, bits: shape[0] * shape[-1] * bits // 8)
wrong("tensor_bytes", "two sides only", "by name")(lambda shape, bits: shape[0] * shape[1] * bits // 8)
wrong("tensor_bytes", "always four bytes", "four bytes always")(lambda shape, bits: math.prod(shape) * 4)
wrong("tensor_bytes", "numbers, not bytes", "count only")(lambda shape, bits: math.prod(shape))
wrong("tensor_bytes", "a float for an int", "float")(lambda shape, bits: math.prod(shape) * bits / 8)
wrong("tensor_bytes", "bytes of one number rounded down", "bits // 8 first")(
    lambda shape, bits: math.prod(shape) * (bits // 8)
)
wrong("tensor_bytes", "a whole byte for every number", "max(1, bits//8)")(
    lambda shape, bits: math.prod(shape) * max(1, bits // 8)
)
wrong("tensor_bytes", None, "times 8")(lambda shape, bits: math.prod(shape) * bits * 8)
wrong("tensor_bytes", "MiB, not bytes", "MiB")(lambda shape, bits: math.prod(shape) * bits // 8 / 2**20)
wrong("tensor_bytes", "sides counted", "len")(lambda shape, bits: len(shape) * bits // 8)
right("tensor_bytes")(lambda shape, bits: int(np.prod(np.array(shape, dtype=np.int32), dtype=np.int32)) * bits // 8)
wrong("tensor_bytes", None, "python list product forgets last")(
    lambda shape, bits: reduce(lambda a, b: a * b, shape[:-1], 1) * bits // 8
)
wrong("tensor_bytes", "a whole byte for every number", "rounded up a byte a number")(
    lambda shape, bits: math.prod(shape) * -(-bits // 8)
)

right("peak_bytes")(lambda kind_bytes: kind_bytes.sum(dim=1).max())
right("peak_bytes")(lambda kind_bytes: int(kind_bytes.sum(1).max()))
right("peak_bytes")(lambda kind_bytes: max(sum(row) for row in kind_bytes.tolist()))
right("peak_bytes")(lambda kind_bytes: torch.sum(kind_bytes, -1).sort().values[-1])
right("peak_bytes")(lambda kind_bytes: int(kind_bytes.numpy().sum(axis=1).max()))
right("peak_bytes")(lambda kind_bytes: kind_bytes.numpy().sum(axis=1).max())
right("peak_bytes")(lambda kind_bytes: kind_bytes.double().sum(dim=1).max().long())

wrong("peak_bytes", "down the columns", "columns")(lambda kind_bytes: kind_bytes.sum(dim=0).max())
wrong("peak_bytes", "peaks of the kinds added", "sum of each kind's peak")(
    lambda kind_bytes: kind_bytes.max(dim=0).values.sum()
)
wrong("peak_bytes", "one kind alone", "largest number")(lambda kind_bytes: kind_bytes.max())
wrong("peak_bytes", "moments added", "total")(lambda kind_bytes: kind_bytes.sum())
wrong("peak_bytes", "the end, not the peak", "last")(lambda kind_bytes: kind_bytes[-1].sum())
wrong("peak_bytes", "the beginning, not the peak", "first")(lambda kind_bytes: kind_bytes[0].sum())
wrong("peak_bytes", "where the peak is, not how high", "place")(lambda kind_bytes: kind_bytes.sum(dim=1).argmax())
wrong("peak_bytes", "another form", "max returns pair")(lambda kind_bytes: kind_bytes.sum(dim=1).max(dim=0))
wrong("peak_bytes", "every moment's sum", "all moments")(lambda kind_bytes: kind_bytes.sum(dim=1))
wrong("peak_bytes", "the mean, not the peak", "mean")(lambda kind_bytes: kind_bytes.double().sum(dim=1).mean())
wrong("peak_bytes", "the least, not the most", "min")(lambda kind_bytes: kind_bytes.sum(dim=1).min())
wrong("peak_bytes", "growth since the start", "above the start")(
    lambda kind_bytes: kind_bytes.sum(dim=1).max() - kind_bytes.sum(dim=1)[0]
)
wrong("peak_bytes", "added in float32", "float32 sum")(lambda kind_bytes: int(kind_bytes.float().sum(dim=1).max()))
wrong("peak_bytes", "the moment of the largest kind", "row of the largest")(
    lambda kind_bytes: kind_bytes[kind_bytes.max(dim=1).values.argmax()].sum()
)
wrong("peak_bytes", "the middle, not the peak", "the middle")(lambda kind_bytes: kind_bytes[len(kind_bytes) // 2].sum())
wrong("peak_bytes", "largest kinds of the moments added", "row max")(
    lambda kind_bytes: kind_bytes.max(dim=1).values.sum()
)


@wrong("peak_bytes", "moments added", "cumsum")
def cumsum(kind_bytes):
    return kind_bytes.cumsum(dim=0).sum(dim=1).max()


@wrong("peak_bytes", "input changed in place", "in place")
def in_place(kind_bytes):
    kind_bytes[:, 0] += kind_bytes[:, 1:].sum(dim=1)
    return kind_bytes[:, 0].max()
