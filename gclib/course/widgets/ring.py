"""The ring of processes as a picture: which block of passages is where, and which tile of the logits is computed.

A view and nothing more. W ranks stand in a circle, each with its own queries Q. A block of passages P starts at its
owner and moves to the next rank at each hop; in the backward pass its gradient ∂P moves along and ends at home.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from gclib.course import plots
from gclib.course.widgets.base import MomentLab
from gclib.support.validation import int_at_least, refuse
from gclib.support.words import format_table

MOST_RANKS = 6
_NOW, _DONE = plots.OKABE_ITO["sky blue"], plots.OKABE_ITO["pale grey"]
_RADIUS, _BOX = 1.0, (0.86, 0.42)


@dataclass(frozen=True)
class RingMoment:
    """One hop. owners: whose passages are at each rank; added: at each rank, whose parts ∂P has when it leaves."""

    phase: str
    hop: int
    owners: tuple[int, ...]
    added: tuple[tuple[int, ...], ...] = ()

    @property
    def ranks(self) -> int:
        """W."""
        return len(self.owners)

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """(queries of, passages of) each tile that is computed now, one a rank; none once all are home."""
        return [] if self.phase == "home" else list(enumerate(self.owners))


def ring_moments(ranks: int) -> list[RingMoment]:
    """The 2 W + 1 moments of a loss and its backward: W hops with tiles, W more, and the gradients at home.

    ranks: 2 to MOST_RANKS. Raises ValueError for another number. Source: Cheng et al. 2024, algorithms 1 and 3.
    """
    size = int_at_least("ranks", ranks, 2)
    if size > MOST_RANKS:
        raise refuse("ranks", f"must be at most {MOST_RANKS}", ranks)
    moments = [RingMoment("forward", hop, _owners(size, hop)) for hop in range(size)]
    for hop in range(size):
        owners = _owners(size, hop)
        added = tuple(tuple((owner + step) % size for step in range(hop + 1)) for owner in owners)
        moments.append(RingMoment("backward", hop, owners, added))
    everyone = tuple(tuple((rank + step) % size for step in range(size)) for rank in range(size))
    return [*moments, RingMoment("home", size, _owners(size, size), everyone)]


def done_tiles(moments: Sequence[RingMoment], index: int) -> list[tuple[int, int]]:
    """The tiles of the same pass that were computed before moment `index`."""
    phase = "backward" if moments[index].phase == "home" else moments[index].phase
    return [tile for moment in moments[:index] if moment.phase == phase for tile in moment.tiles]


def title_of(moment: RingMoment) -> str:
    """The moment's name: "forward, hop 1 of 3"."""
    if moment.phase == "home":
        return "all gradients are home"
    return f"{moment.phase}, hop {moment.hop + 1} of {moment.ranks}"


def sentence_of(moment: RingMoment) -> str:
    """What every rank does in the moment."""
    if moment.phase == "home":
        never = " No rank ever held the passages of all." if moment.ranks > 3 else ""
        return f"Each ∂P has the parts of all {moment.ranks} ranks, and is back at its owner.{never}"
    doing = ", ".join(f"rank {rank} takes Q{rank} × P{owner}" for rank, owner in moment.tiles)
    return f"{doing[0].upper()}{doing[1:]}. {_moving(moment)}"


def describe_moment(moments: Sequence[RingMoment], index: int) -> str:
    """The picture in words: the moment, the tiles of now, and how many are done."""
    moment = moments[index]
    done = len(done_tiles(moments, index))
    return (
        f"{moment.ranks} ranks in a ring: {title_of(moment)}. {sentence_of(moment)} "
        f"In this pass {done} of {moment.ranks**2} tiles were done before, {len(moment.tiles)} are computed now."
    )


def table_of(ranks: int) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): every moment with what each rank computes, and the parts in the gradient that it sends on."""
    rows = []
    for moment in ring_moments(ranks):
        cells = [f"Q{rank} × P{owner}" for rank, owner in moment.tiles] or [f"∂P{rank}" for rank in range(ranks)]
        if moment.phase == "backward":
            parts = zip(cells, moment.owners, moment.added, strict=True)
            cells = [f"{cell}, ∂P{owner} of {'+'.join(map(str, added))}" for cell, owner, added in parts]
        rows.append([title_of(moment), *cells])
    return ["moment", *(f"rank {rank}" for rank in range(ranks))], rows


def plot_ring(axes: Axes, moment: RingMoment, *, title: str | None = None) -> None:
    """Draw the ranks around a circle, what each has, and on the arrows what leaves it meanwhile."""
    for rank in range(moment.ranks):
        _draw_rank(axes, moment, rank)
        _draw_arrow(axes, moment, rank)
    axes.set(xlim=(-2.0, 2.0), ylim=(-1.5, 1.5), aspect="equal")
    axes.set_title(title_of(moment) if title is None else title, loc="left", fontsize=10)
    axes.axis("off")


def plot_tiles(axes: Axes, moments: Sequence[RingMoment], index: int) -> None:
    """Draw the W x W blocks of logits, rows of a rank's queries: those of now, those done, and the others."""
    moment = moments[index]
    ranks, now, done = moment.ranks, moment.tiles, done_tiles(moments, index)
    for row in range(ranks):
        for column in range(ranks):
            look: dict[str, Any] = {"facecolor": plots.PAPER}
            if (row, column) in now:
                look = {"facecolor": _NOW}
            elif (row, column) in done:
                look = {"facecolor": _DONE, "hatch": "///"}
            axes.add_patch(Rectangle((column, row), 1, 1, edgecolor=plots.INK, linewidth=0.8, clip_on=False, **look))
            if (row, column) in now:
                axes.text(column + 0.5, row + 0.5, "now", ha="center", va="center", fontsize=9)
    axes.set(xlim=(0, ranks), ylim=(ranks, 0), aspect="equal", xlabel="passages", ylabel="queries")
    places, names = [place + 0.5 for place in range(ranks)], range(ranks)
    axes.set_xticks(places, [f"P{name}" for name in names])
    axes.set_yticks(places, [f"Q{name}" for name in names])
    axes.tick_params(length=0)
    axes.set_title("tiles of the logits", loc="left", fontsize=10)
    handles = [
        Patch(facecolor=_NOW, edgecolor=plots.INK, label="computed now"),
        Patch(facecolor=_DONE, hatch="///", edgecolor=plots.INK, label="done in this pass"),
    ]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=9)


class RingWalk(MomentLab):
    """Sliders for the number of ranks and for the moment, with Previous and Next; all of it works from the keyboard.

    Attributes, each an ipywidget: ranks, moment, previous, next, words, picture. Raises ValueError for a number of
    ranks that `ring_moments` does not have.
    """

    def __init__(self, ranks: int = 3):
        super().__init__()
        ring_moments(ranks)
        self.ranks = widgets.IntSlider(ranks, 2, MOST_RANKS, description="Ranks")
        self._arrange(self.ranks, name="ring", step="One hop")

    def describe(self) -> str:
        """The picture that stands there now, in words."""
        return describe_moment(self._moments(), self.index)

    def table(self) -> str:
        """All moments of the chosen number of ranks, as a text table."""
        return format_table(*table_of(self.ranks.value))

    def _moments(self) -> list[RingMoment]:
        return ring_moments(self.ranks.value)

    def _title_and_sentence(self) -> tuple[str, str]:
        moment = self._moments()[self.index]
        return title_of(moment), sentence_of(moment)

    def _figure(self) -> Figure:
        figure, (left, right) = plots.new_figure(1, 2, width=8, height=3.6)
        plot_ring(left, self._moments()[self.index], title="")
        plot_tiles(right, self._moments(), self.index)
        return figure


def _owners(ranks: int, hop: int) -> tuple[int, ...]:
    """Whose block is at each rank: each hop it moves to the next one."""
    return tuple((rank - hop) % ranks for rank in range(ranks))


def _moving(moment: RingMoment) -> str:
    last = moment.hop + 1 == moment.ranks
    if moment.phase == "forward":
        return "No block moves on: every rank has seen all of them." if last else "Meanwhile the next block arrives."
    adding = "Each adds its part to ∂P of the block that is here, and sends ∂P on"
    return f"{adding}: one hop more, and it is home." if last else f"{adding}, behind its block."


def _leaving(moment: RingMoment, rank: int) -> str:
    """What the arrow from this rank carries; nothing where nothing moves."""
    owner, last = moment.owners[rank], moment.hop + 1 >= moment.ranks
    if moment.phase == "forward":
        return "" if last else f"P{owner}"
    if moment.phase == "home":
        return ""
    return f"∂P{owner}" if last else f"P{owner}, ∂P{owner}"


def _place(ranks: int, rank: float, radius: float = _RADIUS) -> tuple[float, float]:
    """Clockwise, rank 0 on top."""
    angle = math.pi / 2 - 2 * math.pi * rank / ranks
    return radius * math.cos(angle) * 1.25, radius * math.sin(angle)


def _draw_rank(axes: Axes, moment: RingMoment, rank: int) -> None:
    x, y = _place(moment.ranks, rank)
    corner, look = (x - _BOX[0] / 2, y - _BOX[1] / 2), {"facecolor": _NOW if moment.tiles else plots.PAPER}
    shape = FancyBboxPatch(corner, *_BOX, boxstyle="round,pad=0,rounding_size=0.06", edgecolor=plots.INK, **look)
    axes.add_patch(shape)
    text = f"Q{rank} × P{moment.owners[rank]}" if moment.tiles else f"∂P{rank} is home"
    axes.text(x, y, f"rank {rank}\n{text}", ha="center", va="center", fontsize=8)


def _draw_arrow(axes: Axes, moment: RingMoment, rank: int) -> None:
    cargo = _leaving(moment, rank)
    if not cargo:
        return
    gap = 0.27 if moment.ranks < 5 else 0.33
    start, end = (_place(moment.ranks, place, 1.0) for place in (rank + gap, rank + 1 - gap))
    arrow = {"arrowstyle": "-|>", "linewidth": 1.4, "color": plots.INK, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=arrow)
    middle = _place(moment.ranks, rank + 0.5, 1.28 if moment.ranks > 2 else 0.3)
    axes.text(*middle, cargo, ha="center", va="center", fontsize=8)
