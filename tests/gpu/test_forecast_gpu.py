"""The forecast against a GPU: its ledger almost to the byte, its allocator within 5 %; and what is recorded there."""

import pytest
import torch

from gclib import Encoder, forecast_step, record_memory
from gclib.memory.calibration import GPU_CASES, CalibratedStep, calibrate, format_calibration, run_case
from gclib.memory.recording import RECORDED, load_recordings, record_card

HOST_BYTES = 1024  # seeds of attention, which lie with the host on a card and are counted by the forecast


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("step", "batch", "chunk"), [("naive", 6, None), ("accumulation", 9, 4), ("grad_cache", 9, 4)])
@pytest.mark.parametrize("model", ["bert-base", "minilm-l6", "distilbert-base", "modernbert-base"])
def test_the_forecast_is_the_ledger_of_the_card(model, step, batch, chunk, autocast):
    case = CalibratedStep(step, batch, chunk, 100, autocast)
    encoder = Encoder.from_config(model).cuda()
    run_case(case, model, torch.device("cuda"), encoder)
    encoder.zero_grad()
    with record_memory(encoder, device="cuda") as ledger:
        run_case(case, model, torch.device("cuda"), encoder, on_phase=ledger.on_phase)
    same = {"batch_size": batch, "chunk_size": chunk, "query_length": 100, "passage_length": 100, "device": "cuda"}
    told = forecast_step(step, config=model, autocast=torch.bfloat16 if autocast else None, **same)
    print(
        model, step, autocast, ledger.peak_bytes, told.peak_bytes - ledger.peak_bytes, ledger.at_peak(), told.at_peak()
    )
    tolerance = HOST_BYTES + (ledger.peak_bytes // 1000 if autocast else 0)  # sums of gradients in float32
    assert told.peak_bytes == pytest.approx(ledger.peak_bytes, abs=tolerance)


@pytest.mark.slow
def test_the_forecast_is_within_five_percent_of_the_card(tmp_path, monkeypatch):
    monkeypatch.setenv("GCLIB_CACHE", str(tmp_path))
    found = calibrate("cuda", seconds=300)
    print(format_calibration(found))
    assert len(found.readings) == len(GPU_CASES) >= 12
    plain = [reading for reading in found.readings if not reading.case.autocast]
    assert len(plain) >= 12 and all(abs(reading.ratio - 1) <= 0.05 for reading in plain)
    assert all(abs(reading.ratio - 1) <= 0.08 for reading in found.readings)
    (recording,) = load_recordings(record_card(found, tmp_path / "recordings", command="x").parent)
    assert [step.case for step in recording.steps] == list(RECORDED)
    for step in recording.steps:
        tensors = step.requested_peak_bytes - found.workspace_bytes
        assert tensors == pytest.approx(step.ledger_peak_bytes, rel=0.01)
        assert max(max(piece.allocator_bytes, default=0) for piece in step.pieces) == step.requested_peak_bytes
