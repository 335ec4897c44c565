"""The animation of a step in Chromium: it plays, pauses and is stepped through by keys; its bytes are Python's."""

import json
import shutil

import pytest
import torch
from browser.lab import serving, watched

from gclib import ContrastiveLoss, Encoder, accumulation_step, grad_cache_step, naive_step
from gclib.course.memory_lab.picture import PAGE
from gclib.course.widgets.walk import HERE, describe_moment, page_of, sentence_of, states, title_of
from gclib.memory.ledger import KINDS
from gclib.memory.walk import record_walk
from gclib.support.words import format_bytes

HTML = """<!doctype html><html lang="en"><meta charset="utf-8"><title>A step</title><link rel="icon" href="data:,">
<link rel="stylesheet" href="memory_lab/page/lab.css"><link rel="stylesheet" href="widgets/page/walk.css">
<style>:root {color-scheme: light dark} body {background: Canvas; color: CanvasText; margin: 8px}</style>
<main><h1>A step</h1><div id="walk"></div></main><script type="module">
import { WalkView } from "./widgets/page/walk.js";
const data = await (await fetch("walks.json")).json();
window.moved = [];
window.view = new WalkView(document.getElementById("walk"), data, (...where) => window.moved.push(where));
</script></html>"""
PLAYED = "view.timer === null && view.at === view.walk.moments.length - 1"


@pytest.fixture(scope="module")
def walks():
    torch.manual_seed(0)
    encoder = Encoder.from_config("tiny", vocab_size=50)
    inputs = [{"input_ids": torch.randint(5, 50, (6, length))} for length in (8, 12)]
    steps = {
        "gradient cache": (grad_cache_step, {"chunk_size": 2, "verify": "never"}),
        "naive": (naive_step, {}),
        "accumulation": (accumulation_step, {"chunk_size": 3}),
        "one retained": (grad_cache_step, {"chunk_size": 3, "retain_chunks": 1, "verify": "never"}),
    }
    made = {}
    for name, (step, options) in steps.items():
        encoder.zero_grad()
        made[name] = record_walk(step, [encoder, encoder], inputs, ContrastiveLoss(), **options)
    return made


@pytest.fixture(scope="module")
def address(walks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    for pages in (PAGE, HERE):
        shutil.copytree(pages, folder / pages.relative_to(PAGE.parents[1]))
    data = {"walks": {name: page_of(walk) for name, walk in walks.items()}, "kinds": list(KINDS)}
    (folder / "walks.json").write_text(json.dumps(data))
    (folder / "index.html").write_text(HTML)
    with serving(folder) as where:
        yield where


@pytest.fixture
def opened(address, page):
    """The page, at the first moment."""
    with watched(page, address, "window.view"):
        yield page


def test_every_moment_shows_pythons_bytes_states_and_words(opened, walks):
    for name, walk in walks.items():
        opened.locator("[data-part=menu]").select_option(name)
        for index, moment in enumerate(walk.moments):
            shown = opened.evaluate(
                """at => { view.go(at); return {
                bytes: Object.fromEntries([...document.querySelectorAll("[data-kind]")].map(one => [one.dataset.kind,
                    one.textContent.trim()])),
                nodes: Object.fromEntries([...document.querySelectorAll("[data-node]")].map(one => [one.dataset.node,
                    [one.dataset.state, one.querySelector("text").textContent]])),
                lit: document.querySelectorAll(".gclib-lit").length, words: view.words.textContent,
                label: view.scene.getAttribute("aria-label") }; }""",
                index,
            )
            assert shown["bytes"].pop("all") == format_bytes(sum(moment.kind_bytes.values()))
            hidden = set(KINDS) - set(shown["bytes"])
            assert shown["bytes"] == {kind: format_bytes(moment.kind_bytes[kind]) for kind in shown["bytes"]}
            assert all(other.kind_bytes[kind] == 0 for other in walk.moments for kind in hidden)
            for (kind, row), state in states(walk, index).items():
                if kind in ("graph", "rep", "cache", "part", "text"):
                    assert shown["nodes"][f"{kind} {walk.rows.index(row)}"][0] == state
                if kind == "graph" and row in moment.graph_bytes:
                    label = shown["nodes"][f"graph {walk.rows.index(row)}"][1]
                    assert label == f"graph {format_bytes(moment.graph_bytes[row])}"
            assert (shown["lit"] > 0) == (states(walk, index)["loss", (None, None)] == "remembered")
            assert shown["label"] == describe_moment(walk, index)
            assert shown["words"] == (
                f"{index + 1} of {len(walk.moments)} · {title_of(walk, index)}. {sentence_of(walk, index)}"
            )


def test_accumulations_loss_sees_its_own_chunk_and_the_caches_all(opened, walks):
    for name, lit in (("gradient cache", 9), ("accumulation", 1)):
        opened.locator("[data-part=menu]").select_option(name)
        index = next(n for n, moment in enumerate(walks[name].moments) if moment.phase == "loss")
        opened.evaluate("at => view.go(at)", index)
        assert opened.locator(".gclib-lit").count() == lit
        assert opened.locator(".gclib-cell").count() == (9 if name == "gradient cache" else 4)


def test_keys_step_and_are_told(opened, walks):
    slider, moments = opened.get_by_role("slider", name="Moment"), walks["gradient cache"].moments
    last = len(moments)
    slider.focus()
    slider.press("ArrowRight")
    slider.press("ArrowRight")
    slider.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == f"2 of {last}: {title_of(walks['gradient cache'], 1)}"
    slider.press("End")
    assert opened.evaluate("moved.at(-1)") == ["gradient cache", last]
    assert opened.get_by_role("button", name="Next").is_disabled()
    slider.press("Home")
    assert opened.get_by_role("button", name="Previous").is_disabled()
    opened.get_by_role("button", name="Next").press("Enter")
    words = opened.get_by_role("status")
    assert words.inner_text().startswith(f"2 of {last} · ") and words.get_attribute("aria-live") == "polite"
    opened.get_by_role("button", name="Next").click()
    opened.get_by_role("button", name="Previous").click()
    assert slider.input_value() == "2"
    opened.get_by_role("combobox", name="Step").select_option("naive")
    assert slider.input_value() == "1" and slider.get_attribute("max") == "5"
    assert opened.evaluate("moved.at(-1)") == ["naive", 1]


def test_space_plays_and_pauses_and_nothing_is_told_meanwhile(opened):
    opened.evaluate("window.sped = view.walk.moments.length")
    play = opened.locator("[data-part=play]")
    play.focus()
    play.press("Space")
    assert play.inner_text() == "Pause" and opened.get_by_role("status").get_attribute("aria-live") == "off"
    assert opened.evaluate("view.beat * sped") == pytest.approx(10_000)  # milliseconds, for the whole step
    opened.wait_for_function("view.at >= 2")
    play.press("Space")
    at = opened.evaluate("view.at")
    assert play.inner_text() == "Play" and opened.get_by_role("status").get_attribute("aria-live") == "polite"
    opened.wait_for_timeout(1_000)
    assert opened.evaluate("[view.at, moved]") == [at, [["gradient cache", at + 1]]]
    assert opened.get_by_role("status").inner_text().startswith(f"{at + 1} of")


def test_it_plays_to_the_end_moving_what_python_says_and_then_anew(opened, walks):
    opened.locator("[data-part=menu]").select_option("naive")
    opened.evaluate("""() => { window.flown = [];
        new MutationObserver(() => flown.push([view.at, view.flying.childElementCount])).observe(
            view.flying, {childList: true}); }""")
    opened.get_by_role("button", name="Play").click()
    opened.wait_for_function(PLAYED)
    flown = dict(opened.evaluate("flown"))  # the last of each moment
    edges = [moment["edges"] for moment in page_of(walks["naive"])["moments"]]
    wanted = {at: sum(turn >= 0 for *_, turn in each) for at, each in enumerate(edges)}
    assert {at: count for at, count in flown.items() if count} == {at: count for at, count in wanted.items() if count}
    opened.get_by_role("button", name="Play").click()
    assert opened.evaluate("view.at") == 0 and opened.get_by_role("button", name="Pause").is_visible()
    opened.get_by_role("button", name="Next").click()
    assert opened.evaluate("[view.at, view.timer]") == [1, None]  # who steps does not play


def test_with_reduced_motion_it_steps_and_nothing_moves(opened):
    opened.emulate_media(reduced_motion="reduce")
    opened.evaluate("""() => { window.flown = 0;
        const count = () => { flown += view.flying.childElementCount; };
        new MutationObserver(count).observe(view.flying, {childList: true}); }""")
    opened.get_by_role("button", name="Play").click()
    opened.wait_for_function("view.at >= 3")
    opened.get_by_role("button", name="Next").click()
    assert opened.evaluate("flown") == 0
    moving = "one => parseFloat(getComputedStyle(one).transitionDuration)"
    assert opened.evaluate(f"[...document.querySelectorAll('#walk *')].filter({moving}).length") == 0


LABELS = """() => [...document.querySelectorAll("[data-node] text")].map(text => [text.textContent,
    text.getBBox().width - text.parentElement.querySelector(".gclib-rim").getBBox().width]
).filter(([, over]) => over > 0)"""
TEXTS = """() => [...document.querySelectorAll("#walk svg text")].filter(one => one.textContent).map(one => {
    const [a, b] = [one.getBoundingClientRect(), one.ownerSVGElement.getBoundingClientRect()];
    return [one.textContent, a.left - b.left, b.right - a.right];
}).filter(([, left, right]) => left < -1 || right < -1)"""
SIZES = "[...document.querySelectorAll('#walk, #walk *')].map(one => parseFloat(getComputedStyle(one).fontSize))"


@pytest.mark.parametrize("width", [1400, 700, 350])
def test_nothing_is_cut_no_text_is_small_and_labels_keep_to_their_boxes(opened, walks, width):
    opened.set_viewport_size({"width": width, "height": 900})
    opened.get_by_text("As a table").click()
    opened.wait_for_function("Math.abs(view.wide - view.scene.parentElement.clientWidth) <= 1")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    for name, walk in walks.items():
        opened.locator("[data-part=menu]").select_option(name)
        for index in range(len(walk.moments)):
            opened.evaluate("at => view.go(at)", index)
            assert opened.evaluate(LABELS) == []  # wider than their boxes
            assert opened.evaluate(TEXTS) == []  # cut by the picture's edge
    assert min(opened.evaluate(SIZES)) >= 11


def test_the_table_has_every_moment(opened, walks):
    opened.get_by_text("As a table").click()
    rows = opened.locator(".gclib-scroll tbody tr")
    assert rows.count() == len(walks["gradient cache"].moments)
    assert opened.locator(".gclib-scroll thead th").all_inner_texts()[:2] == ["moment", "remembered"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened, scheme):
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="axe-core-python is not installed")
    opened.emulate_media(color_scheme=scheme)
    opened.get_by_text("As a table").click()
    opened.evaluate("view.go(8)")
    violations = axe.Axe().run(opened)["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in violations] == []
