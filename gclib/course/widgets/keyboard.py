"""Widgets that are worked by keyboard, seen and heard: what Jupyter leaves out, as a few lines for the page.

Jupyter takes the arrows, Enter and letters of a menu or a button as its own shortcuts (arrow down goes to the next
cell), unless an element says data-lm-suppress-shortcuts; keys with Ctrl or Cmd, as for saving, stay Jupyter's. The
focus is a pale hair's breadth on menus and fields, and now an outline everywhere. And ipywidgets leaves a screen reader
without a slider's name and value (it is told the place of a choice, not the choice), a toggle button's state and a
prediction's question, and makes a stop for Tab of a choice's readout, where typing does nothing.

Texts beside the widgets are mended too. JupyterLab breaks printed lines inside words, and cuts a table or a formula
that is wider than the page: lines break between words, and what is too wide can be scrolled, by keyboard as well.
"""

import ipywidgets as widgets

# Thrice the focus: a rule of ipywidgets that takes a text field's outline away is as urgent and names three things too.
STYLE = """
:is(.jupyter-widgets, .widget-slider, .widget-radio) :focus:focus:focus-visible, .jupyter-widgets:focus-visible {
    outline: 2px solid var(--jp-brand-color1, #1976d2) !important; outline-offset: 1px !important;
}
.widget-slider .noUi-handle { border-color: var(--jp-ui-font-color2, #757575); }
.jp-RenderedText pre { word-break: normal; overflow-wrap: anywhere; }
.jp-Notebook .jp-RenderedMarkdown { max-width: 100%; overflow-x: auto; overflow-y: hidden; }
.jp-RenderedMarkdown td code { white-space: nowrap; }
"""
MEND = """
function set(element, name, value) {
    if (element && element.getAttribute(name) !== value) element.setAttribute(name, value);
}
function mendSlider(slider) {
    const [label, readout, handle] = ["widget-label", "widget-readout", "noUi-handle"].map(
        name => slider.querySelector("." + name));
    if (!handle) return;
    set(handle, "aria-label", label.textContent);
    set(handle, "aria-valuetext", readout.textContent);
    set(handle, "aria-disabled", String(slider.querySelector("[disabled]") !== null));
    if (slider.matches(".jupyter-widgets")) {  // of numbers, not of choices: what is typed into the readout counts
        set(readout, "role", "textbox");
        set(readout, "aria-label", label.textContent);
    } else set(readout, "tabindex", "-1");
}
function mend() {
    document.querySelectorAll(".widget-slider").forEach(mendSlider);
    document.querySelectorAll(".jupyter-button > i").forEach(icon => set(icon, "aria-hidden", "true"));
    for (const button of document.querySelectorAll(".widget-toggle-button"))
        set(button, "aria-pressed", String(button.matches(".mod-active")));
    for (const text of document.querySelectorAll(".jp-RenderedMarkdown"))
        if (text.scrollWidth > text.clientWidth) set(text, "tabindex", "0");
    for (const box of document.querySelectorAll(".gclib-prediction")) {
        set(box, "role", "group");
        set(box, "aria-label", box.querySelector(".widget-html-content")?.textContent);
    }
}
"""
SCRIPT = f"""
if (!window.gclibKeyboard) {{
    window.gclibKeyboard = true;
    {MEND}
    let waiting = false;
    function mendSoon() {{
        if (!waiting) requestAnimationFrame(() => {{ waiting = false; mend(); }});
        waiting = true;
    }}
    const changes = {{subtree: true, childList: true, attributeFilter: ["class", "aria-valuenow", "disabled"]}};
    new MutationObserver(mendSoon).observe(document.body, changes);
    mend();
    window.addEventListener("keydown", event => {{
        const own = event.target.closest?.(".jupyter-widgets, .widget-slider, .widget-radio");
        if (own) event.target.toggleAttribute("data-lm-suppress-shortcuts", !event.ctrlKey && !event.metaKey);
    }}, true);
    document.head.append(Object.assign(document.createElement("style"), {{textContent: `{STYLE}`}}));
}}
"""


def keyboard() -> widgets.Output:
    """Nothing to see; a widget that holds it, and all others on its page, can be worked and heard."""
    data = {"application/javascript": SCRIPT, "text/plain": ""}
    return widgets.Output(outputs=({"output_type": "display_data", "data": data, "metadata": {}},))
