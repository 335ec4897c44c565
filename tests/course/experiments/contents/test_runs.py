"""Trained rows, their bytes and their cache: `gclib.course.experiments.contents.runs`."""

import dataclasses
from unittest.mock import Mock

import pytest

from gclib.course.experiments import kept
from gclib.course.experiments.contents import runs
from gclib.course.experiments.contents.rows import EQUAL_BYTES, PLANTED, SWEEP, Row
from gclib.course.experiments.contents.runs import (
    Trained,
    budget_bytes,
    chunk_for,
    recorded_trainings,
    saved_trainings,
    train_row,
    trainings,
)
from gclib.course.experiments.summaries import METRICS, format_summaries, summarise
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
    monkeypatch.setattr(kept, "write_checked", Mock(side_effect=PermissionError("a cache that others own")))
    assert trainings(TINY, (row,), seeds=(0,), progress=False)[0].seed == 0


@pytest.mark.slow
def test_a_mask_changes_what_is_learned():
    plain, masked = (
        Row("x", 16, data="same query", order="together", masked=masked, share=0.25) for masked in (False, True)
    )
    losses = [train_row(row, TINY, seed=0).final_loss for row in (plain, masked)]
    assert losses[0] > losses[1]


def test_what_is_written_is_read_as_the_same_results(tmp_path, monkeypatch):
    metrics = {name: 0.25 for name in METRICS}

    def trained(setting, chosen):
        return [
            Trained(row, seed, metrics, 20, 4, 99, None if row.batch_size == 32 else 7, 1000 + place, 0.5, 3.0, 1, True)
            for place, row in enumerate(chosen)
            for seed in (0, 1)
        ]

    monkeypatch.setattr(runs, "trainings", trained)
    runs.main(tmp_path / "new" / "contents.csv")
    for table in (EQUAL_BYTES, PLANTED, SWEEP):
        read = recorded_trainings(table, tmp_path / "new" / "contents.csv")
        assert {(one.recipe, one.seed) for one in read} == {(row, seed) for row in table for seed in (0, 1)}
        everything = trained(None, tuple(dict.fromkeys((*EQUAL_BYTES, *PLANTED, *SWEEP))))
        assert all(one in everything for one in read)
    assert recorded_trainings(SWEEP, tmp_path / "none.csv") == []


def test_the_full_experiment_is_recorded_whole_and_keeps_to_the_small_rows_bytes():
    budget = max(one.peak_bytes for one in recorded_trainings(EQUAL_BYTES[:1]))
    for table in (EQUAL_BYTES, PLANTED, SWEEP):
        read = recorded_trainings(table)
        assert len(read) == 3 * len(table) and {one.pool for one in read} == {2_000}
        assert all(0 < one.peak_bytes <= 1.01 * budget for one in read)  # the budget is the forecast of padded rows


def test_refusals():
    with pytest.raises(ValueError, match="rows must be at least one"):
        trainings(TINY, ())
    with pytest.raises(ValueError, match="seeds must be at least one"):
        trainings(TINY, (LARGE,), seeds=())
    with pytest.raises(ValueError, match="seed must be an int of at least 0, got -1"):
        trainings(TINY, (LARGE,), seeds=(-1,))
