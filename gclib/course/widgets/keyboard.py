"""Widgets that are worked by keyboard, seen and heard, and that stay: what Jupyter leaves out, for the page.

Jupyter takes the arrows, Enter and letters of a menu or a button as its own shortcuts (arrow down goes to the next
cell), unless an element says data-lm-suppress-shortcuts; keys with Ctrl or Cmd, as for saving, stay Jupyter's. The
focus is a pale hair's breadth on menus and fields, and now an outline everywhere. And ipywidgets leaves a screen reader
without a slider's name and value (it is told the place of a choice, not the choice), a toggle button's state and a
prediction's question, and makes a stop for Tab of a choice's readout, where typing does nothing. Enter on a
prediction's choice keeps it.

A saved notebook has the state of its widgets, so that on the next day they are shown as they were, under words that say
so; the same words come when the kernel is started anew.

Texts beside the widgets are mended too. JupyterLab breaks printed lines inside words, and cuts a table or a formula
that is wider than the page: lines break between words, and what is too wide can be scrolled, by keyboard as well.
"""

from pathlib import Path

import anywidget
import traitlets

PAGE = Path(__file__).parent / "page"


class Keyboard(anywidget.AnyWidget):
    """Nothing to see while the kernel runs; a widget that holds it, and all others on its page, are mended."""

    _esm = (PAGE / "keyboard.js").read_text("utf-8")
    _css = (PAGE / "keyboard.css").read_text("utf-8")
    own_id = traitlets.Unicode().tag(sync=True)

    def __init__(self) -> None:
        super().__init__()
        self.own_id = self.model_id
        self.add_class("gclib-page")
