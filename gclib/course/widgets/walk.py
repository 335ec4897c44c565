"""A walk through a step as a picture: one moment on a slider, or several side by side.

A view and nothing more: what is alive comes from `gclib.memory.walk`, which measured it. States: "remembered" (a graph
that autograd keeps for the backward), "held" (a tensor that stays, without a graph), "passing" (being made in this
moment), "gone" (not there).
"""

from collections.abc import Mapping, Sequence

import ipywidgets as widgets
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch

from gclib.course import plots
from gclib.course.widgets.base import MomentLab
from gclib.memory.walk import AFTER, WHOLE, Moment, Piece, Walk
from gclib.support.validation import refuse
from gclib.support.words import format_bytes

Node = tuple[str, Piece]  # ("graph" | "rep" | "cache", row), or ("loss" | "gradients", WHOLE)
TOWERS = ("queries", "passages")
_KIND_OF = {
    "graph": "activations",
    "rep": "representations",
    "cache": "cache",
    "loss": "loss",
    "gradients": "gradients",
}
_SIZES = {"graph": (1.5, 0.66), "rep": (0.5, 0.3), "cache": (0.5, 0.3), "loss": (0.6, 0.6), "gradients": (0.74, 0.6)}
_COLUMNS = {"gradients": 0.0, "graph": 1.62, "rep": 3.1, "cache": 3.1, "loss": 4.35}
_END = "end of the replay"
_BACKWARD = plots.CARD_COLOR  # dark red, and no box has it
_NAMES = {
    "graph": "a graph in the encoder",
    "rep": "r, representations",
    "cache": "u, cached gradients",
    "loss": "the loss's graph",
    "gradients": "∂L/∂θ",
}
_EDGES = {
    "remembered": {"color": plots.INK, "linewidth": 2.0, "linestyle": "-"},
    "passing": {"color": plots.INK, "linewidth": 0.9, "linestyle": "--"},
    "backward": {"color": _BACKWARD, "linewidth": 1.6, "linestyle": "-."},
}


def states(walk: Walk, index: int) -> dict[Node, str]:
    """The state of every node at moment `index`, from the bytes that were measured.

    A step that never caches gradients has no node for them.
    """
    moment, state = walk.moments[index], {}
    caches = any(other.kind_bytes["cache"] for other in walk.moments)
    had_graph = {piece for earlier in walk.moments[:index] for piece in earlier.graph_bytes}
    caching = moment.phase == "loss" and any(later.kind_bytes["cache"] for later in walk.moments)
    for row in walk.rows:
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


def edges(walk: Walk, index: int) -> list[tuple[Node, Node, str]]:
    """What is joined at moment `index`: (from, to, "remembered" | "passing" | "backward")."""
    state, phase = states(walk, index), walk.moments[index].phase
    loss, gradients, joined = ("loss", WHOLE), ("gradients", WHOLE), []
    for row in walk.rows:
        graph, rep, cache = ("graph", row), ("rep", row), ("cache", row)
        if state[graph] != "gone":
            joined.append((graph, rep, state[graph]))
        if state[loss] == "remembered" and state[rep] != "gone":
            joined.append((rep, loss, "remembered"))
            if state.get(cache) == "passing":
                joined.append((loss, cache, "backward"))
        if state[graph] == "remembered" and phase in ("replay", "backward"):
            source = cache if state.get(cache) == "held" else rep
            joined += [(source, graph, "backward"), (graph, gradients, "backward")]
            if source == rep and state[loss] == "remembered":
                joined.append((loss, rep, "backward"))
    return joined


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
        return "The encoder runs without a graph: autograd remembers nothing, and only the representations stay."
    if moment.phase == "loss":
        if len(moment.graph_bytes) == 1:
            return f"The loss looks at the representations. Its own graph, {own}, is the only one that is alive."
        return f"The loss looks at the representations. Autograd remembers {graphs}, {own} of it for the loss itself."
    if moment.phase == "replay" and moment.piece != WHOLE:
        return f"Encoded again, with a graph of {own}. The cached gradient of these rows goes back through it, into θ."
    if moment.phase == "backward":
        return f"The gradient goes back through all graphs that are there, {graphs}, into θ."
    if moment.phase == AFTER:
        return "No graph and no cache is left: only the gradient of the parameters."
    if title_of(walk, index) == _END:
        return f"Every row has been encoded twice. As the step returns, it lets go of the cache, {cache}."
    return f"No graph is alive. All that the second half needs of the first is the gradient cache, {cache}."


def describe_moment(walk: Walk, index: int) -> str:
    """The picture in words: the moment, what happens, and which nodes are in which state."""
    by_state: dict[str, list[str]] = {}
    for node, state in states(walk, index).items():
        if state != "gone":
            by_state.setdefault(state, []).append(_node_name(node))
    nodes = " ".join(f"{state.capitalize()}: {'; '.join(names)}." for state, names in by_state.items())
    return f"{title_of(walk, index)}. {sentence_of(walk, index)} {nodes} Everything else is gone."


def table_of(walk: Walk) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): every moment with its live bytes by kind, and what autograd remembers. For a text table."""
    kinds = ("representations", "cache", "activations", "gradients")
    rows = []
    for index, moment in enumerate(walk.moments):
        counts = [sum(moment.graph_bytes.values()), *(moment.kind_bytes[kind] for kind in kinds)]
        rows.append([title_of(walk, index), *(format_bytes(count) if count else "–" for count in counts)])
    return ["moment", "remembered", *kinds], rows


def plot_moment(axes: Axes, walk: Walk, index: int, *, title: str | None = None) -> None:
    """Draw moment `index`: rows of graph, representation and cached gradient between the loss and ∂L/∂θ.

    Solid thick arrows: remembered edges; thin dashed: computed and forgotten; dark red dash-dotted: gradients going
    back.
    """
    state, moment = states(walk, index), walk.moments[index]
    for start, end, kind in edges(walk, index):
        _draw_edge(axes, _place(walk, start), _place(walk, end), start, end, kind)
    for node in state:
        _draw_node(axes, _place(walk, node), node, state[node], moment)
    rows = len(walk.rows)
    axes.set(xlim=(-0.45, 4.75), ylim=(-rows + 0.45, 0.55))
    axes.set_title(title_of(walk, index) if title is None else title, loc="left", fontsize=10)
    axes.axis("off")


class GraphWalk(MomentLab):
    """A slider over a step's moments, with Previous and Next, and a menu of steps. All of it works from the keyboard.

    walks: {name of the step: its Walk}. Attributes, each an ipywidget: step, moment (the slider), previous, next,
    words, picture. Raises ValueError where there is no walk.
    """

    def __init__(self, walks: Mapping[str, Walk]):
        if not walks or not all(isinstance(walk, Walk) for walk in walks.values()):
            raise refuse("walks", "must hold a Walk for each name", walks)
        super().__init__()
        self._walks = dict(walks)
        self.step = widgets.Dropdown(options=list(walks), description="Step")
        self._arrange(self.step, name="walk", step="One moment", layout={"width": "340px"})

    @property
    def walk(self) -> Walk:
        """The walk of the step that is chosen."""
        return self._walks[self.step.value]

    def describe(self) -> str:
        """The picture that stands there now, in words."""
        return describe_moment(self.walk, self.index)

    def _moments(self) -> list[Moment]:
        return self.walk.moments

    def _title_and_sentence(self) -> tuple[str, str]:
        return title_of(self.walk, self.index), sentence_of(self.walk, self.index)

    def _figure(self) -> Figure:
        figure, axes = plots.new_figure(width=7.6, height=1.1 + 0.72 * max(3, len(self.walk.rows)))
        plot_moment(axes, self.walk, self.index, title="")
        _add_legend(figure, self.walk)
        return figure


def plot_walk(panels: Sequence[Axes], walk: Walk, indices: Sequence[int]) -> None:
    """Draw the moments `indices`, one on each of `panels`, numbered as on the slider, with a legend below."""
    panels = list(panels)
    for axes, index in zip(panels, indices, strict=True):
        plot_moment(axes, walk, index, title=f"{index + 1}. {title_of(walk, index)}")
        axes.axis("on")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=True, color=plots.OKABE_ITO["grey"], linewidth=0.6)
    _add_legend(panels[0].figure, walk)


def _add_legend(figure: Figure, walk: Walk) -> None:
    """What the boxes and arrows of this walk mean, under the picture."""
    kinds = dict.fromkeys(kind for kind, _ in states(walk, 0))
    look = {"edgecolor": plots.INK, "linewidth": 1.0}
    handles: list[Artist] = [
        Patch(facecolor=plots.COLORS[_KIND_OF[kind]], label=_NAMES[kind], **look) for kind in kinds
    ]
    words = {"remembered": "remembered", "passing": "computed, forgotten", "backward": "gradients going back"}
    handles += [Line2D([], [], label=words[kind], **edge) for kind, edge in _EDGES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _spoken(phase: str) -> str:
    return phase.replace("_", " ")


def _node_name(node: Node) -> str:
    kind, row = node
    if kind in ("loss", "gradients"):
        return {"loss": "the loss's graph", "gradients": "gradients of θ"}[kind]
    return f"{ {'graph': 'graph', 'rep': 'representations', 'cache': 'cached gradient'}[kind] } of {row_name(row)}"


def _place(walk: Walk, node: Node) -> tuple[float, float]:
    kind, row = node
    if row == WHOLE:
        return _COLUMNS[kind], -(len(walk.rows) - 1) / 2
    shift = {"graph": 0.0, "rep": 0.19, "cache": -0.19}[kind]
    return _COLUMNS[kind], -walk.rows.index(row) + shift


def _draw_edge(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], source: Node, target: Node, kind: str
) -> None:
    look = _EDGES[kind]
    rightwards = 1 if end[0] > start[0] else -1
    lift = {"rep": 0.08, "cache": -0.08, "graph": -0.1 if kind == "backward" else 0.1}
    drop = -0.1 if kind == "backward" and "rep" in (source[0], target[0]) else 0.0
    tail = (start[0] + rightwards * _SIZES[source[0]][0] / 2, start[1] + drop * (source[0] == "rep"))
    head = (end[0] - rightwards * _SIZES[target[0]][0] / 2, end[1] + drop * (target[0] == "rep"))
    tail = (tail[0], tail[1] + (lift["graph"] if source[0] == "graph" and target[0] != "gradients" else 0))
    head = (head[0], head[1] + (lift["graph"] if target[0] == "graph" else 0))
    axes.annotate("", xy=head, xytext=tail, arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, **look})


def _draw_node(axes: Axes, place: tuple[float, float], node: Node, state: str, moment: Moment) -> None:
    kind, row = node
    width, height = _SIZES[kind]
    there = state in ("remembered", "held")
    look = {"facecolor": plots.COLORS[_KIND_OF[kind]] if there else plots.PAPER, "edgecolor": plots.INK}
    look |= {"linewidth": {"remembered": 2.0, "held": 1.2, "passing": 1.0, "gone": 0.6}[state]}
    look |= {"linestyle": {"remembered": "-", "held": "-", "passing": "--", "gone": ":"}[state]}
    corner = (place[0] - width / 2, place[1] - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.06", zorder=3, **look))
    names = {"rep": "r", "cache": "u", "loss": "loss", "gradients": "∂L/∂θ"}
    text = row_name(row) if kind == "graph" else names[kind]
    if kind == "graph" and state == "remembered":
        text += f"\ngraph {format_bytes(moment.graph_bytes[row])}"
    if kind == "graph" and state == "passing":
        text += "\nno graph"
    ink = "#767676" if state == "gone" else plots.OKABE_ITO["black"] if there else plots.INK  # all at least 4.5 : 1
    axes.text(*place, text, ha="center", va="center", fontsize=7.5, color=ink, zorder=4)
