"""A step's laws as a few numbers, so that a page forecasts without Python: `page/laws.js` lays them end to end.

A bundle is of one model, its lengths, precision, device and loss; it holds for every batch, chunk, retained chunks and
optimizer, and what it says is what `gclib.memory.forecast` says, event by event. It is JSON of integers alone.

Letters: n rows (or queries), 2, 3, ...; each value is d0 + d1 (n - 2) + d2 (n - 2)(n - 3) / 2.
"""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gclib.course.memory_lab.answers import (
    BATCHES,
    BUDGETS,
    CHUNKS,
    MODELS,
    ONE_RANK,
    RETAINED,
    STEP_WORDS,
    LabSettings,
    fake_of,
)
from gclib.memory.devices import DEVICES, GPU_MEMORY_BYTES
from gclib.memory.fake_modules import check_inputs
from gclib.memory.fake_steps import FakeStep
from gclib.memory.forecast import MemoryForecast
from gclib.memory.laws import CHECKED, Law, LawBroken
from gclib.memory.ledger import KINDS
from gclib.memory.workload import OPTIMIZERS
from gclib.steps import STEPS
from gclib.support.processes import map_in_processes

FIXED = ("model", "lengths", "precision", "device", "negatives", "tied", "checkpointing", "symmetric", "tile_size")
FIXED += ("lora_rank", "ranks")
MOVED = ("step", "batch_size", "chunk_size", "retain_chunks", "optimizer")  # what one bundle holds for
MOST_KNOWN = 32  # bundles that are kept, some hundreds of kilobytes each
FAR = 1_048  # rows at which the loss's law is held against the loss itself
LENGTHS, PRECISIONS = (32, 64, 128, 256, 512), ("float32", "bf16 autocast")
LONGEST_PERIOD = 400  # events of one layer, at most, that are written once for all layers


def bundle_of(settings: LabSettings, parts: Iterable[tuple[str, bool]] | None = None) -> dict[str, Any]:
    """The laws of these settings' model, lengths, precision, device and loss, as plain lists of integers.

    parts: (step, whether of chunks of one row) for which laws are read off; None for all six. A part of which no law
    holds is left out, and a page says so. Raises ValueError for settings of which there is no forecast.
    """
    fake, workload = fake_of(settings), settings.workload
    check_inputs(workload, fake.encoders)
    table = _Table()
    laws = {}
    for step, single in product(STEPS, (False, True)) if parts is None else parts:
        try:
            laws[_part_name(step, single)] = _part(fake, settings, step, single, table)
        except LawBroken:
            continue
    widths = workload.widths
    return {
        "about": about(settings),
        "kinds": list(KINDS),
        "start": {name: fake.start_bytes(name).tolist() for name in OPTIMIZERS[1:]},
        "states": fake.state_bytes(),
        "inputs": [fake.input_bytes(tower, 1, widths[tower]) for tower in (0, 1)],
        "rooms": [fake.row_bytes(tower, widths[tower]) for tower in (0, 1)],
        "encoders": [fake.encoder_index(tower) for tower in (0, 1)],
        "laws": laws,
        **table.written(),
    }


def explicit_bundle(settings: LabSettings, forecast: MemoryForecast) -> dict[str, Any]:
    """These settings' own timeline, for a page to draw where it has no laws: of a loss in tiles, or of ranks."""
    table, segments = _Table(), []
    for segment in forecast.timeline:
        place = {name: getattr(segment, name) for name in ("phase", "tower", "chunk", "rows", "repeats")}
        base = segment.kind_bytes[0]
        events = {"events": table.sequence([segment.kind_bytes - base]), "base": base.tolist()}
        segments.append(place | events | {"net": segment.net_bytes.tolist()})
    return {"about": page_settings(settings), "kinds": list(KINDS), "segments": segments, **table.written()}


def page_settings(settings: LabSettings) -> dict[str, Any]:
    """The settings in the names of a bundle."""
    values = {name: getattr(settings, name) for name in (*FIXED, *MOVED)}
    return values | {"lengths": list(settings.lengths)}


def about(settings: LabSettings) -> dict[str, Any]:
    """What a bundle of laws is of."""
    return {name: value for name, value in page_settings(settings).items() if name in FIXED}


def write_bundles(
    folder: str | Path,
    *,
    models: Sequence[str] = MODELS,
    lengths: Sequence[int] = LENGTHS,
    precisions: Sequence[str] = PRECISIONS,
    devices: Sequence[str] = DEVICES,
    processes: int = 1,
    progress: bool = False,
) -> int:
    """Write the bundles of these models and lengths (queries as long as passages), one loss, and index.json; their
    bytes on disk. `page/lab.js` reads the folder, one bundle at a time. Lengths that a model can't read are left out.

    processes: how many read laws at once, an encoder each. progress: a bar. Raises ValueError for less than a process.
    """
    folder, files = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    encoders = list(product(models, precisions, devices))
    written = map_in_processes(partial(_write_lengths, folder, lengths), encoders, processes)
    for names in tqdm(written, "laws of encoders", len(encoders), disable=not progress):
        files |= names
    start = {"step": "grad_cache", "batch_size": 64, "chunk_size": 8, "optimizer": "adamw", "budget": "256 MiB"}
    start |= {"model": "mini" if "mini" in models else models[0], "length": 64 if 64 in lengths else lengths[0]}
    index = {"files": files, "cards": list(GPU_MEMORY_BYTES), "start": start}
    index["choices"] = _choices(models, lengths, precisions)
    (folder / "index.json").write_text(_text(index), "utf-8")
    return sum((folder / name).stat().st_size for name in ("index.json", *files.values()))


def _write_lengths(folder: Path, lengths: Sequence[int], encoder: tuple[str, str, str]) -> dict[str, str]:
    """The bundles of one model, precision and device; what the index calls them, and their files."""
    (model, precision, device), names = encoder, {}
    for length in lengths:
        try:
            bundle = bundle_of(LabSettings(model=model, length=length, precision=precision, device=device))
        except ValueError:
            continue
        name = f"{model}-{length}-{precision.replace(' ', '-')}-{device}.json"
        names[f"{model} {length} {precision} {device}"] = name
        (folder / name).write_text(_text(bundle), "utf-8")
    return names


def _choices(models: Sequence[str], lengths: Sequence[int], precisions: Sequence[str]) -> dict[str, list[Any]]:
    """(words, value) of each place of each control."""
    numbers = {"batch_size": BATCHES, "chunk_size": CHUNKS, "length": lengths, "retain_chunks": RETAINED}
    choices = {name: [[f"{value:,}", value] for value in values] for name, values in numbers.items()}
    choices["step"] = [[words, step] for step, words in STEP_WORDS.items()]
    choices["budget"] = [list(each) for each in BUDGETS.items()]
    for name, values in {"model": models, "precision": precisions}.items():
        choices[name] = [[value, value] for value in values]
    choices["optimizer"] = [["AdamW", "adamw"], ["SGD, no momentum", "sgd"]]
    return choices


_known: dict[str, tuple[set[tuple[str, bool]], dict[str, Any]]] = {}  # parts looked for, and the bundle with them


def known_bundle(settings: LabSettings) -> dict[str, Any] | None:
    """The bundle with the laws that these settings need, where `learn` has read them off; None where none holds."""
    _, bundle = _known.get(_text(about(settings)), (set(), {"laws": {}}))
    return bundle if all(_part_name(*part) in bundle["laws"] for part in parts_of(settings)) else None


def can_learn(settings: LabSettings) -> bool:
    """Whether laws for a page are read off these settings: of one process and a dense loss."""
    return settings.tile_size is None and settings.ranks == ONE_RANK


def is_learnt(settings: LabSettings) -> bool:
    """Whether `learn` has nothing to do."""
    known, _ = _known.get(_text(about(settings)), (set(), {}))
    return not can_learn(settings) or known >= set(parts_of(settings))


def learn(settings: LabSettings, parts: Iterable[tuple[str, bool]] = ()) -> None:
    """Read off the laws of these settings' step for every batch and chunk (of one row, or of several), and those of
    `parts`, beside those that are known so far.
    """
    key = _text(about(settings))
    known = _known.pop(key, (set(), {}))
    wanted = known[0] | {*parts_of(settings), *parts}
    _known[key] = known if wanted == known[0] else (wanted, bundle_of(settings, sorted(wanted)))
    if len(_known) > MOST_KNOWN:
        del _known[next(iter(_known))]


def _part_name(step: str, single: bool) -> str:
    return f"{step} {'single' if single else 'many'}"


def parts_of(settings: LabSettings) -> list[tuple[str, bool]]:
    """The parts that these settings' own forecast needs."""
    rows = (settings.batch_size, settings.passages)
    if settings.step == "naive":
        sizes = {settings.batch_size}
    elif settings.step == "accumulation":
        chunk = min(settings.chunk_size, settings.batch_size)
        sizes = {chunk, settings.batch_size % chunk}
    else:
        sizes = {size for count in rows for size in (settings.chunk_size * (count >= settings.chunk_size),)}
        sizes |= {count % settings.chunk_size for count in rows}
        sizes |= {settings.batch_size} & {1}  # of the loss
    return [(settings.step, single) for single in (False, True) if any(n and (n == 1) == single for n in sizes)]


def _part(fake: FakeStep, settings: LabSettings, step: str, single: bool, table: "_Table") -> Any:
    widths, negatives = settings.workload.widths, settings.negatives
    if step != "grad_cache":
        runs = [fake.whole(step, n, negatives, widths) for n in ((1,) if single else (2, 3, 4))]
        pieces = []
        for same in zip(*runs, strict=True):
            place, events = same[0][0], table.sequence(_differences([events for _, events in same]))
            pieces.append(place | {"events": events})
        return pieces
    chunks = {}
    for tower in (0, 1):
        own = [fake.encoder_index(tower), widths[tower]]
        for retained in (False, True):
            chunks[f"{tower} {retained}".lower()] = _chunk(fake, own, retained, single, table)
    return {"chunks": chunks, "loss": _loss(fake, settings, single, table)}


def _chunk(fake: FakeStep, own: Sequence[Any], retained: bool, single: bool, table: "_Table") -> list[dict[str, Any]]:
    tower, width = own
    runs = [fake.chunk(tower, width, n, retained) for n in ((1,) if single else (2, 3))]
    pieces = []
    for (phase, first), piece in runs[0].items():
        events = table.sequence(_differences([run[phase, first].kind_bytes for run in runs]))
        marks = {"room_at": piece.room_at, "encoded_at": piece.encoded_at}
        pieces.append({"phase": phase, "first": first, "events": events} | marks)
    return pieces


def _loss(fake: FakeStep, settings: LabSettings, single: bool, table: "_Table") -> dict[str, Any]:
    """The loss is a few operations: it is run at 2, 3 and 4 queries, and held against its law at few and at many."""

    def at(queries: int) -> tuple[np.ndarray, np.ndarray]:
        return fake.cached_loss((queries, queries * (1 + settings.negatives)), settings.workload.widths)

    runs = [at(n) for n in ((1,) if single else (2, 3, 4))]
    events, copies = (_differences([run[place] for run in runs]) for place in (0, 1))
    for n in () if single else (CHECKED, FAR):
        for differences, value in zip((events, copies), at(n), strict=True):
            if not np.array_equal(Law(tuple(differences)).at(n), value):
                raise LawBroken
    return {"events": table.sequence(events), "copies": table.sequence([each[None] for each in copies])}


def _differences(values: Sequence[np.ndarray]) -> list[np.ndarray]:
    return list(Law.through(values).differences)


class _Table:
    """Every change of bytes that occurs, once; and every sequence of them, with layers that repeat written once."""

    def __init__(self) -> None:
        self.changes: dict[str, int] = {}
        self.sequences: dict[str, int] = {}

    def sequence(self, differences: Sequence[np.ndarray]) -> int:
        """The number of a law's events, (events, kinds) for each of its differences."""
        moved = np.stack([np.diff(each, axis=0, prepend=0) for each in differences], axis=2)
        numbers = [self.changes.setdefault(_change(event), len(self.changes)) for event in moved]
        return self.sequences.setdefault(_text(folded(numbers)), len(self.sequences))

    def written(self) -> dict[str, Any]:
        """Both, in order of their numbers."""
        return {name: [json.loads(text) for text in getattr(self, name)] for name in ("changes", "sequences")}


def _change(event: np.ndarray) -> str:
    """[kind, d0, d1, ...] of each kind that moves; (kinds, differences) in."""
    moved = ([kind, *map(int, np.trim_zeros(event[kind], "b"))] for kind in np.flatnonzero(event.any(axis=1)).tolist())
    return _text(list(moved))


def folded(numbers: Sequence[int]) -> list[Any]:
    """The sequence with what follows itself written once: [times, [...]] among the numbers."""
    out, at = [], 0
    while at < len(numbers):
        period, times = _best_repeat(numbers, at)
        if times > 1 and period * (times - 1) > 2:
            out.append([times, folded(numbers[at : at + period])])
            at += period * times
        else:
            out.append(numbers[at])
            at += 1
    return out


def _best_repeat(numbers: Sequence[int], at: int) -> tuple[int, int]:
    """(length, times) of the block here that spares most when it is written once."""
    best = (1, 1)
    for period in range(1, min(LONGEST_PERIOD, (len(numbers) - at) // 2) + 1):
        if numbers[at] != numbers[at + period]:
            continue
        block, times = numbers[at : at + period], 1
        while numbers[at + times * period : at + (times + 1) * period] == block:
            times += 1
        if period * (times - 1) > best[0] * (best[1] - 1):
            best = (period, times)
    return best


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
