// A step's bytes from its laws, as gclib.memory.forecast lays them end to end: the same events, to the byte.
// A bundle is what gclib.course.memory_lab.bundles writes. Numbers are exact below 2^53 bytes; more is refused.

export class NoLaw extends Error {}

// The value of a law at n: d0 + d1 (n - 2) + d2 (n - 2)(n - 3) / 2; of one row, d0.
function valueAt(differences, n) {
  let [total, binomial] = [0, 1];
  for (let order = 0; order < differences.length; order += 1) {
    total += binomial * differences[order];
    binomial = (binomial * (n - 2 - order)) / (order + 1);
  }
  return total;
}

function unfolded(folded, into) {
  for (const entry of folded) {
    if (typeof entry === "number") into.push(entry);
    else for (let time = 0; time < entry[0]; time += 1) unfolded(entry[1], into);
  }
  return into;
}

// A bundle ready to be asked: its sequences unfolded on demand, once.
export class Laws {
  constructor(bundle) {
    Object.assign(this, { bundle, kinds: bundle.kinds, unfolded: new Map() });
  }

  // Whether this bundle is of these settings; names that only one of both has do not count.
  holdsFor(settings) {
    return Object.entries(this.bundle.about).every(
      ([name, value]) => !(name in settings) || JSON.stringify(settings[name]) === JSON.stringify(value));
  }

  // The events of a sequence at n, on top of the bytes at its start: n kinds an event, one after the other.
  events(number, n, start = this.kinds.map(() => 0)) {
    const width = this.kinds.length;
    if (!this.unfolded.has(number)) this.unfolded.set(number, unfolded(this.bundle.sequences[number], []));
    const steps = this.unfolded.get(number);
    const moved = [];
    const values = new Float64Array(steps.length * width);
    const now = Float64Array.from(start);
    for (let at = 0; at < steps.length; at += 1) {
      moved[steps[at]] ??= this.bundle.changes[steps[at]].map(([kind, ...law]) => [kind, valueAt(law, n)]);
      for (const [kind, bytes] of moved[steps[at]]) now[kind] += bytes;
      values.set(now, at * width);
    }
    return values;
  }

  // The step's segments in order: {phase, tower, chunk, rows, repeats, values, net}, bytes as the ledger counts them.
  timeline(settings) {
    if (this.bundle.segments) {
      return this.bundle.segments.map((one) => ({ ...one, net: Float64Array.from(one.net),
        values: this.events(one.events, 2, one.base) }));
    }
    const asked = JSON.stringify(settings);
    if (this.asked === asked) return this.segments;
    const assembly = new Assembly(this, settings);
    assembly[settings.step]();
    if (!Number.isSafeInteger(assembly.most)) throw new NoLaw("more than 8 PiB are not counted to the byte here");
    Object.assign(this, { asked, segments: assembly.segments });
    return this.segments;
  }
}

class Assembly {
  constructor(laws, settings) {
    this.laws = laws;
    this.bundle = laws.bundle;
    this.settings = settings;
    const queries = settings.batch_size;
    this.rows = [queries, queries * (1 + this.bundle.about.negatives)];
    this.now = Float64Array.from(this.bundle.start[settings.optimizer]);
    this.most = Math.max(...this.now); // bytes of one kind
    this.segments = [{ phase: "start", tower: null, chunk: null, rows: null, repeats: 1,
      values: this.now.slice(), net: this.now.slice() }];
  }

  part(step, rows) {
    const part = this.bundle.laws[`${step} ${rows === 1 ? "single" : "many"}`];
    if (!part) throw new NoLaw(`no law is known here for ${step} of ${rows} rows`);
    return part;
  }

  only(bytesByKind) {
    return this.now.map((bytes, kind) => bytes + (bytesByKind[this.laws.kinds[kind]] ?? 0));
  }

  events(number, n) { return this.laws.events(number, n, this.now); }

  // A piece with these events, `repeats` times. leaves: whether each adds to what is there, or the first alone.
  add(phase, values, { tower = null, chunk = null, rows = null, repeats = 1, leaves = true } = {}) {
    const last = values.length - this.now.length;
    const net = this.now.map((bytes, kind) => values[last + kind] - bytes);
    for (let at = 0; at < values.length; at += 1) if (values[at] > this.most) this.most = values[at];
    const kept = leaves ? net : net.map(() => 0);
    this.segments.push({ phase, tower, chunk, rows, repeats, values, net: kept });
    this.now = this.now.map((bytes, kind) => bytes + (leaves ? repeats : 1) * net[kind]);
  }

  entry() {
    const inputs = this.rows[0] * this.bundle.inputs[0] + this.rows[1] * this.bundle.inputs[1];
    this.add("first_forward", this.only({ inputs, "random states": this.bundle.states }));
  }

  naive() {
    const [rows] = this.rows;
    for (const { phase, tower, events } of this.part("naive", rows)) {
      this.add(phase, this.events(events, rows), { tower, rows });
    }
  }

  accumulation() {
    this.entry();
    const size = Math.min(this.settings.chunk_size, this.rows[0]);
    const full = Math.floor(this.rows[0] / size);
    for (const [which, rows, repeats] of [[0, size, 1], [1, size, full - 1], [1, this.rows[0] % size, 1]]) {
      const pieces = rows && repeats ? this.part("accumulation", rows).filter((one) => one.chunk === which) : [];
      for (const { phase, tower, chunk, events } of pieces) {
        this.add(phase, this.events(events, rows), { tower, chunk, rows, repeats, leaves: false });
      }
    }
  }

  grad_cache() {
    this.entry();
    const groups = chunkGroups(this.rows, this.bundle.about.lengths, this.settings);
    const ordered = [...groups.filter((group) => !group.retained), ...groups.filter((group) => group.retained)];
    let seen = new Set();
    for (const group of ordered) {
      this.addGroup("first_forward", group, !seen.has(group.tower));
      seen.add(group.tower);
    }
    const { loss } = this.part("grad_cache", this.rows[0]);
    let copies = this.laws.events(loss.copies, this.rows[0]);
    this.add("loss", this.events(loss.events, this.rows[0]));
    seen = new Set();
    for (const [retained, phase] of [[true, "backward"], [false, "replay"]]) {
      if (phase === "replay") this.add("replay", this.only({ "random states": this.bundle.states }));
      for (const group of ordered.filter((one) => one.retained === retained)) {
        const encoder = this.bundle.encoders[group.tower];
        const freed = phase === "replay" ? copies : null;
        this.addGroup(phase, group, !seen.has(encoder), freed);
        if (freed) copies = copies.map(() => 0);
        seen.add(encoder);
      }
    }
  }

  // Chunks of one size: the first may make room or create gradients, the others are alike.
  addGroup(phase, { tower, rows, count, retained }, first, freed = null) {
    const pieces = this.part("grad_cache", rows).chunks[`${tower} ${retained}`].filter((one) => one.phase === phase);
    const piece = pieces.find((one) => one.first);
    if (!piece) return; // a frozen tower: nothing is replayed
    if (first) {
      const events = this.withRoom(piece, rows, this.rows[tower] * this.bundle.rooms[tower]);
      const width = this.now.length;
      if (freed) for (let at = piece.encoded_at * width; at < events.length; at += 1) events[at] -= freed[at % width];
      this.add(phase, events, { tower, rows });
    }
    const repeats = count - first;
    const later = repeats && pieces.find((one) => !one.first);
    if (later) this.add(phase, this.events(later.events, rows), { tower, rows, repeats });
  }

  // A first chunk's events with the room for all representations: for one event an activation.
  withRoom(piece, rows, room) {
    const events = this.events(piece.events, rows);
    if (piece.room_at === null) return events;
    const width = this.now.length;
    const [activations, representations] = ["activations", "representations"].map((k) => this.laws.kinds.indexOf(k));
    events[piece.room_at * width + activations] += room;
    for (let at = piece.room_at + 1; at * width < events.length; at += 1) events[at * width + representations] += room;
    return events;
  }
}

// {tower, rows, count, retained} as gclib.memory.forecast.chunk_groups: the chunks with most tokens are retained first.
function chunkGroups(rows, widths, { chunk_size: size, retain_chunks: retain }) {
  const groups = rows.flatMap((count, tower) => [
    { tower, rows: size, count: Math.floor(count / size) }, { tower, rows: count % size, count: 1 },
  ]).filter((group) => group.rows && group.count);
  let left = retain;
  const tokens = (group) => group.rows * widths[group.tower];
  for (const group of [...groups].sort((a, b) => tokens(b) - tokens(a))) {
    group.kept = Math.min(left, group.count);
    left -= group.kept;
  }
  return groups.flatMap(({ tower, rows: chunk, count, kept }) => [
    { tower, rows: chunk, count: kept, retained: true }, { tower, rows: chunk, count: count - kept, retained: false },
  ]).filter((group) => group.count);
}
