"""Chapter 02's exercises: what the model takes, what attention remembers, a line through two peaks, the wall.

Letters: B texts, T tokens, P parameters. Bytes of float32 numbers, 4 each.
"""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch

from .engine import Exercise, Misconception
from .judging import Inputs


def _model_with(rng: np.random.Generator, optimizer: str) -> Inputs:
    return {"parameters": int(rng.integers(1_000, 70_000_000_000)), "optimizer": optimizer}


def _model_bytes(parameters: int, optimizer: str) -> int:
    numbers = parameters  # the weights
    numbers += parameters  # their gradients
    numbers += {"adamw": parameters + parameters, "sgd": 0}[optimizer]
    return 4 * numbers


model_bytes = Exercise(
    chapter=2,
    name="model_bytes",
    spec='bytes that a float32 model takes in training, whatever the batch; optimizer is "adamw" or "sgd" (an int).',
    line_budget=2,
    oracle=_model_bytes,
    makers=(lambda rng: _model_with(rng, "adamw"), lambda rng: _model_with(rng, "sgd")),
    whole=True,
    rtol=0,
    atol=0,
    misconceptions=(
        Misconception(
            "optimizers swapped",
            "It looks as if the two optimizers changed places: AdamW is the one that keeps two means.",
            lambda parameters, optimizer: parameters * (8 if optimizer == "adamw" else 16),
        ),
        Misconception(
            "states only",
            "Those are the optimizer's states alone: weights and gradients are there too.",
            lambda parameters, optimizer: parameters * (8 if optimizer == "adamw" else 0),
        ),
        Misconception(
            "half of it",
            "It is half of it: a float32 number takes 4 bytes, and two are there with any optimizer.",
            lambda parameters, optimizer: parameters * (8 if optimizer == "adamw" else 4),
        ),
        Misconception(
            "five numbers",
            "It looks as if something was counted twice: a weight, a gradient, and with AdamW two means.",
            lambda parameters, optimizer: parameters * (20 if optimizer == "adamw" else 12),
        ),
        Misconception(
            "computed in float32",
            "Nearly: a float32 counts no further than 16 million one by one. Python's ints do.",
            lambda parameters, optimizer: int(torch.tensor(float(parameters)) * (16 if optimizer == "adamw" else 8)),
        ),
        Misconception(
            "weights alone, or numbers for bytes",
            "Four times P: as bytes these are the weights alone, as numbers they are all of AdamW's. Training keeps a "
            "gradient and two running means beside each weight, and each of the four takes 4 bytes.",
            lambda p, o: 4 * p,
        ),
        Misconception(
            "one number a parameter short",
            "That is one number a parameter short. A weight, its gradient, and AdamW's *two* running means, of the "
            "gradient and of its square. (The 12 P of the formula is what is there at the peak, before any gradient.)",
            lambda p, o: 12 * p if o == "adamw" else 4 * p,
        ),
        Misconception(
            "states for plain SGD",
            "Plain SGD keeps nothing between steps: only weights and gradients are there.",
            lambda p, o: 16 * p,
        ),
        Misconception(
            "momentum for plain SGD",
            "Right for AdamW. For SGD that is one number a parameter too many: it would be a momentum, and this SGD "
            "has none.",
            lambda p, o: 16 * p if o == "adamw" else 12 * p,
        ),
        Misconception(
            "two numbers of four",
            "Eight times P for AdamW is half of it: weights and gradients alone, or the two running means alone. All "
            "four are there. (The string to compare with is 'adamw', in small letters.)",
            lambda p, o: 8 * p,
        ),
    ),
    hints=(
        "Count the numbers that are kept for each parameter, then their bytes.",
        "Weights 1, gradients 1, AdamW's two running means 2, plain SGD 0; 4 bytes each.",
        "One product of three: parameters, numbers for each, bytes of a number. Only the middle one asks the "
        "optimizer.",
    ),
)


def _attention_sizes(rng: np.random.Generator) -> Inputs:
    return {
        "batch_size": int(rng.choice([24, 56, 72])),
        "tokens": int(rng.choice([33, 65, 129, 257])),
        "heads": int(rng.choice([3, 5, 6])),
        "layers": int(rng.choice([2, 7, 11])),
    }


def _attention(batch: int, tokens: int, heads: int, layers: int) -> int:
    weights = np.broadcast_to(np.float32(0), (layers, batch, heads, tokens, tokens))
    return weights.size * weights.itemsize


attention_bytes = Exercise(
    chapter=2,
    name="attention_bytes",
    spec="bytes of the float32 attention weights of all layers: every head holds T x T for every text (an int).",
    line_budget=1,
    oracle=_attention,
    makers=(_attention_sizes,),
    whole=True,
    rtol=0,
    atol=0,
    misconceptions=(
        Misconception(
            "half of the pairs",
            "It looks as if each pair of tokens is counted once (a triangle): every token looks at every token, itself "
            "included.",
            lambda b, t, h, n: 2 * b * t * (t + 1) * h * n,
        ),
        Misconception(
            "each pair of tokens once",
            "It looks as if each pair of different tokens is counted once: every token looks at every token.",
            lambda b, t, h, n: 2 * b * t * (t - 1) * h * n,
        ),
        Misconception(
            "a token does not see itself",
            "It looks as if a token does not look at itself: it does.",
            lambda b, t, h, n: 4 * b * t * (t - 1) * h * n,
        ),
        Misconception(
            "heads and layers added",
            "Every layer has all its heads: multiply them.",
            lambda b, t, h, n: 4 * b * t * t * (h + n),
        ),
        Misconception(
            "twice the tokens",
            "That is twice the tokens: every token against every token is their square.",
            lambda b, t, h, n: 8 * b * t * h * n,
        ),
        Misconception(
            "heads squared",
            "The heads do not look at each other: they count once.",
            lambda b, t, h, n: 4 * b * t * t * h * h * n,
        ),
        Misconception(
            "linear in the tokens",
            "It looks as if each token had one weight. Every token looks at every token: T x T.",
            lambda b, t, h, n: 4 * b * t * h * n,
        ),
        Misconception(
            "one head",
            "It looks as if there was one head: every head has weights of its own.",
            lambda b, t, h, n: 4 * b * t * t * n,
        ),
        Misconception(
            "one layer",
            "That is one layer. The backward needs those of all layers, so all are kept.",
            lambda b, t, h, n: 4 * b * t * t * h,
        ),
        Misconception(
            "texts look at each other",
            "It looks as if B was squared. Texts meet in the loss alone, never inside the encoder.",
            lambda b, t, h, n: 4 * b * b * t * t * h * n,
        ),
        Misconception(
            "numbers and not bytes",
            "That counts numbers: a float32 takes 4 bytes.",
            lambda b, t, h, n: b * t * t * h * n,
        ),
        Misconception(
            "one text",
            "That is one text. Every text of the batch has weights of its own.",
            lambda b, t, h, n: 4 * t * t * h * n,
        ),
        Misconception(
            "both towers, or float64",
            "Twice too many. It looks as if batch_size counted pairs (here it counts texts), or as if a float32 took 8 "
            "bytes (it takes 4).",
            lambda b, t, h, n: 8 * b * t * t * h * n,
        ),
        Misconception(
            "dropout's tensors too",
            "Three times too many. Dropout's mask and its result are remembered too, and have the same shape, but only "
            "the weights are asked for.",
            lambda b, t, h, n: 12 * b * t * t * h * n,
        ),
    ),
    hints=(
        "What is the shape of one layer's attention weights?",
        "(batch_size, heads, tokens, tokens) in each layer, 4 bytes a number.",
        "Multiply that shape's sides, the layers and the bytes of a number. Which side stands there twice?",
    ),
)


def _two_peaks(rng: np.random.Generator) -> Inputs:
    """Two peaks on one line, in any order, of a step with AdamW; the third batch may lie anywhere."""
    parameters, per_row = int(rng.integers(1_000, 900_000)), int(rng.integers(50_000, 9_000_000))
    first, second = (int(b) for b in rng.choice([8, 16, 32, 48, 65], 2, replace=False))
    fixed = 12 * parameters + int(rng.integers(1_000, 300_000))
    return {
        "batches": (first, second),
        "peaks": (fixed + per_row * first, fixed + per_row * second),
        "batch_size": int(rng.choice([7, 20, 100, 512, 1000])),
        "parameters": parameters,
    }


def _a_fraction_a_row(rng: np.random.Generator) -> Inputs:
    """Peaks whose line rises by no whole number of bytes a row, and a batch far away."""
    inputs = _two_peaks(rng) | {"batch_size": int(rng.choice([512, 1000]))}
    (first, second), (low, high) = inputs["batches"], inputs["peaks"]
    return inputs | {"peaks": (low, high + int(rng.integers(1, abs(second - first))))}


def _slope(batches: tuple[int, int], peaks: tuple[int, int]) -> float:
    return (peaks[1] - peaks[0]) / (batches[1] - batches[0])


def _on_the_line(batches: tuple[int, int], peaks: tuple[int, int], batch_size: int) -> float:
    """The two-point form with fractions, rounded once."""
    (first, second), (low, high) = batches, peaks
    return float(Fraction(low * (second - batch_size) + high * (batch_size - first), second - first))


def _off_the_line(change: Callable[[int], int]) -> Callable:
    """The right line with another number of bytes than the 8 P of AdamW's states."""
    return lambda batches, peaks, batch_size, parameters: _on_the_line(batches, peaks, batch_size) + change(parameters)


def _less_states(line: Callable) -> Callable:
    """Another line than the right one, and AdamW's states rightly taken off."""
    return lambda batches, peaks, batch_size, parameters: line(batches, peaks, batch_size) - 8 * parameters


def _with_and_without_states(name: str, message: str, line: Callable, *, right: str = "") -> list[Misconception]:
    """Two: the line less the states, and the line alone. right: where the first of them is right, in words."""
    kept = f"{message} (And AdamW's states are still in it.)"
    return [
        Misconception(name, f"{right}{message}", _less_states(line)),
        Misconception(
            f"{name}, AdamW's states kept", kept, lambda batches, peaks, n, parameters: line(batches, peaks, n)
        ),
    ]


predict_peak = Exercise(
    chapter=2,
    name="predict_peak",
    spec="the peak in bytes at `batch_size` with plain SGD, from two peaks with AdamW at two other batches; a float32 "
    "model with this many parameters.",
    line_budget=3,
    oracle=lambda batches, peaks, batch_size, parameters: _on_the_line(batches, peaks, batch_size) - 8 * parameters,
    makers=(_two_peaks, _a_fraction_a_row),
    misconceptions=(
        Misconception(
            "AdamW's states kept",
            "That is the peak with AdamW. Plain SGD keeps no states: what do AdamW's two means take?",
            _off_the_line(lambda p: 0),
        ),
        *(
            Misconception(
                "other bytes for the states",
                f"The line is right, but it looks as if {what} was taken off it: AdamW keeps two float32 numbers for "
                "each parameter, 8 bytes, and SGD none. Weights stay, and gradients were not there at the peak.",
                _off_the_line(lambda p, change=change: change * p),
            )
            for change, what in ((-4, "4 P"), (-12, "12 P"), (-16, "16 P"), (-2, "2 P"), (-32, "32 P"), (-1, "P"))
        ),
        Misconception(
            "states added",
            "The states were added: plain SGD keeps none, so they are taken off.",
            _off_the_line(lambda p: 8 * p),
        ),
        Misconception(
            "states for every row",
            "It looks as if the states were taken off for every row: they are there once.",
            lambda b, p, n, parameters: _on_the_line(b, p, n) - 8 * parameters * n,
        ),
        *_with_and_without_states(
            "proportional to the batch",
            "It looks as if the peak was proportional to the batch: what is there at any batch does not grow.",
            lambda b, p, n: p[0] / b[0] * n,
        ),
        *_with_and_without_states(
            "proportional to the batch, from the second",
            "It looks as if the peak was proportional to the batch: what is there at any batch does not grow.",
            lambda b, p, n: p[1] / b[1] * n,
        ),
        Misconception(
            "intercept dropped",
            "Those are the rows alone: what is there at any batch, with plain SGD too, is missing.",
            lambda b, p, n, parameters: _slope(b, p) * n,
        ),
        Misconception(
            "intercept dropped, AdamW's states taken off",
            "AdamW's states are taken off the rows alone, in which they are not: what is there at any batch, the "
            "states among it, is missing.",
            _less_states(lambda b, p, n: _slope(b, p) * n),
        ),
        *_with_and_without_states(
            "the whole batch added to the first peak",
            "It looks as if all rows were added to the first peak, which holds its own rows already.",
            lambda b, p, n: p[0] + _slope(b, p) * n,
        ),
        *_with_and_without_states(
            "the whole batch added to the second peak",
            "It looks as if all rows were added to the second peak, which holds its own rows already.",
            lambda b, p, n: p[1] + _slope(b, p) * n,
        ),
        *_with_and_without_states(
            "first peak, second batch",
            "It looks as if the walk began at one point's peak with the other point's batch.",
            lambda b, p, n: p[0] + _slope(b, p) * (n - b[1]),
        ),
        *_with_and_without_states(
            "second peak, first batch",
            "It looks as if the walk began at one point's peak with the other point's batch.",
            lambda b, p, n: p[1] + _slope(b, p) * (n - b[0]),
        ),
        *_with_and_without_states(
            "slope upside down",
            "The line stays at the first peak, or hardly leaves it: the walk from its batch to `batch_size` is "
            "missing, or batches were divided by peaks on the way (bytes a row are bytes over rows).",
            lambda b, p, n: p[0] + (n - b[0]) / _slope(b, p),
        ),
        *_with_and_without_states(
            "downhill",
            "It looks as if the line falls: a larger batch takes more.",
            lambda b, p, n: p[0] - _slope(b, p) * (n - b[0]),
        ),
        *_with_and_without_states(
            "smaller peak, first batch",
            "It looks as if the batches were taken to come in ascending order: they may come in any.",
            lambda b, p, n: min(p) + abs(_slope(b, p)) * (n - b[0]),
        ),
        *_with_and_without_states(
            "the mean of the two",
            "That is the mean of the two peaks: walk along their line to the third batch.",
            lambda b, p, n: sum(p) / 2,
        ),
        *_with_and_without_states(
            "never beyond the two",
            "It looks as if the line ends at the two points (np.interp does that): it goes on.",
            lambda b, p, n: float(np.interp(n, sorted(b), sorted(p))),
        ),
        *_with_and_without_states(
            "slope cut to a whole number",
            "It looks as if // cut the slope: where a row takes no whole number of bytes, that adds up over many rows.",
            lambda b, p, n: p[0] + (p[1] - p[0]) // (b[1] - b[0]) * (n - b[0]),
            right="Right where a row takes a whole number of bytes. ",
        ),
        *_with_and_without_states(
            "slope cut to a whole number, from the second",
            "It looks as if // cut the slope: where a row takes no whole number of bytes, that adds up over many rows.",
            lambda b, p, n: p[1] + (p[1] - p[0]) // (b[1] - b[0]) * (n - b[1]),
            right="Right where a row takes a whole number of bytes. ",
        ),
    ),
    hints=(
        "Two points give a line: what does one row more cost? And what of the rest is there because of AdamW?",
        "Walk along the line from either point, (batch_size - batches[0]) rows at the slope; then take off what SGD "
        "does not keep.",
        "Exercise 1 says what each optimizer keeps for a parameter. Divide with /: a row need not take a "
        "whole number of bytes.",
    ),
    rtol=1e-9,
    atol=1.0,
)


def _card(rng: np.random.Generator, spare: tuple[float, float] = (0.01, 0.45)) -> Inputs:
    """A budget that leaves a part of a row unused, between these shares of it."""
    fixed, per_row = int(rng.integers(10_000, 90_000)), int(rng.integers(300, 900))
    rows = int(rng.choice([37, 53, 99, 131]))
    return {"fixed": fixed, "per_row": per_row, "budget": fixed + per_row * rows + int(per_row * rng.uniform(*spare))}


def _almost_one_more(rng: np.random.Generator) -> Inputs:
    return _card(rng, (0.55, 0.99))


def _exact_card(rng: np.random.Generator) -> Inputs:
    inputs = _card(rng)
    return inputs | {"budget": inputs["fixed"] + inputs["per_row"] * int(rng.choice([41, 77]))}


def _too_small(rng: np.random.Generator) -> Inputs:
    inputs = _card(rng)
    return inputs | {"budget": inputs["fixed"] - int(rng.integers(1_000, 9_000))}


def _wall(fixed: int, per_row: int, budget: int) -> int:
    rows = 0
    while fixed + per_row * (rows + 1) <= budget:
        rows += 1
    return rows


largest_batch_that_fits = Exercise(
    chapter=2,
    name="largest_batch_that_fits",
    spec="the largest batch with fixed + per_row * batch <= budget, all in bytes; 0 where not one row fits (an int).",
    line_budget=1,
    oracle=_wall,
    makers=(_card, _almost_one_more, _exact_card, _too_small),
    whole=True,
    misconceptions=(
        Misconception(
            "the model added",
            "It looks as if the fixed bytes are added to the budget: they are taken from it.",
            lambda f, r, b: (b + f) // r,
        ),
        Misconception(
            "one row less",
            "One row too few: what is left over is never taken off the rows that fit.",
            lambda f, r, b: max(0, (b - f) // r - 1),
        ),
        Misconception(
            "one row more",
            "One row too many.",
            lambda f, r, b: max(0, (b - f) // r + 1),
        ),
        Misconception(
            "distance instead of room",
            "Right where the model fits. Where it is larger than the card there is no room at all (abs makes "
            "room of it).",
            lambda f, r, b: abs(b - f) // r,
        ),
        Misconception(
            "model taken off the rows",
            "It looks as if bytes are taken off a number of rows: take the fixed bytes off the budget, then divide.",
            lambda f, r, b: b // r - f,
        ),
        Misconception(
            "0 throughout",
            "It comes to 0 on all of these inputs; so does whoever takes bytes off a number of rows and cuts what is "
            "below 0, or divides by both numbers. Take the fixed bytes off the budget first, then divide what is "
            "left by one row's.",
            lambda f, r, b: 0,
        ),
        Misconception(
            "the model forgotten",
            "It looks as if the whole card was there for the batch. Weights, gradients and optimizer are there first.",
            lambda f, r, b: b // r,
        ),
        Misconception(
            "the model brought by every row",
            "It looks as if every row brought the model along. It is there once: take it off first, then divide.",
            lambda f, r, b: b // (f + r),
        ),
        Misconception(
            "not rounded",
            "A batch is a whole number of rows, and a part of a row does not fit: // rounds down.",
            lambda f, r, b: (b - f) / r,
        ),
        Misconception(
            "rounded to the nearest",
            "Right where less than half a row is left over. It looks as if the rest was rounded up above that: a part "
            "of a row never fits.",
            lambda f, r, b: max(0, round((b - f) / r)),
        ),
        Misconception(
            "rounded up",
            "That is one row too many: a part of a row does not fit. Round down.",
            lambda f, r, b: max(0, -((f - b) // r)),
        ),
        Misconception(
            "below zero",
            "Where the model alone is larger than the card, no batch fits: the answer is 0, not below.",
            lambda f, r, b: (b - f) // r,
        ),
        Misconception(
            "below zero, cut",
            "Where the model alone is larger than the card, no batch fits: int() makes a whole number of it, but one "
            "below 0.",
            lambda f, r, b: int((b - f) / r),
        ),
        Misconception(
            "a row where none fits",
            "Where not even one row fits, the answer is 0.",
            lambda f, r, b: max(1, (b - f) // r),
        ),
        Misconception(
            "exact fit refused",
            "A batch that fills the card to the byte fits: it must be <=, not <.",
            lambda f, r, b: max(0, (b - f - 1) // r),
        ),
        Misconception(
            "powers of two only",
            "Any whole number will do, not only 1, 2, 4, 8, ...",
            lambda f, r, b: 2 ** ((b - f) // r).bit_length() // 2 if b >= f + r else 0,
        ),
    ),
    hints=(
        "First take off what is there at any batch.",
        "Divide what is left by one row's bytes, round down, and never go below 0.",
        "// rounds down below 0 as well, so a model that is too large comes out negative: what is the least "
        "that can be returned?",
    ),
)
