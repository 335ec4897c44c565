"""Chapter 02's exercises, answered as readers do."""

import math

import numpy as np
import torch

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch02")

right("model_bytes")(lambda parameters, optimizer: parameters * (16 if optimizer == "adamw" else 8))
right("model_bytes")(lambda P, o: {"adamw": 16, "sgd": 8}[o] * P)
right("model_bytes")(lambda P, o: 4 * P * (2 + 2 * (o == "adamw")))
right("model_bytes")(lambda P, o: np.int64(8 * P + (8 * P if o == "adamw" else 0)))
right("model_bytes")(lambda P, o: P * 32 // 8 * (4 if o != "sgd" else 2))
right("model_bytes")(lambda P, o: torch.tensor(P * (16 if o == "adamw" else 8)))

wrong("model_bytes", "one number a parameter short", "no gradients")(lambda P, o: P * (12 if o == "adamw" else 4))
wrong("model_bytes", "one number a parameter short", "no weights")(lambda P, o: P * (12 if o == "adamw" else 8 - 4))
wrong("model_bytes", "weights alone, or numbers for bytes", "weights only")(lambda P, o: 4 * P)
wrong("model_bytes", "states for plain SGD", "always 16")(lambda P, o: 16 * P)
wrong("model_bytes", "two numbers of four", "always 8")(lambda P, o: 8 * P)
wrong("model_bytes", None, "numbers")(lambda P, o: P * (4 if o == "adamw" else 2))
wrong("model_bytes", None, "one mean")(lambda P, o: P * (12 if o == "adamw" else 8))
wrong("model_bytes", "momentum for plain SGD", "momentum")(lambda P, o: P * (16 if o == "adamw" else 12))
wrong("model_bytes", None, "bits")(lambda P, o: P * (128 if o == "adamw" else 64))
wrong("model_bytes", "half of it", "half")(lambda P, o: P * (8 if o == "adamw" else 4))
wrong("model_bytes", "states only", "states only")(lambda P, o: P * (8 if o == "adamw" else 0))
wrong("model_bytes", "a float for an int", "float")(lambda P, o: P * (16.0 if o == "adamw" else 8.0))
wrong("model_bytes", "optimizers swapped", "swapped")(lambda P, o: P * (8 if o == "adamw" else 16))
wrong("model_bytes", None, "doubles")(lambda P, o: P * (32 if o == "adamw" else 16))
wrong("model_bytes", "five numbers", "gradients twice")(lambda P, o: P * (20 if o == "adamw" else 12))
wrong("model_bytes", "two numbers of four", "upper-case name")(lambda P, o: P * (16 if o == "AdamW" else 8))
wrong("model_bytes", "computed in float32", "float32 product")(
    lambda P, o: int(torch.tensor(float(P)) * (16 if o == "adamw" else 8))
)

right("attention_bytes")(lambda B, T, h, L: 4 * B * T * T * h * L)
right("attention_bytes")(lambda B, T, h, L: B * T**2 * h * L * 32 // 8)
right("attention_bytes")(lambda B, T, h, L: math.prod([4, B, T, T, h, L]))
right("attention_bytes")(lambda B, T, h, L: sum(B * h * T * T * 4 for _ in range(L)))
right("attention_bytes")(lambda B, T, h, L: np.prod([4, B, T, T, h, L], dtype=np.int64))
right("attention_bytes")(lambda B, T, h, L: torch.empty(B, h, T, T, device="meta").numel() * 4 * L)

wrong("attention_bytes", "linear in the tokens", "T once")(lambda B, T, h, L: 4 * B * T * h * L)
wrong("attention_bytes", "one layer", "no layers")(lambda B, T, h, L: 4 * B * T * T * h)
wrong("attention_bytes", "one head", "no heads")(lambda B, T, h, L: 4 * B * T * T * L)
wrong("attention_bytes", "one text", "no batch")(lambda B, T, h, L: 4 * T * T * h * L)
wrong("attention_bytes", "both towers, or float64", "two towers")(lambda B, T, h, L: 8 * B * T * T * h * L)
wrong("attention_bytes", "dropout's tensors too", "three times")(lambda B, T, h, L: 12 * B * T * T * h * L)
wrong("attention_bytes", "numbers and not bytes", "numbers")(lambda B, T, h, L: B * T * T * h * L)
wrong("attention_bytes", "texts look at each other", "batch squared")(lambda B, T, h, L: 4 * B * B * T * T * h * L)
wrong("attention_bytes", "half of the pairs", "causal half")(lambda B, T, h, L: 2 * B * T * (T + 1) * h * L)
wrong("attention_bytes", None, "half precision")(lambda B, T, h, L: 2 * B * T * T * h * L)
wrong("attention_bytes", None, "bits")(lambda B, T, h, L: 32 * B * T * T * h * L)
wrong("attention_bytes", "a float for an int", "float")(lambda B, T, h, L: 4.0 * B * T * T * h * L)
wrong("attention_bytes", "texts look at each other", "B tokens all together")(
    lambda B, T, h, L: 4 * (B * T) ** 2 * h * L
)
wrong("attention_bytes", "heads and layers added", "layers + heads")(lambda B, T, h, L: 4 * B * T * T * (h + L))
wrong("attention_bytes", "each pair of tokens once", "pairs of tokens")(
    lambda B, T, h, L: 4 * B * h * L * T * (T - 1) // 2
)
wrong("attention_bytes", "a token does not see itself", "without the diagonal")(
    lambda B, T, h, L: 4 * B * h * L * T * (T - 1)
)
wrong("attention_bytes", "twice the tokens", "2T for T squared")(lambda B, T, h, L: 4 * B * h * L * 2 * T)
wrong("attention_bytes", "heads squared", "heads squared")(lambda B, T, h, L: 4 * B * h * h * L * T * T)


def line(batches, peaks, batch_size):
    (b0, b1), (p0, p1) = batches, peaks
    return p0 + (p1 - p0) * (batch_size - b0) / (b1 - b0)


right("predict_peak")(lambda b, p, n, P: line(b, p, n) - 8 * P)
wrong("predict_peak", "slope upside down", "no walk")(lambda b, p, n, P: p[0] - 8 * P)
wrong("predict_peak", "slope cut to a whole number, AdamW's states kept", "slope cut, states kept")(
    lambda b, p, n, P: p[0] + (p[1] - p[0]) // (b[1] - b[0]) * (n - b[0])
)
wrong("predict_peak", "slope cut to a whole number, from the second", "slope cut")(
    lambda b, p, n, P: p[1] + (p[1] - p[0]) // (b[1] - b[0]) * (n - b[1]) - 8 * P
)
right("predict_peak")(lambda b, p, n, P: int(line(b, p, n)) - 8 * P)
right("predict_peak")(lambda b, p, n, P: (p[0] * (b[1] - n) + p[1] * (n - b[0])) // (b[1] - b[0]) - 8 * P)
right("predict_peak")(lambda b, p, n, P: np.interp(0, [0], [0]) + line(b, p, n) - 8 * P)


@right("predict_peak")
def slope_and_intercept(batches, peaks, batch_size, parameters):
    a = (peaks[0] - peaks[1]) / (batches[0] - batches[1])
    fixed = peaks[0] - a * batches[0]
    return fixed - 8 * parameters + a * batch_size


wrong("predict_peak", "AdamW's states kept", "still AdamW")(lambda b, p, n, P: line(b, p, n))
wrong("predict_peak", "other bytes for the states", "4 P off")(lambda b, p, n, P: line(b, p, n) - 4 * P)
wrong("predict_peak", "other bytes for the states", "12 P off")(lambda b, p, n, P: line(b, p, n) - 12 * P)
wrong("predict_peak", "other bytes for the states", "16 P off")(lambda b, p, n, P: line(b, p, n) - 16 * P)
wrong("predict_peak", "other bytes for the states", "2 P off")(lambda b, p, n, P: line(b, p, n) - 2 * P)
wrong("predict_peak", "states added", "added")(lambda b, p, n, P: line(b, p, n) + 8 * P)
wrong("predict_peak", "proportional to the batch", "proportional")(lambda b, p, n, P: p[0] / b[0] * n - 8 * P)
wrong("predict_peak", "proportional to the batch, from the second", "proportional, from second")(
    lambda b, p, n, P: p[1] / b[1] * n - 8 * P
)
wrong("predict_peak", "intercept dropped", "intercept dropped")(lambda b, p, n, P: (p[1] - p[0]) / (b[1] - b[0]) * n)
wrong("predict_peak", "intercept dropped, AdamW's states taken off", "rows less states")(
    lambda b, p, n, P: (p[1] - p[0]) / (b[1] - b[0]) * n - 8 * P
)
wrong("predict_peak", "the whole batch added to the first peak", "first point's peak at 0")(
    lambda b, p, n, P: p[0] + (p[1] - p[0]) / (b[1] - b[0]) * n - 8 * P
)
wrong("predict_peak", "slope upside down", "slope upside down")(
    lambda b, p, n, P: p[0] + (b[1] - b[0]) / (p[1] - p[0]) * (n - b[0]) - 8 * P
)
wrong("predict_peak", "first peak, second batch", "points in the wrong order")(
    lambda b, p, n, P: p[0] + (p[1] - p[0]) / (b[1] - b[0]) * (n - b[1]) - 8 * P
)
wrong("predict_peak", "downhill", "sign of the slope")(
    lambda b, p, n, P: p[0] - (p[1] - p[0]) / (b[1] - b[0]) * (n - b[0]) - 8 * P
)
wrong("predict_peak", "the mean of the two", "mean")(lambda b, p, n, P: sum(p) / 2 - 8 * P)
wrong("predict_peak", "smaller peak, first batch", "abs slope")(
    lambda b, p, n, P: min(p) + abs(p[1] - p[0]) / abs(b[1] - b[0]) * (n - b[0]) - 8 * P
)
wrong("predict_peak", "never beyond the two", "np.interp")(
    lambda b, p, n, P: float(np.interp(n, *zip(*sorted(zip(b, p, strict=True)), strict=True))) - 8 * P
)
wrong("predict_peak", None, "float32")(
    lambda b, p, n, P: line(torch.tensor(b).float(), torch.tensor(p).float(), n) - 8 * P
)
wrong("predict_peak", None, "b[0] = 2 * b[1] assumed")(
    lambda b, p, n, P: p[0] + (p[1] - p[0]) * (n - b[0]) / b[0] - 8 * P
)
wrong("predict_peak", "states for every row", "states per row")(lambda b, p, n, P: line(b, p, n) - 8 * P * n)
wrong("predict_peak", None, "peak halved")(lambda b, p, n, P: line(b, p, n) / 2)

right("largest_batch_that_fits")(lambda f, a, m: max(0, (m - f) // a))
right("largest_batch_that_fits")(lambda f, a, m: (m - f) // a if m > f else 0)
right("largest_batch_that_fits")(lambda f, a, m: max((m - f) // a, 0))
right("largest_batch_that_fits")(lambda f, a, m: divmod(max(m - f, 0), a)[0])
right("largest_batch_that_fits")(lambda f, a, m: np.int64(max(0, m - f)) // a)
right("largest_batch_that_fits")(lambda f, a, m: len(range(f + a, m + 1, a)))

wrong("largest_batch_that_fits", "below zero", "negative")(lambda f, a, m: (m - f) // a)
wrong("largest_batch_that_fits", None, "float")(lambda f, a, m: max(0.0, (m - f) / a))
wrong("largest_batch_that_fits", "rounded to the nearest", "rounded")(lambda f, a, m: max(0, round((m - f) / a)))
wrong("largest_batch_that_fits", "rounded up", "ceil")(lambda f, a, m: max(0, -((f - m) // a)))
wrong("largest_batch_that_fits", "the model forgotten", "fixed forgotten")(lambda f, a, m: m // a)
wrong("largest_batch_that_fits", "the model added", "fixed added")(lambda f, a, m: (m + f) // a)
wrong("largest_batch_that_fits", "exact fit refused", "strictly less")(lambda f, a, m: max(0, (m - f - 1) // a))
wrong("largest_batch_that_fits", "one row less", "one less")(lambda f, a, m: max(0, (m - f) // a - 1))
wrong("largest_batch_that_fits", "below zero, cut", "int of division")(lambda f, a, m: int((m - f) / a))
right("largest_batch_that_fits")(lambda f, a, m: max(0, int((m - f) / a)))
wrong("largest_batch_that_fits", "a float for an int", "float floor")(lambda f, a, m: max(0, (m - f) // float(a)))
wrong("largest_batch_that_fits", "a row where none fits", "at least 1")(lambda f, a, m: max(1, (m - f) // a))
wrong("largest_batch_that_fits", "the model brought by every row", "fixed per row")(lambda f, a, m: m // (f + a))
wrong("largest_batch_that_fits", "powers of two only", "power of two")(
    lambda f, a, m: 0 if m - f < a else 2 ** (((m - f) // a).bit_length() - 1)
)
wrong("largest_batch_that_fits", "distance instead of room", "abs")(lambda f, a, m: abs(m - f) // a)
wrong("largest_batch_that_fits", "model taken off the rows", "fixed divided too")(lambda f, a, m: m // a - f)
wrong("largest_batch_that_fits", "0 throughout", "fixed divided too, from 0")(lambda f, a, m: max(0, m // a - f))
wrong("largest_batch_that_fits", "0 throughout", "both divide")(lambda f, a, m: m // (f * a))
wrong("largest_batch_that_fits", "one row more", "one more")(lambda f, a, m: max(0, (m - f) // a + 1))
wrong("largest_batch_that_fits", "below zero, cut", "trunc, negative")(lambda f, a, m: math.trunc((m - f) / a))
