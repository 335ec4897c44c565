"""Widgets on the next day: a saved notebook is opened again, and its kernel is started anew."""

import pytest
from browser.lab import KERNEL, NotebookPage, reopen, wait_until
from browser.test_widgets import write_gallery

NAMES = ("MemoryLab", "BlockMatrix", "predict")
SAY_SO = "A picture of the widget, as it was: run the notebook to use it."
MODEL = "jupyterapp.shell.currentWidget.context.model"


@pytest.fixture
def notebook(lab, lab_folder, page):
    """Three widgets, run."""
    folder = lab_folder / "notebooks"
    opened = NotebookPage(page, lab, write_gallery(folder, NAMES), folder)
    opened.run_all()
    page.locator("[data-part=peak]", has_text="bytes").wait_for()
    assert said(page) == []
    return opened


def said(page):
    """The words, a widget each, that it is only a picture."""
    return [words for words in page.locator(".gclib-page").all_inner_texts() if words.strip()]


def save(page):
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function(f"!{MODEL}.dirty")


def test_a_saved_notebook_shows_its_widgets_the_next_day_and_the_day_after(notebook, lab, page):
    field = page.locator(".gclib-prediction input")
    field.fill("77")
    peak = page.locator("[data-part=peak]")
    start = peak.inner_text()
    page.locator(".gclib-batch .noUi-handle").press("ArrowRight")
    wait_until(lambda: peak.inner_text() != start, peak.inner_text)
    before = peak.inner_text()
    save(page)
    sizes = []
    for _ in range(2):
        page.evaluate(f"{KERNEL}.shutdown()")
        reopen(page, lab, "gallery.ipynb", len(NAMES))
        wait_until(lambda: said(page) == [SAY_SO] * len(NAMES), lambda: str(said(page)))
        assert notebook.errors() == []
        assert "model not found" not in page.locator(".jp-Notebook").inner_text()
        assert field.input_value() == "77"
        wait_until(lambda: peak.inner_text() == before, peak.inner_text)
        assert page.locator(".gclib-timeline:not(.gclib-dimmed) svg").first.is_visible()
        page.locator(".jp-OutputArea img").first.wait_for()
        assert notebook.violations() == []
        save(page)
        sizes.append(page.evaluate(f"JSON.stringify({MODEL}.getMetadata('widgets')).length"))
    assert sizes[0] == sizes[1]  # nothing is lost, and nothing piles up
    notebook.run_all()
    wait_until(lambda: said(page) == [], lambda: str(said(page)))


def test_a_kernel_that_is_started_anew_leaves_words_above_its_widgets(notebook, page):
    page.evaluate(f"{KERNEL}.restart()")
    wait_until(lambda: said(page) == [SAY_SO] * len(NAMES), lambda: str(said(page)))
    shown = page.locator(".gclib-block-matrix, .gclib-prediction").first
    place = shown.locator(".gclib-page").bounding_box()["y"]
    assert place < min(
        one.bounding_box()["y"] for one in shown.locator("button, .widget-html").all() if one.is_visible()
    )
