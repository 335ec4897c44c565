"""The lab without a kernel: plain files in Chromium, worked with mouse and keyboard, seen narrow and wide, by axe."""

import os
import re
import shutil

import pytest
from browser.lab import serving, watched

from gclib.course.memory_lab.answers import LabSettings, forecast_of
from gclib.course.memory_lab.bundles import write_bundles
from gclib.course.memory_lab.picture import PAGE
from gclib.support.words import format_bytes

HTML = """<!doctype html><html lang="en"><meta charset="utf-8"><title>The lab</title><link rel="icon" href="data:,">
<link rel="stylesheet" href="lab.css"><style>:root {color-scheme: light dark} body {background: Canvas}</style>
<main><h1>The lab</h1><div id="lab"></div></main><script type="module">
import { mount } from "./lab.js"; mount(document.getElementById("lab"), "bundles").then(lab => { window.lab = lab; });
</script></html>"""
START = {"model": "tiny", "length": 16, "batch_size": 64, "chunk_size": 8}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of a folder with the modules, a page, and two bundles."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    (folder / "index.html").write_text(HTML)
    write_bundles(folder / "bundles", models=("tiny",), lengths=(16,), precisions=("float32",))
    with serving(folder) as address:
        yield address


@pytest.fixture
def opened(site, page):
    """The page, with the first picture drawn."""
    with watched(page, site, "window.lab.view"):  # window.lab may be the element of that id
        yield page


def peak_of(page):
    return int(re.search(r"\(([\d,]+) bytes\)", page.locator("[data-part=peak]").inner_text())[1].replace(",", ""))


def choose(page, name, place):
    """Put a control on its place, as a person's key or click does: with an input event."""
    page.evaluate(
        """([name, place]) => { const control = window.lab.controls[name].input; control.value = place;
        control.dispatchEvent(new Event("input")); }""",
        [name, place],
    )


def test_moves_are_answered_in_the_page_as_python_forecasts_them_and_ask_for_nothing(opened):
    choose(opened, "budget", 9)
    opened.wait_for_function("document.querySelector('.gclib-dimmed') === null")
    choose(opened, "budget", 2)  # both devices' laws are here now
    asked = []
    opened.on("request", lambda request: asked.append(request.url))
    index = opened.evaluate("Object.fromEntries(Object.entries(lab.controls).map(([n, c]) => [n, +c.input.max]))")
    assert index["batch_size"] == 20
    settings = LabSettings(**START)
    assert peak_of(opened) == forecast_of(settings).peak_bytes
    for name, place, value in (
        ("batch_size", 9, 512),
        ("chunk_size", 0, 1),
        ("retain_chunks", 3, 4),
        ("optimizer", 1, "sgd"),
        ("batch_size", 0, 1),
        ("step", 1, "accumulation"),
        ("batch_size", 20, 2**20),
        ("step", 0, "naive"),
        ("budget", 9, None),
    ):
        choose(opened, name, place)
        change = {"device": "cuda"} if name == "budget" else {name: value}
        settings = LabSettings(**{**vars(settings), **change})
        assert peak_of(opened) == forecast_of(settings).peak_bytes, settings
    assert asked == []


def test_the_cursor_is_worked_with_keys_and_read_aloud(opened):
    cursor = opened.locator("[data-part=cursor]")
    settings = LabSettings(**START)
    peak = format_bytes(forecast_of(settings).peak_bytes)
    assert f"{peak} live" in cursor.get_attribute("aria-valuetext")
    cursor.press("Home")
    assert cursor.get_attribute("aria-valuenow") == "1"
    assert cursor.get_attribute("aria-valuetext").startswith(
        "first forward, queries, chunk 1 of 8 (8 rows), event 1 of"
    )
    cursor.press("ArrowRight")
    assert cursor.get_attribute("aria-valuenow") == "2"
    cursor.press("PageDown")
    assert "chunk 2 of 8 (8 rows), event 1 of" in cursor.get_attribute("aria-valuetext")
    cursor.press("PageUp")
    cursor.press("Enter")
    assert opened.locator("[data-part=zoom]").get_attribute("aria-pressed") == "true"
    label = opened.locator(".gclib-chart > svg").get_attribute("aria-label")
    assert label.startswith("Bytes over one piece: first forward, queries, chunk 1 of 8 (8 rows). Peak ")
    assert f". The step, with a peak of {peak}, fits within" in label
    cursor.press("End")
    assert "second forward and backward, passages, chunk 8 of 8" in cursor.get_attribute("aria-valuetext")
    assert "chunk 8 of 8" in opened.locator(".gclib-chart > svg").get_attribute("aria-label")  # zoom goes along
    cursor.press("Escape")
    cursor.press("p")
    assert f"{peak} live" in opened.locator("[data-part=reading]").inner_text()


def test_a_budget_is_no_multiple_of_what_a_zoomed_picture_has_at_its_peak(opened):
    plot = opened.locator("[data-part=plot]")
    choose(opened, "budget", 5)
    assert re.search(r"[2-9][\d,]* times the peak: far above this picture", plot.text_content())
    opened.locator("[data-part=cursor]").press("Enter")
    assert "above this picture" in plot.text_content() and "times the peak" not in plot.text_content()
    if "GCLIB_GALLERY" in os.environ:
        opened.screenshot(path=f"{os.environ['GCLIB_GALLERY']}/zoomed.png")


def test_the_mouse_reads_and_zooms(opened):
    cursor = opened.locator("[data-part=cursor]")
    box = cursor.bounding_box()
    opened.mouse.move(box["x"] + 3, box["y"] + 50)
    assert opened.locator("[data-part=reading]").inner_text().startswith("first forward, queries, chunk 1")
    opened.mouse.move(box["x"] + box["width"] - 3, box["y"] + 50)
    assert "passages, chunk 8 of 8" in opened.locator("[data-part=reading]").inner_text()
    opened.mouse.dblclick(box["x"] + box["width"] - 3, box["y"] + 50)
    assert "chunk 8 of 8" in opened.locator(".gclib-chart > svg").get_attribute("aria-label")
    opened.get_by_role("button", name="Show the whole step").click()
    opened.get_by_role("button", name="To the peak").click()
    assert f"({peak_of(opened):,} bytes)" in opened.locator("[data-part=reading]").inner_text()


def test_the_table_says_the_highest_moment_of_each_phase(opened):
    opened.get_by_text("As a table").click()
    opened.locator(".gclib-scroll tbody tr").first.wait_for()  # the details' own event comes a moment later
    rows = opened.locator(".gclib-scroll tbody tr").all_inner_texts()
    peaks = [max(one.peak_bytes for one in forecast_of(LabSettings(**START)).timeline)]
    assert len(rows) == 5 and any(format_bytes(peaks[0]) in row for row in rows)


@pytest.mark.parametrize("width", [1400, 700, 350])  # 350: 700 pixels at 200 %
def test_nothing_is_cut_and_no_text_is_small(opened, width):
    opened.set_viewport_size({"width": width, "height": 900})
    opened.get_by_text("As a table").click()
    opened.get_by_text("More settings").click()
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    sizes = opened.evaluate(
        "[...document.querySelectorAll('.gclib-page-lab *')].map(one => parseFloat(getComputedStyle(one).fontSize))"
    )
    assert min(sizes) >= 11
    picture, first = (opened.locator(each).first.bounding_box() for each in (".gclib-chart", "form"))
    assert picture["y"] < first["y"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened, scheme):
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="axe-core-python is not installed")
    opened.emulate_media(color_scheme=scheme)
    opened.get_by_text("As a table").click()
    opened.get_by_text("More settings").click()
    violations = axe.Axe().run(opened)["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in violations] == []
