"""Sharp edges of public code, each written small: gradient-cache steps that are wrong in one place.

Every step has the signature of gclib's steps, takes chunks of `SIZE` rows, adds to `.grad` and returns the loss.
`right_step` has none of the traps. They are reimplementations of an idea, not copies, and as such no judgement on the
libraries, which solve much more than this; `TRAPS` says where each idea was read, and what is right instead. Versions
change: `gclib.audit.audit` says what the code at hand does.

Letters: B queries, C rows of a chunk (`SIZE`), W processes.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.randomness import RandomState
from gclib.towers import named_tensors

SIZE = 3
Step = Callable[[Sequence[Callable], Sequence[Any], Callable], Tensor]


@dataclass(frozen=True)
class Trap:
    """One sharp edge: the step that shows it, where it was read, and what is right."""

    name: str
    step: Step
    where: str
    right: str

    @property
    def source(self) -> str:
        """The step as it is written."""
        return inspect.getsource(self.step)


def rows_of(inputs: dict[str, Tensor], start: int, rows: int) -> dict[str, Tensor]:
    """Some rows of every tensor of one tower."""
    return {name: value[start : start + rows] for name, value in inputs.items()}


def cut(inputs: dict[str, Tensor], sizes: Sequence[int] | None = None) -> list[dict[str, Tensor]]:
    """One tower's rows in file order, in chunks of `SIZE` or of the sizes given; the last may be short."""
    rows = len(next(iter(inputs.values())))
    sizes = sizes or [SIZE] * (rows // SIZE) + [rows % SIZE] * (rows % SIZE > 0)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [rows_of(inputs, start, size) for start, size in zip(starts, sizes, strict=True)]


def first_forward(encoders: Sequence[nn.Module], chunks: Sequence[Sequence[dict]]) -> tuple[list[Tensor], list[list]]:
    """Every representation, without a graph, as leaves; and the generators' state before each chunk."""
    leaves, states = [], []
    for encoder, tower in zip(encoders, chunks, strict=True):
        parts, drawn = [], []
        for chunk in tower:
            drawn.append(RandomState.record([*named_tensors(chunk).values(), *encoder.parameters()]))
            with torch.no_grad():
                parts.append(encoder(**chunk))
        leaves.append(torch.cat(parts).requires_grad_())
        states.append(drawn)
    return leaves, states


def second_forward(
    encoders: Sequence[Callable], chunks: Sequence[Sequence[dict]], caches: Sequence[Tensor], states: Sequence[list]
) -> None:
    """Encode each chunk again, with its graph and its first randomness; backpropagate its rows of the cache."""
    for encoder, tower, cache, drawn in zip(encoders, chunks, caches, states, strict=True):
        parts = cache.split([len(next(iter(chunk.values()))) for chunk in tower])
        for chunk, part, state in zip(tower, parts, drawn, strict=True):
            with state.replay():
                encoder(**chunk).backward(part)


def right_step(encoders: Sequence[Callable], inputs: Sequence[Any], loss_fn: Callable) -> Tensor:
    """Gao et al. 2021, section 3.3: no trap in it."""
    chunks = [cut(tower) for tower in inputs]
    leaves, states = first_forward(encoders, chunks)
    loss = loss_fn(*leaves)
    loss.backward()
    second_forward(encoders, chunks, [leaf.grad for leaf in leaves], states)
    return loss.detach()


def fresh_randomness(encoders: Sequence[Callable], inputs: Sequence[Any], loss_fn: Callable) -> Tensor:
    """The second forward draws new dropout masks: another function is differentiated than the loss has seen."""
    chunks = [cut(tower) for tower in inputs]
    leaves, _ = first_forward(encoders, chunks)
    loss = loss_fn(*leaves)
    loss.backward()
    for encoder, tower, leaf in zip(encoders, chunks, leaves, strict=True):
        for chunk, part in zip(tower, leaf.grad.split(SIZE), strict=True):
            encoder(**chunk).backward(part)
    return loss.detach()


def averaged_over_ranks(
    encoders: Sequence[Callable], inputs: Sequence[Any], loss_fn: Callable, ranks: int = 2
) -> Tensor:
    """Each of W ranks keeps the gradients of its own rows, and the sum over the ranks is divided by W: 1/W is left."""
    chunks = [cut(tower) for tower in inputs]
    leaves, states = first_forward(encoders, chunks)
    loss = loss_fn(*leaves)
    loss.backward()
    second_forward(encoders, chunks, [leaf.grad / ranks for leaf in leaves], states)
    return loss.detach()


def nominal_split(encoders: Sequence[Callable], inputs: Sequence[Any], loss_fn: Callable) -> Tensor:
    """The caller cuts the inputs as they like, and the cache is cut by the nominal size: gradients reach other rows."""
    rows = len(next(iter(inputs[0].values())))
    chunks = [cut(tower, [SIZE - 1, SIZE + 1, *([1] * (rows - 2 * SIZE))]) for tower in inputs]
    leaves, _ = first_forward(encoders, chunks)
    loss = loss_fn(*leaves)
    loss.backward()
    for encoder, tower, leaf in zip(encoders, chunks, leaves, strict=True):
        for chunk, part in zip(tower, leaf.grad.split(SIZE), strict=False):
            reps = encoder(**chunk)
            shared = min(len(reps), len(part))
            reps[:shared].backward(part[:shared])
    return loss.detach()


def whole_loss_each_chunk(encoders: Sequence[Callable], inputs: Sequence[Any], loss_fn: Callable) -> Tensor:
    """The whole loss is backpropagated once for each of n chunks: the temperature gets its gradient n times."""
    chunks = [cut(tower) for tower in inputs]
    with torch.no_grad():
        known = [[encoder(**chunk) for chunk in tower] for encoder, tower in zip(encoders, chunks, strict=True)]
    for number in range(len(chunks[0])):
        parts = [list(tower) for tower in known]
        for tower, encoder in enumerate(encoders):
            parts[tower][number] = encoder(**chunks[tower][number])
        loss = loss_fn(*(torch.cat(part) for part in parts))
        loss.backward()
    return loss.detach()


def sum_for_a_mean(encoders: Sequence[Callable], inputs: Sequence[Any], loss_fn: Callable) -> Tensor:
    """The sum over B queries is backpropagated, and the number that is shown divided by B afterwards."""
    chunks = [cut(tower) for tower in inputs]
    leaves, states = first_forward(encoders, chunks)
    total = len(leaves[0]) * loss_fn(*leaves)
    total.backward()
    second_forward(encoders, chunks, [leaf.grad for leaf in leaves], states)
    return total.detach() / len(leaves[0])


def no_temperature(encoders: Sequence[Callable], inputs: Sequence[Any], loss_fn: Callable) -> Tensor:
    """The cached path has a loss of its own, and that one forgets the temperature."""
    chunks = [cut(tower) for tower in inputs]
    leaves, states = first_forward(encoders, chunks)
    logits = leaves[0] @ leaves[1].T
    loss = F.cross_entropy(logits, torch.arange(len(logits)) * (logits.shape[1] // len(logits)))
    loss.backward()
    second_forward(encoders, chunks, [leaf.grad for leaf in leaves], states)
    return loss.detach()


def replay_outside_autocast(encoders: Sequence[Callable], inputs: Sequence[Any], loss_fn: Callable) -> Tensor:
    """The second forward runs when the caller's autocast is over: a float32 replay of a bf16 forward."""
    chunks = [cut(tower) for tower in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaves, states = first_forward(encoders, chunks)
        loss = loss_fn(*leaves)
    loss.backward()
    second_forward(encoders, chunks, [leaf.grad for leaf in leaves], states)
    return loss.detach()


TRAPS = (
    Trap(
        "random states not replayed",
        fresh_randomness,
        "GradCache's functional decorators take the random state without the inputs, so that a GPU's dropout is not "
        "replayed; open_clip's --accum-freq keeps no state at all",
        "record every device that inputs and weights are on, and put the states back for the second forward",
    ),
    Trap(
        "1/W of the gradient",
        averaged_over_ranks,
        "GradCache's distributed loss lacks the factor W, and its README does not add it there",
        "say the scale in one place, and test gradients by size",
    ),
    Trap(
        "cache split by nominal size",
        nominal_split,
        "GradCache splits the inputs with the caller's function, and the cache by the nominal size (where the sizes "
        "then differ, it raises; a lenient version goes on)",
        "split the cache by the chunks' real lengths",
    ),
    Trap(
        "whole loss for every chunk",
        whole_loss_each_chunk,
        "open_clip --accum-freq n",
        "one loss, one cached gradient, then the replay",
    ),
    Trap(
        "B times the gradient",
        sum_for_a_mean,
        "PyLate's CachedContrastive, in the version that we read: Adam, which divides by the gradient's size, hides it",
        "backpropagate what you report; compare after an SGD step",
    ),
    Trap(
        "temperature not applied",
        no_temperature,
        "tevatron --grad_cache, in the version that we read",
        "one loss object for every step",
    ),
    Trap(
        "replay outside autocast",
        replay_outside_autocast,
        "sentence-transformers' cached losses replay from a backward hook, where the autocast of a hand-written loop "
        "is over",
        "keep one autocast state for both forwards",
    ),
)
