"""Chapter 11, In the wild: knobs translated, MaxSim, Matryoshka, and the size of a gradient."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .engine import Exercise, Misconception, Slip
from .judging import Inputs

# --- the knobs of two libraries ---------------------------------------------------------------------------------


def _sentence_transformers(rng: np.random.Generator, *, gather: bool, tiny: bool = False) -> Inputs:
    chunk = int(rng.integers(2, 6)) * 8
    batch = int(rng.integers(2, 8)) if tiny else chunk * int(rng.integers(3, 9))
    knobs = {
        "per_device_train_batch_size": batch,
        "mini_batch_size": chunk,
        "gradient_accumulation_steps": int(rng.integers(2, 5)),
        "gather_across_devices": gather,
    }
    return {"library": "sentence-transformers", "knobs": knobs, "ranks": int(rng.integers(2, 5))}


def _open_clip(rng: np.random.Generator) -> Inputs:
    knobs = {"batch_size": int(rng.integers(2, 9)) * 16, "accum_freq": int(rng.integers(2, 6))}
    return {"library": "open_clip", "knobs": knobs, "ranks": int(rng.integers(2, 5))}


def _reference_translate(library: str, knobs: dict[str, int], ranks: int) -> dict[str, int]:
    """Counted queries: a list of the loss's queries is made, and cut into pieces."""
    if library == "open_clip":
        on_one, piece = [0] * knobs["batch_size"] * knobs["accum_freq"], knobs["batch_size"]
        return {"batch_size": len(on_one * ranks), "chunk_size": len(on_one[:piece])}
    on_one = [0] * knobs["per_device_train_batch_size"]
    whole = on_one * ranks if knobs["gather_across_devices"] else on_one
    return {"batch_size": len(whole), "chunk_size": len(on_one[: knobs["mini_batch_size"]])}


@dataclass(frozen=True)
class _Translate:
    """Right but for the fields that are changed.

    accumulate: accumulated steps count. piece: mini_batch_size taken for B. uncut: the rank's batch taken for C.
    features: open_clip's accum_freq counts. gather: whether ranks count, given
    what the knob says. capped: the most rows of a chunk. cut: open_clip's batch_size taken for B.
    """

    accumulate: bool = False
    features: bool = True
    gather: Callable[[bool], bool] = bool
    capped: Callable[[int, int], int] = lambda batch, ranks: batch
    swapped: bool = False
    cut: bool = False
    piece: bool = False
    uncut: bool = False

    def __call__(self, library: str, knobs: dict[str, int], ranks: int) -> dict[str, int]:
        if library == "open_clip":
            batch, chunk, shared = knobs["batch_size"], knobs["batch_size"], self.gather(True)
            batch *= knobs["accum_freq"] if self.features and not self.cut else 1
            chunk //= knobs["accum_freq"] if self.cut else 1
        else:
            batch, chunk = knobs["per_device_train_batch_size"], knobs["mini_batch_size"]
            batch, chunk = chunk if self.piece else batch, batch if self.uncut else chunk
            chunk = min(self.capped(batch, ranks), chunk)
            batch *= knobs["gradient_accumulation_steps"] if self.accumulate else 1
            shared = self.gather(knobs["gather_across_devices"])
        batch *= ranks if shared else 1
        names = ("chunk_size", "batch_size") if self.swapped else ("batch_size", "chunk_size")
        return dict(zip(names, (batch, chunk), strict=True))


translate = Exercise(
    chapter=11,
    name="translate",
    spec='{"batch_size": B, the queries of one loss over all ranks, "chunk_size": C, the rows encoded at once}, from '
    "the knobs of sentence-transformers' cached loss or of open_clip (which gathers).",
    line_budget=8,
    whole=True,
    oracle=_reference_translate,
    slips=(
        Slip(
            "one library's knobs asked of the other",
            "A dict was asked for a key that it does not have. Each library has its own knobs, open_clip batch_size "
            "and accum_freq alone: ask `library` first, and compare names letter by letter: 'sentence-transformers', "
            "'open_clip', and the knobs'.",
            "KeyError: '(per_device|mini_batch|gradient_acc|gather|batch_size|accum)",
        ),
    ),
    makers=(
        partial(_sentence_transformers, gather=True),
        partial(_sentence_transformers, gather=False),
        _open_clip,
        partial(_sentence_transformers, gather=True, tiny=True),
    ),
    misconceptions=(
        Misconception(
            "accumulated steps counted",
            "It looks as if gradient_accumulation_steps made the batch bigger. It adds up gradients of losses that do "
            "not see each other: a query has no more negatives for it (chapter 03).",
            _Translate(accumulate=True),
        ),
        Misconception(
            "batch and chunk swapped",
            "The two sizes are the wrong way round. The chunk (mini_batch_size, or open_clip's batch_size) is what is "
            "encoded at once; the batch is what one loss sees.",
            _Translate(swapped=True),
        ),
        Misconception(
            "ranks forgotten",
            "It looks as if only one rank's queries counted. Where representations are gathered, the loss is over all "
            "ranks' queries.",
            _Translate(gather=lambda told: False),
        ),
        Misconception(
            "ranks without gathering",
            "It looks as if the ranks always counted. Without gather_across_devices every rank has a loss of its own.",
            _Translate(gather=lambda told: True),
        ),
        Misconception(
            "accum_freq taken for accumulation",
            "It looks as if --accum-freq left the loss as it is. open_clip keeps the representations of all accum_freq "
            "batches, and each loss that it takes is over all of them: there the batch grows.",
            _Translate(features=False),
        ),
        Misconception(
            "open_clip's batch_size taken for the batch",
            "It looks as if open_clip's batch_size were the whole batch, cut into accum_freq chunks. It is the other "
            "way round: batch_size is one chunk, and accum_freq of them make the batch of a rank.",
            _Translate(cut=True),
        ),
        Misconception(
            "chunk larger than the batch",
            "A chunk cannot have more rows than the batch of its rank: mini_batch_size is an upper limit.",
            _Translate(capped=lambda batch, ranks: sys.maxsize),
        ),
        Misconception(
            "chunk capped by all ranks' queries",
            "It looks as if the chunk were held against the queries of all ranks. A rank encodes its own rows alone: "
            "its chunk has at most per_device_train_batch_size of them.",
            _Translate(capped=lambda batch, ranks: batch * ranks),
        ),
        Misconception(
            "mini_batch_size taken for the batch",
            "It looks as if mini_batch_size were the loss's batch. The cached loss goes over all of "
            "per_device_train_batch_size; mini_batch_size is the chunk.",
            _Translate(piece=True),
        ),
        Misconception(
            "the rank's batch taken for the chunk",
            "It looks as if a rank encoded its whole batch at once. The cached loss encodes mini_batch_size rows at "
            "a time.",
            _Translate(uncut=True),
        ),
        Misconception(
            "chunks of all ranks together",
            "It looks as if the ranks' chunks were added up. Each rank encodes its own: asked for are the rows of one.",
            lambda library, knobs, ranks: {
                name: size * (ranks if name == "chunk_size" else 1)
                for name, size in _Translate()(library, knobs, ranks).items()
            },
        ),
    ),
    hints=(
        "For each knob ask: does it change which passages a query is compared with, or only what is encoded at once?",
        "open_clip: C = batch_size, B = batch_size * accum_freq * ranks. sentence-transformers: C = mini_batch_size, "
        "at most the batch of a rank; B = that batch, times ranks if gathered.",
        'if library == "open_clip": C, B = knobs["batch_size"], knobs["batch_size"] * knobs["accum_freq"] * ranks; '
        'else: B = knobs["per_device_train_batch_size"], C = min(B, knobs["mini_batch_size"]), then B *= ranks if '
        'knobs["gather_across_devices"].',
    ),
)

# --- MaxSim -----------------------------------------------------------------------------------------------------


def _tokens(rng: np.random.Generator, padded: bool) -> Inputs:
    """Vectors whose products are mostly negative, so that padding (zeros) would win a careless maximum.

    Their lengths differ: products go well below -10, so that neither -1 nor -10 is a stand-in for -inf.
    """
    shape = {"rows": int(rng.integers(3, 6)), "more": int(rng.integers(6, 9)), "D": 4}
    made = []
    for rows, width, sign in (
        (shape["rows"], int(rng.integers(4, 7)), 1),
        (shape["more"], int(rng.integers(7, 10)), -1),
    ):
        raw = torch.from_numpy(rng.standard_normal((rows, width, shape["D"])))
        raw[..., 0] += 2.0 * sign
        mask = torch.ones(rows, width, dtype=torch.int64)
        if padded:
            lengths = torch.from_numpy(rng.integers(2, width, (rows, 1)))
            mask = (torch.arange(width) < lengths).long()
        raw = F.normalize(raw, dim=-1) * torch.from_numpy(rng.uniform(8.0, 12.0, (rows, width, 1)))
        made.append((raw * (mask.unsqueeze(-1) if padded and sign < 0 else 1), mask))
    (queries, query_mask), (passages, passage_mask) = made
    names = ("query_tokens", "passage_tokens", "query_mask", "passage_mask")
    return dict(zip(names, (queries, passages, query_mask, passage_mask), strict=True))


def _reference_max_sim(
    query_tokens: Tensor, passage_tokens: Tensor, query_mask: Tensor, passage_mask: Tensor
) -> Tensor:
    """Pair by pair, with the padding cut off first."""
    rows = []
    for query, seen in zip(query_tokens, query_mask.bool(), strict=True):
        row = [
            (query[seen] @ passage[kept].T).max(dim=1).values.sum()
            for passage, kept in zip(passage_tokens, passage_mask.bool(), strict=True)
        ]
        rows.append(torch.stack(row))
    return torch.stack(rows)


@dataclass(frozen=True)
class _MaxSim:
    """Right but for the fields that are changed. fill: what stands at the passages' padding before the maximum."""

    mask_queries: bool = True
    mask_passages: bool = True
    of_passages: bool = False
    mean: bool = False
    last: str = "max"
    fill: float = torch.finfo(torch.float64).min
    unit: bool = False

    def __call__(self, queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
        if self.unit:
            queries, passages = F.normalize(queries, dim=-1), F.normalize(passages, dim=-1)
        grid = torch.einsum("isd,jtd->ijst", queries, passages)
        rows, columns = query_mask.bool()[:, None, :], passage_mask.bool()[None, :, :]
        if self.of_passages:
            grid, rows, columns = grid.transpose(2, 3), columns, rows
        if self.mask_passages:
            grid = torch.where(columns.unsqueeze(2), grid, self.fill if self.last == "max" else 0.0)
        best = grid.amax(dim=3) if self.last == "max" else grid.sum(dim=3)
        best = torch.where(rows, best, 0.0) if self.mask_queries else best
        return best.sum(dim=2) / rows.sum(dim=2) if self.mean else best.sum(dim=2)


def _grid(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor, *, fill: float) -> Tensor:
    """All products (B, N, Tq, Tp), with `fill` wherever one of the two is padding."""
    seen = query_mask.bool()[:, None, :, None] & passage_mask.bool()[None, :, None, :]
    return torch.where(seen, torch.einsum("isd,jtd->ijst", queries, passages), fill)


def _pooled(tokens: Tensor, mask: Tensor) -> Tensor:
    """The mean of a text's tokens."""
    return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


max_sim = Exercise(
    chapter=11,
    name="max_sim",
    spec="(B, N) scores: for each query token that is no padding the largest dot product with a passage token that is "
    "no padding, added up over the query's tokens.",
    line_budget=4,
    oracle=_reference_max_sim,
    makers=(partial(_tokens, padded=True), partial(_tokens, padded=False)),
    differentiable=True,
    rtol=1e-8,
    atol=1e-9,
    misconceptions=(
        Misconception(
            "passage padding wins",
            "It looks as if the passages' padding took part in the maximum. A padded token is a zero vector, and 0 is "
            "larger than any negative product: fill with -inf before the maximum.",
            _MaxSim(mask_passages=False),
        ),
        Misconception(
            "query padding counted",
            "It looks as if the queries' padded tokens were added up too. They are not part of the text: leave them "
            "out of the sum.",
            _MaxSim(mask_queries=False),
        ),
        Misconception(
            "no mask at all",
            "It looks as if neither mask was used. Padding must neither win a maximum nor be added up.",
            _MaxSim(mask_queries=False, mask_passages=False),
        ),
        Misconception(
            "maximum over the query",
            "The other way round: that is each passage token's best query token, added up over the passage. The "
            "sum would grow with the passage's length, not with the query's.",
            _MaxSim(of_passages=True),
        ),
        Misconception(
            "mean over the query",
            "That is the mean over the query's tokens; ColBERT adds up. Within one query's row it changes no ranking, "
            "but it is another temperature for each query.",
            _MaxSim(mean=True),
        ),
        Misconception(
            "all pairs added up",
            "It looks as if all products were added up. Each query token keeps its best passage token alone.",
            _MaxSim(last="sum"),
        ),
        Misconception(
            "padding filled with -1",
            "It looks as if padding were set to -1 before the maximum. That is low enough for unit vectors alone; "
            "products of others are lower still. -inf always is.",
            _MaxSim(fill=-1.0),
        ),
        Misconception(
            "tokens made unit vectors",
            "It looks as if the tokens were made unit vectors first. They come as they are to be compared: by their "
            "dot products.",
            _MaxSim(unit=True),
        ),
        Misconception(
            "padding filled with -10",
            "It looks as if padding were set to -10 before the maximum, or 10 taken off. Products of tokens may be "
            "lower still. -inf always is.",
            _MaxSim(fill=-10.0),
        ),
        Misconception(
            "largest of all pairs",
            "It looks as if the maximum went over all pairs of tokens. Each query token keeps its own best, and "
            "these are added up.",
            lambda q, p, q_mask, p_mask: _grid(q, p, q_mask, p_mask, fill=-torch.inf).amax((2, 3)),
        ),
        Misconception(
            "mean over the passage",
            "It looks as if a query token were held against the mean of the passage's tokens. It keeps the best one.",
            lambda q, p, q_mask, p_mask: (
                _grid(q, p, q_mask, p_mask, fill=0.0).sum(3) / p_mask.sum(1)[None, :, None]
            ).sum(2),
        ),
        Misconception(
            "pooled first",
            "It looks as if each text were pooled to one vector first. MaxSim keeps a vector a token.",
            lambda q, p, q_mask, p_mask: _pooled(q, q_mask) @ _pooled(p, p_mask).T,
        ),
        Misconception(
            "own passage alone",
            "Those are the scores of each query with its own passage. Every query is held against every passage: (B, "
            "N).",
            lambda q, p, q_mask, p_mask: _MaxSim()(q, p, q_mask, p_mask).diagonal(),
        ),
        Misconception(
            "passages by queries",
            "The scores stand the other way round, (N, B). Rows are queries.",
            lambda q, p, q_mask, p_mask: _MaxSim()(q, p, q_mask, p_mask).T,
        ),
        Misconception(
            "without a sign",
            "It looks as if the size of a product counted, whatever its sign. Opposite tokens are unlike.",
            lambda q, p, q_mask, p_mask: _grid(q, p, q_mask, p_mask, fill=0.0).abs().amax(3).sum(2),
        ),
    ),
    hints=(
        "Make all products first: a tensor (B, N, Tq, Tp). Which of its axes is maximised, which added up?",
        "einsum('isd,jtd->ijst'), fill padded t with -inf, amax over t, times the query's mask, sum over s.",
        "z = torch.einsum('isd,jtd->ijst', query_tokens, passage_tokens); z = z.masked_fill(passage_mask[None, :, "
        "None] == 0, -torch.inf); return (z.amax(3) * query_mask[:, None]).sum(2)",
    ),
)

# --- Matryoshka -------------------------------------------------------------------------------------------------


def _nested(rng: np.random.Generator, *, whole: bool = True) -> Inputs:
    """Three lengths, upwards and with the whole vector, or in any order and without it."""
    rows, width = int(rng.integers(4, 8)), 16
    reps = [torch.from_numpy(rng.standard_normal((rows, width))) for _ in range(2)]
    dims = [int(rng.integers(2, 5)), int(rng.integers(6, 11)), width if whole else int(rng.integers(12, width))]
    if not whole:
        order = rng.permutation(3)
        dims = [dims[place] for place in np.roll(order, int(order[-1] == 2))]  # the largest is not the last
    return {"query_reps": reps[0], "passage_reps": reps[1], "dims": dims, "loss_fn": InfoNCE(0.2)}


@dataclass(frozen=True)
class InfoNCE:
    """The loss that the exercise is given, of the vectors as they are; a message shows what it is."""

    temperature: float

    def __call__(self, queries: Tensor, passages: Tensor) -> Tensor:
        """(B, D) and (B, D) -> scalar."""
        return F.cross_entropy(queries @ passages.T / self.temperature, torch.arange(len(queries)))


def _reference_matryoshka(queries: Tensor, passages: Tensor, dims: Sequence[int], loss_fn: Callable) -> Tensor:
    total = queries.new_zeros(())
    for dim in dims:
        shorter = [rep.narrow(1, 0, dim) for rep in (queries, passages)]
        total = total + loss_fn(*(rep / rep.square().sum(dim=1, keepdim=True).sqrt() for rep in shorter))
    return total


def _matryoshka(
    queries: Tensor,
    passages: Tensor,
    dims: Sequence[int],
    loss_fn: Callable,
    *,
    part: Callable[[int, int], slice] = lambda before, dim: slice(dim),
    unit: bool = True,
    along: int = 1,
    mean: bool = False,
) -> Tensor:
    """Right but for what is named. part: the columns for one dim, given the one before; along: the normalised axis."""
    losses = []
    for before, dim in zip([0, *dims], dims, strict=False):
        shorter = [rep[:, part(before, dim)] for rep in (queries, passages)]
        losses.append(loss_fn(*(F.normalize(rep, dim=along) if unit else rep for rep in shorter)))
    return sum(losses) / (len(dims) if mean else 1)


def _cut_after_normalising(queries: Tensor, passages: Tensor, dims: Sequence[int], loss_fn: Callable) -> Tensor:
    units = [F.normalize(rep, dim=1) for rep in (queries, passages)]
    return sum(loss_fn(*(rep[:, :dim] for rep in units)) for dim in dims)


def _cut_again(queries: Tensor, passages: Tensor, dims: Sequence[int], loss_fn: Callable) -> Tensor:
    """Each prefix of the one before, in the order of dims."""
    total = 0.0
    for dim in dims:
        queries, passages = (F.normalize(rep[:, :dim], dim=1) for rep in (queries, passages))
        total = total + loss_fn(queries, passages)
    return total


def _cut_rows(queries: Tensor, passages: Tensor, dims: Sequence[int], loss_fn: Callable) -> Tensor:
    return sum(loss_fn(*(F.normalize(rep[:dim], dim=1) for rep in (queries, passages))) for dim in dims)


matryoshka_loss = Exercise(
    chapter=11,
    name="matryoshka_loss",
    spec="the sum over `dims` of loss_fn(queries, passages), each cut to its first dim numbers and made unit vectors "
    "again (a scalar tensor).",
    line_budget=3,
    oracle=_reference_matryoshka,
    makers=(_nested, partial(_nested, whole=False)),
    repeats=4,
    differentiable=True,
    rtol=1e-8,
    atol=1e-9,
    misconceptions=(
        Misconception(
            "prefix not made a unit vector",
            "It looks as if the prefixes went into the loss as they are. Their lengths differ, so a dot product is no "
            "cosine any more: normalise each prefix.",
            partial(_matryoshka, unit=False),
        ),
        Misconception(
            "normalised before cutting",
            "It looks as if the whole vector was normalised and then cut. What is left is shorter than 1, and differs "
            "from row to row: cut first.",
            _cut_after_normalising,
        ),
        Misconception(
            "bands, not prefixes",
            "It looks as if each loss saw only the numbers between two dims. The prefixes are nested, like the dolls: "
            "each starts at 0.",
            partial(_matryoshka, part=lambda before, dim: slice(before, dim)),
        ),
        Misconception(
            "the last numbers",
            "It looks as if the last numbers were taken. The first ones must be able to stand alone: [:, :dim].",
            partial(_matryoshka, part=lambda before, dim: slice(-dim, None)),
        ),
        Misconception(
            "mean over the prefixes",
            "That is the mean over the prefixes. Equation (1) adds them up (weights of 1): the gradient is as many "
            "times larger, which a learning rate tuned for one notices.",
            partial(_matryoshka, mean=True),
        ),
        Misconception(
            "only the whole vector",
            "It looks as if only the last entry of dims was trained: nothing asks the other prefixes to be good alone.",
            lambda queries, passages, dims, loss_fn: _matryoshka(queries, passages, dims[-1:], loss_fn),
        ),
        Misconception(
            "the whole vector left out",
            "It looks as if the last entry of dims were left out: it is a prefix, too, be it the whole vector.",
            lambda queries, passages, dims, loss_fn: _matryoshka(queries, passages, dims[:-1], loss_fn),
        ),
        Misconception(
            "rows cut, not columns",
            "It looks as if the first rows were taken: rep[:dim] cuts the batch. The dimensions are the columns: "
            "rep[:, :dim].",
            _cut_rows,
        ),
        Misconception(
            "normalised along the batch",
            "It looks as if columns were made unit vectors (dim=0). A representation is a row: dim=1.",
            partial(_matryoshka, along=0),
        ),
        Misconception(
            "only the largest prefix",
            "It looks as if only the largest of dims were trained: nothing asks the shorter ones to be good alone.",
            lambda queries, passages, dims, loss_fn: _matryoshka(queries, passages, [max(dims)], loss_fn),
        ),
        Misconception(
            "one tower made unit vectors",
            "It looks as if only the queries' prefixes were made unit vectors again. The passages' need it too.",
            lambda queries, passages, dims, loss_fn: sum(
                loss_fn(F.normalize(queries[:, :dim], dim=1), passages[:, :dim]) for dim in dims
            ),
        ),
        Misconception(
            "weighted by their length",
            "It looks as if each prefix were weighted by its length. They all have weight 1.",
            lambda queries, passages, dims, loss_fn: sum(
                dim / max(dims) * _matryoshka(queries, passages, [dim], loss_fn) for dim in dims
            ),
        ),
        Misconception(
            "cut from what was cut",
            "It looks as if each prefix were cut from the one before, which overwrote the representations. Each is "
            "cut from the whole.",
            _cut_again,
        ),
        Misconception(
            "cut from what was cut, the shortest first",
            "It looks as if the lengths were sorted, and each prefix cut from the one before, which overwrote the "
            "representations. Each is cut from the whole.",
            lambda queries, passages, dims, loss_fn: _cut_again(queries, passages, sorted(dims), loss_fn),
        ),
        Misconception(
            "one length for the whole batch",
            "It looks as if the batch were divided by one length, that of the whole matrix. Each row is made a unit "
            "vector: dim=1.",
            lambda queries, passages, dims, loss_fn: sum(
                loss_fn(*(rep[:, :dim] / rep[:, :dim].norm() for rep in (queries, passages))) for dim in dims
            ),
        ),
    ),
    hints=(
        "One loss for each entry of dims. What does the loss need that a piece of a unit vector is not?",
        "For each dim: rep[:, :dim] of both, F.normalize(..., dim=1), loss_fn of the two; add up.",
        "return sum(loss_fn(F.normalize(query_reps[:, :d], dim=1), F.normalize(passage_reps[:, :d], dim=1)) for d in "
        "dims)",
    ),
)

# --- the size of a gradient -------------------------------------------------------------------------------------


def _gradients(rng: np.random.Generator, low: float, high: float) -> Inputs:
    """found = s times expected, and something that points elsewhere."""
    right = torch.from_numpy(rng.standard_normal(int(rng.integers(20, 40))))
    aside = torch.from_numpy(rng.standard_normal(len(right)))
    aside -= (aside @ right) / (right @ right) * right
    size = float(rng.uniform(low, high)) * (1 if rng.random() < 0.8 else -1)
    return {"found": size * right + float(rng.uniform(0.5, 1.5)) * aside, "expected": right}


def _reference_scale(found: Tensor, expected: Tensor) -> float:
    """Least squares by numpy."""
    return float(np.linalg.lstsq(expected.numpy()[:, None], found.numpy(), rcond=None)[0][0])


gradient_scale = Exercise(
    chapter=11,
    name="gradient_scale",
    spec="the number s that brings s * expected nearest to found, both flat vectors (a float).",
    line_budget=2,
    oracle=_reference_scale,
    makers=(partial(_gradients, low=2.0, high=64.0), partial(_gradients, low=0.1, high=0.7)),
    rtol=1e-7,
    atol=1e-9,
    misconceptions=(
        Misconception(
            "cosine",
            "That is the cosine of the angle between them: it is 1 for a gradient that is 64 times too large.",
            lambda found, expected: float(F.cosine_similarity(found, expected, dim=0)),
        ),
        Misconception(
            "ratio of lengths",
            "That is the ratio of the lengths. It counts what points elsewhere, and cannot see a wrong sign.",
            lambda found, expected: float(found.norm() / expected.norm()),
        ),
        Misconception(
            "the other way round",
            "It looks as if found and expected changed places: that brings `found` near to `expected`.",
            lambda found, expected: float(found @ expected / (found @ found)),
        ),
        Misconception(
            "mean of the ratios",
            "That is the mean of the ratios of single entries: entries near zero decide it, and they are noise.",
            lambda found, expected: float((found / expected).mean()),
        ),
        Misconception(
            "divided by the length alone",
            "Divide by <expected, expected>, the length squared: by the length alone, the answer depends on how large "
            "the right gradient is.",
            lambda found, expected: float(found @ expected / expected.norm()),
        ),
        Misconception(
            "upside down",
            "That is 1 / s: the fraction stands on its head.",
            lambda found, expected: float(expected @ expected / (found @ expected)),
        ),
        Misconception(
            "ratio of the sums",
            "That is the ratio of the sums (or of the means) of the entries. A sum is one direction of many, and the "
            "two gradients may well agree in it and nowhere else.",
            lambda found, expected: float(found.sum() / expected.sum()),
        ),
        Misconception(
            "one entry's ratio",
            "That is the ratio of the first entries. One entry of many, and it may be noise.",
            lambda found, expected: float(found[0] / expected[0]),
        ),
        Misconception(
            "never divided",
            "That is <found, expected> alone: it grows with both of them. Divide by <expected, expected>.",
            lambda found, expected: float(found @ expected),
        ),
        Misconception(
            "relative error",
            "That is how far apart they are, over the length of `expected`. Asked for is the factor between them.",
            lambda found, expected: float((found - expected).norm() / expected.norm()),
        ),
        Misconception(
            "distance",
            "That is how far apart they are. Asked for is the factor between them.",
            lambda found, expected: float((found - expected).norm()),
        ),
        Misconception(
            "rounded",
            "The factor was rounded to a whole number. It need not be one.",
            lambda found, expected: round(_reference_scale(found, expected)),
        ),
        Misconception(
            "ratio of squared lengths",
            "That is the ratio of the squared lengths. It counts what points elsewhere, and it is the square of a "
            "factor.",
            lambda found, expected: float(found @ found / (expected @ expected)),
        ),
        Misconception(
            "median of the ratios",
            "That is the median of the ratios of single entries. Least squares weighs each by its size.",
            lambda found, expected: float((found / expected).median()),
        ),
        Misconception(
            "ratio of mean sizes",
            "That is the ratio of the mean sizes. It counts what points elsewhere, and cannot see a wrong sign.",
            lambda found, expected: float(found.abs().mean() / expected.abs().mean()),
        ),
        Misconception(
            "ratio of the largest",
            "That is the ratio of the largest entries. It cannot see a wrong sign, and it rests on two entries.",
            lambda found, expected: float(found.abs().max() / expected.abs().max()),
        ),
    ),
    hints=(
        "Minimise ||found - s expected||^2 in s. Where is its derivative zero?",
        "-2 <expected, found> + 2 s <expected, expected> = 0.",
        "return float(found @ expected / (expected @ expected))",
    ),
)
