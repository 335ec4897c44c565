"""The memory of a step that is never run: will it fit, before anything is allocated.

`forecast_step` lays the laws of `gclib.memory.laws` end to end in the order in which the step works. What it says of a
padded batch is, byte for byte, what the ledger says of the same step really run on the CPU.

A graphics card takes other operations than a processor, and less: device="cuda" forecasts those. Beside its tensors a
card has workspaces and the allocator's rounding, which `gclib.memory.devices` and `gclib.memory.calibration` are about.

Letters: B queries, K hard negatives, N = B * (1 + K) passages, Tq and Tp tokens, C rows of a chunk, R retained chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from gclib.chunks import Chunk, plan_chunks, price_of_a_call
from gclib.memory.fake_modules import fake_step
from gclib.memory.laws import FakeStep, LawBroken, picture_shape, relative
from gclib.memory.ledger import KINDS, Segment
from gclib.steps import STEPS
from gclib.support.validation import int_at_least, one_of, positive_int, refuse

OPTIMIZERS = (None, "sgd", "adamw")
MOST_CHUNKS = 4_096  # that are run one by one with fake tensors
LENGTHS = ("query_length", "passage_length")


@dataclass(frozen=True)
class MemoryForecast:
    """The bytes of a step over its operations, without the step.

    timeline: Segments in order; a run of like chunks is one Segment with `repeats`. exact_law: True where the laws gave
    it, False where they did not hold or rows differ in length, and the whole step was run with fake tensors.
    """

    step: str
    timeline: list[Segment] = field(repr=False)
    exact_law: bool = True

    @property
    def peak_bytes(self) -> int:
        """The most bytes of live tensors at any moment of the step."""
        return max(segment.peak_bytes for segment in self.timeline)

    def at_peak(self) -> dict[str, int]:
        """The bytes of each kind at the peak; they add up to `peak_bytes`."""
        peak = max(self.timeline, key=lambda segment: segment.peak_bytes)
        return dict(zip(KINDS, (int(bytes_) for bytes_ in peak.at_peak()), strict=True))


def forecast_step(
    step: str,
    *,
    config: Any = None,
    encoders: Sequence[nn.Module] | None = None,
    loss: Any = None,
    batch_size: int,
    negatives: int = 0,
    chunk_size: int | Sequence[int] | None = None,
    chunk_tokens: int | Sequence[int] | None = None,
    query_length: int | Sequence[int] | None,
    passage_length: int | Sequence[int] | None,
    tied: bool = True,
    pooling: str | None = None,
    gradient_checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    retain_chunks: int = 0,
    optimizer: str | None = None,
    device: str = "cpu",
) -> MemoryForecast:
    """Forecast the memory of `step`: "naive", "accumulation" or "grad_cache".

    config: whatever `Encoder.from_config` takes (a size, a preset, a transformers config, the path of a config.json),
    or two of them, one a tower; or encoders: two modules in training or eval mode (the same one twice: tied). tied
    (one encoder for both towers), pooling, gradient_checkpointing and dtype (of the parameters) say how encoders are
    made of a config; they are in training mode. loss: any loss_fn(query_reps, passage_reps), by default
    `ContrastiveLoss()`.

    batch_size: B. negatives: K. For gradient caching exactly one of chunk_size, C rows a chunk, and chunk_tokens,
    padded tokens a chunk, each one int or one a tower; for accumulation chunk_size, in queries. query_length,
    passage_length: tokens, one int for a padded batch or one int a row (then rows are sorted and trimmed as the step
    does); None for a tower that is given pictures, of the size that its config states. autocast: the dtype of an
    ambient autocast. optimizer: None, "sgd" (no momentum) or "adamw": its states, as from the second step on;
    temporaries of its own update are not forecast. Gradients are zeroed to None before the step. device: "cpu" for
    the operations of a processor, "cuda" for those of a graphics card (`gclib.memory.cuda_operations`); no card is
    needed.

    The first forecast of a configuration runs its step with fake tensors; later ones, also those of a later session,
    run only the loss. Where no law holds, and for rows of unlike lengths, every forecast runs the whole step with fake
    tensors, up to `MOST_CHUNKS` chunks. Raises ValueError for arguments that do not fit.
    """
    one_of("step", step, tuple(STEPS))
    one_of("optimizer", optimizer, OPTIMIZERS)
    positive_int("batch_size", batch_size)
    int_at_least("negatives", negatives, 0)
    int_at_least("retain_chunks", retain_chunks, 0)
    if retain_chunks and step != "grad_cache":
        raise refuse("retain_chunks", "must be 0 unless step is 'grad_cache'", retain_chunks)
    rows = (batch_size, batch_size * (1 + negatives))
    lengths = _checked_lengths(rows, query_length, passage_length)
    options = {"pooling": pooling, "gradient_checkpointing": gradient_checkpointing, "device": device}
    fake = fake_step(config, encoders, loss, tied, dtype, autocast, **options)
    _check_kinds_of_input(fake, lengths)
    cut = Cut(*_chunk_sizes(step, chunk_size, chunk_tokens))
    start = fake.start_bytes(optimizer)
    if not any(isinstance(length, list) for length in lengths):
        assemble, sizes = partial(_Assembly, fake, start, rows, lengths), cut.sizes(lengths)
        try:
            if step == "grad_cache":
                return MemoryForecast(step, assemble().grad_cache(sizes, retain_chunks))
            return MemoryForecast(step, assemble().whole(step, negatives, sizes[0] if sizes else None))
        except LawBroken:
            pass
    return MemoryForecast(step, _fake_run(fake, start, step, rows, lengths, cut, retain_chunks), exact_law=False)


@dataclass(frozen=True)
class Cut:
    """How towers are cut into chunks: `by` chunk_size or chunk_tokens, and one value a tower (none: not at all)."""

    by: str = "chunk_size"
    values: tuple[int, ...] = ()

    def sizes(self, widths: Sequence[int | None]) -> tuple[int, ...]:
        """Rows of a full chunk of each tower, all rows being this wide."""
        if self.by == "chunk_size":
            return self.values
        return tuple(max(1, value // (width or 1)) for value, width in zip(self.values, widths, strict=True))


def largest_batch(step: str, *, budget_bytes: int, largest: int = 2**20, **same: Any) -> int:
    """The largest batch_size, up to `largest`, whose forecast stays within budget_bytes; 0 where none does.

    `same`: the other arguments of `forecast_step`, without batch_size.
    """
    positive_int("budget_bytes", budget_bytes)

    def fits(batch_size: int) -> bool:
        return forecast_step(step, batch_size=batch_size, **same).peak_bytes <= budget_bytes

    return last_true(fits, positive_int("largest", largest))


def largest_chunk(step: str = "grad_cache", *, budget_bytes: int, batch_size: int, **same: Any) -> int:
    """The largest chunk_size, up to the tower with the most rows, whose forecast stays within budget_bytes; 0 for none.

    step: "grad_cache" or "accumulation". `same`: the other arguments of `forecast_step`, without chunk_size.
    """
    positive_int("budget_bytes", budget_bytes)
    one_of("step", step, ("grad_cache", "accumulation"))
    most = batch_size * (1 + same.get("negatives", 0)) if step == "grad_cache" else batch_size

    def fits(chunk_size: int) -> bool:
        given = {"batch_size": batch_size, "chunk_size": chunk_size, **same}
        return forecast_step(step, **given).peak_bytes <= budget_bytes

    return last_true(fits, most)


def choose_retained(budget_bytes: int, **same: Any) -> int:
    """The largest `retain_chunks` whose forecast stays within budget_bytes; ValueError where not even 0 does.

    `same`: the other arguments of `forecast_step` for "grad_cache", without retain_chunks.
    """
    positive_int("budget_bytes", budget_bytes)
    peak = forecast_step("grad_cache", **same).peak_bytes
    if peak > budget_bytes:
        raise refuse("budget_bytes", f"must be at least the {peak} bytes of a step that retains nothing", budget_bytes)

    def fits(retained: int) -> bool:
        return forecast_step("grad_cache", **same, retain_chunks=retained).peak_bytes <= budget_bytes

    return last_true(fits, _count_chunks(**same))


class _Assembly:
    """Lays pieces end to end: each begins where the one before ended."""

    def __init__(self, fake: FakeStep, start: np.ndarray, rows: tuple[int, int], widths: tuple[Any, Any]):
        self.fake, self.rows, self.widths = fake, rows, widths
        self.now = start
        self.timeline = [Segment("start", None, None, None, 1, start[None], start)]

    def add(self, phase: str, events: np.ndarray, *, tower=None, chunk=None, rows=None, repeats: int = 1) -> None:
        """A piece with events relative to its start, `repeats` times."""
        net = events[-1]
        self.timeline.append(Segment(phase, tower, chunk, rows, repeats, self.now + events, net))
        self.now = self.now + repeats * net

    def entry(self) -> None:
        """The batch, and the generators as they are at entry."""
        inputs = sum(self.fake.input_bytes(tower, self.rows[tower], self.widths[tower]) for tower in (0, 1))
        self.add("first_forward", _only(inputs=inputs, states=self.fake.state_bytes()))

    def whole(self, step: str, negatives: int, chunk_size: int | None) -> list[Segment]:
        """The naive step, or accumulation: first chunk, like later chunks, a short last one."""
        queries = self.rows[0]
        if step == "naive":
            for place, events in self.fake.whole(step, queries, negatives, self.widths):
                self.add(place.phase, events, tower=place.tower, rows=queries)
            return self.timeline
        self.entry()
        size = min(chunk_size, queries)
        full, short = divmod(queries, size)
        for which, count, repeats in ((0, size, 1), (1, size, full - 1), (1, short, 1)):
            if count and repeats:
                pieces = self.fake.whole(step, count, negatives, self.widths)
                self.add_chunks([piece for piece in pieces if piece[0].chunk == which], count, repeats)
        return self.timeline

    def add_chunks(self, pieces: list, rows: int, repeats: int) -> None:
        """Accumulation's chunk, piece after piece; later chunks leave nothing behind, so one stands for all."""
        for place, events in pieces:
            held = self.now + events
            self.timeline.append(Segment(place.phase, place.tower, place.chunk, rows, repeats, held, 0 * events[-1]))
            self.now = self.now + events[-1]

    def grad_cache(self, sizes: Sequence[int], retain: int) -> list[Segment]:
        """First forward, loss, the retained chunks' backward, replay."""
        self.entry()
        groups = chunk_groups(self.rows, self.widths, sizes, retain)
        ordered = [group for kept in (False, True) for group in groups if group[3] == kept]
        seen: set[int] = set()
        for tower, rows, repeats, kept in ordered:
            self.add_group("first_forward", tower, rows, repeats, kept, tower not in seen)
            seen.add(tower)
        loss, copies = self.fake.cached_loss(self.rows, self.widths)
        self.add("loss", loss)
        seen = set()
        for kept, phase in ((True, "backward"), (False, "replay")):
            if phase == "replay":
                self.add("replay", _only(states=self.fake.state_bytes()))
            for tower, rows, repeats, _ in (group for group in ordered if group[3] == kept):
                encoder = self.fake.encoder_index(tower)
                freed = copies if phase == "replay" else 0 * copies
                self.add_group(phase, tower, rows, repeats, kept, encoder not in seen, freed=freed)
                copies = copies - freed
                seen.add(encoder)
        return self.timeline

    def add_group(
        self,
        phase: str,
        tower: int,
        rows: int,
        repeats: int,
        kept: bool,
        first: bool,
        freed: np.ndarray | int = 0,
    ) -> None:
        """`repeats` chunks of one size: the first may make room or create gradients, the others are alike.

        freed: bytes from before that the first lets go of when it has encoded.
        """
        pieces = self.fake.chunk(tower, self.widths[tower], rows, kept)
        if (phase, first) not in pieces:
            return  # a frozen tower: nothing is replayed
        if first:
            piece = pieces[phase, True]
            events = piece.with_room(self.rows[tower] * self.fake.row_bytes(tower, self.widths[tower]))
            events[piece.encoded_at :] -= freed
            self.add(phase, events, tower=tower, rows=rows)
            repeats -= 1
        if repeats:
            self.add(phase, pieces[phase, False].kind_bytes, tower=tower, rows=rows, repeats=repeats)


def chunk_groups(
    rows: Sequence[int], widths: Sequence[int], sizes: Sequence[int], retain: int
) -> list[tuple[int, int, int, bool]]:
    """(tower, rows, how many, retained?): `gclib.chunks.schedule` for equal lengths, counted and not listed."""
    groups = []
    for tower, (count, size) in enumerate(zip(rows, sizes, strict=True)):
        full, short = divmod(count, size)
        groups += [(tower, size, full)] * bool(full) + [(tower, short, 1)] * bool(short)
    kept = dict.fromkeys(range(len(groups)), 0)
    for number in sorted(kept, key=lambda n: -groups[n][1] * (widths[groups[n][0]] or 1)):
        kept[number] = min(retain, groups[number][2])
        retain -= kept[number]
    split = []
    for number, (tower, size, count) in enumerate(groups):
        split += [(tower, size, kept[number], True), (tower, size, count - kept[number], False)]
    return [group for group in split if group[2]]


def _fake_run(
    fake: FakeStep, start: np.ndarray, step: str, rows: Sequence[int], lengths: Any, cut: Cut, retain: int
) -> list[Segment]:
    """The whole step with fake tensors: for rows of unlike lengths, and where no law holds."""
    widths = [max(length) if isinstance(length, list) else length for length in lengths]
    options: dict[str, Any] = {}
    if step == "accumulation":
        options["chunk_size"] = cut.values[0]
        _refuse_too_many(-(-rows[0] // cut.values[0]))
    elif step == "grad_cache":
        options["plan"] = [_plan(*given, cut.by, fake.device) for given in zip(lengths, rows, cut.values, strict=True)]
        options["retain_chunks"] = retain
        _refuse_too_many(sum(map(len, options["plan"])))
    ledger = fake.run(STEPS[step], rows, widths, **options)
    now, timeline = start, [Segment("start", None, None, None, 1, start[None], start)]
    for segment, events in relative(ledger):
        timeline.append(Segment(segment.phase, segment.tower, segment.chunk, None, 1, now + events, events[-1]))
        now = now + events[-1]
    return timeline


def _refuse_too_many(chunks: int) -> None:
    if chunks > MOST_CHUNKS:
        rule = f"must make at most {MOST_CHUNKS:,} chunks where no law holds, for each of them is then run once"
        raise refuse("batch_size", rule, f"{chunks:,} chunks")


def _plan(length: Any, rows: int, value: int, by: str, device: str) -> list[Chunk]:
    lengths = length if isinstance(length, (list, tuple)) else [length or 1] * rows
    return plan_chunks(lengths, call_tokens=price_of_a_call(device), **{by: value})


def _count_chunks(
    *,
    batch_size,
    query_length,
    passage_length,
    negatives=0,
    chunk_size=None,
    chunk_tokens=None,
    device="cpu",
    **_: Any,
) -> int:
    """How many chunks the arguments of a gradient caching forecast make."""
    rows = (batch_size, batch_size * (1 + negatives))
    cut, lengths = Cut(*_chunk_sizes("grad_cache", chunk_size, chunk_tokens)), (query_length, passage_length)
    if any(isinstance(length, (list, tuple)) for length in lengths):
        return sum(len(_plan(*given, cut.by, device)) for given in zip(lengths, rows, cut.values, strict=True))
    return sum(-(-count // size) for count, size in zip(rows, cut.sizes(lengths), strict=True))


def _only(*, inputs: int = 0, states: int = 0) -> np.ndarray:
    events = np.zeros((1, len(KINDS)), dtype=np.int64)
    events[0, KINDS.index("inputs")] = inputs
    events[0, KINDS.index("random states")] = states
    return events


def _chunk_sizes(step: str, chunk_size: Any, chunk_tokens: Any) -> tuple[str, tuple[int, ...]]:
    given = {"chunk_size": chunk_size, "chunk_tokens": chunk_tokens}
    allowed = {"naive": (), "accumulation": ("chunk_size",), "grad_cache": ("chunk_size", "chunk_tokens")}[step]
    for name, value in given.items():
        if value is not None and name not in allowed:
            raise refuse(name, f"must be None for step {step!r}", value)
    if step == "naive":
        return "chunk_size", ()
    if chunk_size is not None and chunk_tokens is not None:
        raise refuse("chunk_size", "and chunk_tokens: exactly one of them must be given", given)
    name = "chunk_size" if chunk_tokens is None else "chunk_tokens"
    value = given[name]
    several = isinstance(value, (list, tuple))
    if several and (step == "accumulation" or len(value) != 2):
        raise refuse(name, "must be one int, or for gradient caching one a tower", value)
    return name, tuple(positive_int(name, each) for each in (value if several else (value, value)))


def _checked_lengths(rows: Sequence[int], query_length: Any, passage_length: Any) -> tuple[Any, Any]:
    checked = []
    for name, count, length in zip(LENGTHS, rows, (query_length, passage_length), strict=True):
        if isinstance(length, Sequence) and not isinstance(length, str):
            if len(length) != count:
                raise refuse(name, f"must be one int or one for each of the {count} rows", f"{len(length)} values")
            checked.append([positive_int(name, value) for value in length])
        else:
            checked.append(None if length is None else positive_int(name, length))
    return checked[0], checked[1]


def _check_kinds_of_input(fake: FakeStep, lengths: Sequence[Any]) -> None:
    """Tokens have a length, pictures have none."""
    for name, encoder, length in zip(LENGTHS, fake.encoders, lengths, strict=True):
        pictures = picture_shape(encoder) is not None
        if pictures and length is not None:
            raise refuse(name, "must be None for a tower that is given pictures", length)
        if not pictures and length is None:
            raise refuse(name, "must be a number of tokens, or one a row, for a tower that reads tokens", length)


def last_true(fits: Any, largest: int) -> int:
    """The largest n up to `largest` with fits(n), for a fits that turns from True to False once; 0 where none."""
    low, high = 0, 1
    while high <= largest and fits(high):
        low, high = high, high * 2
    high = min(high, largest + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
