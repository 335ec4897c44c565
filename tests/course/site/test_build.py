"""The whole site as files: links land, nothing comes from elsewhere, mathematics and pictures can be read."""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from bs4 import BeautifulSoup

from gclib.course.chapters import CHAPTERS, NOTEBOOKS, written_chapters
from gclib.course.memory_lab.bundles import write_bundles
from gclib.course.site import build, render

write_few_laws = partial(write_bundles, models=("tiny",), lengths=(32,), precisions=("float32",), devices=("cpu",))
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The site, built once for all tests of this file."""
    folder = tmp_path_factory.mktemp("parent") / "site"
    build.build(folder, write_few_laws)
    return folder


@pytest.fixture(scope="module")
def documents(folder):
    """Path of each page -> the page, parsed."""
    return {path: BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in folder.rglob("*.html")}


@pytest.fixture(scope="module")
def sections(folder):
    """What the search looks through."""
    return json.loads((folder / build.SECTIONS).read_text("utf-8").removeprefix("window.SECTIONS=").rstrip(";\n"))


def test_every_written_chapter_has_its_page_and_its_answers(folder):
    for number in written_chapters():
        name = CHAPTERS[number].file
        assert (folder / f"{name}.html").is_file()
        assert (folder / f"solutions/{name}.html").is_file() == (NOTEBOOKS / f"solutions/{name}.ipynb").is_file()
    assert {"index.html", "lab.html", "glossary.html", "teaching.html", "library.html", "data.html"} <= {
        path.name for path in folder.iterdir()
    }


def test_every_link_inside_the_site_lands(documents, folder, sections):
    names = {path: {part["id"] for part in page.find_all(id=True)} for path, page in documents.items()}
    links = [(path, link["href"]) for path, page in documents.items() for link in page.find_all("a")]
    links += [(folder / "index.html", address) for address, *_ in sections]
    inside = [(path, *urldefrag(target)) for path, target in links if "://" not in target]
    assert len(inside) > 1_000
    lost = []
    for path, file, anchor in inside:
        target = (path.parent / unquote(file)).resolve() if file else path
        if not target.is_file() or (anchor and unquote(anchor) not in names[target]):
            lost.append(f"{path.name}: {file}#{anchor}")
    assert lost == []


def test_links_leave_the_site_for_the_web_alone_and_are_relative(documents):
    for path, page in documents.items():
        for link in page.find_all("a"):
            assert not link["href"].startswith(("/", "file:", "http://localhost")), path
            assert not re.search(r"\.(ipynb|md|py)(#|$)", link["href"]) or "://" in link["href"], link


def test_nothing_is_loaded_from_elsewhere_and_all_that_is_loaded_is_there(documents, folder):
    for path, page in documents.items():
        loaded = [part.get(LOADED[part.name]) for part in page.find_all(list(LOADED))]
        for target in filter(None, loaded):
            assert target.startswith("data:") or (path.parent / target).is_file(), f"{path.name}: {target[:80]}"
    for name in ("page.js", "style.css"):
        assert "://" not in (folder / name).read_text("utf-8")


def test_pictures_have_alt_texts_and_a_names_stand_once_a_page(documents):
    for path, page in documents.items():
        assert [image for image in page.find_all("img") if len(image.get("alt", "")) < 10] == [], path.name
        assert [name for name, count in Counter(p["id"] for p in page.find_all(id=True)).items() if count > 1] == []


def test_mathematics_is_mathml_with_its_source_beside_it(documents):
    count = 0
    for path, page in documents.items():
        for part in page.find_all(["pre", "code", "script", "style", "math"]):
            if part.name == "math":
                count += 1
                assert part["alttext"] and part.get_text(strip=True) and "\\" not in part.get_text(), part
            part.extract()
        assert not re.search(r"\$[^$\d]|\\(frac|sum|mathcal)", page.find("main").get_text()), path.name
    assert count > 500


def test_formulas_keep_their_parts():
    mathml = render._mathml(r"\begin{pmatrix} a & b \\[2pt] c & \log 8 \end{pmatrix}", "block")
    page = BeautifulSoup(mathml, "html.parser")
    assert page.math["display"] == "block" and len(page.find_all("mtr")) == 2 and len(page.find_all("mtd")) == 4
    assert "[2pt]" not in page.get_text() and page.find("mi", string="log").find_next_sibling("mspace")


def test_large_brackets_grow_under_an_exponent_and_labels_below_braces_keep_apart():
    page = BeautifulSoup(render._mathml(r"\Big(x\Big)^{\!\top} \underbrace{a}_{\text{row}}", "block"), "html.parser")
    base = page.msup.find()
    assert base.name == "mrow" and base.get_text() == "(x)" and base.find("mo")["stretchy"] == "true"
    assert "negative" not in str(page) and page.mtext.find_previous_sibling().name == "mspace"
    assert page.mtext.find_next_sibling().name == "mspace"


def test_printed_sentences_wrap_and_printed_tables_keep_their_columns(documents):
    printed = [part for page in documents.values() for part in page.select(".outputs pre.scroll")]
    kinds = {bool(re.search(r"\S {2,}\S", part.get_text())): "words" in part["class"] for part in printed}
    assert kinds == {True: False, False: True} and len(printed) > 100


def test_chapters_lead_on_and_back_and_answers_are_behind_a_fold(documents, folder):
    files = [CHAPTERS[number].file for number in sorted(written_chapters())]
    for before, name, after in zip([None, *files], files, [*files[1:], None], strict=False):
        page = documents[folder / f"{name}.html"]
        turn = [link["href"] for link in page.select(".turn a")]
        assert turn == [f"{other}.html" for other in (before, after) if other]
        fold = page.select_one("details.answers")
        assert not fold.has_attr("open") and fold.a["href"] == f"solutions/{name}.html"
        assert fold.find_previous("h2")["id"] == "Exercises"
        assert page.select_one("nav [aria-current=page]")["href"] == f"{name}.html"


def test_a_cell_whose_code_is_folded_in_the_notebook_is_folded_here_and_shows_what_it_made(documents, folder):
    notebook = json.loads((NOTEBOOKS / "06_live_memory_lab.ipynb").read_text("utf-8"))
    folded = [cell for cell in notebook["cells"] if cell["metadata"].get("jupyter", {}).get("source_hidden")]
    page = documents[folder / "06_live_memory_lab.html"]
    shown = [cell for cell in folded if "where-it-runs" not in cell["metadata"].get("tags", [])]
    assert len(shown) > 3
    for cell in page.find_all(class_="code"):
        is_folded = cell["id"].removeprefix("cell-id=") in {each["id"] for each in shown}
        assert (cell.find("details", recursive=False) is not None) == is_folded
        assert not cell.select("details .outputs")


def test_the_lab_stands_on_its_page_and_in_its_chapter_with_all_that_it_loads(documents, folder):
    with_lab = sorted(path.name for path, page in documents.items() if page.select(".lab"))
    assert with_lab == ["02_the_memory_wall.html", "06_live_memory_lab.html", "lab.html"]
    modules = {path.name: path.read_text("utf-8") for path in (folder / "lab").glob("*.js")}
    assert "export async function mount(" in modules["lab.js"]
    for text in modules.values():
        assert set(re.findall(r'^import .* from "\./([^"]+)"', text, re.MULTILINE)) <= set(modules)
    index = json.loads((folder / "lab" / "bundles" / "index.json").read_text("utf-8"))
    assert all((folder / "lab" / "bundles" / name).is_file() for name in index["files"].values())


def test_search_finds_sections_by_their_own_words(sections):
    places = {address: (heading, text) for address, heading, text in sections}
    heading, text = places["glossary.html#Activations"]
    assert heading == "Glossary: Activations" and "fill most of a plain step's memory" in text
    assert "Try first: a check" not in " ".join(text for _, text in places.values())


def test_a_folder_that_is_no_site_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="folder must be empty, or hold a site"):
        build.build(tmp_path, write_few_laws)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_map_leads_to_the_chapters_that_are_there():
    pages = [page for page in build.list_pages() if page.chapter in (0, 6) and page.kind == "chapter"]
    svg = BeautifulSoup(build.map_svg(pages), "html.parser")
    assert [link["href"] for link in svg.find_all("a")] == ["00_start_here.html", "06_live_memory_lab.html"]
    assert len(svg.find_all("rect")) == len(CHAPTERS)
    assert len(svg.find_all("path")) - 1 == sum(len(chapter.needs) for chapter in CHAPTERS)


def test_a_link_is_relative_to_its_page():
    page = render.Page(NOTEBOOKS / "solutions" / "x.ipynb", "solutions/x.html", "x")
    assert (page.link_to("style.css"), page.link_to("solutions/y.html")) == ("../style.css", "y.html")


def test_building_again_makes_the_folder_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "list_pages", lambda: [build.INDEX])
    build.build(tmp_path, Path.mkdir)
    files = sorted(path.name for path in tmp_path.rglob("*"))
    (tmp_path / "old.html").touch()
    build.build(tmp_path, Path.mkdir)
    assert sorted(path.name for path in tmp_path.rglob("*")) == files
