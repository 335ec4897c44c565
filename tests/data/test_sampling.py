"""What stands together in a batch: `gclib.data.sampling`."""

import itertools
import re
import warnings
from collections import Counter, defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from gclib.data.negatives import mine_hard_negatives, normal_form
from gclib.data.pairs import TextPair
from gclib.data.sampling import draw_batches


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
    return sum(any(texts[b] & rights[a] or texts[a] & rights[b] for b in rows if b != a) for a in rows)


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
