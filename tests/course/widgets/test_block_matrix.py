"""The blocks that accumulation sees: counted against a plain loop, drawn as they are, on sliders that never raise."""

from html import unescape

import numpy as np
import pytest
import torch
from helpers.page import alt_of
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.patches import Rectangle

from gclib import accumulation_step
from gclib.course import plots
from gclib.course.widgets.block_matrix import BlockMatrix, describe_blocks, negatives_of, plot_blocks, seen_blocks

SIZES = {"batch_size": st.integers(1, 12), "chunk_size": st.integers(1, 15), "hard_negatives": st.integers(0, 3)}


@given(**SIZES)
def test_a_cell_is_seen_where_query_and_passage_come_in_one_chunk(batch_size, chunk_size, hard_negatives):
    seen = seen_blocks(batch_size, chunk_size, hard_negatives=hard_negatives)
    chunks = [range(start, start + chunk_size) for start in range(0, batch_size, chunk_size)]
    for i in range(batch_size):
        for j in range(batch_size * (1 + hard_negatives)):
            assert seen[i, j] == any(i in chunk and j // (1 + hard_negatives) in chunk for chunk in chunks)


@given(**SIZES)
def test_the_count_is_the_formula_and_its_own_in_a_short_last_chunk(batch_size, chunk_size, hard_negatives):
    counts = negatives_of(seen_blocks(batch_size, chunk_size, hard_negatives=hard_negatives))
    whole = batch_size // chunk_size * chunk_size
    assert (counts[:whole] == chunk_size * (1 + hard_negatives) - 1).all()
    assert (counts[whole:] == (batch_size - whole) * (1 + hard_negatives) - 1).all()


def test_the_accumulation_step_hands_its_loss_just_these_cells():
    """The step's own loss function notes which query met which passage; the texts are their numbers."""
    batch, chunk, hard = 7, 3, 2
    met = np.zeros((batch, batch * (1 + hard)), dtype=bool)

    def loss(queries, passages):
        rows, columns = (reps.detach()[:, 0].long().numpy() for reps in (queries, passages))
        met[np.ix_(rows, columns)] = True
        return queries.sum() + passages.sum()

    weight = torch.nn.Parameter(torch.ones(1))
    inputs = [torch.arange(float(count))[:, None] for count in met.shape]
    accumulation_step([lambda x: x * weight] * 2, inputs, loss, chunk_size=chunk)
    assert (met == seen_blocks(batch, chunk, hard_negatives=hard)).all()


@pytest.mark.parametrize(("batch", "chunk", "hard"), [(7, 3, 0), (6, 2, 2), (4, 9, 1), (5, 1, 0)])
def test_the_picture_shows_seen_lost_and_positive_cells(batch, chunk, hard):
    seen = seen_blocks(batch, chunk, hard_negatives=hard)
    _, axes = plots.new_figure()
    plot_blocks(axes, seen, title="blocks")
    cells = axes.images[0].get_array()
    assert ((cells > 0) == seen).all() and axes.get_title() == "blocks"
    assert (np.argwhere(cells == 2) == [[row, row * (1 + hard)] for row in range(batch)]).all()
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert sum(patch.get_hatch() is None for patch in patches) == -(-batch // chunk)
    hatched = sum(patch.get_width() * patch.get_height() for patch in patches if patch.get_hatch())
    assert hatched == (~seen).sum()


def test_the_sentence_holds_the_counts():
    said = describe_blocks(16, 5, hard_negatives=1)
    assert "4 chunks" in said and "9 of 31 negatives (1 in the last chunk)" in said and "152 of 512 logits" in said
    assert "1 chunk of" in describe_blocks(4, 4) and "a query keeps 3 of 3 negatives; " in describe_blocks(4, 4)


@pytest.mark.slow
def test_every_position_of_the_sliders_redraws_sentence_picture_and_alt_text():
    matrix = BlockMatrix(batch_size=6, chunk_size=2)
    assert matrix.chunk_size.options == tuple(range(1, 7))
    for chunk in matrix.chunk_size.options:
        for hard in matrix.hard_negatives.options:
            matrix.chunk_size.value, matrix.hard_negatives.value = chunk, hard
            said = describe_blocks(6, chunk, hard_negatives=hard)
            assert said in unescape(matrix.sentence.value)
            assert said in alt_of(matrix)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("batch_size", (0, 1)), ("chunk_size", (4, 0)), ("chunk_size", (4, 2.5)), ("batch_size", (True, 1))],
)
def test_sizes_that_can_not_be_are_refused(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must be an int of at least 1"):
        seen_blocks(*arguments)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="^hard_negatives must be an int of at least 0"):
        seen_blocks(4, 2, hard_negatives=-1)
    for table in (np.ones((2, 3), dtype=bool), np.ones(4, dtype=bool), np.ones((2, 2)), np.ones((0, 0), dtype=bool)):
        with pytest.raises(ValueError, match="^seen must be a bool matrix"):
            negatives_of(table)
    with pytest.raises(ValueError, match="^seen must be True at every query's own positive"):
        plot_blocks(plots.new_figure()[1], ~np.eye(3, dtype=bool))
    with pytest.raises(ValueError, match="^chunk_size must be one of"):
        BlockMatrix(batch_size=4, chunk_size=5)
    with pytest.raises(ValueError, match="^hard_negatives must be one of"):
        BlockMatrix(hard_negatives=9)
