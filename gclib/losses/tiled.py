"""The contrastive loss one tile of logits at a time: its value and its gradients without the B x N matrix.

Cheng et al. 2024 (arXiv 2410.17243) write the loss as a positive term and a log-sum-exp (equations 1-2), merge the
log-sum-exps of tiles (equations 3-5), and compute each tile again in the backward pass, where the stored
log-sum-exps are all that a softmax needs (equations 6-8). Here one walk over the tiles serves the rows and, if
symmetric, the columns too, so a symmetric loss costs 2 B N D FLOPs forward and 6 B N D backward.

Passage j = i * (1 + K) + slot belongs to query i. Taken slot by slot, the logits are 1 + K square matrices (B, B);
the positives are the diagonal of slot 0, and slot 0 alone has a second direction.

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, D dimensions; R x C the sides of a tile.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gclib.losses.directions import PQ, QP, TEXTS, Directions, Side
from gclib.losses.masks import Rule, as_rule
from gclib.losses.tiles import Gradients, Layout, Logits, LogSumExp, Softmax, add_gradients, merge_logits
from gclib.support.validation import check_representations, check_temperature, positive_int

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
    mask: Tensor | Rule | None = None,
    directions: Sequence[str] | None = None,
    partition: str = "joint",
    tile_size: int | str,
) -> Tensor:
    """`contrastive_loss`, value and gradients, computed in tiles of at most tile_size x tile_size logits.

    query_reps (B, D); passage_reps (N, D) with N = B * (1 + K), the positive of query i in row i * (1 + K); mask
    a rule (`gclib.losses.masks`), whose masks are made tile by tile, or a whole (B, N) bool, True = left out of the
    denominator; directions, partition as in `contrastive_loss`; temperature a number or a tensor of one element, which
    gets its gradient. Any strides. No size has to divide another. tile_size: "auto" takes what the processor's cache
    holds, and 4,096 on a GPU (`auto_tile_size`).

    Allocates tiles (one; one more if symmetric, and in backward one more for a learnable temperature), some vectors
    of B numbers, log2(N / tile_size) + 1 blocks (tile_size, D) and the gradients. Never allocated: the B x N logits,
    probabilities or their gradient. Logits of positives and log-sum-exps of the others stay apart, so that an easy
    positive's small loss keeps the digits that the dense loss rounds away. Probabilities up to exp(-59) of a
    direction's largest (float64: exp(-599)) have no gradient.

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
    rule = as_rule(mask, query_reps.shape[0], passage_reps.shape[0], query_reps.device)
    wanted = Directions.of(symmetric, directions, partition)
    group, side = passage_reps.shape[0] // query_reps.shape[0], tile_side(tile_size, query_reps)
    known = None if rule is None else Side.of(rule.queries, rule.passages, group)
    layout = Layout(wanted, side, group, 0, rule, known, known)
    return _TiledLoss.apply(query_reps, passage_reps, None, None, temperature, layout)


def tiled_rows_loss(
    query_reps: Tensor,
    passage_reps: Tensor,
    positives: Tensor | None,
    all_queries: Tensor | None,
    *,
    temperature: float | Tensor,
    layout: Layout,
) -> Tensor:
    """The tiled loss of b of a batch's queries, averaged over these b: what one process of several computes.

    query_reps (b, D), positives (b, D): this process's; passage_reps (N, D), all_queries (B, D): those of the whole
    batch; positives and all_queries None where no direction needs them. layout.first: the place of these queries in the
    batch, so that the positive of query i is passage (first + i) * group.
    """
    return _TiledLoss.apply(query_reps, passage_reps, positives, all_queries, temperature, layout)


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
    return max(map(_cache_bytes, CACHE_FOLDER.glob("index*/size")), default=0) or UNKNOWN_CACHE_BYTES


def _cache_bytes(path: Path) -> int:
    """Bytes of a text such as "36608K"; 0 where it can't be read."""
    try:
        text = path.read_text().strip()
        return int(text[:-1]) * UNITS[text[-1]] if text[-1:] in UNITS else int(text)
    except (OSError, ValueError, KeyError):
        return 0


class _TiledLoss(torch.autograd.Function):
    """Autograd's view of the two passes, which share the log-sum-exps and the positives' logits.

    Where positives and all_queries are None the rows are the batch, and one walk over the tiles of queries against
    passages serves the columns' sums too.
    """

    @staticmethod
    def forward(ctx, query_reps, passage_reps, positives, all_queries, temperature, layout):
        own, against = _sides(layout, query_reps, passage_reps, positives, all_queries)
        directions, ctx.layout = layout.directions, layout
        with torch.autocast(query_reps.device.type, enabled=False):
            first = layout.logits(QP, own, against, temperature)
            positive_logits = first.new_empty(first.rows)
            sums = [LogSumExp.empty(positive_logits) for _ in range(directions.apart)]
            for direction, places in _walks(directions, all_queries is None):
                logits = first if direction == QP else layout.logits(direction, own, against, temperature)
                merge_logits(logits, positive_logits, [sums[place] for place in places])
            losses = [others.losses(positive_logits, directions.copies).mean() for others in sums]
            loss = torch.stack(losses).mean()
        is_tensor = isinstance(temperature, Tensor)
        ctx.number = None if is_tensor else temperature
        parts = [part for others in sums for part in (others.maximum, others.total)]
        reps = query_reps, passage_reps, positives, all_queries
        ctx.save_for_backward(*reps, temperature if is_tensor else None, positive_logits, *parts)
        return loss

    @staticmethod
    def backward(ctx, gradient_of_loss):
        refuse_second_derivative("tiled_contrastive_loss")
        reps, (temperature, positive_logits, *parts) = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        sums = [LogSumExp(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
        layout, (own, against), is_whole = ctx.layout, _sides(ctx.layout, *reps), reps[3] is None
        with torch.autocast(reps[0].device.type, enabled=False):
            temperature = ctx.number if temperature is None else temperature
            logits = layout.logits(QP, own, against, temperature)
            weight = (gradient_of_loss / (len(sums) * logits.rows * temperature)).reshape(())
            walks = _walks(layout.directions, is_whole)
            gradients = _zeros(logits, reps, ctx.needs_input_grad, once=len(walks) == 1)
            of_own, of_against = _sides(layout, *gradients[:4])
            softmax = Softmax.of(positive_logits, sums, weight, layout.directions.copies)
            for direction, places in walks:
                rows, columns = TEXTS[direction]
                room = Gradients(getattr(of_own, rows), getattr(of_against, columns), gradients[4])
                add_gradients(layout.logits(direction, own, against, temperature), softmax.facing(*places), room)
        return *(like(rep, gradient) for rep, gradient in zip([*reps, temperature], gradients, strict=True)), None


def _walks(directions: Directions, is_whole: bool) -> list[tuple[str, tuple[int, ...]]]:
    """The directions whose tiles are walked, each with the places of its rows' (and columns') sums."""
    last, walks = directions.apart - 1, []
    for name in directions.names:
        if name != PQ:
            walks.append((name, (0, last) if name == QP and directions.both and is_whole else (0,)))
        elif not is_whole:
            walks.append((name, (last,)))
    return walks


def _sides(layout: Layout, queries: Any, passages: Any, positives: Any, all_queries: Any) -> tuple[Side, Side]:
    """Rows and columns: of representations, or of their gradients."""
    against = Side.of(queries if all_queries is None else all_queries, passages, layout.group)
    return Side(queries, against.positives if positives is None else positives, None), against


def refuse_second_derivative(name: str) -> None:
    """RuntimeError in the backward pass of a closed form whose own gradient is asked for."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative, and create_graph=True asks for one: use "
            "contrastive_loss (or tile_size=None) where a gradient is differentiated again"
        )


def _zeros(logits: Logits, reps: Sequence[Tensor | None], wanted: Sequence[bool], *, once: bool) -> list[Tensor | None]:
    """Room for the wanted gradients, the temperature's last. Where each row of a query's is added to `once`, its own
    dtype will do.
    """
    room = [logits.new_zeros(*rep.shape) if wanted[place] else None for place, rep in enumerate(reps[1:], 1)]
    own = reps[0] if once else logits.new_empty(0)
    of_queries = own.new_zeros(reps[0].shape) if wanted[0] else None
    return [of_queries, *room, logits.new_zeros() if wanted[4] else None]


def like(tensor: Any, gradient: Tensor | None) -> Tensor | None:
    """The gradient in the dtype, shape and device of what it is of."""
    return None if gradient is None else gradient.to(tensor).reshape(tensor.shape)
