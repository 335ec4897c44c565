"""Chapter 15's exercises: a peak and a training time by hand, a plan for any card, and which plans survive.

The peak's model: `fixed` bytes of parameters, gradients and AdamW's states; 4 B representations and cached gradients of
`rep` bytes; 3 matrices of float32 logits (the dense loss's; for a tile a rough stand-in); `row` bytes of graph for each
row that is encoded with one.

Letters: B pairs (2 B rows), C rows of a chunk, R retained chunks.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .engine import Exercise, Misconception
from .judging import Inputs

GIB, MIB = 2**30, 2**20

# --- the peak -------------------------------------------------------------------------------------------------


def _pieces(rng: np.random.Generator, *, batch: int, retained: int, tile: int | None = None) -> Inputs:
    """Pieces of a step of about this batch; R from `retained` to twice as many."""
    return {
        "fixed": int(rng.integers(300, 2000)) * MIB,
        "row": int(rng.integers(15, 60)) * MIB,
        "rep": 4 * int(rng.integers(300, 1100)),
        "batch": int(batch * rng.uniform(0.8, 1.2)),
        "chunk": int(rng.integers(20, 70)),
        "retained": int(rng.integers(retained, 2 * retained + 1)),
        "tile": None if tile is None else int(tile * rng.uniform(0.8, 1.2)),
    }


def _stages(fixed: int, row: int, rep: int, batch: int, chunk: int, retained: int, tile: int | None) -> float:
    """The two moments that can be the peak, each added up."""
    side = batch if tile is None else tile
    resident = fixed + 2 * batch * rep + 2 * batch * rep
    at_the_loss = resident + 3 * 4 * side**2 + sum(chunk * row for _ in range(retained))
    at_a_replay = resident + chunk * row
    return sorted((at_the_loss, at_a_replay))[-1] / GIB


def _sum_of(**changed: Callable) -> Callable:
    """The peak with parts computed otherwise: logits, graphs, replay, reps, unit, together."""

    def wrong(fixed: int, row: int, rep: int, batch: int, chunk: int, retained: int, tile: int | None) -> float:
        given = {"row": row, "rep": rep, "batch": batch, "chunk": chunk, "retained": retained, "tile": tile}
        parts: dict[str, Callable] = {
            "logits": lambda batch, tile, **_: 12 * (tile or batch) ** 2,
            "graphs": lambda retained, chunk, row, **_: retained * chunk * row,
            "replay": lambda chunk, row, **_: chunk * row,
            "reps": lambda batch, rep, **_: 4 * batch * rep,
            "unit": lambda **_: GIB,
            "fixed": lambda **_: fixed,
        }
        found = {name: part(**given) for name, part in (parts | changed).items()}
        highest = max(found["graphs"] + found["logits"], found["replay"])
        return (found["fixed"] + found["reps"] + highest) / found["unit"]

    return wrong


def _reps_at_the_loss(fixed: int, row: int, rep: int, batch: int, chunk: int, retained: int, tile: int | None) -> float:
    """Representations and cached gradients counted in the first of the two moments alone."""
    at_the_loss = 4 * batch * rep + retained * chunk * row + 12 * (tile or batch) ** 2
    return (fixed + max(at_the_loss, chunk * row)) / GIB


predict_peak = Exercise(
    chapter=15,
    name="predict_peak",
    spec="peak in GiB of a gradient-cache step: fixed + 4 B rep + the larger of (R graphs of C rows + 12 side², the "
    "logits) and (one graph of C rows); side is the tile, or B where tile is None.",
    line_budget=4,
    oracle=_stages,
    makers=(
        partial(_pieces, batch=3_000, retained=2),
        partial(_pieces, batch=40_000, retained=2, tile=2_000),
        partial(_pieces, batch=1_000, retained=0),
        partial(_pieces, batch=20_000, retained=0),
        partial(_pieces, batch=30_000, retained=0, tile=9_000),
    ),
    rtol=1e-7,
    atol=0.0,
    misconceptions=(
        Misconception(
            "the naive step's peak",
            "That is the naive step's peak, with the graphs of all 2 B rows. The cached step holds R chunks' graphs "
            "during the loss, and one chunk's in a replay.",
            _sum_of(graphs=lambda batch, row, **_: 2 * batch * row),
        ),
        Misconception(
            "retained graphs forgotten",
            "The retained graphs are missing, or too small: they live while the loss is computed, each with the `row` "
            "bytes of C rows.",
            _sum_of(graphs=lambda **_: 0),
        ),
        Misconception(
            "logits forgotten",
            "The logits are missing at the loss, or were taken for a moment of their own: three matrices of side x "
            "side float32 numbers are counted there, beside the retained graphs.",
            _sum_of(logits=lambda **_: 0),
        ),
        Misconception(
            "chunks taken for rows",
            "`row` bytes is the graph of one row, and a chunk has C of them.",
            _sum_of(graphs=lambda retained, row, **_: retained * row, replay=lambda row, **_: row),
        ),
        Misconception(
            "both moments at once",
            "It looks as if the two moments were one: the logits, the retained graphs and a replay's graph together. "
            "They come one after the other, and what the first held is gone then: take the larger.",
            _sum_of(graphs=lambda retained, chunk, row, **_: (retained + 1) * chunk * row),
        ),
        Misconception(
            "GB instead of GiB",
            "That is in GB, 10^9 bytes. Cards and forecasts are told in GiB, 2^30 bytes: 7 % fewer.",
            _sum_of(unit=lambda **_: 1e9),
        ),
        Misconception(
            "MiB instead of GiB",
            "That is in MiB; GiB are asked for, 1,024 of them each.",
            _sum_of(unit=lambda **_: MIB),
        ),
        Misconception(
            "bytes",
            "That is in bytes; GiB are asked for.",
            _sum_of(unit=lambda **_: 1),
        ),
        Misconception(
            "cached gradients forgotten",
            "There are 2 B representations *and* 2 B cached gradients of the same size.",
            _sum_of(reps=lambda batch, rep, **_: 2 * batch * rep),
        ),
        Misconception(
            "one matrix of logits",
            "The dense loss holds three matrices, 12 bytes for each logit: the log-softmax that the forward "
            "keeps, its gradient, and the gradient of the logits.",
            _sum_of(logits=lambda batch, tile, **_: 4 * (tile or batch) ** 2),
        ),
        Misconception(
            "tile forgotten",
            "Where there is a tile, only tile x tile logits are live at a time, and not B x B.",
            _sum_of(logits=lambda batch, **_: 12 * batch**2),
        ),
        Misconception(
            "a strip instead of a tile",
            "It looks as if a tile of queries met all passages at a time. A tile is a square, tile x tile.",
            _sum_of(logits=lambda batch, tile, **_: 12 * (tile or batch) * batch),
        ),
        Misconception(
            "replay forgotten",
            "With R = 0 no graph is live at the loss, but each replay builds one: the peak is the larger of the two "
            "moments.",
            _sum_of(replay=lambda **_: 0),
        ),
        Misconception(
            "retained graphs in a replay",
            "It looks as if the retained graphs were live in a replay too. Their backward runs first: then they are "
            "gone.",
            _sum_of(replay=lambda retained, chunk, row, **_: (retained + 1) * chunk * row),
        ),
        Misconception(
            "a quarter of the representations",
            "It looks as if there were B of them. There are 2 B representations *and* 2 B cached gradients of the "
            "same size.",
            _sum_of(reps=lambda batch, rep, **_: batch * rep),
        ),
        Misconception(
            "side not squared",
            "It looks as if there were `side` logits. They are a square: side * side of them.",
            _sum_of(logits=lambda batch, tile, **_: 12 * (tile or batch)),
        ),
        Misconception(
            "fixed bytes forgotten",
            "Parameters, gradients and the optimizer's states count at both moments: `fixed` is missing.",
            _sum_of(fixed=lambda **_: 0),
        ),
        Misconception(
            "representations at the loss only",
            "It looks as if representations and cached gradients were gone in a replay. The replay reads the cached "
            "gradients: they are there at both moments.",
            _reps_at_the_loss,
        ),
    ),
    hints=(
        "Two moments can be the peak: the loss, and a replay. What is live in both, and what in one of them only?",
        "Always: fixed and 4 * batch * rep. At the loss: retained * chunk * row and 12 * side ** 2. In a replay: "
        "chunk * row. Take the larger moment, and divide by 2 ** 30.",
        "side = tile or batch; moment = max(retained * chunk * row + 12 * side**2, chunk * row); return (fixed + 4 * "
        "batch * rep + moment) / 2**30",
    ),
)

# --- the time -------------------------------------------------------------------------------------------------


def _training(rng: np.random.Generator, *, encoded: float, retained: float, rest: tuple[float, float]) -> Inputs:
    """A training whose last batch has this share of its examples; none: the others hold them all."""
    batch = int(rng.integers(200, 3000))
    return {
        "examples": batch * int(rng.integers(40, 150)) + int(batch * rng.uniform(*rest)),
        "batch": batch,
        "naive_seconds": float(rng.uniform(5, 60)),
        "encoded": float(encoded * rng.uniform(0.8, 1.0)),
        "retained": float(retained * rng.uniform(0.6, 1.0)),
    }


def _counted_hours(examples: int, batch: int, naive_seconds: float, encoded: float, retained: float) -> float:
    """In thirds of a naive update: 3 for what is kept, 4 for what is encoded twice."""
    updates = len(range(0, examples, batch))
    thirds = encoded * (3 * retained + 4 * (1 - retained))
    return updates * thirds / 3 * naive_seconds / 60 / 60


def _ratio_hours(ratio: Callable, updates: Callable = lambda n, b: -(-n // b), unit: int = 3600) -> Callable:
    """Hours with another ratio to the naive step, or another number of updates."""

    def wrong(examples: int, batch: int, naive_seconds: float, encoded: float, retained: float) -> float:
        return updates(examples, batch) * naive_seconds * ratio(encoded, retained) / unit

    return wrong


def _right_ratio(encoded: float, retained: float) -> float:
    return encoded * (1 + (1 - retained) / 3)


predict_time = Exercise(
    chapter=15,
    name="predict_time",
    spec="hours of a training by gradient caching: updates (a last batch that is not full counts) times the seconds "
    "of a naive update times rho (1 + (1 - r) / 3).",
    line_budget=3,
    oracle=_counted_hours,
    makers=(
        partial(_training, encoded=0.8, retained=0.6, rest=(0.1, 0.45)),
        partial(_training, encoded=0.5, retained=0.0, rest=(0.55, 0.9)),
        partial(_training, encoded=0.7, retained=0.4, rest=(0.0, 0.0)),
    ),
    rtol=1e-7,
    atol=0.0,
    misconceptions=(
        Misconception(
            "2 instead of 4/3",
            "It looks as if encoding twice doubled the time. A backward is two forwards, and it is not repeated: 4/3.",
            _ratio_hours(lambda encoded, retained: encoded * (2 - retained)),
        ),
        Misconception(
            "retained chunks forgotten",
            "It looks as if every token were encoded twice. The share r of them kept its graph.",
            _ratio_hours(lambda encoded, retained: encoded * 4 / 3),
        ),
        Misconception(
            "retained share the wrong way round",
            "It looks as if the retained tokens were those that are encoded twice. They are encoded once.",
            _ratio_hours(lambda encoded, retained: encoded * (1 + retained / 3)),
        ),
        Misconception(
            "padding forgotten",
            "The share rho of the padded tokens is missing: what is not encoded costs nothing.",
            _ratio_hours(lambda encoded, retained: 1 + (1 - retained) / 3),
        ),
        Misconception(
            "the naive step's time",
            "That is the naive training's time, without padding. The second forward is missing.",
            _ratio_hours(lambda encoded, retained: encoded),
        ),
        Misconception(
            "second forward of padding",
            "It looks as if the second forward were padded: rho is the share of the tokens in both forwards.",
            _ratio_hours(lambda encoded, retained: encoded + (1 - retained) / 3),
        ),
        Misconception(
            "last batch lost",
            "The last batch is not full, but it is an update: round up.",
            _ratio_hours(_right_ratio, updates=lambda n, b: n // b),
        ),
        Misconception(
            "a fraction of an update",
            "There is no fraction of an update: the last batch counts as one. Round up.",
            _ratio_hours(_right_ratio, updates=lambda n, b: n / b),
        ),
        Misconception(
            "an update for each example",
            "An update takes a whole batch: there are examples / batch of them.",
            _ratio_hours(_right_ratio, updates=lambda n, b: n),
        ),
        Misconception(
            "minutes",
            "That is in minutes; hours are asked for.",
            _ratio_hours(_right_ratio, unit=60),
        ),
        Misconception(
            "seconds",
            "That is in seconds; hours are asked for.",
            _ratio_hours(_right_ratio, unit=1),
        ),
        Misconception(
            "the naive padded time",
            "That is the naive training's time. Yours encodes the share rho of its tokens, and those that keep no "
            "graph a second time.",
            _ratio_hours(lambda encoded, retained: 1.0),
        ),
        Misconception(
            "a half for a third",
            "It looks as if a second forward were half a naive update. A backward is two forwards, so a forward is a "
            "third of an update.",
            _ratio_hours(lambda encoded, retained: encoded * (1 + (1 - retained) / 2)),
        ),
        Misconception(
            "rho in the second forward only",
            "It looks as if only the second forward were trimmed. Both encode the same chunks, and so does the "
            "backward: rho stands before all of it.",
            _ratio_hours(lambda encoded, retained: 1 + encoded * (1 - retained) / 3),
        ),
        Misconception(
            "retained share added",
            "The sign: what is retained saves a forward, 1 - r. Here it was added, 1 + r.",
            _ratio_hours(lambda encoded, retained: encoded * (1 + (1 + retained) / 3)),
        ),
        Misconception(
            "second forward subtracted",
            "The sign: a second forward takes time. Here it was taken off.",
            _ratio_hours(lambda encoded, retained: encoded * (1 - (1 - retained) / 3)),
        ),
        Misconception(
            "divided by rho",
            "It looks as if rho divided. It is the share that is left of the tokens: multiply.",
            _ratio_hours(lambda encoded, retained: (1 + (1 - retained) / 3) / encoded),
        ),
        Misconception(
            "an update too many",
            "Where the batch divides the examples nothing is left for another update: round up, and add nothing.",
            _ratio_hours(_right_ratio, updates=lambda n, b: n // b + 1),
        ),
        Misconception(
            "updates rounded to the nearest",
            "The last batch counts as an update, however small: round up, not to the nearest.",
            _ratio_hours(_right_ratio, updates=lambda n, b: round(n / b)),
        ),
    ),
    hints=(
        "How many updates are there, what does a naive one take, and what is one of yours in naive ones?",
        "updates = examples / batch, rounded up. One of yours takes rho * (1 + (1 - r) / 3) naive ones: rho is "
        "`encoded`, r is `retained`.",
        "return math.ceil(examples / batch) * naive_seconds * encoded * (1 + (1 - retained) / 3) / 3600",
    ),
)

# --- the plan -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """need(chunk_size, retain_chunks, tile_size) -> bytes of a step; chunk_size None: the naive step."""

    fixed: int
    row: int
    batch: int

    def __call__(self, chunk_size: int | None, retain_chunks: int, tile_size: int | None) -> int:
        """By this chapter's model."""
        logits = 12 * (tile_size or self.batch) ** 2
        if chunk_size is None:
            return self.fixed + 2 * self.batch * self.row + logits
        return self.fixed + max(retain_chunks * chunk_size * self.row + logits, chunk_size * self.row)


def _room_for(
    rng: np.random.Generator,
    *,
    rows: float = 0,
    share: float = 0,
    logits: bool = True,
    hundreds: int = 20,
    of: int = 100,
    over: int = 0,
) -> Inputs:
    """A budget for the graphs of `rows` rows, or a share of B of them, beside the dense logits or a tile's only.

    of: what B is a multiple of, hundreds * 100 or more. over: rows beyond that multiple.
    """
    batch = int(rng.integers(hundreds, 3 * hundreds)) * 100 // of * of + over
    row = int(rng.integers(10, 40)) * MIB if logits else int(rng.integers(2, 7)) * 1024
    need = Need(int(rng.integers(300, 900)) * MIB, row, batch)
    kept = (rows + share * batch) * rng.uniform(0.95, 1.05)
    budget = need.fixed + int(kept * row) + 12 * (batch if logits else 1024) ** 2
    return {"batch": batch, "budget": budget, "need": need}


def _exact(rng: np.random.Generator, chunk_size: int | None, most_retained: int) -> Inputs:
    """A budget that a step with this chunk takes to the byte, with R up to most_retained; small logits if that is 0."""
    inputs = _room_for(rng, hundreds=20 if most_retained else 5)
    retained = int(rng.integers(most_retained // 2, most_retained + 1))
    return inputs | {"budget": inputs["need"](chunk_size, retained, None)}


def _a_byte_short(rng: np.random.Generator) -> Inputs:
    """A budget that the dense logits alone exceed by a byte."""
    inputs = _room_for(rng, hundreds=60)
    return inputs | {"budget": inputs["need"](4, 0, None) - 1}


def _plan(batch: int, budget: int, need: Callable, **other: Any) -> dict[str, Any]:
    """The rule, with parts of it done otherwise: naive, tile, chunk, count (of the chunks), retained."""
    fits = other.get("fits", lambda size: size <= budget)
    if other.get("naive", True) and fits(need(None, 0, None)):
        return {"step": "naive", "chunk_size": None, "retain_chunks": 0, "tile_size": None}
    tile = None if fits(need(4, 0, None)) else 1024
    if "tile" in other:
        tile = other["tile"]
    sizes = [size for size in (4, 8, 16, 32, 64) if fits(need(size, 0, tile))]
    chunk = other.get("chunk", max)(sizes or [4])
    most = other.get("count", lambda batch, chunk: 2 * math.ceil(batch / chunk))(batch, chunk)
    kept = [count for count in range(most + 1) if fits(need(chunk, count, tile))]
    retained = other.get("retained", lambda kept, most: max(kept, default=0))(kept, most)
    return {"step": "grad_cache", "chunk_size": chunk, "retain_chunks": retained, "tile_size": tile}


def _reference_plan(batch: int, budget: int, need: Need) -> dict[str, Any]:
    """By counting up."""
    found: dict[str, Any] = {"step": "naive", "chunk_size": None, "retain_chunks": 0, "tile_size": None}
    if need(None, 0, None) <= budget:
        return found
    found |= {"step": "grad_cache", "chunk_size": 4, "tile_size": 1024 if need(4, 0, None) > budget else None}
    while found["chunk_size"] < 64 and need(2 * found["chunk_size"], 0, found["tile_size"]) <= budget:
        found["chunk_size"] *= 2
    while found["retain_chunks"] < 2 * -(-batch // found["chunk_size"]):
        if need(found["chunk_size"], found["retain_chunks"] + 1, found["tile_size"]) > budget:
            break
        found["retain_chunks"] += 1
    return found


plan = Exercise(
    chapter=15,
    name="plan",
    spec="a dict of step, chunk_size, retain_chunks, tile_size: 'naive' (None, 0, None) if it fits; else 'grad_cache', "
    "tile 1024 only if with dense logits not even C = 4, R = 0 fits; the largest C of 4, 8, 16, 32, 64; then the "
    "largest R.",
    line_budget=10,
    oracle=_reference_plan,
    repeats=3,
    makers=(
        partial(_room_for, rows=400),
        partial(_room_for, rows=400, logits=False),
        partial(_exact, chunk_size=64, most_retained=8),
        partial(_room_for, share=2.3),
        partial(_room_for, share=1.5),
        partial(_room_for, share=2.3, logits=False),
        partial(_room_for, share=2.3, logits=False, of=64),
        partial(_room_for, share=2.3, logits=False, of=64, over=20),  # both towers end in a chunk not half full
        *(partial(_room_for, rows=rows) for rows in (45, 11, 6)),
        *(partial(_exact, chunk_size=size, most_retained=0) for size in (None, 4, 16)),
        _a_byte_short,
    ),
    misconceptions=(
        Misconception(
            "nothing retained",
            "The rest of the card stays empty: chunks whose graph is kept are encoded once.",
            partial(_plan, retained=lambda kept, most: 0),
        ),
        Misconception(
            "everything retained",
            "All chunks are retained, whatever they take: R graphs live during the loss. Does it still fit?",
            partial(_plan, retained=lambda kept, most: most),
        ),
        Misconception(
            "smallest chunk",
            "The smallest chunk fits, but it keeps no card busy. Take the largest of the five that fits.",
            partial(_plan, chunk=min),
        ),
        Misconception(
            "tiles without need",
            "The dense logits leave room for a chunk here, and tiles compute them twice. Tile only where they do not.",
            partial(_plan, tile=1024),
        ),
        Misconception(
            "never tiled",
            "The dense logits leave no room, not even for C = 4: smaller chunks do not help against B x B.",
            partial(_plan, tile=None),
        ),
        Misconception(
            "exact fit refused",
            "A step that takes exactly the budget fits: it must be <=, not <.",
            lambda batch, budget, need: _plan(batch, budget, need, fits=lambda size: size < budget),
        ),
        Misconception(
            "more than there are chunks",
            "There are only so many chunks, 2 * ceil(batch / C). With all of them retained no more can be saved.",
            partial(_plan, count=lambda batch, chunk: 18 * math.ceil(batch / chunk)),
        ),
        Misconception(
            "the chunks of one tower",
            "It looks as if only one tower's chunks were counted. Queries and passages are both cut: 2 * ceil(batch / "
            "C) chunks.",
            partial(_plan, count=lambda batch, chunk: math.ceil(batch / chunk)),
        ),
        Misconception(
            "never naive",
            "The naive step fits here: nothing has to be encoded twice, and there is nothing to plan.",
            partial(_plan, naive=False),
        ),
        Misconception(
            "chunks rounded down",
            "A short last chunk is a chunk too: 2 * ceil(batch / C) of them can be retained.",
            partial(_plan, count=lambda batch, chunk: 2 * (batch // chunk)),
        ),
        Misconception(
            "both towers cut as one",
            "It looks as if queries and passages were cut together. Each tower has a short last chunk of its own: 2 "
            "* ceil(batch / C).",
            partial(_plan, count=lambda batch, chunk: -(-2 * batch // chunk)),
        ),
        Misconception(
            "one chunk left out",
            "It looks as if one chunk could not be retained: range leaves its end out. All 2 * ceil(batch / C) may be.",
            partial(_plan, count=lambda batch, chunk: 2 * -(-batch // chunk) - 1),
        ),
        Misconception(
            "a chunk for the naive step",
            "The naive step has no chunk: its chunk_size is None.",
            lambda batch, budget, need: {
                name: batch if name == "chunk_size" and value is None else value
                for name, value in _plan(batch, budget, need).items()
            },
        ),
    ),
    hints=(
        "Take the decisions in order: does the naive step fit? Do the dense logits leave room? Which C? Which R?",
        "tile = None if need(4, 0, None) <= budget else 1024; C: the largest of 4, 8, 16, 32, 64 with need(C, 0, tile) "
        "<= budget; then the largest R up to the number of chunks, 2 * ceil(batch / C).",
        "chunk = max(c for c in (4, 8, 16, 32, 64) if need(c, 0, tile) <= budget); retained = max(r for r in range(2 * "
        "-(-batch // chunk) + 1) if need(chunk, r, tile) <= budget)",
    ),
)

# --- the defence ----------------------------------------------------------------------------------------------


def _proposals(rng: np.random.Generator, *, survivors: bool = True, exact: bool = False, above: bool = False) -> Inputs:
    """Plans of which some are too large, too late, or see fewer negatives than they say; in any order.

    exact: one takes the card to the byte, one ends at the deadline. above: they are just beyond.
    """
    card, deadline = int(rng.integers(8, 80)), int(rng.integers(10, 60))
    batch, fine, late = int(rng.integers(5, 9)) * 256, card * 2**29, deadline * 1.4

    def proposal(step: str, size: int, chunk: int | None, peak: float, hours: float) -> dict[str, Any]:
        told = {"step": step, "batch_size": size, "chunk_size": chunk}
        return told | {"peak_bytes": int(peak), "hours": round(float(hours * rng.uniform(0.95, 1.0)), 2)}

    plans = [
        proposal("grad_cache", 4 * batch, 32, card * 1.2 * GIB, 0.3 * deadline),
        proposal("grad_cache", 3 * batch, 32, fine, late),
    ]
    if survivors:
        plans += [
            proposal("grad_cache", batch, 16, fine, 0.9 * deadline),
            proposal("grad_cache", batch, 32, 0.9 * fine, 0.8 * deadline),
            proposal("grad_cache", batch, 64, card * rng.uniform(0.95, 0.99) * GIB, 0.7 * deadline),
            proposal("accumulation", 2 * batch, int(rng.choice([128, 512])), fine, 0.6 * deadline),
            proposal("naive", batch // 8, None, fine, 0.8 * deadline),
        ]
    if exact:
        plans[-1] |= {"peak_bytes": card * GIB}
        plans[-2] |= {"hours": float(deadline)}
    if above:
        plans[-1] |= {"peak_bytes": card * GIB + 1}
        plans[-2] |= {"hours": deadline + 0.01}
    order = rng.permutation(len(plans))
    return {"plans": [plans[place] for place in order], "card_gib": card, "deadline": deadline}


def _seen(plan: dict) -> int:
    """Queries of one loss."""
    return plan["chunk_size"] if plan["step"] == "accumulation" else plan["batch_size"]


@dataclass(frozen=True)
class _Survivors:
    """The places of the plans that survive, best first; right but for the fields that are changed."""

    unit: float = GIB
    size: Callable[[int], float] = float
    in_time: bool = True
    fits: bool = True
    seen: Callable[[dict], int] = _seen
    within: Callable[[float, float], bool] = operator.le
    rank: Callable[[int, dict], tuple] = lambda seen, plan: (-seen, plan["hours"])

    def __call__(self, plans: list[dict], card_gib: int, deadline: int) -> list[int]:
        left = [
            n
            for n, plan in enumerate(plans)
            if not self.fits or self.within(self.size(plan["peak_bytes"]), card_gib * self.unit)
        ]
        left = [n for n in left if not self.in_time or self.within(plans[n]["hours"], deadline)]
        return sorted(left, key=lambda n: self.rank(self.seen(plans[n]), plans[n]))


def _among_survivors(plans: list[dict], card_gib: int, deadline: int) -> list[int]:
    """Places in the list of those that are left."""
    order = _Survivors()(plans, card_gib, deadline)
    return [sorted(order).index(place) for place in order]


def _reference_defence(plans: list[dict], card_gib: int, deadline: int) -> list[int]:
    """Struck out one by one, then the best of the rest again and again."""
    left, order = dict(enumerate(plans)), []
    for place, plan in enumerate(plans):
        if plan["peak_bytes"] / GIB > card_gib or plan["hours"] > deadline:
            del left[place]
    while left:
        sizes = {n: p["chunk_size" if p["step"] == "accumulation" else "batch_size"] for n, p in left.items()}
        most = [n for n, size in sizes.items() if size == max(sizes.values())]
        order.append(min(most, key=lambda n: left[n]["hours"]))
        del left[order[-1]]
    return order


defend = Exercise(
    chapter=15,
    name="defend",
    spec="places in `plans` of those that fit the card and keep the deadline: most negatives first, of equals the "
    "least hours (a list of ints; accumulation sees the negatives of its chunk).",
    line_budget=6,
    oracle=_reference_defence,
    makers=(
        _proposals,
        partial(_proposals, survivors=False),
        partial(_proposals, exact=True),
        partial(_proposals, above=True),
    ),
    misconceptions=(
        Misconception(
            "accumulation's batch taken for its negatives",
            "Accumulation's batch is counted as if a query met all of it. It meets its own chunk (chapter 03).",
            _Survivors(seen=lambda plan: plan["batch_size"]),
        ),
        Misconception(
            "the cached step's chunk taken for its negatives",
            "It looks as if gradient caching saw only its chunk. Its loss is computed over the whole batch: that is "
            "what the cache is for.",
            _Survivors(seen=lambda plan: plan["chunk_size"] or plan["batch_size"]),
        ),
        Misconception(
            "memory not checked",
            "One of these does not fit the card.",
            _Survivors(fits=False),
        ),
        Misconception(
            "deadline not checked",
            "One of these comes too late.",
            _Survivors(in_time=False),
        ),
        Misconception(
            "GB instead of GiB",
            "The card was counted in GB, 10^9 bytes: a plan that fits is struck out. A GiB has 2^30.",
            _Survivors(unit=1e9),
        ),
        Misconception(
            "the fastest first",
            "These are in the order of their hours. Time is what is left to choose by, where negatives are equal.",
            _Survivors(rank=lambda seen, plan: (plan["hours"], -seen)),
        ),
        Misconception(
            "the slower of equals first",
            "Of two plans with equally many negatives the faster comes first.",
            _Survivors(rank=lambda seen, plan: (-seen, -plan["hours"])),
        ),
        Misconception(
            "the smaller of equals first",
            "Of two plans with equally many negatives the one that takes less memory comes first here. Both fit: what "
            "is left to choose by is time.",
            _Survivors(rank=lambda seen, plan: (-seen, plan["peak_bytes"])),
        ),
        Misconception(
            "the fewest negatives first",
            "The order is the wrong way round: most negatives first.",
            _Survivors(rank=lambda seen, plan: (seen, plan["hours"])),
        ),
        Misconception(
            "exact fit refused",
            "A plan that takes exactly the card, or ends exactly at the deadline, stays in: it must be <=, not <.",
            _Survivors(within=operator.lt),
        ),
        Misconception(
            "not in order",
            "The right plans stay in, in the order of the list. The one whose queries see the most negatives comes "
            "first.",
            _Survivors(rank=lambda seen, plan: ()),
        ),
        Misconception(
            "equals as they stand",
            "Of two plans with equally many negatives the faster comes first. Here they stay as they stand in the "
            "list.",
            _Survivors(rank=lambda seen, plan: (-seen,)),
        ),
        Misconception(
            "the best alone",
            "That is the best of them. All that survive are asked for, best first.",
            lambda plans, card_gib, deadline: _Survivors()(plans, card_gib, deadline)[:1],
        ),
        Misconception(
            "accumulation struck out",
            "It looks as if accumulation were struck out. It fits and keeps the deadline: it stays in, with the "
            "negatives of its chunk.",
            lambda plans, card_gib, deadline: [
                n for n in _Survivors()(plans, card_gib, deadline) if plans[n]["step"] != "accumulation"
            ],
        ),
        Misconception(
            "places among the survivors",
            "Those are places in the list of the plans that are left. Asked for are places in `plans`.",
            _among_survivors,
        ),
        Misconception(
            "bytes against GiB",
            "Nothing fits, it looks as if bytes were held against GiB: a GiB has 2^30 bytes.",
            _Survivors(unit=1),
        ),
        Misconception(
            "memory rounded to whole GiB",
            "One of these does not fit: it takes a little more than the card has. Compare bytes, not whole GiB.",
            _Survivors(size=lambda peak: peak // GIB * GIB),
        ),
    ),
    hints=(
        "Strike out first, order afterwards. What must a plan keep to stay in?",
        "Keep those with peak_bytes <= card_gib * 2**30 and hours <= deadline. Sort by the queries that share a loss, "
        "largest first, then by hours. For accumulation those are chunk_size, else batch_size.",
        "sees = lambda p: p['chunk_size'] if p['step'] == 'accumulation' else p['batch_size']; return sorted(left, "
        "key=lambda n: (-sees(plans[n]), plans[n]['hours']))",
    ),
)
