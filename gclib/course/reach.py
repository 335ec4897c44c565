"""What a step of each way sees of the B x N matrix of logits, and whom a gradient reaches: counted, drawn, in words.

A step encodes a chunk of C queries with their passages. A cell is the pair of a query and a passage. It is absent, or
it stands in the loss; then a gradient reaches the encoder through its query, its passage, both, or neither.

Letters: B queries, K hard negatives of a query, N = B * (1 + K) passages, C queries of a chunk.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from gclib.course import plots
from gclib.support.validation import int_at_least, one_of, positive_int, refuse

ABSENT, NEITHER, QUERY, PASSAGE, BOTH = range(5)
LETTERS = ("", "–", "q", "p", "●")
WORDS = ("not in the loss", "in the loss, no gradient", "gradient to the query", "to the passage", "to both")
_COLORS = ("#FFFFFF", *(plots.OKABE_ITO[name] for name in ("pale grey", "yellow", "orange", "sky blue")))
KEEPS = ("nothing", "passages", "pairs", "all")


def reach(batch_size: int, chunk_size: int, *, keeps: str, copied: bool = False, hard_negatives: int = 0) -> np.ndarray:
    """(B, N) ints, ABSENT to BOTH: what the second chunk of a batch sees (of a batch of one chunk, the first).

    keeps: what there is of the other rows as constants: nothing (accumulation), passages (a queue), pairs (a bank), or
    all with their gradient (the gradient cache). copied: passages are encoded by a copy, which no gradient reaches.
    Raises ValueError for sizes that are no ints in range, and for another word.
    """
    batch, size = positive_int("batch_size", batch_size), positive_int("chunk_size", chunk_size)
    if size > batch:
        raise refuse("chunk_size", f"must be at most the batch, {batch}", chunk_size)
    group = 1 + int_at_least("hard_negatives", hard_negatives, 0)
    one_of("keeps", keeps, KEEPS)
    chunk = 1 if size < batch else 0
    queries = np.arange(batch)[:, None] // size == chunk
    passages = (np.arange(batch * group) // group // size == chunk)[None, :]
    if keeps == "all":
        queries, passages = np.ones_like(queries), np.ones_like(passages)
    seen_queries, seen_passages = queries | (keeps == "pairs"), passages | (keeps in ("pairs", "passages"))
    cells = NEITHER + queries * (QUERY - NEITHER) + (passages & (not copied)) * (PASSAGE - NEITHER)
    return np.where(seen_queries & seen_passages, cells, ABSENT)


def plot_reach(axes: Axes, cells: np.ndarray, *, title: str = "") -> None:
    """The matrix, each cell by colour and sign: ● both, q the query, p the passage, – neither, empty: absent.

    cells: as `reach` gives them.
    """
    axes.imshow(cells, cmap=ListedColormap(_COLORS), vmin=ABSENT, vmax=BOTH, aspect="auto")
    for row, column in np.argwhere(cells != ABSENT):
        axes.text(column, row, LETTERS[cells[row, column]], ha="center", va="center", fontsize=8, color=plots.INK)
    axes.set_xticks(np.arange(cells.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(cells) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#CCCCCC", linewidth=0.5)
    axes.tick_params(which="both", length=0)
    axes.set(title=title, xlabel="passage", ylabel="query", xticks=[], yticks=[])


def describe_reach(cells: np.ndarray) -> str:
    """The matrix in words: how many cells of each kind."""
    counts = {word: int((cells == number).sum()) for number, word in enumerate(WORDS)}
    return f"of {cells.size} cells " + ", ".join(f"{count} {word}" for word, count in counts.items() if count)
