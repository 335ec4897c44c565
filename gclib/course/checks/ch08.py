"""Chapter 08's exercises: the log-sum-exp of tiles, the loss of tiles, a tile's gradient, and where the wall stands.

Letters: B queries and as many passages, S the side of a tile, R x C the sides of one (the last may be short), z logits.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .engine import Exercise, Misconception
from .judging import Inputs

FEW = 3  # tiles that a loop may hold at once: the last one, the next one, and one in the making


class TileCounter:
    """How many tiles were made, and how many of them were held at once: a tile counts until its last view is gone."""

    def __init__(self):
        self.made_so_far = self.most = 0
        self._storages: list[weakref.ref] = []

    def made(self, tile: Tensor) -> Tensor:
        """Count the tile, which owns its storage, and return it."""
        self._storages = [held for held in self._storages if held() is not None]
        self._storages.append(weakref.ref(tile.untyped_storage()))
        self.made_so_far += 1
        self.most = max(self.most, len(self._storages))
        return tile

    def __deepcopy__(self, memo: dict) -> "TileCounter":
        return TileCounter()


def _held(counter: TileCounter) -> str:
    """In words, so that it does not matter which few of them a loop holds."""
    return "a few" if counter.most <= FEW else "too many"


# --- the log-sum-exp of tiles ---------------------------------------------------------------------------------


class Tiles:
    """Rows of logits that come a tile (R, C) at a time; each tile is made when it is asked for."""

    def __init__(self, logits: Tensor, width: int):
        self.logits, self.width = logits, width
        self.counter = TileCounter()

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.logits.shape[1], self.width):
            yield self.counter.made(self.logits[:, start : start + self.width].clone())

    def __repr__(self) -> str:
        return f"{len(self.logits)} rows of {self.logits.shape[1]} logits, {self.width} columns a tile"


def _rows_of_logits(rng: np.random.Generator, *, low: float, high: float, tiles: int = 6, short: int = 1) -> Inputs:
    """Logits from low to high. The largest of all stands in the last tile, so that every maximum so far is passed."""
    rows, width = int(rng.integers(3, 6)), int(rng.integers(3, 5))
    logits = rng.uniform(low, high, (rows, tiles * width - short))
    logits = np.sort(logits, axis=1)
    return {"tiles": Tiles(torch.from_numpy(logits), width), "rows": rows}


def _rows_far_apart(rng: np.random.Generator) -> Inputs:
    """Rows that fall from 600 to -600, tile by tile, and rows in between that rise from 800 to 2000."""
    inputs = _rows_of_logits(rng, low=-600, high=600)
    logits = inputs["tiles"].logits
    logits[::2] = logits[::2].flip(1)
    logits[1::2] += 1400
    return inputs


def _tiles_of_extremes(rng: np.random.Generator) -> Inputs:
    """In every tile one logit far below the others: neither their least nor their mean can stand in for the largest."""
    inputs = _rows_of_logits(rng, low=-3, high=3)
    tiles = inputs["tiles"]
    tiles.logits[:, :: tiles.width] -= 5000
    return inputs


def _reference_log_sum_exp(tiles: Tiles, rows: int) -> Tensor:
    """With numpy, from all logits at once; then it is noted that each tile is to be taken once."""
    values = tiles.logits.numpy()
    tiles.counter.made_so_far = -(-values.shape[1] // tiles.width)
    highest = values.max(axis=1, keepdims=True)
    return torch.from_numpy(highest[:, 0] + np.log(np.exp(values - highest).sum(axis=1)))


def _fold(tiles: Tiles, rows: int, step: Callable, *, start: tuple[float, float], end: Callable) -> Tensor:
    """maximum and total from `start`, merged by `step`, told by `end`."""
    maximum, total = (torch.full((rows,), value, dtype=torch.float64) for value in start)
    for tile in tiles:
        maximum, total = step(maximum, total, tile)
    return end(maximum, total)


def _merge(
    maximum: Tensor,
    total: Tensor,
    tile: Tensor,
    *,
    newest: Callable = lambda maximum, tile: torch.maximum(maximum, tile.amax(1)),
    factor: Callable = lambda old, new: torch.exp(old - new),
) -> tuple[Tensor, Tensor]:
    highest = newest(maximum, tile)
    return highest, total * factor(maximum, highest) + torch.exp(tile - highest[:, None]).sum(1)


def _merged(
    tiles: Tiles,
    rows: int,
    *,
    start: tuple[float, float] = (-math.inf, 0.0),
    end: Callable = lambda maximum, total: maximum + total.log(),
    **merging: Callable,
) -> Tensor:
    """Right but for what is named."""
    return _fold(tiles, rows, partial(_merge, **merging), start=start, end=end)


def _in_two_passes(tiles: Tiles, rows: int) -> Tensor:
    """The largest logits first, then the sums: every tile twice."""
    highest = torch.stack([tile.amax(1) for tile in tiles]).amax(0)
    return highest + sum((tile - highest[:, None]).exp().sum(1) for tile in tiles).log()


def _of_each(tiles: Tiles, rows: int) -> Tensor:
    """Each tile's own log-sum-exps, (tiles, rows)."""
    return torch.stack([tile.logsumexp(1) for tile in tiles])


def _kept_apart(tiles: Tiles, rows: int, *, then: Callable[[Tensor], Tensor]) -> Tensor:
    """What becomes of the tiles' own log-sum-exps, without holding a tile."""
    return then(_of_each(tiles, rows))


def _sum_of_exponentials(tiles: Tiles, rows: int) -> Tensor:
    return sum(tile.exp().sum(1) for tile in tiles).log()


def _first_maximum(tiles: Tiles, rows: int) -> Tensor:
    """The first tile's maximum for all of them."""
    highest, total = None, 0.0
    for tile in tiles:
        highest = tile.amax(1) if highest is None else highest
        total = total + (tile - highest[:, None]).exp().sum(1)
    return highest + total.log()


def _rescaled_up(tiles: Tiles, rows: int) -> Tensor:
    """The first tile taken as it is, and the total multiplied by exp(new - old) after it."""
    highest = total = None
    for tile in tiles:
        newest = tile.amax(1) if highest is None else torch.maximum(highest, tile.amax(1))
        part = (tile - newest[:, None]).exp().sum(1)
        total = part if total is None else total * (newest - highest).exp() + part
        highest = newest
    return highest + total.log()


def _log_mean_exp(tiles: Tiles, rows: int) -> Tensor:
    sums = [(tile.logsumexp(1), tile.shape[1]) for tile in tiles]
    return torch.stack([found for found, _ in sums]).logsumexp(0) - math.log(sum(columns for _, columns in sums))


def _fold_outcome(result: Any, tiles: Tiles, rows: int) -> dict[str, Any]:
    if result is None:
        return {"log-sum-exps": None}
    counter = tiles.counter
    return {"log-sum-exps": result, "tiles held at once": _held(counter), "tiles taken": counter.made_so_far}


online_log_sum_exp = Exercise(
    chapter=8,
    name="online_log_sum_exp",
    spec="log of the sum of exp over all logits of a row, (rows,), from tiles that come one after the other and are "
    "taken once; without torch's logsumexp, logaddexp, softmax and log_softmax.",
    line_budget=7,
    oracle=_reference_log_sum_exp,
    makers=(
        partial(_rows_of_logits, low=-3, high=3),
        partial(_rows_of_logits, low=800, high=1600, short=0),
        partial(_rows_of_logits, low=-1600, high=-800),
        partial(_rows_of_logits, low=-5000, high=-4000),
        partial(_rows_of_logits, low=4000, high=5000, short=2),
        _rows_far_apart,
        _tiles_of_extremes,
    ),
    outcome=_fold_outcome,
    may_change=frozenset({"tiles"}),  # what it counts
    without=frozenset({"logsumexp", "logaddexp", "log_softmax", "softmax"}),
    rtol=1e-9,
    atol=1e-9,
    misconceptions=(
        Misconception(
            "merge started at 0",
            "It looks as if the log-sum-exp of nothing were 0. exp(0) = 1, so that counts one logit of 0 that nobody "
            "has. Nothing yet is a sum of 0, whose logarithm is minus infinity.",
            partial(_merged, start=(0.0, 1.0)),
        ),
        Misconception(
            "maximum started at -1,000",
            "Right as long as a logit is not far below -1,000. Logits go down to -5,000, and a maximum that nobody has "
            "makes all their exponentials 0: start it at minus infinity.",
            partial(_merged, start=(-1000.0, 0.0)),
        ),
        Misconception(
            "maximum started at 0",
            "Right as long as a logit is near 0 or above. Where all are very negative, a maximum that nobody has, such "
            "as 0, makes every exponential 0: start the maximum at minus infinity.",
            partial(_merged, start=(0.0, 0.0)),
        ),
        Misconception(
            "exponentials without the maximum",
            "Right for small logits only: exp of a large logit is infinite, and of a very negative one 0. Take the "
            "largest logit so far off before exp, and add it again at the end.",
            _sum_of_exponentials,
        ),
        Misconception(
            "old total not rescaled",
            "It looks as if the old total were kept as it is when the maximum grows. It was counted in units of "
            "exp(old maximum): multiply it by exp(old maximum - new maximum).",
            partial(_merged, factor=lambda old, new: 1.0),
        ),
        Misconception(
            "rescaled the wrong way round",
            "NaN on all of these inputs: infinity times 0, or infinity less infinity, at the first tiles. The maximum "
            "begins at minus infinity and the total at 0; the old total is multiplied by exp(old - new), which is 0 at "
            "first (exp(new - old) is infinite), and the new maximum is kept.",
            partial(_merged, factor=lambda old, new: torch.exp(new - old)),
        ),
        Misconception(
            "one maximum for all rows",
            "Right only while the rows are alike. One maximum, the largest of all rows, makes every exponential of a "
            "row far below it 0. Each row needs a maximum of its own: tile.amax(1).",
            partial(_merged, newest=lambda maximum, tile: torch.maximum(maximum, tile.amax())),
        ),
        Misconception(
            "the tile's own maximum",
            "It looks as if each tile's maximum replaced the one before. Where a later tile is lower, the old total is "
            "multiplied by exp(old - new), which overflows. The maximum never falls: torch.maximum(old, the tile's).",
            partial(_merged, newest=lambda maximum, tile: tile.amax(1)),
        ),
        Misconception(
            "log-sum-exps added",
            "It looks as if the tiles' log-sum-exps were added. Sums add up, their logarithms don't.",
            partial(_kept_apart, then=lambda each: each.sum(0)),
        ),
        Misconception(
            "log of the sum of the log-sum-exps",
            "It looks as if the logarithm were taken twice: of the sum of the log-sum-exps. Undo the inner one, with "
            "exp, before anything is added.",
            partial(_kept_apart, then=lambda each: each.sum(0).log()),
        ),
        Misconception(
            "largest tile alone",
            "It looks as if the largest of the tiles' log-sum-exps were taken. The other tiles are in the sum too.",
            partial(_kept_apart, then=lambda each: each.amax(0)),
        ),
        Misconception(
            "mean of the tiles",
            "It looks as if the tiles' log-sum-exps were averaged. Their exponentials are to be added.",
            partial(_kept_apart, then=lambda each: each.mean(0)),
        ),
        Misconception(
            "maximum not added again",
            "That is the logarithm of the total alone. The maximum was taken off every logit: add it again.",
            partial(_merged, end=lambda maximum, total: total.log()),
        ),
        Misconception(
            "maximum alone",
            "That is the largest logit. The log-sum-exp is a little more: the others are in the sum too.",
            partial(_merged, end=lambda maximum, total: maximum),
        ),
        Misconception(
            "two passes",
            "The value is right, but every tile was taken twice (once for the largest logit, say, and once for the "
            "sum). In a loss that doubles the products. Keep a running maximum, and rescale the total when it grows.",
            _in_two_passes,
        ),
        Misconception(
            "all tiles at once",
            "The value is right, but all tiles were held together: that is the whole row again, and its memory. Keep "
            "two numbers a row, and let each tile go.",
            lambda tiles, rows: torch.cat(list(tiles), dim=1).logsumexp(1),
        ),
        Misconception(
            "maximum of the first tile",
            "Right as long as no later logit is far above the first tile's largest. A later tile may be: the maximum "
            "has to run with it.",
            _first_maximum,
        ),
        Misconception(
            "rescaled the wrong way round, after the first tile",
            "It looks as if the old total were multiplied by exp(new maximum - old maximum). It gets smaller when "
            "the maximum grows: exp(old - new).",
            _rescaled_up,
        ),
        Misconception(
            "first tile alone",
            "That is the log-sum-exp of the first tile: does `return` stand inside the loop?",
            lambda tiles, rows: next(iter(tiles)).logsumexp(1),
        ),
        Misconception(
            "last tile alone",
            "That is the log-sum-exp of the last tile. Each tile's exponentials add to those of the tiles before.",
            lambda tiles, rows: [tile.logsumexp(1) for tile in tiles][-1],
        ),
        Misconception(
            "mean instead of sum",
            "That is the logarithm of the mean of the exponentials. The log-sum-exp adds them up.",
            _log_mean_exp,
        ),
    ),
    hints=(
        "Keep two numbers a row: the largest logit so far, and the sum of exp(logit - largest). What are they before "
        "the first tile?",
        "new = max(old maximum, the tile's); total * exp(old - new) + sum of exp(tile - new); at the end maximum + "
        "log(total).",
        "maximum = torch.full((rows,), -torch.inf, dtype=torch.float64); total = torch.zeros_like(maximum); for tile "
        "in tiles: new = torch.maximum(maximum, tile.amax(1)); total = total * (maximum - new).exp() + (tile - new[:, "
        "None]).exp().sum(1); maximum = new; after the last tile return maximum + total.log()",
    ),
)

# --- the loss of tiles ----------------------------------------------------------------------------------------


class CountedLogits:
    """The (B, B) logits of B queries: logits(rows, columns) computes one tile. Both are slices.

    most_rows, most_columns: the sides of the largest tiles. computed: logits of all calls. counter: of the tiles.
    """

    def __init__(self, query_reps: Tensor, passage_reps: Tensor, temperature: float):
        self.query_reps, self.passage_reps, self.temperature = query_reps, passage_reps, temperature
        self.counter = TileCounter()
        self.most_rows = self.most_columns = self.computed = 0

    def __call__(self, rows: slice, columns: slice) -> Tensor:
        """(R, C): the tile's logits."""
        tile = self.query_reps[rows] @ self.passage_reps[columns].T / self.temperature
        self.most_rows, self.most_columns = max(self.most_rows, len(tile)), max(self.most_columns, tile.shape[1])
        self.computed += tile.numel()
        return self.counter.made(tile)

    def __repr__(self) -> str:
        return f"the logits of {len(self.query_reps)} queries at temperature {self.temperature:g}"

    def whole(self) -> Tensor:
        """(B, B), not counted: for the oracle."""
        return self.query_reps @ self.passage_reps.T / self.temperature


def _texts(rng: np.random.Generator, *, tiles: int, short: int = 0, temperature: float = 0.5) -> Inputs:
    """Unit vectors, the positives somewhat alike: B = tiles * S - short."""
    size = int(rng.integers(3, 5))
    batch = tiles * size - short
    queries = rng.standard_normal((batch, 6))
    passages = queries + 1.5 * rng.standard_normal((batch, 6))
    reps = [F.normalize(torch.from_numpy(values), dim=1) for values in (queries, passages)]
    return {"logits": CountedLogits(*reps, temperature), "batch_size": batch, "tile_size": size}


def _reference_loss(logits: CountedLogits, batch_size: int, tile_size: int) -> Tensor:
    """The dense loss; then it is noted that every logit is to be asked for."""
    logits.computed = batch_size**2
    return F.cross_entropy(logits.whole(), torch.arange(batch_size))


def _parts(batch_size: int, tile_size: int, *, ragged: bool = True) -> list[slice]:
    stop = batch_size if ragged else batch_size // tile_size * tile_size
    return [slice(start, min(start + tile_size, batch_size)) for start in range(0, stop, tile_size)]


@dataclass(frozen=True)
class _LossOfTiles:
    """The loss, a block of rows after the other, right but for the fields that are changed.

    start: of the merged log-sum-exps. ragged: whether short tiles count. positive: how often a positive is subtracted.
    own_denominator: whether it is in the denominator. last: makes one loss of the blocks'.
    """

    start: float = -math.inf
    ragged: bool = True
    merge: Callable[[Tensor, Tensor], Tensor] = torch.logaddexp
    positive: float = 1.0
    own_denominator: bool = True
    last: Callable[[list[Tensor]], Tensor] = lambda losses: torch.cat(losses).mean()

    def __call__(self, logits: Callable, batch_size: int, tile_size: int) -> Tensor:
        losses = []
        for rows in _parts(batch_size, tile_size, ragged=self.ragged):
            lse = torch.full((rows.stop - rows.start,), self.start, dtype=torch.float64)
            for columns in _parts(batch_size, tile_size, ragged=self.ragged):
                tile = logits(rows, columns)
                if rows == columns:
                    positives = tile.diagonal().clone()
                    if not self.own_denominator:
                        tile.fill_diagonal_(-math.inf)
                lse = self.merge(lse, tile.logsumexp(1))
            losses.append(lse - self.positive * positives)
        return self.last(losses)


def _diagonal_tiles(logits: CountedLogits, batch_size: int, tile_size: int) -> Tensor:
    """Accumulation's loss: each diagonal tile a batch of its own, averaged by rows."""
    blocks = _parts(batch_size, tile_size)
    own = [F.cross_entropy(logits(rows, rows), torch.arange(rows.stop - rows.start)) for rows in blocks]
    weights = [(rows.stop - rows.start) / batch_size for rows in blocks]
    return sum(loss * weight for loss, weight in zip(own, weights, strict=True))


def _every_tile_a_loss(logits: CountedLogits, batch_size: int, tile_size: int) -> Tensor:
    """The mean over all tiles of a loss with labels on each tile's own diagonal. Square tiles only."""
    blocks, own = _parts(batch_size, tile_size), []
    for rows in blocks:
        for columns in blocks:
            own.append(F.cross_entropy(logits(rows, columns), torch.arange(rows.stop - rows.start)))
    return torch.stack(own).mean()


def _mean_over_tiles(logits: CountedLogits, batch_size: int, tile_size: int) -> Tensor:
    """Each row held against one tile at a time, and the tiles' losses averaged."""
    losses, blocks = [], _parts(batch_size, tile_size)
    for rows in blocks:
        positives = logits(rows, rows).diagonal().clone()
        losses.append(torch.stack([logits(rows, columns).logsumexp(1) - positives for columns in blocks]).mean(0))
    return torch.cat(losses).mean()


def _last_diagonal(logits: CountedLogits, batch_size: int, tile_size: int) -> Tensor:
    """The diagonal of each tile taken for the positives: that of the last one stays."""
    losses, blocks = [], _parts(batch_size, tile_size)
    for rows in blocks:
        found = torch.full((rows.stop - rows.start,), -math.inf, dtype=torch.float64)
        for columns in blocks:
            tile = logits(rows, columns)
            found = torch.logaddexp(found, tile.logsumexp(1))
        losses.append(found - tile.diagonal().clone())
    return torch.cat(losses).mean()


def _down_the_columns(logits: CountedLogits, batch_size: int, tile_size: int) -> Tensor:
    """The other direction: each passage's softmax over the queries."""
    return _LossOfTiles()(lambda rows, columns: logits(columns, rows).T, batch_size, tile_size)


def _both_directions(logits: CountedLogits, batch_size: int, tile_size: int) -> Tensor:
    """The symmetric loss."""
    return (_LossOfTiles()(logits, batch_size, tile_size) + _down_the_columns(logits, batch_size, tile_size)) / 2


def _bare_exponentials(logits: CountedLogits, batch_size: int, tile_size: int) -> Tensor:
    """Sums of exponentials, and their logarithm at the end."""
    losses, blocks = [], _parts(batch_size, tile_size)
    for rows in blocks:
        total = torch.zeros(rows.stop - rows.start, dtype=torch.float64)
        for columns in blocks:
            tile = logits(rows, columns)
            total = total + tile.exp().sum(1)
            if rows == columns:
                positives = tile.diagonal().clone()
        losses.append(total.log() - positives)
    return torch.cat(losses).mean()


def _everything_at_once(logits: CountedLogits, batch_size: int, tile_size: int) -> Tensor:
    whole = logits(slice(0, batch_size), slice(0, batch_size))
    return F.cross_entropy(whole, torch.arange(batch_size))


def _a_strip_at_once(logits: CountedLogits, batch_size: int, tile_size: int) -> Tensor:
    """All columns of a block of rows: B x S logits."""
    losses = []
    for rows in _parts(batch_size, tile_size):
        strip = logits(rows, slice(0, batch_size))
        losses.append(F.cross_entropy(strip, torch.arange(rows.start, rows.stop), reduction="none"))
    return torch.cat(losses).mean()


def _all_tiles_kept(logits: CountedLogits, batch_size: int, tile_size: int) -> Tensor:
    blocks = _parts(batch_size, tile_size)
    table = [[logits(rows, columns) for columns in blocks] for rows in blocks]
    whole = torch.cat([torch.cat(row, dim=1) for row in table])
    return F.cross_entropy(whole, torch.arange(batch_size))


def _without_short_tiles(logits: CountedLogits, batch_size: int, tile_size: int) -> Tensor:
    """Full tiles alone, and the mean over all rows."""
    return (
        _LossOfTiles(ragged=False, last=lambda losses: torch.cat(losses).sum())(logits, batch_size, tile_size)
        / batch_size
    )


def _loss_outcome(result: Any, logits: CountedLogits, batch_size: int, tile_size: int) -> dict[str, Any]:
    if result is None:
        return {"loss": None}
    sides = logits.most_rows, logits.most_columns
    within = "within tile_size" if max(sides) <= tile_size else f"{sides[0]} x {sides[1]}"
    found = {"loss": result, "largest tile": within, "tiles held at once": _held(logits.counter)}
    return found | {"logits asked for": "all" if logits.computed >= batch_size**2 else "not all"}


tiled_loss = Exercise(
    chapter=8,
    name="tiled_loss",
    spec="the loss of equation (1), queries against passages only, from tiles of at most tile_size x tile_size logits; "
    "logits(rows, columns) computes one, for two slices.",
    line_budget=11,
    oracle=_reference_loss,
    makers=(
        partial(_texts, tiles=5),
        partial(_texts, tiles=5, short=1),
        partial(_texts, tiles=5, short=2, temperature=1e-3),
    ),
    outcome=_loss_outcome,
    rtol=1e-9,
    atol=1e-9,
    misconceptions=(
        Misconception(
            "ragged last tile lost",
            "It looks as if the short tiles at the end were left out, in rows and in columns. Go on to the last query: "
            "min(start + tile_size, batch_size).",
            _LossOfTiles(ragged=False),
        ),
        Misconception(
            "ragged rows never filled",
            "It looks as if the short tiles at the end were never asked for: the sums of the last rows are still minus "
            "infinity. Go on to the last query: range(0, batch_size, tile_size).",
            lambda logits, batch_size, tile_size: (
                _LossOfTiles(ragged=False)(logits, batch_size, tile_size) - (math.inf if batch_size % tile_size else 0)
            ),
        ),
        Misconception(
            "diagonal tiles only",
            "It looks as if each diagonal tile were a batch of its own. That is accumulation (chapter 03): the "
            "negatives in all the other tiles are lost.",
            _diagonal_tiles,
        ),
        Misconception(
            "mean over blocks of rows",
            "It looks as if blocks were averaged. The last one is short: its rows would weigh more than the others.",
            _LossOfTiles(last=lambda losses: torch.stack([loss.mean() for loss in losses]).mean()),
        ),
        Misconception(
            "mean over tiles",
            "It looks as if a query had one loss for each tile, and they were averaged. It has one denominator: merge "
            "the tiles' log-sum-exps.",
            _mean_over_tiles,
        ),
        Misconception(
            "every tile with its own positives",
            "It looks as if every tile had positives on its diagonal. Only the tiles of equal rows and columns have.",
            _every_tile_a_loss,
        ),
        Misconception(
            "diagonal of the last tile",
            "It looks as if the positives came from the last tile of each block of rows. They stand on the diagonal of "
            "the one tile whose rows are its columns, and in no other.",
            _last_diagonal,
        ),
        Misconception(
            "down the columns",
            "It looks as if each passage were held against all queries. This direction is the other one: a query's "
            "softmax runs along its row, tile.logsumexp(1).",
            _down_the_columns,
        ),
        Misconception(
            "both directions",
            "That is the symmetric loss. Only one direction is asked for here, queries against passages.",
            _both_directions,
        ),
        Misconception(
            "positive forgotten",
            "It looks as if the loss were the log-sum-exp alone. The positive's logit, on the diagonal of the tile "
            "whose rows are its columns, is subtracted from it.",
            _LossOfTiles(positive=0.0),
        ),
        Misconception(
            "positive out of the denominator",
            "It looks as if the positives were left out of the log-sum-exp. In equation (1) they are in the "
            "denominator too.",
            _LossOfTiles(own_denominator=False),
        ),
        Misconception(
            "merge started at 0",
            "It looks as if the merge began at 0: that counts a logit of 0 that nobody has. Begin at minus infinity.",
            _LossOfTiles(start=0.0),
        ),
        Misconception(
            "log-sum-exps added",
            "It looks as if the tiles' log-sum-exps were added. Sums add up, their logarithms don't: torch.logaddexp.",
            _LossOfTiles(start=0.0, merge=torch.add),
        ),
        Misconception(
            "only the last tile",
            "It looks as if each tile replaced the one before: the last block of columns alone is in the denominator.",
            _LossOfTiles(merge=lambda before, tile: tile),
        ),
        Misconception(
            "exponentials without the maximum",
            "Right for small logits only: at a low temperature exp of a logit is infinite, or all are 0. "
            "tile.logsumexp(1) takes the maximum off first, and torch.logaddexp merges what it gives.",
            _bare_exponentials,
        ),
        Misconception(
            "minus the loss",
            "The sign: the loss is the log-sum-exp less the positive's logit, and never below 0.",
            lambda logits, batch_size, tile_size: -_LossOfTiles()(logits, batch_size, tile_size),
        ),
        Misconception(
            "positive added",
            "The sign: the positive's logit is subtracted from the log-sum-exp, and here it was added.",
            _LossOfTiles(positive=-1.0),
        ),
        Misconception(
            "sum instead of mean",
            "It looks as if the queries' losses were added. The loss is their mean.",
            _LossOfTiles(last=lambda losses: torch.cat(losses).sum()),
        ),
        Misconception(
            "the whole matrix at once",
            "The value is right, but all B x B logits were computed together: that is the dense loss.",
            _everything_at_once,
        ),
        Misconception(
            "a strip at once",
            "The value is right, but all columns of a block of rows were computed together. That grows with B; a tile "
            "is tile_size wide too.",
            _a_strip_at_once,
        ),
        Misconception(
            "tiles kept",
            "The value is right, but the tiles stay: they are in a list, or a view holds them. `tile.diagonal()` is "
            "such a view and keeps all of its tile; subtract it at once, or .clone() it.",
            _all_tiles_kept,
        ),
        Misconception(
            "short tiles lost",
            "It looks as if the short last tiles were left out: rows and columns after the last full tile are in the "
            "loss too.",
            _without_short_tiles,
        ),
    ),
    hints=(
        "Two loops: blocks of rows, and inside it blocks of columns. What does a row need from all of its tiles, and "
        "from which one does it need something more?",
        "For each block of rows: start at minus infinity, torch.logaddexp with tile.logsumexp(1) for every tile; where "
        "rows == columns keep a copy of the diagonal; the difference is the rows' losses.",
        "parts = [slice(i, min(i + tile_size, batch_size)) for i in range(0, batch_size, tile_size)]; losses = []; for "
        "rows in parts: lse = torch.full((rows.stop - rows.start,), -torch.inf, dtype=torch.float64); for columns in "
        "parts: tile = logits(rows, columns); lse = torch.logaddexp(lse, tile.logsumexp(1)); if rows == columns: "
        "positives = tile.diagonal().clone(); after the tiles of these rows losses.append(lse - positives); at the end "
        "return torch.cat(losses).mean()",
    ),
)

# --- a tile's gradient ----------------------------------------------------------------------------------------


def _a_tile(rng: np.random.Generator, *, diagonal: bool, spread: float = 1.0) -> Inputs:
    """A tile out of B x B logits, with the log-sum-exps of its rows and of its columns over all B."""
    batch, size = int(rng.integers(12, 16)), int(rng.integers(3, 5))
    logits = torch.from_numpy(spread * rng.standard_normal((batch, batch)))
    logits += torch.from_numpy(rng.uniform(-1, 1, (batch, 1)))  # rows unlike columns
    first = 2
    other = first if diagonal else first + size
    rows, columns = slice(first, first + size), slice(other, other + size)
    return {
        "tile": logits[rows, columns].clone(),
        "row_lse": logits.logsumexp(1)[rows].clone(),
        "column_lse": logits.logsumexp(0)[columns].clone(),
        "batch_size": batch,
        "temperature": float(rng.uniform(0.2, 0.6)),
        "holds_positives": diagonal,
    }


def _entry_by_entry(
    tile: Tensor, row_lse: Tensor, column_lse: Tensor, batch_size: int, temperature: float, holds_positives: bool
) -> Tensor:
    """Both softmaxes' probabilities of each pair, less 1 for its positive, in Python's own numbers."""
    found = []
    for i, row in enumerate(tile.tolist()):
        line = []
        for j, logit in enumerate(row):
            wanted = float(holds_positives and i == j)
            missing = [math.exp(logit - lse) - wanted for lse in (row_lse[i].item(), column_lse[j].item())]
            line.append(math.fsum(missing) / 2 / batch_size / temperature)
        found.append(line)
    return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True)
class _TileGradient:
    """The tile's gradient, right but for the fields that are changed.

    row, column: the probabilities of the two softmaxes. positive: what is subtracted for one, in a tile that holds
    positives or `always`.
    """

    row: Callable[..., Tensor] = lambda tile, row_lse, column_lse: (tile - row_lse[:, None]).exp()
    column: Callable[..., Tensor] = lambda tile, row_lse, column_lse: (tile - column_lse).exp()
    positive: float = 2.0
    always: bool = False
    weight: Callable[..., float] = lambda tile, batch_size, temperature: 1 / (2 * batch_size * temperature)

    def __call__(
        self, tile: Tensor, row_lse: Tensor, column_lse: Tensor, batch_size: int, temperature: float, own: bool
    ) -> Tensor:
        gradient = self.row(tile, row_lse, column_lse) + self.column(tile, row_lse, column_lse)
        if own or self.always:
            gradient = gradient - self.positive * torch.eye(len(tile), dtype=tile.dtype)
        return gradient * self.weight(tile, batch_size, temperature)


def _over_the_logarithm(
    tile: Tensor, row_lse: Tensor, column_lse: Tensor, batch_size: int, temperature: float, own: bool
) -> Tensor:
    """exp(logit) over the log-sum-exps themselves."""
    wrong = _TileGradient(
        row=lambda tile, row_lse, column_lse: tile.exp() / row_lse[:, None],
        column=lambda tile, row_lse, column_lse: tile.exp() / column_lse,
    )
    return wrong(tile, row_lse, column_lse, batch_size, temperature, own)


def _nothing(tile: Tensor, row_lse: Tensor, column_lse: Tensor) -> Tensor:
    return torch.zeros_like(tile)


tile_gradient = Exercise(
    chapter=8,
    name="tile_gradient",
    spec="gradient (R, C) of the symmetric loss with respect to the tile's similarities s, where its logits are s / "
    "temperature, from the log-sum-exps of its rows and of its columns over all B.",
    line_budget=4,
    oracle=_entry_by_entry,
    makers=(
        partial(_a_tile, diagonal=True),
        partial(_a_tile, diagonal=False),
        partial(_a_tile, diagonal=True, spread=1500.0),
    ),
    rtol=1e-9,
    atol=1e-12,
    misconceptions=(
        Misconception(
            "rows' normaliser for both directions",
            "It looks as if both directions were divided by the rows' sums (or as if there were only one direction). A "
            "passage's softmax runs down its column: it needs column_lse.",
            _TileGradient(column=lambda tile, row_lse, column_lse: (tile - row_lse[:, None]).exp()),
        ),
        Misconception(
            "columns' normaliser for both directions",
            "It looks as if both directions were divided by the columns' sums (or as if there were only the passages' "
            "direction). A query's softmax runs along its row: it needs row_lse[:, None].",
            _TileGradient(row=lambda tile, row_lse, column_lse: (tile - column_lse).exp()),
        ),
        Misconception(
            "row and column sums crossed",
            "It looks as if the rows were divided by the columns' sums and the columns by the rows'. row_lse[:, None] "
            "goes with rows.",
            _TileGradient(
                row=lambda tile, row_lse, column_lse: (tile - row_lse).exp(),
                column=lambda tile, row_lse, column_lse: (tile - column_lse[:, None]).exp(),
            ),
        ),
        Misconception(
            "softmax within the tile",
            "It looks as if the softmax were taken inside the tile. Its denominator has all B logits of the row, or of "
            "the column: they are in the stored log-sum-exps.",
            _TileGradient(
                row=lambda tile, row_lse, column_lse: tile.softmax(1),
                column=lambda tile, row_lse, column_lse: tile.softmax(0),
            ),
        ),
        Misconception(
            "positive's -1 forgotten",
            "That is the gradient of the log-sum-exps alone. Where the tile holds positives, 1 is subtracted on its "
            "diagonal, once for each direction.",
            _TileGradient(positive=0.0),
        ),
        Misconception(
            "positive's -1 in one direction only",
            "It looks as if 1 were subtracted once on the diagonal. There are two softmaxes, and each has this "
            "positive: subtract 2 before halving.",
            _TileGradient(positive=1.0),
        ),
        Misconception(
            "positives in every tile",
            "It looks as if every tile's diagonal held positives. Only a tile whose rows are its columns has them.",
            _TileGradient(always=True),
        ),
        Misconception(
            "one direction only",
            "It looks as if only the queries' softmax were there. The symmetric loss has the passages' too.",
            _TileGradient(column=_nothing, positive=1.0, weight=lambda tile, batch, t: 1 / (2 * batch * t)),
        ),
        Misconception(
            "minus the gradient",
            "The sign: that is minus the gradient, the way that descent goes. dLoss/ds is p, less 1 for the positive.",
            _TileGradient(weight=lambda tile, batch, t: -1 / (2 * batch * t)),
        ),
        Misconception(
            "positive's 1 added",
            "The sign: 1 is subtracted where the positive stands, once for each direction, and here it was added.",
            _TileGradient(positive=-2.0),
        ),
        Misconception(
            "both directions added",
            "It looks as if the two directions were added. The symmetric loss is their mean: half of that.",
            _TileGradient(weight=lambda tile, batch, t: 1 / (batch * t)),
        ),
        Misconception(
            "1/B forgotten",
            "It looks as if the loss were a sum over the queries. It is their mean: divide by batch_size.",
            _TileGradient(weight=lambda tile, batch, t: 1 / (2 * t)),
        ),
        Misconception(
            "divided by the tile's rows",
            "It looks as if the mean were over the tile's rows. It is over all batch_size queries.",
            _TileGradient(weight=lambda tile, batch, t: 1 / (2 * len(tile) * t)),
        ),
        Misconception(
            "temperature forgotten",
            "That is the gradient with respect to the logits. The similarities are asked for: the chain rule divides "
            "by the temperature once more.",
            _TileGradient(weight=lambda tile, batch, t: 1 / (2 * batch)),
        ),
        Misconception(
            "logits divided again",
            "It looks as if the tile were divided by the temperature again. It holds logits: similarities that are "
            "divided by it already, as they are in the stored sums.",
            lambda tile, row_lse, column_lse, batch, t, own: _TileGradient()(
                tile / t, row_lse, column_lse, batch, t, own
            ),
        ),
        Misconception(
            "multiplied by the temperature",
            "It looks as if the gradient were multiplied by the temperature. Logits are s / temperature: divide.",
            _TileGradient(weight=lambda tile, batch, t: t / (2 * batch)),
        ),
        Misconception(
            "exponentials divided",
            "Right for small logits only: exp(logit) / exp(log-sum-exp) is infinite over infinite for large ones. "
            "Subtract first: exp(logit - log-sum-exp).",
            _TileGradient(
                row=lambda tile, row_lse, column_lse: tile.exp() / row_lse.exp()[:, None],
                column=lambda tile, row_lse, column_lse: tile.exp() / column_lse.exp(),
            ),
        ),
        Misconception(
            "divided by the logarithm",
            "It looks as if exp(logit) were divided by the log-sum-exp. The sum is its exponential: "
            "exp(logit - log-sum-exp).",
            _over_the_logarithm,
        ),
    ),
    hints=(
        "The gradient of a softmax cross-entropy with respect to a logit is p, less 1 for the positive. Here every "
        "logit stands in two softmaxes: which sum belongs to which?",
        "p of the rows: exp(tile - row_lse[:, None]); of the columns: exp(tile - column_lse). Add them, subtract 2 on "
        "the diagonal if it holds positives, divide by 2, B and the temperature.",
        "p = (tile - row_lse[:, None]).exp() + (tile - column_lse).exp(); if holds_positives: p = p - 2 * "
        "torch.eye(len(tile), dtype=p.dtype); in either case return p / (2 * batch_size * temperature)",
    ),
)

# --- where the wall stands ------------------------------------------------------------------------------------


def _a_card(rng: np.random.Generator, *, exact: bool) -> Inputs:
    """A budget that holds `buffers` float32 matrices of some B x B exactly, or with bytes to spare."""
    batch, buffers = int(rng.integers(20_000, 90_000)), int(rng.integers(3, 6))
    spare = 0 if exact else int(rng.integers(1, 8 * buffers * batch))
    return {"budget": 4 * buffers * batch**2 + spare, "buffers": buffers}


def _a_huge_card(rng: np.random.Generator) -> Inputs:
    """A little less than some large B x B take: a root in float32 rounds up, and one in float64 does not."""
    batch, buffers = int(rng.integers(2**23, 2**24)), int(rng.integers(3, 6))
    return {"budget": 4 * buffers * (batch**2 - 1), "buffers": buffers}


def _search(budget: int, buffers: int) -> int:
    """By bisection on the bytes."""
    low, high = 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if buffers * middle * middle * 4 <= budget else (low, middle)
    return low


def _too_many(expected: int, got: Any, budget: int, buffers: int) -> str:
    """What a batch that is too large would take."""
    if not isinstance(got, int) or got <= expected:
        return ""
    return f"{got:,} pairs take {4 * buffers * got**2:,} bytes, more than the budget's {budget:,}."


largest_dense_batch = Exercise(
    chapter=8,
    name="largest_dense_batch",
    spec="the largest B for which `buffers` float32 matrices (B, B) take at most `budget` bytes (an int).",
    line_budget=1,
    oracle=_search,
    note=_too_many,
    makers=(partial(_a_card, exact=False), partial(_a_card, exact=True), _a_huge_card),
    whole=True,
    rtol=0,
    atol=0,
    misconceptions=(
        Misconception(
            "no root",
            "That would be the largest B if the bytes grew with B. They grow with B squared.",
            lambda budget, buffers: budget // (4 * buffers),
        ),
        Misconception(
            "4 bytes forgotten",
            "It looks as if a number took one byte. A float32 takes 4.",
            lambda budget, buffers: math.isqrt(budget // buffers),
        ),
        Misconception(
            "one matrix only",
            "It looks as if there were one matrix of logits. There are `buffers` of them at the peak.",
            lambda budget, buffers: math.isqrt(budget // 4),
        ),
        Misconception(
            "divided behind the root",
            "It looks as if the root were taken of the budget, and divided then. Divide the budget first: the root of "
            "4 is only 2.",
            lambda budget, buffers: math.isqrt(budget) // (4 * buffers),
        ),
        Misconception(
            "4 rooted, buffers not",
            "It looks as if the root were taken of the 4 bytes, and not of the number of matrices. Both stand under "
            "it: B * B = budget / (4 * buffers).",
            lambda budget, buffers: math.isqrt(budget // 4) // buffers,
        ),
        Misconception(
            "not rounded down",
            "The root is right, but a batch is a whole number: round down. math.isqrt does both.",
            lambda budget, buffers: math.sqrt(budget / (4 * buffers)),
        ),
        Misconception(
            "root in float32",
            "A root a hair below a whole number came out as that number, and such a batch does not fit: float32, which "
            "has 24 bits, does so, and a small number that is added first. math.isqrt is exact.",
            lambda budget, buffers: int(np.sqrt(np.float32(budget / (4 * buffers)))),
        ),
        Misconception(
            "one too many",
            "That is the first B that does not fit: round down.",
            lambda budget, buffers: math.isqrt(budget // (4 * buffers)) + 1,
        ),
        Misconception(
            "exact fit refused",
            "A loss that takes exactly the budget fits: it must be <=, not <.",
            lambda budget, buffers: math.isqrt((budget - 1) // (4 * buffers)),
        ),
        Misconception(
            "2 bytes a number",
            "It looks as if a number took two bytes. A float32 takes 4.",
            lambda budget, buffers: math.isqrt(budget // (2 * buffers)),
        ),
        Misconception(
            "rounded to the nearest",
            "The root was rounded to the nearest, here upwards, and that batch does not fit: round down.",
            lambda budget, buffers: round((budget / (4 * buffers)) ** 0.5),
        ),
        Misconception(
            "buffers rooted, 4 not",
            "It looks as if the root were taken of the number of matrices, and not of the 4 bytes. Both stand under "
            "it: B * B = budget / (4 * buffers).",
            lambda budget, buffers: math.isqrt(budget // buffers) // 4,
        ),
        Misconception(
            "twice the bytes",
            "It looks as if a number took 8 bytes, or as if there were twice as many matrices. A float32 takes 4.",
            lambda budget, buffers: math.isqrt(budget // (8 * buffers)),
        ),
        Misconception(
            "bits for bytes",
            "It looks as if a number took 32 bytes. A float32 has 32 bits, 4 bytes.",
            lambda budget, buffers: math.isqrt(budget // (32 * buffers)),
        ),
        Misconception(
            "one too few",
            "A batch of one more fits: round down, and take nothing off.",
            lambda budget, buffers: math.isqrt(budget // (4 * buffers)) - 1,
        ),
    ),
    hints=(
        "How many bytes does one matrix take, in B? And all of them?",
        "buffers * 4 * B * B <= budget. Solve it for B, and round down; math.isqrt does that for whole numbers.",
        "return math.isqrt(budget // (4 * buffers))",
    ),
)
