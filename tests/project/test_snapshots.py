"""What a notebook keeps: figures as small PNGs with their alt texts, and words or a picture where a widget stands."""

import base64
import io

import nbformat
import numpy as np
import pytest
from PIL import Image
from project import execute, snapshots

from gclib.course import plots

ALT = 'A wave from -1 to 1, "smooth" & <blue>.'


@pytest.fixture
def figure():
    figure, axes = plots.new_figure(width=6, height=2)
    axes.plot(np.sin(np.arange(100) / 5))
    axes.imshow(np.random.default_rng(0).random((30, 30)), extent=(0, 99, -1, 1), aspect="auto")
    return figure


def shown(figure, monkeypatch):
    """The output that `plots.show` displays."""
    data = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: data.append(bundle))
    plots.show(figure, ALT)
    return nbformat.v4.new_output("display_data", data=data[0])


def test_a_figure_is_kept_as_a_png_with_its_alt_text_and_width(figure, monkeypatch):
    before = plots.to_png(figure, dpi=150)
    output = shown(figure, monkeypatch)
    assert execute.output_problems(output) == []
    snapshots.keep_figure(output)
    assert output.metadata == {"image/png": {"alt": ALT, "width": 600}}
    assert set(output.data) == {"image/png", "text/plain"} and output.data["text/plain"] == f"Figure: {ALT}"
    assert execute.output_problems(output) == []
    png = base64.b64decode(output.data["image/png"])
    one, other = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int) for data in (before, png))
    assert one.shape == other.shape and np.abs(one - other).mean() < 1
    assert len(png) < len(before)


def test_other_html_is_left_as_it_is():
    image = plots.image_tag(b"x", ALT, 'width="5"')
    for html in ("<b>words</b>", f"before {image}", image + image, ""):
        output = nbformat.v4.new_output("display_data", data={"text/html": html})
        snapshots.keep_figure(output)
        assert output.data == {"text/html": html} and output.metadata == {}


def test_a_small_picture_is_never_made_larger():
    tiny = io.BytesIO()
    Image.new("RGB", (2, 2)).save(tiny, "PNG", optimize=True)
    assert len(snapshots.small_png(tiny.getvalue())) <= len(tiny.getvalue())


def test_a_picture_of_many_bytes_gets_fewer_colours():
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    few = Image.open(io.BytesIO(snapshots._encoded(Image.fromarray(noise))))
    assert len(few.getcolors()) == snapshots.COLORS[-1]


def test_white_around_a_widget_is_cut_but_for_a_margin():
    image = Image.new("RGB", (200, 100), "white")
    image.paste("black", (40, 30, 60, 50))
    assert snapshots._cropped(image, margin=12).size == (44, 44)
    assert snapshots._cropped(Image.new("RGB", (9, 9), "white")).size == (9, 9)


def test_without_a_browser_words_stand_where_a_widget_is(monkeypatch):
    monkeypatch.setattr(snapshots, "find_chromium", lambda: None)
    view = {"version_major": 2, "version_minor": 0, "model_id": "abc"}
    output = nbformat.v4.new_output("display_data", data={snapshots.WIDGET: view, "text/plain": "VBox(...)"})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])])
    with snapshots.Snapshots() as camera:
        camera.keep(notebook, {})
    execute.tidy(notebook)
    assert notebook.cells[0].outputs[0].data == {"text/markdown": execute.WIDGET_NOTE}
