// A step as an animation: what moves, what is alive and its bytes, moment by moment, as gclib.memory.walk measured it.
import { LOOKS, escaped, tile } from "../../memory_lab/page/looks.js";
import { layout, of, route } from "./layout.js";
import { formatBytes, unitFor } from "../../memory_lab/page/picture.js";

const PLAY_MS = 10000; // all moments of a step together
const MOVE_MS = 900; // what moves, where a person goes from moment to moment
const KIND_OF = {
  text: "inputs", graph: "activations", rep: "representations", cache: "cache", part: "gradients", loss: "loss",
};
const STACK = { height: 236, left: 46, right: 8, top: 22, bottom: 40 };
const ARROWS = { remembered: "remembered for the backward", passing: "computed, forgotten", backward: "gradients" };
const widthOf = (svg) => Math.max(300, svg.parentElement.clientWidth); // none yet where the page is not laid out
const sumOf = (values) => values.reduce((total, one) => total + one, 0);

export class WalkView {
  // data: {walks: {name: what gclib.course.widgets.walk.page_of says}, kinds}. onMove: told (step, moment from 1).
  constructor(element, { walks, kinds }, onMove = () => {}) {
    const id = `gclib-walk-${Math.random().toString(36).slice(2)}`;
    Object.assign(this, { element, walks, kinds, onMove, id, names: Object.keys(walks), at: 0, timer: null });
    this.fill = (kind) => `url(#${id}-${kind.replace(" ", "-")})`;
    this.route = (edge) => route(this.place, this.walk.rows, edge);
    element.classList.add("gclib-timeline", "gclib-walk");
    const tiles = Object.entries(LOOKS).map(([kind, look]) => tile(`${id}-${kind.replace(" ", "-")}`, look)).join("");
    const heads = Object.keys(ARROWS).map((kind) => `<marker id="${id}-${kind}" class="gclib-${kind}" refX="7.5"
      refY="4" markerWidth="8" markerHeight="8" markerUnits="userSpaceOnUse" orient="auto">
      <path d="M0 0L8 4L0 8Z"/></marker>`);
    const options = this.names.map((name) => `<option>${escaped(name)}</option>`).join("");
    const arrows = Object.entries(ARROWS).map(([kind, words]) => `<span><svg width="30" height="10" aria-hidden="true">
      <path class="gclib-edge gclib-${kind}" d="M1 5H28" marker-end="url(#${id}-${kind})"/></svg> ${words}</span>`);
    element.innerHTML = `<div class="gclib-buttons" role="group" aria-label="The step, moment by moment">
        <label ${this.names.length > 1 ? "" : "hidden"}>Step <select data-part="menu">${options}</select></label>
        <button type="button" data-part="play"></button><button type="button" data-part="back">Previous</button>
        <button type="button" data-part="next">Next</button>
        <label class="gclib-slide">Moment <input type="range" data-part="slider" min="1" step="1"></label></div>
      <p data-part="words" role="status" aria-live="polite"></p>
      <div class="gclib-scene"><svg role="img" data-part="scene"><defs>${tiles}${heads.join("")}</defs>
        <g data-part="still"></g><g data-part="flying" aria-hidden="true"></g></svg>
        <p class="gclib-key">r: representations; u = ∂L/∂r: cached gradients; θ: parameters.
        <br>${arrows.join(" ")}</p></div>
      <div class="gclib-bytes"><svg role="img" data-part="stack" height="${STACK.height}"><g data-part="chart"></g>
        </svg><div data-part="legend"></div></div>
      <details><summary>As a table</summary><div class="gclib-scroll" data-part="table" tabindex="0" role="group"
        aria-label="Table of the step's moments"></div></details>`;
    for (const part of element.querySelectorAll("[data-part]")) this[part.dataset.part] = part;
    this.menu.addEventListener("change", () => {
      this.pause();
      this.show(this.menu.value);
      this.onMove(this.step, 1);
    });
    this.play.addEventListener("click", () => (this.timer ? this.pause() : this.start()));
    this.back.addEventListener("click", () => { this.pause(); this.go(this.at - 1); });
    this.next.addEventListener("click", () => { this.pause(); this.go(this.at + 1); });
    this.slider.addEventListener("input", () => { this.pause(); this.go(this.slider.value - 1); });
    this.top = Math.max(...Object.values(walks).flatMap(({ moments }) =>
      moments.flatMap(({ columns }) => columns.map(sumOf))));
    this.resized = new ResizeObserver(() => Math.abs(widthOf(this.scene) - this.wide) > 1 && this.paint());
    this.resized.observe(element);
    this.pause();
    this.show(this.names[0]);
  }

  get walk() { return this.walks[this.step]; }

  // Another step, or the same one, at a moment from 0.
  show(step, at = 0) {
    this.step = step;
    this.menu.value = step;
    this.slider.max = this.walk.moments.length;
    this.table.innerHTML = tableOf(this.walk.table);
    this.at = Math.min(Math.max(at, 0), this.walk.moments.length - 1);
    this.paint();
  }

  start() {
    const last = this.walk.moments.length - 1;
    this.words.setAttribute("aria-live", "off"); // not while it plays: it would be told all the time
    this.play.textContent = "Pause";
    this.beat = PLAY_MS / (last + 1);
    this.timer = setInterval(() => (this.at === last ? this.pause() : this.go(this.at + 1)), this.beat);
    this.go(this.at === last ? 0 : this.at);
  }

  pause() {
    const played = this.timer;
    clearInterval(played);
    Object.assign(this, { timer: null, beat: MOVE_MS });
    this.play.textContent = "Play";
    this.words.setAttribute("aria-live", "polite");
    if (!played) return;
    this.settle(); // its words are told now
    this.onMove(this.step, this.at + 1);
  }

  go(at) {
    const on = at > this.at;
    this.at = Math.min(Math.max(at, 0), this.walk.moments.length - 1);
    this.settle();
    if (on || this.timer) this.fly();
    if (!this.timer) this.onMove(this.step, this.at + 1);
  }

  close() { clearInterval(this.timer); this.resized.disconnect(); }

  // All that stays while moments change: boxes, and the bytes of the whole step.
  paint() {
    const { rows, moments } = this.walk;
    this.wide = widthOf(this.scene);
    this.place = layout(rows, this.wide, "cache 0" in moments[0].nodes);
    const { boxes, heads, encoder, height } = this.place;
    this.scene.setAttribute("height", height);
    this.scene.setAttribute("viewBox", `0 0 ${this.wide} ${height}`);
    this.scene.setAttribute("width", this.wide);
    const words = heads.map(([text, x, y, side]) => `<text x="${x}" y="${y}" text-anchor="${side}">${text}</text>`);
    const drawn = Object.entries(boxes).map(([key, box]) => this.box(key, box));
    this.still.innerHTML = `<rect class="gclib-encoder" x="${encoder.x}" y="${encoder.y}" width="${encoder.w}"
      height="${encoder.h}" rx="10"/>${words.join("")}<g data-edges></g>${drawn.join("")}<text data-sum
      x="${encoder.x + encoder.w + 8}" y="${boxes["part 0"].y + 15}"></text>`;
    this.paintBytes();
    this.settle();
  }

  box(key, { x, y, w, h }) {
    const kind = of(key);
    const around = `x="${x}" y="${y}" width="${w}" height="${h}" rx="${kind === "part" ? 0 : 4}"`;
    const letters = { rep: "r", cache: "u", text: this.walk.rows[key.split(" ")[1]]?.[1] }[kind] ?? "";
    const [color, fill] = [LOOKS[KIND_OF[kind]][0], this.fill(KIND_OF[kind])];
    const full = kind === "loss" ? this.cells(x, y, w) : `<rect class="gclib-full" fill="${fill}" ${around}/>`;
    return `<g data-node="${key}" style="--kind:${color}">${full}<rect class="gclib-rim" ${around}/>
      <text x="${x + w / 2}" y="${y + (kind === "loss" ? h + 15 : h / 2 + 4)}" text-anchor="middle">${letters}</text>
      </g>`;
  }

  // The loss's logits: chunks of the first tower down, all others across.
  cells(x, y, side) {
    const { rows } = this.walk;
    const first = rows.filter(([tower]) => tower === rows[0][0]).length;
    const across = rows.length - first || 1;
    const [wide, high] = [side / across, side / first];
    return Array.from({ length: first * across }, (_, at) => {
      const [row, column] = [Math.floor(at / across), at % across];
      return `<rect class="gclib-full gclib-cell" data-pair="${row} ${first + column}" fill="${this.fill("loss")}"
        x="${x + wide * column}" y="${y + high * row}" width="${wide}" height="${high}"/>`;
    }).join("");
  }

  // Everything as it is in this moment.
  settle() {
    const { moments } = this.walk;
    const moment = moments[this.at];
    this.flying.replaceChildren();
    for (const one of this.still.querySelectorAll("[data-node]")) {
      const key = one.dataset.node;
      const state = moment.nodes[key];
      one.dataset.state = state;
      const bytes = key in moment.graphs ? formatBytes(moment.graphs[key]) : "";
      const words = { graph: bytes ? `graph ${bytes}` : state === "passing" ? "no graph" : "", loss: bytes }[of(key)];
      if (words !== undefined) one.querySelector("text").textContent = words;
    }
    const seen = new Set(moment.edges.filter(([, end]) => end === "loss").map(([start]) => start.split(" ")[1]));
    for (const cell of this.still.querySelectorAll("[data-pair]")) {
      const pair = cell.dataset.pair.split(" ");
      cell.classList.toggle("gclib-lit", pair.every((row) => seen.has(row) || !(row in this.walk.rows)));
    }
    this.still.querySelector("[data-edges]").innerHTML = moment.edges.map((edge) => `<path class="gclib-edge
      gclib-${edge[2]}" marker-end="url(#${this.id}-${edge[2]})" d="M${this.route(edge).join("L")}"/>`).join("");
    const gradients = moment.bytes[this.kinds.indexOf("gradients")];
    this.still.querySelector("[data-sum]").textContent = gradients ? formatBytes(gradients) : "";
    this.scene.setAttribute("aria-label", moment.words);
    this.slider.value = this.at + 1;
    this.slider.setAttribute("aria-valuetext", `${this.at + 1} of ${moments.length}: ${moment.title}`);
    this.back.disabled = this.at === 0;
    this.next.disabled = this.at === moments.length - 1;
    this.words.innerHTML = `<b>${this.at + 1} of ${moments.length} · ${escaped(moment.title)}.</b> ${
      escaped(moment.sentence)}`;
    this.settleBytes(moment);
  }

  // What goes along the edges, one turn after the other.
  fly() {
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    const going = this.walk.moments[this.at].edges.filter(([, , , turn]) => turn >= 0);
    const turns = Math.max(0, ...going.map(([, , , turn]) => turn + 1));
    for (const edge of going) {
      const [start, end, kind, turn] = edge;
      const named = [end, start].map(of).find((one) => ["text", "rep", "cache", "part"].includes(one));
      const fill = kind === "backward" && named === "rep" ? "var(--card)" : this.fill(KIND_OF[named]);
      const mark = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      for (const [name, value] of Object.entries({ x: -9, y: -6, width: 18, height: 12, rx: 3, fill })) {
        mark.setAttribute(name, value);
      }
      this.flying.append(mark);
      const frames = this.route(edge).map(([x, y]) => ({ transform: `translate(${x}px, ${y}px)` }));
      const time = (0.9 * this.beat) / turns;
      mark.animate([{ opacity: 0 }, { opacity: 1, offset: 0.1 }, { opacity: 1, offset: 0.9 }, { opacity: 0 }],
        { duration: time, delay: turn * time, fill: "both" });
      mark.animate(frames, { duration: time, delay: turn * time, fill: "both", easing: "ease-in-out" });
    }
  }

  // The bytes of every instant, stacked by kind, the moments side by side, and where the peak is.
  paintBytes() {
    const { moments, spans } = this.walk;
    const { height, left, right, top, bottom } = STACK;
    const [wide, floor] = [widthOf(this.stack), height - bottom];
    const x = (moment) => (left + (moment / moments.length) * (wide - left - right)).toFixed(1);
    const y = (bytes) => (floor - (bytes / (1.16 * this.top)) * (height - top - bottom)).toFixed(1);
    const columns = moments.flatMap((moment) => moment.columns);
    const edges = [...moments.flatMap(({ columns: { length } }, at) =>
      Array.from({ length }, (_, column) => x(at + column / length))), x(moments.length)];
    const totals = columns.map(sumOf);
    this.peakBytes = Math.max(...totals);
    this.seen = this.kinds.filter((_, kind) => columns.some((bytes) => bytes[kind] > 0));
    let base = columns.map(() => 0);
    const areas = this.seen.map((name) => {
      const kind = this.kinds.indexOf(name);
      const sums = base.map((bytes, at) => bytes + columns[at][kind]);
      const there = sums.map((bytes, at) => `${at ? "L" : "M"}${edges[at]} ${y(bytes)}H${edges[at + 1]}`).join("");
      const back = base.map((bytes, at) => `L${edges[at + 1]} ${y(bytes)}H${edges[at]}`).reverse().join("");
      base = sums;
      return `<path fill="${this.fill(name)}" d="${there}${back}Z"/>`;
    });
    const [unit, size] = unitFor(this.top);
    const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500].find((one) => one * 5 * size >= this.top);
    const ticks = Array.from({ length: Math.floor(this.top / size / step) + 1 }, (_, n) => n * step).map((tick) =>
      `<path class="gclib-grid" d="M${left} ${y(tick * size)}H${wide - right}"/><text x="${left - 6}" dy=".35em"
      y="${y(tick * size)}" text-anchor="end">${Number(tick.toFixed(1))}</text>`);
    const names = spans.map(([name, start, stop]) => {
      const room = x(stop) - x(start);
      const text = `<text class="gclib-span" x="${(Number(x(start)) + Number(x(stop))) / 2}" y="${floor + 17}"
        text-anchor="middle">${escaped(name)}</text>`;
      return `<path class="gclib-axis" d="M${x(stop)} ${floor}v5"/>${room + 8 > 6.2 * name.length ? text : ""}`;
    });
    const [at, high] = [Number(edges[totals.indexOf(this.peakBytes)]), y(this.peakBytes)];
    const side = at > wide - 70 ? "end" : at < left + 70 ? "start" : "middle";
    const label = `peak ${formatBytes(this.peakBytes)}`;
    const across = wide - left - right;
    this.chart.innerHTML = `${ticks.join("")}<text x="4" y="12">live bytes (${unit})</text>${areas.join("")}
      <rect class="gclib-later" x="${left}" y="${top}" width="${across}" height="${floor - top}"/>
      <rect class="gclib-now" x="${left}" y="${top}" width="${across / moments.length}" height="${floor - top}"/>
      <circle class="gclib-cursor" r="3.5"/>${names.join("")}<path class="gclib-top" d="M${at} ${high}m-4 -7h8l-4 6z"/>
      <text class="gclib-top" x="${at}" y="${high - 10}" text-anchor="${side}">${label}</text>`;
    this.stack.setAttribute("width", wide);
    this.stack.setAttribute("viewBox", `0 0 ${wide} ${height}`);
    this.spot = ({ bytes, columns: own }, at) => { // where a moment's highest instant stands
      const highest = own.findIndex((one) => sumOf(one) === sumOf(bytes));
      return [x(at + (highest + 0.5) / own.length), y(sumOf(bytes))];
    };
  }

  settleBytes(moment) {
    const total = sumOf(moment.bytes);
    const share = (widthOf(this.stack) - STACK.left - STACK.right) / this.walk.moments.length;
    const [x, y] = this.spot(moment, this.at);
    this.chart.style.setProperty("--time", `${this.timer ? this.beat : 200}ms`);
    this.chart.querySelector(".gclib-later").style.transform = `translateX(${share * (this.at + 1)}px)`;
    this.chart.querySelector(".gclib-now").style.transform = `translateX(${share * this.at}px)`;
    this.chart.querySelector(".gclib-cursor").style.transform = `translate(${x}px, ${y}px)`;
    const rows = this.seen.map((kind) => `<div><span><svg width="18" height="12" aria-hidden="true"><rect width="18"
      height="12" fill="${this.fill(kind)}"/></svg> ${kind}</span><span data-kind="${kind}">${
      formatBytes(moment.bytes[this.kinds.indexOf(kind)])}</span></div>`).reverse();
    const all = `<div><b>all, in this moment</b><b data-kind="all">${formatBytes(total)}</b></div>`;
    this.legend.innerHTML = rows.join("") + all;
    this.stack.setAttribute("aria-label", `Live bytes of the whole step, moment after moment: ${formatBytes(total)} `
      + `in this one, ${formatBytes(this.peakBytes)} at the peak.`);
  }
}

const tableOf = ([heads, rows]) => `<table><caption>Each moment's live bytes</caption><thead><tr>${
  heads.map((head) => `<th scope="col">${escaped(head)}</th>`).join("")}</tr></thead><tbody>${
  rows.map(([title, ...cells]) => `<tr><th scope="row">${escaped(title)}</th>${
    cells.map((cell) => `<td>${escaped(cell)}</td>`).join("")}</tr>`).join("")}</tbody></table>`;

// In Jupyter: the model's step and moment are where the view stands, and it follows when they are set elsewhere.
function render({ model, el }) {
  const view = new WalkView(el.appendChild(document.createElement("div")),
    { walks: model.get("walks"), kinds: model.get("kinds") }, (step, moment) => {
      model.set({ step, moment });
      model.save_changes();
    });
  const follow = () => {
    const [step, at] = [model.get("step"), model.get("moment") - 1];
    if (step !== view.step || at !== view.at) view.show(step, at);
  };
  model.on("change:step change:moment", follow);
  follow();
  return () => { model.off("change:step change:moment", follow); view.close(); };
}

export default { render };
