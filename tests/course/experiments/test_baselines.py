"""What chapter 10's rows are held against: `gclib.course.experiments.baselines`, and the recorded rows."""

import pytest

from gclib.course.experiments import baselines
from gclib.course.experiments.recipes import RECIPES, TableSetting
from gclib.course.experiments.results import pairs_and_tokenizer
from gclib.course.experiments.summaries import METRICS, beyond_spread, recorded_summaries
from gclib.data.pairs import TextPair


def test_bm25_ranks_by_shared_words():
    pairs = [
        TextPair("read a file", "def read(file): open"),
        TextPair("sort the numbers", "def order(items): sort numbers"),
        TextPair("nothing in common", "def other(): pass"),
    ]
    found = baselines.bm25(pairs, ks=(1, 3))
    assert found["top-1"] == pytest.approx(2 / 3) and found["top-3"] == 1.0
    assert found["mrr"] == pytest.approx((1 + 1 + 1 / 3) / 3)


def test_bm25_takes_any_right_passage():
    pairs = [TextPair("sort numbers", "quick"), TextPair("sort numbers", "sort numbers by merging")]
    assert baselines.bm25(pairs, ks=(1,))["top-1"] == 1.0


def test_the_recorded_rows_are_those_of_the_experiment():
    rows = recorded_summaries()
    assert [row.recipe for row in rows] == list(RECIPES) and all(row.seeds == (0, 1, 2) for row in rows)
    assert all(0 < row.spread[name] < row.mean[name] < 1 for row in rows for name in METRICS)
    assert beyond_spread(rows[2], rows[0]) > 5 < beyond_spread(rows[2], rows[1])
    assert 0 < baselines.pretrained()["top-1"] < baselines.pretrained()["top-20"] < 1


def test_texts_as_read_end_where_the_encoders_tokens_do():
    setting = TableSetting(train_pairs=200, test_pairs=40)
    _, held_out, tokenizer = pairs_and_tokenizer(setting)
    query_length, passage_length = setting.lengths().values()
    cut = 0
    for pair, read in zip(held_out, baselines.texts_read(setting), strict=True):
        both = (pair.query, read.query, query_length), (pair.passage, read.passage, passage_length)
        for whole, seen, length in both:
            assert whole.startswith(seen)
            assert tokenizer(seen)["input_ids"] == tokenizer(whole, truncation=True, max_length=length)["input_ids"]
            cut += seen != whole
    assert cut > 40
