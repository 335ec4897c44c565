"""A deep distance between representations, and its own gradient cache.

Gao et al. 2021, section 5: where a network scores the pairs, d_ij = Phi(f(s_i), g(t_j)) (equation 10), its activations
for all B x N pairs outgrow memory even with the encoders' cached. So the distances are cached too:

1. representations without a graph, chunk by chunk, as in `grad_cache_step`;
2. distances without a graph, block by block, and from them the loss;
3. the distance gradient cache w_ij = dL/dd_ij: B x N numbers, no graph below them;
4. each block once more, with its graph and its first randomness: the surrogate sum_ij w_ij d_ij gives Phi's
   parameters their gradient (equation 11), and the representations theirs, u_i = sum_j w_ij dd_ij/df(s_i) and v_j
   likewise (equations 12-13);
5. the encoders' chunks once more, with u and v, as in `grad_cache_step`.

Steps 2 to 4 are one autograd function, for which w is simply the gradient that comes in; the rest is
`grad_cache_step`. Letters: B queries, N passages, D dimensions, C_q x C_p pairs in a block.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gclib.chunks import plan_chunks
from gclib.randomness import RandomState
from gclib.steps import OnPhase, grad_cache_step, silent
from gclib.support.modules import Autocast, refuse_batch_norm
from gclib.support.validation import describe, has_values, one_of, positive_int, refuse
from gclib.towers import as_tower_list
from gclib.verify import WHEN, check_again, check_hooks, learn, seen


def distance_cache_step(
    encoders: Sequence[Callable[..., Tensor]],
    distance: Callable[[Tensor, Tensor], Tensor],
    inputs: Sequence[Any],
    loss_fn: Callable[[Tensor], Tensor],
    *,
    chunk_size: int | Sequence[int],
    verify: str = "first",
    on_phase: OnPhase | None = None,
    scaler: Any = None,
) -> Tensor:
    """The gradient of loss_fn(distance(f(queries), g(passages))) in the memory of one chunk and one block of pairs.

    encoders, inputs: two towers, as in `grad_cache_step`. distance(query_reps (b, D), passage_reps (n, D)) -> (b, n),
    a module with its own parameters; entry (i, j) must depend on its own pair alone. loss_fn(distances (B, N)) ->
    scalar; its own parameters get their gradient once. chunk_size: rows encoded at once and the sides of a block, one
    int or (C_q, C_p); last ones may be short. Rows are encoded sorted by length, blocks are taken in the batch's order.

    Holds, beside one chunk's or one block's activations and the representations with their gradients: the distances and
    w, 2 B N numbers (B N more while `verify` looks), and what loss_fn keeps and needs (2 B N more for a cross entropy).
    Every pair is scored twice; dropout in the distance draws the same masks both times. on_phase hears of each block
    under "loss": the n blocks are chunks 0 to n-1 of 2n, their replays n to 2n-1. scaler and verify as in
    `grad_cache_step`: of the distance too, each block's second distances are held against its first.

    Adds to .grad, returns the detached, unscaled loss. Raises ValueError, before anything is computed, as
    `grad_cache_step` does, for anything but two towers, and for a distance whose BatchNorm takes statistics of its
    input; and where the distance returns anything but (b, n) numbers.
    Source: Gao et al. 2021, section 5, equations (10)-(13).
    """
    _check_distance(encoders, distance, loss_fn)
    if one_of("verify", verify, WHEN) != "never":
        check_hooks("distance", distance, "cpu", stacklevel=3)
    sizes = [positive_int("chunk_size", size) for size in as_tower_list("chunk_size", chunk_size, 2)]
    blocks = _Blocks(distance, sizes, on_phase or silent, verify)

    def loss_of_reps(query_reps: Tensor, passage_reps: Tensor) -> Tensor:
        return loss_fn(blocks(query_reps, passage_reps))

    options = {"verify": verify, "on_phase": on_phase, "scaler": scaler}
    return grad_cache_step(encoders, inputs, loss_of_reps, chunk_size=sizes, **options)


class _CachedDistance(torch.autograd.Function):
    """All distances, without a graph; backward evaluates the blocks again. Its incoming gradient is the cache w."""

    @staticmethod
    def forward(ctx, query_reps: Tensor, passage_reps: Tensor, blocks: "_Blocks") -> Tensor:
        ctx.blocks, ctx.autocast = blocks, Autocast.ambient(query_reps.device.type)
        ctx.state = RandomState.record([query_reps, passage_reps, *blocks.parameters()])
        ctx.save_for_backward(query_reps, passage_reps)
        distances = blocks.evaluate(query_reps, passage_reps)
        ctx.first = distances.clone() if blocks.is_new(distances) else None
        return distances

    @staticmethod
    def backward(ctx, cache: Tensor) -> tuple[Tensor, Tensor, None]:
        query_reps, passage_reps = ctx.saved_tensors
        with ctx.state.replay(), ctx.autocast.restored(), torch.enable_grad():
            return *ctx.blocks.replay(query_reps, passage_reps, cache, ctx.first), None


@dataclass(frozen=True)
class _Blocks:
    """The distance, taken in blocks of pairs, always in the same order: so one recorded state replays them all."""

    distance: Callable[[Tensor, Tensor], Tensor]
    sizes: Sequence[int]
    report: OnPhase
    verify: str

    def __call__(self, query_reps: Tensor, passage_reps: Tensor) -> Tensor:
        """All distances, with a gradient; callable, so that who looks for the loss's modules sees the distance."""
        return _CachedDistance.apply(query_reps, passage_reps, self)

    def is_new(self, distances: Tensor) -> bool:
        """Whether the second distances are still to be held against the first."""
        known = self.verify == "first" and seen(self.distance, "replay", distances.device.type)
        return has_values(distances) and self.verify != "never" and not known

    def parameters(self) -> list[Tensor]:
        """The distance's parameters, whose devices its forward may draw random numbers on."""
        return list(self.distance.parameters()) if isinstance(self.distance, nn.Module) else []

    def each(self, query_reps: Tensor, passage_reps: Tensor, *, again: bool) -> Iterator[tuple[slice, slice, dict]]:
        """Row after row of blocks: its queries, its passages, and how on_phase names it."""
        rows, columns = (
            [chunk.index(reps.device) for chunk in plan_chunks([1] * len(reps), chunk_size=size, sort=False)]
            for reps, size in zip((query_reps, passage_reps), self.sizes, strict=True)
        )
        total = len(rows) * len(columns)
        for number in range(total):
            named = {"chunk": number + again * total, "chunks": 2 * total}
            yield rows[number // len(columns)], columns[number % len(columns)], named

    def evaluate(self, query_reps: Tensor, passage_reps: Tensor) -> Tensor:
        """d_ij = Phi(f(s_i), g(t_j)), equation (10): (B, N), without a graph."""
        distances = None
        for rows, columns, named in self.each(query_reps, passage_reps, again=False):
            self.report("loss", **named)
            with torch.no_grad():
                part = self.of(query_reps[rows], passage_reps[columns])
            if distances is None:
                distances = part.new_empty(len(query_reps), len(passage_reps))
            distances[rows, columns] = part
        return distances

    def replay(
        self, query_reps: Tensor, passage_reps: Tensor, cache: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Backpropagate w block by block, equations (11)-(13): Phi's parameters add to .grad; u and v are returned."""
        gradients = torch.zeros_like(query_reps), torch.zeros_like(passage_reps)
        for rows, columns, named in self.each(query_reps, passage_reps, again=True):
            self.report("loss", **named, tensors=[("cache", cache)])
            queries = query_reps[rows].detach().requires_grad_()
            passages = passage_reps[columns].detach().requires_grad_()
            part = self.of(queries, passages)
            if first is not None:
                check_again("distance", part, first[rows, columns])
            if part.requires_grad:
                part.backward(cache[rows, columns])
            for gradient, at, leaf in zip(gradients, (rows, columns), (queries, passages), strict=True):
                if leaf.grad is not None:
                    gradient[at] += leaf.grad
            del part
        if first is not None:
            learn(self.distance, "replay", cache.device.type, True)
        return gradients

    def of(self, queries: Tensor, passages: Tensor) -> Tensor:
        """The distances of one block of pairs. Autocast's copies of the weights end with it."""
        distances = self.distance(queries, passages)
        torch.clear_autocast_cache()
        shape = len(queries), len(passages)
        if not isinstance(distances, Tensor) or tuple(distances.shape) != shape or not distances.is_floating_point():
            got = describe(distances) if isinstance(distances, Tensor) else type(distances).__name__
            raise refuse("distance", f"must return floating point numbers of shape {shape} for that many pairs", got)
        return distances


def _check_distance(encoders: Any, distance: Any, loss_fn: Any) -> None:
    if not isinstance(encoders, (list, tuple)) or len(encoders) != 2:
        got = f"{len(encoders)} towers" if isinstance(encoders, (list, tuple)) else type(encoders).__name__
        raise refuse("encoders", "must be a list or tuple of two towers, queries and passages", got)
    for name, value in (("distance", distance), ("loss_fn", loss_fn)):
        if not callable(value):
            raise refuse(name, "must be callable", type(value).__name__)
    refuse_batch_norm("distance", distance, "a block")
