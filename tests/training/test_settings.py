"""The options of `python -m gclib train` as a dataclass: `gclib.training.settings`. Refusals: test_command.py."""

import argparse
import dataclasses
import json

import pytest

from gclib.training.settings import DEFAULTS, FREE, SMALLEST, Settings, add_options, flag, resumed, typed_settings


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return typed_settings(parser.parse_args(words))


def test_only_what_was_typed_is_told():
    assert parsed() == {}
    assert parsed("--batch-size", "64", "--symmetric", "--tile-size", "auto") == {
        **{"batch_size": 64, "symmetric": True, "tile_size": "auto"},
    }
    assert parsed("--tile-size", "64", "--learning-rate", "1e-4") == {"tile_size": 64, "learning_rate": 1e-4}


def test_every_setting_is_an_option_with_a_word_of_help():
    parser = argparse.ArgumentParser()
    add_options(parser)
    told = {action.dest: action.help for action in parser._actions}
    for item in dataclasses.fields(Settings):
        assert told[item.name] and flag(item.name) in parser.format_help()


def test_the_defaults_go_together_and_survive_json():
    settings = Settings()
    settings.check()
    settings.check(processes=128)
    completed = settings.completed()
    assert (completed.chunk_size, completed.epochs) == ("auto", 1)
    assert Settings(**json.loads(json.dumps(dataclasses.asdict(completed)))) == completed
    completed.check()


@pytest.mark.parametrize(
    ("given", "chunk_size", "epochs"),
    [
        ({"chunk_tokens": 9}, None, 1),
        ({"step": "naive", "steps": 5}, None, None),
        ({"chunk_size": 3, "epochs": 2}, 3, 2),
    ],
)
def test_what_was_said_is_not_completed(given, chunk_size, epochs):
    completed = Settings(**given).completed()
    assert (completed.chunk_size, completed.epochs) == (chunk_size, epochs)


def test_the_tables_name_settings():
    assert set(SMALLEST) <= set(DEFAULTS) and set(FREE) <= set(DEFAULTS)


@pytest.mark.parametrize("name", SMALLEST)
def test_too_small_is_refused_by_the_name_that_is_typed(name):
    with pytest.raises(ValueError, match=f"{flag(name)} must be at least {SMALLEST[name]}, got {SMALLEST[name] - 1}"):
        Settings(**{name: SMALLEST[name] - 1}).check()


def test_several_processes_want_a_row_each_and_a_step_that_sees_all_rows():
    with pytest.raises(ValueError, match="--batch-size must give each of 4 processes a row, got 3"):
        Settings(batch_size=3).check(processes=4)
    with pytest.raises(ValueError, match="--step must be naive or grad_cache in several processes"):
        Settings(step="accumulation", chunk_size=4).check(processes=2)


def test_a_resumed_run_keeps_its_settings_but_for_the_free_ones():
    saved = Settings(batch_size=8, steps=4)
    assert resumed(saved, {}) == saved
    assert resumed(saved, {"batch_size": 8, "keep": 5}) == dataclasses.replace(saved, keep=5)
    with pytest.raises(ValueError, match="--batch-size must be 8, as in the run that is resumed, got 4"):
        resumed(saved, {"batch_size": 4})
