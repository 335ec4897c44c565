"""Rows and their batches: `gclib.course.experiments.contents.rows`."""

from dataclasses import replace

import pytest

from gclib.course.experiments import results
from gclib.course.experiments.contents import rows
from gclib.course.experiments.contents.planting import CLEAN, RIGHT_NEGATIVE, SAME_PASSAGE, SAME_QUERY
from gclib.course.experiments.contents.rows import EQUAL_BYTES, PLANTED, SWEEP, Row, batches_of, texts_of, updates_of
from gclib.course.experiments.recipes import TableSetting
from gclib.data.negatives import false_negative_mask
from gclib.data.pairs import TextPair

TINY = TableSetting(train_pairs=128, test_pairs=20, size="tiny", vocab_size=200, query_length=8, passage_length=32)


def spelled(number):
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return " ".join(words[int(digit)] for digit in f"{number:03d}")


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """A corpus of numbers in words, and an empty cache."""

    def load(split, *, limit, progress):
        numbers = range(500) if split == "train" else range(500, 600)
        bodies = (" ".join(f"w{number}x{place}" for place in range(16)) for number in numbers)
        named = zip(numbers, bodies, strict=True)
        return [TextPair(f"about {spelled(n)}", f"def n{n}(x): {spelled(n)} {body}") for n, body in named][:limit]

    def forget():
        for cached in (results._texts, results._all_pairs, rows._with_negatives):
            cached.cache_clear()

    monkeypatch.setattr(results, "load_pairs", load)
    monkeypatch.setenv("GCLIB_CACHE", str(tmp_path))
    forget()
    yield
    forget()


def planted_row(data, **fields):
    return Row("planted", 16, int(data == RIGHT_NEGATIVE), data=data, **fields)


def test_the_tables_compare_what_they_say():
    assert {row.passages for row in EQUAL_BYTES} == {32, 64, 256, 128, 512}
    assert {row.hard_negatives for row in EQUAL_BYTES} == {0, 1, 7}
    for first, second in zip(PLANTED, PLANTED[1:], strict=False):
        if first.name.endswith("as it is"):
            assert replace(second, name=first.name, masked=False) == first
    assert {(row.batch_size, row.temperature) for row in SWEEP} == {
        (b, t) for b in (32, 128) for t in (0.02, 0.05, 0.2)
    }
    assert set(EQUAL_BYTES) & set(SWEEP) == {rows.SMALL, rows.MIDDLE}  # trained once
    assert Row("x", 128, rate_factor=2.0).learning_rate == pytest.approx(4e-3)


@pytest.mark.parametrize("data", [SAME_PASSAGE, SAME_QUERY, RIGHT_NEGATIVE])
def test_what_is_planted_stands_in_every_batch_unless_it_is_parted(data):
    for batch in batches_of(planted_row(data, order="together"), TINY, 0):
        assert false_negative_mask(batch).any(dim=1).all()
    if data != RIGHT_NEGATIVE:
        for batch in batches_of(planted_row(data, order="parted"), replace(TINY, train_pairs=400), 0):
            assert not false_negative_mask(batch).any()


def test_batches_follow_the_seed_and_hold_every_pair_once_an_epoch():
    row, setting = Row("x", 32), replace(TINY, epochs=2)
    first, again, other = (list(batches_of(row, setting, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == updates_of(row, setting) == 8
    pairs = results.pairs_and_tokenizer(setting)[0]
    for epoch in (first[:4], first[4:]):
        assert sorted(pair.query for batch in epoch for pair in batch) == sorted(pair.query for pair in pairs)
    assert first[:4] != first[4:]


def test_a_share_of_the_updates_and_hard_negatives():
    row = Row("x", 16, 2, share=0.3)
    assert updates_of(row, TINY) == 2 == len(list(batches_of(row, TINY, 0)))
    for (pair,) in texts_of(row, TINY):
        assert len(pair.negatives) == 2 and pair.passage not in pair.negatives
    assert updates_of(replace(row, share=1e-6), TINY) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size must be"),
        ({"hard_negatives": -1}, "hard_negatives must be"),
        ({"share": 1.5}, "share must be at most 1"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"data": "dirty"}, "data must be one of"),
        ({"order": "sorted"}, "order must be one of"),
        ({"data": SAME_QUERY, "hard_negatives": 1}, "hard_negatives must be 0 with same query"),
        ({"data": RIGHT_NEGATIVE}, "hard_negatives must be 1 with right negative"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        Row(**{"name": "x", "batch_size": 16, **fields})


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at most the 128 pairs"):
        updates_of(Row("x", 256), TINY)
    short = replace(TINY, passage_length=4)  # 32 characters: too short to be cut in four
    with pytest.raises(ValueError, match="setting must have pairs for"):
        texts_of(planted_row(SAME_QUERY), short)
    assert texts_of(Row("x", 16, data=CLEAN), short)
