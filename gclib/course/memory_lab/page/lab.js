// The lab without a kernel: mount(element, folder) puts controls around the view; laws come from the folder's bundles.
import { Laws, NoLaw } from "./laws.js";
import { counted } from "./picture.js";
import { View } from "./view.js";

const SHOWN = ["batch_size", "chunk_size", "length", "step", "budget"];
const LABELS = {
  batch_size: "Batch", chunk_size: "Chunk", length: "Tokens", step: "Step", budget: "Budget", model: "Model",
  retain_chunks: "Retained", precision: "Numbers", optimizer: "Optimizer",
};

// options: [[words, value], ...]; a slider where values are numbers, else a menu.
function control(name, options, start, react) {
  const label = document.createElement("label");
  const menu = name === "budget" || typeof options[0][1] !== "number";
  const at = Math.max(0, options.findIndex(([words, value]) => value === start || words === start));
  label.append(LABELS[name]);
  const input = label.appendChild(document.createElement(menu ? "select" : "input"));
  const output = menu ? null : label.appendChild(document.createElement("output"));
  if (menu) for (const [place, [words]] of options.entries()) input.add(new Option(words, place));
  else Object.assign(input, { type: "range", min: 0, max: options.length - 1, step: 1 });
  input.value = at;
  input.name = name;
  const say = () => {
    if (!output) return;
    output.textContent = counted(options[input.value][1]);
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => { say(); react(); });
  say();
  return { label, input, read: () => options[input.value] };
}

// folder: the address of what gclib.course.memory_lab.bundles.write_bundles wrote. Resolves when the first picture is
// drawn; rejects where the folder can't be read. start: where controls begin, by name.
export async function mount(element, folder, start = {}) {
  const base = folder.endsWith("/") ? folder : `${folder}/`;
  const read = async (file) => {
    const answer = await fetch(new URL(base + file, document.baseURI));
    if (!answer.ok) throw new Error(`${file} could not be read (${answer.status})`);
    return answer.json();
  };
  const index = await read("index.json");
  element.classList.add("gclib-page-lab");
  element.innerHTML = `<div></div><p role="status"></p><form aria-label="Settings of the step"></form>
    <details><summary>More settings</summary><form aria-label="More settings of the step"></form></details>`;
  const [place, status, plain, more] = ["div", "p", "form", "details form"].map((name) => element.querySelector(name));
  const view = new View(place);
  const bundles = new Map();
  const controls = {};
  for (const [name, options] of Object.entries(index.choices)) {
    controls[name] = control(name, options, { ...index.start, ...start }[name], () => draw().catch(fail));
  }
  for (const name of [...SHOWN, ...Object.keys(controls).filter((one) => !SHOWN.includes(one))]) {
    (SHOWN.includes(name) ? plain : more).append(controls[name].label);
  }
  const fail = (error) => { view.dim(); status.textContent = `No picture: ${error.message}.`; };
  let asked = 0;

  async function draw() {
    const settings = Object.fromEntries(Object.entries(controls).map(([name, one]) => [name, one.read()[1]]));
    const [card, bytes] = controls.budget.read();
    const device = index.cards.includes(card) ? "cuda" : "cpu";
    const name = device === "cuda" ? card : "the budget";
    controls.chunk_size.input.disabled = settings.step === "naive";
    controls.retain_chunks.input.disabled = settings.step !== "grad_cache";
    const file = index.files[[settings.model, settings.length, settings.precision, device].join(" ")];
    asked += 1;
    const turn = asked;
    if (!file) throw new Error(`${settings.model} does not read texts of ${settings.length} tokens`);
    if (!bundles.has(file)) {
      view.dim();
      bundles.set(file, read(file).then((bundle) => new Laws(bundle)));
      bundles.get(file).catch(() => bundles.delete(file));
    }
    const laws = bundles.get(file) instanceof Laws ? bundles.get(file) : await bundles.get(file);
    bundles.set(file, laws);
    if (turn !== asked) return; // another setting was asked for meanwhile
    status.textContent = "";
    view.show(laws.timeline(settings), laws.kinds, { bytes, name });
  }

  await draw().catch((error) => { if (error instanceof NoLaw) fail(error); else throw error; });
  return { view, controls };
}
