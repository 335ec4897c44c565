"""Chapter 09's exercises: several ranks played in one process, as lists with an entry for each rank.

Letters: W ranks, b rows of one rank, B rows of all, D dimensions.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .engine import Exercise, Misconception, Slip
from .judging import Inputs

# --- a rank's share of the loss -------------------------------------------------------------------------------


def _a_rank_s_loss(rng: np.random.Generator, ranks: int) -> Inputs:
    """Unlike rows, and a rank whose share is not its mean."""
    rows = [int(count) for count in rng.choice(np.arange(2, 20), ranks, replace=False)]
    rank = next(place for place in rng.permutation(ranks).tolist() if rows[place] * ranks != sum(rows))
    return {"own_loss": float(rng.uniform(1, 5)), "rows": rows, "rank": rank}


def _weighted(own_loss: float, rows: list[int], rank: int) -> float:
    """The sum of this rank's losses, by the mean number of rows of a rank."""
    return own_loss * rows[rank] / float(np.mean(rows))


loss_to_backpropagate = Exercise(
    chapter=9,
    name="loss_to_backpropagate",
    spec="what this rank backpropagates, so that the mean of the ranks' gradients is the gradient of the mean over all "
    "rows; own_loss is the mean over its own.",
    line_budget=2,
    oracle=_weighted,
    makers=(partial(_a_rank_s_loss, ranks=3), partial(_a_rank_s_loss, ranks=5)),
    rtol=1e-9,
    atol=1e-12,
    misconceptions=(
        Misconception(
            "mean of means",
            "It looks as if every rank's mean counted alike. That is the mean over all rows only where all ranks have "
            "equally many: the rows of a small rank would weigh more than those of a large one.",
            lambda own_loss, rows, rank: own_loss,
        ),
        Misconception(
            "W forgotten",
            "That is this rank's share of the whole mean, b / B. The ranks' gradients are averaged afterwards, which "
            "divides their sum by W once more: backpropagate W times the share.",
            lambda own_loss, rows, rank: own_loss * rows[rank] / sum(rows),
        ),
        Misconception(
            "W without the share",
            "It looks as if the mean were multiplied by W and not weighted. W is right, but this rank has only b of "
            "the B rows.",
            lambda own_loss, rows, rank: own_loss * len(rows),
        ),
        Misconception(
            "W twice",
            "W stands in it twice. The average over ranks takes it out once.",
            lambda own_loss, rows, rank: own_loss * rows[rank] * len(rows) ** 2 / sum(rows),
        ),
        Misconception(
            "divided by W",
            "It looks as if you divided by W. The averaging does that already: here W is to be multiplied, so that the "
            "two cancel.",
            lambda own_loss, rows, rank: own_loss * rows[rank] / (sum(rows) * len(rows)),
        ),
        Misconception(
            "mean divided by W",
            "It looks as if each rank took 1 / W of its own mean. The averaging divides by W already, and a rank's "
            "part in the whole is its share of the rows, b / B.",
            lambda own_loss, rows, rank: own_loss / len(rows),
        ),
        Misconception(
            "mean taken for a sum",
            "It looks as if own_loss were a sum over this rank's rows. It is their mean: times b it is the sum.",
            lambda own_loss, rows, rank: own_loss * len(rows) / sum(rows),
        ),
        Misconception(
            "mean taken for one row",
            "It looks as if own_loss were the loss of one row in B. It is the mean of b rows, and an average over "
            "ranks follows: both b and W are missing.",
            lambda own_loss, rows, rank: own_loss / sum(rows),
        ),
        Misconception(
            "sum over its rows",
            "That is the sum of this rank's losses. The whole batch's loss is a mean: divide by B, and mind the W of "
            "the average that follows.",
            lambda own_loss, rows, rank: own_loss * rows[rank],
        ),
        Misconception(
            "weighted the wrong way round",
            "It looks as if a rank with few rows got the larger weight. Its mean stands for fewer rows.",
            lambda own_loss, rows, rank: own_loss * sum(rows) / (len(rows) * rows[rank]),
        ),
        Misconception(
            "another rank's rows",
            "It looks as if another rank's rows were the weight. Ranks count from 0, as lists do: rows[rank].",
            lambda own_loss, rows, rank: own_loss * rows[rank - 1] * len(rows) / sum(rows),
        ),
        Misconception(
            "the first rank's rows",
            "It looks as if rank 0's rows were the weight, on every rank: rows[rank].",
            lambda own_loss, rows, rank: own_loss * rows[0] * len(rows) / sum(rows),
        ),
        Misconception(
            "sum times W",
            "That is W times the sum of this rank's losses. The whole batch's loss is a mean: divide by B.",
            lambda own_loss, rows, rank: own_loss * rows[rank] * len(rows),
        ),
        Misconception(
            "weight rounded down",
            "It looks as if the weight were a whole number: // drops what is behind the point. Divide with /.",
            lambda own_loss, rows, rank: own_loss * (rows[rank] * len(rows) // sum(rows)),
        ),
        Misconception(
            "share upside down",
            "It looks as if the share stood on its head, B / b. A rank with few rows counts little: b / B, times W.",
            lambda own_loss, rows, rank: own_loss * sum(rows) / rows[rank],
        ),
    ),
    hints=(
        "Write the mean over all B rows as a sum over ranks: what weight has a rank's own mean in it?",
        "Its weight is b / B. Afterwards the ranks' gradients are added and divided by W: what undoes that division?",
        "return own_loss * rows[rank] * len(rows) / sum(rows)",
    ),
)

# --- the backward of a gather ---------------------------------------------------------------------------------


def _gathered_gradients(rng: np.random.Generator, ranks: int) -> Inputs:
    """A gradient (B, 3) of every rank. B is a multiple of W, so that an even split can be made, and is wrong."""
    rows = (rng.integers(1, 4) + 2 * rng.permutation(ranks)).tolist()
    gradients = torch.from_numpy(rng.standard_normal((ranks, sum(rows), 3)))
    return {"gradients": list(gradients), "rows": rows, "rank": int(rng.integers(1, ranks))}


def _owned(whole: Tensor, rows: list[int], rank: int) -> Tensor:
    return whole.split(rows)[rank]


def _row_by_row(gradients: list[Tensor], rows: list[int], rank: int) -> Tensor:
    """Each own row's gradient, added up over the ranks."""
    owner = np.repeat(np.arange(len(rows)), rows)
    own = [row for row in range(sum(rows)) if owner[row] == rank]
    return torch.stack([torch.stack([gradient[row] for gradient in gradients]).sum(0) for row in own])


def _total(gradients: list[Tensor]) -> Tensor:
    return torch.stack(gradients).sum(0)


def _even_part(gradients: list[Tensor], rows: list[int], rank: int) -> Tensor:
    return _total(gradients).chunk(len(rows))[rank]


gather_backward = Exercise(
    chapter=9,
    name="gather_backward",
    spec="gradient of this rank's own rows (b, D): gradients holds what each rank's loss sent back to all gathered "
    "rows, (B, D) each.",
    line_budget=3,
    oracle=_row_by_row,
    makers=(partial(_gathered_gradients, ranks=4), *(partial(_gathered_gradients, ranks=ranks) for ranks in (2, 3))),
    rtol=1e-9,
    atol=1e-9,
    misconceptions=(
        Misconception(
            "own gradient alone",
            "It looks as if only this rank's own loss were asked. The other ranks' queries were compared with these "
            "rows too: what they send back belongs to them. That is what a gather without gradient loses.",
            lambda gradients, rows, rank: _owned(gradients[rank], rows, rank),
        ),
        Misconception(
            "mean instead of sum",
            "It looks as if the ranks were averaged. A row that several losses used gets the sum of what they send "
            "back, here as anywhere in the chain rule; the average comes later, over the parameters.",
            lambda gradients, rows, rank: _owned(_total(gradients) / len(rows), rows, rank),
        ),
        Misconception(
            "even split",
            "It looks as if all ranks had equally many rows. They start at sum(rows[:rank]) and are rows[rank].",
            _even_part,
        ),
        Misconception(
            "nothing cut out",
            "The sum is right, but it is that of all B rows. This rank encoded only its own.",
            lambda gradients, rows, rank: _total(gradients),
        ),
        Misconception(
            "own gradient, nothing cut out",
            "That is what this rank's own loss sent back to all B rows. What the other ranks sent back counts too, and "
            "of the sum only this rank's rows are asked for.",
            lambda gradients, rows, rank: gradients[rank],
        ),
        Misconception(
            "starts at rank * b",
            "It looks as if all ranks before this one had as many rows as it has. They start at sum(rows[:rank]).",
            lambda gradients, rows, rank: _total(gradients)[rank * rows[rank] :][: rows[rank]],
        ),
        Misconception(
            "multiplied by W",
            "It looks as if W were multiplied in here. Each rank's loss has it already: add what came back, no more.",
            lambda gradients, rows, rank: _owned(_total(gradients) * len(rows), rows, rank),
        ),
        Misconception(
            "own gradient left out",
            "It looks as if only the other ranks' gradients were added. This rank's own loss used its rows too.",
            lambda gradients, rows, rank: _owned(_total(gradients) - gradients[rank], rows, rank),
        ),
        Misconception(
            "another rank's rows",
            "The sum is right, but it was cut from its start, where rank 0's rows are. In the gathered tensor this "
            "rank's rows come after those of all ranks before it.",
            lambda gradients, rows, rank: _total(gradients)[: rows[rank]],
        ),
        Misconception(
            "rank 0's rows",
            "The sum is right, but those are rank 0's rows. In the gathered tensor this rank's rows come after those "
            "of all ranks before it.",
            lambda gradients, rows, rank: _total(gradients)[: rows[0]],
        ),
        Misconception(
            "starts at rank times the first rank's rows",
            "It looks as if all ranks before this one had as many rows as rank 0. They start at sum(rows[:rank]).",
            lambda gradients, rows, rank: _total(gradients)[rank * rows[0] :][: rows[rank]],
        ),
        Misconception(
            "no end",
            "The sum is right and starts at the right row, and it goes on to the last of all rows: cut it after "
            "rows[rank].",
            lambda gradients, rows, rank: _total(gradients)[sum(rows[:rank]) :],
        ),
        Misconception(
            "starts a rank too late",
            "The sum is right, but it starts after this rank's rows: sum(rows[:rank]) leaves the rank itself out.",
            lambda gradients, rows, rank: _total(gradients)[sum(rows[: rank + 1]) :][: rows[rank]],
        ),
        Misconception(
            "laid one below the other",
            "The right rows were cut out of every rank's gradient and laid one below the other. They are gradients "
            "of the same rows: add them.",
            lambda gradients, rows, rank: torch.cat([_owned(gradient, rows, rank) for gradient in gradients]),
        ),
        Misconception(
            "rows added up too",
            "It looks as if this rank's rows were added up as well. Each row keeps a gradient of its own: add over "
            "the ranks only.",
            lambda gradients, rows, rank: _owned(_total(gradients), rows, rank).sum(0),
        ),
    ),
    hints=(
        "Passage j was gathered by all ranks, and each of their losses used it. What does the chain rule do with what "
        "comes back from several uses?",
        "It adds. Sum the ranks' gradients, then cut out the rows that this rank encoded: where do they start?",
        "start = sum(rows[:rank]); return sum(gradients)[start : start + rows[rank]]",
    ),
)

# --- averaging the gradients ----------------------------------------------------------------------------------

Gradient = Tensor | None


def _gradients_of_ranks(rng: np.random.Generator, *, ranks: int, missing: bool) -> Inputs:
    """Five parameters. If `missing`: the first rank lacks the second, all lack the third, the last lacks the fourth,
    and the fifth's are zeros.
    """
    shapes = [(2,), (3,), (2,), (1, 2), (2,)]
    found: list[list[Gradient]] = [[torch.from_numpy(rng.standard_normal(s)) for s in shapes] for _ in range(ranks)]
    if missing:
        for gradients in found:
            gradients[4] = torch.zeros(2, dtype=torch.float64)
        found[0][1] = found[-1][3] = None
        for gradients in found:
            gradients[2] = None
    return {"gradients": found}


def _by_parameter(gradients: list[list[Gradient]]) -> list[list[Tensor]]:
    """For each parameter the gradients of the ranks that have one."""
    return [[part for part in parts if part is not None] for parts in zip(*gradients, strict=True)]


def _reference_mean(gradients: list[list[Gradient]]) -> list[Gradient]:
    """Entry by entry, over all ranks."""
    found: list[Gradient] = []
    for present in _by_parameter(gradients):
        zeros = [torch.zeros_like(present[0])] * (len(gradients) - len(present)) if present else []
        found.append(torch.stack(present + zeros).mean(0) if present else None)
    return found


def _combined(gradients: list[list[Gradient]], *, by: Callable[[list[Tensor], int], Gradient]) -> list[Gradient]:
    """by(gradients that are there, W), parameter by parameter; None where nobody has one."""
    return [by(present, len(gradients)) if present else None for present in _by_parameter(gradients)]


def _sum(present: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(present)).sum(0)


def _zero_for_nobody(gradients: list[list[Gradient]]) -> list[Tensor | float]:
    return [0.0 if mean is None else mean for mean in _reference_mean(gradients)]


def _zeros_as_one(result: object, *_: object) -> object:
    """The answer; zeros of any shape and type count as one, for there nobody has a shape."""
    if not isinstance(result, list | tuple):
        return result
    return [torch.zeros(()) if isinstance(g, Tensor) and g.numel() and not g.any() else g for g in result]


average_over_ranks = Exercise(
    chapter=9,
    name="average_over_ranks",
    spec="each parameter's mean over the W ranks; a rank without a gradient counts as zero, and a parameter that no "
    "rank has a gradient for keeps None.",
    line_budget=5,
    oracle=_reference_mean,
    outcome=_zeros_as_one,
    slips=(
        Slip(
            "a call that gives None",
            "None stands where a list or a tensor should: a rank that has no gradient has None in its place (leave "
            "it out), a list was begun with None (begin with []), or the value of append, remove or sort, or of a "
            "function without return, was kept, which is None.",
            r"NoneType'.* (attribute '(append|extend|insert|remove|pop|sort)'|not iterable|has no len|not subscript"
            r"|not support item)|'NoneType' and 'list'|non-iterable NoneType|concatenate list \(not .NoneType",
        ),
        Slip(
            "None taken for a tensor",
            "None is taken for a tensor or a number here: a rank that has no gradient has None in its place (leave it "
            "out), a sum was begun with None, a function without return gave it, or what no rank has a gradient for "
            "was divided (it keeps None).",
            "NoneType",
        ),
    ),
    makers=(
        partial(_gradients_of_ranks, ranks=3, missing=True),
        partial(_gradients_of_ranks, ranks=2, missing=False),
        partial(_gradients_of_ranks, ranks=4, missing=True),
    ),
    rtol=1e-9,
    atol=1e-12,
    misconceptions=(
        Misconception(
            "sum instead of mean",
            "That is the sum over the ranks, W times too large: each rank's loss has the factor W already, and the "
            "mean is what takes it out.",
            partial(_combined, by=lambda present, ranks: _sum(present)),
        ),
        Misconception(
            "divided by those who have it",
            "It looks as if the sum were divided by the number of ranks that have a gradient. One that has none has a "
            "share of zero: divide by W all the same.",
            partial(_combined, by=lambda present, ranks: _sum(present) / len(present)),
        ),
        Misconception(
            "dropped where a rank lacks it",
            "It looks as if a parameter that some rank has no gradient for were skipped. The others' shares are part "
            "of the whole batch's gradient.",
            partial(_combined, by=lambda present, ranks: _sum(present) / ranks if len(present) == ranks else None),
        ),
        Misconception(
            "zero where nobody has one",
            "It looks as if a parameter that no rank has a gradient for got a zero. It keeps None: optimizers skip "
            "what has no gradient, and a zero would still be decayed.",
            _zero_for_nobody,
        ),
        Misconception(
            "None left out of the list",
            "The list is too short: a parameter that no rank has a gradient for keeps its place, with None. Otherwise "
            "all that come after it get their neighbour's gradient.",
            lambda gradients: [mean for mean in _reference_mean(gradients) if mean is not None],
        ),
        Misconception(
            "first rank alone",
            "That is one rank's gradient. All ranks must end with the same, the mean, or their weights drift apart.",
            partial(_combined, by=lambda present, ranks: present[0]),
        ),
        Misconception(
            "divided by W twice",
            "It looks as if you divided by W more than once.",
            partial(_combined, by=lambda present, ranks: _sum(present) / ranks**2),
        ),
        Misconception(
            "first rank alone, as it is",
            "That is one rank's list, None included. All ranks must end with the same, the mean, or their weights "
            "drift apart.",
            lambda gradients: list(gradients[0]),
        ),
        Misconception(
            "decided by the first rank",
            "It looks as if a parameter that rank 0 has no gradient for kept None. Another rank may have one: look "
            "at all of them.",
            lambda gradients: [
                None if first is None else mean
                for first, mean in zip(gradients[0], _reference_mean(gradients), strict=True)
            ],
        ),
        Misconception(
            "decided by the last rank",
            "It looks as if a parameter that the last rank has no gradient for kept None. Another rank may have one: "
            "look at all of them.",
            lambda gradients: [
                None if last is None else mean
                for last, mean in zip(gradients[-1], _reference_mean(gradients), strict=True)
            ],
        ),
        Misconception(
            "divided by the parameters",
            "It looks as if the sum were divided by the number of parameters. It is a mean over the ranks: "
            "len(gradients).",
            lambda gradients: [
                None if mean is None else mean * len(gradients) / len(gradients[0])
                for mean in _reference_mean(gradients)
            ],
        ),
        Misconception(
            "one number a parameter",
            "It looks as if a gradient's entries were averaged too. Each entry keeps its own mean, over the ranks.",
            partial(_combined, by=lambda present, ranks: _sum(present).mean()),
        ),
        Misconception(
            "one number a parameter, divided by W",
            "It looks as if a gradient's entries were averaged too. Each entry keeps its own mean, over the ranks.",
            partial(_combined, by=lambda present, ranks: _sum(present).mean() / ranks),
        ),
        Misconception(
            "zeros dropped",
            "It looks as if a gradient of zeros were taken for none. It is one: the mean of zeros is zero, and None "
            "means that nobody had any.",
            lambda gradients: [None if mean is None or not mean.any() else mean for mean in _reference_mean(gradients)],
        ),
    ),
    hints=(
        "The ranks' gradients of one parameter: which of them are there, and by how many do you divide?",
        "zip(*gradients) goes parameter by parameter. Add what is not None, divide by W = len(gradients); None if "
        "nothing is there.",
        "found = [[g for g in parts if g is not None] for parts in zip(*gradients)]; return [sum(parts) / "
        "len(gradients) if parts else None for parts in found]",
    ),
)

# --- who has whose block --------------------------------------------------------------------------------------


def _a_place(rng: np.random.Generator, least: int, most: int, *, inside: bool = True) -> Inputs:
    """A number of ranks, and one of them; if `inside`, neither the first nor the last."""
    ranks = int(rng.integers(least, most + 1))
    return {"rank": int(rng.integers(inside, ranks - inside)), "ranks": ranks}


def _passed_on(rank: int, ranks: int) -> list[int]:
    """Play it: at each hop everybody hands what they have to the next one."""
    here, seen = list(range(ranks)), []
    for _ in range(ranks):
        seen.append(here[rank])
        here = [here[-1], *here[:-1]]
    return seen


def _hops(rank: int, ranks: int, *, step: int = -1, start: int = 0, hops: int = 0) -> list[int]:
    """Right but for what is named."""
    return [(rank + step * (hop + start)) % ranks for hop in range(ranks + hops)]


ring_schedule = Exercise(
    chapter=9,
    name="ring_schedule",
    spec="whose block of passages is at this rank at hops 0, 1, ..., W - 1, a list of ints: it starts with its own, "
    "and each hop every block moves to the next rank, from the last one to rank 0.",
    line_budget=2,
    oracle=_passed_on,
    makers=(partial(_a_place, least=4, most=9), partial(_a_place, least=2, most=3, inside=False)),
    misconceptions=(
        Misconception(
            "the other way round",
            "It looks as if blocks moved to the rank before. They move to the *next* rank, so what arrives here comes "
            "from the one *before*: owners fall.",
            partial(_hops, step=1),
        ),
        Misconception(
            "starts with the block before",
            "It looks as if a rank sent before it computed. At hop 0 nothing has moved: the block is its own, with the "
            "positives in it.",
            partial(_hops, start=1),
        ),
        Misconception(
            "own block left out",
            "It looks as if only the blocks that arrive were listed. There are W hops with a tile, and at hop 0 the "
            "rank has its own block, with the positives in it.",
            partial(_hops, start=1, hops=-1),
        ),
        Misconception(
            "one hop too few",
            "A block is sent W - 1 times, but there are W hops with a tile: the first is the rank's own block.",
            partial(_hops, hops=-1),
        ),
        Misconception(
            "one hop too many",
            "At the last hop the rank would meet its own block again, and count its own passages twice.",
            partial(_hops, hops=1),
        ),
        Misconception(
            "owners below zero",
            "Right, but for the number: before rank 0 stands rank W - 1. Take it modulo W.",
            lambda rank, ranks: [rank - hop for hop in range(ranks)],
        ),
        Misconception(
            "the same for every rank",
            "It looks as if the list did not depend on the rank. Each starts with its own block.",
            lambda rank, ranks: _hops(0, ranks),
        ),
        Misconception(
            "owners in order",
            "It looks as if every rank met the blocks in the order of their owners. Then all would need the same block "
            "at once: each starts with its own, and they move around.",
            lambda rank, ranks: list(range(ranks)),
        ),
        Misconception(
            "absolute values",
            "Below 0 it looks as if the sign were dropped. Before rank 0 stands rank W - 1: take it modulo W.",
            lambda rank, ranks: [abs(rank - hop) for hop in range(ranks)],
        ),
        Misconception(
            "modulo W - 1",
            "It looks as if it were taken modulo W - 1. There are W ranks, 0 to W - 1: modulo W.",
            lambda rank, ranks: [(rank - hop) % max(1, ranks - 1) for hop in range(ranks)],
        ),
        Misconception(
            "where the own block goes",
            "That is where this rank's own block goes, hop by hop. Asked for is whose block is here.",
            partial(_hops, step=1, start=1),
        ),
        Misconception(
            "always its own",
            "It looks as if no block moved. At each hop all of them go on to the next rank.",
            lambda rank, ranks: [rank] * ranks,
        ),
    ),
    hints=(
        "Draw three ranks and move the blocks by hand. What does rank 0 have at hop 1?",
        "After h hops a block is h ranks further on. So who started with the one that is here now?",
        "return [(rank - hop) % ranks for hop in range(ranks)]",
    ),
)
