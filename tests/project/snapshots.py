"""What a notebook keeps of its pictures and widgets: PNGs with alt texts, which every viewer shows.

A figure is displayed as an HTML image, as JupyterLab passes no other alt text on; kept, it is `image/png` with the alt
text in the output's metadata, in at most 256 colours. A widget is kept as a picture of itself: when the last cell has
run, the kernel says the state of all widgets, and a JupyterLab in Chromium shows them from that. Without a browser
words stand in a widget's place.
"""

import base64
import io
import json
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from html import unescape
from pathlib import Path

import nbformat
from nbformat.sign import NotebookNotary
from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from browser.lab import CHROMIUM_FLAGS, NotebookPage, find_chromium, jupyter  # noqa: E402

WIDGET = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
FIGURE = re.compile(r'<img alt="([^"]*)" width="(\d+)"[^>]* src="data:image/png;base64,([A-Za-z0-9+/=]+)">')
COLORS = (256, 128, 64)  # as few as it takes for a picture of MOST_BYTES, if any does
MOST_BYTES = 60_000
SCALE = 1.5  # pixels of a picture for each of the page
LINKED = ".jupyter-widgets-disconnected::before { display: none }"  # no sign of a broken link: a kernel was there
MOST_ALT = 900  # characters of what a widget says
# Run in the kernel at the end: what was started ends, what waits for a prediction opens, and the state is written down.
WRITE_STATE = """
def _write_state(path):
    import json
    from ipywidgets import Widget
    for widget in list(Widget.get_manager_state.__globals__["_instances"].values()):
        for end in ("open_now", "wait"):
            getattr(widget, end, lambda: None)()
    with open(path, "w") as file:
        json.dump(Widget.get_manager_state(), file)
"""
ALL_SHOWN = """count => document.querySelectorAll(".jp-OutputArea-output .jupyter-widgets").length >= count
    && !document.querySelector(".gclib-timeline[aria-busy]") && document.fonts.status === "loaded"
    && ![...document.querySelectorAll(".jp-OutputArea-output")].some(one => one.textContent === "Loading widget...")
    && [...document.images].every(image => image.complete)"""
# Words and alt texts in the order of the page, what is hidden or said twice left out.
READ_ALOUD = """output => {
    const parts = [];
    const read = node => {
        if (node.nodeType === Node.TEXT_NODE) parts.push(node.textContent);
        if (node.nodeType !== Node.ELEMENT_NODE || !node.checkVisibility()) return;
        if (node.matches("img, svg[aria-label]")) parts.push(node.alt ?? node.getAttribute("aria-label"));
        else if (node.matches("select")) parts.push(node.selectedOptions[0]?.textContent);
        else if (node.matches("input[type=text], textarea")) parts.push(node.value);
        else if (!node.matches("svg, style, script, table, details, .gclib-page")) node.childNodes.forEach(read);
    };
    read(output);
    return [...new Set(parts.map(part => (part ?? "").replace(/\\s+/g, " ").trim()))].filter(Boolean).join("; ");
}"""


def keep_figure(output: nbformat.NotebookNode) -> None:
    """Turn an output that is one HTML image into `image/png`, its alt text and width into metadata."""
    image = FIGURE.fullmatch(output.get("data", {}).get("text/html", ""))
    if image:
        png = small_png(base64.b64decode(image[3]))
        put_picture(output, png, unescape(image[1]), int(image[2]), output.data.get("text/plain", ""))


def put_picture(output: nbformat.NotebookNode, png: bytes, alt: str, width: int, plain: str) -> None:
    """Make `png`, `width` pixels wide on the page, the output's picture, and `plain` its words."""
    data = {"image/png": base64.b64encode(png).decode("ascii"), "text/plain": plain}
    output["data"] = nbformat.from_dict(data)
    output["metadata"] = nbformat.from_dict({"image/png": {"alt": alt, "width": width}})


def small_png(png: bytes) -> bytes:
    """The same picture in at most 256 colours, where that takes fewer bytes."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return min(png, _encoded(image), key=len)


def _encoded(image: Image.Image) -> bytes:
    for colors in COLORS:
        buffer = io.BytesIO()
        few = image.quantize(colors, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= MOST_BYTES:
            break
    return buffer.getvalue()


def widget_outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The outputs that are widgets, in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in outputs if WIDGET in output.get("data", {})]


class Snapshots:
    """Takes pictures of widgets, `keep(notebook, state)`; the JupyterLab for it starts with the first one."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._folder: Path | None = None
        self._address = ""

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def keep(self, notebook: nbformat.NotebookNode, state: dict) -> None:
        """Turn each widget of the notebook into a picture of it. state: of all widgets, as ipywidgets embeds it.

        Nothing is done where there is no browser, or no widget.
        """
        outputs = widget_outputs(notebook)
        if not outputs or find_chromium() is None:
            return
        self._start()
        name = self._write([output.data[WIDGET] for output in outputs], state)
        with ThreadPoolExecutor(1) as thread:  # of its own: playwright refuses one in which it runs already
            pictures = thread.submit(self._photograph, name, len(outputs)).result()
        for output, (png, width, alt) in zip(outputs, pictures, strict=True):
            put_picture(output, png, f"A widget, as a picture: {alt}", width, f"Widget: {alt}")

    def _start(self) -> None:
        if self._folder is None:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            self._address = self._stack.enter_context(jupyter(self._folder))

    def _write(self, views: list[dict], state: dict) -> str:
        """A notebook that shows these views from the state, trusted; its name."""
        cells = [nbformat.v4.new_code_cell(outputs=[_view_output(view)]) for view in views]
        notebook = nbformat.v4.new_notebook(cells=cells)
        notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
        notebook.metadata["widgets"] = {STATE: state}
        notebook = nbformat.from_dict(json.loads(json.dumps(notebook)))
        nbformat.write(notebook, self._folder / "notebooks" / "snapshots.ipynb")
        notary = NotebookNotary(data_dir=str(self._folder / "data"))
        notary.sign(nbformat.read(self._folder / "notebooks" / "snapshots.ipynb", as_version=4))
        notary.store.close()
        return "snapshots.ipynb"

    def _photograph(self, name: str, count: int) -> list[tuple[bytes, int, str]]:
        """(PNG, width on the page, what it shows in words) of each output of the notebook in the page."""
        from playwright.sync_api import sync_playwright

        with sync_playwright() as engine:
            browser = engine.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 1000}, device_scale_factor=SCALE)
            NotebookPage(page, self._address, name, self._folder / "notebooks")
            page.add_style_tag(content=LINKED)
            page.wait_for_function(ALL_SHOWN, arg=count)
            pictures = []
            for output in page.locator(".jp-OutputArea-output").filter(has=page.locator(".jupyter-widgets")).all():
                alt = output.evaluate(READ_ALOUD)
                image = _cropped(Image.open(io.BytesIO(output.screenshot(animations="disabled"))).convert("RGB"))
                short = alt if len(alt) <= MOST_ALT else f"{alt[:MOST_ALT].rsplit(' ', 1)[0]} …"
                pictures.append((_encoded(image), round(image.width / SCALE), short))
            browser.close()
        return pictures


def _view_output(view: dict) -> nbformat.NotebookNode:
    return nbformat.v4.new_output("display_data", data={WIDGET: view, "text/plain": ""})


def _cropped(image: Image.Image, margin: int = 12) -> Image.Image:
    """The picture without the white that surrounds what is in it, but for a margin."""
    box = ImageChops.difference(image, Image.new("RGB", image.size, image.getpixel((0, 0)))).getbbox()
    if box is None:
        return image
    left, top, right, bottom = box
    corner = min(image.width, right + margin), min(image.height, bottom + margin)
    return image.crop((max(0, left - margin), max(0, top - margin), *corner))
