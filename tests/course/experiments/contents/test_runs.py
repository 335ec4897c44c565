"""Trained rows, their bytes and their cache: `gclib.course.experiments.contents.runs`."""

import dataclasses

import pytest

from gclib.course.experiments.contents import runs
from gclib.course.experiments.contents.rows import Row
from gclib.course.experiments.contents.runs import budget_bytes, chunk_for, saved_trainings, train_row, trainings
from gclib.course.experiments.summaries import format_summaries, summarise
from tests.course.experiments.contents.test_rows import TINY, small  # noqa: F401

LARGE = Row("large", 64, 1)


@pytest.mark.slow
def test_every_step_keeps_to_the_bytes_of_the_small_rows(capsys):
    budget = budget_bytes(TINY)
    assert chunk_for(Row("as small", 32), TINY) is None
    for row in (Row("as small", 32), LARGE):
        result = train_row(row, TINY, seed=0)
        assert 0.8 * budget < result.peak_bytes <= budget
        assert result.chunk_size == chunk_for(row, TINY)
        assert result.updates * row.batch_size == 128
        texts = result.updates * row.batch_size
        assert result.tokens <= texts * (TINY.query_length + (1 + row.hard_negatives) * TINY.passage_length)
        assert result.pool == 20 and 0 < result.metrics["top-5"] <= result.metrics["top-20"] == 1.0


@pytest.mark.slow
def test_a_row_is_trained_once_and_again_where_it_depends_on_something_else(tmp_path, monkeypatch):
    row, calls, train = Row("x", 32), [], runs.train_row
    monkeypatch.setattr(runs, "train_row", lambda *a, **o: calls.append(o["seed"]) or train(*a, **o))
    first = trainings(TINY, (row,), seeds=(0, 1), progress=False)
    again = trainings(TINY, (row,), seeds=(0, 1), progress=False)
    assert calls == [0, 1]
    assert again == [dataclasses.replace(result, saved=True) for result in first] == saved_trainings(TINY, (row,))[:2]
    assert "| x |" in format_summaries(summarise(first))
    trainings(TINY, (dataclasses.replace(row, masked=False),), seeds=(0,), progress=False)
    monkeypatch.setattr(runs, "fingerprint", lambda sources: "another corpus")
    trainings(TINY, (row,), seeds=(0,), progress=False)
    assert calls == [0, 1, 0, 0]
    for path in tmp_path.glob("contents-*.json"):
        path.write_bytes(path.read_bytes()[:-5])
    assert saved_trainings(TINY, (row,)) == []


@pytest.mark.slow
def test_a_mask_changes_what_is_learned():
    plain, masked = (
        Row("x", 16, data="same query", order="together", masked=masked, share=0.25) for masked in (False, True)
    )
    losses = [train_row(row, TINY, seed=0).final_loss for row in (plain, masked)]
    assert losses[0] > losses[1]


def test_refusals():
    with pytest.raises(ValueError, match="rows must be at least one"):
        trainings(TINY, ())
    with pytest.raises(ValueError, match="seeds must be at least one"):
        trainings(TINY, (LARGE,), seeds=())
    with pytest.raises(ValueError, match="seed must be an int of at least 0, got -1"):
        trainings(TINY, (LARGE,), seeds=(-1,))
