"""Widgets on the next day: a saved notebook is opened again, and its kernel is started anew."""

import pytest
from browser.lab import KERNEL, NotebookPage, wait_until
from browser.test_widgets import write_gallery

NAMES = ("MemoryLab", "BlockMatrix", "predict")
SAY_SO = "A picture of the widget, as it was: run this cell to use it."
MODEL = "jupyterapp.shell.currentWidget.context.model"


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


def save(page):
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function(f"!{MODEL}.dirty")


def test_a_saved_notebook_shows_its_widgets_the_next_day_and_the_day_after(notebook, lab, page):
    field = page.locator(".gclib-prediction input")
    field.fill("77")
    page.locator(".gclib-batch .noUi-handle").press("ArrowRight")
    peak = page.locator("[data-part=peak]")
    before = peak.inner_text()
    save(page)
    sizes = []
    for _ in range(2):
        page.evaluate(f"{KERNEL}.shutdown()")
        page.goto("about:blank")
        page.goto(lab.format(notebook="back.ipynb"))
        wait_until(lambda: len(said(page)) == len(NAMES), lambda: page.locator(".jp-Notebook").inner_text())
        assert said(page) == [SAY_SO] * len(NAMES) and notebook.errors() == []
        assert "model not found" not in page.locator(".jp-Notebook").inner_text()
        assert field.input_value() == "77"
        peak.get_by_text("bytes").wait_for()
        assert peak.inner_text() == before and page.locator(".gclib-timeline svg").first.is_visible()
        assert page.locator(".jp-OutputArea img").first.is_visible()
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
