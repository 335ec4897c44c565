"""The site as a visitor meets it: axe-core's rules, themes, a phone, search; nothing is asked of another host.

`make site` sets GCLIB_SITE to the folder that it wrote: then every page is looked at, else three.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest
from browser.lab import MOST_MS

from gclib.course.memory_lab.bundles import write_bundles
from gclib.course.site import build
from gclib.support import ROOT

FEW = ("index.html", "lab.html", "06_live_memory_lab.html", "library.html")
WRITTEN = ROOT / os.environ["GCLIB_SITE"] if "GCLIB_SITE" in os.environ else None
PAGES = sorted(path.relative_to(WRITTEN).as_posix() for path in WRITTEN.rglob("*.html")) if WRITTEN else FEW
NO_LAB_LOADS = "document.querySelector('.lab > [role=status]') === null"
RUN_AXE = """async () => (await axe.run()).violations.filter(({impact}) => ["serious", "critical"].includes(impact))
    .map(({id, nodes}) => [id, nodes.slice(0, 3).map(({html}) => html.slice(0, 150))])"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder above the site, which stands in course/: as where a server keeps it under a path."""
    parent = tmp_path_factory.mktemp("server")
    if WRITTEN:
        (parent / "course").symlink_to(WRITTEN)
        return parent
    few = [page for page in build.list_pages() if page.address in FEW]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "list_pages", lambda: few)
        laws = {"models": ("mini",), "lengths": (64,), "precisions": ("float32",), "devices": ("cpu",)}
        build.build(parent / "course", partial(write_bundles, **laws))
    return parent


class Quiet(SimpleHTTPRequestHandler):
    """Python's own server of files, without a line for each."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served: `python -m http.server`, on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/course"
    server.shutdown()
    server.server_close()


@contextmanager
def visit(chromium, start: str, **options) -> Iterator:
    """A page whose complaints are collected; at the end there must be none. start: what every address begins with.

    A request still under way when the page is left is aborted by the browser: no fault of the site.
    """
    context = chromium.new_context(**options)
    context.set_default_timeout(MOST_MS)
    page, complaints, failures = context.new_page(), [], []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda r: failures.append(f"{r.failure}: {r.url[:100]}"))
    page.on("request", lambda r: None if r.url.startswith((start, "data:", "blob:")) else complaints.append(r.url))
    yield page
    context.close()
    assert complaints + [failed for failed in failures if not failed.startswith("net::ERR_ABORTED")] == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_no_serious_violation_in_either_theme_and_fits_a_phone(chromium, address, name):
    axe = Path(find_spec("axe_core_python").origin).with_name("axe.min.js").read_text("utf-8")
    with visit(chromium, address, viewport={"width": 1300, "height": 900}) as page:
        page.goto(f"{address}/{name}")
        page.wait_for_function(NO_LAB_LOADS)
        page.evaluate(axe)
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            assert page.evaluate(RUN_AXE) == []
        for width in (390, 650):  # a phone; 1300 pixels at 200 %
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(RUN_AXE) == []  # at 200 %, where more is wider than the page


def test_the_theme_follows_the_system_until_the_button_is_pressed_and_is_kept(chromium, address):
    paper = "getComputedStyle(document.body).backgroundColor"
    with visit(chromium, address, color_scheme="dark") as page:
        page.goto(f"{address}/index.html")
        dark = page.evaluate(paper)
        page.emulate_media(color_scheme="light")
        light = page.evaluate(paper)
        assert light == "rgb(255, 255, 255)" != dark
        page.get_by_role("button", name="Dark").press("Enter")
        assert page.evaluate(paper) == dark
        page.goto(f"{address}/library.html")
        assert page.evaluate(paper) == dark and page.get_by_role("button", name="Light").is_visible()
        page.emulate_media(media="print")
        assert page.evaluate(paper) == light and not page.locator("header").is_visible()


@pytest.mark.parametrize("way", ["served", "file"])
def test_search_leads_to_a_section_from_a_server_and_from_files(chromium, site, address, way):
    start = address if way == "served" else (site / "course").as_uri()
    with visit(chromium, start) as page:
        page.goto(f"{start}/index.html")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the text"
        field = page.get_by_role("searchbox", name="Search the course")
        field.fill("zeppelin")
        page.get_by_role("status").get_by_text("No section has all these words.").wait_for()
        field.press("Escape")
        assert page.locator(".found").is_hidden() and field.input_value() == ""
        field.fill("two batch sizes")
        page.locator(".found a").first.wait_for()
        field.press("Enter")
        page.wait_for_url("**/06_live_memory_lab.html#Two-batch-sizes*")
        heading = page.get_by_role("heading", name="Two batch sizes")
        assert heading.bounding_box()["y"] < page.viewport_size["height"]


@pytest.mark.parametrize("name", ["lab.html", "06_live_memory_lab.html"])
def test_the_lab_answers_without_a_kernel(chromium, address, name):
    with visit(chromium, address) as page:
        page.goto(f"{address}/{name}")
        page.wait_for_function(NO_LAB_LOADS)
        lab = page.locator(".lab")
        assert lab.locator("svg").first.is_visible()
        peak = lab.locator("[data-part=peak]")
        before = peak.inner_text()
        lab.locator("input[name=batch_size]").press("ArrowRight")
        page.wait_for_function("before => document.querySelector('[data-part=peak]').innerText !== before", arg=before)


def test_from_files_the_lab_says_what_to_type(chromium, site):
    start = (site / "course").as_uri()
    with visit(chromium, start) as page:
        page.goto(f"{start}/lab.html")
        page.locator(".lab", has_text="type python -m http.server").wait_for()


def test_a_phone_opens_the_menu_by_a_tap(chromium, address):
    with visit(chromium, address, viewport={"width": 390, "height": 800}) as page:
        page.goto(f"{address}/06_live_memory_lab.html")
        link = page.get_by_role("navigation", name="The course").get_by_role("link", name="The library")
        assert not link.is_visible()
        page.get_by_text("All pages").click()
        link.click()
        page.wait_for_url("**/library.html")
