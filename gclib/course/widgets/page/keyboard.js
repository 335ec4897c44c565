// What Jupyter leaves out, once for a page: names, values and keys; the state of widgets in a saved notebook; and words
// where no program answers behind a widget any more.
const STATE = "application/vnd.jupyter.widget-state+json";
const WORDS = "A picture of the widget, as it was: run the notebook to use it.";

function set(element, name, value) {
  if (element && element.getAttribute(name) !== value) element.setAttribute(name, value);
}

function mendSlider(slider) {
  const [label, readout, handle] = ["widget-label", "widget-readout", "noUi-handle"].map(
    (name) => slider.querySelector(`.${name}`));
  if (!handle) return;
  set(handle, "aria-label", label.textContent);
  set(handle, "aria-valuetext", readout.textContent);
  set(handle, "aria-disabled", String(slider.querySelector("[disabled]") !== null));
  if (slider.matches(".jupyter-widgets")) { // of numbers, not of choices: what is typed into the readout counts
    set(readout, "role", "textbox");
    set(readout, "aria-label", label.textContent);
  } else set(readout, "tabindex", "-1");
}

// What is wider than the page can be scrolled by keyboard. Asked when a text's size is known: to ask at once makes the
// browser lay out the page.
const texts = new ResizeObserver((entries) => {
  for (const { target } of entries) if (target.scrollWidth > target.clientWidth) set(target, "tabindex", "0");
});
const seen = new WeakSet();

function mend(root) {
  const all = (selector) => [...(root.matches(selector) ? [root] : []), ...root.querySelectorAll(selector)];
  all(".widget-slider").forEach(mendSlider);
  for (const icon of all(".jupyter-button > i")) set(icon, "aria-hidden", "true");
  for (const button of all(".widget-toggle-button")) {
    set(button, "aria-pressed", String(button.matches(".mod-active")));
  }
  for (const text of all(".jp-RenderedMarkdown")) {
    if (!seen.has(text)) texts.observe(text);
    seen.add(text);
  }
  for (const box of all(".gclib-prediction")) {
    set(box, "role", "group");
    set(box, "aria-label", box.querySelector(".widget-html-content")?.textContent);
  }
}

function onKey(event) {
  const { target } = event;
  const own = target.closest?.(".jupyter-widgets, .widget-slider, .widget-radio, .jp-RenderedMarkdown[tabindex]");
  if (own) target.toggleAttribute("data-lm-suppress-shortcuts", !event.ctrlKey && !event.metaKey);
  if (event.key === "Enter" && target.matches?.(".gclib-prediction input[type=radio]")) {
    target.closest(".gclib-prediction").querySelector("button").click();
  }
}

// What a change of the page calls for: nothing in a picture, else the smallest widget around it that is mended.
function rootOf({ target, type }) {
  const own = target.closest(".gclib-timeline, .widget-slider, .gclib-prediction, .widget-toggle-button");
  return own?.matches(".gclib-timeline") ? null : own ?? (type === "childList" ? target : null);
}

function mendPage() {
  if (window.gclibKeyboard) return;
  window.gclibKeyboard = true;
  const roots = new Set();
  const note = (changes) => {
    const idle = !roots.size;
    for (const root of changes.map(rootOf)) if (root) roots.add(root);
    if (!idle || !roots.size) return;
    requestAnimationFrame(() => {
      roots.forEach(mend);
      roots.clear();
    });
  };
  const changes = { subtree: true, childList: true, attributeFilter: ["class", "aria-valuenow", "disabled"] };
  new MutationObserver(note).observe(document.body, changes);
  mend(document.body);
  window.addEventListener("keydown", onKey, true);
}

// The state of the widgets that the notebook shows, and of all that these are made of. What an earlier session left
// stays while it is still shown.
function shownState(notebook, live) {
  const all = { ...notebook.getMetadata("widgets")?.[STATE]?.state, ...live.state };
  const state = {};
  const add = (id) => {
    if (id in state || !(id in all)) return;
    state[id] = all[id];
    for (const [, part] of JSON.stringify(all[id]).matchAll(/IPY_MODEL_(\w+)/g)) add(part);
  };
  for (const [, id] of JSON.stringify(notebook.toJSON().cells).matchAll(/"model_id":"(\w+)"/g)) add(id);
  return { ...live, state };
}

// Jupyter leaves the state of widgets out of a saved notebook unless a setting asks for it, and the next day each of
// them says "model not found". `context` is the open notebook, in JupyterLab and Notebook 7.
function keepState(manager) {
  const { context } = manager;
  if (!context?.saveState || !manager.get_state_sync || context.gclibKeepsState) return;
  context.gclibKeepsState = true;
  context.saveState.connect((_, stage) => {
    if (stage !== "started") return;
    const state = shownState(context.model, manager.get_state_sync({ drop_defaults: true }));
    context.model.setMetadata("widgets", { [STATE]: state });
  });
}

async function render({ model, el }) {
  mendPage();
  keepState(model.widget_manager);
  const own = await model.widget_manager.get_model(model.get("own_id"));
  const tell = () => {
    el.style.display = own.comm_live ? "none" : "";
    el.replaceChildren(Object.assign(document.createElement("p"), { textContent: own.comm_live ? "" : WORDS }));
  };
  own.on("comm_live_update", tell);
  tell();
  return () => own.off("comm_live_update", tell);
}

export default { render };
