"""Plans hold every row once, within their budget, and put back what they took."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gclib import Chunk, plan_chunks
from gclib.chunks import check_plan, choose_largest, price_of_a_call
from gclib.towers import row_lengths, take

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 70), st.booleans())
def test_rows_of_an_even_cut(lengths, size, sort):
    plan = plan_chunks(lengths, chunk_size=size, sort=sort, call_tokens=None)
    assert sorted(row for chunk in plan for row in chunk.rows) == list(range(len(lengths)))
    assert [len(chunk) for chunk in plan[:-1]] == [size] * (len(plan) - 1)
    assert all(chunk.width == max(lengths[row] for row in chunk.rows) for chunk in plan)
    if sort:
        order = [lengths[row] for chunk in plan for row in chunk.rows]
        assert order == sorted(order, reverse=True)
    else:
        assert [row for chunk in plan for row in chunk.rows] == list(range(len(lengths)))


def cheapest(lengths, size, call_tokens):
    """The least price of a cut into chunks of at most `size` rows, every cut tried."""

    @cache
    def price(start):
        cuts = range(start + 1, min(start + size, len(lengths)) + 1)
        return min((lengths[start] * (end - start) + call_tokens + price(end) for end in cuts), default=0)

    return price(0)


@given(LENGTHS, st.integers(1, 70), st.integers(0, 100))
def test_sorted_chunks_end_where_that_is_cheapest(lengths, size, call_tokens):
    plan = plan_chunks(lengths, chunk_size=size, call_tokens=call_tokens)
    assert sorted(row for chunk in plan for row in chunk.rows) == list(range(len(lengths)))
    order = [row for chunk in plan for row in chunk.rows]
    assert order == sorted(order, key=lambda row: (-lengths[row], row))
    assert all(chunk.width == lengths[chunk.rows[0]] and len(chunk) <= size for chunk in plan)
    paid = sum(chunk.tokens + call_tokens for chunk in plan)
    assert paid == cheapest(sorted(lengths, reverse=True), size, call_tokens)
    assert max(chunk.tokens for chunk in plan) <= plan_chunks(lengths, chunk_size=size, call_tokens=None)[0].tokens


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 70))
def test_rows_of_one_length_are_cut_evenly(rows, length, size):
    assert plan_chunks([length] * rows, chunk_size=size) == plan_chunks([length] * rows, chunk_size=size, sort=False)


def test_a_size_or_a_price_beyond_all_rows_and_tokens_is_as_good_as_all_of_them():
    lengths = [3, 9, 4, 8, 1]
    assert plan_chunks(lengths, chunk_size=2**70, call_tokens=2) == plan_chunks(lengths, chunk_size=5, call_tokens=2)
    assert [len(chunk) for chunk in plan_chunks(lengths, chunk_size=2**70, call_tokens=2**70)] == [5]


def test_a_card_s_call_costs_more_than_a_processor_s():
    lengths = [90] * 3 + [80] + [10] * 4
    on_cpu, on_card = (plan_chunks(lengths, chunk_size=8, call_tokens=price_of_a_call(d)) for d in ("cpu", "cuda"))
    assert [[len(chunk) for chunk in plan] for plan in (on_cpu, on_card)] == [[4, 4], [8]]


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


def test_the_docstring_examples():
    assert plan_chunks([3, 9, 4, 8], chunk_size=2) == [Chunk((1, 3), 9), Chunk((2, 0), 4)]
    assert plan_chunks([200, 5, 5, 5], chunk_size=4) == [Chunk((0,), 200), Chunk((1, 2, 3), 5)]


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
        ({"lengths": [1], "call_tokens": -1}, "call_tokens"),
        ({"lengths": [1], "call_tokens": 0.5}, "call_tokens"),
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
