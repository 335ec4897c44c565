"""What stands together in a batch: `gclib.data.sampling`."""

import itertools
import re
import warnings
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gclib.data.negatives import mine_hard_negatives, normal_form
from gclib.data.pairs import TextPair
from gclib.data.sampling import class_pairs, draw_batches, draw_class_batches, draw_from_sources


def epochs(pairs, size, count=2, seed=0):
    """The batches of each of the first epochs, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drawn = list(itertools.islice(draw_batches(pairs, size, seed=seed), count * (len(pairs) // size)))
    batches = [[batch for epoch, batch in drawn if epoch == number] for number in range(count)]
    return batches, [str(warning.message) for warning in caught]


def false_negatives(pairs, batch):
    """The oracle: how many rows of the batch have a twin of the query, or of what is right for it, in another row."""
    right = defaultdict(set)
    for pair in pairs:
        right[normal_form(pair.query)] |= {normal_form(pair.query), normal_form(pair.passage)}
    texts = [{normal_form(text) for text in (pair.query, pair.passage, *pair.negatives)} for pair in batch]
    rights = [right[normal_form(pair.query)] for pair in batch]
    rows = range(len(batch))
    return sum(any(texts[b] & rights[a] for b in rows if b != a) for a in rows)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30),
    size=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_each_pair_once_an_epoch_and_false_negatives_are_none_or_told(texts, size, seed):
    pairs = [TextPair(f"q{query}", f"p{passage}", (f"p{wrong}",)) for query, passage, wrong in texts]
    if size > len(pairs):
        return
    drawn, said = epochs(pairs, size, seed=seed)
    for batches in drawn:
        assert [len(batch) for batch in batches] == [size] * (len(pairs) // size)
        assert Counter(itertools.chain.from_iterable(batches)) <= Counter(pairs)
    met = [sum(false_negatives(pairs, batch) for batch in batches) for batches in drawn]
    told = [message for message in said if "of an epoch's" in message]
    assert len(told) == any(met)
    if told:
        assert told[0].startswith(f"{next(count for count in met if count)} of an epoch's {len(drawn[0]) * size} ")


@settings(max_examples=30, deadline=None)
@given(passages=st.lists(st.integers(0, 6), min_size=2, max_size=40), size=st.integers(1, 6), seed=st.integers(0, 9))
def test_twins_are_parted_wherever_there_are_batches_enough(passages, size, seed):
    """Different queries: they can be parted just where the pairs left out are at least the twins too many."""
    pairs = [TextPair(f"q{row}", f"p{passage}") for row, passage in enumerate(passages)]
    if size > len(pairs):
        return
    batches, rest = divmod(len(pairs), size)
    too_many = sum(max(0, count - batches) for count in Counter(passages).values())
    _, said = epochs(pairs, size, seed=seed)
    assert bool(said) == (too_many > rest)


def test_a_hard_negative_never_meets_the_pair_that_it_is_right_for():
    pairs = [TextPair(f"question {n}", f"answer {n}", (f"answer {(n + 1) % 40}",)) for n in range(40)]
    drawn, said = epochs(pairs, 8, count=4)
    for batches in drawn:
        assert sorted(map(str, itertools.chain.from_iterable(batches))) == sorted(map(str, pairs))
        for batch in batches:
            texts = [text for pair in batch for text in (pair.query, pair.passage, *pair.negatives)]
            assert len(set(texts)) == len(texts)
    assert not said


def test_mined_negatives_meet_no_positive():
    things = [f"{deed} the {thing}" for deed in ("sort", "count", "weigh", "wash") for thing in "abcdefghijklmnop"]
    pairs = mine_hard_negatives([TextPair(f"how to {text}", f"def {text}") for text in things], per_query=2, seed=0)
    drawn, said = epochs(pairs, 8)
    assert not said
    assert not any(false_negatives(pairs, batch) for batches in drawn for batch in batches)


def test_twins_in_other_case_and_white_space_are_parted():
    pairs = [TextPair(f"query {n}", text) for n, text in enumerate(["One two.", "one  TWO", "three", "Three!"])]
    (batches,), said = epochs(pairs, 2, count=1)
    assert not said
    assert all(len({normal_form(pair.passage) for pair in batch}) == 2 for batch in batches)


def test_a_hard_negative_in_common_does_no_harm():
    pairs = [TextPair(f"query {n}", f"passage {n}", ("wrong for all",)) for n in range(12)]
    assert epochs(pairs, 4) == (epochs(pairs, 4)[0], [])


def test_more_twins_than_batches_are_spread_evenly_and_told():
    pairs = [TextPair(f"q{n}", "the answer" if n % 2 else f"p{n}") for n in range(2_000)]
    (batches,), said = epochs(pairs, 64, count=1)
    assert len(batches) == 31
    assert max(Counter(pair for batch in batches for pair in batch).values()) == 1
    twins = [sum(pair.passage == "the answer" for pair in batch) for batch in batches]
    assert max(twins) - min(twins) <= 1
    (words,) = said
    assert re.match(rf"{sum(twins)} of an epoch's 1984 queries meet a false negative", words)
    assert "one text belongs to 1000 pairs, and an epoch has 31 batches of 64, which can't be parted" in words


def test_the_queries_that_meet_a_false_negative_are_counted_not_those_that_bring_it():
    pairs = [TextPair("q1", "p1", ("x",)), TextPair("q2", "p2", ("p1",))]
    words = epochs(pairs, 2)[1][0]
    assert words.startswith("1 of an epoch's 2 queries meet a false negative in their batch: a negative is right for")


def test_a_hard_negative_that_is_right_for_its_own_query_is_told():
    pairs = [TextPair("q0", "p0", ("n0",)), TextPair("q1", "p1", ("P1.",)), TextPair("q0", "p2", ("p0",))]
    assert "2 pairs have a hard negative that is right for their own query: pairs[1]" in epochs(pairs, 1)[1][0]


def test_an_epoch_begins_where_it_is_told_to():
    pairs = [TextPair(f"q{n}", f"p{n // 3}") for n in range(30)]
    whole = list(itertools.islice(draw_batches(pairs, 4, seed=5), 3 * 7))
    for epoch, batch in ((0, 3), (1, 0), (1, 7), (2, 2)):
        rest = list(itertools.islice(draw_batches(pairs, 4, seed=5, epoch=epoch, batch=batch), 3))
        start = 7 * epoch + batch
        assert rest[: len(whole) - start] == whole[start : start + 3]
    assert len({tuple(batch) for _, batch in whole}) == len(whole)


def test_pairs_with_the_same_id_are_parted_too():
    pairs = [TextPair(f"q{n}", f"p{n}", (f"wrong {n % 7}",)) for n in range(40)]
    ids = [n // 3 if n < 30 else None for n in range(40)]
    id_of = {pair.query: key for pair, key in zip(pairs, ids, strict=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = list(itertools.islice(draw_batches(pairs, 8, seed=1, ids=ids), 10))
    for _, batch in drawn:
        shared = [id_of[pair.query] for pair in batch if id_of[pair.query] is not None]
        assert len(set(shared)) == len(shared)
    assert sorted(pair.query for _, batch in drawn[:5] for pair in batch) == sorted(pair.query for pair in pairs)
    plain = itertools.islice(draw_batches(pairs, 8, seed=1), 10)
    assert any(len({id_of[p.query] for p in batch if id_of[p.query] is not None}) < 6 for _, batch in plain)
    with pytest.warns(UserWarning, match="one text or id belongs to 40 pairs"):
        draw_batches(pairs, 8, seed=1, ids=[0] * 40)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 7), st.integers(0, 9))
def test_processes_share_each_batch_between_them(world_size, more, seed):
    pairs = [TextPair(f"q{n}", f"p{n // 2}") for n in range(60)]
    size = world_size + more
    whole = list(itertools.islice(draw_batches(pairs, size, seed=seed, batch=1), 7))
    parts = [
        list(itertools.islice(draw_batches(pairs, size, seed=seed, batch=1, rank=rank, world_size=world_size), 7))
        for rank in range(world_size)
    ]
    for number, (epoch, batch) in enumerate(whole):
        own = [part[number] for part in parts]
        assert [place for place, _ in own] == [epoch] * world_size
        assert list(itertools.chain.from_iterable(rows for _, rows in own)) == batch
        assert max(len(rows) for _, rows in own) - min(len(rows) for _, rows in own) <= 1


def test_each_batch_is_of_one_source_and_every_pair_comes_once_an_epoch():
    sources = {name: [TextPair(f"{name} q{n}", f"{name} p{n}") for n in range(size)] for name, size in SIZES.items()}
    drawn = list(itertools.islice(draw_from_sources(sources, 4, seed=3), 2 * 14))
    for epoch in (0, 1):
        of_epoch = [(name, batch) for number, name, batch in drawn if number == epoch]
        assert Counter(name for name, _ in of_epoch) == {"large": 10, "small": 3, "least": 1}
        for name, batch in of_epoch:
            assert len(batch) == 4 and all(pair.query.startswith(name) for pair in batch)
        seen = Counter(pair.query for _, batch in of_epoch for pair in batch)
        assert set(seen.values()) == {1} and sum(seen.values()) == 56
    assert [name for _, name, _ in drawn[:14]] != [name for _, name, _ in drawn[14:]]
    for epoch, batch in ((0, 5), (1, 2)):
        rest = list(itertools.islice(draw_from_sources(sources, 4, seed=3, epoch=epoch, batch=batch), 6))
        assert rest == drawn[14 * epoch + batch :][:6]
    halves = [itertools.islice(draw_from_sources(sources, 4, seed=3, rank=rank, world_size=2), 28) for rank in (0, 1)]
    for (_, _, whole), (_, _, left), (_, _, right) in zip(drawn, *halves, strict=True):
        assert left + right == whole


SIZES = {"large": 40, "small": 13, "least": 5}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 7), min_size=1, max_size=12), st.integers(0, 99))
def test_texts_of_a_class_are_paired_each_once_an_epoch(sizes, seed):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    texts = [f"text {n}" for n in range(len(labels))]
    label_of = dict(zip(texts, labels, strict=True))
    pairs, ids = class_pairs(texts, labels, seed=seed)
    for pair, label in zip(pairs, ids, strict=True):
        assert label_of[pair.query] == label_of[pair.passage] == label and pair.query != pair.passage
    uses = Counter(text for pair in pairs for text in (pair.query, pair.passage))
    assert set(uses) == set(texts) and sum(uses.values()) == len(texts) + sum(size % 2 for size in sizes)


def test_class_batches_hold_each_class_once_and_pair_anew():
    labels = [n % 16 for n in range(96)]
    texts = [f"text {n}" for n in range(96)]
    label_of = dict(zip(texts, labels, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = list(itertools.islice(draw_class_batches(texts, labels, 8, seed=0), 12))
    assert [epoch for epoch, _ in drawn] == [0] * 6 + [1] * 6
    for _, batch in drawn:
        assert len({label_of[pair.query] for pair in batch}) == 8
    first, second = ({frozenset((p.query, p.passage)) for e, batch in drawn if e == n for p in batch} for n in (0, 1))
    assert len(first) == len(second) == 48 and first != second
    assert list(itertools.islice(draw_class_batches(texts, labels, 8, seed=0, batch=4), 3)) == drawn[4:7]


@pytest.mark.parametrize("kind", [torch.tensor, np.array, lambda numbers: list(torch.tensor(numbers))])
def test_ids_and_labels_of_a_tensor_or_an_array_are_their_numbers(kind):
    pairs, numbers = [TextPair(f"q{n}", f"p{n}") for n in range(12)], [n // 2 for n in range(12)]
    drawn = [list(itertools.islice(draw_batches(pairs, 4, seed=0, ids=ids), 6)) for ids in (numbers, kind(numbers))]
    assert drawn[0] == drawn[1]
    texts = [f"t{n}" for n in range(12)]
    assert class_pairs(texts, kind(numbers), seed=0) == class_pairs(texts, numbers, seed=0)


def test_classes_that_can_t_be_paired_are_told_or_refused():
    for missing in (None, float("nan")):
        with pytest.raises(ValueError, match=r"labels\[2\] must be a class"):
            class_pairs(["a", "b", "c", "d"], [0, 0, missing, missing], seed=0)
    with pytest.raises(ValueError, match=r"ids\[0\] must be hashable"):
        draw_batches([TextPair("q", "p")], 1, seed=0, ids=[[1]])
    with pytest.warns(UserWarning, match="1 of 2 classes have one text"):
        assert class_pairs(["a", "b", "c"], [0, 0, 1], seed=0)[1] == [0]
    with pytest.raises(ValueError, match="labels must have at least one class of two texts"):
        class_pairs(["a", "b"], [0, 1], seed=0)
    with pytest.raises(ValueError, match="labels must be one for each of the 2 texts"):
        class_pairs(["a", "b"], [0], seed=0)
    with pytest.raises(ValueError, match="batch_size must be at most the number of pairs of the classes, 1"):
        draw_class_batches(["a", "b"], [0, 0], 2, seed=0)
    with pytest.raises(ValueError, match="ids must be one for each of the 1 pairs"):
        draw_batches([TextPair("q", "p")], 1, seed=0, ids=[1, 2])
    with pytest.raises(ValueError, match="batch_size must be at most the number of pairs of 'a', 1"):
        draw_from_sources({"a": [TextPair("q", "p")]}, 2, seed=0)
    with pytest.raises(ValueError, match="sources must be a mapping"):
        draw_from_sources({}, 2, seed=0)
    with pytest.raises(ValueError, match="rank must be below world_size"):
        draw_batches([TextPair("q", "p")], 1, seed=0, rank=1)
