"""The text checks notice what they are there for: dead links, lost headings, misspelt words."""

from pathlib import Path

import nbformat
import pytest
from project import texts
from project.texts import Text, broken_links, headings


def page(markdown, path="README.md", cell_id=""):
    return Text(texts.ROOT / path, "", markdown, cell_id)


@pytest.mark.parametrize(
    ("markdown", "broken"),
    [
        ("[a](Makefile) and [b](https://example.org/x#y) and [c](#start)", 0),
        ("[a](no_such_file.md)", 1),
        ("[a](#no-such-heading)", 1),
        ("[a](notebooks/00_start_here.ipynb#The-map)", 0),
        ("[a](notebooks/00_start_here.ipynb#Nowhere)", 1),
        ("[a](notebooks/glossary.ipynb#cell-id=glossary-14)", 0),
        ("[a](notebooks/glossary.ipynb#cell-id=nowhere)", 1),
        ("```\n[a](no_such_file.md)\n```", 0),
    ],
)
def test_a_link_is_broken_where_its_file_or_heading_is_missing(markdown, broken):
    assert len(list(broken_links(page(markdown)))) == broken


def test_headings_are_read_outside_fenced_code():
    assert headings("# A\n\n```\n# no\n```\n\n### C ###") == [(1, "A"), (3, "C")]


def test_a_skipped_level_and_a_second_title_are_told(monkeypatch):
    monkeypatch.setattr(texts, "texts", lambda: [page("# A\n\n### B"), page("# C")])
    monkeypatch.setattr(texts, "misspelled", list)
    monkeypatch.setattr(texts, "unlinked_terms", list)
    found = texts.problems()
    assert len(found) == 2 and "after one of level 1" in found[0] and "a second title" in found[1]


def test_a_term_is_told_that_its_first_chapter_does_not_link(monkeypatch):
    term = page("## Tile size\n\nA side. First in [08 Near](08_near.ipynb).", "notebooks/glossary.ipynb", "g-1")
    by_cell = page("Cut into [tiles](glossary.ipynb#cell-id=g-1).", "notebooks/08_near.ipynb")
    chapter = page("Cut into [tiles](glossary.ipynb#Tile-size).", "notebooks/08_near.ipynb")
    monkeypatch.setattr(texts, "texts", lambda: [term, chapter])
    assert texts.unlinked_terms() == []
    monkeypatch.setattr(texts, "texts", lambda: [term, by_cell])
    assert texts.unlinked_terms() == []
    monkeypatch.setattr(texts, "texts", lambda: [term, page("Cut into tiles.", "notebooks/08_near.ipynb")])
    (found,) = texts.unlinked_terms()
    assert found.startswith("notebooks/08_near.ipynb") and "Tile size" in found
    earlier = page("Cut into [tiles](glossary.ipynb#cell-id=g-1).", "notebooks/02_wall.ipynb")
    monkeypatch.setattr(texts, "texts", lambda: [term, by_cell, earlier])
    (found,) = texts.unlinked_terms()
    assert found.startswith("notebooks/02_wall.ipynb") and "08_near" in found


def test_a_misspelt_word_is_found_with_its_file(monkeypatch):
    word = "rec" + "ieve"  # put together here, so that this file itself is spelt right
    monkeypatch.setattr(texts, "texts", lambda: [page(f"They {word} it.", "data/README.md")])
    (found,) = [line for line in texts.misspelled() if "data__README" in line]
    assert "receive" in found


def test_every_page_of_the_project_is_looked_at():
    seen = {text.path for text in texts.texts()}
    assert {Path(texts.ROOT, "README.md"), Path(texts.ROOT, "data/README.md")} < seen
    assert len(seen) > 15


def test_links_to_headings_of_other_notebooks_become_links_to_their_cells(monkeypatch, tmp_path):
    write = nbformat.v4.new_markdown_cell
    before = "[one](b.ipynb#The-end), [own](#Here), [none](b.ipynb#Nowhere), [file](b.ipynb)"
    pages = {
        "a": [write(f"{before}\n\n# Here", id="a0")],
        "b": [write("# Start", id="b0"), write("## The end", id="b1")],
    }
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data").mkdir()
    for name in ("README.md", "data/README.md"):
        (tmp_path / name).touch()
    for name, cells in pages.items():
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(texts, "ROOT", tmp_path)
    texts.link_to_cells()
    (cell,) = nbformat.read(tmp_path / "notebooks" / "a.ipynb", as_version=4).cells
    assert cell.source.startswith(before.replace("#The-end", "#cell-id=b1"))
