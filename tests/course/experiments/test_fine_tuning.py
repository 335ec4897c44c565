"""The experiment on real weights: its kept rows, its texts, and two updates of it."""

import math

import pytest

from gclib.course.experiments import fine_tuning
from gclib.data.pairs import TextPair

real = pytest.mark.skipif(bool(fine_tuning.missing_packages()), reason="needs the dev packages")
PAIRS = [TextPair(f"count the {name}s of a box", f"def count_{name}(box): return box['{name}']") for name in "abcdefgh"]


def test_the_kept_rows_are_those_of_the_recipe_with_two_seeds_or_more():
    before, *trained = fine_tuning.saved_rows()
    assert before["row"] == "before" and tuple(before) == fine_tuning.COLUMNS
    seeds = {row.name: [line["seed"] for line in trained if line["row"] == row.name] for row in fine_tuning.ROWS}
    cached, accumulated = seeds.values()
    assert cached == accumulated and len(set(cached)) >= 2 and len(trained) == 2 * len(cached)
    for line in trained:
        losses = [float(loss) for loss in line["losses"].split()]
        assert len(losses) == int(line["steps"]) and all(loss > 0 for loss in losses)
        assert 0 < float(line["top-1"]) < float(line["top-5"]) < float(line["top-20"]) <= 1


def test_both_rows_of_the_recipe_make_updates_of_as_many_pairs():
    assert {row.per_step * row.accumulated for row in fine_tuning.ROWS} == {fine_tuning.BATCH}
    assert fine_tuning.saved_rows(fine_tuning.RESULTS.with_name("none.csv")) == []


def test_a_line_is_written_for_each_row_and_seed(tmp_path, monkeypatch):
    def line(row, *, seed, steps):
        return dict.fromkeys(fine_tuning.COLUMNS, "1") | {"row": row.name, "seed": str(seed), "steps": str(steps)}

    monkeypatch.setattr(fine_tuning, "pretrained_model", lambda: None)
    monkeypatch.setattr(fine_tuning, "_line", lambda settings, model: settings | {"mrr": "0.5"})
    monkeypatch.setattr(fine_tuning, "train_row", line)
    fine_tuning.main(["--steps", "3", "--seeds", "4", "5", "--output", str(tmp_path / "new" / "rows.csv")])
    first, *lines = fine_tuning.saved_rows(tmp_path / "new" / "rows.csv")
    assert (first["row"], first["mrr"], first["seed"]) == ("before", "0.5", "")
    names = [row.name for row in fine_tuning.ROWS]
    assert [(line["row"], line["seed"], line["steps"]) for line in lines] == [(n, s, "3") for s in "45" for n in names]


@real
@pytest.mark.slow
def test_texts_are_cut_where_their_tokens_end():
    tokenizer = fine_tuning.pretrained_model().tokenizer
    long = TextPair("sort them " * 50, "def sort(them): return sorted(them) " * 50)
    (cut,) = fine_tuning.cut_pairs([long], tokenizer)
    lengths = [len(tokenizer(text)["input_ids"]) for text in (cut.query, cut.passage)]
    assert lengths == [fine_tuning.QUERY_LENGTH, fine_tuning.PASSAGE_LENGTH]
    assert long.query.startswith(cut.query) and long.passage.startswith(cut.passage)
    (short,) = fine_tuning.cut_pairs([TextPair("sort", "def sort(): ...")], tokenizer)
    assert short == TextPair("sort", "def sort(): ...")


@real
@pytest.mark.slow
@pytest.mark.parametrize("row", [fine_tuning.Row("cached", 8, 1), fine_tuning.Row("accumulated", 4, 2)])
def test_the_trainer_takes_an_update_of_each_row(row, capfd):
    model = fine_tuning.pretrained_model()
    losses = fine_tuning.fine_tune(model, PAIRS, row, seed=0, learning_rate=1e-5)
    assert len(losses) == 1 and 0 < losses[0] < math.log(8)
    assert fine_tuning.judge(model, PAIRS)["top-5"] > 0.5
    assert "loss" not in capfd.readouterr().out
