r"""A notebook or a markdown file as one page of the site.

By nbconvert, which JupyterLab brings along anyway: it reads the committed notebooks as they are, no second tool chain
(node) has to be kept, and its exporter takes a template of ours. Its own templates load MathJax and more from other
hosts; here mathematics becomes MathML when the site is built (latex2mathml), which browsers draw and screen readers
read without a script or a font of ours.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from posixpath import relpath
from typing import Any
from urllib.parse import unquote

from bs4 import BeautifulSoup
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

GUARD = "where-it-runs"  # the tag of a chapter's first cell, which says what to type where gclib is missing
# Code that has no colour in style.css: its tags are half of a page.
PLAIN = re.compile(r'<span class="(?!(?:k|kn|kc|ow|nf|nc|nb|nd|bp|s1|s2|sd|sa|si|se|mi|mf|c1)")\w+">([^<]*)</span>')
UNDER = re.compile(r"(&#x23DF;</mo></munder><mrow>)(<mtext>[^<]*</mtext>)")  # what stands below a brace
COLUMNS = re.compile(r"\S {2,}\S")  # a printed table; other text may be wrapped
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Page:
    """One page. source: the file it is made from; address: its place below the site's folder; kind: for the menu."""

    source: Path
    address: str
    title: str
    kind: str = "page"  # or "chapter", "solution"
    chapter: int | None = None

    def link_to(self, address: str) -> str:
        """The relative link from this page to a file of the site, so that the site works from any folder."""
        return relpath(address, str(Path(self.address).parent))


class _Markdown(IPythonRenderer):
    """Markdown with MathML, JupyterLab's anchors, and links that lead to the site's own pages."""

    def __init__(self, page: Page, addresses: Mapping[Path, str]) -> None:
        super().__init__(escape=False)
        self._page, self._addresses = page, addresses

    def heading(self, text: str, level: int, **_: Any) -> str:
        words = BeautifulSoup(text, "html.parser").get_text()
        return f'<h{level} id="{escape(words.replace(" ", "-"))}">{text}</h{level}>\n'

    def block_math(self, body: str) -> str:
        return f'<div class="scroll">{_mathml(body, "block")}</div>'

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if "://" in url or url.startswith(("#", "mailto:")):
            return super().link(text, url, title)
        file, _, anchor = url.partition("#")
        address = self._addresses.get((self._page.source.parent / unquote(file)).resolve())
        if address is None:  # a file of the project that's no page: its name stays, as words
            return text
        return super().link(text, self._page.link_to(address) + (f"#{anchor}" if anchor else ""), title)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        source = (self._page.source.parent / url).resolve()
        return super().image(text, self._page.link_to(self._addresses.get(source, url)), title)


class _Exporter(HTMLExporter):
    """nbconvert's exporter with our template and our markdown. addresses: source file -> its place on the site."""

    def __init__(self, addresses: Mapping[Path, str]) -> None:
        super().__init__(template_name="template", extra_template_basedirs=[str(HERE)])
        self.addresses = addresses

    def default_filters(self) -> Iterator[tuple[str, Any]]:
        yield from super().default_filters()
        yield "coloured", lambda html: PLAIN.sub(r"\1", html)
        yield "printed", lambda text: "scroll" if COLUMNS.search(text) else "scroll words"

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        renderer = _Markdown(context["resources"]["page"], self.addresses)
        return MarkdownWithMath(renderer=renderer).render(source)


class Renderer:
    """Makes pages: `render(page, **words)`. addresses: source file -> its place on the site, pictures too."""

    def __init__(self, addresses: Mapping[Path, str]) -> None:
        self._exporter = _Exporter(addresses)

    def render(self, page: Page, text: str | None = None, **words: Any) -> BeautifulSoup:
        """The page as a parsed document, from its source or from `text`. words: what the template is told besides."""
        text = page.source.read_text("utf-8") if text is None else text
        notebook = text if page.source.suffix == ".ipynb" else _as_notebook(text)
        html, _ = self._exporter.from_file(io.StringIO(notebook), resources={"page": page, **words})
        return BeautifulSoup(html, "html.parser")


def _as_notebook(markdown: str) -> str:
    """A markdown text as the JSON of a notebook with one cell."""
    cell = {"cell_type": "markdown", "id": "text", "metadata": {}, "source": markdown}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]})


def _mathml(tex: str, display: str) -> str:
    """LaTeX as MathML; the source stands in `alttext` for a reader whose program knows no MathML."""
    tex = re.sub(r"\s+", " ", tex).strip()
    spaced = re.sub(r"\\(log|exp)\s*(?=[A-Za-z0-9]|\\(?:t?frac|sum|ell))", r"\\\1\\,", tex)
    known = re.sub(r"(\\\\)\[\w+\]", r"\1", spaced).replace(r"\!", "")  # wider rows, \\[2pt], and \! are not known
    known = re.sub(r"\\Big\((.*?)\\Big\)\^", r"{\\left(\1\\right)}^", known)  # else the second does not grow
    mathml = convert(known, display=display)
    mathml = UNDER.sub(r'\1<mspace width="0.4em"/>\2<mspace width="0.4em"/>', mathml)  # two labels never touch
    return mathml.replace("<math ", f'<math alttext="{escape(tex)}" ', 1)
