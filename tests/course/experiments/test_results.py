"""The experiment, small: rows, their cache, and the commands that print them: `gclib.course.experiments.results`."""

import dataclasses
from unittest.mock import Mock

import pytest
import torch
from helpers.numbers import small_corpus

from gclib import __main__ as command
from gclib.course.experiments import kept, results
from gclib.course.experiments.recipes import RECIPES, TableSetting
from gclib.course.experiments.results import POINTS, Point, fresh_encoder, race, saved_results, table1, thin
from gclib.data import card
from gclib.data.tokens import tokenize_texts
from gclib.training.loop import TrainingRecord

TINY = TableSetting(
    train_pairs=512, test_pairs=40, epochs=1, size="tiny", vocab_size=200, query_length=8, passage_length=8
)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """A corpus of numbers in words, and an empty cache."""
    monkeypatch.setattr(command, "QUICK", TINY)
    with small_corpus(tmp_path, monkeypatch):
        yield


def test_four_rows_with_the_same_number_of_examples():
    rows = table1(TINY, progress=False)
    assert [result.recipe for result in rows] == list(RECIPES)
    assert {result.examples for result in rows} == {512}
    for result in rows:
        assert set(result.metrics) == {"top-1", "top-5", "top-20", "top-100", "mrr"}
        assert 0 < result.metrics["top-5"] <= result.metrics["top-20"] <= result.metrics["top-100"] == 1.0
        assert result.seconds > 0 and result.final_loss > 0 and not result.saved
        assert len(result.curve) <= POINTS and result.curve[-1].examples == 512
    assert len({result.metrics["mrr"] for result in rows}) == 4


def test_saved_rows_are_read_and_fresh_ones_are_trained_again(tmp_path, monkeypatch):
    only = RECIPES[2:3]
    (first,) = table1(TINY, recipes=only, progress=False)
    train = results.run
    monkeypatch.setattr(results, "run", None)  # calling it would raise
    (again,) = table1(TINY, recipes=only, progress=False)
    assert again == dataclasses.replace(first, saved=True)
    calls = []
    monkeypatch.setattr(results, "run", lambda *args, **options: calls.append(1) or train(*args, **options))
    (fresh,) = table1(TINY, recipes=only, progress=False, fresh=True)
    assert len(calls) == 1
    assert fresh.metrics == first.metrics  # the same seed, the same row
    (path,) = tmp_path.glob("table1-*.json")
    path.write_bytes(path.read_bytes()[:-5])
    assert not table1(TINY, recipes=only, progress=False)[0].saved
    assert len(calls) == 2


def test_a_row_is_saved_under_all_that_it_depends_on(monkeypatch):
    def key(setting=TINY, recipe=RECIPES[0], seed=0):
        return results._key(setting, recipe, seed, results._surroundings())

    keys = [
        key(),
        key(setting=dataclasses.replace(TINY, epochs=3)),
        key(recipe=dataclasses.replace(RECIPES[0], learning_rate=1.0)),
        key(seed=1),
    ]
    monkeypatch.setattr(results, "fingerprint", lambda sources: "another corpus")
    keys.append(key())
    monkeypatch.setattr(results, "code_digest", lambda *files: "other code")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_another_seed_is_another_run():
    only = RECIPES[2:3]
    losses = [table1(TINY, recipes=only, seed=seed, progress=False)[0].final_loss for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_the_callers_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    table1(TINY, recipes=RECIPES[2:], progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_and_first_weights():
    one, other = (fresh_encoder(dataclasses.replace(TINY, layers=layers), 3) for layers in (1, None))
    assert [encoder.model.config.num_hidden_layers for encoder in (one, other)] == [1, 2]
    again = fresh_encoder(TINY, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))


# --- seeds ----------------------------------------------------------------------------------------------------


def record(step, loss, norm=1.0):
    return TrainingRecord(step, 0, loss, norm, 1e-3, 8 * step, 0.1 * step)


def test_a_curve_is_thinned_to_means_of_equal_stretches():
    records = [record(step, float(step), 2.0 * step) for step in range(1, 11)]
    assert thin(records, 5) == tuple(Point(16 * n, 2 * n - 0.5, 4 * n - 1.0) for n in range(1, 6))
    assert thin(records[:3]) == tuple(Point(8 * n, float(n), 2.0 * n) for n in (1, 2, 3))
    uneven = thin(records, 4)
    assert len(uneven) == 4 and uneven[-1].examples == 80
    assert thin([]) == ()


@pytest.mark.slow
def test_a_race_trains_what_is_missing_and_says_how_far_it_is(monkeypatch, capsys):
    only = RECIPES[2:]
    table1(TINY, recipes=only[:1], seed=1, progress=False)
    calls, run = [], results.run
    monkeypatch.setattr(results, "run", lambda recipe, *a, **o: calls.append(o["seed"]) or run(recipe, *a, **o))
    trained = race(TINY, recipes=only, seeds=(0, 1))
    assert [(r.recipe, r.seed, r.saved) for r in trained] == [
        (only[0], 0, False),
        (only[1], 0, False),
        (only[0], 1, True),
        (only[1], 1, False),
    ]
    assert calls == [0, 0, 1]
    assert "1536/1536" in capsys.readouterr().err
    assert race(TINY, recipes=only, seeds=(0, 1))[1].curve == trained[1].curve
    assert [(r.recipe, r.seed) for r in saved_results(TINY, seeds=(1, 5))] == [(only[0], 1), (only[1], 1)]
    monkeypatch.setattr(kept, "write_checked", Mock(side_effect=PermissionError("a cache that others own")))
    assert race(TINY, recipes=only[:1], seeds=(7,))[0].seed == 7


def test_refusals():
    with pytest.raises(ValueError, match="seeds must be at least one"):
        race(TINY, seeds=())
    with pytest.raises(ValueError, match="recipes must be at least one"):
        table1(TINY, recipes=())
    with pytest.raises(ValueError, match="seed must be an int of at least 0, got -1"):
        table1(TINY, seed=-1)


@pytest.mark.slow
def test_the_command_prints_the_table(capsys):
    assert command.main(["table1", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert all(recipe.name in printed for recipe in RECIPES)
    assert "Percent of 40 test queries, each among as many passages; 512 examples a row,\nseed 0" in printed


def test_the_command_prints_the_figures_and_writes_them_when_asked(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(command, "load_corpus", lambda: "corpus")
    monkeypatch.setattr(card, "figures", lambda corpus: f"figures of the {corpus}")
    monkeypatch.setattr(card, "write_figures", calls.append)
    assert command.main(["data-card"]) == 0
    assert capsys.readouterr().out == "figures of the corpus\n"
    assert calls == []
    command.main(["data-card", "--write"])
    assert calls == ["figures of the corpus"]


@pytest.mark.parametrize("arguments", [[], ["table2"], ["table1", "--seed", "x"]])
def test_the_command_says_how_to_use_it(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m gclib" in capsys.readouterr().err


def test_the_help_says_what_is_trained_and_where_it_is_kept(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        command.main(["table1", "--help"])
    told = capsys.readouterr().out
    assert "Train the same small encoder four times" in told and "order of the pairs (default: 0)" in told
    assert str(command.cache_folder()) in told


def test_the_tokenizer_that_keeps_tokens_gives_the_batches_of_the_one_that_does_not():
    """Repeated texts, some cut and some padded, an empty one, and two lengths of the same text."""
    kept = results.pairs_and_tokenizer(TINY)[2]
    texts = [pair.passage for pair in results.pairs_and_tokenizer(TINY)[0][:6]] + ["one", "", "one"]
    for length, chosen in ((12, texts), (40, texts[3:]), (12, texts[::-1]), (9, texts[-1:])):
        got, wanted = (tokenize_texts(chosen, tokenizer, length) for tokenizer in (kept, kept.tokenizer))
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) and got[key].dtype == wanted[key].dtype for key in wanted)
    assert kept(texts[:2])["input_ids"] == kept.tokenizer(texts[:2])["input_ids"]
