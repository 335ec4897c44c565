"""All chapters have one form: title, box, headings in their order, stubs, and where to go next.

And a chapter forgives: each of its cells may run twice in a row, and the whole of it twice in one kernel.
"""

import ast
import os
import re

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from project.texts import headings

from gclib.course.chapters import CHAPTERS, NOTEBOOKS

BOX = [
    "> **You will be able to** ",
    "> **You need** ",
    "> **Time and memory**, as measured when this page was last built",
]
ENDING = ["Exercises", "Where ", "Your predictions again", "Summary", "Further reading"]
HEADERLESS = re.compile(r"^\|\s*\|.*\n\|[\s:|-]+$", re.MULTILINE)
COMMANDS = re.compile(r"#\s*(noqa|NBVAL|pragma|type: ignore)")


def each_chapter():
    return pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: f"{chapter.number:02d}")


def cells_of(chapter, kind):
    cells = nbformat.read(NOTEBOOKS / f"{chapter.file}.ipynb", as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == kind]


@each_chapter()
def test_a_title_has_its_number_and_the_name_that_the_map_has(chapter):
    titles = [text for cell in cells_of(chapter, "markdown") for level, text in headings(cell) if level == 1]
    assert titles == [f"{chapter.number:02d} · {chapter.title}"]


@each_chapter()
def test_the_box_says_what_for_what_is_needed_and_how_long_it_takes(chapter):
    box = next(cell for cell in cells_of(chapter, "markdown") if "<!-- measured -->" in cell)
    places = [box.find(start) for start in BOX]
    assert places[0] == 0 and sorted(places) == places and all(line.startswith(">") for line in box.splitlines())


@each_chapter()
def test_headings_come_in_the_order_that_all_chapters_share(chapter):
    names = [text for cell in cells_of(chapter, "markdown") for level, text in headings(cell) if level == 2]
    assert chapter.number == 0 or "The question" in names[:2]
    tail = names[names.index("Exercises") :]
    places = [next((n for n, name in enumerate(tail) if name.startswith(start)), -1) for start in ENDING]
    assert places[0] == 0 and sorted(places) == places and places[-1] == len(tail) - 1


@each_chapter()
def test_a_stub_raises_and_its_check_ends_the_cell(chapter):
    stubs = [cell for cell in cells_of(chapter, "code") if "NotImplementedError" in cell]
    check = rf"ch{chapter.number:02d}\.(\w+)\((\w+)\)"
    form = re.compile(rf'def (\w+)\([^)]*\):\n    """.*?"""\n    raise NotImplementedError\n\n\n{check}')
    assert len(stubs) >= 2
    for stub in stubs:
        match = form.fullmatch(stub)
        assert match and len(set(match.groups())) == 1, stub


@each_chapter()
def test_the_summary_leads_to_the_next_chapter_and_the_last_one_to_none(chapter):
    after = "\n".join(cells_of(chapter, "markdown")).split("\n## Summary\n")[1]
    leads = re.findall(r"^(?:Next|Before)\b.*", after, re.MULTILINE)
    following = [other for other in CHAPTERS if other.number == chapter.number + 1]
    starts = [f"Next: [{other.number:02d} {other.title}]({other.file}.ipynb), " for other in following]
    assert len(leads) == len(starts)
    assert all(line.startswith(start) for line, start in zip(leads, starts, strict=True))


@each_chapter()
def test_every_column_of_a_table_has_a_name(chapter):
    assert [table for cell in cells_of(chapter, "markdown") for table in HEADERLESS.findall(cell)] == []


@pytest.mark.parametrize("chapter", CHAPTERS[:6], ids=lambda chapter: f"{chapter.number:02d}")
def test_code_holds_no_commands_to_tools_that_a_learner_does_not_know(chapter):
    assert [cell for cell in cells_of(chapter, "code") if COMMANDS.search(cell)] == []


@each_chapter()
def test_no_cell_adds_to_what_another_made(chapter):
    """Run twice, such a cell would count its rows twice, and nothing would say so."""
    added = []
    for cell in cells_of(chapter, "code"):
        own: set[str] = set()
        for node in ast.parse(cell).body:
            if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and node.target.id not in own:
                added.append(ast.unparse(node))
            own |= {
                name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            }
    assert added == []


@pytest.mark.deep
@pytest.mark.slow
@each_chapter()
def test_each_cell_runs_twice_in_a_row_and_the_chapter_twice_in_one_kernel(chapter, tmp_path):
    notebook = nbformat.read(NOTEBOOKS / f"{chapter.file}.ipynb", as_version=4)
    place = {"metadata": {"path": str(NOTEBOOKS)}}
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place)
    own = {"GCLIB_STRICT": "0", "GCLIB_BARS": "0", "GCLIB_PROGRESS_FOLDER": str(tmp_path)}
    code = [(n, cell) for n, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    broken = []
    with client.setup_kernel(env=os.environ | own):
        twice = [("twice", *pair) for pair in code for _ in range(2)]
        for times, n, cell in [*twice, *(("again", *pair) for pair in code)]:
            try:
                client.execute_cell(cell, n)
            except CellExecutionError as error:
                broken.append(f"{times}, cell {n} ({cell.id}): {error.ename}: {error.evalue}")
    assert broken == []
