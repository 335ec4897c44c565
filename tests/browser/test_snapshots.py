"""A widget leaves a picture of itself in the notebook: of its state at the end, with all its words as alt text."""

import base64
import io

import nbformat
import pytest
from PIL import Image
from project import execute, snapshots

from gclib.support import ROOT

CELLS = (
    "from IPython.display import display\nfrom gclib.course import notebook\n"
    "from gclib.course.memory_lab.widget import MemoryLab",
    "box = notebook.predict(0, 'try', 'How many?', unit='MiB', low=0)\ndisplay(box, box)",
    "lab = MemoryLab(model='tiny', length=16, batch_size=8, chunk_size=4)\nlab",
    "box.answer.value = '77'",
)


@pytest.fixture(scope="module")
def kept(chromium, tmp_path_factory):
    """A notebook with three widgets, run and kept."""
    path = tmp_path_factory.mktemp("kept") / "widgets.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in CELLS]), path)
    with pytest.MonkeyPatch.context() as patch, snapshots.Snapshots() as camera:
        patch.setenv("PYTHONPATH", str(ROOT))
        execute.execute(path, camera)
    return nbformat.read(path, as_version=4)


def test_every_widget_is_a_small_picture_that_says_what_it_shows_at_the_end(kept):
    outputs = [output for cell in kept.cells for output in cell.outputs]
    assert len(outputs) == 3 and len(kept.cells) == len(CELLS) and "widgets" not in kept.metadata
    for output, words in zip(outputs, ("How many?; MiB; 77", "How many?; MiB; 77", "Peak 5.57 MiB"), strict=True):
        assert set(output.data) == {"image/png", "text/plain"}
        about = output.metadata["image/png"]
        assert words in about["alt"] and words in output.data["text/plain"]
        png = base64.b64decode(output.data["image/png"])
        assert len(png) < 70_000
        image = Image.open(io.BytesIO(png)).convert("RGB")
        assert image.width == pytest.approx(about["width"] * snapshots.SCALE, abs=1)
        assert image.getpixel((0, 0)) == (255, 255, 255)  # the light theme
        colors = [(red, green, blue) for _, (red, green, blue) in image.getcolors()]
        assert not any(red > 180 and green < 100 and blue < 100 for red, green, blue in colors)  # no broken link
