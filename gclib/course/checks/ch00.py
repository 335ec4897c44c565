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
    return {"shape": shape, "bits": int(rng.choice([8, 16, 24, 32]))}


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
            "a whole byte for every number",
            "Right for whole bytes. It looks as if a number that is smaller than a byte is given one: packed, "
            "several of them share a byte.",
            lambda shape, bits: math.prod(shape) * -(-bits // 8),
        ),
        Misconception(
            "first and last side only",
            "It looks as if only the first and the last side are multiplied: all of them are.",
            lambda shape, bits: (shape[0] * shape[-1] if shape else 1) * bits // 8,
        ),
        Misconception(
            "sides counted",
            "It looks as if the sides were counted: their product says how many numbers there are.",
            lambda shape, bits: len(shape) * bits // 8,
        ),
        Misconception(
            "sides added",
            "It looks as if the sides of the shape are added: a table of 3 by 5 holds 15 numbers, not 8.",
            lambda shape, bits: sum(shape) * bits // 8,
        ),
        *(
            Misconception(
                "first side only",
                "It looks as if only the first side of the shape counts: a tensor may have more, or none.",
                wrong,
            )
            for wrong in (
                lambda shape, bits: math.prod(shape[:1]) * bits // 8,
                lambda shape, bits: shape[0] * bits // 8,  # an error where there is none
            )
        ),
        *(
            Misconception(
                "two sides only",
                "Right for a table. It looks as if only two sides of the shape count: a tensor may have more, or "
                "fewer.",
                wrong,
            )
            for wrong in (
                lambda shape, bits: math.prod(shape[:2]) * bits // 8,
                lambda shape, bits: shape[0] * shape[1] * bits // 8,
            )
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
        "Divide by 8 last: a number may be smaller than a byte. // keeps an int.",
    ),
)


def _timeline(rng: np.random.Generator) -> Inputs:
    """Parameters that stay, and three kinds that rise and fall at different times."""
    events = int(rng.integers(8, 14))
    kind_bytes = rng.integers(10**9, 90 * 10**9, size=(events, 4)) | 1  # too large for float32 to count in ones
    kind_bytes[:, 0] = 50 * 10**9
    kind_bytes[-1, 1:] = rng.integers(0, 100, size=3)
    return {"kind_bytes": torch.from_numpy(kind_bytes)}


def _any_table(rng: np.random.Generator) -> Inputs:
    """Few bytes in any order: the largest kind may stand beside the peak, and the least never at the end."""
    events = int(rng.integers(3, 14))
    kind_bytes = rng.integers(1_000, 90_000, size=(events, int(rng.integers(2, 7))))
    last = kind_bytes.sum(axis=1).argmin() == events - 1
    return {"kind_bytes": torch.from_numpy(np.roll(kind_bytes, int(last), axis=0))}


peak_bytes = Exercise(
    chapter=0,
    name="peak_bytes",
    spec="the peak: kind_bytes is a tensor of (moments, kinds); the most bytes live at any one moment (an int).",
    line_budget=2,
    oracle=lambda kind_bytes: max(sum(row) for row in kind_bytes.tolist()),
    makers=(_timeline, _any_table),
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
            "the least, not the most",
            "That is the least that is live at a moment: memory runs out at the most.",
            lambda kind_bytes: int(kind_bytes.sum(dim=1).min()),
        ),
        Misconception(
            "growth since the start",
            "That is how far the peak stands above the first moment: what was there before counts too.",
            lambda kind_bytes: int((kind_bytes.sum(dim=1) - kind_bytes[0].sum()).max()),
        ),
        Misconception(
            "the moment of the largest kind",
            "That is the moment at which one kind is largest: others may be small then. Add first, then look.",
            lambda kind_bytes: int(kind_bytes[kind_bytes.amax(dim=1).argmax()].sum()),
        ),
        Misconception(
            "the middle, not the peak",
            "That is the moment in the middle: the peak may stand anywhere.",
            lambda kind_bytes: int(kind_bytes[len(kind_bytes) // 2].sum()),
        ),
        Misconception(
            "added in float32",
            "Nearly: float32 has 24 bits for its digits, too few to count billions of bytes singly. Stay with ints.",
            lambda kind_bytes: int(kind_bytes.float().sum(dim=1).max()),
        ),
        Misconception(
            "every moment's sum",
            "Those are the sums of all moments: the largest of them is asked for.",
            lambda kind_bytes: kind_bytes.sum(dim=1),
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
        "Two reductions, one after the other: kinds of a moment first (dim=1), moments last. max(dim=...) would return "
        "a pair; without dim it is one number.",
    ),
)
