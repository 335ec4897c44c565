"""Chapter 13, Bigger models, real trainers: negatives, a trainer's loss, bytes with LoRA, updates with a scaler."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.chunks import plan_chunks
from gclib.steps import grad_cache_loss, grad_cache_step

from .engine import Exercise, Misconception, Slip
from .judging import Inputs

# --- negatives of a query, updates of an epoch --------------------------------------------------------------------


def _cluster(rng: np.random.Generator, *, gather: bool, hard: bool = True, one: bool = False) -> Inputs:
    per_device, ranks = int(rng.integers(5, 20)), int(rng.integers(3, 9))
    per_device = 1 if one else per_device
    accumulation, hard_negatives = int(rng.integers(2, 6)), int(rng.integers(2, 8)) if hard else 0
    whole = per_device * ranks * accumulation
    return {
        "pairs": whole * int(rng.integers(3, 30)) + int(rng.integers(1, whole)),
        "per_device": per_device,
        "ranks": ranks,
        "accumulation": accumulation,
        "hard_negatives": hard_negatives,
        "gather": gather,
    }


def _reference_negatives(
    pairs: int, per_device: int, ranks: int, accumulation: int, hard_negatives: int, gather: bool
) -> dict[str, int]:
    """Counted: the passages of a loss as a list without the own positive; updates by taking pairs away."""
    losses = range(ranks) if gather else range(1)
    passages = [(r, q, p) for r in losses for q in range(per_device) for p in range(1 + hard_negatives)]
    passages.remove((0, 0, 0))
    updates, taken = 0, sum(per_device for _ in range(accumulation) for _ in range(ranks))
    while pairs >= taken:
        pairs, updates = pairs - taken, updates + 1
    return {"negatives": len(passages), "updates": updates}


@dataclass(frozen=True)
class _Negatives:
    """Right but for the fields that are changed.

    accumulate: accumulated losses are taken for one. shared: whether ranks count, given `gather`. own: the query's own
    positive is counted. passages: passages of a loss with Q queries and K hard negatives. update: the pairs of an
    update, of (per device, ranks, accumulation, gather). up: a last, short update counts.
    """

    accumulate: bool = False
    shared: Callable[[bool], bool] = bool
    own: bool = False
    passages: Callable[[int, int], int] = lambda queries, hard: queries * (1 + hard)
    update: Callable[[int, int, int, bool], int] = lambda rows, ranks, accumulated, gather: rows * ranks * accumulated
    up: bool = False

    def __call__(
        self, pairs: int, per_device: int, ranks: int, accumulation: int, hard_negatives: int, gather: bool
    ) -> dict[str, int]:
        queries = per_device * (ranks if self.shared(gather) else 1) * (accumulation if self.accumulate else 1)
        share = pairs / self.update(per_device, ranks, accumulation, gather)
        updates = math.ceil(share) if self.up else math.floor(share)
        return {"negatives": self.passages(queries, hard_negatives) - (not self.own), "updates": updates}


negatives_and_updates = Exercise(
    chapter=13,
    name="negatives_and_updates",
    spec='{"negatives": the passages that a query is held against beside its own positive, "updates": the full '
    "optimizer steps of an epoch}, ints.",
    line_budget=4,
    oracle=_reference_negatives,
    makers=(
        partial(_cluster, gather=True),
        partial(_cluster, gather=False),
        partial(_cluster, gather=True, hard=False),
        partial(_cluster, gather=False, hard=False, one=True),
    ),
    whole=True,
    misconceptions=(
        Misconception(
            "accumulation counted as negatives",
            "It looks as if accumulation brought negatives. Each of the accumulated losses is taken by itself: its "
            "queries never meet the passages of the next one (chapter 03). It makes updates fewer, and that is all.",
            _Negatives(accumulate=True),
        ),
        Misconception(
            "ranks forgotten",
            "It looks as if a query saw its own rank's passages alone. With gather=True a loss has those of all ranks.",
            _Negatives(shared=lambda gather: False),
        ),
        Misconception(
            "ranks without gathering",
            "It looks as if the other ranks' passages always counted. Without gathering each rank has a loss of its "
            "own, and only gradients are averaged.",
            _Negatives(shared=lambda gather: True),
        ),
        Misconception(
            "own positive counted",
            "One too many: the query's own positive stands in the loss as well, and it is no negative.",
            _Negatives(own=True),
        ),
        Misconception(
            "only its own hard negatives",
            "It looks as if a query met the other queries' positives and its own K hard negatives. The hard negatives "
            "of all other queries are passages of the same loss, and negatives for it too.",
            _Negatives(passages=lambda queries, hard: queries + hard),
        ),
        Misconception(
            "hard negatives forgotten",
            "It looks as if only positives stood in the loss. Each query brings 1 + K passages.",
            _Negatives(passages=lambda queries, hard: queries),
        ),
        Misconception(
            "own hard negatives left out",
            "It looks as if the query's own hard negatives did not count. They are the ones that were mined for it.",
            _Negatives(passages=lambda queries, hard: (queries - 1) * (1 + hard) + 1),
        ),
        Misconception(
            "an update for each accumulated loss",
            "There are too many updates: the optimizer steps once for all accumulated losses.",
            _Negatives(update=lambda rows, ranks, accumulated, gather: rows * ranks),
        ),
        Misconception(
            "pairs dealt out only where passages are gathered",
            "The negatives are right. For the updates gathering plays no part: the ranks take different pairs anyway.",
            _Negatives(update=lambda rows, ranks, accumulated, gather: rows * accumulated * (ranks if gather else 1)),
        ),
        Misconception(
            "every rank sees all pairs",
            "There are too many updates: the pairs are dealt out to the ranks, each rank sees its share of an epoch.",
            _Negatives(update=lambda rows, ranks, accumulated, gather: rows * accumulated),
        ),
        Misconception(
            "rounded up",
            "The last update is not full, and was to be dropped: round down.",
            _Negatives(up=True),
        ),
        Misconception(
            "not rounded",
            "The updates are no whole number: the last, incomplete one is dropped. // rounds down.",
            lambda pairs, per_device, ranks, accumulation, hard, gather: (
                _Negatives()(pairs, per_device, ranks, accumulation, hard, gather)
                | {"updates": pairs / (per_device * ranks * accumulation)}
            ),
        ),
        Misconception(
            "accumulation multiplies the updates",
            "It looks as if accumulating made more updates. One update waits for `accumulation` losses: there are "
            "fewer.",
            lambda pairs, per_device, ranks, accumulation, hard, gather: (
                _Negatives()(pairs, per_device, ranks, accumulation, hard, gather)
                | {"updates": pairs * accumulation // (per_device * ranks)}
            ),
        ),
        Misconception(
            "an update's queries taken for the loss's",
            "It looks as if a query met all queries of an update. It meets the passages of its own loss, each "
            "query's 1 + K of them.",
            lambda pairs, per_device, ranks, accumulation, hard, gather: (
                _Negatives()(pairs, per_device, ranks, accumulation, hard, gather)
                | {"negatives": per_device * ranks * accumulation - 1}
            ),
        ),
    ),
    hints=(
        "Two questions: which passages stand in one loss? How many pairs does one optimizer step use up?",
        "One loss: per_device queries, times ranks if gathered, each with 1 + K passages, one of them the own "
        "positive. One step: per_device * ranks * accumulation pairs.",
        'queries = per_device * (ranks if gather else 1); return {"negatives": queries * (1 + hard_negatives) - 1, '
        '"updates": pairs // (per_device * ranks * accumulation)}',
    ),
)

# --- the loss of a trainer ----------------------------------------------------------------------------------------

_SCALE = 3.0  # what the trainer does to the loss before it calls backward


class Watched(nn.Module):
    """(rows, T) ids and mask -> unit vectors. It notes how many rows were encoded with a graph, call by call."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(20, 6, generator=generator, dtype=torch.float64))
        self.out = nn.Parameter(torch.randn(6, 5, generator=generator, dtype=torch.float64))
        self.rows: list[int] = []

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean over the tokens that the mask keeps, one layer, unit length."""
        if torch.is_grad_enabled():
            self.rows.append(len(ids))
        kept = mask.unsqueeze(-1).to(self.table.dtype)
        pooled = (self.table[ids] * kept).sum(dim=1) / kept.sum(dim=1)
        return F.normalize(torch.tanh(pooled @ self.out), dim=1)


@dataclass(frozen=True)
class InfoNCE:
    """The loss that the exercise is given; a message shows what it is."""

    temperature: float

    def __call__(self, queries: Tensor, passages: Tensor) -> Tensor:
        """(B, D) and (B, D) -> scalar."""
        return F.cross_entropy(queries @ passages.T / self.temperature, torch.arange(len(queries)))


def _collated(rng: np.random.Generator, *, ragged: bool) -> Inputs:
    chunk_size = int(rng.integers(3, 6))
    rows = 2 * chunk_size + (int(rng.integers(1, chunk_size)) if ragged else chunk_size)
    inputs = {}
    for side, width in (("query", 6), ("passage", 9)):
        lengths = torch.from_numpy(rng.integers(2, width + 1, (rows, 1)))
        inputs[f"{side}_ids"] = torch.from_numpy(rng.integers(0, 20, (rows, width)))
        inputs[f"{side}_mask"] = (torch.arange(width) < lengths).long()
    model = Watched(int(rng.integers(2**31)))
    return {"model": model, "inputs": inputs, "loss_fn": InfoNCE(0.2), "chunk_size": chunk_size}


def _sides(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{"ids": inputs[f"{side}_ids"], "mask": inputs[f"{side}_mask"]} for side in ("query", "passage")]


def _reference_compute_loss(model: Watched, inputs: Mapping[str, Tensor], loss_fn: Callable, chunk_size: int) -> Tensor:
    """Plain autograd on a copy; what is returned is a plane with that gradient, which encodes nothing."""
    twin = copy.deepcopy(model)
    loss = loss_fn(*(twin(**side) for side in _sides(inputs)))
    slopes = torch.autograd.grad(loss, list(twin.parameters()))
    plane = sum((p * slope).sum() for p, slope in zip(model.parameters(), slopes, strict=True))
    return loss.detach() + plane - plane.detach()


def _after_trainer(loss: object, model: Watched, inputs: object, loss_fn: object, chunk_size: int) -> dict:
    """What a trainer that triples the loss finds: its value, the gradients, and whether graphs stayed small."""
    held = sum(model.rows)
    value = loss.detach() if isinstance(loss, Tensor) else loss
    if isinstance(loss, Tensor) and loss.requires_grad:
        (_SCALE * loss).backward()
    slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return {
        "in training mode": model.training,
        "loss": value,
        "gradients of 3 * loss": slopes,
        "at most C rows with a graph in a call": max(model.rows, default=0) <= chunk_size,
        "no graph of more than C rows when it returns": held <= chunk_size,
    }


def _trained_by(way: Callable) -> Callable:
    """A wrong compute_loss: way(model, [queries, passages], loss_fn, chunk_size)."""

    def compute_loss(model: Watched, inputs: Mapping[str, Tensor], loss_fn: Callable, chunk_size: int) -> object:
        return way(model, _sides(inputs), loss_fn, chunk_size)

    return compute_loss


def _pieces(side: Mapping[str, Tensor], chunk_size: int) -> Iterator[dict[str, Tensor]]:
    for part in zip(*(tensor.split(chunk_size) for tensor in side.values()), strict=True):
        yield dict(zip(side, part, strict=True))


def _graphs_kept(model: Watched, sides: list, loss_fn: Callable, chunk_size: int) -> Tensor:
    return loss_fn(*(torch.cat([model(**piece) for piece in _pieces(side, chunk_size)]) for side in sides))


def _loss_of_chunks(model: Watched, sides: list, loss_fn: Callable, chunk_size: int) -> Tensor:
    parts = zip(*(_pieces(side, chunk_size) for side in sides), strict=True)
    losses = [loss_fn(*(model(**piece) for piece in pair)) for pair in parts]
    return torch.stack(losses).mean()


def _step_called(model: Watched, sides: list, loss_fn: Callable, chunk_size: int) -> Tensor:
    return grad_cache_step([model, model], sides, loss_fn, chunk_size=chunk_size)


def _cut_off(model: Watched, sides: list, loss_fn: Callable, chunk_size: int) -> Tensor:
    with torch.no_grad():
        reps = [model(**side) for side in sides]
    return loss_fn(*(rep.requires_grad_() for rep in reps))


def _cached(model: Watched, sides: list, loss_fn: Callable, chunk_size: int) -> Tensor:
    return grad_cache_loss([model, model], sides, loss_fn, chunk_size=chunk_size)


def _passages_fixed(model: Watched, sides: list, loss_fn: Callable, chunk_size: int) -> Tensor:
    """The passages encoded once, without a graph."""
    with torch.no_grad():
        fixed = model(**sides[1])
    return grad_cache_loss([model], sides[:1], lambda queries: loss_fn(queries, fixed), chunk_size=chunk_size)


def _divided(model: Watched, sides: list, loss_fn: Callable, chunk_size: int) -> Tensor:
    chunks = plan_chunks([1] * len(sides[0]["ids"]), chunk_size=chunk_size)
    return _cached(model, sides, loss_fn, chunk_size) / len(chunks)


def _unmasked(model: Watched, sides: list, loss_fn: Callable, chunk_size: int) -> Tensor:
    everything = [side | {"mask": torch.ones_like(side["mask"])} for side in sides]
    return _cached(model, everything, loss_fn, chunk_size)


compute_loss = Exercise(
    chapter=13,
    name="compute_loss",
    spec="the loss of the whole batch, with a graph: the trainer scales it and calls backward(), and then the model "
    "has naive autograd's gradient, with at most chunk_size rows of a tower in a graph at once.",
    line_budget=4,
    oracle=_reference_compute_loss,
    makers=(partial(_collated, ragged=False), partial(_collated, ragged=True)),
    repeats=3,
    outcome=_after_trainer,
    may_change=frozenset({"model"}),
    rtol=1e-8,
    atol=1e-10,
    slips=(
        Slip(
            "backward inside",
            "Your function runs a backward pass itself, and then the trainer does. Return the loss with its graph, and "
            "leave backward to whoever called you.",
            "second backward\\(\\)|through the graph a second time",
        ),
        Slip(
            "changed in between",
            "What is replayed in backward must meet what the first forward met: change no mode, weight or input after "
            "the call.",
            "must be at backward\\(\\)",
        ),
        Slip(
            "names of the collator",
            "The model takes `ids` and `mask`; the batch says which tower they are of: query_ids, passage_mask. Sort "
            "them into two dictionaries, one a tower, without the prefix.",
            "forward\\(\\) .*unexpected keyword|KeyError",
        ),
        Slip(
            "ids or mask missing",
            "The model takes two tensors, ids and mask: of a dictionary with these names, model(**tower).",
            "forward\\(\\) .*(positional argument|required keyword)",
        ),
    ),
    misconceptions=(
        Misconception(
            "the whole batch with its graph",
            "Loss and gradient are right, and the memory is that of the whole batch: more rows of a tower than "
            "chunk_size were encoded in one call, and every graph was kept. chunk_size was to bound them.",
            _trained_by(lambda model, sides, loss_fn, chunk_size: loss_fn(*(model(**side) for side in sides))),
        ),
        Misconception(
            "every graph kept",
            "Chunks were encoded one by one, but all their graphs were still there when you returned: without "
            "checkpointing that is the whole batch's memory. The gradient cache keeps none, and encodes again in "
            "backward.",
            _trained_by(_graphs_kept),
        ),
        Misconception(
            "a loss for each chunk",
            "That is the mean of the chunks' own losses: accumulation. Queries no longer meet the passages of other "
            "chunks.",
            _trained_by(_loss_of_chunks),
        ),
        Misconception(
            "backward inside, a number returned",
            "The backward has run already, and what is returned has no graph, so nothing that the trainer does to the "
            "loss (scaling, dividing) reaches the gradient. grad_cache_step does that; grad_cache_loss returns the "
            "loss with its graph, and its backward is left to whoever called you.",
            _trained_by(_step_called),
        ),
        Misconception(
            "cut off from the model",
            "No gradient reaches the model: the loss has no graph, or one that ends at the representations.",
            _trained_by(_cut_off),
        ),
        Misconception(
            "towers swapped",
            "Queries and passages changed places: this loss asks of each query which passage is its own, and not the "
            "other way round.",
            _trained_by(lambda model, sides, loss_fn, chunk_size: _cached(model, sides[::-1], loss_fn, chunk_size)),
        ),
        Misconception(
            "divided by the chunks",
            "That is the loss over the number of chunks. Chunks are no losses of their own: their gradients add up.",
            _trained_by(_divided),
        ),
        Misconception(
            "mask left out",
            "It looks as if padding counted as text: the masks were not handed on.",
            _trained_by(_unmasked),
        ),
        Misconception(
            "chunks twice as large",
            "Loss and gradient are right, but more than chunk_size rows were in a graph at once: chunk_size counts "
            "the rows of one tower.",
            _trained_by(lambda model, sides, loss_fn, chunk_size: _cached(model, sides, loss_fn, 2 * chunk_size)),
        ),
        Misconception(
            "queries twice",
            "It looks as if the queries were taken for the passages too.",
            _trained_by(lambda model, sides, loss_fn, chunk_size: _cached(model, sides[:1] * 2, loss_fn, chunk_size)),
        ),
        Misconception(
            "one tower without gradient",
            "The loss is right, and only the queries' part of its gradient comes: the passages were encoded without "
            "a graph, and never again.",
            _trained_by(_passages_fixed),
        ),
        Misconception(
            "another mode",
            "The model is no longer in training mode: eval() turns dropout off where a model has it, here and in all "
            "that comes after.",
            _trained_by(lambda model, sides, loss_fn, chunk_size: _cached(model.eval(), sides, loss_fn, chunk_size)),
        ),
    ),
    hints=(
        "Which function of gclib returns a loss with a graph whose backward does the replay?",
        "Make two dictionaries with the names `ids` and `mask`, and hand them to grad_cache_loss with the model twice.",
        'towers = [{"ids": inputs[f"{side}_ids"], "mask": inputs[f"{side}_mask"]} for side in ("query", "passage")]; '
        "return gclib.grad_cache_loss([model, model], towers, loss_fn, chunk_size=chunk_size)",
    ),
)

# --- what is left of the fixed bytes with LoRA --------------------------------------------------------------------


def _adapted(rng: np.random.Generator, *, base_bytes: tuple[int, ...] = (2,)) -> Inputs:
    width = int(rng.integers(4, 17)) * 64
    wide = width * int(rng.integers(2, 5))
    shapes = [(width, width)] * int(rng.integers(1, 4)) + [(wide, width)]
    more = int(rng.integers(10**4, 10**6))
    return {
        "base_weights": sum(rows * columns for rows, columns in shapes) + more,
        "base_bytes": int(rng.choice(base_bytes)),
        "shapes": shapes,
        "rank": int(rng.integers(2, 7)) * 2,
    }


def _reference_lora(base_weights: int, base_bytes: int, shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Tensors without numbers, added up."""
    with torch.device("meta"):
        pairs = [(torch.empty(rank, columns), torch.empty(rows, rank)) for rows, columns in shapes]
        adapters = [weight for pair in pairs for weight in pair]
        copies = [torch.empty_like(weight) for weight in adapters for _ in ("weight", "gradient", "mean", "square")]
    return base_weights * base_bytes + sum(tensor.numel() * tensor.element_size() for tensor in copies)


@dataclass(frozen=True)
class _Lora:
    """Right but for the fields that are changed. trained: bytes of one adapter weight and all that goes with it."""

    trained: int = 16
    base: Callable[[int], int] = lambda each: each
    size: Callable[[int, int, int], int] = lambda rows, columns, rank: rank * (rows + columns)
    without_targets: bool = False

    def __call__(self, base_weights: int, base_bytes: int, shapes: Sequence[tuple[int, int]], rank: int) -> int:
        adapters = sum(self.size(rows, columns, rank) for rows, columns in shapes)
        if self.without_targets:
            base_weights -= sum(rows * columns for rows, columns in shapes)
        return base_weights * self.base(base_bytes) + adapters * self.trained


bytes_with_lora = Exercise(
    chapter=13,
    name="bytes_with_lora",
    spec="the bytes that stay from step to step (an int): the frozen base, and for each adapted matrix its two factors "
    "in float32 with their gradients and AdamW's two states.",
    line_budget=3,
    oracle=_reference_lora,
    makers=(_adapted, partial(_adapted, base_bytes=(1, 4))),
    whole=True,
    rtol=1e-9,
    atol=0.5,
    misconceptions=(
        Misconception(
            "gradients for the base",
            "It looks as if the frozen base had gradients. It is frozen: nothing asks for them.",
            _Lora(base=lambda each: 2 * each),
        ),
        Misconception(
            "the base trained",
            "It looks as if the base had gradients and both of AdamW's states, as in full fine-tuning. Frozen weights "
            "have neither.",
            _Lora(base=lambda each: 4 * each),
        ),
        Misconception(
            "states forgotten",
            "Eight bytes for an adapter's weight, and not sixteen: its gradient counts, and AdamW keeps two numbers "
            "more. All four are float32, whatever the base's precision.",
            _Lora(trained=8),
        ),
        Misconception(
            "twelve bytes a weight",
            "It looks as if one of four were missing: a trained weight has itself, its gradient, and AdamW's two "
            "states, the mean and the mean square of its gradients.",
            _Lora(trained=12),
        ),
        Misconception(
            "weights alone",
            "It looks as if adapters had their weights and nothing beside them. They are what is trained: each has a "
            "gradient and two states of AdamW.",
            _Lora(trained=4),
        ),
        Misconception(
            "a whole matrix times the rank",
            "It looks as if an adapter had rank * out * in weights. It is two thin factors: (rank, in), (out, rank).",
            _Lora(size=lambda rows, columns, rank: rank * rows * columns),
        ),
        Misconception(
            "one factor of two",
            "It looks as if each matrix had one factor, (rank, in). The second, (out, rank), brings it back to size.",
            _Lora(size=lambda rows, columns, rank: rank * columns),
        ),
        Misconception(
            "adapters instead of the base",
            "It looks as if the adapted matrices were gone. They stay, frozen: an adapter is added to what they give.",
            _Lora(without_targets=True),
        ),
        Misconception(
            "the base forgotten",
            "It looks as if only what is trained took room. The frozen weights take theirs too.",
            _Lora(base=lambda each: 0),
        ),
        Misconception(
            "whole matrices trained",
            "It looks as if the adapted matrices were trained as a whole. LoRA trains two thin factors of each: "
            "(rank, in), (out, rank).",
            _Lora(size=lambda rows, columns, rank: rows * columns),
        ),
        Misconception(
            "the other factor of two",
            "It looks as if each matrix had one factor, (out, rank). The first, (rank, in), makes it thin.",
            _Lora(size=lambda rows, columns, rank: rank * rows),
        ),
        Misconception(
            "numbers of the base, not bytes",
            "The base's numbers were counted, and not its bytes: base_bytes each.",
            _Lora(base=lambda each: 1),
        ),
        Misconception(
            "numbers, not bytes",
            "The base's numbers were counted, and not its bytes: base_bytes each. And an adapter's weight has 16 "
            "bytes, not 4.",
            _Lora(base=lambda each: 1, trained=4),
        ),
        Misconception(
            "rank forgotten",
            "It looks as if the rank were 1. The first factor is (rank, in), the second (out, rank).",
            _Lora(size=lambda rows, columns, rank: rows + columns),
        ),
        Misconception(
            "rank by rank",
            "It looks as if an adapter were a matrix (rank, rank). It is two thin factors: (rank, in), (out, rank).",
            _Lora(size=lambda rows, columns, rank: rank**2),
        ),
        Misconception(
            "the first matrix for all",
            "It looks as if all matrices had the first one's shape. They differ: add up one by one.",
            lambda weights, each, shapes, rank: _Lora()(weights, each, shapes[:1] * len(shapes), rank),
        ),
    ),
    hints=(
        "Two kinds of weights: the frozen ones have nothing beside them. What do the trained ones have?",
        "A matrix (out, in) gets rank * (out + in) weights, each with 4 bytes four times: itself, gradient, 2 states.",
        "return base_weights * base_bytes + 16 * sum(rank * (rows + columns) for rows, columns in shapes)",
    ),
)

# --- updates with a GradScaler ------------------------------------------------------------------------------------


class Regression(nn.Module):
    """(rows, 4) -> the mean square of a linear map's distance from 1: a loss with plain gradients, float32."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, generator=generator))
        self.bias = nn.Parameter(torch.randn(1, generator=generator))

    def forward(self, inputs: Tensor) -> Tensor:
        """The loss."""
        return (inputs @ self.weight + self.bias - 1.0).square().mean()


def _amp(rng: np.random.Generator, *, overflow: bool = False, small: bool = False) -> Inputs:
    model = Regression(int(rng.integers(2**31)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scale = 2.0**124 if overflow else 2.0 ** int(rng.integers(6, 13))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
    setup = SimpleNamespace(model=model, optimizer=optimizer, scaler=scaler, max_norm=1e6 if small else 0.25)
    batches = [torch.from_numpy(rng.uniform(1.0, 2.0, (5, 4))).float() for _ in range(3)]
    if overflow:
        batches[1] *= 40.0
    return {"setup": setup, "batches": batches}


def _reference_updates(setup: SimpleNamespace, batches: Sequence[Tensor]) -> None:
    """The gradient by hand; a step and twice the scale where scaled gradients are finite, else half the scale."""
    scale = setup.scaler.get_scale()
    for batch in batches:
        rows = torch.cat([batch.double(), torch.ones(len(batch), 1, dtype=torch.float64)], dim=1)
        error = rows @ _weights(setup.model).double() - 1.0
        slope = 2 * (rows * error.unsqueeze(1)).mean(dim=0)
        fine = bool(torch.isfinite((slope * scale).float()).all()) and math.isfinite(scale)
        if fine:
            shorter = slope * min(1.0, setup.max_norm / float(slope.norm()))
            nn.utils.vector_to_parameters(
                _weights(setup.model) - (0.1 * shorter).float(), list(setup.model.parameters())
            )
        scale *= 2.0 if fine else 0.5
    setup.scaler = torch.amp.GradScaler("cpu", init_scale=scale)


def _weights(model: Regression) -> Tensor:
    """All of them in one vector: four, and the bias."""
    return torch.cat([parameter.detach() for parameter in model.parameters()])


def _after_updates(result: object, setup: SimpleNamespace, batches: object) -> dict:
    return {"weights": _weights(setup.model), "scale": setup.scaler.get_scale()}


@dataclass(frozen=True)
class _Updates:
    """Right but for the fields that are changed. scaled: how often the loss is scaled."""

    clear: bool = True
    scaled: int = 1
    unscale: bool = True
    clip: Callable[..., object] | None = nn.utils.clip_grad_norm_
    guarded: bool = True
    update: bool = True
    step: bool = True

    def __call__(self, setup: SimpleNamespace, batches: Sequence[Tensor]) -> None:
        for batch in batches:
            if self.clear:
                setup.optimizer.zero_grad()
            loss = setup.model(batch)
            for _ in range(self.scaled):
                loss = setup.scaler.scale(loss)
            loss.backward()
            if self.unscale:
                setup.scaler.unscale_(setup.optimizer)
            if self.clip is not None:
                self.clip(setup.model.parameters(), setup.max_norm)
            if not self.step:
                pass
            elif self.guarded:
                setup.scaler.step(setup.optimizer)
            else:
                setup.optimizer.step()
            if self.update:
                setup.scaler.update()
            elif self.guarded:
                setup.scaler.update(setup.scaler.get_scale())


def _one_by_one(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Each parameter clipped by its own norm."""
    for parameter in parameters:
        nn.utils.clip_grad_norm_(parameter, max_norm)


def _to_the_norm(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Every gradient made max_norm long, the short ones too."""
    slopes = [parameter.grad for parameter in parameters]
    norm = torch.cat([slope.flatten() for slope in slopes]).norm()
    for slope in slopes:
        slope.mul_(max_norm / norm)


def _accumulated(setup: SimpleNamespace, batches: Sequence[Tensor]) -> None:
    """One update, of the sum of the batches' gradients."""
    setup.optimizer.zero_grad()
    for batch in batches:
        setup.scaler.scale(setup.model(batch)).backward()
    setup.scaler.unscale_(setup.optimizer)
    nn.utils.clip_grad_norm_(setup.model.parameters(), setup.max_norm)
    setup.scaler.step(setup.optimizer)
    setup.scaler.update()


scaled_updates = Exercise(
    chapter=13,
    name="scaled_updates",
    spec="an update for each batch, with a GradScaler: old gradients cleared, setup.model(batch) is the loss, "
    "gradients clipped to the norm setup.max_norm, a step that overflowed left out, the scale brought up to date.",
    line_budget=7,
    oracle=_reference_updates,
    makers=(_amp, partial(_amp, small=True), partial(_amp, overflow=True)),
    repeats=4,
    outcome=_after_updates,
    may_change=frozenset({"setup"}),
    rtol=1e-4,
    atol=1e-6,
    slips=(
        Slip(
            "unscaled twice",
            "scaler.unscale_ was called again before scaler.update(). Either it stands there twice, or the update "
            "before was not ended: scaler.step(optimizer), then scaler.update().",
            "unscale_\\(\\) has already been called",
        ),
        Slip(
            "an update that was not ended",
            "scaler.step was called, and unscale_ came after it. Either their order is wrong, or scaler.update() is "
            "missing: it ends an update, and sets the scale for the next one.",
            "unscale_\\(\\) is being called after step",
        ),
        Slip(
            "never scaled",
            "scaler.scale was not called before: it makes the scale that is taken back. scaler.scale(loss).backward().",
            "_scale is None",
        ),
        Slip(
            "no gradients were looked at",
            "scaler.step and scaler.update look at what unscale_ found in the gradients, and there was nothing: no "
            "backward() was called, the gradients had been cleared after it, neither unscale_ nor step was called, or "
            "update() had been called already: once an update.",
            "No inf checks were recorded",
        ),
    ),
    misconceptions=(
        Misconception(
            "clipped while scaled",
            "It looks as if gradients were clipped before they were unscaled. They are too long there, by the scale, "
            "so the clipping acts where it should not, and what is left is unscaled to too little.",
            _Updates(unscale=False),
        ),
        Misconception(
            "always as long as max_norm",
            "It looks as if every gradient was made max_norm long, the short ones too. Clipping leaves those as they "
            "are.",
            _Updates(clip=_to_the_norm),
        ),
        Misconception(
            "scaled twice",
            "It looks as if the loss was scaled twice. It is unscaled once: the gradient is left too large by the "
            "scale. (Does a step that you call get the scaler, too?)",
            _Updates(scaled=2),
        ),
        Misconception(
            "old gradients kept",
            "It looks as if the gradients of the last update were still there. Clear them before backward.",
            _Updates(clear=False),
        ),
        Misconception(
            "not clipped",
            "It looks as if the gradients were not clipped.",
            _Updates(clip=None),
        ),
        Misconception(
            "clipped number by number",
            "It looks as if each number was clipped by itself, which turns the gradient. The norm of all of them was "
            "to be at most max_norm.",
            _Updates(clip=nn.utils.clip_grad_value_),
        ),
        Misconception(
            "the optimizer's own step",
            "An update with gradients that are inf was taken: optimizer.step() takes any. scaler.step(optimizer) "
            "leaves it out.",
            _Updates(guarded=False),
        ),
        Misconception(
            "scale not updated",
            "The weights may be right, but the scale stayed as it was: either the scaler had no part in it, or "
            "scaler.update() is missing, which makes it larger after a good step and smaller after an overflow.",
            _Updates(update=False),
        ),
        Misconception(
            "no step taken",
            "The weights have not changed: scaler.step(optimizer) is missing, or found no gradients.",
            _Updates(step=False),
        ),
        Misconception(
            "clipped one by one",
            "It looks as if each parameter was clipped by itself, which turns the gradient of all of them. One norm, "
            "over all parameters.",
            _Updates(clip=_one_by_one),
        ),
        Misconception(
            "one update for all batches",
            "It looks as if gradients were added over all batches and one step was taken. An update for each batch "
            "was asked for.",
            _accumulated,
        ),
    ),
    hints=(
        "At which moment are the gradients of their true size? Clip then.",
        "zero_grad; scale(loss).backward(); unscale_(optimizer); clip; scaler.step(optimizer); update().",
        "For each batch: setup.optimizer.zero_grad(); setup.scaler.scale(setup.model(batch)).backward(); "
        "setup.scaler.unscale_(setup.optimizer); torch.nn.utils.clip_grad_norm_(setup.model.parameters(), "
        "setup.max_norm); setup.scaler.step(setup.optimizer); setup.scaler.update()",
    ),
)
