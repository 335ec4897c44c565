"""Recordings: what is written is read back, a line follows a forecast's picture, and a missing card is refused."""

import dataclasses
import json

import numpy as np
import pytest

from gclib import __main__ as command
from gclib import forecast_step
from gclib.memory.calibration import CalibratedStep, Calibration, Reading
from gclib.memory.recording import (
    SERIES,
    RecordedPiece,
    RecordedStep,
    Recording,
    _read,
    _written,
    load_recordings,
    record_card,
)
from gclib.memory.timeline import picture_of

CASE = CalibratedStep("naive", 4, None, 16)
CARD = Calibration("A card", "tiny", 1000, None, (Reading(CASE, 90, 100, 95, 5),), "versions", 5)


def recording_of(forecast):
    """A recording whose ledger is the forecast, piece by piece."""
    pieces = [
        RecordedPiece(piece.phase, piece.tower, piece.chunk, held, tuple(bytes_ + 7 for bytes_ in held))
        for piece in forecast.timeline
        for held in [tuple(piece.kind_bytes.sum(axis=1).tolist())]
    ]
    step = RecordedStep(CASE, tuple(pieces), forecast.at_peak(), 1, 2, 3)
    return Recording(CARD, (step,), "a command")


@pytest.fixture(scope="module")
def forecast():
    return forecast_step("naive", config="tiny", batch_size=4, query_length=16, passage_length=16)


def test_what_is_written_is_read_back(forecast, tmp_path):
    recording = recording_of(forecast)
    assert _read(json.loads(json.dumps(_written(recording)))) == recording
    (tmp_path / "card.json").write_text(json.dumps(_written(recording)))
    assert load_recordings(tmp_path) == [recording]
    assert load_recordings(tmp_path / "none") == []
    assert recording.steps[0].ledger_peak_bytes == forecast.peak_bytes


@pytest.mark.parametrize(("series", "more"), [(SERIES[0], 0), (SERIES[1], 7)])
def test_a_line_follows_the_picture_of_its_own_forecast(series, more, forecast):
    picture = picture_of(forecast.timeline)
    x, y = recording_of(forecast).steps[0].line(picture, series)
    assert (np.diff(x) >= 0).all() and x[0] >= 0 and x[-1] <= 1
    assert y.max() == forecast.peak_bytes + more
    with pytest.raises(ValueError, match="series must be one of"):
        recording_of(forecast).steps[0].line(picture, "nothing")


def test_a_card_that_is_not_here_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="calibration must be of the CUDA card that is here, got A card"):
        record_card(dataclasses.replace(CARD), tmp_path, command="x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seconds", "0"], "--seconds must be a finite number above 0"),
        (["--seconds", "nan"], "--seconds must be a finite number above 0"),
        (["--record", "x"], "needs a CUDA card"),
    ],
)
def test_the_command_refuses_before_it_measures(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(command.calibration, "calibrate", lambda **_: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        command.main(["calibrate", *arguments])
    assert words in capsys.readouterr().err


def test_a_recording_says_what_makes_it_again(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(command.calibration, "calibrate", lambda **_: CARD)
    monkeypatch.setattr(command.recording, "record_card", lambda *_, command: command)
    command.main(["calibrate", "--seconds", "180", "--record", "there"])
    assert "recorded in python -m gclib calibrate --seconds 180 --record there" in capsys.readouterr().out
