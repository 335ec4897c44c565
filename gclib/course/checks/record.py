"""The course looked back on: every prediction beside what was found, and a table of what was solved.

Predictions and solved exercises are read from data/cache/. What was found stands in the notebooks: the lines that
`show_back` printed when the reader's copy of a chapter was last run and saved.
"""

import ast
import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gclib.course.chapters import CHAPTERS, NOTEBOOKS
from gclib.support.words import format_table

from . import progress
from .engine import exercises_of
from .predictions import Prediction, recall

_SHOWN = re.compile(r"^(?:You predicted .*|You made no prediction here)\. ([A-Z][\w ]*): (.+)\.$")
_NUMBER = re.compile(r"^-?[\d,]*\.?\d+(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Question:
    """A question that a chapter asks before it measures. found: what it then showed; "" where nothing was saved."""

    chapter: int
    key: str
    found: str = ""


def questions(folder: Path = NOTEBOOKS) -> list[Question]:
    """Every question that the notebooks in `folder` ask with `predict`, in the course's order."""
    asked: list[Question] = []
    for chapter in CHAPTERS:
        path = folder / f"{chapter.file}.ipynb"
        if path.is_file():
            asked += _questions_in(path)
    return asked


def _questions_in(path: Path) -> Iterator[Question]:
    asked: dict[tuple[int, str], None] = {}  # in order
    found: dict[tuple[int, str], str] = {}
    for cell in _code_cells(path):
        calls = _calls(cell)
        asked |= {place: None for name, place in calls if name == "predict"}
        shown = [place for name, place in calls if name == "show_back"]
        lines = [match[2] for line in _printed(cell).splitlines() if (match := _SHOWN.match(line))]
        if len(lines) == len(shown):
            found |= dict(zip(shown, lines, strict=True))
    for chapter, key in asked:
        yield Question(chapter, key, found.get((chapter, key), ""))


def _code_cells(path: Path) -> list[dict]:
    try:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        return [cell for cell in cells if cell["cell_type"] == "code"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # a notebook that is just being saved, or none


def _calls(cell: dict) -> list[tuple[str, tuple[int, str]]]:
    """(predict or show_back, (chapter, key)) of the cell's calls whose first arguments are written out."""
    try:
        tree = ast.parse("".join(cell["source"]))
    except SyntaxError:
        return []
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name not in ("predict", "show_back"):
            continue
        given = [part.value for part in node.args[:2] if isinstance(part, ast.Constant)]
        if len(given) == 2 and type(given[0]) is int and isinstance(given[1], str):
            found.append((node.lineno, name, (given[0], given[1])))
    return [call[1:] for call in sorted(found, key=lambda call: call[0])]


def _printed(cell: dict) -> str:
    streams = [output for output in cell.get("outputs", []) if output.get("name") == "stdout"]
    return "".join("".join(output["text"]) for output in streams)


def error_of(predicted: Prediction, found: str) -> str:
    """How far a prediction was off, in words: a factor for numbers, the same or another for words."""
    if not found:
        return "not shown yet"
    if isinstance(predicted, str):
        return "the same" if predicted.strip() == found.strip() else "another"
    match = _NUMBER.match(found)
    number = float(match[0].replace(",", "")) if match else 0.0
    if number <= 0 or predicted <= 0:
        return "exact" if match and number == predicted else "off"
    factor = predicted / number
    if max(factor, 1 / factor) < 1.05:
        return "as good as exact"
    return f"{factor:.2g} times too high" if factor > 1 else f"{1 / factor:.2g} times too low"


def predictions_page(folder: Path | None = None) -> str:
    """The reader's predictions of all chapters beside what was found, as a table; says so where none is kept.

    A box whose key is not written out (one for each case of a table) stands last of its chapter, and what was found is
    left to the chapter. folder: of the notebooks; None for the current one where chapters lie there, as in Jupyter.
    """
    here = any((Path.cwd() / f"{chapter.file}.ipynb").is_file() for chapter in CHAPTERS)
    asked, rows = questions(folder or (Path.cwd() if here else NOTEBOOKS)), []
    for chapter in CHAPTERS:
        kept = recall(chapter.number)
        found = {question.key: question.found for question in asked if question.chapter == chapter.number}
        for key in [*(key for key in found if key in kept), *(key for key in kept if key not in found)]:
            said = kept[key]
            words = said if isinstance(said, str) else f"{said:,.4g}"
            off = error_of(said, found[key]) if key in found else "see the chapter"
            rows.append([f"{chapter.number:02d} {key}", words, found.get(key) or None, off])
    if not rows:
        return "No prediction is kept, so there is nothing to look back on."
    table = format_table(["chapter, question", "you said", "found", "you were"], rows)
    return f"Predictions that you kept: {len(rows)}.\n\n{table}"


def certificate() -> str:
    """What was solved, chapter by chapter, as a table; exercises of chapters that are there count."""
    record, rows, solved, known = progress.load("exercises"), [], 0, 0
    for chapter in CHAPTERS:
        exercises = _exercises(chapter.number)
        entries = [_entry(record.get(exercise.key)) for exercise in exercises]
        done = sum(bool(entry.get("solved")) for entry in entries)
        tries = sum(entry.get("tries", 0) for entry in entries)
        met = sum(len(entry.get("misconceptions", {})) for entry in entries)
        solved, known = solved + done, known + len(exercises)
        if exercises:
            rows.append([f"{chapter.number:02d} {chapter.title}", f"{done} of {len(exercises)}", tries, met])
    table = format_table(["chapter", "solved", "tries", "misconceptions met"], rows)
    if not solved:
        return f"{table}\n\nNothing is recorded as solved in this copy of the course yet."
    last = "All of them: the course is done." if solved == known else f"{known - solved} are left."
    return f"{table}\n\nSolved: {solved} of {known} exercises. {last}"


def _entry(entry: object) -> dict:
    return entry if isinstance(entry, dict) else {}


def _exercises(number: int) -> list:
    try:
        return exercises_of(importlib.import_module(f"gclib.course.checks.ch{number:02d}"))
    except ModuleNotFoundError:
        return []
