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

wrong("model_bytes", "?", "no gradients")(lambda P, o: P * (12 if o == "adamw" else 4))
wrong("model_bytes", "?", "no weights")(lambda P, o: P * (12 if o == "adamw" else 8 - 4))
wrong("model_bytes", "?", "weights only")(lambda P, o: 4 * P)
wrong("model_bytes", "?", "always 16")(lambda P, o: 16 * P)
wrong("model_bytes", "?", "always 8")(lambda P, o: 8 * P)
wrong("model_bytes", "?", "numbers")(lambda P, o: P * (4 if o == "adamw" else 2))
wrong("model_bytes", "?", "one mean")(lambda P, o: P * (12 if o == "adamw" else 8))
wrong("model_bytes", "?", "momentum")(lambda P, o: P * (16 if o == "adamw" else 12))
wrong("model_bytes", "?", "bits")(lambda P, o: P * (128 if o == "adamw" else 64))
wrong("model_bytes", "?", "half")(lambda P, o: P * (8 if o == "adamw" else 4))
wrong("model_bytes", "?", "states only")(lambda P, o: P * (8 if o == "adamw" else 0))
wrong("model_bytes", "?", "float")(lambda P, o: P * (16.0 if o == "adamw" else 8.0))
wrong("model_bytes", "?", "swapped")(lambda P, o: P * (8 if o == "adamw" else 16))
wrong("model_bytes", "?", "doubles")(lambda P, o: P * (32 if o == "adamw" else 16))
wrong("model_bytes", "?", "gradients twice")(lambda P, o: P * (20 if o == "adamw" else 12))
wrong("model_bytes", "?", "upper-case name")(lambda P, o: P * (16 if o == "AdamW" else 8))
wrong("model_bytes", "?", "float32 product")(lambda P, o: int(torch.tensor(float(P)) * (16 if o == "adamw" else 8)))

right("attention_bytes")(lambda B, T, h, L: 4 * B * T * T * h * L)
right("attention_bytes")(lambda B, T, h, L: B * T**2 * h * L * 32 // 8)
right("attention_bytes")(lambda B, T, h, L: math.prod([4, B, T, T, h, L]))
right("attention_bytes")(lambda B, T, h, L: sum(B * h * T * T * 4 for _ in range(L)))
right("attention_bytes")(lambda B, T, h, L: np.prod([4, B, T, T, h, L], dtype=np.int64))
right("attention_bytes")(lambda B, T, h, L: torch.empty(B, h, T, T, device="meta").numel() * 4 * L)

wrong("attention_bytes", "?", "T once")(lambda B, T, h, L: 4 * B * T * h * L)
wrong("attention_bytes", "?", "no layers")(lambda B, T, h, L: 4 * B * T * T * h)
wrong("attention_bytes", "?", "no heads")(lambda B, T, h, L: 4 * B * T * T * L)
wrong("attention_bytes", "?", "no batch")(lambda B, T, h, L: 4 * T * T * h * L)
wrong("attention_bytes", "?", "two towers")(lambda B, T, h, L: 8 * B * T * T * h * L)
wrong("attention_bytes", "?", "three times")(lambda B, T, h, L: 12 * B * T * T * h * L)
wrong("attention_bytes", "?", "numbers")(lambda B, T, h, L: B * T * T * h * L)
wrong("attention_bytes", "?", "batch squared")(lambda B, T, h, L: 4 * B * B * T * T * h * L)
wrong("attention_bytes", "?", "causal half")(lambda B, T, h, L: 2 * B * T * (T + 1) * h * L)
wrong("attention_bytes", "?", "half precision")(lambda B, T, h, L: 2 * B * T * T * h * L)
wrong("attention_bytes", "?", "bits")(lambda B, T, h, L: 32 * B * T * T * h * L)
wrong("attention_bytes", "?", "float")(lambda B, T, h, L: 4.0 * B * T * T * h * L)
wrong("attention_bytes", "?", "B tokens all together")(lambda B, T, h, L: 4 * (B * T) ** 2 * h * L)
wrong("attention_bytes", "?", "layers + heads")(lambda B, T, h, L: 4 * B * T * T * (h + L))
wrong("attention_bytes", "?", "pairs of tokens")(lambda B, T, h, L: 4 * B * h * L * T * (T - 1) // 2)
wrong("attention_bytes", "?", "without the diagonal")(lambda B, T, h, L: 4 * B * h * L * T * (T - 1))
wrong("attention_bytes", "?", "2T for T squared")(lambda B, T, h, L: 4 * B * h * L * 2 * T)
wrong("attention_bytes", "?", "heads squared")(lambda B, T, h, L: 4 * B * h * h * L * T * T)


def line(batches, peaks, batch_size):
    (b0, b1), (p0, p1) = batches, peaks
    return p0 + (p1 - p0) * (batch_size - b0) / (b1 - b0)


right("predict_peak")(lambda b, p, n, P: line(b, p, n) - 8 * P)
wrong("predict_peak", "?", "slope cut")(lambda b, p, n, P: p[1] + (p[1] - p[0]) // (b[1] - b[0]) * (n - b[1]) - 8 * P)
right("predict_peak")(lambda b, p, n, P: int(line(b, p, n)) - 8 * P)
right("predict_peak")(lambda b, p, n, P: (p[0] * (b[1] - n) + p[1] * (n - b[0])) // (b[1] - b[0]) - 8 * P)
right("predict_peak")(lambda b, p, n, P: np.interp(0, [0], [0]) + line(b, p, n) - 8 * P)


@right("predict_peak")
def slope_and_intercept(batches, peaks, batch_size, parameters):
    a = (peaks[0] - peaks[1]) / (batches[0] - batches[1])
    fixed = peaks[0] - a * batches[0]
    return fixed - 8 * parameters + a * batch_size


wrong("predict_peak", "?", "still AdamW")(lambda b, p, n, P: line(b, p, n))
wrong("predict_peak", "?", "4 P off")(lambda b, p, n, P: line(b, p, n) - 4 * P)
wrong("predict_peak", "?", "12 P off")(lambda b, p, n, P: line(b, p, n) - 12 * P)
wrong("predict_peak", "?", "16 P off")(lambda b, p, n, P: line(b, p, n) - 16 * P)
wrong("predict_peak", "?", "2 P off")(lambda b, p, n, P: line(b, p, n) - 2 * P)
wrong("predict_peak", "?", "added")(lambda b, p, n, P: line(b, p, n) + 8 * P)
wrong("predict_peak", "?", "proportional")(lambda b, p, n, P: p[0] / b[0] * n - 8 * P)
wrong("predict_peak", "?", "proportional, from second")(lambda b, p, n, P: p[1] / b[1] * n - 8 * P)
wrong("predict_peak", "?", "intercept dropped")(lambda b, p, n, P: (p[1] - p[0]) / (b[1] - b[0]) * n)
wrong("predict_peak", "?", "intercept dropped, 8P")(lambda b, p, n, P: (p[1] - p[0]) / (b[1] - b[0]) * n - 8 * P)
wrong("predict_peak", "?", "first point's peak at 0")(
    lambda b, p, n, P: p[0] + (p[1] - p[0]) / (b[1] - b[0]) * n - 8 * P
)
wrong("predict_peak", "?", "slope upside down")(
    lambda b, p, n, P: p[0] + (b[1] - b[0]) / (p[1] - p[0]) * (n - b[0]) - 8 * P
)
wrong("predict_peak", "?", "points in the wrong order")(
    lambda b, p, n, P: p[0] + (p[1] - p[0]) / (b[1] - b[0]) * (n - b[1]) - 8 * P
)
wrong("predict_peak", "?", "sign of the slope")(
    lambda b, p, n, P: p[0] - (p[1] - p[0]) / (b[1] - b[0]) * (n - b[0]) - 8 * P
)
wrong("predict_peak", "?", "mean")(lambda b, p, n, P: sum(p) / 2 - 8 * P)
wrong("predict_peak", "?", "abs slope")(
    lambda b, p, n, P: min(p) + abs(p[1] - p[0]) / abs(b[1] - b[0]) * (n - b[0]) - 8 * P
)
wrong("predict_peak", "?", "np.interp")(
    lambda b, p, n, P: float(np.interp(n, *zip(*sorted(zip(b, p, strict=True)), strict=True))) - 8 * P
)
wrong("predict_peak", "?", "float32")(
    lambda b, p, n, P: line(torch.tensor(b).float(), torch.tensor(p).float(), n) - 8 * P
)
wrong("predict_peak", "?", "b[0] = 2 * b[1] assumed")(
    lambda b, p, n, P: p[0] + (p[1] - p[0]) * (n - b[0]) / b[0] - 8 * P
)
wrong("predict_peak", "?", "states per row")(lambda b, p, n, P: line(b, p, n) - 8 * P * n)
wrong("predict_peak", "?", "peak halved")(lambda b, p, n, P: line(b, p, n) / 2)

right("largest_batch_that_fits")(lambda f, a, m: max(0, (m - f) // a))
right("largest_batch_that_fits")(lambda f, a, m: (m - f) // a if m > f else 0)
right("largest_batch_that_fits")(lambda f, a, m: max((m - f) // a, 0))
right("largest_batch_that_fits")(lambda f, a, m: divmod(max(m - f, 0), a)[0])
right("largest_batch_that_fits")(lambda f, a, m: np.int64(max(0, m - f)) // a)
right("largest_batch_that_fits")(lambda f, a, m: len(range(f + a, m + 1, a)))

wrong("largest_batch_that_fits", "?", "negative")(lambda f, a, m: (m - f) // a)
wrong("largest_batch_that_fits", "?", "float")(lambda f, a, m: max(0.0, (m - f) / a))
wrong("largest_batch_that_fits", "?", "rounded")(lambda f, a, m: max(0, round((m - f) / a)))
wrong("largest_batch_that_fits", "?", "ceil")(lambda f, a, m: max(0, -((f - m) // a)))
wrong("largest_batch_that_fits", "?", "fixed forgotten")(lambda f, a, m: m // a)
wrong("largest_batch_that_fits", "?", "fixed added")(lambda f, a, m: (m + f) // a)
wrong("largest_batch_that_fits", "?", "strictly less")(lambda f, a, m: max(0, (m - f - 1) // a))
wrong("largest_batch_that_fits", "?", "one less")(lambda f, a, m: max(0, (m - f) // a - 1))
wrong("largest_batch_that_fits", "?", "int of division")(lambda f, a, m: int((m - f) / a))
right("largest_batch_that_fits")(lambda f, a, m: max(0, int((m - f) / a)))
wrong("largest_batch_that_fits", "?", "float floor")(lambda f, a, m: max(0, (m - f) // float(a)))
wrong("largest_batch_that_fits", "?", "at least 1")(lambda f, a, m: max(1, (m - f) // a))
wrong("largest_batch_that_fits", "?", "fixed per row")(lambda f, a, m: m // (f + a))
wrong("largest_batch_that_fits", "?", "power of two")(
    lambda f, a, m: 0 if m - f < a else 2 ** (((m - f) // a).bit_length() - 1)
)
wrong("largest_batch_that_fits", "?", "abs")(lambda f, a, m: abs(m - f) // a)
wrong("largest_batch_that_fits", "?", "fixed divided too")(lambda f, a, m: max(0, m // a - f))
wrong("largest_batch_that_fits", "?", "one more")(lambda f, a, m: max(0, (m - f) // a + 1))
wrong("largest_batch_that_fits", "?", "trunc, negative")(lambda f, a, m: math.trunc((m - f) / a))
