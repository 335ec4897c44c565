"""A person's way through chapters 00 and 06: open, run everything, move a slider with the keyboard, Run, Stop."""

import os

import nbformat
import pytest
from browser.lab import NotebookPage, wait_until


@pytest.fixture
def open_chapter(lab, lab_folder, page):
    """Open a chapter in a fresh page, whole or with these cells of code alone: open_chapter("00_start_here.ipynb")."""

    def open_page(name, code=None):
        folder = lab_folder / "notebooks"
        if code is not None:
            chapter = nbformat.read(folder / name, as_version=4)
            chapter.cells = [cell for cell in chapter.cells if cell.cell_type != "code" or cell.id in code]
            assert sum(cell.cell_type == "code" for cell in chapter.cells) == len(code)
            nbformat.write(chapter, folder / name)
        return NotebookPage(page, lab, name, folder)

    return open_page


def test_chapter_00_opens_and_runs_and_its_first_slider_moves(open_chapter):
    notebook = open_chapter("00_start_here.ipynb")
    notebook.run_all()
    assert notebook.errors() == []
    words = notebook.page.locator(".widget-html", has_text="pairs: plain")
    assert words.inner_text().startswith("64 pairs: plain")
    notebook.press_on_slider(notebook.page.locator(".widget-slider", has_text="batch size"), "ArrowRight")
    wait_until(lambda: words.inner_text().startswith("128 pairs: plain"), words.inner_text)
    assert notebook.errors() == []
    assert notebook.violations() == []


def test_memory_lab_redraws_runs_and_stops(open_chapter):
    lab_alone = ["where-it-runs", "d815d149", "2e977a98", "997f63cb", "7b33f99a"]  # nbval runs the rest
    notebook = open_chapter("06_live_memory_lab.ipynb", lab_alone)
    notebook.run_all()
    assert notebook.errors() == []
    lab = notebook.page.locator(".gclib-memory-lab").first
    closed = notebook.page.locator(".gclib-closed")
    assert "Predict first" in closed.inner_text() and lab.count() == 0
    assert closed.locator(".gclib-skip").inner_text() == "Skip"
    field = closed.locator(".gclib-prediction input")
    field.fill("many")
    field.press("Enter")
    closed.get_by_text("That is not a number: many.").wait_for()
    field.fill("1,024")
    field.press("Enter")
    lab.wait_for()
    assert notebook.page.get_by_text("Compare it with what you predicted.").is_visible() and closed.count() == 0
    forecast, status = lab.locator(".gclib-forecast"), lab.locator(".gclib-status")
    peak, cursor = lab.locator("[data-part=peak]"), lab.locator("[data-part=cursor]")
    wait_until(lambda: "bytes" in peak.inner_text(), forecast.inner_text)

    text_before, peak_before = forecast.inner_text(), peak.inner_text()
    notebook.press_on_slider(lab.locator(".gclib-chunk"), "ArrowRight")
    wait_until(lambda: forecast.inner_text() != text_before, forecast.inner_text)
    wait_until(lambda: peak.inner_text() != peak_before, peak.inner_text)
    assert peak.inner_text().split(" (")[0] == forecast.inner_text().split(":")[0]  # the page's peak is Python's
    cursor.press("Home")
    cursor.press("PageDown")
    assert "first forward, queries, chunk 2 of" in cursor.get_attribute("aria-valuetext")

    lab.locator(".gclib-run").click()
    wait_until(lambda: status.inner_text().startswith("Finished in"), status.inner_text)
    assert "exactly as forecast" in status.inner_text()
    wait_until(lambda: lab.locator("path.gclib-live").count() == 1, status.inner_text)
    if "GCLIB_PICTURE" in os.environ:
        lab.screenshot(path=os.environ["GCLIB_PICTURE"])

    pin, compared = lab.locator(".gclib-compare"), lab.locator(".gclib-compared")
    pin.focus()
    pin.press("Space")
    wait_until(lambda: "the same to the byte" in compared.inner_text(), compared.inner_text)
    assert compared.locator("img").count() == 1

    text_before = forecast.inner_text()
    for _ in range(3):  # eight times the batch, so that Stop comes in time
        notebook.press_on_slider(lab.locator(".gclib-batch"), "ArrowRight")
    wait_until(lambda: forecast.inner_text() != text_before, forecast.inner_text)
    notebook.settle()
    wait_until(lambda: "times as much" in compared.inner_text(), compared.inner_text)
    lab.locator(".gclib-run").click()
    wait_until(lambda: "Press Run again" in status.inner_text() or "Piece" in status.inner_text(), status.inner_text)
    if "Press Run again" in status.inner_text():
        lab.locator(".gclib-run").click()
    wait_until(lambda: status.inner_text().startswith("Piece"), status.inner_text)
    lab.locator(".gclib-stop").click()
    wait_until(lambda: status.inner_text().startswith("Stopped"), status.inner_text)  # in its first piece, or after
    assert notebook.errors() == []
