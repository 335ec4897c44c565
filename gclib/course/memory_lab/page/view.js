// The timeline drawn in the page: bytes by kind, a cursor that reads every event, zoom into one piece, a table.
import { LOOKS, escaped, tile } from "./looks.js";
import { Step, counted, describe, eventAt, formatBytes, peakEvent, pictureOf, unitFor, xOf, zoomedOn }
  from "./picture.js";

const HEIGHT = 316;
const FRAME = { left: 58, right: 10, top: 6, bottom: 64 };
const KEYS = "Arrows: one event. Page up and down: one chunk. Home, End: first and last. P: the peak. Enter: zoom. "
  + "Escape: the whole step.";
const signed = (bytes) => `${bytes < 0 ? "−" : "+"}${formatBytes(Math.abs(bytes))}`;

export class View {
  // announce: whether the peak is said aloud here when it changes (not where other words say it).
  constructor(element, { announce = true } = {}) {
    const id = `gclib-${Math.random().toString(36).slice(2)}`;
    this.tile = (kind) => `${id}-${kind.replace(" ", "-")}`;
    this.element = element;
    element.classList.add("gclib-timeline");
    const tiles = Object.entries(LOOKS).map(([kind, look]) => tile(this.tile(kind), look)).join("");
    element.innerHTML = `<div class="gclib-chart"><svg role="img" height="${HEIGHT}"><defs>${tiles}</defs>
        <g data-part="plot"></g><g data-part="mark"></g></svg>
        <div data-part="cursor" role="slider" tabindex="0" aria-label="Events of the step" aria-valuemin="1"
          aria-valuenow="1" aria-valuemax="1" title="${KEYS}" style="left:${FRAME.left}px;right:${FRAME.right}px;
          top:${FRAME.top}px;bottom:${FRAME.bottom}px"></div></div>
      <div class="gclib-side"><table><caption><span data-part="where"></span></caption>
        <tbody data-part="legend"></tbody></table></div>
      <p data-part="peak"${announce ? ' role="status"' : ""}></p><p data-part="reading"></p>
      <p class="gclib-buttons"><button type="button" data-part="zoom" aria-pressed="false">Zoom into this chunk</button>
        <button type="button" data-part="top">To the peak</button></p>
      <details data-part="more"><summary>As a table</summary>
        <div class="gclib-scroll" tabindex="0" role="group" aria-label="Table of the step"></div></details>`;
    for (const part of element.querySelectorAll("[data-part]")) this[part.dataset.part] = part;
    this.svg = element.querySelector("svg");
    this.zoomed = false;
    this.listen();
  }

  listen() {
    const { cursor } = this;
    const eventUnder = ({ clientX }) => {
      const box = cursor.getBoundingClientRect();
      return eventAt(this.shown, (clientX - box.left) / box.width);
    };
    cursor.addEventListener("pointermove", (event) => this.step && this.moveTo(eventUnder(event)));
    cursor.addEventListener("dblclick", () => this.step && this.zoomTo(!this.zoomed));
    cursor.addEventListener("keydown", (event) => this.step && this.press(event));
    this.zoom.addEventListener("click", () => this.step && this.zoomTo(!this.zoomed));
    this.top.addEventListener("click", () => this.step && this.moveTo(peakEvent(this.whole)));
    this.more.addEventListener("toggle", () => this.step && this.tabulate());
    this.resized = new ResizeObserver(([{ contentRect: { width } }]) => {
      this.wide = Math.round(width);
      if (this.step) this.paint();
    });
    this.resized.observe(this.svg.parentElement);
  }

  // segments: a timeline of laws.js. budget: {bytes, name}. live: {x, bytes} of a run over the whole picture, or null.
  show(segments, kinds, budget, live = null) {
    if (segments !== this.segments) this.whole = pictureOf(new Step(segments, kinds));
    Object.assign(this, { segments, budget, live, step: this.whole.step });
    this.cursor.setAttribute("aria-valuemax", this.step.count);
    this.at = this.touched ? Math.min(this.at, this.step.count - 1) : peakEvent(this.whole);
    this.element.classList.remove("gclib-dimmed");
    this.element.removeAttribute("aria-busy");
    this.refresh();
    const { total } = this.whole.peak;
    const fits = total <= budget.bytes ? "fits" : "does not fit";
    const words = `Peak ${formatBytes(total)} (${counted(total)} bytes): ${fits} within ${budget.name}.`;
    if (this.peak.textContent !== words) this.peak.textContent = words;
    if (this.more.open) this.tabulate();
  }

  close() { this.resized.disconnect(); }

  // Keep the old picture, pale, while another one is on its way.
  dim() {
    this.element.classList.add("gclib-dimmed");
    this.element.setAttribute("aria-busy", "true");
  }

  press(event) {
    const { key } = event;
    const to = {
      ArrowRight: () => this.at + 1, ArrowLeft: () => this.at - 1, ArrowUp: () => this.at + 1,
      ArrowDown: () => this.at - 1, p: () => peakEvent(this.whole), P: () => peakEvent(this.whole),
      PageDown: () => this.step.pieceFrom(this.at, 1), PageUp: () => this.step.pieceFrom(this.at, -1),
      Home: () => 0, End: () => this.step.count - 1,
    }[key];
    if (to) this.moveTo(to());
    else if (key === "Enter" || (key === "Escape" && this.zoomed)) this.zoomTo(!this.zoomed);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  moveTo(number) {
    this.at = Math.min(Math.max(number, 0), this.step.count - 1);
    this.touched = true;
    if (this.zoomed && xOf(this.shown, this.at) === null) this.refresh();
    else this.mark_();
  }

  zoomTo(zoomed) {
    this.zoomed = zoomed;
    this.touched = true;
    this.zoom.setAttribute("aria-pressed", String(zoomed));
    this.zoom.textContent = zoomed ? "Show the whole step" : "Zoom into this chunk";
    this.refresh();
  }

  refresh() {
    this.shown = this.zoomed ? zoomedOn(this.step, this.step.place(this.at)) : this.whole;
    this.paint();
  }

  paint() {
    this.wide ??= this.svg.parentElement.clientWidth; // later the observer's: to ask makes the browser lay out the page
    this.svg.setAttribute("width", this.wide);
    this.svg.setAttribute("viewBox", `0 0 ${this.wide} ${HEIGHT}`);
    this.svg.setAttribute("aria-label", describe(this.shown, this.budget, this.whole));
    const highest = Math.max(this.shown.peak.total, ...(this.live && !this.zoomed ? this.live.bytes : []));
    const inside = this.budget.bytes <= 2 * highest;
    this.scale = Math.max(highest * (inside ? 1.18 : 1.32), inside ? this.budget.bytes * 1.12 : 0);
    this.plot.innerHTML = [this.axis(), this.stack(), this.lines(highest, inside), this.spans()].join("");
    this.mark_();
  }

  x(share) {
    return (FRAME.left + share * (this.wide - FRAME.left - FRAME.right)).toFixed(1);
  }

  y(bytes) {
    return (HEIGHT - FRAME.bottom - (bytes / this.scale) * (HEIGHT - FRAME.top - FRAME.bottom)).toFixed(1);
  }

  axis() {
    const [unit, size] = unitFor(this.shown.peak.total);
    const raw = this.scale / size / 5;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].find((one) => one * power >= raw) * power;
    const ticks = Array.from({ length: Math.floor(this.scale / size / step) + 1 }, (_, n) => n * step);
    const lines = ticks.map((tick) => `<path class="gclib-grid" d="M${this.x(0)} ${this.y(tick * size)}H${this.x(1)}"/>
      <text x="${FRAME.left - 6}" y="${this.y(tick * size)}" dy=".35em" text-anchor="end">
      ${counted(tick, step < 1 ? 2 : step % 1 ? 1 : 0)}</text>`);
    const middle = (HEIGHT - FRAME.bottom) / 2;
    return `${lines.join("")}<text transform="translate(12 ${middle}) rotate(-90)" text-anchor="middle">live bytes
      (${unit})</text>`;
  }

  stack() {
    const { panels, peak, step } = this.shown;
    const edges = panels.flatMap(({ start, stop, columns }) =>
      columns.map((_, at) => this.x(start + (at / columns.length) * (stop - start))));
    const columns = panels.flatMap((panel) => panel.columns);
    edges.push(this.x(1));
    let base = columns.map(() => this.y(0));
    const sums = columns.map(() => 0);
    this.drawn = [...step.kinds.keys()].filter((kind) => columns.some((bytes) => bytes[kind] > 0.005 * peak.total));
    return this.drawn.map((kind) => {
      columns.forEach((bytes, at) => { sums[at] += bytes[kind]; });
      const top = sums.map((bytes) => this.y(bytes));
      let [there, back] = [`M${edges[0]} ${top[0]}`, `H${edges[0]}Z`];
      for (let at = 1; at < top.length; at += 1) {
        if (top[at] !== top[at - 1]) there += `H${edges[at]}V${top[at]}`;
        if (base[at] !== base[at - 1]) back = `H${edges[at]}V${base[at - 1]}${back}`;
      }
      const d = `${there}H${edges.at(-1)}V${base.at(-1)}${back}`;
      base = top;
      return `<path fill="url(#${this.tile(step.kinds[kind])})" d="${d}"/>`;
    }).join("");
  }

  lines(highest, inside) {
    const { panels, peak } = this.shown;
    const pale = panels.filter(({ between }) => between).map(({ start, stop, highest: top }) => `<path class="gclib-pale"
      d="M${this.x(start)} ${this.y(0)}V${this.y(top)}H${this.x(stop)}V${this.y(0)}Z"/>
      <text x="${this.x((start + stop) / 2)}" y="${this.y(top / 2)}" text-anchor="middle">…</text>`);
    const { bytes, name } = this.budget;
    const label = `${escaped(name)}: ${formatBytes(bytes)}`;
    const far = `${label}${this.zoomed ? ": above this picture" : ` (${counted(bytes / highest)} times the peak${this.wide > 620 ? ": far above this picture" : ""})`}`;
    const card = inside
      ? `<path class="gclib-card" d="M${this.x(0)} ${this.y(bytes)}H${this.x(1)}"/>
        <text class="gclib-card" x="${this.x(0.005)}" y="${this.y(bytes) - 4}">${label}</text>`
      : `<text class="gclib-card" x="${this.x(0.005)}" y="${FRAME.top + 11}">${far}</text>`;
    const run = this.live && !this.zoomed && this.live.x.length
      ? this.live.x.map((x, at) => `${at ? "L" : "M"}${this.x(x)} ${this.y(this.live.bytes[at])}`).join("") : "";
    const side = peak.x > 0.8 ? "end" : peak.x < 0.2 ? "start" : "middle";
    return `${pale.join("")}${card}${run && `<path class="gclib-halo" d="${run}"/><path class="gclib-live" d="${run}"/>`}
      <path class="gclib-top" d="M${this.x(peak.x)} ${this.y(peak.total)}m-4 -7h8l-4 6z"/><text class="gclib-top"
      x="${this.x(peak.x)}" y="${this.y(peak.total) - 10}" text-anchor="${side}">peak ${formatBytes(peak.total)}</text>`;
  }

  // Names below the axis; a narrow span's name moves down where it would touch its neighbour's.
  spans() {
    const taken = [-Infinity, -Infinity];
    const wide = this.wide - FRAME.left - FRAME.right;
    const below = HEIGHT - FRAME.bottom;
    return this.shown.spans.map(({ label, start, stop }) => {
      const lines = label.split("\n");
      const tick = `<path class="gclib-axis" d="M${this.x(stop)} ${below}v5"/>`;
      const half = (3.1 * Math.max(...lines.map((line) => line.length))) / wide;
      const middle = Math.min(Math.max((start + stop) / 2, half), 1 - half);
      const row = taken.findIndex((reach) => middle - half > reach);
      if (row < 0) return tick;
      taken[row] = middle + half;
      const text = lines.map((line, at) => `<tspan x="${this.x(middle)}" y="${below + 15 + 13 * at + 14 * row * 2}">
        ${escaped(line)}</tspan>`);
      return `${tick}<text class="gclib-span" text-anchor="middle">${text.join("")}</text>`;
    }).join("");
  }

  // The cursor, and what it reads: in the picture, beside it, and for a screen reader.
  mark_() {
    const event = this.step.read(this.at);
    const x = this.x(xOf(this.shown, this.at));
    this.mark.innerHTML = `<path class="gclib-cursor" d="M${x} ${this.y(0)}V${FRAME.top}"/>
      <circle class="gclib-cursor" cx="${x}" cy="${this.y(event.total)}" r="3.5"/>`;
    const { kinds } = this.step;
    const drawn = [...this.drawn].reverse();
    const rows = drawn.map((kind) => `<tr><td><svg width="18" height="12" aria-hidden="true"><rect width="18" height="12"
      fill="url(#${this.tile(kinds[kind])})"/></svg></td><th scope="row">${kinds[kind]}</th><td></td></tr>`);
    const run = this.live?.x.length ? '<tr><td><i class="gclib-live"></i></td><th scope="row" colspan="2">the run</th></tr>' : "";
    const legend = `${rows.join("")}<tr><td></td><th scope="row">all</th><td></td></tr>${run}`;
    if (legend !== this.listed) this.legend.innerHTML = legend;
    this.listed = legend;
    const numbers = [...drawn.map((kind) => event.bytes[kind]), event.total];
    numbers.forEach((bytes, row) => { this.legend.rows[row].lastChild.textContent = formatBytes(bytes); });
    this.where.textContent = `At event ${counted(this.at + 1)} of ${counted(this.step.count)}`;
    const words = this.reading_(event);
    this.reading.textContent = words;
    this.cursor.setAttribute("aria-valuenow", this.at + 1);
    this.cursor.setAttribute("aria-valuetext", words);
  }

  reading_(event) {
    const { kinds } = this.step;
    const moved = event.moved.map((bytes, kind) => bytes && `${signed(bytes)} ${kinds[kind]}`).filter(Boolean);
    const held = event.bytes.map((bytes, kind) => bytes && `${kinds[kind]} ${formatBytes(bytes)}`).filter(Boolean);
    return `${this.step.words(event)}, event ${counted(event.at + 1)} of ${counted(event.segment.count)}: `
      + `${formatBytes(event.total)} live (${counted(event.total)} bytes). Just now: `
      + `${moved.join(", ") || "nothing"}. Held: ${held.join(", ")}.`;
  }

  // Each phase's highest moment, by kind.
  tabulate() {
    const { spans, step } = this.whole;
    const best = spans.map(({ label, panels }) => {
      const panel = panels.reduce((top, one) => (one.highest > top.highest ? one : top));
      return { label, total: panel.highest, bytes: panel.columns[panel.totals.indexOf(panel.highest)] };
    });
    const seen = step.kinds.map((_, kind) => kind).filter((kind) => best.some(({ bytes }) => bytes[kind]));
    const head = ["phase, in order", "highest", ...seen.map((kind) => step.kinds[kind])];
    const rows = best.map(({ label, total, bytes }) => `<tr><th scope="row">${escaped(label)}</th>
      <td>${formatBytes(total)}</td>${seen.map((kind) => `<td>${formatBytes(bytes[kind])}</td>`).join("")}</tr>`);
    this.more.querySelector("div").innerHTML = `<table><caption>The highest moment of each phase</caption><thead><tr>
      ${head.map((name) => `<th scope="col">${name}</th>`).join("")}</tr></thead><tbody>${rows.join("")}</tbody></table>`;
  }
}
