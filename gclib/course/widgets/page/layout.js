// Where the boxes and arrows of a step stand, for any number of rows and any width. Nothing here draws.

const between = (least, value, most) => Math.min(Math.max(value, least), most);

// The kind of a node: "graph" of "graph 3".
export const of = (key) => key.split(" ")[0];

// Where everything stands: {boxes: {node: {x, y, w, h}}, heads: [[text, x, y, anchor]], encoder, bar, height}.
export function layout(rows, width, caches) {
  const [text, slot, loss, gap] = [[58, 0.16, 104], [30, 0.075, 46], [54, 0.15, 96], [13, 0.045, 40]].map(
    ([least, share, most]) => between(least, share * width, most));
  const tall = rows.length > 8 ? 28 : 36;
  const encoder = { x: text + gap + 1, y: 22, w: width - text - slot - loss - 3 * gap - 2 };
  const slots = encoder.x + encoder.w + gap;
  const boxes = {};
  const heads = [["texts", text / 2, 14, "middle"], ["encoder, θ", encoder.x + encoder.w / 2, 14, "middle"]];
  let y = encoder.y;
  rows.forEach(([tower], at) => {
    if (at === 0 || tower !== rows[at - 1][0]) {
      heads.push([tower, encoder.x + 18, y + 15, "start"]);
      y += 22;
    }
    boxes[`text ${at}`] = { x: 1, y: y + 1, w: text - 2, h: tall - 2 };
    boxes[`graph ${at}`] = { x: encoder.x + 18, y, w: encoder.w - 26, h: tall };
    const high = caches ? tall / 2 - 1 : tall - 12;
    boxes[`rep ${at}`] = { x: slots, y: caches ? y : y + 6, w: slot, h: high };
    if (caches) boxes[`cache ${at}`] = { x: slots, y: y + tall / 2 + 1, w: slot, h: high };
    y += tall + 8;
  });
  encoder.h = y - encoder.y;
  boxes.loss = { x: width - loss - 1, y: encoder.y + (encoder.h - loss) / 2, w: loss, h: loss };
  const bar = { x: encoder.x, y: y + 18, w: encoder.w, h: 22 };
  const part = bar.w / rows.length;
  rows.forEach((_, at) => { boxes[`part ${at}`] = { ...bar, x: bar.x + at * part, w: part }; });
  const above = boxes.loss.y - 7;
  heads.push(["∂L/∂θ", bar.x - 8, bar.y + 15, "end"], ["loss", boxes.loss.x + loss / 2, above, "middle"]);
  return { boxes, heads, encoder, bar, height: bar.y + bar.h + 4 };
}

// The points of an edge, from one box's side to the other's.
export function route({ boxes, encoder, bar }, rows, [start, end, kind]) {
  const [from, to] = [boxes[start], boxes[end]];
  const middle = ({ y, h }) => y + h / 2;
  if (of(end) === "part") { // out of the graph, down beside the others, into the sum
    const x = encoder.x + 8;
    const into = to.x + to.w / 2;
    return [[from.x, middle(from) + 6], [x, middle(from) + 6], [x, bar.y - 9], [into, bar.y - 9], [into, bar.y]];
  }
  const back = start === "loss";
  const beside = kind === "backward" && (of(start) === "rep" || of(end) === "rep") ? 5 : 0; // the forward's arrow
  if (back || end === "loss") {
    const slot = back ? to : from;
    const y = boxes.loss.y + boxes.loss.h * ((Number((back ? end : start).split(" ")[1]) + 0.5) / rows.length);
    const points = [[slot.x + slot.w, middle(slot) + beside], [boxes.loss.x, y + (back ? 3 : -3)]];
    return back ? points.reverse() : points;
  }
  const y = middle(of(start) === "rep" || of(start) === "cache" ? from : to) + beside;
  return from.x < to.x ? [[from.x + from.w, y], [to.x, y]] : [[from.x, y], [to.x + to.w, y]];
}
