"""Plans hold every row once, within their budget, and put back what they took."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gclib import Chunk, plan_chunks
from gclib.chunking import check_plan, choose_largest
from gclib.inputs import row_lengths, take

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 70), st.booleans())
def test_rows_per_chunk(lengths, size, sort):
    plan = plan_chunks(lengths, chunk_size=size, sort=sort)
    assert sorted(row for chunk in plan for row in chunk.rows) == list(range(len(lengths)))
    assert [len(chunk) for chunk in plan[:-1]] == [size] * (len(plan) - 1)
    assert all(chunk.width == max(lengths[row] for row in chunk.rows) for chunk in plan)
    if sort:
        order = [lengths[row] for chunk in plan for row in chunk.rows]
        assert order == sorted(order, reverse=True)
    else:
        assert [row for chunk in plan for row in chunk.rows] == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 200), st.booleans())
def test_tokens_per_chunk(lengths, budget, sort):
    plan = plan_chunks(lengths, chunk_tokens=budget, sort=sort)
    assert sorted(row for chunk in plan for row in chunk.rows) == list(range(len(lengths)))
    assert all(chunk.tokens <= budget or len(chunk) == 1 for chunk in plan)
    assert all(chunk.tokens == len(chunk) * max(lengths[row] for row in chunk.rows) for chunk in plan)


@given(LENGTHS, st.integers(1, 10), st.integers(0, 20))
def test_the_largest_chunks_are_chosen(lengths, size, count):
    plan = plan_chunks(lengths, chunk_size=size, sort=False)
    chosen = choose_largest([plan, plan], count)
    assert len(chosen) == min(count, 2 * len(plan))
    left = [chunk.tokens for t in (0, 1) for n, chunk in enumerate(plan) if (t, n) not in chosen]
    assert all(plan[n].tokens >= max(left, default=0) for _, n in chosen)


def test_the_docstring_example():
    assert plan_chunks([3, 9, 4, 8], chunk_size=2) == [Chunk((1, 3), 9), Chunk((2, 0), 4)]


def test_lengths_are_read_from_the_mask_once():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    inputs = {"input_ids": torch.ones(4, 4, dtype=torch.long), "attention_mask": mask}
    assert row_lengths(inputs) == [2, 4, 3, 1]  # left padding keeps its tokens; an empty row keeps one column
    assert row_lengths(torch.ones(4, 2)) is None


@given(st.permutations(range(6)), st.integers(1, 5))
def test_take_cuts_rows_and_trailing_columns(order, width):
    ids = torch.arange(30).reshape(6, 5)
    image = torch.arange(6 * 5 * 2 * 2).reshape(6, 5, 2, 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones(6, 5), "pixels": image, "flag": True}
    taken = take(inputs, Chunk(tuple(order[:4]), width))
    assert torch.equal(taken["input_ids"], ids[list(order[:4]), :width])
    assert torch.equal(taken["pixels"], image[list(order[:4])])
    assert taken["flag"] is True


def test_neighbouring_rows_are_a_view():
    ids = torch.arange(12).reshape(6, 2)
    assert take(ids, Chunk((2, 3, 4), 1)).data_ptr() == ids[2:].data_ptr()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"lengths": []}, "lengths"),
        ({"lengths": [1, 0]}, "lengths"),
        ({"lengths": [1.5]}, "lengths"),
        ({"lengths": torch.ones(3)}, "lengths"),
        ({"lengths": [1], "chunk_size": 0}, "chunk_size"),
        ({"lengths": [1], "chunk_size": -1}, "chunk_size"),
        ({"lengths": [1], "chunk_size": 2.5}, "chunk_size"),
        ({"lengths": [1], "chunk_size": True}, "chunk_size"),
        ({"lengths": [1], "chunk_size": None}, "chunk_size"),
        ({"lengths": [1], "chunk_size": 1, "chunk_tokens": 4}, "chunk_size"),
        ({"lengths": [1], "chunk_size": None, "chunk_tokens": 0}, "chunk_tokens"),
    ],
)
def test_bad_input_is_refused_in_words(arguments, names):
    with pytest.raises(ValueError, match=names):
        plan_chunks(**({"chunk_size": 1} | arguments))


@pytest.mark.parametrize(
    "plan",
    [
        [Chunk((0, 1), 2)],
        [Chunk((0, 1), 2), Chunk((1, 2), 2)],
        [Chunk((0, 1, 2), 9)],
        [Chunk((0, 1, 2), 0)],
        [(0, 1, 2)],
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan):
    with pytest.raises(ValueError, match="plan"):
        check_plan(plan, rows=3, width=4)
