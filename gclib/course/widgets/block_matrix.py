"""The B x N matrix of logits cut by gradient accumulation: which cells a step sees, counted, drawn, on a slider.

Accumulation gives each chunk of C queries a loss of its own, over the chunk's own C * (1 + K) passages (Gao et al.
2021, section 1). Of the matrix of logits only the blocks on the diagonal are ever computed.

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, C queries of a chunk.
"""

from collections.abc import Sequence

import ipywidgets as widgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from gclib.course import plots
from gclib.course.widgets.base import Lab, on_change, sentence
from gclib.support.validation import int_at_least, one_of, positive_int, refuse

LOST, SEEN, POSITIVE = 0, 1, 2
_LOOKS = ListedColormap([plots.OKABE_ITO["pale grey"], plots.OKABE_ITO["yellow"], plots.OKABE_ITO["blue"]])


def seen_blocks(batch_size: int, chunk_size: int, *, hard_negatives: int = 0) -> np.ndarray:
    """(B, N) bool: True where query i and passage j share a chunk, so that accumulation computes their logit.

    Passage j belongs to query j // (1 + K); the chunk of a query is query // C. The last chunk may be short, and a
    chunk_size above B is the whole batch. Raises ValueError for sizes that are no ints in range.
    """
    batch = positive_int("batch_size", batch_size)
    size = positive_int("chunk_size", chunk_size)
    group = 1 + int_at_least("hard_negatives", hard_negatives, 0)
    queries = np.arange(batch)
    owners = np.arange(batch * group) // group
    return queries[:, None] // size == owners // size


def negatives_of(seen: np.ndarray) -> np.ndarray:
    """(B,) ints: how many wrong passages each query is held against, where it sees the cells of `seen` (B, N).

    One of the cells in a row is the query's own positive. Raises ValueError where a query does not see that.
    """
    table = _checked(seen)
    return table.sum(axis=1) - 1


def plot_blocks(axes: Axes, seen: np.ndarray, *, title: str = "") -> None:
    """The matrix with the seen cells lit, the lost ones grey and hatched, the positives dark; each block outlined.

    seen: (B, N) bool, as `seen_blocks` gives it. Raises ValueError for another shape, or a positive that is not seen.
    """
    table = _checked(seen)
    group = table.shape[1] // len(table)
    cells = table.astype(int)
    cells[np.arange(len(table)), np.arange(len(table)) * group] = POSITIVE
    axes.imshow(cells, cmap=_LOOKS, vmin=LOST, vmax=POSITIVE, aspect="auto" if group > 1 else "equal")
    whole = {"fill": False, "edgecolor": "#8A8A8A", "hatch": "////", "linewidth": 0}
    for column, row, width, height in _gaps(table):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), width, height, **whole))
    for first, last in _blocks(table):
        corner = (first * group - 0.5, first - 0.5)
        size = ((last - first) * group, last - first)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=plots.INK, linewidth=1.6, clip_on=False))
    axes.set(title=title, xlabel="passage", ylabel="query")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))


def describe_blocks(batch_size: int, chunk_size: int, *, hard_negatives: int = 0) -> str:
    """One sentence: how many negatives a query keeps, how many the full batch gives, and the share of lit cells."""
    seen = seen_blocks(batch_size, chunk_size, hard_negatives=hard_negatives)
    counts = negatives_of(seen)
    most, fewest = int(counts.max()), int(counts.min())
    negatives = f"{most} of {seen.shape[1] - 1} negatives{'' if most == fewest else f' ({fewest} in the last chunk)'}"
    chunks = -(-batch_size // chunk_size)
    pieces = "1 chunk" if chunks == 1 else f"{chunks} chunks"
    return (
        f"B = {batch_size} in {pieces} of at most C = {chunk_size}, K = {hard_negatives}: a query keeps {negatives}; "
        f"{int(seen.sum()):,} of {seen.size:,} logits are computed ({seen.mean():.0%})."
    )


class BlockMatrix(Lab):
    """Sliders for the chunk and the hard negatives over the matrix of a batch of `batch_size`.

    Attributes, each an ipywidget: chunk_size and hard_negatives (sliders; arrow keys work), sentence and picture (HTML;
    the picture carries the sentence as alt text). The keywords chunk_size and hard_negatives say where the sliders
    start. Raises ValueError for a start that no slider can show.
    """

    label_width = ""

    def __init__(self, *, batch_size: int = 16, chunk_size: int = 4, hard_negatives: int = 0):
        super().__init__()
        self.batch_size = positive_int("batch_size", batch_size)
        self.chunk_size = _slider("Chunk C", range(1, batch_size + 1), chunk_size, "chunk_size")
        self.hard_negatives = _slider("Hard K", range(4), hard_negatives, "hard_negatives")
        self.sentence = self.words
        classes = {"block-matrix": self, "chunk": self.chunk_size, "hard": self.hard_negatives}
        self.arrange([self.chunk_size, self.hard_negatives], self.sentence, self.picture, classes=classes)
        on_change(self.refresh, self.chunk_size, self.hard_negatives)
        self.refresh()

    def refresh(self) -> None:
        """Bring sentence and picture up to the sliders."""
        chunk, hard = self.chunk_size.value, self.hard_negatives.value
        counts = describe_blocks(self.batch_size, chunk, hard_negatives=hard)
        self.sentence.value = sentence(counts)
        alt = f"Matrix of logits, queries down, passages across; lit blocks on the diagonal, the rest hatched. {counts}"
        self._show(alt)

    def _figure(self) -> Figure:
        chunk, hard = self.chunk_size.value, self.hard_negatives.value
        figure, axes = plots.new_figure(width=4.6 + 1.2 * hard, height=4.2)
        plot_blocks(axes, seen_blocks(self.batch_size, chunk, hard_negatives=hard))
        return figure


def _slider(label: str, options: Sequence[int], value: int, argument: str) -> widgets.SelectionSlider:
    one_of(argument, value, options)
    return widgets.SelectionSlider(options=options, value=value, description=label, layout={"width": "320px"})


def _checked(seen: np.ndarray) -> np.ndarray:
    table = np.asarray(seen)
    if table.ndim != 2 or 0 in table.shape or table.shape[1] % table.shape[0] or table.dtype != bool:
        raise refuse("seen", "must be a bool matrix (B, N) with N a multiple of B", f"{table.dtype} {table.shape}")
    group = table.shape[1] // len(table)
    if not table[np.arange(len(table)), np.arange(len(table)) * group].all():
        raise refuse("seen", "must be True at every query's own positive", "a query that does not see it")
    return table


def _blocks(table: np.ndarray) -> list[tuple[int, int]]:
    """(first query, one past the last) of each run of queries that see the same passages."""
    starts = [0, *(row for row in range(1, len(table)) if (table[row] != table[row - 1]).any())]
    return list(zip(starts, [*starts[1:], len(table)], strict=True))


def _gaps(table: np.ndarray) -> list[tuple[int, int, int, int]]:
    """The lost cells as rectangles: (column, row, width, height), beside each block on its left and right."""
    gaps = []
    for first, last in _blocks(table):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], ~table[first], [0]]).astype(int)))
        gaps += [(left, first, right - left, last - first) for left, right in edges.reshape(-1, 2).tolist()]
    return gaps
