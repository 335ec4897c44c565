"""The course's texts held together: `make lint` calls it. Links inside the project, headings, and spelling.

    python tests/project/texts.py [--link]

--link turns each link to a heading of another notebook into one to the heading's cell: JupyterLab looks for a heading
before a page is drawn, and then shows its top; a cell it finds at the first click.

Prints one line a problem, "file (cell 3): ...", and exits with 1 if there is any. Spelling is codespell's dictionary of
common misspellings; `ALLOWED` are words that it takes for one.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from gclib.support import ROOT

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^(#{1,6}) +(.+?) *#*$", re.MULTILINE)
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
PAGE_LINK = re.compile(r"\]\(((?:\.\./)?\w+\.ipynb)#([^)\s]+)\)")
CELL = "cell-id="
FIRST = re.compile(r"First in \[[^\]]*\]\(([^)\s]+)\)")
ALLOWED = "ans,ative,caf,fo,hist,mis,nd,notin,te,trian,ure,vermillion"


@dataclass(frozen=True)
class Text:
    """One piece of markdown: a file, or a notebook's cell."""

    path: Path
    place: str
    markdown: str
    cell_id: str = ""


def texts() -> Iterator[Text]:
    """Every markdown file and every markdown cell of the project."""
    for path in [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "notebooks").rglob("*"))]:
        if path.suffix == ".md":
            yield Text(path, "", path.read_text("utf-8"))
        elif path.suffix == ".ipynb" and ".ipynb_checkpoints" not in path.parts:
            for number, (kind, source, name) in enumerate(cells(path, path.stat().st_mtime_ns)):
                if kind == "markdown":
                    yield Text(path, f" (cell {number})", source, name)


@cache
def cells(path: Path, changed: int) -> list[tuple[str, str, str]]:
    """Type, source and id of a notebook's cells, read once until it is changed. nbformat takes seconds for that."""
    read = json.loads(path.read_text("utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"]), cell["id"]) for cell in read]


def problems() -> list[str]:
    """All that is wrong, a line each."""
    found = []
    levels: dict[Path, int] = {}
    for text in texts():
        where = f"{text.path.relative_to(ROOT)}{text.place}"
        found += [f"{where}: {problem}" for problem in broken_links(text)]
        for level, title in headings(text.markdown):
            before = levels.get(text.path, 0)
            if level > before + 1:
                found.append(f"{where}: the heading {title!r} is of level {level}, after one of level {before}")
            if level == 1 and before:
                found.append(f"{where}: a second title: {title!r}")
            levels[text.path] = level
    return found + unlinked_terms() + misspelled()


def broken_links(text: Text) -> Iterator[str]:
    """Targets in the project that are not there: a file, or a heading in it."""
    for target in LINK.findall(FENCED.sub("", text.markdown)):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, fragment = unquote(target).partition("#")
        path = (text.path.parent / name).resolve() if name else text.path
        if not path.exists():
            yield f"no file for the link {target}"
        elif fragment.startswith(CELL):
            if fragment.removeprefix(CELL) not in anchors(path).values():
                yield f"no cell for the link {target}"
        elif fragment and path.suffix in (".md", ".ipynb") and fragment.lower() not in anchors(path):
            yield f"no heading for the link {target}"


@cache
def anchors(path: Path) -> dict[str, str]:
    """Names, in small letters, by which a page's headings can be linked on GitHub and in JupyterLab: to their cells."""
    names = {}
    for text in texts():
        if text.path == path:
            for _, title in headings(text.markdown):
                names[title.replace(" ", "-").lower()] = text.cell_id
                names[re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")] = text.cell_id
    return names


def link_to_cells() -> None:
    """Write links to headings of other notebooks as links to the cells of those headings."""
    import nbformat  # which takes seconds to be imported

    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue

        def linked(found: re.Match, folder: Path = path.parent) -> str:
            name, anchor = found[1], unquote(found[2]).lower()
            cell_id = anchors((folder / name).resolve()).get(anchor)
            return f"]({name}#{CELL}{cell_id})" if cell_id else found[0]

        notebook = nbformat.read(path, as_version=4)
        before = [cell.source for cell in notebook.cells]
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = PAGE_LINK.sub(linked, cell.source)
        if [cell.source for cell in notebook.cells] != before:
            nbformat.write(notebook, path)


def headings(markdown: str) -> list[tuple[int, str]]:
    """(level, title) of each heading outside fenced code."""
    return [(len(marks), title) for marks, title in HEADING.findall(FENCED.sub("", markdown))]


def unlinked_terms() -> list[str]:
    """The glossary's words that the chapter which it calls their first does not link to it, or an earlier one does."""
    found, glossary = [], ROOT / "notebooks" / "glossary.ipynb"
    linked: dict[str, set[str]] = {}
    terms = {}
    for text in texts():
        if text.path == glossary and FIRST.search(text.markdown):
            ((_, term),) = headings(text.markdown)
            terms |= {f"{CELL}{text.cell_id}": term, term.replace(" ", "-"): term}
    for text in texts():
        links = [anchor for name, anchor in PAGE_LINK.findall(text.markdown) if name == glossary.name]
        linked.setdefault(text.path.name, set()).update(terms.get(anchor, anchor) for anchor in links)
    for text in texts():
        first = FIRST.search(text.markdown) if text.path == glossary else None
        if first:
            ((_, term),) = headings(text.markdown)
            if term not in linked.get(first[1], set()):
                found.append(f"notebooks/{first[1]}: no link to {term!r}, first here as the glossary says")
            earliest = min((name for name, words in linked.items() if term in words), default=first[1])
            if earliest < first[1]:
                found.append(f"notebooks/{earliest}: a link to {term!r}, which the glossary has first in {first[1]}")
    return found


def misspelled() -> list[str]:
    """What codespell's dictionary finds, in texts and in code."""
    with tempfile.TemporaryDirectory() as folder:
        for text in texts():
            name = "__".join(text.path.relative_to(ROOT).with_suffix("").parts) + ".md"
            with Path(folder, name).open("a", encoding="utf-8") as file:
                file.write(text.markdown + "\n\n")
        command = [sys.executable, "-m", "codespell_lib", "--ignore-words-list", ALLOWED, folder, "gclib", "tests"]
        done = subprocess.run([*command, "--skip", "*.csv,*.png"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode not in (0, 65):  # 65: misspellings were found
        raise RuntimeError(f"codespell failed: {done.stderr}")
    return [line.replace(f"{folder}/", "") for line in done.stdout.splitlines()]


def main(arguments: list[str]) -> int:
    """Print the problems; the exit status."""
    if "--link" in arguments:
        link_to_cells()
        return 0
    found = problems()
    print("\n".join(found) or "Links, headings and spelling are fine.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
