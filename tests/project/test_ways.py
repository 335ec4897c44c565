"""Chapter 00 leads everywhere: each public question to a heading that answers it, each way through without a gap."""

import re
from urllib.parse import unquote

import nbformat
import pytest
from project.texts import CELL, PAGE_LINK, anchors, headings

from gclib.course.chapters import CHAPTERS, NOTEBOOKS

# Where each of the questions that the course answers was asked: the last parts of its address.
ASKED = [
    "GradCache/issues/7",
    "GradCache/issues/38",
    "GC-DPR/issues/12",
    "GradCache/issues/15",
    "sentence-transformers/issues/2916",
    "sentence-transformers/issues/2750",
    "GradCache/issues/30",
    "sentence-transformers/issues/3420",
    "GradCache/issues/25",
    "abs/2410.17243",
    "sentence-transformers/issues/3173",
    "GradCache/issues/37",
    "sentence-transformers/issues/3023",
    "sentence-transformers/issues/3531",
    "colpali/issues/416",
    "sentence-transformers/issues/3242",
    "FlagEmbedding/issues/1400",
    "FlagEmbedding/issues/1240",
    "ms-swift/issues/6969",
    "Qwen3-Embedding/issues/129",
    "ms-swift/issues/8109",
    "sentence-transformers/issues/3743",
    "open_clip/issues/957",
    "LIFT/issues/4",
    "ms-swift/issues/5958",
]
START = nbformat.read(NOTEBOOKS / "00_start_here.ipynb", as_version=4)


def table_rows(markdown):
    """The rows of the only table of a text, without its heading."""
    return [line for line in markdown.splitlines() if line.startswith("| ")][1:]


INDEX = [row for row in table_rows(next(c.source for c in START.cells if c.id == "00-questions")) if "| **" not in row]


@pytest.mark.parametrize("asked", ASKED)
def test_every_public_question_has_its_row_in_the_index(asked):
    assert sum(f"/{asked})" in row for row in INDEX) == 1


def test_there_are_as_many_questions_as_the_index_says():
    text = next(c.source for c in START.cells if c.id == "00-questions")
    assert int(re.search(r"(\d+) of them", text)[1]) == len(INDEX) >= len(ASKED) == 25


@pytest.mark.parametrize("row", INDEX, ids=lambda row: row[2:42])
def test_every_question_leads_to_a_heading_at_the_top_of_a_cell(row):
    links = PAGE_LINK.findall(row)
    assert links
    for name, anchor in links:
        anchor = unquote(anchor)
        here = anchor.removeprefix(CELL) if anchor.startswith(CELL) else anchors(NOTEBOOKS / name)[anchor.lower()]
        (cell,) = [c for c in nbformat.read(NOTEBOOKS / name, as_version=4).cells if c.id == here]
        assert headings(cell.source.splitlines()[0]), f"{name}, {here}: the answer stands below other text"


def paths_through():
    """(where, the chapters that a row of a table of ways names) for the tables of chapter 00 and of the teachers."""
    tables = {"00": next(c.source for c in START.cells if c.id == "00-paths")}
    teaching = (NOTEBOOKS / "TEACHING.md").read_text("utf-8")
    tables["TEACHING"] = teaching.split("## Three plans")[1].split("\n## ")[0]
    before: set[int] = set()
    for where, text in tables.items():
        for row in table_rows(text):
            reading = row.split("|")[2].split("show the lab")[0]
            chapters = {int(number) for number in re.findall(r"\[(\d\d)\]", reading)} | {0}
            before = chapters | (before if "those, and" in row else set())
            if not re.search(r"\| all\b", row):
                yield pytest.param(before, id=f"{where}: {row.split('|')[1].strip()}")


@pytest.mark.parametrize("chapters", list(paths_through()))
def test_a_way_through_has_what_its_chapters_build_on(chapters):
    assert len(chapters) > 2
    missing = {number: set(CHAPTERS[number].needs) - chapters for number in chapters}
    assert {number: needs for number, needs in missing.items() if needs} == {}
