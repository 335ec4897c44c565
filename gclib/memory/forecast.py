"""The memory of a step that is never run: will it fit, before anything is allocated.

`forecast_step` lays the laws of `gclib.memory.laws` end to end in the order in which the step works. What it says of a
padded batch is, byte for byte, what the ledger says of the same step really run on the CPU.

A graphics card takes other operations than a processor, and less: device="cuda" forecasts those. Beside its tensors a
card has workspaces and the allocator's rounding, which `gclib.memory.devices` and `gclib.memory.calibration` are about.

Letters: B queries, K hard negatives, N = B * (1 + K) passages, Tq and Tp tokens, C rows of a chunk, R retained chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from gclib.memory.fake_modules import check_inputs
from gclib.memory.fake_steps import FakeStep, fake_step, relative
from gclib.memory.laws import LawBroken
from gclib.memory.ledger import KINDS, Segment
from gclib.memory.workload import Workload
from gclib.models.adapters import LoRA
from gclib.steps import STEPS
from gclib.support.validation import refuse

MOST_CHUNKS = 4_096  # that are run one by one with fake tensors


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
    gradient_checkpointing: bool | str = False,
    lora: LoRA | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    retain_chunks: int = 0,
    optimizer: str | None = None,
    device: str = "cpu",
    ranks: int = 1,
    parallel: str = "average",
) -> MemoryForecast:
    """Forecast the memory of `step`: "naive", "accumulation" or "grad_cache".

    config: whatever `Encoder.from_config` takes (a size, a preset, a transformers config, the path of a config.json),
    or two of them, one a tower; or encoders: two modules in training or eval mode (the same one twice: tied). tied
    (one encoder for both towers), pooling, gradient_checkpointing (also "reentrant", torch's older way), lora (what is
    trained beside frozen weights: `gclib.models.adapters.LoRA`) and dtype (of the parameters) say how encoders are made
    of a config; they are in training mode. Frozen parameters have neither gradients nor optimizer states. loss: any
    loss_fn(query_reps, passage_reps), by default `ContrastiveLoss()`.

    batch_size: B. negatives: K. For gradient caching exactly one of chunk_size, C rows a chunk, and chunk_tokens,
    padded tokens a chunk, each one int or one a tower; for accumulation chunk_size, in queries. query_length,
    passage_length: tokens, one int for a padded batch or one int a row (then rows are sorted and trimmed as the step
    does); None for a tower that is given pictures, of the size that its config states. autocast: the dtype of an
    ambient autocast. optimizer: None, "sgd" (no momentum) or "adamw": its states, as from the second step on;
    temporaries of its own update are not forecast. Gradients are zeroed to None before the step. device: "cpu" for
    the operations of a processor, "cuda" for those of a graphics card (`gclib.memory.cuda_operations`); no card is
    needed.

    ranks: W processes, of which one is forecast: then B, K and lengths are those of its own rows, all ranks have as
    many, and a loss that gathers (`ContrastiveLoss(across="gather")`) has W * N passages. What follows the step is
    forecast too: `average_gradients` copies all gradients into one flat tensor. parallel="ddp": encoders inside
    DistributedDataParallel, whose buckets are as big as the trained parameters and stay ("gradients" from the start).
    Both are equal to the ledger of a rank, which sees no buckets and no buffers inside a backend (gloo copies what it
    gathers). Weights that FSDP2 shards are no forecast but a formula: `gclib.memory.shards.rank_bytes`.

    The first forecast of a configuration runs its step with fake tensors; later ones run only the loss, of a config
    (and a loss that is a module) also those of a later session. Where no law holds, and for rows of unlike lengths,
    every forecast runs the whole step with fake tensors, up to `MOST_CHUNKS` chunks. Raises ValueError for arguments
    that do not fit.
    """
    return forecast_workload(Workload(**locals()))


def forecast_workload(workload: Workload, fake: FakeStep | None = None) -> MemoryForecast:
    """The forecast of a workload, as `forecast_step` gives it for the same keywords.

    fake: `fake_step` of a workload with these encoders and this loss, for who asks again and again.
    """
    fake = fake or fake_step(workload)
    check_inputs(workload, fake.encoders)
    start = fake.start_bytes(workload.optimizer)
    if workload.parallel == "ddp":
        start = start + _only(gradients=sum(p.nbytes for p in fake.trained))[0]
    after = [_average(fake, start, workload)] if workload.ranks > 1 else []
    if workload.padded:
        try:
            return MemoryForecast(workload.step, _Assembly(fake, start, workload).lay() + after)
        except LawBroken:
            pass
    return MemoryForecast(workload.step, _Assembly(fake, start, workload).run() + after, exact_law=False)


class _Assembly:
    """Lays pieces end to end: each begins where the one before ended."""

    def __init__(self, fake: FakeStep, start: np.ndarray, workload: Workload):
        self.fake, self.workload = fake, workload
        self.rows, self.widths = workload.rows, workload.widths
        self.now = start
        self.timeline = [_start(start)]

    def lay(self) -> list[Segment]:
        """The step's timeline: its pieces laid end to end, each from its law."""
        {"naive": self.naive, "accumulation": self.accumulation, "grad_cache": self.grad_cache}[self.workload.step]()
        return self.timeline

    def run(self) -> list[Segment]:
        """The same for rows of unlike lengths, and where no law holds: the whole step is run with fake tensors."""
        workload, options = self.workload, {}
        if workload.step == "accumulation":
            options["chunk_size"] = workload.chunk_rows[0]
            _refuse_too_many(-(-workload.batch_size // workload.chunk_rows[0]))
        elif workload.step == "grad_cache":
            options = {"plan": workload.chunks(), "retain_chunks": workload.retain_chunks}
            _refuse_too_many(sum(map(len, options["plan"])))
        for piece, events in relative(self.fake.run(STEPS[workload.step], self.rows, self.widths, **options)):
            self.add(piece.phase, events, tower=piece.tower, chunk=piece.chunk)
        return self.timeline

    def add(self, phase: str, events: np.ndarray, *, tower=None, chunk=None, rows=None, repeats: int = 1) -> None:
        """A piece with events relative to its start, `repeats` times."""
        net = events[-1]
        self.timeline.append(Segment(phase, tower, chunk, rows, repeats, self.now + events, net))
        self.now = self.now + repeats * net

    def entry(self) -> None:
        """The batch, and the generators as they are at entry."""
        inputs = sum(self.fake.input_bytes(tower, self.rows[tower], self.widths[tower]) for tower in (0, 1))
        self.add("first_forward", _only(inputs=inputs, states=self.fake.state_bytes()))

    def whole(self, queries: int) -> list[tuple[dict[str, Any], np.ndarray]]:
        """The pieces of the naive step, or of accumulation's first and later chunk of this many queries."""
        return self.fake.whole(self.workload.step, queries, self.workload.negatives, self.widths)

    def naive(self) -> None:
        """The whole batch at once."""
        for place, events in self.whole(self.rows[0]):
            self.add(**place, events=events, rows=self.rows[0])

    def accumulation(self) -> None:
        """First chunk, like later chunks, a short last one."""
        self.entry()
        size = min(self.workload.chunk_rows[0], self.rows[0])
        full, short = divmod(self.rows[0], size)
        for which, count, repeats in ((0, size, 1), (1, size, full - 1), (1, short, 1)):
            if count and repeats:
                self.add_chunks([piece for piece in self.whole(count) if piece[0]["chunk"] == which], count, repeats)

    def add_chunks(self, pieces: list, rows: int, repeats: int) -> None:
        """Accumulation's chunk, piece after piece; later chunks leave nothing behind, so one stands for all."""
        for place, events in pieces:
            held = {"kind_bytes": self.now + events, "net_bytes": 0 * events[-1]}
            self.timeline.append(Segment(**place, rows=rows, repeats=repeats, **held))
            self.now = self.now + events[-1]

    def grad_cache(self) -> None:
        """First forward, loss, the retained chunks' backward, replay."""
        self.entry()
        groups = chunk_groups(self.rows, self.widths, self.workload.chunk_rows, self.workload.retain_chunks)
        ordered = [group for retained in (False, True) for group in groups if group[3] == retained]
        seen: set[int] = set()
        for tower, rows, repeats, retained in ordered:
            self.add_group("first_forward", tower, rows, repeats, retained, tower not in seen)
            seen.add(tower)
        loss, copies = self.fake.cached_loss(self.rows, self.widths)
        self.add("loss", loss)
        seen = set()
        for retained, phase in ((True, "backward"), (False, "replay")):
            if phase == "replay":
                self.add("replay", _only(states=self.fake.state_bytes()))
            for tower, rows, repeats, _ in (group for group in ordered if group[3] == retained):
                encoder = self.fake.encoder_index(tower)
                freed = copies if phase == "replay" else 0 * copies
                self.add_group(phase, tower, rows, repeats, retained, encoder not in seen, freed=freed)
                copies = copies - freed
                seen.add(encoder)

    def add_group(
        self,
        phase: str,
        tower: int,
        rows: int,
        repeats: int,
        retained: bool,
        first: bool,
        freed: np.ndarray | int = 0,
    ) -> None:
        """`repeats` chunks of one size: the first may make room or create gradients, the others are alike.

        freed: bytes from before that the first lets go of when it has encoded.
        """
        pieces = self.fake.chunk(tower, self.widths[tower], rows, retained)
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
    retained = dict.fromkeys(range(len(groups)), 0)
    for number in sorted(retained, key=lambda n: -groups[n][1] * (widths[groups[n][0]] or 1)):
        retained[number] = min(retain, groups[number][2])
        retain -= retained[number]
    split = []
    for number, (tower, size, count) in enumerate(groups):
        split += [(tower, size, retained[number], True), (tower, size, count - retained[number], False)]
    return [group for group in split if group[2]]


def _average(fake: FakeStep, start: np.ndarray, workload: Workload) -> Segment:
    """The gradients' average over the ranks, once the step is done: batch, loss and gradients are there."""
    inputs = sum(map(fake.input_bytes, (0, 1), workload.rows, workload.widths))
    gradients = sum(p.nbytes for p in fake.trained)
    loss = fake.row_of(0, workload.widths[0])[1].itemsize
    before = start + _only(inputs=inputs, gradients=gradients, loss=loss)[0]
    events = fake.average()
    return Segment("average", None, None, None, 1, before + events, before + events[-1])


def _start(bytes_before: np.ndarray) -> Segment:
    """What there is before the step."""
    return Segment("start", None, None, None, 1, bytes_before[None], bytes_before)


def _refuse_too_many(chunks: int) -> None:
    if chunks > MOST_CHUNKS:
        rule = f"must make at most {MOST_CHUNKS:,} chunks where no law holds, for each of them is then run once"
        raise refuse("batch_size", rule, f"{chunks:,} chunks")


def _only(*, states: int = 0, **kind_bytes: int) -> np.ndarray:
    """One event, by kind; states: "random states"."""
    events = np.zeros((1, len(KINDS)), dtype=np.int64)
    for kind, size in (kind_bytes | {"random states": states}).items():
        events[0, KINDS.index(kind)] = size
    return events
