"""The forecast against a GPU's own counter: BERT-base, within 5 % over a dozen configurations."""

import pytest

from gclib.calibration import GPU_CASES, calibrate, format_calibration


@pytest.mark.slow
def test_the_forecast_is_within_five_percent_of_the_card():
    found = calibrate("cuda", seconds=300)
    print(format_calibration(found))
    assert len(found.readings) == len(GPU_CASES) >= 12
    assert all(abs(reading.ratio - 1) <= 0.05 for reading in found.readings)
