// The view in Jupyter: it watches the controls' own models and answers from the laws it knows; for the rest it waits
// for Python, whose picture stands pale until then.
import { Laws, NoLaw } from "./laws.js";
import { View } from "./view.js";

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

async function render({ model, el }) {
  const view = new View(el.appendChild(document.createElement("div")), { announce: false });
  const known = new Map(); // laws by what they are of
  const ids = Object.entries(model.get("controls"));
  const linked = await Promise.all(ids.map(async ([name, id]) => [name, await model.widget_manager.get_model(id)]));
  let waiting = false;

  // What the controls say now, in the names of a bundle; what Python shows where there are none.
  function read(shown) {
    if (!linked.length) return { ...shown };
    const choices = model.get("choices");
    const { budget, length, query_length: query, ...rest } = Object.fromEntries(
      linked.map(([name, one]) => [name, choices[name][one.get("index")]]));
    const settings = { ...rest, lengths: [query || length, length], tile_size: rest.tile_size || null };
    const [bytes, name, device] = budget;
    const asShown = Object.entries(settings).every(([key, value]) => same(value, shown[key]));
    return { ...settings, device: asShown ? shown.device : device, budget: { bytes, name }, asShown };
  }

  // Show these settings, from the laws that hold for them; whether there are any.
  function show(settings, budget, live) {
    for (const laws of [...known.values()].reverse()) {
      if (!laws.holdsFor(settings)) continue;
      try {
        view.show(laws.timeline(settings), laws.kinds, budget, live?.x?.length ? live : null);
        return true;
      } catch (error) {
        if (!(error instanceof NoLaw)) throw error;
      }
    }
    return false;
  }

  function draw() {
    waiting = false;
    const shown = model.get("shown");
    const { budget = model.get("budget"), asShown = true, ...settings } = read(shown);
    if (show(settings, budget, asShown ? model.get("live") : null)) return;
    if (!view.step && shown.step) show(shown, model.get("budget")); // reopened before Python had answered
    view.dim();
  }

  const soon = () => {
    if (!waiting) requestAnimationFrame(() => waiting && draw());
    waiting = true;
  };
  const learn = (bundle) => {
    if (!bundle.about) return;
    const key = JSON.stringify(bundle.about);
    known.delete(key);
    known.set(key, new Laws(bundle));
    if (known.size > 24) known.delete(known.keys().next().value);
    soon();
  };
  for (const name of ["ahead", "bundle"]) {
    model.on(`change:${name}`, () => learn(model.get(name)));
    learn(model.get(name));
  }
  for (const name of ["shown", "budget", "live"]) model.on(`change:${name}`, soon);
  for (const [, one] of linked) one.on("change:index", draw); // a move by hand is drawn before the next frame begins
  soon();
  return () => {
    for (const [, one] of linked) one.off("change:index", draw);
    view.close();
  };
}

export default { render };
