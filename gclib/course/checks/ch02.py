"""Chapter 02's exercises: what the model takes, what attention remembers, a line through two peaks, the wall.

Letters: B texts, T tokens, P parameters. Bytes of float32 numbers, 4 each.
"""

import numpy as np

from .engine import Exercise, Misconception
from .judging import Inputs


def _model_with(rng: np.random.Generator, optimizer: str) -> Inputs:
    return {"parameters": int(rng.integers(1_000, 200_000_000)), "optimizer": optimizer}


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
    misconceptions=(
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
        'return 4 * parameters * {"adamw": 4, "sgd": 2}[optimizer]',
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
    misconceptions=(
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
        "return 4 * layers * batch_size * heads * tokens * tokens",
    ),
)


def _two_peaks(rng: np.random.Generator) -> Inputs:
    """Peaks of two batches on one line, and a third batch to predict."""
    fixed, per_row = int(rng.integers(1_000, 900_000)), int(rng.integers(50, 9_000))
    first, second = sorted(int(b) for b in rng.choice([8, 16, 32, 48, 64], 2, replace=False))
    return {
        "batches": (first, second),
        "peaks": (fixed + per_row * first, fixed + per_row * second),
        "batch_size": int(rng.choice([7, 100, 512, 1000])),
    }


def _a_fraction_a_row(rng: np.random.Generator) -> Inputs:
    """Peaks whose line rises by no whole number of bytes a row, and a batch far away."""
    inputs = _two_peaks(rng) | {"batch_size": int(rng.choice([512, 1000]))}
    (first, second), (low, high) = inputs["batches"], inputs["peaks"]
    return inputs | {"peaks": (low, high + int(rng.integers(1, second - first)))}


def _on_the_line(batches: tuple[int, int], peaks: tuple[int, int], batch_size: int) -> int:
    weight = np.linalg.solve(np.array([[1.0, batches[0]], [1.0, batches[1]]]), np.array(peaks, dtype=float))
    return round(weight[0] + weight[1] * batch_size)


predict_peak = Exercise(
    chapter=2,
    name="predict_peak",
    spec="peak of a naive step at batch_size, from its peaks at two batches: the peak is a line in the batch (bytes).",
    line_budget=2,
    oracle=_on_the_line,
    makers=(_two_peaks, _a_fraction_a_row),
    misconceptions=(
        Misconception(
            "through the origin",
            "It looks as if the peak was proportional to the batch. A part of it, the model, is there at any batch: a "
            "line does not have to go through 0.",
            lambda b, p, x: p[1] / b[1] * x,
        ),
        Misconception(
            "through the origin, from the smaller batch",
            "It looks as if the smaller batch's peak was scaled up: that scales the model along with the activations.",
            lambda b, p, x: p[0] / b[0] * x,
        ),
        Misconception(
            "slope alone",
            "That is what the batch adds. The part that does not depend on it is missing.",
            lambda b, p, x: (p[1] - p[0]) / (b[1] - b[0]) * x,
        ),
        Misconception(
            "started at the wrong point",
            "The slope is right. From which batch did you walk along the line, and from which peak?",
            lambda b, p, x: p[0] + (p[1] - p[0]) / (b[1] - b[0]) * x,
        ),
        Misconception(
            "the two points mixed up",
            "The slope is right, but the walk starts at one batch and at the other one's peak.",
            lambda b, p, x: p[1] + (p[1] - p[0]) / (b[1] - b[0]) * (x - b[0]),
        ),
        Misconception(
            "the two points mixed up, the other way round",
            "The slope is right, but the walk starts at the larger batch and at the smaller one's peak.",
            lambda b, p, x: p[0] + (p[1] - p[0]) / (b[1] - b[0]) * (x - b[1]),
        ),
        Misconception(
            "the whole batch added to the second peak",
            "The slope is right, but the second peak holds batches[1] rows already: count only those beyond it.",
            lambda b, p, x: p[1] + (p[1] - p[0]) / (b[1] - b[0]) * x,
        ),
        Misconception(
            "no further than the two batches",
            "Outside of the two batches that stays at the nearer peak, as np.interp does. The line goes on.",
            lambda b, p, x: float(np.interp(x, b, p)),
        ),
        Misconception(
            "slope cut to a whole number",
            "Right where a row takes a whole number of bytes. It looks as if // cut the slope: over many rows that "
            "adds up. Divide with /.",
            lambda b, p, x: p[0] + (p[1] - p[0]) // (b[1] - b[0]) * (x - b[0]),
        ),
        Misconception(
            "slope cut to a whole number, from the larger batch",
            "Right where a row takes a whole number of bytes. It looks as if // cut the slope, and then the line "
            "misses all batches but the one that it starts from. Divide with /.",
            lambda b, p, x: p[1] + (p[1] - p[0]) // (b[1] - b[0]) * (x - b[1]),
        ),
    ),
    hints=(
        "Two points give a line: what does one row more cost?",
        "The slope is (peaks[1] - peaks[0]) / (batches[1] - batches[0]); walk along it from either point.",
        "return peaks[0] + slope * (batch_size - batches[0])",
    ),
    rtol=1e-9,
    atol=0.5,
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
            lambda f, r, b: max(0, (b - f) / r),
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
        "return max(0, (budget - fixed) // per_row)",
    ),
)
