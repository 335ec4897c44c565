"""A step, moment by moment: chunks go through the encoder, representations fill, the loss lights, chunks come again.

A view and nothing more: what is alive comes from `gclib.memory.walk`, which measured it; `page/walk.js` draws and plays
it. States: "remembered" (a graph that autograd keeps for the backward), "held" (a tensor that stays, without a graph),
"passing" (being made in this moment), "gone" (not there).
"""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from gclib.course import plots
from gclib.course.memory_lab.picture import PAGE, page_module
from gclib.course.widgets.base import Lab
from gclib.memory.ledger import KINDS
from gclib.memory.timeline import thinned
from gclib.memory.walk import AFTER, WHOLE, Moment, Piece, Walk
from gclib.support.validation import refuse
from gclib.support.words import format_bytes, format_table, unit_for

HERE = Path(__file__).parent / "page"
Node = tuple[str, Piece]  # ("text" | "graph" | "rep" | "cache" | "part", row), or ("loss" | "gradients", WHOLE)
TOWERS = ("queries", "passages")
COLUMNS = 24  # points of a moment's bytes in the picture
_KINDS = {
    "graph": "activations",
    "rep": "representations",
    "cache": "cache",
    "loss": "loss",
    "gradients": "gradients",
}
_END = "end of the replay"
_ORDER = [("text", "graph"), ("graph", "rep"), ("rep", "loss"), ("loss", "cache"), ("loss", "rep")]
_ORDER += [("cache", "graph"), ("rep", "graph"), ("graph", "part")]  # what moves after what


def states(walk: Walk, index: int) -> dict[Node, str]:
    """The state of every node at moment `index`, from the bytes that were measured.

    A step that never caches gradients has no node for them. A part is a row's share of the parameters' gradient.
    """
    moment, state = walk.moments[index], {}
    caches = any(other.kind_bytes["cache"] for other in walk.moments)
    had_graph = {piece for earlier in walk.moments[:index] for piece in earlier.graph_bytes}
    caching = moment.phase == "loss" and any(later.kind_bytes["cache"] for later in walk.moments)
    adding, added = going_back(walk, index), {row for n in range(index) for row in going_back(walk, n)}
    for row in walk.rows:
        state["text", row] = "held"
        state["part", row] = "held" if row in added else "passing" if row in adding else "gone"
        remembered, made_now = row in moment.graph_bytes, row == moment.piece
        stored = moment.kind_bytes["representations"] and row in moment.encoded and row not in had_graph
        state["graph", row] = "remembered" if remembered else "passing" if made_now else "gone"
        state["rep", row] = "held" if remembered or stored and not made_now else "passing" if made_now else "gone"
        if caches:
            state["cache", row] = "held" if moment.kind_bytes["cache"] else "passing" if caching else "gone"
    state["loss", WHOLE] = "remembered" if any(tower is None for tower, _ in moment.graph_bytes) else "gone"
    growing = moment.phase in ("replay", "backward") and moment.graph_bytes
    held = moment.kind_bytes["gradients"]
    state["gradients", WHOLE] = "held" if held else "passing" if growing else "gone"
    return state


def going_back(walk: Walk, index: int) -> list[Piece]:
    """The rows through whose graphs a gradient goes into the parameters in moment `index`."""
    moment = walk.moments[index]
    if moment.phase not in ("replay", "backward"):
        return []
    rows = [moment.piece] if moment.piece in walk.rows else walk.rows
    return [row for row in rows if row in moment.graph_bytes]


def edges(walk: Walk, index: int) -> list[tuple[Node, Node, str]]:
    """What is joined at moment `index`: (from, to, "remembered" | "passing" | "backward")."""
    state, moment = states(walk, index), walk.moments[index]
    loss, adding, joined = ("loss", WHOLE), going_back(walk, index), []
    for row in walk.rows:
        graph, rep, cache = ("graph", row), ("rep", row), ("cache", row)
        if row == moment.piece and moment.phase in ("first_forward", "replay"):
            joined.append((("text", row), graph, "passing"))
        if state[graph] != "gone":
            joined.append((graph, rep, state[graph]))
        if state[loss] == "remembered" and state[rep] != "gone":
            joined.append((rep, loss, "remembered"))
            if state.get(cache) == "passing":
                joined.append((loss, cache, "backward"))
        if row in adding:
            source = cache if state.get(cache) == "held" else rep
            joined += [(source, graph, "backward"), (graph, ("part", row), "backward")]
            if source == rep and state[loss] == "remembered":
                joined.append((loss, rep, "backward"))
    return joined


def moves(walk: Walk, index: int) -> list[tuple[Node, Node, str]]:
    """The edges along which something goes in moment `index`, in the order in which it does."""
    moment = walk.moments[index]

    def in_motion(edge: tuple[Node, Node, str]) -> bool:
        start, end, kind = edge
        if moment.phase == "loss":
            return "loss" in (start[0], end[0])
        return kind == "backward" if moment.phase == "backward" else moment.piece in (start[1], end[1])

    return sorted(filter(in_motion, edges(walk, index)), key=_turn)


def row_name(row: Piece) -> str:
    """The rows that a piece encodes: "queries", or "passages, chunk 2"."""
    tower, chunk = row
    name = TOWERS[tower] if tower < len(TOWERS) else f"tower {tower + 1}"
    return name if chunk is None else f"{name}, chunk {chunk + 1}"


def title_of(walk: Walk, index: int) -> str:
    """The moment's name: "first forward: queries, chunk 1"."""
    moment = walk.moments[index]
    if moment.piece[0] is not None:
        return f"{_spoken(moment.phase)}: {row_name(moment.piece)}"
    if moment.phase == "replay":
        return _END if index == len(walk.moments) - 2 else "the cache alone"
    if moment.phase == "backward" and not moment.graph_bytes:
        return "end of the backward"
    chunk = "" if moment.piece[1] is None else f", chunk {moment.piece[1] + 1}"
    return {"loss": "loss", "backward": "backward", AFTER: "after the step"}[moment.phase] + chunk


def sentence_of(walk: Walk, index: int) -> str:
    """What happens in the moment, in one or two sentences, with the bytes that were measured."""
    moment = walk.moments[index]
    graphs = format_bytes(sum(moment.graph_bytes.values()))
    own = format_bytes(moment.graph_bytes.get(moment.piece, 0))
    cache = format_bytes(moment.kind_bytes["cache"])
    if moment.phase == "first_forward":
        if moment.piece in moment.graph_bytes:
            return f"The encoder runs with a graph: autograd now remembers {graphs} for the backward."
        return "The encoder runs without a graph: only the representations stay, and the random state it began with."
    if moment.phase == "loss":
        if len(moment.graph_bytes) == 1:
            return f"The loss looks at the representations. Its own graph, {own}, is the only one that is alive."
        return f"The loss looks at the representations. Autograd remembers {graphs}, {own} of it for the loss itself."
    if moment.phase == "replay" and moment.piece != WHOLE:
        return f"Encoded again, with a graph of {own}. The cached gradient of these rows goes back through it, into θ."
    if moment.phase == "backward" and not moment.graph_bytes:
        return "No graph is left. Every row has given its part of the gradient of θ."
    if moment.phase == "backward" and moment.piece in walk.rows:
        return f"The graph of {own} was kept. The cached gradient of these rows goes back through it, into θ."
    if moment.phase == "backward":
        return f"The gradient goes back through all graphs that are there, {graphs}, into θ."
    if moment.phase == AFTER:
        return "No graph and no cache is left: of what the step made, only the gradient of the parameters and the loss."
    if title_of(walk, index) == _END:
        return (
            f"Every row has given its part of the gradient of θ. As the step returns, it lets go of the cache, {cache}."
        )
    return f"No graph is alive. The second half needs the gradient cache, {cache}, and each chunk's random state."


def describe_moment(walk: Walk, index: int) -> str:
    """The picture in words: the moment, what happens, and which nodes are in which state."""
    by_state: dict[str, list[str]] = {}
    for node, state in states(walk, index).items():
        if state != "gone" and node[0] not in ("text", "part"):
            name = _node_name(node)
            passes = node[0] == "graph" and state == "passing"
            by_state.setdefault(state, []).append(name.replace("graph", "activations") if passes else name)
    nodes = " ".join(f"{state.capitalize()}: {'; '.join(names)}." for state, names in by_state.items())
    rest = "No other graph, representation or cached gradient is there."
    return f"{title_of(walk, index)}. {sentence_of(walk, index)} {nodes} {rest}"


def table_of(walk: Walk) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): every moment with its live bytes by kind, and what autograd remembers. For a text table."""
    kinds = ("representations", "cache", "activations", "gradients")
    rows = []
    for index, moment in enumerate(walk.moments):
        counts = [sum(moment.graph_bytes.values()), *(moment.kind_bytes[kind] for kind in kinds)]
        rows.append([title_of(walk, index), *(format_bytes(count) if count else "–" for count in counts)])
    return ["moment", "remembered", *kinds], rows


def page_of(walk: Walk) -> dict[str, Any]:
    """What `page/walk.js` draws of a walk: rows, phases, and each moment's words, states, edges and bytes. Plain JSON.

    Nodes are "graph 0", or "loss"; an edge is [from, to, kind, when it moves: 0, 1, ... or -1]. bytes: of each kind at
    the moment's peak; columns: of each kind at up to COLUMNS instants, the peak among them.
    """
    moments = []
    for index, moment in enumerate(walk.moments):
        going = moves(walk, index)
        turns = list(dict.fromkeys(map(_turn, going)))
        joined = [(edge, turns.index(_turn(edge)) if edge in going else -1) for edge in edges(walk, index)]
        graphs = moment.graph_bytes.items()
        moments.append(
            {
                "title": title_of(walk, index),
                "sentence": sentence_of(walk, index),
                "words": describe_moment(walk, index),
                "nodes": {_key(walk, node): state for node, state in states(walk, index).items()},
                "edges": [[_key(walk, start), _key(walk, end), kind, turn] for (start, end, kind), turn in joined],
                "graphs": {_key(walk, ("graph" if row in walk.rows else "loss", row)): count for row, count in graphs},
                "bytes": list(moment.kind_bytes.values()),
                "columns": thinned(moment.events, COLUMNS).tolist(),
            }
        )
    rows = [[*row_name(row).split(", "), "all"][:2] for row in walk.rows]
    return {"rows": rows, "spans": spans_of(walk), "moments": moments, "table": table_of(walk)}


def spans_of(walk: Walk) -> list[tuple[str, int, int]]:
    """(name, first moment, the one after the last) of each phase, or each chunk where phases come once a chunk."""
    cyclic = any(moment.phase == "loss" and moment.piece[1] is not None for moment in walk.moments)

    def name(index: int) -> str:
        phase, chunk = walk.moments[index].phase, walk.moments[index].piece[1]
        return f"chunk {chunk + 1}" if cyclic and chunk is not None else _spoken(phase)

    groups = [list(group) for _, group in groupby(range(len(walk.moments)), key=name)]
    return [(name(group[0]), group[0], group[-1] + 1) for group in groups]


class StepView(anywidget.AnyWidget):
    """The page's own view of walks: play, pause, a slider of moments. step: its name; moment: from 1, as there."""

    _esm = page_module("looks", "picture", str(HERE / "layout"), str(HERE / "walk"))
    _css = (PAGE / "lab.css").read_text("utf-8") + (HERE / "walk.css").read_text("utf-8")
    walks = traitlets.Dict().tag(sync=True)
    kinds = traitlets.List().tag(sync=True)
    step = traitlets.Unicode().tag(sync=True)
    moment = traitlets.Int(1).tag(sync=True)

    @traitlets.validate("moment")
    def _inside(self, proposal: Any) -> int:
        return min(max(proposal.value, 1), len(self.walks[self.step]["moments"]))

    @traitlets.validate("step")
    def _known(self, proposal: Any) -> str:
        if proposal.value not in self.walks:
            raise refuse("step", f"must be one of {list(self.walks)}", proposal.value)
        return proposal.value

    @traitlets.observe("step")
    def _start_anew(self, _: Any) -> None:
        self.moment = 1


class GraphWalk(Lab):
    """A step as an animation: play, pause, a slider of moments, and a menu of steps; bytes beside it, at the same time.

    walks: {name of the step: its Walk}. `view` is the page's: its traits step and moment are where the page stands.
    A page that runs no widgets shows all moments of the first step as one picture, with alt text. Raises ValueError
    where there is no walk.
    """

    def __init__(self, walks: Mapping[str, Walk]):
        if not walks or not all(isinstance(walk, Walk) for walk in walks.values()):
            raise refuse("walks", "must hold a Walk for each name", walks)
        super().__init__()
        self._walks = dict(walks)
        pages = {name: page_of(walk) for name, walk in walks.items()}
        self.view = StepView(walks=pages, kinds=list(KINDS), step=next(iter(walks)))
        self.arrange(self.view, classes={"walk": self.view})

    @property
    def walk(self) -> Walk:
        """The walk of the step that is chosen."""
        return self._walks[self.view.step]

    def describe(self) -> str:
        """The picture that stands there now, in words."""
        return describe_moment(self.walk, self.view.moment - 1)

    def table(self) -> str:
        """All moments of the chosen step, as a text table."""
        return format_table(*table_of(self.walk))

    def _repr_mimebundle_(self, **keywords: Any) -> dict[str, Any]:
        walk = self.walk
        figure = figure_of(walk)
        alt = describe_walk(walk, self.view.step)
        return super()._repr_mimebundle_(**keywords) | {
            "text/html": plots.to_html(figure, alt),
            "text/plain": f"Figure: {alt}",
        }


def describe_walk(walk: Walk, name: str) -> str:
    """All moments of a step in words, for the alt text of `figure_of`."""
    highest = max(walk.moments, key=_total)
    moments = "; ".join(f"{index + 1} {title_of(walk, index)}" for index in range(len(walk.moments)))
    return (
        f"What is alive in each moment of the step, {name}: {moments}. Most graphs in the encoder at once: "
        f"{max(sum(row in moment.graph_bytes for row in walk.rows) for moment in walk.moments)} of {len(walk.rows)}. "
        f"Peak {format_bytes(_total(highest))} in moment {walk.moments.index(highest) + 1}."
    )


def figure_of(walk: Walk) -> Figure:
    """All moments of a walk in one picture: what is alive above, its bytes by kind below, moments from left to right.

    Filled: remembered or held. Outlined: made in the moment, and not kept.
    """
    lanes = [node for row in walk.rows for node in states(walk, 0) if node[1] == row and node[0] in _KINDS]
    lanes += [("loss", WHOLE), ("gradients", WHOLE)]
    figure, (roll, stack) = plots.new_figure(2, 1, width=9, height=2.7 + 0.17 * len(lanes))
    roll.get_gridspec().set_height_ratios([0.17 * len(lanes), 1.9])
    for index in range(len(walk.moments)):
        state = states(walk, index)
        for lane, node in enumerate(lanes):
            _draw_state(roll, index, lane, _KINDS[node[0]], state[node])
    own = {row: [lane for lane, node in enumerate(lanes) if node[1] == row] for row in walk.rows}
    places = {row_name(row): sum(at) / len(at) for row, at in own.items()}
    places |= {"the loss": len(lanes) - 2, "∂L/∂θ": len(lanes) - 1}
    roll.set_yticks(list(places.values()), list(places))
    roll.set(ylim=(len(lanes) - 0.4, -0.6))
    roll.hlines([at[-1] + 0.5 for at in own.values()], 0, len(walk.moments), color=plots.INK, linewidth=0.4)
    for name, start, stop in spans_of(walk):
        if 0.085 * len(name) < 6.6 * (stop - start) / len(walk.moments):
            roll.text((start + stop) / 2, -2.2, name, ha="center", va="bottom", fontsize=9)
        roll.axvline(stop, color=plots.INK, linewidth=0.4)
    _draw_bytes(stack, walk)
    for axes in (roll, stack):
        axes.set(xlim=(0, len(walk.moments)))
        axes.set_xticks([n + 0.5 for n in range(len(walk.moments))], range(1, len(walk.moments) + 1))
        axes.tick_params(length=0)
    stack.set_xlabel("moment")
    roll.xaxis.tick_top()
    return figure


def _draw_state(axes: Axes, index: int, lane: int, kind: str, state: str) -> None:
    """A stretch of a lane: filled where the node is there, outlined where it only passes."""
    look = {"facecolor": plots.COLORS[kind], "hatch": plots.HATCHES[kind], "edgecolor": plots.INK, "linewidth": 0.0}
    if state == "passing":
        look = {"facecolor": plots.PAPER, "edgecolor": plots.COLORS[kind], "linewidth": 1.4}
    if state != "gone":
        axes.add_patch(Rectangle((index + 0.03, lane - 0.38), 0.94, 0.76, **look))


def _draw_bytes(axes: Axes, walk: Walk) -> None:
    """Live bytes by kind over the events of every moment, stacked; the peak is named."""
    columns = [thinned(moment.events, COLUMNS) for moment in walk.moments]
    edges = [n + k / len(held) for n, held in enumerate(columns) for k in range(len(held))] + [len(columns)]
    held = np.concatenate([*columns, columns[-1][-1:]])
    unit, size = unit_for(held.sum(axis=1).max())
    base, handles = np.zeros(len(held)), []
    for number, kind in enumerate(KINDS):
        if held[:, number].max() > 0.005 * held.sum(axis=1).max() or kind in _KINDS.values():
            top = base + held[:, number] / size
            look = {"facecolor": plots.COLORS[kind], "hatch": plots.HATCHES[kind], "edgecolor": plots.INK}
            axes.fill_between(edges, base, top, step="post", linewidth=0.0, **look)
            if held[:, number].any():
                handles.append(Patch(label=kind, linewidth=0.3, **look))
            base = top
    highest = int(base.argmax())
    look = {"textcoords": "offset points", "ha": "center", "weight": "bold", "fontsize": 9}
    axes.annotate(f"peak {format_bytes(int(held[highest].sum()))}", (edges[highest], base[highest]), (0, 8), **look)
    axes.plot([edges[highest]], [base[highest]], marker="v", color=plots.INK, markersize=5)
    axes.set(ylim=(0, 1.22 * base.max()), ylabel=f"live bytes ({unit})")
    axes.figure.legend(handles=handles[::-1], loc="outside right center", fontsize=9, frameon=False)


def _turn(edge: tuple[Node, Node, str]) -> int:
    """When something goes along this edge, of all that moves in its moment."""
    return _ORDER.index((edge[0][0], edge[1][0]))


def _key(walk: Walk, node: Node) -> str:
    """A node's name in the page."""
    return f"{node[0]} {walk.rows.index(node[1])}" if node[1] in walk.rows else node[0]


def _total(moment: Moment) -> int:
    return sum(moment.kind_bytes.values())


def _spoken(phase: str) -> str:
    return phase.replace("_", " ")


def _node_name(node: Node) -> str:
    kind, row = node
    if kind in ("loss", "gradients"):
        return {"loss": "the loss's graph", "gradients": "gradients of θ"}[kind]
    return f"{ {'graph': 'graph', 'rep': 'representations', 'cache': 'cached gradient'}[kind] } of {row_name(row)}"
