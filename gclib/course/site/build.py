"""Write the site: `python -m gclib.course.site.build _site`, which is what `make site` calls.

Pages are the committed notebooks, with their outputs; nothing is run. Every link is relative and nothing is loaded from
another host, so that the folder works from files, under any path of a server, and with the network closed. The live lab
alone asks for a server, as browsers load no module from a file.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path

from bs4 import BeautifulSoup, NavigableString, Tag

from gclib.course.chapters import CHAPTERS, NOTEBOOKS, PROJECT, describe_map
from gclib.course.memory_lab.answers import MODELS
from gclib.course.memory_lab.bundles import write_bundles
from gclib.course.memory_lab.picture import PAGE
from gclib.course.site.render import GUARD, HERE, Page, Renderer
from gclib.support.validation import refuse

SECTIONS = "sections.js"  # what search looks through; also the mark of a folder that we may write anew
OTHERS = (  # (file, address, title), of those that are there
    (NOTEBOOKS / "glossary.ipynb", "glossary.html", "Glossary"),
    (NOTEBOOKS / "TEACHING.md", "teaching.html", "For teachers"),
    (PROJECT / "README.md", "library.html", "The library"),
    (PROJECT / "data" / "README.md", "data.html", "The text pairs"),
)
INDEX = Page(NOTEBOOKS / "index.md", "index.html", "Train with batches far bigger than memory", "text")
LAB = Page(NOTEBOOKS / "lab.md", "lab.html", "The memory lab, live", "text")
MOUNT = '<div class="lab"><p role="status">The lab is loading. It needs JavaScript.</p><div></div></div>'


def build(folder: Path, write_laws: Callable[[Path], object] = write_bundles) -> list[Page]:
    """Write the whole site into `folder`, which is made anew; the pages, in order.

    write_laws: writes into a folder what the live lab reads; by default for every model, length and device that it has.
    Raises ValueError where the folder holds something that is no site of ours.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / SECTIONS).is_file():
        raise refuse("folder", "must be empty, or hold a site that was built before", folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / SECTIONS).touch()
    pages = list_pages()
    pictures = {path: f"images/{path.name}" for path in (NOTEBOOKS / "images").glob("*.png")}
    renderer = Renderer({page.source.resolve(): page.address for page in pages} | pictures)
    copied = pictures | {HERE / "template" / name: name for name in ("style.css", "page.js")}
    copied |= {path: f"lab/{path.name}" for path in PAGE.iterdir() if path.suffix in (".js", ".css")}
    for source, address in copied.items():
        (folder / address).parent.mkdir(exist_ok=True)
        shutil.copy(source, folder / address)
    write_laws(folder / "lab" / "bundles")
    sections = []
    for page in pages:
        document = _document(renderer, page, pages)
        sections += sections_of(document, page)
        (folder / page.address).parent.mkdir(exist_ok=True)
        (folder / page.address).write_text(str(document), "utf-8")
    text = json.dumps(sections, ensure_ascii=False, separators=(",", ":"))
    (folder / SECTIONS).write_text(f"window.SECTIONS={text};\n", "utf-8")
    return pages


def list_pages() -> list[Page]:
    """Every page: the index, the lab, chapters, their answers, and what stands beside them."""
    pages = [INDEX, LAB]
    for chapter in CHAPTERS:
        title, answers = f"{chapter.number:02d} {chapter.title}", f"solutions/{chapter.file}"
        for name, kind, words in ((chapter.file, "chapter", title), (answers, "solution", f"{title}: answers")):
            if (NOTEBOOKS / f"{name}.ipynb").is_file():
                pages.append(Page(NOTEBOOKS / f"{name}.ipynb", f"{name}.html", words, kind, chapter.number))
    return pages + [Page(*other) for other in OTHERS if other[0].is_file()]


def _document(renderer: Renderer, page: Page, pages: Sequence[Page]) -> BeautifulSoup:
    """The page, parsed: with menu and neighbours, headings that can be linked, and the answers in their place."""
    words: dict = {"menu": pages, "guard": GUARD}
    chapters = [other for other in pages if other.kind == "chapter"]
    if page.kind == "chapter":
        place = chapters.index(page)
        words["before"] = chapters[place - 1] if place else None
        words["after"] = chapters[place + 1] if place + 1 < len(chapters) else None
        answers = (other for other in pages if other.kind == "solution" and other.chapter == page.chapter)
        words["solution"] = next(answers, None)
    document = renderer.render(page, _text_of(page, chapters) if page.kind == "text" else None, **words)
    _number_repeated(document)
    for table in document.find_all("table"):
        table.wrap(document.new_tag("div", attrs={"class": "scroll"}))
    exercises, fold = document.find(id="Exercises"), document.find(class_="answers")
    if exercises and fold and (after := exercises.find_next("h2")):
        after.insert_before(fold.extract())
    shows_lab = (cell for cell in document.find_all(class_="code") if re.search(r"\bMemoryLab\(", cell.get_text()))
    if cell := next(shows_lab, None):
        cell.insert_after(BeautifulSoup(f"<p>The same lab, live in this page:</p>{MOUNT}", "html.parser"))
    return document


def _text_of(page: Page, chapters: Sequence[Page]) -> str:
    """The index or the lab's page as markdown, from its template."""
    rows = [f"| [{c.title}]({c.source.name}) | {CHAPTERS[c.chapter].able_to} | {_needs(c)} |" for c in chapters]
    table = "\n".join(["| chapter | afterwards you can | builds on |", "|---|---|---|", *rows])
    text = (HERE / "template" / page.source.name).read_text("utf-8").replace("<!-- map -->", map_svg(chapters))
    return text.replace("<!-- chapters -->", table).replace("<!-- lab -->", MOUNT)


def _needs(page: Page) -> str:
    return ", ".join(f"{number:02d}" for number in CHAPTERS[page.chapter].needs)


def map_svg(pages: Sequence[Page]) -> str:
    """The map of the course as an SVG, a link in each chapter's box; those without a page are dashed."""
    written = {page.chapter: page for page in pages}
    wide, high = 300, 90  # pixels from box to box
    middles = [(wide * (c.place[0] + 0.5), high * (c.place[1] + 0.5)) for c in CHAPTERS]
    parts = []
    for chapter, (x, y) in zip(CHAPTERS, middles, strict=True):
        for x0, y0 in (middles[number] for number in chapter.needs):
            parts.append(f'<path d="M{x0} {y0 + 29}L{x} {y - 31}" marker-end="url(#head)"/>')
        box = f'<rect x="{x - 138}" y="{y - 29}" width="276" height="58" rx="6"/><text x="{x}" y="{y - 5}">'
        box += f"{chapter.number:02d} {escape(chapter.title)}</text>"
        box += f'<text class="able" x="{x}" y="{y + 15}">{escape(chapter.able_to)}</text>'
        page = written.get(chapter.number)
        parts.append(f'<a href="{page.address}">{box}</a>' if page else box)
    height = high * (1 + max(chapter.place[1] for chapter in CHAPTERS))
    head = '<marker id="head" orient="auto" markerWidth="7" markerHeight="8" refX="5" refY="4"><path d="M0 0L6 4L0 8"/>'
    title = f"<title>{escape(describe_map(written))}</title>"
    return (
        f'<svg class="map" viewBox="0 0 900 {height}" role="group">{title}{head}</marker></defs>{"".join(parts)}</svg>'
    )


def _number_repeated(document: BeautifulSoup) -> None:
    """A heading's name is unique on its page: the second of a name gets a number."""
    names: dict[str, int] = {}
    for heading in document.find_all(id=True):
        names[heading["id"]] = count = names.get(heading["id"], 0) + 1
        if count > 1:
            heading["id"] += f"-{count}"


def sections_of(document: BeautifulSoup, page: Page) -> list[tuple[str, str, str]]:
    """(address, heading, text) of each part of the page that a heading opens; formulas and answers' folds left out."""
    parts: list[tuple[str, str, list[str]]] = [(page.address, page.title, [])]
    for node in _readable(document.find("main")):
        if isinstance(node, Tag):
            heading = page.title if node.name == "h1" else f"{page.title}: {node.get_text()}"
            parts.append((f"{page.address}#{node['id']}", heading, []))
        else:
            parts[-1][2].append(node)
    return [(address, heading, " ".join("".join(words).split())) for address, heading, words in parts]


def _readable(part: Tag) -> Iterator[Tag | NavigableString]:
    """The headings below `part`, and the text that stands in none, in order."""
    for node in part.children:
        if isinstance(node, Tag):
            if node.name in ("h1", "h2", "h3"):
                yield node
            elif node.name not in ("math", "nav", "svg", "details"):
                yield from _readable(node)
        elif type(node) is NavigableString:
            yield node


def main(arguments: list[str] | None = None) -> int:
    """Build the site into the folder named; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gclib.course.site.build", description="Write the course's site.")
    parser.add_argument("folder", type=Path)
    words = "models of the live lab (default: all; reading off their laws takes minutes a model)"
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help=words, metavar="MODEL")
    parser.add_argument("--processes", type=int, default=2, help="that read laws at once (default: 2)")
    chosen = parser.parse_args(arguments)
    folder = chosen.folder
    try:
        pages = build(folder, partial(write_bundles, models=chosen.models, processes=chosen.processes, progress=True))
    except ValueError as error:
        parser.error(str(error))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{len(pages)} pages, {size / 2**20:.1f} MiB: open {folder}/index.html, or python -m http.server -d {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
