"""What the chapters share: versions and style, texts, one step's gradient and peak, a picture that follows sliders."""

import re
import subprocess
import sys

import ipywidgets as widgets
import matplotlib
import pytest
import torch
from helpers.oracles import token_batch
from torch import nn

from gclib import ContrastiveLoss, Encoder, grad_cache_step, naive_step
from gclib.course import notebook, plots
from gclib.course.memory_lab.answers import LabSettings, forecast_of
from gclib.memory.ledger import record_memory


def test_a_chapter_starts_with_its_seed_its_style_and_its_versions(capsys):
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        notebook.start(seed=3)
        assert matplotlib.rcParams["axes.titlelocation"] == plots.SETTINGS["axes.titlelocation"] == "left"
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    printed = capsys.readouterr().out
    assert re.fullmatch(rf"Python \d+\.\d+\.\d+, PyTorch {re.escape(torch.__version__)}, on the CPU, seed 3\n", printed)


def test_importing_it_changes_no_setting_of_matplotlib():
    script = (
        "import matplotlib; before = dict(matplotlib.rcParams)\n"
        "import gclib.course.notebook; assert dict(matplotlib.rcParams) == before"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_shared_name_is_there_and_says_what_it_does():
    for name in notebook.__all__:
        assert getattr(notebook, name).__doc__, name


def test_texts_are_apart_and_the_tokenizer_is_that_of_the_first_3000(monkeypatch):
    asked = []
    pairs = {"train": list(range(5_000)), "test": list(range(1_024))}
    monkeypatch.setattr(notebook, "load_pairs", lambda split, limit=None: asked.append((split, limit)) or pairs[split])
    monkeypatch.setattr(notebook, "train_tokenizer", lambda pairs: pairs)
    assert notebook.load_texts() == (pairs["train"], pairs["test"], list(range(3_000)))
    assert asked == [("train", None), ("test", 1024)]


def test_loss_and_gradient_of_a_step_by_hand():
    tower = nn.Linear(3, 2).double()
    tower.unused = nn.Parameter(torch.ones(4))
    inputs = [torch.randn(5, 3, dtype=torch.float64) for _ in range(2)]
    loss_fn = ContrastiveLoss(0.5)
    nn.init.ones_(tower.bias)
    tower.bias.grad = torch.full((2,), 9.0, dtype=torch.float64)  # of a step before: must not count
    loss, gradient = notebook.loss_and_gradient(grad_cache_step, tower, inputs, loss_fn, chunk_size=2)
    weights = [tower.weight, tower.bias]
    expected = loss_fn(tower(inputs[0]), tower(inputs[1]))
    by_autograd = torch.cat([part.flatten() for part in torch.autograd.grad(expected, weights)])
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert gradient.shape == (8,) and torch.allclose(gradient, by_autograd, atol=1e-14)


def test_relative_error_is_a_length_over_a_length():
    expected = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert notebook.relative_error(expected, expected) == 0
    assert notebook.relative_error(2 * expected, expected) == pytest.approx(1)
    assert notebook.relative_error(expected + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), expected) == pytest.approx(0.2)


def test_relative_error_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="found must have the shape of expected"):
        notebook.relative_error(torch.ones(2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="expected must not be zero"):
        notebook.relative_error(torch.ones(2), torch.zeros(2))


def test_the_peak_is_the_ledgers_and_the_gradients_are_those_of_the_step():
    torch.manual_seed(0)
    encoder = Encoder.from_config("tiny", dropout=0)
    inputs = [token_batch(6, 8, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    loss_fn = ContrastiveLoss(0.1)

    def step(on_phase):
        return naive_step([encoder, encoder], inputs, loss_fn, on_phase=on_phase)

    with record_memory(encoder) as ledger:
        step(ledger.on_phase)
    gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    assert notebook.peak_of(step, encoder) == ledger.peak_bytes
    again = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_a_real_step_has_the_peak_of_its_forecast():
    settings = LabSettings(step="grad_cache", model="tiny", batch_size=4, chunk_size=2, length=8)
    run = notebook.run_here(settings)
    assert run.result.ending == "finished" and run.ledger.peak_bytes == forecast_of(settings).peak_bytes


def test_a_step_of_the_processor_is_run_there_although_there_is_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    settings = LabSettings(step="naive", model="tiny", batch_size=4, length=8)
    run = notebook.run_here(settings)
    assert run.device.type == "cpu" and run.ledger.peak_bytes == forecast_of(settings).peak_bytes


def test_a_step_that_would_not_fit_is_refused_before_it_starts(monkeypatch):
    monkeypatch.setattr(notebook, "ram_bytes", lambda: (2**34, 2**20))
    monkeypatch.setattr(notebook.LiveRun, "run", lambda self: pytest.fail("it was started"))
    with pytest.raises(RuntimeError, match=r"^Not run: the forecast is .* this machine has 1.00 MiB free"):
        notebook.run_here(LabSettings(step="naive", model="tiny", batch_size=64, length=32))


def test_a_step_that_fails_says_why(monkeypatch):
    def fail(self):
        raise MemoryError("not enough of it")

    monkeypatch.setattr(notebook.LiveRun, "_step", fail)
    with pytest.raises(RuntimeError, match="not enough of it"):
        notebook.run_here(LabSettings(step="naive", model="tiny", batch_size=4, length=8))


def test_a_live_picture_follows_its_controls_in_the_courses_style():
    calls = []

    def draw(power, name):
        assert matplotlib.rcParams["axes.titlelocation"] == "left"
        calls.append((power, name))
        figure, axes = plots.new_figure(width=2, height=2)
        axes.plot([0, 10**power])
        return figure, f"A line from 0 to {10**power}, <{name}>."

    power = widgets.IntSlider(value=1, min=0, max=3)
    name = widgets.Dropdown(options=["one", "two"])
    box = notebook.live_picture(draw, power=power, name=name)
    words, picture = box.children[2:4]
    assert box.children[:2] == (power, name)
    assert (
        words.value == "A line from 0 to 10, &lt;one&gt;."
        and 'alt="A line from 0 to 10, &lt;one&gt;."' in picture.value
    )
    power.value, name.value = 2, "two"
    assert calls == [(1, "one"), (2, "one"), (2, "two")]
    assert words.value == "A line from 0 to 100, &lt;two&gt;." and "100, &lt;two&gt;" in picture.value


def test_markdown_is_displayed_as_markdown(monkeypatch):
    shown = []
    monkeypatch.setattr(notebook, "display", shown.append)
    notebook.show_markdown("| a |")
    assert shown[0].data == "| a |"


def test_long_sentences_are_printed_in_lines_and_words_and_tables_stay_whole(capsys):
    sentence, table = "  " + "a-word " * 30 + "x" * 120, "step   " + "number   " * 20
    notebook.say(f"{sentence}\n{table}\nshort")
    *lines, long, row, short = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 and line.startswith("  a-word") for line in lines) and len(lines) == 3
    assert (long, row, short) == ("  " + "x" * 120, table, "short")
    assert " ".join(" ".join([*lines, long]).split()) == sentence.strip()


def test_a_long_table_is_folded_under_its_summary(monkeypatch):
    shown = []
    monkeypatch.setattr(notebook, "display", lambda data, raw: shown.append(data))
    notebook.show_folded("34 steps < all", "a <b>\nc")
    assert shown[0]["text/html"] == "<details><summary>34 steps &lt; all</summary><pre>a &lt;b&gt;\nc</pre></details>"
    assert shown[0]["text/plain"] == "34 steps < all\n\na <b>\nc"


def test_a_saved_benchmark_is_its_rows_and_none_where_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(notebook, "PROJECT", tmp_path)
    assert notebook.saved_benchmark("steps") == []
    folder = tmp_path / "tests" / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "steps.csv").write_text("version,seconds\nnaive,1.5\n")
    assert notebook.saved_benchmark("steps") == [{"version": "naive", "seconds": "1.5"}]


def test_the_recordings_come_from_the_courses_own_folder(monkeypatch, tmp_path):
    assert [recording.calibration.device for recording in notebook.load_recordings()]
    monkeypatch.setattr(notebook, "PROJECT", tmp_path)
    assert notebook.load_recordings() == []
