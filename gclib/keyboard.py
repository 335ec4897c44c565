"""Widgets that are worked by keyboard, and heard: what Jupyter leaves out, as a few lines for the page.

Jupyter takes the arrows, Enter and letters of a menu or a button as its own shortcuts (arrow down goes to the next
cell), unless an element says data-lm-suppress-shortcuts. And ipywidgets ties a slider's label to nothing, so a screen
reader has no name for it. Both are put right as soon as a widget gets the focus.
"""

import ipywidgets as widgets

SCRIPT = """
if (!window.gclibKeyboard) {
    window.gclibKeyboard = true;
    document.addEventListener("focusin", ({target}) => {
        if (target.closest(".jupyter-widgets")) target.setAttribute("data-lm-suppress-shortcuts", "true");
        const label = target.closest(".widget-slider")?.querySelector(".widget-label");
        if (label) target.setAttribute("aria-label", label.textContent);
    }, true);
}
"""


def keyboard() -> widgets.Output:
    """Nothing to see; a widget that holds it, and all others on its page, can be worked and heard."""
    data = {"application/javascript": SCRIPT, "text/plain": ""}
    return widgets.Output(outputs=({"output_type": "display_data", "data": data, "metadata": {}},))
