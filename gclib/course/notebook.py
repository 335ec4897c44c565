"""What the chapters share, behind one import: `from gclib.course import notebook`.

In a chapter's cells `gclib.` is the library, which you can take into a trainer of your own; `notebook.` is what only
the course needs: a prediction, a picture that follows a slider, one number for how far two gradients are apart.
Formulas and oracles are not here. They stay in the cells, where you can read them.
"""

import csv
import os
import platform
import textwrap
from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as widgets
import matplotlib
import torch
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from torch import Tensor, nn

from gclib.audit.gradients import compare_gradients, gradients_by_part, gradients_of, worst_error
from gclib.course import plots
from gclib.course.chapters import PROJECT
from gclib.course.checks.predictions import after_prediction, predict, recall, show_back
from gclib.course.memory_lab.answers import LabSettings, forecast_of, obstacle
from gclib.course.memory_lab.run import LiveRun
from gclib.course.widgets.base import Lab
from gclib.data.pairs import TextPair, load_pairs
from gclib.data.tokens import train_tokenizer
from gclib.memory.devices import memory_of, ram_bytes
from gclib.memory.ledger import record_memory
from gclib.memory.recording import Recording
from gclib.memory.recording import load_recordings as read_recordings
from gclib.support.validation import refuse

__all__ = [
    "after_prediction",
    "compare_gradients",
    "gradients_by_part",
    "gradients_of",
    "live_picture",
    "load_recordings",
    "load_texts",
    "loss_and_gradient",
    "peak_of",
    "predict",
    "recall",
    "relative_error",
    "run_here",
    "saved_benchmark",
    "say",
    "show_back",
    "show_folded",
    "show_markdown",
    "start",
    "worst_error",
]


def start(seed: int = 0) -> None:
    """Begin a chapter: set the seed and the look of every picture, and say which versions run here."""
    torch.manual_seed(seed)
    matplotlib.rcParams.update(plots.SETTINGS)
    place = "with a CUDA card" if torch.cuda.is_available() else "on the CPU"
    print(f"Python {platform.python_version()}, PyTorch {torch.__version__}, {place}, seed {seed}")


def load_texts() -> tuple[list[TextPair], list[TextPair], Any]:
    """(pairs to train on, 1,024 pairs of other files, a tokenizer trained on the first 3,000 of the former)."""
    train_pairs, test_pairs = load_pairs("train"), load_pairs("test", limit=1024)
    return train_pairs, test_pairs, train_tokenizer(train_pairs[:3000])


def loss_and_gradient(
    step: Callable, encoder: nn.Module, inputs: Any, loss_fn: Callable, **options: Any
) -> tuple[float, Tensor]:
    """One step with `encoder` for both towers: its loss, and all gradients of the encoder as one vector.

    step: called as `step([encoder, encoder], inputs, loss_fn, **options)`, returns the loss and adds to `.grad`, which
    is cleared before and kept afterwards. Parameters without a gradient are left out of the vector.
    """
    encoder.zero_grad()
    loss = step([encoder, encoder], inputs, loss_fn, **options)
    return loss.item(), torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||: the length of the difference over the length of what is right.

    Raises ValueError where the shapes differ, and where `expected` is zero.
    """
    if found.shape != expected.shape:
        raise refuse("found", f"must have the shape of expected, {tuple(expected.shape)}", tuple(found.shape))
    if not expected.norm() > 0:
        raise refuse("expected", "must not be zero", "a tensor of size 0")
    return ((found - expected).norm() / expected.norm()).item()


def peak_of(step: Callable, *modules: nn.Module) -> int:
    """The most bytes alive while `step(on_phase=...)` runs, as the ledger counts them.

    modules: what the step trains. Their gradients are let go of before it, and kept after it.
    """
    for module in modules:
        module.zero_grad(set_to_none=True)
    with record_memory(*modules) as ledger:
        step(on_phase=ledger.on_phase)
    return ledger.peak_bytes


def run_here(settings: LabSettings) -> LiveRun:
    """One real step of these settings, on their device; the run that is returned has its ledger.

    Raises ValueError for a card that is not there, and RuntimeError, in words, where the step would not fit into what
    is free here, or did not finish.
    """
    run = LiveRun(settings, settings.device)
    card_free = memory_of(run.device)[0] if run.device.type == "cuda" else None
    if refusal := obstacle(forecast_of(run.settings), ram_bytes()[1], card_free_bytes=card_free):
        raise RuntimeError(refusal)
    if run.run().ending != "finished":
        raise RuntimeError(run.result.error)
    return run


def live_picture(draw: Callable[..., tuple[Figure, str]], **controls: widgets.Widget) -> Lab:
    """Controls above a picture that is drawn again whenever one of them changes.

    draw: called with every control's value, by the control's name; returns a figure and what it shows, in words. The
    words are the picture's alt text, and stand above it.
    """
    box = Lab()
    box.label_width = "initial"

    def redraw(_: object = None) -> None:
        with plots.style():
            figure, alt = draw(**{name: control.value for name, control in controls.items()})
        box.picture.value, box.words.value = plots.to_html(figure, alt=alt), escape(alt)

    for control in controls.values():
        control.style.description_width = box.label_width  # a name is never cut
        control.observe(redraw, names="value")
    redraw()
    box.arrange(*controls.values(), box.words, box.picture)
    return box


def show_markdown(text: str) -> None:
    """Display `text` as Markdown: a table, a passage of code."""
    display(Markdown(text))


def say(text: object) -> None:
    """Print sentences in lines of at most 100 characters, so that no page breaks a word; a table's lines stay whole."""
    for line in str(text).splitlines():
        words = line.strip()
        indent = line[: len(line) - len(line.lstrip())]
        if len(line) > 100 and "  " not in words:
            look = {"initial_indent": indent, "subsequent_indent": indent, "break_long_words": False}
            line = textwrap.fill(words, 100, break_on_hyphens=False, **look)
        print(line)


def show_folded(summary: str, text: str) -> None:
    """Display `text`, a long table, folded under its one line of summary: a click or Enter unfolds it."""
    tag = f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
    display({"text/html": tag, "text/plain": f"{summary}\n\n{text}"}, raw=True)


def shows_bars() -> bool:
    """Whether long work draws a progress bar: everywhere but on a page that is being built (GCLIB_BARS=0)."""
    return os.environ.get("GCLIB_BARS") != "0"


def load_recordings() -> list[Recording]:
    """The steps that were recorded on graphics cards, which come with the course; a file a card."""
    return read_recordings(PROJECT / "data" / "recordings")


def saved_benchmark(name: str) -> list[dict[str, str]]:
    """The rows of tests/benchmarks/results/NAME.csv, by heading; none where the benchmark was never run here."""
    path = PROJECT / "tests" / "benchmarks" / "results" / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
