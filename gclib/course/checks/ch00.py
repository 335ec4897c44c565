"""Chapter 00's exercises: the bytes of a tensor, and the peak of a timeline."""

import math

import numpy as np
import torch

from .engine import Exercise, Misconception
from .judging import Inputs


def _matrix(rng: np.random.Generator) -> Inputs:
    shape = tuple(int(side) for side in rng.integers(3, 3000, size=2))
    return {"shape": shape, "bits": int(rng.choice([16, 32, 64]))}


def _activations(rng: np.random.Generator) -> Inputs:
    shape = tuple(int(side) for side in rng.integers(2, 50, size=4))
    return {"shape": shape, "bits": int(rng.choice([8, 16, 32]))}


def _packed(rng: np.random.Generator) -> Inputs:
    """Numbers smaller than a byte, a whole number of bytes together."""
    return {"shape": (int(rng.integers(3, 300)), 8 * int(rng.integers(2, 90))), "bits": int(rng.choice([1, 4]))}


def _one_number(rng: np.random.Generator) -> Inputs:
    return {"shape": (), "bits": int(rng.choice([16, 32, 64]))}


tensor_bytes = Exercise(
    chapter=0,
    name="tensor_bytes",
    spec="the bytes of a tensor of this shape whose numbers take this many bits each (an int).",
    line_budget=2,
    oracle=lambda shape, bits: math.prod(shape) * bits // 8,
    makers=(_matrix, _activations, _one_number, _packed),
    rtol=0,
    atol=0,
    whole=True,
    misconceptions=(
        Misconception(
            "bits, not bytes",
            "That is the number of bits: a byte has 8.",
            lambda shape, bits: math.prod(shape) * bits,
        ),
        Misconception(
            "numbers, not bytes",
            "That is how many numbers the tensor holds: each takes bits / 8 bytes.",
            lambda shape, bits: math.prod(shape),
        ),
        Misconception(
            "sides added",
            "It looks as if the sides of the shape are added: a table of 3 by 5 holds 15 numbers, not 8.",
            lambda shape, bits: sum(shape) * bits // 8,
        ),
        Misconception(
            "first side only",
            "It looks as if only the first side of the shape counts: a table holds a number for each row and column.",
            lambda shape, bits: shape[0] * bits // 8,
        ),
        Misconception(
            "two sides only",
            "Right for a table. It looks as if only two sides of the shape count: a tensor may have more, or none.",
            lambda shape, bits: math.prod(shape[:2]) * bits // 8,
        ),
        Misconception(
            "bytes of one number rounded down",
            "Right for whole bytes. It looks as if bits // 8 comes first, which is 0 for numbers smaller than a byte: "
            "multiply first, then divide.",
            lambda shape, bits: math.prod(shape) * (bits // 8),
        ),
        Misconception(
            "always four bytes",
            "It looks as if every number took 4 bytes: that is true of 32 bits only.",
            lambda shape, bits: math.prod(shape) * 4,
        ),
        Misconception(
            "KiB, not bytes",
            "That is in KiB (2**10 bytes): the answer is asked for in bytes.",
            lambda shape, bits: math.prod(shape) * bits / 8 / 2**10,
        ),
        Misconception(
            "MiB, not bytes",
            "That is in MiB (2**20 bytes): the answer is asked for in bytes.",
            lambda shape, bits: math.prod(shape) * bits / 8 / 2**20,
        ),
    ),
    hints=(
        "First count the numbers in the tensor; then ask how many bytes one of them takes.",
        "The numbers are the product of the sides (math.prod(shape)); one of them takes bits / 8 bytes.",
        "return math.prod(shape) * bits // 8",
    ),
)


def _timeline(rng: np.random.Generator) -> Inputs:
    """Parameters that stay, and three kinds that rise and fall at different times."""
    events = int(rng.integers(8, 14))
    kind_bytes = rng.integers(1_000, 90_000, size=(events, 4))
    kind_bytes[:, 0] = 50_000
    kind_bytes[-1, 1:] = rng.integers(0, 100, size=3)
    return {"kind_bytes": torch.from_numpy(kind_bytes)}


peak_bytes = Exercise(
    chapter=0,
    name="peak_bytes",
    spec="the peak: kind_bytes is a tensor of (moments, kinds); the most bytes live at any one moment (an int).",
    line_budget=2,
    oracle=lambda kind_bytes: max(sum(row) for row in kind_bytes.tolist()),
    makers=(_timeline,),
    rtol=0,
    atol=0,
    whole=True,
    misconceptions=(
        Misconception(
            "peaks of the kinds added",
            "It looks as if each kind's own peak is taken and those are added: they come at different moments, so that "
            "much is never live at once.",
            lambda kind_bytes: int(kind_bytes.amax(dim=0).sum()),
        ),
        Misconception(
            "largest kinds of the moments added",
            "It looks as if the largest kind of each moment is taken and those are added: add the kinds of a moment, "
            "and take the largest moment.",
            lambda kind_bytes: int(kind_bytes.amax(dim=1).sum()),
        ),
        Misconception(
            "the beginning, not the peak",
            "That is what is live at the first moment: most of a step's tensors are still to come.",
            lambda kind_bytes: int(kind_bytes[0].sum()),
        ),
        Misconception(
            "moments added",
            "It looks as if the moments are added: bytes that stay for ten moments are still the same bytes.",
            lambda kind_bytes: int(kind_bytes.sum()),
        ),
        Misconception(
            "the end, not the peak",
            "That is what is live at the last moment: a step frees most of what it took.",
            lambda kind_bytes: int(kind_bytes[-1].sum()),
        ),
        Misconception(
            "one kind alone",
            "That is the largest entry of the table, one kind alone: at each moment the kinds add up.",
            lambda kind_bytes: int(kind_bytes.max()),
        ),
        Misconception(
            "down the columns",
            "It looks as if each kind is added up over all moments: rows are moments, so add along a row.",
            lambda kind_bytes: int(kind_bytes.sum(dim=0).max()),
        ),
        Misconception(
            "where the peak is, not how high",
            "That is the number of the moment at which the peak stands: its bytes are asked for.",
            lambda kind_bytes: int(kind_bytes.sum(dim=1).argmax()),
        ),
        Misconception(
            "the mean, not the peak",
            "That is the average over the moments: memory runs out at the largest of them.",
            lambda kind_bytes: kind_bytes.sum(dim=1).double().mean().item(),
        ),
    ),
    hints=(
        "At one moment, what do the kinds come to together? And which moment is the worst?",
        "Add along a row (dim=1), then take the largest.",
        "return int(kind_bytes.sum(dim=1).max())",
    ),
)
