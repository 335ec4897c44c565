"""The memory lab's live step on a CUDA card: its ledger against the allocator, too big a batch, Stop."""

import gc

import pytest
import torch

from gclib.course.memory_lab import answers as lab
from gclib.course.memory_lab import run as live
from gclib.course.memory_lab.answers import LabSettings, forecast_of, largest_that_fits
from gclib.course.memory_lab.run import LiveRun

MIB = 2**20
# Tensors of whole MiB, so that the allocator's rounding stays small beside them.
BIG = LabSettings("grad_cache", "bert-base", batch_size=128, chunk_size=32, length=128)
SMALL = LabSettings("grad_cache", "mini", batch_size=64, chunk_size=8, length=32)


@pytest.fixture(autouse=True)
def _no_corpus(monkeypatch):
    """Random tokens: a run needs no corpus."""
    monkeypatch.setattr(live, "_real_texts", lambda: None)


def allocated():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("precision", list(lab.PRECISIONS))
@pytest.mark.parametrize("step", ["naive", "grad_cache"])
def test_the_ledger_of_a_run_is_close_to_the_card_s_allocator(step, precision):
    length, batch = BIG.length, 64 if step == "naive" else BIG.batch_size
    run = LiveRun(LabSettings(step, BIG.model, batch, BIG.chunk_size, length, precision=precision))
    result = run.run()
    assert (run.device.type, result.ending) == ("cuda", "finished"), result.error
    told = forecast_of(run.settings).peak_bytes
    counts = (result.peak_bytes, result.allocated_peak_bytes, told)
    print(f"{step}, {precision}: ledger, allocator, forecast: {', '.join(f'{c / MIB:,.1f} MiB' for c in counts)}")
    # in bf16 weights are of little more than a MiB each, and get blocks of up to two
    assert result.peak_bytes == pytest.approx(result.allocated_peak_bytes, rel=0.06 if "bf16" in precision else 0.02)
    assert told == pytest.approx(result.peak_bytes, rel=1e-3)


def test_a_run_leaves_generators_and_the_card_as_they_were():
    LiveRun(SMALL).run()  # the matrix library's workspaces are there from now on
    torch.rand(3, device="cuda")
    before, states = allocated(), (torch.get_rng_state(), torch.cuda.get_rng_state())
    run = LiveRun(SMALL)
    run.start()
    run.join()
    assert run.result.ending == "finished", run.result.error
    assert torch.equal(states[0], torch.get_rng_state()) and torch.equal(states[1], torch.cuda.get_rng_state())
    assert all(parameter.device.type == "cpu" and parameter.grad is None for parameter in run.encoder.parameters())
    assert abs(allocated() - before) <= 64 * MIB  # another thread may take a workspace of its own


@pytest.fixture
def small_card():
    """PyTorch may have so many bytes of the card: others on it are not disturbed, and it is full soon."""
    bytes_ = 6 * 2**30
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(bytes_ / torch.cuda.get_device_properties(0).total_memory)
    yield bytes_
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("step", ["naive", "grad_cache"])
def test_a_batch_too_big_for_the_card_ends_in_words_and_the_next_run_finishes(step, small_card):
    """Of the gradient cache one chunk is too big, which is all the rows of a tower."""
    assert LiveRun(SMALL).run().ending == "finished"
    free, before = small_card, allocated()
    most = largest_that_fits(LabSettings("naive", "bert-base", length=256, device="cuda"), free)
    rows = most * 3 // 2 if step == "naive" else most * 3
    settings = LabSettings(step, "bert-base", batch_size=rows, chunk_size=rows, length=256, device="cuda")
    assert lab.obstacle(forecast_of(settings), 2**50, card_free_bytes=free) is not None  # the lab would not start it
    run = LiveRun(settings)
    result = run.run()
    print(f"{rows:,} rows where {most:,} are forecast to fit: {result.error}")
    assert result.ending == "failed" and run.encoder is None
    for words in ("Out of memory (in piece", "the step asked for", torch.cuda.get_device_name(), "was returned"):
        assert words in result.error
    assert "free now: the next run may start." in result.error
    assert result.peak_bytes == pytest.approx(result.allocated_peak_bytes, rel=0.05)
    assert abs(allocated() - before) <= MIB
    assert LiveRun(SMALL).run().ending == "finished"


@pytest.mark.parametrize("step", ["accumulation", "grad_cache"])
def test_stop_ends_between_chunks(step, monkeypatch):
    LiveRun(SMALL).run()
    before, states = allocated(), (torch.get_rng_state(), torch.cuda.get_rng_state())
    run = LiveRun(LabSettings(step, "mini", batch_size=64, chunk_size=4, length=32))
    report = run._on_phase

    def stop_in_the_middle(phase, **place):
        if run.begun == run.pieces // 2 + 1:
            run.stop()
        report(phase, **place)

    monkeypatch.setattr(run, "_on_phase", stop_in_the_middle)
    result = run.run()
    assert result.ending == "stopped" and run.done == run.pieces // 2
    assert result.peak_bytes > 0 and result.allocated_peak_bytes > 0
    assert torch.equal(states[0], torch.get_rng_state()) and torch.equal(states[1], torch.cuda.get_rng_state())
    assert all(parameter.grad is None for parameter in run.encoder.parameters())
    assert abs(allocated() - before) <= MIB
