"""Calibration on a processor, where the allocator is known: forecasts hold, readings are kept and read back."""

import dataclasses

import pytest
import torch

from gclib.memory import calibration
from gclib.memory.calibration import CalibratedStep, Calibration, Reading, calibrate, format_calibration, load

SMALL = (CalibratedStep("naive", 4, None, 16), CalibratedStep("grad_cache", 12, 4, 16))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GCLIB_CACHE", str(tmp_path))


@pytest.mark.slow
def test_a_processor_takes_what_the_forecast_says():
    seen = []
    found = calibrate("cpu", model="tiny", cases=SMALL, on_reading=seen.append)
    assert [reading.case for reading in found.readings] == list(SMALL) and tuple(seen) == found.readings
    for reading in found.readings:
        assert reading.ratio == pytest.approx(1, abs=0.02)
    assert load("cpu") == found
    assert found.usable_bytes <= found.total_bytes and found.context_bytes is None
    assert "budget" in format_calibration(found)


@pytest.mark.slow
def test_a_damaged_file_is_no_calibration():
    assert load("cpu") is None
    calibrate("cpu", model="tiny", cases=SMALL[:1])
    path = calibration._path(calibration._name(torch.device("cpu")))
    path.write_bytes(path.read_bytes()[:-5])
    assert load("cpu") is None


def test_time_ends_a_calibration_after_the_first_case(monkeypatch):
    monkeypatch.setattr(calibration, "read", lambda case, *_: Reading(case, 100, 110))
    assert len(calibrate("cpu", seconds=1e-9, cases=SMALL).readings) == 1


def test_what_does_not_fit_ends_it_with_what_was_read(monkeypatch):
    def read(case, *_):
        if case is SMALL[1]:
            raise torch.OutOfMemoryError("no room")
        return Reading(case, 100, 125)

    monkeypatch.setattr(calibration, "read", read)
    found = calibrate("cpu", cases=SMALL)
    assert found.ratio == 1.25
    with pytest.raises(torch.OutOfMemoryError):
        calibrate("cpu", cases=SMALL[1:])


def test_the_budget_leaves_room_for_the_context_and_for_the_ratio():
    readings = (Reading(SMALL[0], 100, 104), Reading(SMALL[1], 200, 250))
    card = Calibration("card", "bert-base", 1000, 100, readings, "")
    assert card.usable_bytes == int(900 / 1.25)
    assert dataclasses.replace(card, readings=(Reading(SMALL[0], 100, 90),)).usable_bytes == 900


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "meta"}, "device must be the processor"),
        ({"device": "cpu", "cases": ()}, "cases must be at least one"),
        ({"device": "cpu", "seconds": 0}, "seconds must be a finite number above 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        calibrate(**arguments)
