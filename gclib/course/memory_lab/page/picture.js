// A step's timeline as a picture, without drawing: panels side by side, equal pieces summarised, as
// gclib.memory.timeline.picture_of does it; and what stands at every single event of the step.

const COLUMNS = 360;
const SMALLEST_SHARE = 0.04;
const BETWEEN_COLUMNS = 24;
const PHASE_WORDS = {
  first_forward: "first forward", replay: "second forward\nand backward", average: "average of\ngradients",
};
const TOWER_WORDS = ["queries", "passages"];
const UNITS = [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10], ["B", 1]];

export const unitFor = (bytes) => UNITS.find(([, size]) => Math.abs(bytes) >= size) ?? UNITS[4];
const FORMATS = [0, 1, 2].map((digits) => new Intl.NumberFormat("en-US",
  { minimumFractionDigits: digits, maximumFractionDigits: digits }));
export const counted = (number, digits = 0) => FORMATS[digits].format(number);

// Bytes with a binary unit and at least three digits, as gclib.support.words.format_bytes writes them.
export function formatBytes(bytes) {
  const [unit, size] = unitFor(bytes);
  const value = bytes / size;
  if (size === 1) return `${counted(value)} B`;
  const whole = String(Math.trunc(Math.abs(value))).length;
  const digits = Math.max(0, 3 - whole);
  return `${counted(Number(halfEven(value, digits)), digits)} ${unit}`;
}

// Rounded as Python rounds: to the even neighbour where two are as near.
function halfEven(value, digits = 0) {
  const scaled = value * 10 ** digits;
  const below = Math.floor(scaled);
  const up = scaled - below > 0.5 || (scaled - below === 0.5 && below % 2 !== 0);
  return (below + up) / 10 ** digits;
}

const isHeading = ({ phase, tower, chunk }) =>
  !["loss", "backward", "average"].includes(phase) && tower === null && chunk === null;

// A step's segments as groups of pieces, with every event numbered in the order in which the step goes through them.
export class Step {
  constructor(segments, kinds) {
    Object.assign(this, { kinds, width: kinds.length, groups: [], pieces: new Map() });
    this.cyclic = segments.some(({ phase, chunk }) => phase === "loss" && chunk !== null);
    segments.forEach((segment, at) => {
      const one = { ...segment, before: segments[at - 1] ?? null, count: segment.values.length / this.width };
      if (!one.count || isHeading(one)) return;
      const last = this.groups.at(-1);
      const head = this.cyclic && last?.segments[0];
      if (head && ["chunk", "repeats", "rows"].every((name) => head[name] === one[name])) last.segments.push(one);
      else this.groups.push({ segments: [one], repeats: one.repeats });
    });
    this.count = 0;
    for (const group of this.groups) {
      Object.assign(group, { first: this.count, size: 0 });
      for (const one of group.segments) {
        one.offset = group.size;
        group.size += one.count;
        const key = `${one.phase} ${one.tower}`;
        one.piece = this.pieces.get(key) ?? 0;
        this.pieces.set(key, one.piece + group.repeats);
      }
      this.count += group.size * group.repeats;
    }
    this.replays = segments.some(({ phase, chunk, tower }) => phase === "replay" && (chunk ?? tower) !== null);
  }

  // Where the event of this number stands: {group, segment, repeat, at}.
  place(number) {
    const group = this.groups.findLast((one) => one.first <= number);
    const repeat = Math.floor((number - group.first) / group.size);
    const rest = (number - group.first) % group.size;
    const segment = group.segments.findLast((one) => one.offset <= rest);
    return { group, segment, repeat, at: rest - segment.offset };
  }

  number({ group, segment, repeat, at }) {
    return group.first + repeat * group.size + segment.offset + at;
  }

  // The number of the first event of this piece, moved by so many pieces.
  pieceFrom(number, by) {
    const place = this.place(number);
    const start = this.number({ ...place, at: 0 });
    if (by > 0) return Math.min(this.count - 1, start + place.segment.count);
    return number > start || !start ? start : this.number({ ...this.place(start - 1), at: 0 });
  }

  bytes(segment, at, repeat) {
    return this.kinds.map((_, kind) => segment.values[at * this.width + kind] + repeat * segment.net[kind]);
  }

  // The bytes of each kind just before an event.
  before(number) {
    const { group, segment, repeat, at } = this.place(number);
    if (at || number > group.first) {
      const earlier = this.place(number - 1);
      return this.bytes(earlier.segment, earlier.at, earlier.repeat);
    }
    const past = segment.before;
    return past ? this.bytes(past, past.values.length / this.width - 1, past.repeats - 1)
      : this.bytes(segment, at, repeat);
  }

  // What an event is, for a cursor: place, bytes of each kind, their sum, and what has just come and gone.
  read(number) {
    const place = this.place(number);
    const bytes = this.bytes(place.segment, place.at, place.repeat);
    const moved = this.before(number).map((past, kind) => bytes[kind] - past);
    return { ...place, number, bytes, total: sum(bytes), moved };
  }

  // "second forward and backward, passages, chunk 3 of 64 (8 rows)"
  words({ segment, repeat }) {
    const pieces = this.pieces.get(`${segment.phase} ${segment.tower}`);
    const parts = [phaseWords(segment.phase, this.replays).replace("\n", " ")];
    if (segment.tower !== null) parts.push(towerWord(segment.tower));
    if (pieces > 1) parts.push(`chunk ${counted(segment.piece + repeat + 1)} of ${counted(pieces)}`);
    return parts.join(", ") + (segment.rows ? ` (${counted(segment.rows)} row${segment.rows > 1 ? "s" : ""})` : "");
  }

  totals(segment) {
    const { values, sums = new Float64Array(segment.count) } = segment;
    for (let at = 0; !segment.sums && at < values.length; at += 1) sums[Math.floor(at / this.width)] += values[at];
    return Object.assign(segment, { sums }).sums;
  }

  highest(segment) {
    segment.top ??= this.totals(segment).reduce((best, total, at, all) => (total > all[best] ? at : best), 0);
    return segment.top;
  }
}

const sum = (values) => values.reduce((total, one) => total + one, 0);
const towerWord = (tower) => TOWER_WORDS[tower] ?? `tower ${tower}`;
const phaseWords = (phase, replays) => (phase === "first_forward" && !replays ? "forward" : PHASE_WORDS[phase] ?? phase);

// Panels {group, segment, repeat, pieces: [from, count], between, columns: [[bytes by kind]], start, stop}, spans, peak.
export function pictureOf(step) {
  const pieces = step.groups.flatMap((group) => piecesOf(step, group));
  const inner = (panel) => (panel.between ? 0 : panel.segment.count);
  const operations = sum(pieces.map(inner));
  const smallest = operations * Math.min(SMALLEST_SHARE, 0.5 / pieces.length);
  const weights = pieces.map((one) => Math.max(smallest, one.between ? 0.06 * operations : inner(one)));
  const all = sum(weights);
  let edge = 0;
  pieces.forEach((panel, at) => {
    panel.start = edge / all;
    edge += weights[at];
    panel.stop = edge / all;
    panel.columns = thinned(step, panel);
  });
  return finished(step, pieces, [...spansOf(step, pieces)]);
}

// One piece alone, with all its events.
export function zoomedOn(step, { group, segment, repeat }) {
  const panel = { ...piece(group, segment, repeat), start: 0, stop: 1 };
  panel.columns = Array.from({ length: segment.count }, (_, at) => step.bytes(segment, at, repeat));
  return finished(step, [panel], [{ label: step.words({ segment, repeat }), start: 0, stop: 1 }]);
}

function finished(step, panels, spans) {
  const peak = { total: -1 };
  for (const panel of panels) {
    panel.totals = panel.columns.map(sum);
    panel.highest = panel.totals.reduce((best, total) => (total > best ? total : best), 0);
    panel.totals.forEach((total, column) => {
      if (total <= peak.total) return;
      const width = (panel.stop - panel.start) / panel.columns.length;
      Object.assign(peak, { total, panel, bytes: panel.columns[column], x: panel.start + (column + 0.5) * width });
    });
  }
  return { step, panels, spans, peak };
}

const piece = (group, segment, repeat) =>
  ({ group, segment, repeat, pieces: [segment.piece + repeat, 1], between: false });

// The first repeat; the peaks of those between; the last.
function piecesOf(step, group) {
  const { segments, repeats } = group;
  const out = segments.map((segment) => piece(group, segment, 0));
  if (repeats > 2) {
    const peakOf = (one) => step.totals(one)[step.highest(one)] + Math.max(0, sum(one.net)) * (repeats - 1);
    const segment = segments.reduce((best, one) => (peakOf(one) > peakOf(best) ? one : best));
    const many = Math.min(repeats - 2, BETWEEN_COLUMNS);
    const apart = many > 1 ? (repeats - 3) / (many - 1) : 0;
    const columns = Array.from({ length: many },
      (_, n) => step.bytes(segment, step.highest(segment), halfEven(1 + n * apart)));
    out.push({ group, segment, repeat: 1, pieces: [segment.piece + 1, repeats - 2], between: true, columns });
  }
  return repeats > 1 ? [...out, ...segments.map((segment) => piece(group, segment, repeats - 1))] : out;
}

// At most as many columns as can be seen in the panel's share; of each bin the one with the most bytes.
function thinned(step, { segment, repeat, columns, start, stop }) {
  const totals = columns?.map(sum) ?? step.totals(segment);
  const bins = Math.min(totals.length, Math.max(8, halfEven((stop - start) * COLUMNS)));
  const edge = (bin) => (bin === bins ? totals.length : Math.trunc(bin * (totals.length / bins)));
  return Array.from({ length: bins }, (_, bin) => {
    let best = edge(bin);
    for (let at = best; at < edge(bin + 1); at += 1) if (totals[at] > totals[best]) best = at;
    return columns?.[best] ?? step.bytes(segment, best, repeat);
  });
}

function* spansOf(step, panels) {
  const byChunk = ({ segment }) => step.cyclic && segment.phase !== "average";
  const key = (one) => (byChunk(one) ? `${one.pieces} ${one.between}` : `${one.segment.phase} ${one.segment.tower}`);
  let members = [];
  for (const panel of [...panels, null]) {
    if (members.length && (!panel || key(panel) !== key(members[0]))) {
      const label = byChunk(members[0]) ? chunkLabel(members[0]) : phaseLabel(step, members);
      yield { label, start: members[0].start, stop: members.at(-1).stop, panels: members };
      members = [];
    }
    if (panel) members.push(panel);
  }
}

function phaseLabel(step, panels) {
  const { phase, tower } = panels[0].segment;
  const pieces = sum(panels.map((panel) => panel.pieces[1]));
  const below = [tower === null ? "" : towerWord(tower), pieces > 1 ? `× ${counted(pieces)}` : ""].filter(Boolean);
  return [phaseWords(phase, step.replays), below.join(" ")].filter(Boolean).join("\n");
}

const chunkLabel = ({ pieces: [from, many], between }) => (between ? `… × ${counted(many)}` : `chunk ${counted(from + 1)}`);

// Where an event stands in a picture, from 0 to 1; null where it is outside of it (of one piece alone).
export function xOf(picture, number) {
  const { group, segment, repeat, at } = picture.step.place(number);
  for (const panel of picture.panels) {
    if (panel.group !== group) continue;
    const width = panel.stop - panel.start;
    if (!panel.between && panel.segment === segment && panel.repeat === repeat) {
      return panel.start + ((at + 0.5) / segment.count) * width;
    }
    if (panel.between && repeat > 0 && repeat < group.repeats - 1) {
      return panel.start + ((repeat - 1 + (segment.offset + at + 0.5) / group.size) / panel.pieces[1]) * width;
    }
  }
  return null;
}

// The event at x, from 0 to 1.
export function eventAt(picture, x) {
  const { step, panels } = picture;
  const panel = panels.findLast((one) => one.start <= x) ?? panels[0];
  const share = Math.min(Math.max((x - panel.start) / (panel.stop - panel.start), 0), 1 - 1e-9);
  if (!panel.between) return step.number({ ...panel, at: Math.floor(share * panel.segment.count) });
  return panel.group.first + panel.group.size + Math.floor(share * panel.pieces[1] * panel.group.size);
}

// The number of the event with the most bytes of the whole step, the first one of several.
export function peakEvent({ step, peak: { panel } }) {
  const repeat = panel.between && sum(panel.segment.net) > 0 ? panel.group.repeats - 2 : panel.repeat;
  return step.number({ ...panel, repeat, at: step.highest(panel.segment) });
}

// The picture in words, with its numbers: phases in order, the peak, its largest parts; the budget is held against all.
export function describe(picture, { bytes, name }, all = picture) {
  const order = picture.spans.map(({ label }) => label.replaceAll("\n", " ")).join("; ");
  const { total } = picture.peak;
  const held = picture.peak.bytes.map((count, kind) => [picture.step.kinds[kind], count])
    .filter(([, count]) => count && count >= 0.05 * total).sort((a, b) => b[1] - a[1])
    .map(([kind, count]) => `${kind} ${formatBytes(count)}`);
  const [what, it] = picture === all ? ["step", "It"] : ["piece", `The step, with a peak of ${formatBytes(all.peak.total)},`];
  return `Bytes over one ${what}: ${order}. Peak ${formatBytes(total)}, of which ${held.join(", ")}. `
    + `${it} ${all.peak.total <= bytes ? "fits" : "does not fit"} within ${name} (${formatBytes(bytes)}).`;
}
