"""Widgets whose kernel is started anew say that they are only a picture."""

import pytest
from browser.lab import KERNEL, NotebookPage, wait_until
from browser.test_widgets import write_gallery

NAMES = ("MemoryLab", "BlockMatrix", "predict")
SAY_SO = "A picture of the widget, as it was: run this cell to use it."


@pytest.fixture
def notebook(lab, lab_folder, page):
    """Three widgets, run."""
    opened = NotebookPage(
        page, lab, write_gallery(lab_folder / "notebooks", NAMES, "back.ipynb"), lab_folder / "notebooks"
    )
    opened.run_all()
    page.locator("[data-part=peak]", has_text="bytes").wait_for()
    assert said(page) == []
    return opened


def said(page):
    """The words, a widget each, that it is only a picture."""
    return [words for words in page.locator(".gclib-page").all_inner_texts() if words.strip()]


def test_a_kernel_that_is_started_anew_leaves_words_above_its_widgets(notebook, page):
    page.evaluate(f"{KERNEL}.restart()")
    wait_until(lambda: said(page) == [SAY_SO] * len(NAMES), lambda: str(said(page)))
    shown = page.locator(".gclib-block-matrix, .gclib-prediction").first
    place = shown.locator(".gclib-page").bounding_box()["y"]
    assert place < min(
        one.bounding_box()["y"] for one in shown.locator("button, .widget-html").all() if one.is_visible()
    )
