"""The contrastive loss one tile of logits at a time: its value and its gradients without the B x N matrix.

Cheng et al. 2024 (arXiv 2410.17243) write the loss as a positive term and a log-sum-exp (equations 1-2), merge the
log-sum-exps of tiles (equations 3-5), and compute each tile again in the backward pass, where the stored
log-sum-exps are all that a softmax needs (equations 6-8). Here one walk over the tiles serves the rows and, if
symmetric, the columns too, so a symmetric loss costs 2 B N D FLOPs forward and 6 B N D backward.

Passage j = i * (1 + K) + slot belongs to query i. Taken slot by slot, the logits are 1 + K square matrices (B, B);
the positives are the diagonal of slot 0, and slot 0 alone has a second direction.

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, D dimensions; R x C the sides of a tile.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gclib.losses.tiles import Gradients, Logits, LogSumExp, Softmax, add_gradients, merge_logits
from gclib.support.validation import check_mask, check_representations, check_temperature, positive_int

CACHE_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE_BYTES = 16 * 2**20  # where the system doesn't tell
SMALLEST_TILE, LARGEST_TILE = 128, 4096
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def tiled_contrastive_loss(
    query_reps: Tensor,
    passage_reps: Tensor,
    *,
    temperature: float | Tensor,
    symmetric: bool = False,
    mask: Tensor | None = None,
    tile_size: int | str,
) -> Tensor:
    """`contrastive_loss`, value and gradients, computed in tiles of at most tile_size x tile_size logits.

    query_reps (B, D); passage_reps (N, D) with N = B * (1 + K), the positive of query i in row i * (1 + K); mask
    (B, N) bool, True = left out of the denominator; temperature a number or a tensor of one element, which gets its
    gradient. Any strides. No size has to divide another. tile_size: "auto" takes what the processor's cache holds, and
    4,096 on a GPU (`auto_tile_size`).

    Allocates tiles (one; one more if symmetric, and in backward one more for a learnable temperature), some vectors
    of B numbers, log2(N / tile_size) blocks (tile_size, D) and the gradients. Never allocated: the B x N logits,
    probabilities or their gradient. Logits of positives and log-sum-exps of the others stay apart, so that an easy
    positive's small loss keeps the digits that the dense loss rounds away. Probabilities under exp(-60) of a
    direction's largest (float64: exp(-600)) count as 0.

    bfloat16 and float16 are read as they are and every product, sum and exponential is float32 (the passages' gradient
    has one float32 copy); the loss is then float32. Ambient autocast is switched off inside: representations keep
    the dtype they come in, where the dense loss would round the logits to autocast's. Reads no tensor's value, so it
    runs under fake tensors and never waits for a GPU.

    A positive may not be left out: the loss is then infinite, as in the dense form. Raises ValueError as
    `contrastive_loss` does, and for a tile_size that is neither a positive int nor "auto"; RuntimeError where a second
    derivative is asked for (create_graph=True), which the closed-form backward does not have.
    Source: Cheng et al. 2024, equations (1)-(8).
    """
    check_representations(query_reps, passage_reps)
    check_temperature(temperature)
    check_mask(mask, query_reps.shape[0], passage_reps.shape[0], query_reps.device)
    group = passage_reps.shape[0] // query_reps.shape[0]
    return _TiledLoss.apply(
        query_reps, passage_reps, temperature, mask, symmetric, tile_side(tile_size, query_reps), 0, group
    )


def tiled_rows_loss(
    query_reps: Tensor,
    passage_reps: Tensor,
    *,
    temperature: float | Tensor,
    tile_size: int | str,
    first: int,
    group: int,
) -> Tensor:
    """The tiled loss of b of a batch's queries, averaged over these b: what one process of several computes.

    query_reps (b, D); passage_reps (N, D), those of the whole batch, `group` = 1 + K for each query; `first`: the place
    of these queries in the batch, so that the positive of query i is passage (first + i) * group. One direction.
    """
    side = tile_side(tile_size, query_reps)
    return _TiledLoss.apply(query_reps, passage_reps, temperature, None, False, side, first, group)


def tile_side(tile_size: int | str, reps: Tensor) -> int:
    """`tile_size` as an int: itself, or for "auto" what the processor's cache holds, and the largest on a GPU."""
    if tile_size == "auto":
        return LARGEST_TILE if reps.is_cuda else auto_tile_size(reps.shape[1], dtype=reps.dtype)
    return check_tile_size(tile_size)


def check_tile_size(tile_size: int | str) -> int | str:
    """A positive int or "auto"; ValueError otherwise."""
    return tile_size if tile_size == "auto" else positive_int("tile_size", tile_size)


def auto_tile_size(dimensions: int, *, dtype: torch.dtype = torch.float32, cache_bytes: int | None = None) -> int:
    """The largest power of two T whose tile works in half of the cache: 2 T^2 + 2 T D numbers.

    That is a tile of logits, one more for the second direction, and the two blocks of representations. Half, because
    the gradients pass through the cache too. From 128 (below, calls cost more than numbers) to 4,096. dtype: of the
    representations; half precision is accumulated in float32. cache_bytes: None for this machine's own.

    The rule is a processor's. On a GPU "auto" is LARGEST_TILE whatever its cache: each tile costs some dozens of calls
    there, and a side of 1,024, which its cache would hold, took six times as long at B = 8,192 on an H100
    (tests/benchmarks/results/tiled_cuda.csv).

    Source: the rule of Cheng et al. 2024, section 3.2 (tiles live in the memory next to the processor), for
    whole-matrix operations. Raises ValueError for dimensions or cache_bytes that are not positive ints.
    """
    D = positive_int("dimensions", dimensions)
    room = positive_int("cache_bytes", last_level_cache_bytes() if cache_bytes is None else cache_bytes)
    itemsize = torch.promote_types(dtype, torch.float32).itemsize
    side = SMALLEST_TILE
    while side < LARGEST_TILE and 2 * (2 * side) * (2 * side + D) * itemsize <= room // 2:
        side *= 2
    return side


@cache
def last_level_cache_bytes() -> int:
    """Bytes of the processor's largest cache; 16 MiB where the system doesn't tell."""
    return max((_cache_bytes(path) for path in CACHE_FOLDER.glob("index*/size")), default=UNKNOWN_CACHE_BYTES)


def _cache_bytes(path: Path) -> int:
    """Bytes of a text such as "36608K"; 0 where it can't be read."""
    try:
        text = path.read_text().strip()
        return int(text[:-1]) * UNITS[text[-1]] if text[-1:] in UNITS else int(text)
    except (OSError, ValueError, KeyError):
        return 0


class _TiledLoss(torch.autograd.Function):
    """Autograd's view of the two passes, which share the log-sum-exps and the positives' logits."""

    @staticmethod
    def forward(ctx, query_reps, passage_reps, temperature, mask, symmetric, side, first, group):
        ctx.settings = {"side": side, "first": first, "group": group}
        with torch.autocast(query_reps.device.type, enabled=False):
            logits = Logits(query_reps, passage_reps, temperature, mask=mask, **ctx.settings)
            positives = logits.new_empty(logits.rows)
            directions = [LogSumExp.empty(positives) for _ in range(2 if symmetric else 1)]
            merge_logits(logits, positives, directions)
            loss = torch.stack([others.losses(positives).mean() for others in directions]).mean()
        is_tensor = isinstance(temperature, Tensor)
        ctx.number = None if is_tensor else temperature
        sums = [part for others in directions for part in (others.maximum, others.total)]
        ctx.save_for_backward(query_reps, passage_reps, temperature if is_tensor else None, mask, positives, *sums)
        return loss

    @staticmethod
    def backward(ctx, gradient_of_loss):
        refuse_second_derivative("tiled_contrastive_loss")
        query_reps, passage_reps, temperature, mask, positives, *sums = ctx.saved_tensors
        directions = [LogSumExp(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]
        with torch.autocast(query_reps.device.type, enabled=False):
            temperature = ctx.number if temperature is None else temperature
            logits = Logits(query_reps, passage_reps, temperature, mask=mask, **ctx.settings)
            weight = gradient_of_loss / (len(directions) * logits.rows * temperature)
            gradients = _zeros(logits, ctx.needs_input_grad)
            add_gradients(logits, Softmax.of(positives, directions, weight), gradients)
        return *like_inputs(gradients, logits), *[None] * 5


def refuse_second_derivative(name: str) -> None:
    """RuntimeError in the backward pass of a closed form whose own gradient is asked for."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative, and create_graph=True asks for one: use "
            "contrastive_loss (or tile_size=None) where a gradient is differentiated again"
        )


def _zeros(logits: Logits, wanted: tuple[bool, ...]) -> Gradients:
    """Room for the wanted gradients. Each row of a query's is added to once, so its own dtype will do."""
    of_queries = torch.zeros_like(logits.query_reps, memory_format=torch.contiguous_format) if wanted[0] else None
    of_passages = logits.new_empty(*logits.passage_reps.shape).zero_() if wanted[1] else None
    return Gradients(of_queries, of_passages, logits.new_empty().zero_() if wanted[2] else None)


def like_inputs(gradients: Gradients, logits: Logits) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients in the dtypes, shapes and devices of queries, passages and temperature."""
    queries, passages, temperature = gradients.queries, gradients.passages, gradients.temperature
    if queries is not None:
        queries = queries.to(logits.query_reps.dtype)
    if passages is not None:
        passages = passages.to(logits.passage_reps.dtype)
    if temperature is not None:
        temperature = temperature.to(logits.temperature).reshape(logits.temperature.shape)
    return queries, passages, temperature
