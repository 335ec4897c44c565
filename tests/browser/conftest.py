"""A JupyterLab for the module, a page for the test; skipped in words where there is no browser."""

import pytest
from browser.lab import CHROMIUM_FLAGS, find_chromium, fresh_page, jupyter


@pytest.fixture(scope="module")
def chromium():
    """A running Chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (`make env` does it)")
    path = find_chromium()
    if path is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab_folder(tmp_path_factory):
    """Where JupyterLab finds its copy of the notebooks, in notebooks/, and writes what it writes."""
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def lab(chromium, lab_folder):
    """The address of a JupyterLab over a copy of the notebooks."""
    with jupyter(lab_folder) as address:
        yield address


@pytest.fixture
def page(chromium):
    """A fresh page, 1400 x 1000 pixels."""
    with fresh_page(chromium) as page:
        yield page
