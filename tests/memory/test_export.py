"""What is written can be read again, and says what the record says."""

import csv
import json

import pytest

from gclib import forecast_step
from gclib.memory.export import COLUMNS, export_ledger
from gclib.memory.ledger import KINDS
from tests.memory.test_forecast import ContrastiveLoss, built, really_run


@pytest.fixture(scope="module", params=["ledger", "forecast"])
def record(request):
    if request.param == "ledger":
        return really_run("grad_cache", built("tiny", tied=True), (5, 5), ContrastiveLoss(), chunk_size=2)
    return forecast_step("grad_cache", config="tiny", batch_size=99, chunk_size=2, query_length=8, passage_length=12)


@pytest.mark.slow
def test_a_spreadsheet_holds_every_event_and_the_peak(record, tmp_path):
    with export_ledger(record, tmp_path / "step.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    assert len(rows) == sum(len(piece.kind_bytes) for piece in record.timeline)
    peak = max(rows, key=lambda row: int(row[-1]))
    assert int(peak[-1]) == record.peak_bytes
    assert dict(zip(KINDS, map(int, peak[-1 - len(KINDS) : -1]), strict=True)) == record.at_peak()


def test_a_program_reads_the_same(record, tmp_path):
    written = json.loads(export_ledger(record, tmp_path / "step.json").read_text("utf-8"))
    assert written["peak_bytes"] == record.peak_bytes and written["at_peak"] == record.at_peak()
    assert max(sum(event) for piece in written["pieces"] for event in piece["events"]) == record.peak_bytes
    assert [piece["repeats"] for piece in written["pieces"]] == [piece.repeats for piece in record.timeline]


def test_bad_input_is_refused_in_words(record, tmp_path):
    with pytest.raises(ValueError, match="path must end in .csv or .json"):
        export_ledger(record, tmp_path / "step.xlsx")
    with pytest.raises(ValueError, match="record must be"):
        export_ledger([1], tmp_path / "step.csv")
