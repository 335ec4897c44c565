"""The memory lab: what its controls do, what a run leaves behind, and that nothing a slider does raises."""

import gc
import random
import re
import threading
import time
import weakref
from dataclasses import replace
from itertools import product

import ipywidgets
import numpy as np
import psutil
import pytest
import torch
from helpers.page import alt_of, text_of
from helpers.shares import a_share

from gclib import ContrastiveLoss, Encoder, forecast_step
from gclib.course.memory_lab import answers as lab
from gclib.course.memory_lab import bundles
from gclib.course.memory_lab import run as live
from gclib.course.memory_lab import widget as widgets
from gclib.course.memory_lab.advice import _chunks, _ways_out, advice, verdict, way_out
from gclib.course.memory_lab.answers import LabSettings, forecast_of, obstacle, seconds_here
from gclib.course.memory_lab.picture import PeaksView, TimelineView
from gclib.course.memory_lab.run import LiveRun, make_batch, step_of, warm_optimizer
from gclib.course.memory_lab.widget import MemoryLab
from gclib.memory import devices, fake_modules
from gclib.memory.devices import GPU_MEMORY_BYTES
from gclib.memory.forecast import forecast_workload
from gclib.memory.ledger import KINDS
from gclib.memory.plan import best_plan
from gclib.memory.shards import rank_bytes
from gclib.memory.timeline import picture_of
from gclib.models.adapters import LoRA
from gclib.models.presets import PRESETS
from gclib.support.words import format_bytes, format_table

TINY = {"model": "tiny", "length": 16}


@pytest.fixture(autouse=True)
def _no_corpus(monkeypatch):
    """Random tokens unless a test says otherwise: a run needs no corpus."""
    monkeypatch.setattr(live, "_real_texts", lambda: None)


@pytest.fixture
def memory_lab():
    """A lab on the smallest model; whatever it started has ended when the test has."""
    made = MemoryLab(**TINY, batch_size=16, chunk_size=4, ahead=False)
    made.wait()
    yield made
    made.stop.click()
    made.wait()


def values_of(control):
    return [option[1] if isinstance(option, tuple) else option for option in control.options]


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# --- the forecast ---------------------------------------------------------------------------------------------


def test_the_picture_and_the_words_say_the_forecast(memory_lab):
    peak = format_bytes(forecast_of(memory_lab.settings()).peak_bytes)
    assert f"Peak {peak}: " in text_of(memory_lab.forecast)
    assert f"Peak {peak}, of which" in alt_of(memory_lab)


@pytest.mark.slow
def test_every_control_that_matters_changes_the_forecast(memory_lab):
    for name, value in {
        "chunk_size": 8,
        "batch_size": 128,
        "length": 32,
        "query_length": 32,
        "retain_chunks": 64,
        "precision": "pure bf16",
        "optimizer": "sgd",
        "negatives": 2,
        "symmetric": True,
        "tile_size": 1024,
        "tied": False,
        "step": "naive",
        "model": "mini",
        "checkpointing": True,
        "lora_rank": 8,
        "ranks": "4 DDP",
        "budget": lab.BUDGETS["64 MiB"],
    }.items():
        at_the_loss = name in ("retain_chunks", "symmetric", "tile_size")  # what matters where the loss is the peak
        memory_lab.batch_size.value = 2048 if at_the_loss else 16
        memory_lab.step.value = "naive" if name == "checkpointing" else "grad_cache"
        memory_lab.wait()
        start = memory_lab.settings()
        control, words, alt = getattr(memory_lab, name), memory_lab.forecast.value, alt_of(memory_lab)
        before, control.value = control.value, value
        memory_lab.wait()
        assert (memory_lab.forecast.value, alt_of(memory_lab)) != (words, alt), name
        assert memory_lab.settings() == (start if name == "budget" else replace(start, **{name: value}))
        control.value = before
        assert (memory_lab.forecast.value, alt_of(memory_lab)) == (words, alt), name


def test_a_law_not_known_yet_is_announced_and_then_drawn(memory_lab, monkeypatch):
    monkeypatch.setattr(lab, "_fitted", set())
    lab.forecast_of.cache_clear()
    memory_lab.batch_size.value = 32
    assert "Reading off the memory law" in text_of(memory_lab.forecast)
    memory_lab.wait()
    assert text_of(memory_lab.forecast).startswith("Peak ")


def move(memory_lab, draw):
    """One random move; whatever it leads to is said in words."""
    control = draw.choice(memory_lab.controls)
    control.value = draw.choice(values_of(control))
    words = text_of(memory_lab.forecast)
    assert words.startswith(("Peak ", "Reading off the memory law")) or "No forecast: " in words
    assert " must " in words or not words.startswith("No forecast")


@pytest.mark.slow
def test_random_moves_of_all_controls_raise_nothing(memory_lab):
    draw = random.Random(1)
    memory_lab.model.options = [(name, name) for name in ("tiny", "mini")]
    for _ in range(30):
        move(memory_lab, draw)  # quicker than laws are read off: only where the controls come to rest, one is
    memory_lab.wait()
    assert text_of(memory_lab.forecast).startswith("Peak ") or " must " in text_of(memory_lab.forecast)


@pytest.mark.slow
@pytest.mark.parametrize(("moves", "lengths"), [(25, [16]), pytest.param(1000, [16, 32], marks=pytest.mark.deep)])
def test_random_moves_that_are_each_drawn_raise_nothing_and_the_same_again_leak_nothing(moves, lengths, memory_lab):
    process = psutil.Process()
    memory_lab.model.options = [("tiny", "tiny")]
    memory_lab.length.options = [(f"{length}", length) for length in lengths]
    memory_lab.query_length.options = [("same", 0), ("16", 16)]
    memory_lab.tile_size.options = [("dense", 0), ("1,024", 1024)]
    memory_lab.precision.options = [("float32", "float32"), ("bf16 autocast", "bf16 autocast")]
    memory_lab.negatives.options, memory_lab.tied.options = [("0", 0), ("2", 2)], [("one", True)]
    memory_lab.checkpointing.options = [("no", False)]
    memory_lab.lora_rank.options = [("none", 0), ("8", 8)]
    memory_lab.ranks.options = [(name, name) for name in ("1", "2 DDP", "2 FSDP2")]
    controls = (*memory_lab.controls, memory_lab.pin)
    start, taken = [control.value for control in controls], []
    for _ in range(3):  # once to read off laws and to fill caches, then twice
        for control, value in zip(controls, start, strict=True):
            control.value = value
        draw = random.Random(2)
        for _ in range(moves):
            move(memory_lab, draw)
            memory_lab.wait()
            assert text_of(memory_lab.forecast).startswith("Peak ") or memory_lab.tile_size.value
            if draw.random() < 0.05:
                draw.choice(
                    [memory_lab.largest.click, lambda: setattr(memory_lab.pin, "value", not memory_lab.pin.value)]
                )()
        gc.collect()
        taken.append(process.memory_info().rss)
    assert taken[2] <= 1.05 * taken[0]


@pytest.mark.parametrize("step", list(lab.STEP_WORDS))
def test_the_largest_of_everything_is_forecast_refused_in_words_and_allocates_nothing(step, memory_lab, monkeypatch):
    monkeypatch.setattr(live, "make_batch", lambda settings: pytest.fail("a batch was made"))
    memory_lab.step.value = step
    memory_lab.batch_size.value = max(values_of(memory_lab.batch_size))
    memory_lab.chunk_size.value = max(values_of(memory_lab.chunk_size))
    memory_lab.wait()
    assert text_of(memory_lab.forecast).startswith("Peak ")
    monkeypatch.setattr(widgets, "ram_bytes", lambda: (2**30, 2**27))
    memory_lab.run.click()
    assert "Not run: the forecast is" in text_of(memory_lab.status)
    assert "Nothing was allocated" in text_of(memory_lab.status)
    assert memory_lab.live is None and not memory_lab.run.disabled


def test_the_largest_batch_of_all_answers_in_tib(memory_lab):
    memory_lab.batch_size.value = 2**20
    assert re.search(r"Peak [\d.]+ TiB", text_of(memory_lab.forecast))


def test_a_card_is_forecast_with_its_own_operations_and_a_run_with_those_of_its_device(memory_lab):
    card = "T4 (16 GB)"
    on_processor = memory_lab.settings()
    memory_lab.budget.value = lab.BUDGETS[card]
    memory_lab.wait()
    assert memory_lab.settings() == replace(on_processor, device="cuda")
    told = forecast_of(memory_lab.settings()).peak_bytes
    assert told < forecast_of(on_processor).peak_bytes
    assert f"Peak {format_bytes(told)}: " in text_of(memory_lab.forecast) and card in text_of(memory_lab.forecast)
    memory_lab.run.click()
    memory_lab.wait()
    assert memory_lab.live.result.peak_bytes == forecast_of(on_processor).peak_bytes
    assert "exactly as forecast with a processor's operations." in text_of(memory_lab.status)
    assert "with a card's operations. It fits" in text_of(memory_lab.forecast)
    assert "bytes, a card's operations" in memory_lab.table()
    assert "The picture is of the processor that ran the step" in text_of(memory_lab.forecast)
    assert f"Peak {format_bytes(told)}: " in text_of(memory_lab.forecast)
    memory_lab.budget.value = lab.BUDGETS["64 MiB"]
    assert "The picture is of" not in text_of(memory_lab.forecast)


def test_find_the_largest_batch(memory_lab):
    memory_lab.budget.value = lab.BUDGETS["64 MiB"]
    memory_lab.largest.click()
    said = re.search(r"The largest batch within 64 MiB is ([\d,]+)", text_of(memory_lab.status))
    most, settings = int(said[1].replace(",", "")), memory_lab.settings()
    at, beyond = (forecast_of(replace(settings, batch_size=size)).peak_bytes for size in (most, most + 1))
    assert at <= lab.BUDGETS["64 MiB"] < beyond
    assert settings.batch_size <= most < 2 * settings.batch_size


def test_the_largest_batch_keeps_the_retained_chunks(memory_lab):
    memory_lab.budget.value = lab.BUDGETS["64 MiB"]
    memory_lab.retain_chunks.value = 64
    memory_lab.largest.click()
    most = int(re.search(r"is ([\d,]+)", text_of(memory_lab.status))[1].replace(",", ""))
    assert forecast_of(memory_lab.settings()).peak_bytes <= memory_lab.budget.value
    assert forecast_of(replace(memory_lab.settings(), batch_size=most + 1)).peak_bytes > memory_lab.budget.value


def test_where_no_batch_fits_that_is_said(memory_lab, monkeypatch):
    monkeypatch.setattr(lab, "largest_that_fits", lambda settings, budget: 0)
    memory_lab.largest.click()
    assert "Not even one pair fits within 256 MiB" in text_of(memory_lab.status)
    assert memory_lab.batch_size.value == 16


def test_compare_two_settings(memory_lab):
    before = memory_lab.settings()
    memory_lab.pin.value = True
    assert "the same to the byte" in text_of(memory_lab.compared)
    memory_lab.chunk_size.value = 16
    now, words = memory_lab.settings(), text_of(memory_lab.compared)
    assert before.described() in words and "times as much" in words and "more activations" in words
    assert words in memory_lab.table() and format_bytes(forecast_of(now).peak_bytes) in words
    memory_lab.chunk_size.value, memory_lab.optimizer.value = 4, "sgd"
    words = r"Now: .*, [\d.]+ % of that. The largest change: .* less optimizer.$"
    assert re.search(words, text_of(memory_lab.compared))
    memory_lab.pin.value = False
    assert memory_lab.compared.value == ""


def test_the_bars_have_room_for_a_legend_of_every_kind():
    bars = PeaksView()
    bars.show({name: dict.fromkeys(KINDS, 2**20) for name in ("pinned", "now")}, "two peaks")
    legend = bars.figure.axes[0].get_legend().get_window_extent(bars.canvas.get_renderer())
    assert legend.y0 >= 0 and legend.y1 <= bars.figure.bbox.y1 and legend.x1 <= bars.figure.bbox.x1


def test_where_there_is_no_forecast_nothing_is_compared(memory_lab):
    memory_lab.pin.value = True
    memory_lab.tile_size.value = 256
    memory_lab.batch_size.value = 65536
    assert memory_lab.compared.value == ""
    memory_lab.pin.value = False
    memory_lab.pin.value = True
    assert not memory_lab.pin.value
    assert text_of(memory_lab.status).startswith("Nothing to compare with: tile_size must cut")


@pytest.mark.parametrize(
    "change",
    [{}, {"step": "naive"}, {"retain_chunks": 2, "query_length": 8}, {"precision": "pure bf16"}, {"tile_size": 8}]
    + [{"negatives": 2, "tied": False}, {"checkpointing": True, "symmetric": True}]
    + [{"lora_rank": 8, "ranks": "2 DDP", "negatives": 1}, {"lora_rank": 16, "ranks": "4 FSDP2", "tile_size": 8}]
    + [{"step": "accumulation", "ranks": "2 FSDP2"}, {"precision": "bf16 autocast", "lora_rank": 8}],
)
def test_the_forecast_as_code_gives_the_same_forecast(change, capsys):
    settings, names = replace(LabSettings(**TINY, batch_size=16, chunk_size=4), **change), {}
    exec(settings.as_code(), names)
    assert names["forecast"].peak_bytes == forecast_of(settings).peak_bytes
    assert f"{names['forecast'].peak_bytes:,} bytes" in capsys.readouterr().out


def test_the_code_follows_the_controls(memory_lab):
    memory_lab.chunk_size.value = 16
    assert memory_lab.code.value == memory_lab.settings().as_code()


def test_words_about_other_settings_do_not_stay(memory_lab):
    memory_lab.run.click()
    memory_lab.wait()
    assert text_of(memory_lab.status).startswith("Finished")
    memory_lab.chunk_size.value = 16
    assert text_of(memory_lab.status) == widgets.READY


def test_every_published_model_has_a_forecast_estimate_of_time():
    forecast = forecast_of(LabSettings(**TINY))
    for model in lab.MODELS:
        assert lab.seconds_here(LabSettings(model=model), forecast) > 0


def test_too_many_tiles_are_refused_in_words(memory_lab):
    memory_lab.batch_size.value = 65536
    memory_lab.wait()
    memory_lab.tile_size.value = 256
    assert "tile_size must cut the 65,536 x 65,536 logits into at most 256 tiles" in text_of(memory_lab.forecast)
    memory_lab.run.click()
    assert text_of(memory_lab.status).startswith("Not run: tile_size must cut")


def test_an_error_in_a_forecast_is_told_in_words(memory_lab, monkeypatch):
    monkeypatch.setattr(lab, "_fitted", set())
    monkeypatch.setattr(lab, "forecast_of", lambda settings: 1 / 0)
    memory_lab.batch_size.value = 64
    memory_lab.wait()
    assert text_of(memory_lab.forecast) == "No forecast: ZeroDivisionError: division by zero."


def test_the_chunk_has_no_part_in_the_naive_step(memory_lab):
    memory_lab.step.value = "naive"
    assert memory_lab.chunk_size.disabled
    memory_lab.step.value = "accumulation"
    assert not memory_lab.chunk_size.disabled
    memory_lab.wait()


def test_a_lab_that_cannot_start_there_is_refused():
    for wrong in ({"model": "huge"}, {"step": "fast"}, {"batch_size": 3}, {"budget": "1 MB"}, {"chunk_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
            MemoryLab(**wrong)


# --- access ---------------------------------------------------------------------------------------------------


def test_every_control_is_labelled_and_can_be_reached_by_keyboard(memory_lab):
    for control in (*memory_lab.controls, memory_lab.run, memory_lab.stop):
        assert control.description.strip() and control.tooltip.strip()
        assert control.tabbable is not False
    for control in memory_lab.controls:
        assert isinstance(control, ipywidgets.SelectionSlider | ipywidgets.Dropdown)


def test_status_and_forecast_are_read_aloud_when_they_change(memory_lab):
    assert 'role="status"' in memory_lab.status.value and 'aria-live="polite"' in memory_lab.forecast.value


def test_the_table_says_what_the_picture_says(memory_lab):
    forecast, table = forecast_of(memory_lab.settings()), memory_lab.table()
    assert memory_lab.settings().described() in table
    for count in (forecast.peak_bytes, *(count for count in forecast.at_peak().values() if count)):
        assert format_bytes(count) in table
    for span in picture_of(forecast.timeline).spans:
        assert span.label.replace("\n", " ") in table
    assert text_of(memory_lab.forecast) in table
    assert "within 256 MiB" in table


# --- the run --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@a_share(
    ("step", "precision", "optimizer"),
    list(lab.STEP_WORDS),
    [*((precision, "adamw") for precision in lab.PRECISIONS), (next(iter(lab.PRECISIONS)), "sgd")],
    one_in=3,
)
def test_a_run_in_every_precision_takes_what_was_forecast(step, precision, optimizer):
    settings = LabSettings(step, "tiny", 7, 3, 16, None, 8, 1, precision, optimizer)
    result = LiveRun(settings).run()
    assert (result.ending, result.peak_bytes) == ("finished", forecast_of(settings).peak_bytes), result.error


@a_share(("step", "tile_size"), list(lab.STEP_WORDS), [None, 5], one_in=2)
def test_a_run_takes_what_was_forecast_to_the_byte(step, tile_size):
    settings = LabSettings(step, "tiny", batch_size=13, chunk_size=4, length=12, tile_size=tile_size)
    run = LiveRun(settings)
    assert run.run().ending == "finished"
    assert run.result.peak_bytes == forecast_of(settings).peak_bytes
    assert run.done == run.pieces and np.isfinite(run.result.loss)


def test_a_run_leaves_generators_and_gradients_as_promised():
    run = LiveRun(LabSettings(**TINY, batch_size=12, chunk_size=4))
    before = torch.get_rng_state()
    run.run()
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in run.encoder.parameters())


@pytest.mark.parametrize("step", ["accumulation", "grad_cache"])
def test_stop_ends_between_chunks_and_leaves_nothing_behind(step, monkeypatch):
    run = LiveRun(LabSettings(step, "tiny", batch_size=40, chunk_size=4, length=16))
    report = run._on_phase

    def stop_in_the_middle(phase, **place):
        if run.begun == run.pieces // 2 + 1:
            run.stop()
        report(phase, **place)

    monkeypatch.setattr(run, "_on_phase", stop_in_the_middle)
    before = torch.get_rng_state()
    run.run()
    assert run.result.ending == "stopped" and run.done == run.pieces // 2
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in run.encoder.parameters())
    assert run.ledger.events[-1].kind_bytes  # what was measured is still there


def test_what_goes_wrong_in_a_run_is_told_in_words(memory_lab, monkeypatch):
    def full(settings):
        raise RuntimeError("no room")

    monkeypatch.setattr(live, "make_batch", full)
    memory_lab.run.click()
    memory_lab.wait()
    assert "The run failed" in text_of(memory_lab.status) and "RuntimeError: no room" in text_of(memory_lab.status)
    assert not memory_lab.run.disabled and memory_lab.stop.disabled


FULL = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.18 GiB."


def steps_that_run_out_of_memory(times):
    """A `step_of` whose first steps end as a card's allocator ends them, in a replay; what they held is seen weakly."""
    held, honest = [], step_of

    def step_of_a_full_card(settings):
        step, options = honest(settings)

        def full(encoders, inputs, loss_fn, *, on_phase, **rest):
            def report(phase, **place):
                on_phase(phase, **place)
                if phase == "replay" and place.get("tower") == 1 and len(held) < times:
                    big = torch.zeros(1000)
                    held.append(weakref.ref(big))
                    raise torch.OutOfMemoryError(FULL)

            return step(encoders, inputs, loss_fn, on_phase=report, **rest)

        return full, options

    return step_of_a_full_card, held


@pytest.mark.slow
def test_out_of_memory_is_told_in_words_all_is_let_go_of_and_the_next_run_finishes(monkeypatch):
    full, held = steps_that_run_out_of_memory(1)
    monkeypatch.setattr(live, "step_of", full)
    monkeypatch.setattr(devices, "ram_bytes", lambda: (2**33, 2**32))
    settings = LabSettings(**TINY, batch_size=12, chunk_size=4)
    run, before = LiveRun(settings, "cpu"), torch.get_rng_state()
    result = run.run()
    assert result.ending == "failed" and result.peak_bytes > 0 and result.loss is None
    for words in (
        "Out of memory (in piece ",
        "second forward and backward",
        f"asked for 20.00 GiB, and had held {format_bytes(result.peak_bytes)} at most",
        "This machine has 8.00 GiB. All that the run held was returned, and 4.00 GiB are free now",
        way_out(settings, forecast_of(settings).peak_bytes - 1).words,
    ):
        assert words in result.error
    assert run.encoder is None and held[0]() is None
    assert torch.equal(before, torch.get_rng_state())
    again = LiveRun(settings, "cpu").run()
    assert (again.ending, again.peak_bytes) == ("finished", forecast_of(settings).peak_bytes)


def test_out_of_memory_before_the_step_begins_is_told_too(monkeypatch):
    def full(settings):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(live, "make_batch", full)
    run = LiveRun(LabSettings(**TINY), "cpu")
    assert "Out of memory (reading texts): the step asked for more. This machine has" in run.run().error
    assert run.encoder is None and run.result.allocated_peak_bytes is None


@pytest.mark.slow
def test_the_lab_goes_on_after_out_of_memory(memory_lab, monkeypatch):
    monkeypatch.setattr(live, "step_of", steps_that_run_out_of_memory(1)[0])
    memory_lab.run.click()
    memory_lab.wait()
    assert text_of(memory_lab.status).startswith("The run failed, and the lab goes on. Out of memory (in piece ")
    memory_lab.run.click()
    memory_lab.wait()
    assert text_of(memory_lab.status).startswith("Finished in ")


def test_a_run_is_on_the_processor_where_there_is_no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert LiveRun(LabSettings(**TINY)).device == torch.device("cpu")
    for wrong in ("cuda", "meta", "abacus", 7.5):
        with pytest.raises(ValueError, match="device must be the processor, or a CUDA device"):
            LiveRun(LabSettings(**TINY), wrong)


def test_a_run_is_on_the_card_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert LiveRun(LabSettings(**TINY)).device == LiveRun(LabSettings(**TINY), "cuda").device == torch.device("cuda:0")
    assert LiveRun(LabSettings(**TINY), "cpu").device == torch.device("cpu")
    with pytest.raises(ValueError, match="got 'cuda:1'"):
        LiveRun(LabSettings(**TINY), "cuda:1")


@pytest.fixture
def card_lab(monkeypatch):
    """A lab that takes this processor for a card of 1 GiB, of which 768 MiB are free and 100 MiB kept for later."""
    card = {"mem_get_info": (668 * 2**20, 2**30), "memory_reserved": 150 * 2**20, "memory_allocated": 50 * 2**20}
    for name, value in card.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card of the test")
    monkeypatch.setattr(lab, "seconds_here", lambda settings, forecast, device: 1.0)
    made = MemoryLab(**TINY, batch_size=16, chunk_size=4, ahead=False)
    made.wait()
    made.device = torch.device("cuda", 0)
    monkeypatch.setattr(widgets, "LiveRun", lambda settings, device: LiveRun(settings, "cpu"))
    made.refresh()
    made.wait()
    yield made
    made.wait()


@pytest.mark.slow
def test_before_a_run_on_a_card_its_own_free_memory_is_asked(card_lab, monkeypatch):
    card_lab.model.value, card_lab.step.value, card_lab.batch_size.value = "small", "naive", 256
    card_lab.wait()
    assert 768 * 2**20 < 1.25 * forecast_of(card_lab.settings()).peak_bytes < 2**34
    monkeypatch.setattr(widgets, "ram_bytes", lambda: (2**35, 2**34))
    card_lab.run.click()
    assert "the card has 768 MiB free" in text_of(card_lab.status) and card_lab.live is None


def test_the_status_says_what_the_card_s_allocator_counted(card_lab):
    card_lab.run.click()
    card_lab.wait()
    run = card_lab.live
    assert run.result.allocated_peak_bytes is None and "allocator" not in text_of(card_lab.status)
    counted = run.result.peak_bytes * 1025 // 1000
    run.result = replace(run.result, allocated_peak_bytes=counted)
    run.device = card_lab.device
    told = f"The allocator of Card of the test counted {format_bytes(counted)} at its peak, +2.5 %."
    assert told in card_lab.table()


def test_the_live_line_lies_on_the_forecast():
    for step, tolerance in (("naive", 0.02), ("accumulation", 0.02), ("grad_cache", 0.02)):
        settings = LabSettings(step, "tiny", batch_size=40, chunk_size=4, length=16)
        run = LiveRun(settings)
        run.run()
        picture = picture_of(forecast_of(settings).timeline)
        x, line = run.trace(picture)
        assert line.max() == run.result.peak_bytes == picture.peak_bytes
        assert (np.diff(x) >= 0).all() or step == "accumulation"
        columns = np.searchsorted(picture.edges, x, side="right") - 1
        near = np.stack([picture.kind_bytes.sum(axis=1)[np.clip(columns + off, 0, None)] for off in (-2, -1, 0)])
        apart = np.abs(near - line).min(axis=0) / picture.peak_bytes
        assert np.median(apart) < tolerance


def test_a_trace_can_be_read_while_the_run_goes_on():
    settings = LabSettings(**TINY, batch_size=64, chunk_size=4)
    run, picture = LiveRun(settings), picture_of(forecast_of(settings).timeline)
    run.start()
    seen = []
    while run.result is None:
        seen.append(len(run.trace(picture)[0]))
        time.sleep(0.01)
    run.join()
    assert seen == sorted(seen) and len(run.trace(picture)[0]) >= seen[-1]


def test_run_then_stop_by_the_buttons(memory_lab):
    memory_lab.batch_size.value = 512
    memory_lab.chunk_size.value = 1
    memory_lab.wait()
    memory_lab.run.click()
    if "Press Run again" in text_of(memory_lab.status):
        memory_lab.run.click()
    wait_until(lambda: memory_lab.live.begun > 2)
    assert memory_lab.run.disabled and not memory_lab.stop.disabled
    memory_lab.budget.value = lab.BUDGETS["8 GiB"]  # the kernel stays usable
    memory_lab.stop.click()
    memory_lab.wait()
    assert text_of(memory_lab.status).startswith("Stopped after ")
    assert not memory_lab.run.disabled and memory_lab.stop.disabled
    assert 0 < memory_lab.progress.value < memory_lab.progress.max


def test_a_run_stopped_before_its_step_says_so(memory_lab, monkeypatch):
    monkeypatch.setattr(LiveRun, "_step", lambda run: run._stop.wait(60) and run._check_stop())
    memory_lab.run.click()
    memory_lab.stop.click()
    memory_lab.wait()
    assert text_of(memory_lab.status).startswith("Stopped before the step began.")


def test_a_finished_run_is_told_with_its_bytes(memory_lab):
    memory_lab.run.click()
    memory_lab.wait()
    peak = forecast_of(memory_lab.settings()).peak_bytes
    said = text_of(memory_lab.status)
    assert said.startswith("Finished in ") and f"({peak:,} bytes), exactly as forecast" in said
    assert said in alt_of(memory_lab) and said in memory_lab.table()
    assert memory_lab.progress.value == memory_lab.progress.max


def test_a_second_run_waits_for_the_first(memory_lab):
    memory_lab.batch_size.value = 256
    memory_lab.wait()
    memory_lab.run.click()
    first = memory_lab.live
    memory_lab._on_run()
    assert memory_lab.live is first and "A run is going on" in text_of(memory_lab.status)


def test_a_run_that_takes_long_is_announced_first(memory_lab, monkeypatch):
    monkeypatch.setattr(lab, "seconds_here", lambda *of: 3600.0)
    memory_lab.run.click()
    assert "about 60 minutes" in text_of(memory_lab.status) and memory_lab.live is None
    memory_lab.run.click()
    assert memory_lab.live is not None
    memory_lab.wait()


def test_moving_a_control_withdraws_the_announcement(memory_lab, monkeypatch):
    monkeypatch.setattr(lab, "seconds_here", lambda *of: 3600.0)
    memory_lab.run.click()
    memory_lab.batch_size.value = 32
    memory_lab.batch_size.value = 16
    memory_lab.run.click()
    assert memory_lab.live is None


# --- the parts ------------------------------------------------------------------------------------------------


def test_a_batch_of_real_texts_is_padded_in_every_row_and_full_width(monkeypatch):
    from gclib.data.pairs import TextPair
    from gclib.data.tokens import train_tokenizer

    pairs = [TextPair(f"find the number {n}", "def find(numbers): return numbers " * (n % 9 + 1)) for n in range(40)]
    monkeypatch.setattr(live, "_real_texts", lambda: (pairs, train_tokenizer(pairs, vocab_size=200)))
    inputs, words = make_batch(LabSettings(batch_size=64, length=24))
    assert words.startswith("real pairs")
    for tower in inputs:
        assert tower["input_ids"].shape == tower["attention_mask"].shape == (64, 24)
        assert (tower["attention_mask"][:, -1] == 0).all() and tower["attention_mask"].any(dim=1).all()
    assert torch.equal(inputs[0]["input_ids"][:24], inputs[0]["input_ids"][40:])  # a larger batch repeats texts


def test_without_a_corpus_a_batch_is_random_and_padded():
    inputs, words = make_batch(LabSettings(batch_size=5, length=7))
    assert words == "random tokens"
    assert all((tower["attention_mask"].sum(dim=1) == 6).all() for tower in inputs)


def test_the_plan_keeps_every_chunk_at_full_width():
    _, options = step_of(LabSettings(batch_size=10, chunk_size=4, length=9))
    assert [(chunk.rows[0], len(chunk), chunk.width) for chunk in options["plan"][0]] == [
        (0, 4, 9),
        (4, 4, 9),
        (8, 2, 9),
    ]


def test_warming_the_optimizer_leaves_the_weights_alone():
    layer = torch.nn.Linear(3, 2)
    before = [parameter.clone() for parameter in layer.parameters()]
    optimizer = warm_optimizer(layer)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert len(optimizer.state) == 2 and all(parameter.grad is None for parameter in layer.parameters())


def test_advised_chunks_go_by_calls_then_by_bytes_and_accumulations_by_negatives():
    settings = LabSettings(**TINY, batch_size=64)
    assert _chunks(settings)[:6] == [64, 32, 48, 24, 16, 12]
    assert _chunks(replace(settings, step="accumulation"))[:3] == [64, 48, 32]
    assert _chunks(replace(settings, batch_size=1)) == [1]
    assert _chunks(replace(settings, negatives=7))[0] == 512


# In 17.5 MiB: retained, its passage is backpropagated before there are gradients.
ONE_QUERY_FITS = LabSettings(
    model="tiny", length=512, query_length=16, batch_size=2, chunk_size=1, retain_chunks=1, optimizer="sgd"
)


@pytest.mark.parametrize(
    ("settings", "budget", "words"),
    [
        (LabSettings("naive", **TINY, batch_size=512), 2**24, "take the gradient cache, in chunks of 96 rows"),
        (
            LabSettings("naive", "mini", length=32, batch_size=128),
            2**27,
            "take the gradient cache, in chunks of 128 rows",
        ),
        (LabSettings(**TINY, batch_size=64, chunk_size=64), 2**23, "make the chunk 32, the batch may stay. That takes"),
        (LabSettings(**TINY, batch_size=16384, chunk_size=4), 2**28, "set a tile size of 4,096"),
        (LabSettings(**TINY, batch_size=2**20, chunk_size=4), 2**28, "no chunk shrinks them: make the batch 4,096"),
        (
            LabSettings(**TINY),
            2**20,
            "AdamW's states alone are too big: with the gradient cache no batch and no chunk fits",
        ),
        (LabSettings(**TINY), 4 * 2**20, "SGD or pure bf16 or pure bf16 and SGD would let one query fit"),
        (LabSettings(**TINY, optimizer="sgd"), 2**20, "The model and its gradients alone are too big"),
        (LabSettings(**TINY, optimizer="sgd", precision="pure bf16"), 2**19, "a smaller model or a larger budget"),
        (LabSettings(**TINY, chunk_size=1, retain_chunks=64), 10**7, "64 retained chunks are live at once: retain 32"),
        (LabSettings(**TINY, chunk_size=64, retain_chunks=2), 10**7, "make the chunk 32, retain none"),
        (LabSettings("accumulation", **TINY, batch_size=2**20), 2**26, "The largest part beside the model is inputs"),
        (LabSettings("accumulation", **TINY, batch_size=512, chunk_size=256), 2**24, "smaller chunks would lose neg"),
        (
            LabSettings(**TINY, batch_size=512, chunk_size=1),
            9 * 2**20,
            "random generators, and a larger chunk takes less here: make the chunk 32",
        ),
        (
            LabSettings(**TINY, batch_size=64, chunk_size=1),
            6 * 2**20,
            "a larger chunk takes less here: make the chunk 12",
        ),
        (
            LabSettings(model="mini", length=32, batch_size=4096, chunk_size=1),
            2**28,
            "the logits, B by all passages, and a larger chunk takes less here: make the chunk 256",
        ),
        (
            LabSettings(model="mini", length=128, query_length=32, batch_size=64, chunk_size=16, retain_chunks=1),
            2**26,
            "The largest part beside the model is one chunk's activations: make the chunk",
        ),
        (  # the cache's least step is more than the naive one's here
            LabSettings("naive", "tiny", length=512, query_length=16, batch_size=2, optimizer="sgd"),
            35 * 2**19,
            "the whole batch's activations: make the batch 1. That takes 17.0 MiB",
        ),
        *(
            (
                replace(ONE_QUERY_FITS, retain_chunks=retained),
                35 * 2**19,
                f"{words}make the batch 1. That takes 16.9 MiB",
            )
            for retained, words in ((1, ""), (0, "retain 1, "))
        ),
        (LabSettings("accumulation", **TINY), 2**30, "accumulation loses negatives"),
        (LabSettings("naive", **TINY), 2**30, "a batch of 128 fits too, whole and without chunks"),
        (LabSettings("accumulation", **TINY, batch_size=16, chunk_size=16), 2**30, "this is the naive step"),
        (LabSettings(**TINY), 2**30, "chunks of 12 fit too"),
        (LabSettings(**TINY, batch_size=16), 2**30, "chunks of 16 fit too"),
        (LabSettings(model="tiny", length=512, batch_size=2, chunk_size=1), 6 * 2**20, "texts of 16 tokens would let"),
    ],
)
def test_the_advice_names_what_to_change(settings, budget, words):
    assert words in advice(settings, forecast_of(settings), budget)


DRAWN = {
    "step": list(lab.STEP_WORDS),
    "batch_size": [*lab.BATCHES],
    "chunk_size": [*lab.CHUNKS],
    "retain_chunks": [0, *lab.RETAINED],
    "tile_size": [*[None] * len(lab.TILES), *lab.TILES],
    "negatives": [0, 0, *lab.NEGATIVES],
}
RARELY_DRAWN = {  # each takes laws of its own
    "precision": list(lab.PRECISIONS),
    "optimizer": ["adamw", "sgd"],
    "device": ["cpu", "cuda"],
    "tied": [True, False],
    "checkpointing": [False, False, True],
    "symmetric": [False, True],
    "lora_rank": [0, *lab.LORA_RANKS],
    "ranks": list(lab.RANKS),
}


def assert_advice_can_be_followed(settings, budget):
    """What is advised fits, and is a position of the controls; or it is said that nothing does."""
    told = advice(settings, forecast_of(settings), budget)
    if forecast_of(settings).peak_bytes <= budget:
        for size in re.findall(r"chunks of ([\d,]+) fit too", told):
            larger = replace(settings, chunk_size=int(size.replace(",", "")))
            assert forecast_of(larger).peak_bytes <= budget
        for size in re.findall(r"a batch of ([\d,]+) fits too", told):
            larger = replace(settings, batch_size=int(size.replace(",", "")))
            assert forecast_of(larger).peak_bytes <= budget
        return
    followed = way_out(settings, budget).settings
    if followed is None:
        assert "no batch and no chunk fits" in told
        least = replace(settings, batch_size=1, chunk_size=1, retain_chunks=0, tile_size=None)
        assert all(forecast_of(replace(least, step=step)).peak_bytes > budget for step in {settings.step, "grad_cache"})
        return
    assert forecast_of(followed).peak_bytes <= budget, (settings, followed)
    assert f"That takes {format_bytes(forecast_of(followed).peak_bytes)}" in told
    assert followed.chunk_size in lab.CHUNKS and followed.batch_size in lab.BATCHES
    assert followed.retain_chunks in lab.RETAINED and followed.tile_size in (None, *lab.TILES)
    if followed.batch_size < settings.batch_size:
        larger = replace(followed, batch_size=2 * followed.batch_size)
        for step in {settings.step, "grad_cache"} - {"naive"}:
            for size in lab.CHUNKS:
                assert forecast_of(replace(larger, step=step, chunk_size=size)).peak_bytes > budget, (settings, size)


def drawn_settings(draw, models, lengths, rare=0.1):
    """Settings of drawn controls; None where they do not go together."""
    values = {name: draw.choice(values) for name, values in DRAWN.items()}
    values |= {name: draw.choice(values) for name, values in RARELY_DRAWN.items() if draw.random() < rare}
    try:
        return LabSettings(model=draw.choice(models), length=draw.choice(lengths), **values)
    except ValueError as error:
        assert "must" in str(error)
        return None


def follow_advice(moves, models, lengths):
    """So many drawn settings and budgets, each advice followed."""
    draw = random.Random(moves)
    budgets = [2**23, *lab.BUDGETS.values()] if len(models) < 3 else list(lab.BUDGETS.values())
    for _ in range(moves):
        settings = drawn_settings(draw, models, lengths, rare=0.02 if len(lengths) == 1 else 0.1)
        if settings is not None:
            assert_advice_can_be_followed(settings, draw.choice(budgets[: len(budgets) if draw.random() < 0.3 else 5]))


@pytest.mark.parametrize(
    ("moves", "models", "lengths"),
    [
        pytest.param(6, ["tiny"], [16], marks=pytest.mark.slow),
        pytest.param(40, ["tiny"], [16], marks=pytest.mark.deep),
        pytest.param(150, ["tiny", "mini"], [16, 64], marks=pytest.mark.deep),
    ],
)
def test_every_advice_that_is_followed_leads_to_a_step_that_fits_or_to_words_that_none_does(moves, models, lengths):
    follow_advice(moves, models, lengths)


def forget_answers():
    """What the lab remembers of models by their names."""
    for each in vars(lab).values():
        if hasattr(each, "cache_clear"):
            each.cache_clear()
    _ways_out.clear()


@pytest.fixture
def few_layers(monkeypatch):
    """Presets as wide as ever, a few layers deep: their laws are read off in seconds."""
    for name, preset in PRESETS.items():
        few = {"ModernBertConfig": {"num_hidden_layers": 4}, "DistilBertConfig": {"n_layers": 2}}
        layers = few.get(preset.config, {"num_hidden_layers": 2})
        monkeypatch.setitem(PRESETS, name, replace(preset, settings={**preset.settings, **layers}))
    forget_answers()
    yield
    forget_answers()


@pytest.mark.deep
def test_every_advice_for_every_model_can_be_followed(few_layers):
    follow_advice(300, lab.MODELS, lab.LENGTHS)


# --- LoRA, ranks, 7B ------------------------------------------------------------------------------------------

SEVEN_B = {"model": "e5-mistral-7b", "lora_rank": 16, "precision": "pure bf16", "negatives": 7, "length": 512}
SEVEN_B |= {"batch_size": 128, "chunk_size": 16, "budget": lab.BUDGETS["A100 or H100 (80 GB)"]}


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_a_7b_with_lora_seven_hard_negatives_512_tokens_on_one_card_of_80_gb(whole, memory_lab, monkeypatch, request):
    """The question as it is asked: set the controls, and the lab says what forecast_step and best_plan say."""
    if not whole:
        request.getfixturevalue("few_layers")
    monkeypatch.setattr(live, "make_batch", lambda settings: pytest.fail("a batch was made"))
    for name, value in SEVEN_B.items():
        getattr(memory_lab, name).value = value
    words = text_of(memory_lab.forecast)
    assert words.startswith("Reading off the memory law of the e5-mistral-7b model at 512 tokens.") or "Peak" in words
    memory_lab.wait()
    job = {"config": "e5-mistral-7b", "lora": LoRA(16), "dtype": torch.bfloat16, "optimizer": "adamw", "negatives": 7}
    job |= {"query_length": 512, "passage_length": 512, "batch_size": 128, "device": "cuda"}
    card = memory_lab.budget.value
    told = forecast_step("grad_cache", chunk_size=16, loss=ContrastiveLoss(0.05), **job)
    assert f"Peak {format_bytes(told.peak_bytes)}: activations " in text_of(memory_lab.forecast)
    assert "It fits within A100 or H100 (80 GB)" in text_of(memory_lab.forecast)
    assert forecast_of(memory_lab.settings()).at_peak() == told.at_peak()
    plan = best_plan(card, **job)
    planned = replace(memory_lab.settings(), chunk_size=plan.chunk_size, retain_chunks=plan.retain_chunks)
    assert forecast_of(planned).peak_bytes == plan.peak_bytes <= card and plan.chunk_size > 16
    if not whole:
        return
    assert plan.chunk_size < 32
    memory_lab.chunk_size.value = 32
    memory_lab.wait()
    assert "make the chunk 16, the batch may stay" in text_of(memory_lab.forecast)
    memory_lab.chunk_size.value = 16
    memory_lab.run.click()
    memory_lab.wait()
    memory_lab.run.click()
    assert text_of(memory_lab.status).startswith("Not run: the forecast is ") and memory_lab.live is None


def test_the_decoders_of_4b_and_7_to_8b_are_among_the_models(memory_lab):
    deep = {"qwen3-4b", "qwen3-8b", "e5-mistral-7b"}
    assert deep <= set(values_of(memory_lab.model)) and all(map(lab.is_deep, deep)) and not lab.is_deep("bert-base")
    assert {PRESETS[name].pooling for name in deep} == {"last"}


def test_lora_is_told_compared_and_run(memory_lab):
    whole = forecast_of(memory_lab.settings())
    memory_lab.pin.value = True
    memory_lab.lora_rank.value = 8
    memory_lab.wait()
    told = forecast_of(memory_lab.settings())
    assert told.at_peak()["optimizer"] < whole.at_peak()["optimizer"] / 10
    assert "tiny model, LoRA of rank 8, batch 16" in memory_lab.table() and "less optimizer" in memory_lab.table()
    assert "lora=LoRA(8)" in memory_lab.code.value and memory_lab.picture.bundle["about"]["lora_rank"] == 8
    memory_lab.run.click()
    memory_lab.wait()
    assert f"({told.peak_bytes:,} bytes), exactly as forecast" in text_of(memory_lab.status)


def test_without_peft_lora_is_refused_in_words_by_everything(memory_lab, monkeypatch):
    monkeypatch.setattr("gclib.models.adapters.find_spec", lambda name: None)
    monkeypatch.setattr(fake_modules, "_kept", lambda made: (made.make(), ""))  # whatever other tests have made
    memory_lab.lora_rank.value, memory_lab.length.value = 64, 32
    memory_lab.wait()
    rule = "add_lora needs PEFT, which is an extra: pip install 'gclib[lora]' (or peft), got no PEFT"
    assert text_of(memory_lab.forecast) == memory_lab.table() == f"No forecast: {rule}."
    memory_lab.run.click()
    assert text_of(memory_lab.status) == f"Not run: {rule}."


@pytest.mark.parametrize("step", list(lab.STEP_WORDS))
def test_a_rank_is_what_forecast_step_says_and_drawn_with_the_average_of_its_gradients(step, memory_lab):
    memory_lab.step.value, memory_lab.ranks.value, memory_lab.batch_size.value = step, "4 DDP", 2
    memory_lab.wait()
    gathers = {} if step == "accumulation" else {"across": "gather"}
    cut = {} if step == "naive" else {"chunk_size": 4}
    same = {"config": "tiny", "batch_size": 2, "query_length": 16, "passage_length": 16, "optimizer": "adamw"}
    loss = ContrastiveLoss(0.05, **gathers)
    told = forecast_step(step, ranks=4, parallel="ddp", loss=loss, **same, **cut)
    assert text_of(memory_lab.forecast).startswith(f"Peak of a rank {format_bytes(told.peak_bytes)}: ")
    assert max(told.timeline, key=lambda one: one.peak_bytes).phase == "average"
    assert f"Peak {format_bytes(told.peak_bytes)}, of which" in alt_of(memory_lab)
    assert "average of gradients" in memory_lab.table() and "on each of 4 ranks (DDP)" in memory_lab.table()
    assert memory_lab.picture.bundle["segments"][-1]["phase"] == "average"
    memory_lab.run.click()
    assert text_of(memory_lab.status) == "Not run: Run is one process, and this step takes 4. Set Ranks to 1."
    assert memory_lab.live is None


def test_shards_are_a_bound_and_say_so(memory_lab):
    memory_lab.ranks.value = "8 FSDP2"
    memory_lab.wait()
    encoder = Encoder.from_config("tiny")
    same = {"config": "tiny", "batch_size": 16, "chunk_size": 4, "query_length": 16, "passage_length": 16, "ranks": 8}
    loss = ContrastiveLoss(0.05, across="gather")
    whole = forecast_step("grad_cache", loss=loss, optimizer="adamw", **same)
    bound = rank_bytes([encoder], ranks=8, optimizer="adamw").at_most(whole)
    assert f"Peak of a rank, at most {format_bytes(bound.peak_bytes)}: " in text_of(memory_lab.forecast)
    assert bound.at_peak() == forecast_of(memory_lab.settings()).at_peak() and bound.peak_bytes < whole.peak_bytes
    memory_lab.batch_size.value = 4096
    memory_lab.wait()
    memory_lab.largest.click()
    most = int(re.search(r"is ([\d,]+)", text_of(memory_lab.status))[1].replace(",", ""))
    at, beyond = (forecast_of(replace(memory_lab.settings(), batch_size=size)).peak_bytes for size in (most, most + 1))
    assert at <= memory_lab.budget.value < beyond


def test_tiles_are_counted_over_the_passages_of_all_ranks():
    with pytest.raises(
        ValueError, match=r"must cut the 4,096 x 32,768 logits into at most 256 tiles.*, got 512, which"
    ):
        LabSettings(batch_size=4096, tile_size=512, ranks="8 DDP")
    assert LabSettings("accumulation", batch_size=4096, tile_size=512, ranks="8 DDP").tiles == 64


def test_weights_that_are_made_in_float32_must_fit_before_they_are_halved():
    forecast = forecast_of(LabSettings(**TINY, precision="pure bf16"))
    weights = forecast.at_peak()["parameters"]
    card = {"card_free_bytes": 2**34, "halved": True}
    assert "to make the weights takes" in obstacle(forecast, 2 * weights - 1, **card)
    assert "to make" not in (obstacle(forecast, 2 * weights, **card) or "")


CLIP = {"model": "clip-vit-b-32-text", "length": 128}


def test_texts_that_a_model_can_not_read_are_refused_in_words_by_everything(memory_lab):
    for name, value in CLIP.items():
        getattr(memory_lab, name).value = value
    memory_lab.wait()
    rule = "length must be at most the 77 tokens that clip-vit-b-32-text reads, got 128"
    assert text_of(memory_lab.forecast) == memory_lab.table() == f"No forecast: {rule}."
    memory_lab.run.click()
    assert text_of(memory_lab.status) == f"Not run: {rule}."
    memory_lab.largest.click()
    assert text_of(memory_lab.status) == f"No largest batch: {rule}."
    memory_lab.pin.value = True
    assert text_of(memory_lab.status) == f"Nothing to compare with: {rule}." and not memory_lab.pin.value


def test_a_forecast_that_fails_is_told_by_everything_and_is_not_tried_again(memory_lab, monkeypatch):
    def broken(settings):
        tried.append(settings)
        raise RuntimeError("no law")

    tried = []
    monkeypatch.setattr(lab, "_fitted", set())
    monkeypatch.setattr(lab, "forecast_of", broken)
    memory_lab.batch_size.value = 32
    memory_lab.wait()
    before = len(tried)
    for press in (memory_lab.run.click, memory_lab.largest.click, lambda: setattr(memory_lab.pin, "value", True)):
        press()
        memory_lab.wait()
        assert "RuntimeError: no law." in text_of(memory_lab.status)
    assert memory_lab.table() == "No forecast: RuntimeError: no law." and not memory_lab.pin.value
    assert len(tried) == before


def test_what_does_not_fit_is_said_before_the_advice_is_there(memory_lab, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr("gclib.course.memory_lab.advice._ways_out", {})  # whatever another test has asked for
    monkeypatch.setattr(widgets, "way_out", lambda *of: (go.wait(30), way_out(*of))[1])
    memory_lab.batch_size.value = 65536
    wait_until(lambda: "Looking for what would fit" in text_of(memory_lab.forecast))
    assert text_of(memory_lab.forecast).startswith("Peak ") and alt_of(memory_lab)
    go.set()
    memory_lab.wait()
    settings, budget = memory_lab.settings(), memory_lab.budget.value
    assert text_of(memory_lab.forecast) == advice(settings, forecast_of(settings), budget, "256 MiB")


def test_the_picture_comes_first_then_five_controls_and_the_rest_is_folded(memory_lab):
    assert memory_lab.children[:2] == (memory_lab.picture, memory_lab.forecast)
    plain = [control for row in memory_lab.children[2:5] for control in row.children]
    assert plain == [getattr(memory_lab, name) for name in widgets.SHOWN] and len(plain) == 5
    assert not memory_lab.more.value and memory_lab.folded.layout.display == "none"
    held = {control for box in memory_lab.folded.children for control in box.children}
    memory_lab.more.value = True
    assert memory_lab.folded.layout.display == "flex"
    assert held == set(memory_lab.controls) - set(plain)


def test_the_page_is_told_what_each_place_of_a_control_means_and_again_when_that_changes(memory_lab):
    picture = memory_lab.picture
    assert set(picture.controls) == set(picture.choices) == {*widgets.SHOWN, *widgets.FOLDED}
    assert picture.controls["batch_size"] == memory_lab.batch_size.model_id
    for name, choices in picture.choices.items():
        values = [choice[0] if name == "budget" else choice for choice in choices]
        assert values == values_of(getattr(memory_lab, name))
    assert [2**26, "the budget", "cpu"] in picture.choices["budget"]
    assert [lab.BUDGETS["T4 (16 GB)"], "T4 (16 GB)", "cuda"] in picture.choices["budget"]
    memory_lab.chunk_size.options = [("4", 4), ("8", 8)]
    assert picture.choices["chunk_size"] == [4, 8]


@pytest.mark.slow
def test_the_page_gets_the_laws_of_every_step_of_one_row_and_of_the_other_device_ahead(monkeypatch):
    monkeypatch.setattr(bundles, "_known", {})
    made = MemoryLab(**TINY, batch_size=16, chunk_size=4)
    made.wait()
    known = {laws["about"]["device"]: laws for laws in (made.picture.bundle, made.picture.ahead)}
    assert set(known) == {"cpu", "cuda"} and made.picture.bundle is known["cpu"]
    drawn = product(lab.STEP_WORDS, known, lab.BATCHES, lab.CHUNKS)
    for step, device, batch_size, chunk_size in drawn:
        moved = LabSettings(step, "tiny", batch_size, chunk_size, 16, device=device)
        needed = {f"{step} {'single' if single else 'many'}" for step, single in bundles.parts_of(moved)}
        assert needed <= set(known[device]["laws"]), moved


def test_a_notebook_saved_at_any_moment_has_the_laws_of_what_is_shown(monkeypatch):
    monkeypatch.setattr(bundles, "_known", {})
    states, send = [], TimelineView.send_state
    monkeypatch.setattr(
        TimelineView, "send_state", lambda self, key=None: (states.append(self.get_state()), send(self, key))
    )
    made = MemoryLab(**TINY, batch_size=16, chunk_size=4)
    made.wait()
    made.budget.value = lab.BUDGETS["T4 (16 GB)"]
    made.wait()
    assert {state["bundle"]["about"]["device"] for state in states if state["bundle"]} == {"cpu", "cuda"}
    for state in states:
        about, shown = state["bundle"].get("about", {}), state["shown"]
        assert all(shown[name] == value for name, value in about.items() if shown), (about, shown)


def test_the_picture_shows_the_settings_from_a_law_or_from_their_own_timeline(memory_lab):
    picture = memory_lab.picture
    assert picture.bundle is bundles.known_bundle(memory_lab.settings())
    assert picture.shown == bundles.page_settings(memory_lab.settings())
    before = picture.bundle
    memory_lab.batch_size.value, memory_lab.optimizer.value = 64, "sgd"
    assert picture.bundle is before and picture.shown["batch_size"] == 64
    memory_lab.tile_size.value = 1024
    memory_lab.wait()
    assert len(picture.bundle["segments"]) == len(forecast_of(memory_lab.settings()).timeline)
    assert picture.bundle["about"] == picture.shown and picture.budget == {"bytes": 2**28, "name": "the budget"}


def test_the_bytes_of_a_run_are_streamed_to_the_picture_and_leave_with_the_next_move(memory_lab):
    lines = []
    memory_lab.picture.observe(lambda change: lines.append(len(change.new["bytes"])), "live")
    memory_lab.run.click()
    memory_lab.wait()
    assert max(memory_lab.picture.live["bytes"]) == forecast_of(memory_lab.settings()).peak_bytes
    assert len(memory_lab.picture.live["x"]) == lines[-1] > 50
    assert memory_lab.progress.value == memory_lab.progress.max
    memory_lab.chunk_size.value = 8
    assert memory_lab.picture.live["bytes"] == [] and memory_lab.progress.value == 0


@a_share(
    ("step", "change"), list(lab.STEP_WORDS), [{}, {"symmetric": True, "negatives": 2}, {"device": "cuda"}], one_in=3
)
def test_a_tile_that_holds_all_logits_takes_the_same_whatever_its_side(step, change):
    settings = LabSettings(step, "tiny", 12, 5, 16, 64, **change)
    own = forecast_workload(settings.workload).timeline
    assert settings.fake_tile == lab.ONE_TILE and replace(settings, batch_size=96, chunk_size=96).fake_tile == 64
    for shared, piece in zip(forecast_of(settings).timeline, own, strict=True):  # autograd may change events' order
        assert shared.peak_bytes == piece.peak_bytes
        assert np.array_equal(shared.kind_bytes[-1], piece.kind_bytes[-1])


@a_share(
    ("step", "change"),
    list(lab.STEP_WORDS),
    [
        {"negatives": 2},
        {"tied": False},
        {"symmetric": True},
        {"checkpointing": True},
        {"negatives": 3, "tied": False, "symmetric": True, "checkpointing": True, "tile_size": 5, "query_length": 8},
        {"lora_rank": 8},
        {"lora_rank": 8, "tied": False, "checkpointing": True, "precision": "pure bf16", "negatives": 1},
    ],
    one_in=3,
)
def test_a_run_with_more_takes_what_was_forecast_to_the_byte(step, change):
    settings = LabSettings(step, "tiny", 7, 3, 16, retain_chunks=1, **change)
    result = LiveRun(settings).run()
    assert (result.ending, result.peak_bytes) == ("finished", forecast_of(settings).peak_bytes), result.error


def test_a_step_that_just_does_not_fit_is_told_by_how_many_bytes():
    settings, peak = LabSettings(**TINY), forecast_of(LabSettings(**TINY)).peak_bytes
    assert "4.00 KiB too much" in verdict(settings, forecast_of(settings), peak - 4096, "it")
    assert "2.0 times too big" in verdict(settings, forecast_of(settings), peak // 2, "it")


def test_a_run_is_refused_when_forecast_and_ledger_would_not_fit():
    forecast = forecast_of(LabSettings(**TINY))
    assert obstacle(forecast, 2**34) is None
    assert "this machine has" in obstacle(forecast, forecast.peak_bytes)


def test_a_run_on_a_card_is_refused_by_what_the_card_has_and_by_what_the_ledger_notes_here():
    forecast = forecast_of(LabSettings(**TINY))
    notes = lab.EVENT_BYTES * lab.operations(forecast)
    assert obstacle(forecast, notes, card_free_bytes=2**34) is None
    assert "the card has" in obstacle(forecast, 2**34, card_free_bytes=forecast.peak_bytes)
    assert "the ledger's own notes of this step" in obstacle(forecast, notes - 1, card_free_bytes=2**34)


def test_more_work_is_estimated_to_take_longer():
    settings = [LabSettings(**TINY, batch_size=size) for size in (16, 64, 256)]
    seconds = [seconds_here(one, forecast_of(one)) for one in settings]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


@pytest.mark.parametrize(
    "wrong",
    [{"step": "quick"}, {"model": "giant"}, {"batch_size": 0}, {"chunk_size": 2.5}, {"length": -1}, {"tile_size": 0}],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LabSettings(**wrong)


def test_budgets_hold_every_card_and_rise():
    assert set(GPU_MEMORY_BYTES.items()) <= set(lab.BUDGETS.items())
    assert list(lab.BUDGETS.values()) == sorted(lab.BUDGETS.values())


def test_rows_of_a_table_line_up():
    table = format_table(["step", "batch"], [["naive", 46], ["grad_cache", 29_402], ["none", None]])
    assert table.splitlines() == [
        *("step         batch", "----------  ------", "naive           46"),
        *("grad_cache  29,402", "none             –"),
    ]
