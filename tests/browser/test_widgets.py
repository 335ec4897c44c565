"""Every widget of the library on one page, in both themes: each control is reached, seen, named and answers a key."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat
import pytest
from browser.lab import ROOT, NotebookPage, fresh_page, wait_until

# What the chapters show, with their settings or smaller ones. Live runs have their own tests, in kernel and browser.
WIDGETS = {
    "MemoryLab": "from gclib.course.memory_lab.widget import MemoryLab; "
    "MemoryLab(model='tiny', length=16, batch_size=8, chunk_size=4)",
    "BlockMatrix": "from gclib.course.widgets.block_matrix import BlockMatrix; BlockMatrix(batch_size=8)",
    "PriceLab": "from gclib.course.widgets.price import PriceLab; PriceLab(chunk_size=8, retain_chunks=3, spread=0.75)",
    "TileLab": "from gclib.course.widgets.tiles import TileLab; TileLab(batch_size=4096, tile_size=1024)",
    "RingWalk": "from gclib.course.widgets.ring import RingWalk; RingWalk(ranks=3)",
    "CapstoneForm": "from gclib.course.capstone.widget import CapstoneForm; CapstoneForm(seed=4)",
    "RaceLab": "from gclib.course.widgets.race import RaceLab; RaceLab()",
    "GraphWalk": """import torch
from gclib import ContrastiveLoss, Encoder, grad_cache_step, naive_step
from gclib.memory.walk import record_walk
from gclib.course.widgets.walk import GraphWalk
encoders = [Encoder.from_config("tiny", vocab_size=50)] * 2
texts = [{"input_ids": torch.randint(5, 50, (6, 8))} for _ in range(2)]
cached = record_walk(grad_cache_step, encoders, texts, ContrastiveLoss(), chunk_size=3)
GraphWalk({"gradient cache": cached, "naive": record_walk(naive_step, encoders, texts, ContrastiveLoss())})""",
    "AuditLab": """from gclib.course.widgets.audit import AuditLab
AuditLab(encoders, texts, ContrastiveLoss(0.1, learnable=True), seed=2)""",
    "predict": "from gclib.course.checks.predictions import predict; predict(0, 'try', 'How many?', unit='MiB', low=0)",
    "choose": "predict(0, 'pick', 'Which one?', options=['the first', 'the second'])",
}


WIDE_TEXT = "\n".join("|" + cell * 40 for cell in ("unbreakable_word|", "---|", "0.123456789|"))

# What a person can work. A number's readout is a field too; a choice's is not, as typing there does nothing.
CONTROLS = "button, select, input, textarea, summary, [role=slider], [role=textbox]"
LOOKS = "looks = element => (({outlineStyle, outlineWidth}) => [outlineStyle, outlineWidth])(getComputedStyle(element))"
LIST_CONTROLS = f"""selector => {{
    const all = [...document.querySelectorAll(".jp-Notebook .jp-OutputArea")].flatMap(
        area => [...area.querySelectorAll(selector)]);
    window.controls = [...new Set(all)].filter(control => !control.disabled && control.checkVisibility());
    window.{LOOKS};
    document.activeElement.blur();
    return controls.map(looks);
}}"""
FOCUSED = """() => {
    const now = document.activeElement, words = now.outerHTML.slice(0, 150);
    const place = now.closest(".jp-OutputArea") ? controls.indexOf(now) : null;
    return {place, looks: looks(now), words, inside: now.closest(".jp-Notebook") !== null};
}"""


@pytest.fixture(scope="module")
def whole_gallery(chromium, lab, lab_folder):
    """A page with every widget, in the light theme, run."""
    with fresh_page(chromium) as page:
        file = write_gallery(lab_folder / "notebooks", WIDGETS)
        notebook = NotebookPage(page, lab, file, lab_folder / "notebooks")
        notebook.choose_theme("JupyterLab Light")
        notebook.run_all()
        assert notebook.errors() == []
        yield notebook


@pytest.fixture
def gallery(whole_gallery):
    """The page of every widget, which this file's tests work one after the other: no switch is on, Python is idle."""
    pressed = whole_gallery.page.locator(".jp-OutputArea .widget-toggle-button[aria-pressed=true]")
    for switch in pressed.all()[::-1]:
        switch.press("Enter")
    wait_until(lambda: pressed.count() == 0, lambda: str(pressed.all_inner_texts()))
    whole_gallery.settle()
    return whole_gallery


def write_gallery(folder: Path, names: Iterable[str]) -> str:
    """A notebook that shows these widgets, a cell each; its name."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(WIDGETS[name]) for name in names])
    notebook.cells += [nbformat.v4.new_markdown_cell(text) for text in ("A short text.", WIDE_TEXT)]
    notebook.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nbformat.write(notebook, folder / "gallery.ipynb")
    return "gallery.ipynb"


def test_a_text_wider_than_the_page_is_reached_by_tab_and_a_short_one_is_not(gallery):
    short, wide = (gallery.page.locator(".jp-MarkdownCell .jp-RenderedMarkdown").nth(place) for place in (0, 1))
    wide.scroll_into_view_if_needed()
    wait_until(lambda: wide.get_attribute("tabindex") == "0", lambda: wide.evaluate("text => text.outerHTML"))
    assert wide.evaluate("text => text.scrollWidth > text.clientWidth") and short.get_attribute("tabindex") is None
    wide.press("ArrowRight")
    wait_until(lambda: wide.evaluate("text => text.scrollLeft") > 0, lambda: "an arrow key does not scroll it")


def answers(page, cell, handle) -> bool:
    """Whether a key on the slider's handle changes its value and what the widget shows: right or, at the end, left."""
    before = shown(cell)
    for key in ("ArrowRight", "ArrowLeft"):
        value = handle.get_attribute("aria-valuenow")
        handle.focus()
        handle.press(key)
        for wait in range(1_000):
            moved = handle.get_attribute("aria-valuenow") != value
            if moved and shown(cell) != before:
                return True
            if not moved and wait == 100:
                break  # at the slider's end
            page.wait_for_timeout(50)
    return False


def shown(cell) -> tuple[list[str | None], str]:
    """A widget's pictures and words."""
    output = cell.locator(".jp-OutputArea").first
    return [image.get_attribute("src") for image in output.locator("img").all()], output.inner_text()


def test_tab_reaches_every_control_in_order_and_each_is_seen_and_named(gallery):
    """Disabled controls are left out (Stop while nothing runs, Previous at the start), and the program not asked for.

    Once in each theme.
    """
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        gallery.choose_theme(theme)
        photograph(gallery.page, theme.split()[-1].lower())
        before = gallery.page.evaluate(LIST_CONTROLS, CONTROLS)
        stops = [stop for stop in tab_through(gallery.page, len(before)) if stop["place"] is not None]
        assert [stop["place"] for stop in stops] == list(range(len(before))), stops
        pale = [stop["words"] for stop in stops if stop["looks"] != ["solid", "2px"] or stop["looks"] in before]
        nameless = [stop["words"] for stop in stops if not re.search(r"\w", stop["name"])]
        assert (pale, nameless) == ([], [])
        assert len(before) > 60


def tab_through(page, controls: int) -> Iterator[dict]:
    """Press Tab from the first cell on until the focus leaves the notebook; what has it each time."""
    devtools = page.context.new_cdp_session(page)
    page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").first.click()
    for _ in range(controls + 30):  # the buttons of the first cell's toolbar, and of what is above, are stops too
        page.keyboard.press("Tab")
        stop = page.evaluate(FOCUSED)
        if not stop["inside"]:
            return
        focused = devtools.send("Runtime.evaluate", {"expression": "document.activeElement"})["result"]["objectId"]
        heard = devtools.send("Accessibility.getPartialAXTree", {"objectId": focused, "fetchRelatives": False})
        yield stop | {"name": heard["nodes"][0].get("name", {}).get("value", "")}


def test_every_slider_of_every_widget_answers_the_keyboard(gallery):
    assert silent_sliders(gallery.page, WIDGETS) == []
    assert gallery.errors() == []
    told = """sliders => sliders.filter(slider => slider.querySelector(".noUi-handle").getAttribute("aria-valuetext")
        !== slider.querySelector(".widget-readout").textContent).map(slider => slider.textContent)"""
    sliders = gallery.page.locator(".widget-slider")
    wait_until(lambda: sliders.evaluate_all(told) == [], lambda: f"told otherwise: {sliders.evaluate_all(told)}")


def test_every_menu_switch_and_choice_answers_the_keyboard(gallery):
    page = gallery.page
    page.locator(".gclib-more").press("Enter")
    page.locator(".gclib-checkpointing select").wait_for(state="visible")
    for menu in page.locator(".jp-OutputArea select").all():
        before, last = menu.evaluate("menu => [menu.selectedIndex, menu.length - 1]")
        menu.press("ArrowUp" if before == last else "ArrowDown")
        assert menu.evaluate("menu => menu.selectedIndex") == before + (-1 if before == last else 1)
    page.locator(".gclib-more").press("Enter")
    for switch in page.locator(".jp-OutputArea .widget-toggle-button").all():
        for key, pressed in (("Space", "true"), ("Enter", "false")):
            switch.press(key)
            wait_until(lambda: switch.get_attribute("aria-pressed") == pressed, switch.inner_text)  # noqa: B023
    for box in page.locator(".jp-OutputArea input:is([type=checkbox], [type=radio])").all():
        before = box.is_checked()
        box.press("Space")
        assert box.is_checked() != before
    assert gallery.errors() == []


def test_the_program_asked_for_is_the_next_stop_and_ctrl_s_still_saves(gallery):
    page = gallery.page
    page.locator(".gclib-as-code").press("Enter")
    page.locator(".gclib-code textarea").wait_for(state="visible")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    page.locator(".gclib-as-code").press("Enter")
    page.locator(".gclib-code textarea").wait_for(state="hidden")
    model = "jupyterapp.shell.currentWidget.context.model"
    page.evaluate(f"{model}.dirty = true")  # JupyterLab may have saved it just before, by itself
    page.keyboard.press("Control+s")
    page.wait_for_function(f"!{model}.dirty")


def silent_sliders(page, names: Iterable[str]) -> list[str]:
    """The sliders of a gallery that no key moves."""
    silent = []
    for number, name in enumerate(names):
        cell = page.locator(".jp-Notebook .jp-CodeCell").nth(number)
        handles = [handle for handle in cell.locator(".noUi-handle").all() if handle.is_visible()]
        silent += [f"{name}, slider {place}" for place, handle in enumerate(handles) if not answers(page, cell, handle)]
    return silent


def test_the_audit_is_answered_with_keys_alone(gallery):
    """A menu's arrow is the menu's, and Enter presses the button: Jupyter would take both for itself."""
    page = gallery.page
    audit = (
        page.locator(".jp-Notebook .jp-CodeCell").nth(list(WIDGETS).index("AuditLab")).locator(".jp-OutputArea").first
    )
    audit.locator("select").nth(1).focus()
    page.keyboard.press("ArrowDown")
    gallery.settle()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent").strip() == "Check my answer"
    page.keyboard.press("Enter")
    audit.get_by_text(re.compile("^(Yes|No)[:.]")).wait_for()
    assert gallery.errors() == []


def test_a_step_is_played_and_walked_with_keys_in_a_notebook(gallery):
    """Space and the arrows are the animation's; Jupyter would scroll, and go to another cell."""
    page = gallery.page
    walk = page.locator(".gclib-walk.gclib-timeline")
    play, slider, words = (walk.locator(f"[data-part={name}]") for name in ("play", "slider", "words"))
    walk.locator("select").select_option(label="gradient cache")  # another test may have chosen the other
    slider.focus()
    slider.press("Home")
    slider.press("ArrowRight")
    assert words.inner_text().startswith("2 of 12 · first forward: queries, chunk 2.")
    play.focus()
    play.press("Space")
    assert play.inner_text() == "Pause"
    page.wait_for_function("words => words.textContent.startsWith('4 of 12')", arg=words.element_handle())
    play.press("Space")
    assert play.inner_text() == "Play" and page.evaluate("document.activeElement.dataset.part") == "play"
    assert gallery.errors() == []


def photograph(page, theme: str) -> None:
    """A picture of each widget, for people to look at, where GCLIB_GALLERY names a folder."""
    for number, name in enumerate(WIDGETS if "GCLIB_GALLERY" in os.environ else ()):
        cell = page.locator(".jp-Notebook .jp-CodeCell").nth(number)
        cell.screenshot(path=f"{os.environ['GCLIB_GALLERY']}/{name}-{theme}.png")


BASE = ROOT / "gclib/course/widgets/base.py"
LAB = re.compile(r"^class (\w+)\((?:Lab|MomentLab|MeasuredLab|LiveLab)\)", re.MULTILINE)


def test_the_gallery_has_every_widget_of_the_library():
    """A widget that the library gets later has to be put on the page as well."""
    labs = {
        name for path in set((ROOT / "gclib").rglob("*.py")) - {BASE} for name in LAB.findall(path.read_text("utf-8"))
    }
    assert labs == set(WIDGETS) - {"predict", "choose"}


def test_every_widget_of_the_library_brings_the_lines_for_the_keyboard_itself():
    """On the gallery's page one would do for all: the base brings them, and no file makes a box past it."""
    texts = {path: path.read_text("utf-8") for path in (ROOT / "gclib").rglob("*.py")}
    for mark in ("Keyboard()]", "(widgets.VBox)"):
        assert [path for path, text in texts.items() if mark in text] == [BASE]
    assert "box = Lab()" in texts[ROOT / "gclib/course/checks/predictions.py"]
