// What the page's modules say of the cases in a JSON file, for a test to hold against Python: numbers as raw float64.
import fs from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, source, target] = process.argv.slice(2);
const { Laws } = await import(pathToFileURL(`${folder}/laws.js`));
const { Step, describe, eventAt, formatBytes, peakEvent, pictureOf, xOf } = await import(
  pathToFileURL(`${folder}/picture.js`));
const { bundles, cases, numbers = [], looks } = JSON.parse(fs.readFileSync(source));
const laws = bundles.map((bundle) => new Laws(bundle));
const file = fs.openSync(`${target}.bin`, "w");
const write = (values) => fs.writeSync(file, Buffer.from(values.buffer, values.byteOffset, values.byteLength));

function looked(segments, kinds, budget) {
  const step = new Step(segments, kinds);
  const picture = pictureOf(step);
  const all = Array.from({ length: step.count }, (_, at) => at);
  return {
    panels: picture.panels.map(({ start, stop, totals, pieces, between }) => ({ start, stop, totals, pieces, between })),
    spans: picture.spans.map(({ label, start, stop }) => [label, start, stop]),
    peak: [picture.peak.total, picture.peak.x, step.read(peakEvent(picture)).total],
    words: describe(picture, budget),
    totals: all.map((at) => step.read(at).total),
    moved: all.every((at) => at === 0 || step.read(at).moved.reduce((a, b) => a + b)
      === step.read(at).total - step.before(at).reduce((a, b) => a + b)),
    there: all.map((at) => Math.abs(eventAt(picture, xOf(picture, at)) - at)),
  };
}

const answers = cases.map(([bundle, settings, budget]) => {
  const segments = laws[bundle].timeline(settings);
  for (const { values, net } of segments) [values, net].forEach(write);
  const heads = segments.map((one) => [one.phase, one.tower, one.chunk, one.rows, one.repeats, one.values.length]);
  return { heads, look: looks ? looked(segments, laws[bundle].kinds, budget) : null };
});
fs.closeSync(file);
fs.writeFileSync(`${target}.json`, JSON.stringify({ answers, words: numbers.map(formatBytes) }));
