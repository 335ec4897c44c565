"""The widgets of chapters 06, 08 and 15 in Notebook 7: shown, and their sliders moved with keys, as in JupyterLab."""

import importlib.util

import pytest
from browser.lab import NotebookPage, jupyter
from browser.test_widgets import silent_sliders, write_gallery

NAMES = ("MemoryLab", "TileLab", "CapstoneForm")


@pytest.fixture(scope="module")
def notebook7(chromium, lab_folder):
    """The address of a Notebook 7 over a copy of the notebooks."""
    if importlib.util.find_spec("notebook") is None:
        pytest.skip("Notebook 7 is not installed (pip install notebook), and the course does not need it")
    with jupyter(lab_folder, "notebook") as address:
        yield address


def test_widgets_show_and_answer_the_keyboard_in_notebook_7(notebook7, lab_folder, page):
    notebook = NotebookPage(page, notebook7, write_gallery(lab_folder / "notebooks", NAMES), lab_folder / "notebooks")
    notebook.run_all()
    assert silent_sliders(page, NAMES) == []
    assert notebook.errors() == []
