"""Chapter 05's exercises and their misconceptions: the first forward, the cache, the replay, the whole step.

The step is that of Gao et al. 2021, section 3.3. The encoder here is a small network over rows of numbers with dropout,
that counts how often it built a graph, and how many graphs were alive at once. Wrong answers that train as well as the
right one, but hold the memory of the whole batch, are known by that.

Letters: B queries (and B passages), F features of a row, D dimensions of a representation, C rows of a chunk.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.losses.module import ContrastiveLoss

from .engine import Exercise, Misconception, Slip
from .judging import Inputs


class _Graph:
    """Stands for what one forward saved for its backward: it lives as long as any of that does."""


class SmallEncoder(nn.Module):
    """Rows (rows, F) -> representations (rows, D), float64, with dropout.

    graphs: forwards that built a graph. most_alive: the most of those graphs that were alive at once.
    """

    def __init__(self, features: int, width: int, dropout: float):
        super().__init__()
        self.hidden = nn.Linear(features, 8).double()
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(8, width).double()
        self.graphs = self.most_alive = 0
        self._alive: list[weakref.ref] = []

    def forward(self, rows: Tensor) -> Tensor:
        """(rows, F) -> (rows, D)."""
        graph = _Graph()
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: (graph, saved.detach()), lambda kept: kept[1]):
            reps = self.out(self.drop(torch.tanh(self.hidden(rows))))
        if reps.requires_grad:
            self._alive = [*(kept for kept in self._alive if kept() is not None), weakref.ref(graph)]
            self.graphs, self.most_alive = self.graphs + 1, max(self.most_alive, len(self._alive))
        return reps


def _encoder(rng: np.random.Generator, features: int, width: int) -> SmallEncoder:
    encoder = SmallEncoder(features, width, dropout=0.4)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.from_numpy(rng.standard_normal(parameter.shape)) / 2)
    return encoder


def _with_earlier_gradients(module: nn.Module) -> nn.Module:
    """Its parameters hold a gradient already, as they do when another tower or another loss came first."""
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    return module


def _rows(rng: np.random.Generator, rows: int, features: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal((rows, features)))


def _sizes(rng: np.random.Generator, *, short: bool) -> tuple[int, int, int, int]:
    """(F, D, rows of a chunk, rows in all): three chunks, or three and one so short that torch.chunk cuts elsewhere."""
    chunk = int(rng.integers(6, 9)) if short else int(rng.integers(4, 7))
    rest = int(rng.integers(1, 3)) if short else 0
    return int(rng.integers(3, 6)), int(rng.integers(3, 6)), chunk, 3 * chunk + rest


def _loss(rng: np.random.Generator) -> ContrastiveLoss:
    return ContrastiveLoss(float(rng.uniform(0.6, 1.5)), learnable=True).double()


# --- step 1: the first forward --------------------------------------------------------------------------------


def _chunks(rng: np.random.Generator, *, short: bool) -> Inputs:
    features, width, chunk, rows = _sizes(rng, short=short)
    return {"encoder": _encoder(rng, features, width), "chunks": list(_rows(rng, rows, features).split(chunk))}


def _reference_first(encoder: SmallEncoder, chunks: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    states, kept = [], []
    for chunk in chunks:
        states += [torch.get_rng_state()]
        kept += [encoder(chunk).detach()]
    encoder.graphs = encoder.most_alive = 0  # what a forward without a graph costs
    return torch.cat(kept).requires_grad_(), states


def _first(
    encoder: SmallEncoder, chunks: Sequence[Tensor], *, graph: str = "none", leaf: bool = True, state: str = "before"
) -> tuple[Tensor, list[Tensor]]:
    """The first forward, right but for what is named: its graph "none", "dropped" at once or "kept" until the end."""
    states, parts = [], []
    for chunk in chunks:
        before = torch.get_rng_state()
        with torch.set_grad_enabled(graph != "none"):
            part = encoder(chunk)
        parts.append(part.detach() if graph == "dropped" else part)
        taken = {"before": before, "after": torch.get_rng_state(), "first": states[0] if states else before}
        states.append(taken[state])
    reps = torch.cat(parts)
    return (reps.detach().requires_grad_() if leaf else reps), states


def _under_inference_mode(encoder: SmallEncoder, chunks: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    with torch.inference_mode():
        states = []
        parts = [(states.append(torch.get_rng_state()), encoder(chunk))[1] for chunk in chunks]
        return torch.cat(parts).requires_grad_(), states


def _in_eval_mode(encoder: SmallEncoder, chunks: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return _first(encoder.eval(), chunks)


def _encoded_twice(encoder: SmallEncoder, chunks: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            encoder(chunk)
            states.append(torch.get_rng_state())
            parts.append(encoder(chunk))
    return torch.cat(parts).requires_grad_(), states


def _first_outcome(result: Any, encoder: SmallEncoder, chunks: Sequence[Tensor]) -> dict[str, Any]:
    if result is None:
        return {"representations": None}
    reps, states = result
    is_tensor = isinstance(reps, Tensor)
    found = {"representations": reps, "forwards that built a graph": encoder.graphs}
    found |= {"graphs alive at once": encoder.most_alive, "it asks for its gradient": is_tensor and reps.requires_grad}
    found |= {"it is a leaf": is_tensor and reps.is_leaf, "an inference tensor": is_tensor and reps.is_inference()}
    return found | {"the next random number from each state": [_next_number(state) for state in states]}


def _next_number(state: Tensor) -> float:
    generator = torch.Generator()
    generator.set_state(state)
    return torch.rand((), generator=generator, dtype=torch.float64).item()


first_forward = Exercise(
    chapter=5,
    name="first_forward",
    spec="(all representations as one leaf tensor that asks for its gradient, the CPU generator's state before each "
    "chunk), encoded chunk by chunk without a graph.",
    line_budget=7,
    repeats=2,
    oracle=_reference_first,
    makers=(partial(_chunks, short=False), partial(_chunks, short=True)),
    outcome=_first_outcome,
    rtol=1e-9,
    atol=1e-9,
    misconceptions=(
        Misconception(
            "graph kept in the first forward",
            "The numbers are right, but every chunk was encoded with its graph, and all those graphs were alive "
            "together: that is the memory of the naive step. Detaching afterwards comes too late: encode under "
            "torch.no_grad().",
            partial(_first, graph="kept"),
        ),
        Misconception(
            "graph built and dropped",
            "The numbers are right, but every chunk built a graph that was thrown away at once. It costs one chunk's "
            "activations for nothing: torch.no_grad() does not build it.",
            partial(_first, graph="dropped"),
        ),
        Misconception(
            "not detached",
            "The representations still hang on the encoder's graph, so nothing was saved, and a tensor that is no leaf "
            "keeps no .grad. Encode without a graph, then requires_grad_().",
            partial(_first, graph="kept", leaf=False),
        ),
        Misconception(
            "no gradient asked for",
            "The graph is gone, but the representations do not ask for a gradient either: there would be no cache. "
            "Call requires_grad_() on them.",
            partial(_first, leaf=False),
        ),
        Misconception(
            "state taken after the chunk",
            "Each state was taken after its chunk, so it would replay the dropout of the chunk that follows. Take it "
            "before you encode.",
            partial(_first, state="after"),
        ),
        Misconception(
            "one state for all chunks",
            "All chunks got the first chunk's state: each must be replayed from its own.",
            partial(_first, state="first"),
        ),
        Misconception(
            "an inference tensor",
            "torch.inference_mode() goes too far here: autograd does not record what is computed of its tensors alone, "
            "such as the logits, and so no gradient comes to be cached. Use torch.no_grad().",
            _under_inference_mode,
        ),
        Misconception(
            "all chunks in one forward",
            "The rows went through the encoder in one piece: chunk by chunk is what keeps the memory small.",
            lambda encoder, chunks: (_first(encoder, [torch.cat(chunks)])[0], [torch.get_rng_state()] * len(chunks)),
        ),
        Misconception(
            "a list of leaves",
            "A list of representations: torch.cat makes one tensor of them, so that there is one leaf and one cache.",
            lambda encoder, chunks: (
                lambda reps, states: ([part.detach() for part in reps.split([len(c) for c in chunks])], states)
            )(*_first(encoder, chunks)),
        ),
        Misconception(
            "encoded twice",
            "The encoder ran twice for each chunk, once for nothing: that run drew masks too, and so the "
            "representations are others than those that one forward gives.",
            _encoded_twice,
        ),
        Misconception(
            "last chunk only",
            "Only the last chunk's representations are returned: collect them all, and torch.cat them.",
            lambda encoder, chunks: (lambda reps, states: (reps[-len(chunks[-1]) :].detach().requires_grad_(), states))(
                *_first(encoder, chunks)
            ),
        ),
        Misconception(
            "dropout switched off",
            "It looks as if the first forward ran in eval mode. The cache must belong to the representations that are "
            "trained, dropout included.",
            _in_eval_mode,
        ),
    ),
    hints=(
        "Nothing in this forward will be backpropagated. Which context tells PyTorch so?",
        "Under torch.no_grad(), for each chunk: keep torch.get_rng_state(), then encode. Afterwards torch.cat, and ask "
        "for a gradient.",
        "Two lists grow in one loop, the state always before the representations of its chunk. After the loop a leaf "
        "is made of one of them: what tells a tensor without a graph to keep a gradient?",
    ),
)

# --- step 2: the loss and the cache ---------------------------------------------------------------------------


def _leaves(rng: np.random.Generator, hard: int) -> Inputs:
    rows, width = int(rng.integers(5, 9)), int(rng.integers(3, 6))
    reps = [_rows(rng, count, width).requires_grad_() for count in (rows, rows * (1 + hard))]
    return {"reps": reps, "loss_fn": _with_earlier_gradients(_loss(rng))}


def _reference_cache(reps: list[Tensor], loss_fn: nn.Module) -> tuple[Tensor, list[Tensor]]:
    loss = loss_fn(*reps)
    *caches, own = torch.autograd.grad(loss, [*reps, loss_fn.log_temperature])
    loss_fn.log_temperature.grad = loss_fn.log_temperature.grad + own
    return loss.detach(), caches


def _cache(
    reps: list[Tensor], loss_fn: nn.Module, *, queries: bool = True, passages: bool = True, share: int = 1
) -> tuple[Tensor, list[Tensor | None]]:
    """The cache, right but for what is named: a side that is detached first, or a gradient that is divided."""
    loss = loss_fn(reps[0] if queries else reps[0].detach(), reps[1] if passages else reps[1].detach())
    loss.backward()
    return loss.detach(), [None if rep.grad is None else rep.grad / (len(rep) if share != 1 else 1) for rep in reps]


def _without_temperature(reps: list[Tensor], loss_fn: nn.Module) -> tuple[Tensor, list[Tensor]]:
    loss = loss_fn(*reps)
    return loss.detach(), list(torch.autograd.grad(loss, reps))


def _temperature_from_nothing(
    reps: list[Tensor], loss_fn: nn.Module, *, late: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The cache; the temperature's gradient is cleared before the backward, or after it."""
    if not late:
        loss_fn.zero_grad()
    found = _cache(reps, loss_fn)
    if late:
        loss_fn.zero_grad()
    return found


def _with_graphs(reps: list[Tensor], loss_fn: nn.Module) -> tuple[Tensor, list[Tensor]]:
    loss = loss_fn(*reps)
    loss.backward(create_graph=True)
    return loss.detach(), [rep.grad for rep in reps]


def _graph_returned(reps: list[Tensor], loss_fn: nn.Module) -> tuple[Tensor, list[Tensor]]:
    loss = loss_fn(*reps)
    loss.backward()
    return loss, [rep.grad for rep in reps]


def _representations_returned(reps: list[Tensor], loss_fn: nn.Module) -> tuple[Tensor, list[Tensor]]:
    return _cache(reps, loss_fn)[0], reps


def _backward_twice(reps: list[Tensor], loss_fn: nn.Module) -> tuple[Tensor, list[Tensor]]:
    _cache(reps, loss_fn)
    return _cache(reps, loss_fn)


def _loss_for_each_tower(reps: list[Tensor], loss_fn: nn.Module) -> tuple[Tensor, list[Tensor]]:
    _cache(reps, loss_fn, passages=False)
    return _cache(reps, loss_fn, queries=False)[0], [rep.grad for rep in reps]


def _swapped_in_the_loss(reps: list[Tensor], loss_fn: nn.Module) -> tuple[Tensor, list[Tensor]]:
    loss, (second, first) = _cache(reps[::-1], loss_fn)
    return loss, [first, second]


def _one_cache(reps: list[Tensor], loss_fn: nn.Module) -> tuple[Tensor, list[Tensor]]:
    loss, (first, second) = _cache(reps, loss_fn)
    return loss, [second, first]


def _cache_outcome(result: Any, reps: list[Tensor], loss_fn: ContrastiveLoss) -> dict[str, Any]:
    if result is None:
        return {"loss": None}
    loss, caches = result
    caches = list(caches) if isinstance(caches, list | tuple) else caches
    parts = caches if isinstance(caches, list) else []
    found = {"loss": loss, "gradient caches": caches, "temperature's gradient": loss_fn.log_temperature.grad}
    found |= {"the caches carry a graph": any(isinstance(part, Tensor) and part.grad_fn is not None for part in parts)}
    return found | {"the loss carries a graph": isinstance(loss, Tensor) and loss.requires_grad}


_GRAPH_USED_TWICE = Slip(
    "graph used twice",
    "A graph was backpropagated a second time. There is one backward for the loss, which gives both caches at once, "
    "and one for each chunk of the replay, which is encoded anew.",
    "backward through the graph a second time",
)

_NO_GRAPH = Slip(
    "no graph to go back",
    "backward finds no graph: what it starts from was detached, or made under torch.no_grad(), or of detached tensors. "
    "Detach a loss after its backward.",
    "does not require grad and does not have a grad_fn",
)

build_cache = Exercise(
    chapter=5,
    name="build_cache",
    spec="(the loss without its graph, a list with each tower's gradient cache dL/dreps); the loss's own parameters "
    "get their gradient in .grad.",
    line_budget=4,
    repeats=2,
    oracle=_reference_cache,
    makers=(partial(_leaves, hard=0), partial(_leaves, hard=2)),
    outcome=_cache_outcome,
    slips=(_GRAPH_USED_TWICE, _NO_GRAPH),
    rtol=1e-9,
    atol=1e-12,
    misconceptions=(
        Misconception(
            "detached before the loss",
            "The representations were detached before the loss, so the loss does not know them and their .grad is "
            "None. They have no graph below them: give them to the loss as they are.",
            partial(_cache, queries=False, passages=False),
        ),
        Misconception(
            "passages detached",
            "The passages were detached, so only the queries have a cache. Both towers learn from the loss.",
            partial(_cache, passages=False),
        ),
        Misconception(
            "queries detached",
            "The queries were detached, so only the passages have a cache. Both towers learn from the loss.",
            partial(_cache, queries=False),
        ),
        Misconception(
            "temperature without gradient",
            "The caches are right, but the temperature got no gradient: torch.autograd.grad fills in what it is asked "
            "for, and no .grad. loss.backward() reaches the loss's own parameters too.",
            _without_temperature,
        ),
        Misconception(
            "temperature's earlier gradient lost",
            "The caches are right, but what the temperature's .grad held before is gone: cleared, or overwritten. A "
            "gradient is added to what is there; whoever calls the step clears.",
            _temperature_from_nothing,
        ),
        Misconception(
            "temperature's gradient cleared",
            "The caches are right, but the temperature's gradient was cleared after the backward that made it.",
            partial(_temperature_from_nothing, late=True),
        ),
        Misconception(
            "caches with a graph",
            "The caches carry a graph (create_graph=True does that), and with it all logits. They are constants: a "
            "plain backward, or .detach().",
            _with_graphs,
        ),
        Misconception(
            "no backward",
            "There is no gradient at all: the loss was taken, and nobody called backward.",
            lambda reps, loss_fn: (loss_fn(*reps).detach(), [None, None]),
        ),
        Misconception(
            "caches with the wrong sign",
            "The caches have the wrong sign: they are the gradient, and the optimizer goes down by itself.",
            lambda reps, loss_fn: (lambda loss, caches: (loss, [-cache for cache in caches]))(*_cache(reps, loss_fn)),
        ),
        Misconception(
            "queries' cache only",
            "Only the queries have a cache: the passages were detached. Both towers learn from the loss.",
            lambda reps, loss_fn: (lambda loss, caches: (loss, [caches[0], torch.zeros_like(reps[1])]))(
                *_cache(reps, loss_fn, passages=False)
            ),
        ),
        Misconception(
            "loss with its graph",
            "The loss that you return still has its graph, which nobody needs any more (before its backward, it would "
            "hold the B x N logits as well): return loss.detach().",
            _graph_returned,
        ),
        Misconception(
            "cache divided by the rows",
            "The caches were divided by the number of rows. The loss is a mean already, and its gradient knows that.",
            partial(_cache, share=0),
        ),
        Misconception(
            "towers swapped",
            "The two caches changed places: queries first, then passages.",
            _one_cache,
        ),
        Misconception(
            "towers swapped in the loss",
            "It looks as if the passages were given to the loss as queries: then passages choose among queries. "
            "loss_fn(queries, passages).",
            _swapped_in_the_loss,
        ),
        Misconception(
            "representations instead of gradients",
            "Those are the representations themselves. Their cache is the gradient that the backward left in .grad.",
            _representations_returned,
        ),
        Misconception(
            "backward twice",
            "Every gradient is twice too large: the loss was backpropagated twice, and .grad adds up. One backward "
            "gives both caches.",
            _backward_twice,
        ),
        Misconception(
            "temperature counted twice",
            "The caches are right, but the temperature's gradient was added twice (one backward for each tower?): one "
            "loss, one backward gives both caches.",
            _loss_for_each_tower,
        ),
    ),
    hints=(
        "The representations are leaves that ask for their gradient. What does backward do to leaves?",
        "One loss over all representations, one backward; the caches then lie in each representation's .grad.",
        "After one backward nothing else has to be computed: read the caches where a leaf keeps its gradient, and hand "
        "the number on without its graph.",
    ),
)

# --- step 3: the replay ---------------------------------------------------------------------------------------


def _recorded(rng: np.random.Generator, *, short: bool) -> Inputs:
    """States as an encoder leaves them that served another tower between two chunks."""
    inputs = _chunks(rng, short=short)
    rows, width = sum(map(len, inputs["chunks"])), inputs["encoder"].out.out_features
    seeds = rng.integers(2**31, size=len(inputs["chunks"])).tolist()
    states = [torch.Generator().manual_seed(seed).get_state() for seed in seeds]
    _with_earlier_gradients(inputs["encoder"])
    return inputs | {"cache": _rows(rng, rows, width), "states": states}


def _reference_replay(encoder: SmallEncoder, chunks: Sequence[Tensor], cache: Tensor, states: list[Tensor]) -> None:
    reps = []
    for chunk, state in zip(chunks, states, strict=True):
        torch.set_rng_state(state)
        reps.append(encoder(chunk))
    torch.cat(reps).backward(gradient=cache)
    encoder.most_alive = 1  # what a replay costs: one chunk's graph


def _dot(reps: Tensor, rows: Tensor) -> Tensor:
    return (reps * rows).sum()


def _real_start(number: int, chunks: Sequence[Tensor]) -> int:
    return sum(len(chunk) for chunk in chunks[:number])


def _equal_start(number: int, chunks: Sequence[Tensor]) -> int:
    return number * (_real_start(len(chunks), chunks) // len(chunks))


@dataclass(frozen=True)
class _Replay:
    """The replay, right but for the fields that are changed.

    restored: the state of "each" chunk, of the first "once", of the "first" or the "last" for every chunk, each one too
    "late" (after encoding), or "never". start: where a chunk's rows of the cache
    begin. last: whether a short last chunk counts. at_once: all surrogates are added up, then backpropagated.
    """

    restored: str = "each"
    surrogate: Callable[[Tensor, Tensor], Tensor] = _dot
    start: Callable[[int, Sequence[Tensor]], int] = _real_start
    mean: bool = False
    last: bool = True
    at_once: bool = False

    def __call__(
        self,
        encoder: SmallEncoder,
        chunks: Sequence[Tensor],
        cache: Tensor,
        states: list[Tensor],
        before: Callable[[], object] = lambda: None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        """`before` and `after` are called around each chunk."""
        total = torch.zeros((), dtype=cache.dtype)
        for number, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
            before()
            if not self.last and len(chunk) < len(chunks[0]):
                continue
            chosen = {"first": states[0], "last": states[-1]}.get(self.restored, state)
            if self.restored in ("each", "first", "last") or self.restored == "once" and number == 0:
                torch.set_rng_state(chosen)
            place = self.start(number, chunks)
            reps = encoder(chunk)
            if self.restored == "late":
                torch.set_rng_state(state)
            part = self.surrogate(reps, cache[place : place + len(chunk)])
            part = part / (len(chunks) if self.mean else 1)
            if self.at_once:
                total = total + part
            else:
                part.backward()
                after()
        if self.at_once:
            total.backward()


def _replay_outcome(
    result: Any, encoder: SmallEncoder, chunks: Sequence[Tensor], cache: Tensor, states: list[Tensor]
) -> dict[str, Any]:
    found = {f"{name}.grad": parameter.grad for name, parameter in encoder.named_parameters()}
    return found | {"graphs alive at once": encoder.most_alive}


def _cleared_first(encoder: SmallEncoder, *recorded: Any) -> None:
    encoder.zero_grad()
    _Replay()(encoder, *recorded)


def _in_eval(encoder: SmallEncoder, *recorded: Any) -> None:
    encoder.eval()
    _Replay()(encoder, *recorded)


_STATES = (
    Misconception(
        "first state for every chunk",
        "Every chunk was replayed from the first chunk's state: each has its own.",
        _Replay(restored="first"),
    ),
    Misconception(
        "last state for every chunk",
        "Every chunk was replayed from the last chunk's state: each has its own.",
        _Replay(restored="last"),
    ),
    Misconception(
        "state set after encoding",
        "Each state was put back after its chunk had been encoded, too late for its masks: set it, then encode.",
        _Replay(restored="late"),
    ),
    Misconception(
        "cache offset forgotten",
        "Every chunk got the first rows of the cache: go on from where the chunk before it ended.",
        _Replay(start=lambda number, chunks: 0),
    ),
    Misconception(
        "offset of one row a chunk",
        "Chunk i got the rows of the cache from row i on: it begins after all rows of the chunks before it.",
        _Replay(start=lambda number, chunks: number),
    ),
    Misconception(
        "mean over the rows",
        "The surrogate was averaged over the rows of the chunk. The mean over the batch is in the cache already: sum.",
        _Replay(surrogate=lambda reps, rows: (reps * rows).sum() / len(reps)),
    ),
    Misconception(
        "cache left out",
        "The representations were summed without their cached gradients: the cache says how much each number counts.",
        _Replay(surrogate=lambda reps, rows: reps.sum()),
    ),
)
_NOT_REPLAYED = (
    "Dropout drew new masks in the second forward, so the cache belongs to other representations than the ones that "
    "are backpropagated. Put each chunk's state back before you encode it again: torch.set_rng_state."
)
_SHAPES_THAT_DO_NOT_FIT = Slip(
    "shapes that do not fit",
    "Two shapes do not fit. A chunk meets rows of the cache that are not as many as its own (all of them, one, or "
    "parts cut elsewhere: torch.chunk and tensor_split make parts of about equal length, but the last chunk may be "
    "short): cut both at the same places, cache.split([len(chunk) for chunk in chunks]). Or backward is given another "
    "shape than what it is called on: reps.backward(rows) takes the rows, a sum takes nothing.",
    "Mismatch in shape|must match the size of tensor",
)
_SURROGATES = (
    Misconception(
        "backpropagated twice",
        "The encoder's gradient is twice too large: it looks as if each chunk was backpropagated twice, and .grad adds "
        "up.",
        _Replay(surrogate=lambda reps, rows: 2 * (reps * rows).sum()),
    ),
    Misconception(
        "wrong sign",
        "The encoder's gradient has the wrong sign: an optimizer goes down the gradient by itself.",
        _Replay(surrogate=lambda reps, rows: -(reps * rows).sum()),
    ),
    Misconception(
        "mean instead of dot product",
        "It looks as if the surrogate was averaged over its entries, so that the encoder's gradient is too small by "
        "the number of entries, rows times dimensions. A dot product sums: (reps * cache).sum().",
        _Replay(surrogate=lambda reps, rows: (reps * rows).mean()),
    ),
    Misconception(
        "squared distance instead of dot product",
        "It looks as if the representations are pulled towards the cache, as a squared distance does. The cache is a "
        "gradient, not a target: the surrogate is the dot product (reps * cache).sum().",
        _Replay(surrogate=lambda reps, rows: (reps - rows).square().sum()),
    ),
    Misconception(
        "cosine instead of dot product",
        "It looks as if the surrogate was a cosine, which divides the lengths away. The length of a cached gradient "
        "says how much its row matters: use the plain dot product.",
        _Replay(surrogate=lambda reps, rows: F.cosine_similarity(reps, rows).sum()),
    ),
    Misconception(
        "every row with every row",
        "It looks as if every representation met every row of the cache (a matrix product). Row i has one cached "
        "gradient, its own: multiply entry by entry, then sum.",
        _Replay(surrogate=lambda reps, rows: (reps @ rows.T).sum()),
    ),
)

replay = Exercise(
    chapter=5,
    name="replay",
    spec="encode each chunk again, with its graph and from its own state, and backpropagate its rows of the cache; "
    "gradients add up in .grad, nothing is returned.",
    line_budget=6,
    repeats=2,
    oracle=_reference_replay,
    makers=(partial(_recorded, short=False), partial(_recorded, short=True)),
    outcome=_replay_outcome,
    slips=(_SHAPES_THAT_DO_NOT_FIT, _GRAPH_USED_TWICE, _NO_GRAPH),
    rtol=1e-8,
    atol=1e-10,
    misconceptions=(
        Misconception("dropout not replayed", _NOT_REPLAYED, _Replay(restored="never")),
        *_STATES,
        Misconception(
            "earlier gradients lost",
            "What .grad held before is gone: cleared with zero_grad, or overwritten. Another tower may have been "
            "there before: gradients add up.",
            _cleared_first,
        ),
        Misconception(
            "dropout switched off",
            "The second forward ran in eval mode, without the first one's masks.",
            _in_eval,
        ),
        Misconception(
            "last chunk left out",
            "The last chunk was not replayed.",
            lambda encoder, chunks, cache, states: _Replay()(encoder, chunks[:-1], cache, states[:-1]),
        ),
        Misconception(
            "cache reversed",
            "It looks as if the cache was read from its end: its rows stand in the order of the chunks.",
            lambda encoder, chunks, cache, states: _Replay()(encoder, chunks, cache.flip(0), states),
        ),
        Misconception(
            "no gradient reaches the encoder",
            "The encoder's gradient is what it was: nothing was backpropagated through it. Was the surrogate only "
            "returned, or were the representations detached?",
            lambda encoder, chunks, cache, states: [encoder(chunk) for chunk in chunks] and None,
        ),
        Misconception(
            "restored once only",
            "Only the first chunk's state was put back. Between two chunks other numbers may have been drawn (by "
            "another tower, say): each chunk needs its own state.",
            _Replay(restored="once"),
        ),
        Misconception(
            "states reversed",
            "It looks as if the states were put back in reverse order: chunk i takes state i, as in the first forward.",
            lambda encoder, chunks, cache, states: _Replay()(encoder, chunks, cache, states[::-1]),
        ),
        Misconception(
            "last chunk's gradient only",
            "Only the last chunk's gradient is left: .grad was cleared for every chunk (zero_grad), or overwritten by "
            "it (p.grad = ...). The chunks' gradients add up.",
            lambda encoder, *recorded: _Replay()(encoder, *recorded, before=encoder.zero_grad),
        ),
        Misconception(
            "mean over the chunks",
            "The gradient is too small by the number of chunks: it looks as if the chunks were averaged, as in "
            "gradient accumulation. The cache already is the gradient of the whole loss: add the chunks up.",
            _Replay(mean=True),
        ),
        *_SURROGATES,
        Misconception(
            "all graphs alive at once",
            "The gradient is right, but the surrogates were added up and backpropagated together, so every chunk's "
            "graph waited for that: the memory of the naive step. Call backward chunk by chunk.",
            _Replay(at_once=True),
        ),
        Misconception(
            "re-split by its own length",
            "Right until a chunk is short. It looks as if chunk i starts at row i * len(chunk): the short last chunk "
            "then gets other rows' gradients. Go on from where the chunk before it ended.",
            _Replay(start=lambda number, chunks: number * len(chunks[number])),
        ),
        Misconception(
            "re-split into equal parts",
            "Right until a chunk is short. It looks as if the cache was cut into equal parts of B / n rows: cut it "
            "by the chunks' real lengths.",
            _Replay(start=_equal_start),
        ),
        Misconception(
            "short last chunk dropped",
            "Right until a chunk is short: it looks as if the short last chunk was left out. Its rows were in the "
            "loss, so their gradients belong to the sum.",
            _Replay(last=False),
        ),
    ),
    hints=(
        "Which rows of the cache belong to this chunk, and which random numbers did its first forward draw?",
        "For each chunk: put its state back, encode, backpropagate with its rows: cache.split([len(c) for c in "
        "chunks]) cuts by real lengths.",
        "Three things move together through the loop: the chunk, its state, its rows of the cache. The state comes "
        "before the encoder; backward takes the rows as its argument.",
    ),
)

# --- the whole step -------------------------------------------------------------------------------------------


class Setup:
    """What a step trains: .encoder (both towers), .loss_fn with its own temperature, .optimizer over all of them.

    stale: every .grad holds something from before, as it does after another step. steps: how often optimizer.step()
    was called.
    """

    def __init__(self, encoder: nn.Module, loss_fn: nn.Module, *, stale: bool = False):
        self.encoder, self.loss_fn, self.stale = encoder, loss_fn, stale
        parameters = [*encoder.parameters(), *loss_fn.parameters()]
        self.optimizer, self.steps = torch.optim.SGD(parameters, lr=1.0), 0
        self.optimizer.register_step_post_hook(self._count)
        for parameter in parameters if stale else ():
            parameter.grad = torch.full_like(parameter, 0.25)

    def _count(self, *_: object) -> None:
        self.steps += 1

    def __deepcopy__(self, memo: dict) -> "Setup":
        return Setup(copy.deepcopy(self.encoder, memo), copy.deepcopy(self.loss_fn, memo), stale=self.stale)

    def __repr__(self) -> str:
        return "<encoder, loss_fn, optimizer>"


def _training(rng: np.random.Generator, *, short: bool, stale: bool) -> Inputs:
    features, width, chunk, rows = _sizes(rng, short=short)
    setup = Setup(_encoder(rng, features, width), _loss(rng), stale=stale)
    towers = {"queries": _rows(rng, rows, features), "passages": _rows(rng, rows, features)}
    return {"setup": setup, **towers, "chunk_size": chunk}


def _reference_step(setup: Setup, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    """Every graph kept, plain autograd, SGD by hand."""
    encoder, loss_fn = setup.encoder, setup.loss_fn
    loss = loss_fn(*(torch.cat([encoder(part) for part in rows.split(chunk_size)]) for rows in (queries, passages)))
    parameters = [*encoder.parameters(), *loss_fn.parameters()]
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= gradient
    encoder.most_alive = setup.steps = 1  # what a cached step holds, and it builds as many graphs as this one
    return loss.detach()


@dataclass(frozen=True)
class _CachedStep:
    """The step, right but for the fields that are changed.

    graph: of the first forward. order: -1 encodes passages first. cached: makes the cache. cleared: "first", "never",
    "late" (after the cache), "last" (before the step) or "each" chunk. stepped: "once", "twice", or after each "chunk"
    or "tower", or "never". states: which states each tower is replayed with; noted: when they are noted.
    """

    graph: str = "none"
    order: int = 1
    cached: Callable[[list[Tensor], nn.Module], tuple[Tensor, list[Tensor]]] = _cache
    cleared: str = "first"
    passages_trained: bool = True
    stepped: str = "once"
    replay: _Replay = _Replay()
    states: tuple[int, int] = (0, 1)
    noted: str = "before"
    modes: tuple[bool, bool] = (True, True)

    def __call__(self, setup: Setup, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
        nothing, (clear, step) = lambda: None, (setup.optimizer.zero_grad, setup.optimizer.step)
        if self.cleared in ("first", "each"):
            clear()
        towers = [rows.split(chunk_size) for rows in (queries, passages)]
        setup.encoder.train(self.modes[0])
        options = {"graph": self.graph, "state": self.noted}
        first = [_first(setup.encoder, chunks, **options) for chunks in towers[:: self.order]][:: self.order]
        setup.encoder.train(self.modes[1])
        noted = [first[tower][1] for tower in self.states]
        loss, caches = self.cached([reps for reps, _ in first], setup.loss_fn)
        if self.cleared == "late":
            clear()
        before, after = clear if self.cleared == "each" else nothing, step if self.stepped == "chunk" else nothing
        for chunks, cache, states in list(zip(towers, caches, noted, strict=True))[: 1 + self.passages_trained]:
            self.replay(setup.encoder, chunks, cache, states, before, after)
            if self.stepped == "tower":
                step()
        if self.cleared == "last":
            clear()
        for _ in range({"once": 1, "twice": 2}.get(self.stepped, 0)):
            step()
        return loss


def _no_cache(setup: Setup, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    """Chunks, but every graph kept for one backward."""
    setup.optimizer.zero_grad()
    reps = [torch.cat([setup.encoder(part) for part in rows.split(chunk_size)]) for rows in (queries, passages)]
    loss = setup.loss_fn(*reps)
    loss.backward()
    setup.optimizer.step()
    return loss.detach()


def _plain_step(setup: Setup, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    """No chunks at all."""
    return _no_cache(setup, queries, passages, len(queries))


def _both_forwards(setup: Setup, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    """The first forward keeps its graph, the loss is backpropagated through it, and then comes the replay too."""
    setup.optimizer.zero_grad()
    towers = [rows.split(chunk_size) for rows in (queries, passages)]
    first = [_first(setup.encoder, chunks, graph="kept", leaf=False) for chunks in towers]
    for reps, _ in first:
        reps.retain_grad()
    loss = setup.loss_fn(*(reps for reps, _ in first))
    loss.backward()
    for chunks, (reps, states) in zip(towers, first, strict=True):
        _Replay()(setup.encoder, chunks, reps.grad, states)
    setup.optimizer.step()
    return loss.detach()


def _accumulation(setup: Setup, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    """A loss for each chunk, weighted by its share of the rows."""
    setup.optimizer.zero_grad()
    total = torch.zeros((), dtype=queries.dtype)
    for some, others in zip(queries.split(chunk_size), passages.split(chunk_size), strict=True):
        loss = setup.loss_fn(setup.encoder(some), setup.encoder(others)) * (len(some) / len(queries))
        loss.backward()
        total += loss.detach()
    setup.optimizer.step()
    return total


def _loss_for_each_chunk(
    setup: Setup, queries: Tensor, passages: Tensor, chunk_size: int, *, in_pairs: bool = False
) -> Tensor:
    """Instead of a cache: the whole loss again for each chunk, with that chunk's graph and all else as constants."""
    setup.optimizer.zero_grad()
    towers = [rows.split(chunk_size) for rows in (queries, passages)]
    first = [_first(setup.encoder, chunks) for chunks in towers]
    count = len(towers[0])
    works = [[(0, n), (1, n)] for n in range(count)] if in_pairs else [[(t, n)] for t in (0, 1) for n in range(count)]
    for work in works:
        reps = [list(found.detach().split(chunk_size)) for found, _ in first]
        for tower, number in work:
            torch.set_rng_state(first[tower][1][number])
            reps[tower][number] = setup.encoder(towers[tower][number])
        loss = setup.loss_fn(*map(torch.cat, reps))
        loss.backward()
    setup.optimizer.step()
    return loss.detach()


def _cleared_for_each_tower(setup: Setup, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    setup.optimizer.zero_grad()
    towers = [rows.split(chunk_size) for rows in (queries, passages)]
    first = [_first(setup.encoder, chunks) for chunks in towers]
    loss, caches = _cache([reps for reps, _ in first], setup.loss_fn)
    for chunks, cache, (_, states) in zip(towers, caches, first, strict=True):
        setup.encoder.zero_grad()
        _Replay()(setup.encoder, chunks, cache, states)
    setup.optimizer.step()
    return loss


def _without_replay(setup: Setup, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    setup.optimizer.zero_grad()
    first = [_first(setup.encoder, rows.split(chunk_size)) for rows in (queries, passages)]
    loss, _ = _cache([reps for reps, _ in first], setup.loss_fn)
    setup.optimizer.step()
    return loss


def _in_turns(setup: Setup, queries: Tensor, passages: Tensor, chunk_size: int) -> Tensor:
    setup.optimizer.zero_grad()
    towers = [rows.split(chunk_size) for rows in (queries, passages)]
    first = [_first(setup.encoder, both) for both in zip(*towers, strict=True)]
    reps = [
        torch.cat(
            [
                pair.detach()[: len(q)] if side == 0 else pair.detach()[len(q) :]
                for (pair, _), q in zip(first, towers[0], strict=True)
            ]
        ).requires_grad_()
        for side in (0, 1)
    ]
    loss, caches = _cache(reps, setup.loss_fn)
    for side in (0, 1):
        _Replay()(setup.encoder, towers[side], caches[side], [states[side] for _, states in first])
    setup.optimizer.step()
    return loss


def _step_outcome(result: Any, setup: Setup, queries: Tensor, passages: Tensor, chunk_size: int) -> dict[str, Any]:
    modules = (("encoder", setup.encoder), ("loss_fn", setup.loss_fn))
    found = {"calls of optimizer.step()": setup.steps}
    found |= {f"{of}.{name} after the step": p for of, module in modules for name, p in module.named_parameters()}
    found |= {"the encoder is in training mode": all(part.training for part in setup.encoder.modules())}
    found |= {"loss": result, "the loss carries a graph": isinstance(result, Tensor) and result.requires_grad}
    found |= {"forwards that built a graph": setup.encoder.graphs, "graphs alive at once": setup.encoder.most_alive}
    return found


_ONCE = (
    "The encoder is right, but the temperature's gradient was counted once for each {}: the whole loss was "
    "backpropagated again and again. One loss, one backward (the cache), and the replay takes no loss at all."
)

gradient_cache_step = Exercise(
    chapter=5,
    name="gradient_cache_step",
    spec="one whole step: clear the gradients, encode queries then passages in chunks without a graph, cache, replay, "
    "setup.optimizer.step(); returns the detached loss.",
    line_budget=20,
    repeats=2,
    oracle=_reference_step,
    makers=(
        partial(_training, short=False, stale=False),
        partial(_training, short=True, stale=False),
        partial(_training, short=False, stale=True),
    ),
    outcome=_step_outcome,
    slips=(_SHAPES_THAT_DO_NOT_FIT, _GRAPH_USED_TWICE, _NO_GRAPH),
    may_change=frozenset({"setup"}),
    rtol=1e-8,
    atol=1e-10,
    misconceptions=(
        Misconception(
            "the plain step",
            "That is the plain step: each tower went through the encoder whole, with a graph for all of its rows. "
            "Encode chunk_size rows at a time: first without a graph, then, with the cache, again.",
            _plain_step,
        ),
        Misconception(
            "every graph kept",
            "The step is right, but all chunks' graphs waited for one backward: chunks alone save nothing. Encode "
            "first without a graph, then again chunk by chunk.",
            _no_cache,
        ),
        Misconception(
            "graph kept in the first forward",
            "The step is right, but the first forward built every chunk's graph and kept it until it was detached: the "
            "memory of the naive step. Encode under torch.no_grad().",
            _CachedStep(graph="kept"),
        ),
        Misconception(
            "graph built and dropped",
            "The step is right, but the first forward built graphs that nobody uses. Encode under torch.no_grad().",
            _CachedStep(graph="dropped"),
        ),
        Misconception(
            "backpropagated through both forwards",
            "The encoder's gradient is twice too large: the first forward still had its graph, so the loss's backward "
            "went through it, and then the replay came on top. Cut the first forward off with torch.no_grad().",
            _both_forwards,
        ),
        Misconception("dropout not replayed", _NOT_REPLAYED, _CachedStep(replay=_Replay(restored="never"))),
        Misconception(
            "a loss for each chunk",
            "That is gradient accumulation: each chunk had a loss of its own, and lost the other chunks' negatives. "
            "Take one loss over all representations.",
            _accumulation,
        ),
        Misconception(
            "mean over the chunks",
            "The encoder's gradient is too small by the number of chunks: the chunks were averaged. The cache already "
            "is the gradient of the whole loss: add the chunks up.",
            _CachedStep(replay=_Replay(mean=True)),
        ),
        Misconception(
            "passages not replayed",
            "Only the queries were encoded again, as if the passages were constants. Both towers have a cache, and "
            "both are replayed.",
            _CachedStep(passages_trained=False),
        ),
        Misconception(
            "passages encoded first",
            "It looks as if the passages were encoded before the queries: right as a method, but dropout draws its "
            "masks in the order of encoding, so the numbers are others. The exercise asks for the queries first.",
            _CachedStep(order=-1),
        ),
        Misconception(
            "no optimizer step",
            "The parameters did not change: setup.optimizer.step() was not called.",
            _CachedStep(stepped="never"),
        ),
        Misconception(
            "temperature without gradient",
            "The encoder is right, but the temperature did not move. Its gradient comes with the cache: either it was "
            "not made (torch.autograd.grad fills no .grad), or a later zero_grad() wiped it out.",
            _CachedStep(cleared="late"),
        ),
        Misconception(
            "last chunk's gradient only",
            "Only the last chunk's gradient was left: .grad was cleared for every chunk, or overwritten. Clear "
            "once, at the start; the chunks' gradients add up.",
            _CachedStep(cleared="each"),
        ),
        Misconception(
            "loss backpropagated twice",
            "Every gradient is twice too large: the loss was backpropagated twice (once for each tower?), and .grad "
            "adds up. One backward gives both caches.",
            _CachedStep(cached=_backward_twice),
        ),
        Misconception(
            "two optimizer steps",
            "setup.optimizer.step() was called twice with the same gradients: once is one step.",
            _CachedStep(stepped="twice"),
        ),
        Misconception(
            "gradients cleared before the step",
            "The parameters did not change: zero_grad() came right before step(), which then had nothing to do.",
            _CachedStep(cleared="last"),
        ),
        Misconception(
            "gradients cleared for each tower",
            "Only the passages' gradient was left: .grad was cleared, or overwritten, for each tower. Clear "
            "once, first.",
            _cleared_for_each_tower,
        ),
        Misconception(
            "no replay",
            "Nothing was ever encoded with a graph, so it has no gradient: the caches wait for the replay.",
            _without_replay,
        ),
        Misconception(
            "passages with the queries' states",
            "The passages were replayed from the queries' states: each tower has its own list.",
            _CachedStep(states=(0, 0)),
        ),
        Misconception(
            "towers' states swapped",
            "Queries were replayed from the passages' states, and the other way round.",
            _CachedStep(states=(1, 0)),
        ),
        Misconception(
            "state noted after encoding",
            "Each state was noted after its chunk had been encoded: it replays the masks of the next one.",
            _CachedStep(noted="after"),
        ),
        Misconception(
            "dropout switched off",
            "The encoder was in eval mode, without dropout: it must train as it is.",
            _CachedStep(modes=(False, False)),
        ),
        Misconception(
            "dropout switched off in the first forward",
            "The first forward ran in eval mode, the second with dropout: the cache belongs to other representations.",
            _CachedStep(modes=(False, True)),
        ),
        Misconception(
            "caches swapped",
            "The towers' caches changed places: the queries were replayed with the passages' cache.",
            _CachedStep(cached=_one_cache),
        ),
        Misconception(
            "towers swapped in the loss",
            "The passages were given to the loss as queries. loss_fn(queries, passages).",
            _CachedStep(cached=_swapped_in_the_loss),
        ),
        Misconception(
            "loss with its graph",
            "The step is right, but the loss that you return still has its graph, which nobody needs any more: "
            "detach it.",
            _CachedStep(cached=_graph_returned),
        ),
        Misconception(
            "one chunk of all rows",
            "The step is right, but each tower went through the encoder in one piece: chunk_size rows at a time.",
            lambda setup, queries, passages, chunk_size: _CachedStep()(setup, queries, passages, len(queries)),
        ),
        Misconception(
            "chunk_size chunks",
            "The step is right, but it looks as if chunk_size was taken for the number of chunks (torch.chunk does "
            "that); it is their rows (torch.split).",
            lambda setup, queries, passages, chunk_size: _CachedStep()(
                setup, queries, passages, -(-len(queries) // chunk_size)
            ),
        ),
        Misconception(
            "all graphs alive in the replay",
            "The step is right, but all chunks of a tower were replayed before one backward: their graphs are alive at "
            "once. Call backward chunk by chunk.",
            _CachedStep(replay=_Replay(at_once=True)),
        ),
        Misconception(
            "queries and passages in turns",
            "It looks as if a chunk of queries and one of passages were encoded in turns: right as a method, but the "
            "masks are drawn in another order. All queries first, then all passages.",
            _in_turns,
        ),
        Misconception("temperature once per tower", _ONCE.format("tower"), _CachedStep(cached=_loss_for_each_tower)),
        *(
            Misconception(listed.name, listed.message, _CachedStep(replay=listed.wrong))
            for listed in (*_SURROGATES, *_STATES)
        ),
        Misconception("temperature once per chunk", _ONCE.format("chunk of each tower"), _loss_for_each_chunk),
        Misconception(
            "temperature once per pair of chunks",
            _ONCE.format("chunk of queries and its passages"),
            partial(_loss_for_each_chunk, in_pairs=True),
        ),
        Misconception(
            "optimizer step for each chunk",
            "The optimizer stepped after every chunk, so later chunks were replayed with other weights than those "
            "their cache belongs to. Step once, when all chunks have been added up.",
            _CachedStep(stepped="chunk"),
        ),
        Misconception(
            "optimizer step for each tower",
            "The optimizer stepped after each tower, so the passages were replayed with other weights than those their "
            "cache belongs to. Step once, when both towers have been added up.",
            _CachedStep(stepped="tower"),
        ),
        Misconception(
            "short last chunk dropped",
            "Right until B is no multiple of the chunk: the short last chunk was left out of the replay. Its rows were "
            "in the loss.",
            _CachedStep(replay=_Replay(last=False)),
        ),
        Misconception(
            "re-split by its own length",
            "Right until B is no multiple of the chunk: the short last chunk got other rows of the cache. Cut the "
            "cache exactly as you cut the rows.",
            _CachedStep(replay=_Replay(start=lambda number, chunks: number * len(chunks[number]))),
        ),
        Misconception(
            "re-split into equal parts",
            "Right until B is no multiple of the chunk: the cache was cut into equal parts, the rows were not. Cut "
            "both the same way.",
            _CachedStep(replay=_Replay(start=_equal_start)),
        ),
        Misconception(
            "old gradients kept",
            "Right the first time only: .grad still held the gradients of the step before. Clear them: "
            "setup.optimizer.zero_grad().",
            _CachedStep(cleared="never"),
        ),
    ),
    hints=(
        "Your three functions in order, for two towers: first forward of both, one loss, replay of both, then the "
        "optimizer.",
        "Keep a list of states in the order of encoding, and walk through it again in the same order while replaying "
        "queries.split(chunk_size) and the cache, split the same way.",
        "Where does each thing come from? The states from the first forward, the caches from the one backward of the "
        "loss (the temperature's gradient too), the encoder's gradient from the replay alone. Clear before all that, "
        "step after it.",
    ),
)
