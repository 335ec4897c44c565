"""Every widget of the library on one page, in a light and a dark theme: each slider answers a key, nothing fails."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import nbformat
import pytest
from browser.lab import ROOT, NotebookPage

# What the chapters show, with their settings or smaller ones. Live runs have their own tests, in kernel and browser.
WIDGETS = {
    "MemoryLab": "from gclib.widgets import MemoryLab; MemoryLab(model='tiny', length=16, batch_size=8, chunk_size=4)",
    "BlockMatrix": "from gclib.block_matrix import BlockMatrix; BlockMatrix(batch_size=8)",
    "PriceLab": "from gclib.price_widget import PriceLab; PriceLab(chunk_size=8, retain_chunks=3, spread=0.75)",
    "TileLab": "from gclib.tile_widget import TileLab; TileLab(batch_size=4096, tile_size=1024)",
    "RingWalk": "from gclib.ring_widget import RingWalk; RingWalk(ranks=3)",
    "CapstoneForm": "from gclib.capstone_widget import CapstoneForm; CapstoneForm(seed=4)",
    "RaceLab": "from gclib.race_widget import RaceLab; RaceLab()",
    "GraphWalk": """import torch
from gclib import ContrastiveLoss, Encoder, grad_cache_step, naive_step
from gclib.walk import record_walk
from gclib.walk_widget import GraphWalk
encoders = [Encoder.from_config("tiny", vocab_size=50)] * 2
texts = [{"input_ids": torch.randint(5, 50, (6, 8))} for _ in range(2)]
cached = record_walk(grad_cache_step, encoders, texts, ContrastiveLoss(), chunk_size=3)
GraphWalk({"gradient cache": cached, "naive": record_walk(naive_step, encoders, texts, ContrastiveLoss())})""",
    "AuditLab": """from gclib.audit_widget import AuditLab
AuditLab(encoders, texts, ContrastiveLoss(0.1, learnable=True), seed=2)""",
    "predict": "from gclib.checks.predictions import predict; predict(0, 'try', 'How many?', unit='MiB', low=0)",
}


@pytest.fixture(scope="module")
def gallery(lab_folder):
    """A notebook with a cell a widget, in the folder that Jupyter serves."""
    return write_gallery(lab_folder / "notebooks", WIDGETS)


def write_gallery(folder: Path, names: Iterable[str], file: str = "gallery.ipynb") -> str:
    """A notebook that shows these widgets, a cell each; its name. A file of its own gets a kernel of its own."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(WIDGETS[name]) for name in names])
    notebook.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nbformat.write(notebook, folder / file)
    return file


def answers(page, cell, handle) -> bool:
    """Whether a key on the slider's handle changes its value and what the widget shows: right or, at the end, left."""
    before = shown(cell)
    for key in ("ArrowRight", "ArrowLeft"):
        value = handle.get_attribute("aria-valuetext")
        handle.focus()
        handle.press(key)
        for _ in range(100):
            if handle.get_attribute("aria-valuetext") != value and shown(cell) != before:
                return True
            page.wait_for_timeout(50)
    return False


def shown(cell) -> tuple[list[str | None], str]:
    """A widget's pictures and words."""
    output = cell.locator(".jp-OutputArea").first
    return [image.get_attribute("src") for image in output.locator("img").all()], output.inner_text()


def test_every_slider_of_every_widget_answers_the_keyboard(lab, lab_folder, gallery, page):
    """In the light theme; then the dark one is put on, which redraws the page."""
    notebook = NotebookPage(page, lab, gallery, lab_folder / "notebooks")
    notebook.choose_theme("JupyterLab Light")
    notebook.run_all()
    assert notebook.errors() == []
    assert silent_sliders(page, WIDGETS) == []
    photograph(page, "light")
    notebook.choose_theme("JupyterLab Dark")
    photograph(page, "dark")
    assert notebook.errors() == []


def silent_sliders(page, names: Iterable[str]) -> list[str]:
    """The sliders of a gallery that no key moves."""
    silent = []
    for number, name in enumerate(names):
        cell = page.locator(".jp-Notebook .jp-CodeCell").nth(number)
        handles = [handle for handle in cell.locator(".noUi-handle").all() if handle.is_visible()]
        silent += [f"{name}, slider {place}" for place, handle in enumerate(handles) if not answers(page, cell, handle)]
    return silent


def test_the_audit_is_answered_with_keys_alone(lab, lab_folder, page):
    """A menu's arrow is the menu's, and Enter presses the button: Jupyter would take both for itself."""
    folder = lab_folder / "notebooks"
    notebook = NotebookPage(page, lab, write_gallery(folder, ("GraphWalk", "AuditLab"), "audit.ipynb"), folder)
    notebook.run_all()
    audit = page.locator(".jp-Notebook .jp-CodeCell").nth(1).locator(".jp-OutputArea").first
    audit.locator("select").nth(1).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    audit.get_by_text(re.compile("^(Yes|No)[:.]")).wait_for(timeout=30_000)
    assert notebook.errors() == []


def photograph(page, theme: str) -> None:
    """A picture of each widget, for people to look at, where GCLIB_GALLERY names a folder."""
    for number, name in enumerate(WIDGETS if "GCLIB_GALLERY" in os.environ else ()):
        cell = page.locator(".jp-Notebook .jp-CodeCell").nth(number)
        cell.screenshot(path=f"{os.environ['GCLIB_GALLERY']}/{name}-{theme}.png")


def test_the_gallery_has_every_widget_of_the_library():
    """A widget that the library gets later has to be put on the page as well."""
    found = set()
    for path in (ROOT / "gclib").glob("*.py"):
        for line in path.read_text("utf-8").splitlines():
            if line.startswith("class ") and "(widgets.VBox)" in line:
                found.add(line.split()[1].split("(")[0])
    assert found == set(WIDGETS) - {"predict"}
