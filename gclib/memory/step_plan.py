"""`plan_step`: the chunks of a real batch that take the least time within a budget, for any trainer to apply.

Every candidate gives the same gradient; nothing but bytes and time are weighed. Bytes are those of
`gclib.memory.batch_laws`, laid end to end in the step's order, and are never below the ledger's. Time is counted
FLOPs: a forward and a backward of every chunk, another forward of those that are not retained, and the price of each
call (`gclib.chunks.price_of_a_call`), which makes fewer, fuller chunks the better ones where they fit.

Letters: B queries, N passages, C rows of a chunk, R retained chunks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gclib.chunks import cheapest_cut, price_of_a_call
from gclib.distributed import world_size
from gclib.losses.module import ContrastiveLoss
from gclib.memory.batch_laws import ChunkLaws, LossBytes, batch_step
from gclib.memory.calibration import load
from gclib.memory.devices import HOPPER_WORKSPACE_BYTES, memory_of
from gclib.memory.ledger import record_memory
from gclib.memory.plan import NEARLY, TILE_SIDES, StepPlan, fits_tiles, last_true
from gclib.memory.workload import OPTIMIZERS
from gclib.support.modules import modules_of
from gclib.support.validation import one_of, positive_int, refuse
from gclib.support.words import format_bytes
from gclib.towers import Tower, plan_jobs, row_lengths
from gclib.verify import Verification, check_towers

UNCALIBRATED = 1.05  # measured over forecast, at most, of the cards in data/recordings
SCALARS = 64  # bytes for what grad_cache_loss adds to the step: the loss once more, and the gradient that arrives
STEPS_AN_OCTAVE = 8  # of the sizes that are tried
PIECES = ("before", "after", "graph", "first", "later", "first_net", "later_net")  # of a chunk's bytes
FINE = 24  # sizes that are tried about the best of a family, at most


def plan_step(
    encoders: Sequence[Callable[..., Tensor]],
    inputs: Sequence[Any],
    loss_fn: Callable[..., Tensor],
    *,
    budget_bytes: int | None = None,
    optimizer: str | torch.optim.Optimizer | None = None,
) -> StepPlan:
    """The chunks and retained chunks for this batch that take the least time within the budget.

    encoders, inputs, loss_fn: as given to the step, under the same autocast. `.options()` are the keywords of
    `grad_cache_step` and `grad_cache_loss`; they are of this batch's lengths, so plan again for the next batch: the
    laws of an encoder are kept, and that takes milliseconds. step is "naive" where the whole batch at once is quickest
    (its options then are one retained chunk a tower). A time within 1 % counts as equal; of such plans the fewest,
    largest chunks are taken.

    budget_bytes: for all tensors of the step, those that are there before it (parameters, buffers, gradients, optimizer
    states, the batch) included: what the ledger counts. None: these, and of what is free on a card all but its
    workspace and the allocator's rounding (`python -m gclib calibrate` measures both), on a processor half. optimizer:
    the optimizer itself, or "adamw" or "sgd" for the states that it will have from the second step on.

    mask: none is counted; put a (B, N) one into loss_fn, or leave room for it.

    tile_size: the loss's own where a step with it fits. Where none does, a `ContrastiveLoss` is planned with tiles, and
    the plan is only good once the caller has agreed: `loss_fn.tile_size = plan.tile_size`.

    Held against every cut of a grid on 300 random jobs (`python tests/benchmarks/bench_plans.py 300`; each job is in
    results/plans.csv): none went over budget by the ledger. At the price of calls the sum of FLOPs and calls was the
    least in 284 jobs and at worst 1.026 of it; FLOPs alone are more, for a price of calls buys fuller chunks. Where
    calls cost nothing, FLOPs were at worst 1.043 of the fewest that fit. The bytes that are told are within 0.02 % of
    the ledger's in half of the jobs; where chunks of one row fit as if they were of two, they are up to 1.83 of it.

    Where encoders or loss can't be run with fake tensors, one small chunk is run and measured instead, and `reason`
    says so. Raises ValueError for what the step would refuse, and where nothing fits, with the bytes of the smallest.
    """
    return _planned(encoders, inputs, loss_fn, budget_bytes, optimizer, alike=False)


def plan_alike(encoders: Any, inputs: Any, loss_fn: Any, *, budget_bytes: int, optimizer: Any = None) -> StepPlan:
    """`plan_step` with one number for all towers' chunks: in tokens where that is as quick as in rows."""
    return _planned(encoders, inputs, loss_fn, budget_bytes, optimizer, alike=True)


def default_budget(encoders: Any, inputs: Any, loss_fn: Any, optimizer: Any = None) -> int:
    """The budget that `plan_step` takes where none is given."""
    towers = check_towers(encoders, inputs, loss_fn)
    return StartBytes.of(towers, loss_fn, optimizer).default_budget(towers[0].tensors[0].device)


def _planned(encoders: Any, inputs: Any, loss_fn: Any, budget: int | None, optimizer: Any, *, alike: bool) -> StepPlan:
    if budget is not None:
        positive_int("budget_bytes", budget)
    towers = _untrimmed_where_padded(check_towers(encoders, inputs, loss_fn))
    start = StartBytes.of(towers, loss_fn, optimizer)
    budget = start.default_budget(towers[0].tensors[0].device) if budget is None else budget
    fake = batch_step(towers)
    laws = [fake.chunk_laws(tower.number, tower.width or None) for tower in towers]
    cost = BatchCost(laws, towers, start, states=fake.state_bytes())
    measured = f"One small chunk was run and measured for this: {fake.why}" if fake.why else ""
    for tile in _tiles(loss_fn, towers):
        loss = fake.loss_bytes(loss_fn, towers, tile)
        best = quickest(cost, loss, budget, alike=alike)
        if best is not None:
            plan = _as_plan(cost, best, loss, tile, budget)
            return replace(plan, reason=f"{plan.reason} {measured}".rstrip())
    smallest = min(cost.chunks(cut, "own").least_peak(loss) for cuts in _families(cost) for cut in cuts)
    rule = f"must be at least the {format_bytes(smallest)} of the smallest step"
    raise refuse("budget_bytes", rule, format_bytes(budget))


def _as_plan(cost: "BatchCost", best: "Candidate", loss: LossBytes, tile: Any, budget: int) -> StepPlan:
    chunks, cut = best.chunks, best.chunks.cut
    peak, whole = chunks.peak(best.retained, loss), cost.chunks(cost.as_one)
    ratio = best.time / whole.time(whole.count)
    takes = f"{format_bytes(peak)} of {format_bytes(budget)}"
    if cut.whole:
        reason = f"The whole batch at once takes {takes}: nothing has to be encoded twice."
    else:
        unit = "rows" if cut.name == "chunk_size" else "tokens"
        sizes = " and ".join(f"{value:,}" for value in dict.fromkeys(cut.values))
        kept = "all" if best.retained == chunks.count else f"{best.retained:,}"
        reason = (
            f"{chunks.count:,} chunks of at most {sizes} {unit} take {takes} with {kept} of them retained: {ratio:.2f} "
            "of the naive step's time, by counted FLOPs and the price of calls."
        )
    cut_by = {"chunk_size": None, cut.name: cut.value}
    step = "naive" if cut.whole else "grad_cache"
    return StepPlan(
        step, **cut_by, retain_chunks=best.retained, tile_size=tile, peak_bytes=peak, time_ratio=ratio, reason=reason
    )


def _tiles(loss_fn: Any, towers: Sequence[Tower]) -> list[Any]:
    """The loss's own tile; then, of a `ContrastiveLoss`, smaller ones."""
    own = getattr(loss_fn, "tile_size", None)
    if not isinstance(loss_fn, ContrastiveLoss) or own == "auto":
        return [own]
    rows = max(tower.rows for tower in towers)
    return [own, *(tile for tile in TILE_SIDES if tile and tile < min(own or rows, rows) and fits_tiles(rows, tile))]


def _untrimmed_where_padded(towers: Sequence[Tower]) -> list[Tower]:
    """As the step takes them: untrimmed where rows change with their padding. New encoders are looked at."""
    if not any(tower.trimmed for tower in towers):
        return list(towers)
    cut = {"chunk_size": None, "chunk_tokens": max(tower.rows * tower.width for tower in towers) // 8 + 1}
    jobs = plan_jobs(towers, **cut, plan=None, sort_by_length=True, retain_chunks=0)
    padded = Verification(jobs, "first").find_padded()
    return [replace(tower, trimmed=(), width=0) if tower.number in padded else tower for tower in towers]


@dataclass(frozen=True)
class StartBytes:
    """What there is before the step. live: bytes that are there now, the batch included. coming: optimizer states that
    will be there from the second step on. gradients: whether some are there; then those that are missing are `coming`
    too.
    """

    live: int
    coming: int
    gradients: bool

    @classmethod
    def of(cls, towers: Sequence[Tower], loss_fn: Any, optimizer: Any) -> "StartBytes":
        """Of real modules, as the ledger counts them."""
        modules = {id(m): m for part in (*(t.encoder for t in towers), loss_fn) for m in modules_of(part)}
        states = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
        with record_memory(*modules.values(), optimizer=states) as ledger:
            ledger.on_phase("start", tensors=[("inputs", tensor) for tower in towers for tensor in tower.tensors])
        trained = {id(p): p for m in modules.values() for p in m.parameters() if p.requires_grad}.values()
        missing = sum(p.nbytes for p in trained if p.grad is None)
        present = any(p.grad is not None for p in trained)
        moments, count = _moments(optimizer)
        coming = missing * present + sum(moments * p.nbytes + count for p in trained)
        return cls(ledger.events[-1].total_bytes, coming, present)

    def default_budget(self, device: torch.device) -> int:
        """What is there and what is free for the step: half of it on a processor, on a card all but workspace and
        rounding, as calibrated or as on the cards that were recorded.
        """
        free, _ = memory_of(device)
        if device.type != "cuda":
            return self.live + free // 2
        calibrated = load(device)
        ratio, workspace = (UNCALIBRATED, HOPPER_WORKSPACE_BYTES)
        if calibrated is not None:
            ratio, workspace = max(calibrated.ratio, 1.0), calibrated.workspace_bytes
        return int((self.live + free) / ratio) - workspace


def _moments(optimizer: Any) -> tuple[int, int]:
    """States still to come, in numbers for each number of a parameter and bytes beside them: of AdamW, named, or of an
    optimizer of torch.optim that has taken no step (of others none: plan after their first step).
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return (2, 4) if one_of("optimizer", optimizer, OPTIMIZERS) == "adamw" else (0, 0)
    inner = getattr(optimizer, "optimizer", None)  # accelerate's wrapper holds it
    optimizer = inner if isinstance(inner, torch.optim.Optimizer) else optimizer
    if optimizer.state:
        return 0, 0

    def asked(*names: str) -> int:
        return sum(any(group[name] for group in optimizer.param_groups) for name in names)

    if isinstance(optimizer, torch.optim.SGD):
        return asked("momentum"), 0
    if isinstance(optimizer, torch.optim.RMSprop):
        return 1 + asked("momentum", "centered"), 4
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return 2 + asked("amsgrad"), 4
    if not type(optimizer).__module__.startswith("torch.optim"):
        return 0, 0
    return 2, 12  # torch.optim's others have no more, but for LBFGS


@dataclass(frozen=True)
class Cut:
    """How every tower is cut: the step's keyword and its value for each. whole: as the batch stands, into one chunk."""

    name: str
    values: tuple[int, ...]
    whole: bool = False

    @property
    def value(self) -> int | tuple[int, ...]:
        """One for all towers where they have the same."""
        return self.values[0] if len(set(self.values)) == 1 else self.values


@dataclass(frozen=True)
class RowWidths:
    """A tower's rows as the step cuts them: widths of all of them, in the order in which they are cut.

    breaks: how many of the rows up to each do not stand behind the one before. uncut: the width at which no column is
    left out.
    """

    widths: np.ndarray
    sort: bool
    call_tokens: int | None
    breaks: np.ndarray
    uncut: int

    @classmethod
    def of(cls, tower: Tower) -> "RowWidths":
        """Those of a real tower: as `gclib.towers` cuts it."""
        lengths = row_lengths(tower.inputs, tower.trimmed)
        call_tokens = price_of_a_call(tower.tensors[0].device) if world_size() == 1 else None
        sort, uncut = lengths is not None, tower.width or 1
        widths = np.array(lengths) if sort else np.full(tower.rows, uncut)
        order = np.argsort(-widths, kind="stable")
        return cls(widths[order], sort, call_tokens, np.cumsum(np.diff(order, prepend=-1) != 1), uncut)

    def chunks(self, name: str, value: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows, width) of each chunk, as `plan_chunks` cuts it by this keyword, and whether it is a view: of rows that
        stand side by side, with all columns.
        """
        if name == "chunk_tokens":
            sizes = self._packed(value)
        else:
            rows = len(self.widths)
            size = min(value, rows)
            if not self.sort or self.call_tokens is None or self.widths[0] == self.widths[-1]:
                sizes = [size] * (rows // size) + [rows % size] * (rows % size > 0)
            else:
                sizes = cheapest_cut(self._as_tuple, size, min(self.call_tokens, rows * int(self.widths[0])))
        counts = np.array(sizes)
        first = np.cumsum(counts) - counts
        widths, beside = self.widths[first], self.breaks[first] == self.breaks[first + counts - 1]
        return counts, widths, beside & (widths == self.uncut)

    @cached_property
    def _as_tuple(self) -> tuple[int, ...]:
        return tuple(self.widths.tolist())

    def _packed(self, budget: int) -> list[int]:
        """Rows of each chunk; the first row is the widest of its chunk, for widths fall."""
        sizes, start = [], 0
        while start < len(self.widths):
            sizes.append(min(max(1, budget // int(self.widths[start])), len(self.widths) - start))
            start += sizes[-1]
        return sizes


class BatchCost:
    """Bytes and time of every way to cut one batch.

    states: bytes of the generators' states that are recorded at once.
    """

    def __init__(self, laws: Sequence[ChunkLaws], towers: Sequence[Tower], start: "StartBytes", *, states: int):
        self.laws, self.states, self.present = laws, states, start.gradients
        self.start = start.live + start.coming + states
        self.rows = [RowWidths.of(tower) for tower in towers]
        self.as_one = Cut("chunk_size", tuple(tower.rows for tower in towers), whole=True)
        self.whole = [(np.array([t.rows]), np.array([t.width or 1]), np.array([True])) for t in towers]
        encoders = [tower.encoder for tower in towers]
        self.encoder = [next(n for n, other in enumerate(encoders) if other is encoder) for encoder in encoders]
        self.room = [tower.rows * law.row_bytes for tower, law in zip(towers, laws, strict=True)]
        self.call = [price_of_a_call(tower.kind) * law.token_flops for tower, law in zip(towers, laws, strict=True)]

    def chunks(self, cut: Cut, lone: str = "two") -> "Chunks":
        """The chunks of all towers for this cut. lone: how those of one row are reckoned (`ChunkLaws.peaks`)."""
        parts = zip(self.rows, cut.values, strict=True)
        return Chunks(self, cut, self.whole if cut.whole else [rows.chunks(cut.name, v) for rows, v in parts], lone)


class Chunks:
    """All chunks of a batch, tower after tower, as arrays; and what a step with R of them retained takes."""

    def __init__(self, cost: BatchCost, cut: Cut, parts: Sequence[tuple[np.ndarray, ...]], lone: str):
        self.cost, self.cut, self.lone = cost, cut, lone
        self.tower = np.concatenate([np.full(len(part[0]), n) for n, part in enumerate(parts)])
        self.count = len(self.tower)
        self.has_lone_rows = any((part[0] == 1).any() for part in parts)
        self.by_tokens = np.argsort(-np.concatenate([rows * widths for rows, widths, _ in parts]), kind="stable")

        self.parts = list(zip(cost.laws, parts, strict=True))
        self.trained = np.array([law.trained for law in cost.laws])[self.tower]
        call = np.array(cost.call)[self.tower]
        flops = np.concatenate([law.flops(*part[:2]) for law, part in self.parts], axis=1)
        self.forward_flops, self.backward_flops = flops[0] + call, flops[1] + 2 * call * self.trained

    @cached_property
    def bytes(self) -> dict[str, np.ndarray]:
        """(chunks,) by the names of the laws: the most of each chunk."""
        return {
            name: np.concatenate([law.peaks(name, *part, self.lone) for law, part in self.parts]) for name in PIECES
        }

    def reckoned(self, lone: str) -> "Chunks":
        """The same chunks, those of one row reckoned in this way."""
        return Chunks(self.cost, self.cut, [part for _, part in self.parts], lone)

    @cached_property
    def times(self) -> np.ndarray:
        """(chunks + 1,) by how many are retained, falling: FLOPs of the encoders, and those that could be done in the
        time of the calls.
        """
        saved = (self.forward_flops * self.trained)[self.by_tokens]
        least = self.forward_flops.sum() + self.backward_flops.sum()
        return least + np.append(np.cumsum(saved[::-1])[::-1], 0)

    def time(self, retained: int) -> float:
        """That of a step with so many chunks retained."""
        return float(self.times[retained])

    def peak(self, retained: int, loss: LossBytes) -> int:
        """The most bytes of a step that retains so many; never below the ledger's."""
        return max(self._peaks(retained, loss))

    def _peaks(self, retained: int, loss: LossBytes) -> tuple[int, int]:
        """The most bytes before the replay, which rise with the chunks that are retained, and in it, which fall."""
        kept = self._kept(retained)
        level, highest = self._first_forward(kept)
        first_alone = [law.alone() for law, part in self.parts if part[0][0] == 1 and self.lone == "own"]
        looks = [laws.look for laws in first_alone if laws]
        highest = max(highest, self.cost.start + max(looks, default=0), level + loss.highest)
        level += loss.left
        seen = set(self.cost.encoder) if self.cost.present else set()
        peaks = [highest, 0.0]
        for again in (False, True):
            level += again * self.cost.states
            for tower, encoder in enumerate(self.cost.encoder):
                members = np.flatnonzero((self.tower == tower) & (self.trained & ~kept if again else kept))
                if len(members):
                    nets, most = self._second(members, again=again, first=encoder not in seen)
                    peaks[again] = max(peaks[again], level + (np.cumsum(nets) - nets + most).max())
                    level += nets.sum()
                    seen.add(encoder)
        return tuple(int(np.ceil(peak)) + SCALARS for peak in peaks)

    def most_retained(self, budget_bytes: int, loss: LossBytes, at_least: int = 0) -> int | None:
        """The most chunks that can be retained within the budget; None where the step, or so many, does not fit.

        Of the batch as one chunk all are, or it is no candidate: with fewer, it comes again among the rows.
        """
        if self.peak(self.count, loss) <= budget_bytes:
            return self.count
        if self.cut.whole or at_least >= self.count:
            return None
        more = last_true(lambda n: self._peaks(at_least + n, loss)[0] <= budget_bytes, self.count - 1 - at_least)
        return at_least + more if self.peak(at_least + more, loss) <= budget_bytes else None

    def least_peak(self, loss: LossBytes) -> int:
        """The fewest bytes of a step with these chunks. Where a chunk is smaller than the states of the generators that
        an encoding again needs, it is that with all of them retained.
        """

        def rises(retained: int) -> bool:
            before, replay = self._peaks(retained, loss)
            return before < replay

        turn = last_true(rises, self.count - 1)
        return min(self.peak(retained, loss) for retained in (0, turn, turn + 1, self.count))

    def _kept(self, retained: int) -> np.ndarray:
        kept = np.zeros(self.count, dtype=bool)
        kept[self.by_tokens[:retained]] = True
        return kept

    def _first_forward(self, kept: np.ndarray) -> tuple[float, float]:
        """Bytes at its end, and the most. Chunks that are encoded again have less beside them now, and no graph."""
        cost, order = self.cost, np.concatenate([np.flatnonzero(~kept), np.flatnonzero(kept)])
        room = np.zeros(self.count)
        for tower, size in enumerate(cost.room):
            room[np.argmax(self.tower[order] == tower)] = size
        left = np.where(kept, self.bytes["graph"], cost.states)[order] + room
        now = cost.start + np.cumsum(left) - left
        peaks = now + np.maximum(self.bytes["before"][order], self.bytes["after"][order] + room)
        return cost.start + left.sum(), peaks[(kept | ~self.trained)[order]].max(initial=cost.start)

    def _second(self, members: np.ndarray, *, again: bool, first: bool) -> tuple[np.ndarray, np.ndarray]:
        """What each of these chunks leaves in its backward, with its second forward or not, and its most bytes."""
        nets, peaks = self.bytes["later_net"][members], self.bytes["later"][members]
        if first:
            nets[0], peaks[0] = (self.bytes[name][members[0]] for name in ("first_net", "first"))
        if again:
            graph, states = self.bytes["graph"][members], self.cost.states  # recorded in the first forward alone
            peaks = np.maximum(graph + peaks, np.maximum(self.bytes["before"], self.bytes["after"])[members]) - states
            nets = nets + graph - states
        return nets, peaks


@dataclass(frozen=True)
class Candidate:
    """A way to take the step that fits."""

    chunks: Chunks
    retained: int

    @property
    def time(self) -> float:
        """FLOPs, calls included."""
        return self.chunks.time(self.retained)


def quickest(cost: BatchCost, loss: LossBytes, budget_bytes: int, *, alike: bool = False) -> Candidate | None:
    """The candidate that takes the least time within the budget; of nearly equal ones that with the fewest chunks.

    alike: only those with one number for all towers, and the whole batch.
    """
    search, families = _Search(loss, budget_bytes), _families(cost)[: 3 if alike else None]
    for cuts in families:
        near = search.best_of([cost.chunks(cut) for cut in cuts])
        if near is not None and not near.whole:
            search.best_of([cost.chunks(cut) for cut in _between(cost, near)])
    search.settle()
    if not search.fitting:
        search.best_of([cost.chunks(cut, "own") for cuts in families for cut in cuts])
    best = [one for one in search.fitting if one.time <= search.least * NEARLY]
    return min(best, key=lambda one: (one.chunks.count, one.time), default=None)


class _Search:
    """The candidates that fit, the least of their times, and those that may fit: with chunks of one row, whose own laws
    take some seconds to find and are asked for only where a plan would be quicker by more than what counts as equal.
    """

    def __init__(self, loss: LossBytes, budget_bytes: int):
        self.loss, self.budget = loss, budget_bytes
        self.fitting: list[Candidate] = []
        self.hopes: list[Candidate] = []
        self.least = np.inf

    def best_of(self, tried: Sequence[Chunks]) -> Cut | None:
        """Look at all of these; the cut of the quickest that fits, or may fit."""
        seen = []
        for chunks in tried:
            own = self._candidate(chunks)
            if own is not None:
                self.fitting.append(own)
                self.least = min(self.least, own.time)
            hope = self._candidate(chunks.reckoned("line")) if chunks.lone == "two" and chunks.has_lone_rows else None
            if hope is not None and (own is None or hope.time < own.time):
                self.hopes.append(hope)
            seen += [one for one in (own, hope) if one is not None]
        return min(seen, key=lambda one: one.time).chunks.cut if seen else None

    def settle(self) -> None:
        """Ask for the laws of one row where that may be worth it."""
        for hope in sorted(self.hopes, key=lambda one: one.time):
            if hope.time * NEARLY < self.least:
                self.best_of([hope.chunks.reckoned("own")])

    def _candidate(self, chunks: Chunks) -> Candidate | None:
        """With as many retained as fit; None where it does not fit or takes longer than another one."""
        enough = int((chunks.times > self.least * NEARLY).sum())  # retained, for a time that counts as no longer
        retained = chunks.most_retained(self.budget, self.loss, enough) if enough <= chunks.count else None
        return None if retained is None else Candidate(chunks, retained)


def _between(cost: BatchCost, cut: Cut) -> list[Cut]:
    """Cuts up to the next size that was tried, larger and smaller, all towers' by the same factor."""
    step = 2 ** (1 / STEPS_AN_OCTAVE)
    largest = max(cut.values)
    low, high = int(largest / step) + 1, int(largest * step)
    if cut.name == "chunk_size":
        sizes = set(range(low, high + 1))
    else:  # chunks change where so many rows of a width just fit
        widths = {int(width) for rows in cost.rows for width in rows.widths}
        sizes = {size for width in widths for size in range(-(-low // width) * width, high + 1, width)}
    tried = sorted(sizes - {largest}, reverse=True)
    tried = tried[:: -(-len(tried) // FINE) or 1]
    cuts = [Cut(cut.name, tuple(max(1, value * size // largest) for value in cut.values)) for size in tried]
    return list(dict.fromkeys(cuts))


def _families(cost: BatchCost) -> list[list[Cut]]:
    """The cuts that are tried: the whole batch; the same rows, or tokens, a chunk for all towers; and such that the
    widest chunks of all towers take alike much.
    """
    rows = [len(each.widths) for each in cost.rows]
    widest = [int(each.widths[0]) for each in cost.rows]
    same_rows = [Cut("chunk_size", (size,) * len(rows)) for size in _sizes(1, max(rows))]
    most = max(int(r * w) for r, w in zip(rows, widest, strict=True))
    same_tokens = [Cut("chunk_tokens", (tokens,) * len(rows)) for tokens in _sizes(min(widest), most)]
    return [[cost.as_one], same_tokens, same_rows, _balanced(cost, rows, widest)]


def _balanced(cost: BatchCost, rows: Sequence[int], widest: Sequence[int]) -> list[Cut]:
    """Cuts by which the widest chunk of each tower takes about the same bytes."""
    a_row = [
        float(law.graph.peaks(np.array([2]), np.array([w]))[0]) / 2 for law, w in zip(cost.laws, widest, strict=True)
    ]
    if len(set(a_row)) == 1:
        return []
    cuts = []
    for size in _sizes(1, max(int(n * each / min(a_row)) for n, each in zip(rows, a_row, strict=True))):
        sizes = [max(1, min(n, int(size * min(a_row) / each))) for n, each in zip(rows, a_row, strict=True)]
        cuts.append(Cut("chunk_tokens", tuple(n * w for n, w in zip(sizes, widest, strict=True))))
        cuts.append(Cut("chunk_size", tuple(sizes)))
    return list(dict.fromkeys(cuts))


def _sizes(smallest: int, largest: int) -> list[int]:
    """From the largest down to the smallest, in even steps of their logarithm."""
    count = int(np.ceil(np.log2(largest / smallest) * STEPS_AN_OCTAVE))
    return sorted(
        {largest, smallest, *(round(largest / 2 ** (n / STEPS_AN_OCTAVE)) for n in range(count))}, reverse=True
    )
