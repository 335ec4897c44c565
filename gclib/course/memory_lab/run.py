"""One step of the memory lab, run for real in a thread of its own: live bytes, progress, Stop.

The thread builds a model, a batch and the optimizer's states on the device that is given (by itself on a CUDA card
where there is one, else on the processor), runs the step under the ledger and lets go of everything again. Afterwards
the random generators are as they were, no gradient is left, and a card has its memory back, also where it was not
enough.
"""

import gc
import re
import threading
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.chunks import Chunk
from gclib.course.memory_lab.advice import way_out
from gclib.course.memory_lab.answers import PRECISIONS, LabSettings, forecast_of, loss_of
from gclib.course.threads import Worker
from gclib.data.corpus import fingerprint, installed_sources
from gclib.data.pairs import TextPair, load_pairs
from gclib.data.tokens import tokenize_pairs, train_tokenizer
from gclib.memory.devices import device_words, fill_workspaces, memory_of, run_device
from gclib.memory.ledger import MemoryLedger, record_memory
from gclib.memory.timeline import PHASE_WORDS, TimelinePicture, is_heading
from gclib.models.adapters import add_lora
from gclib.models.encoder import Encoder
from gclib.randomness import RandomState
from gclib.steps import accumulation_step, grad_cache_step, naive_step
from gclib.support.files import cache_folder
from gclib.support.words import format_bytes

PAIRS = 2_000  # real texts to draw a batch from; a larger batch repeats them


class RunStopped(Exception):
    """Raised inside the step, from on_phase, when Stop was asked for."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `ending`: "finished", "stopped" or "failed"; `error` in words where it failed.

    peak_bytes: the ledger's. allocated_peak_bytes: what CUDA's own allocator had given out at most during the step,
    beyond what was there before the run; None on the processor.
    """

    ending: str
    peak_bytes: int
    seconds: float
    loss: float | None = None
    error: str = ""
    allocated_peak_bytes: int | None = None


class LiveRun:
    """One step of these settings. `start` runs it in a thread, `run` in this one; `stop` ends it between chunks.

    device: where it runs; None for CUDA where PyTorch can use it, else the processor. ValueError for another one.
    settings: of that device, whatever those given say. encoder: one tower or two, built on the way; afterwards on the
    processor, and None where the run failed. ledger: grows while it runs. result: None until it has ended. texts: what
    the batch was made of, in words.
    """

    def __init__(self, settings: LabSettings, device: str | torch.device | None = None):
        self.device = run_device(device)
        self.settings = replace(settings, device=self.device.type)
        self.pieces = count_pieces(settings)
        self.begun = 0
        self.stage = "starting"
        self.texts = ""
        self.encoder: nn.ModuleList | None = None
        self.ledger: MemoryLedger | None = None
        self.result: RunResult | None = None
        self._before_bytes: int | None = None
        self._stop = threading.Event()
        self._trace = _Trace()
        self._thread = Worker(self.run, name="memory-lab-run")

    @property
    def done(self) -> int:
        """Pieces of the step that are finished, of `pieces`."""
        ended = self.result is not None and self.result.ending == "finished"
        return self.pieces if ended else max(0, self.begun - 1)

    @property
    def running(self) -> bool:
        """Whether the thread is at work."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Run in a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the step to end before its next chunk; the naive step, before its next phase."""
        self._stop.set()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the thread to end."""
        self._thread.join(seconds)

    def run(self) -> RunResult:
        """Run the step here and now. Whatever goes wrong is in the result's words, and is not raised."""
        start = time.perf_counter()
        try:
            self.result = self._run(start)
        except Exception as problem:  # a card that answers nothing any more fails in the clearing up too
            peak = self.ledger.peak_bytes if self.ledger else 0
            error = f"{type(problem).__name__}: {problem}"
            self.result = RunResult("failed", peak, time.perf_counter() - start, error=error)
        return self.result

    def _run(self, start: float) -> RunResult:
        ending, loss, error, full = "finished", None, "", None
        with RandomState.record([torch.empty(0, device=self.device)]).replay():
            try:
                loss = self._step()
            except RunStopped:
                ending = "stopped"
            except torch.OutOfMemoryError as problem:
                ending, full = "failed", str(problem)
            except Exception as problem:  # a thread has nobody to raise to: it is told in words
                ending, error = "failed", f"{type(problem).__name__}: {problem}"
        peak, allocated = self.ledger.peak_bytes if self.ledger else 0, self._allocated_peak()
        self._let_go(failed=ending == "failed")
        if full is not None:
            error = self._out_of_memory(full)
        return RunResult(ending, peak, time.perf_counter() - start, loss, error, allocated)

    def trace(self, picture: TimelinePicture) -> tuple[np.ndarray, np.ndarray]:
        """The run so far as a line over the forecast's picture: x from 0 to 1, bytes."""
        return self._trace.line(self.ledger, picture) if self.ledger else (np.zeros(0), np.zeros(0))

    def _step(self) -> float:
        self.stage = "building the model"
        self._check_stop()
        before = fill_workspaces(self.device)
        precision = PRECISIONS[self.settings.precision]
        towers = [self._new_encoder(precision.get("dtype", torch.float32)) for _ in range(2 - self.settings.tied)]
        self.encoder = nn.ModuleList(towers)
        self.stage = "reading texts"
        inputs, self.texts = make_batch(self.settings)
        inputs = [{name: value.to(self.device) for name, value in tower.items()} for tower in inputs]
        self._check_stop()
        optimizer = warm_optimizer(self.encoder, self.settings.optimizer)
        loss_fn = loss_of(self.settings.tile_size, self.settings.symmetric)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before_bytes = before
        counted = "cuda" if self.device.type == "cuda" else None
        with record_memory(*towers, optimizer=optimizer, device=counted) as self.ledger:
            step, options = step_of(self.settings)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled="autocast" in precision):
                loss = step([towers[0], towers[-1]], inputs, loss_fn, on_phase=self._on_phase, **options)
        return loss.item()

    def _new_encoder(self, dtype: torch.dtype) -> Encoder:
        encoder = Encoder.from_config(self.settings.model).to(dtype)
        if self.settings.lora is not None:
            add_lora(encoder, self.settings.lora)
        if self.settings.checkpointing:
            encoder.checkpoint_activations()
        return encoder.to(self.device)

    def _on_phase(self, phase: str, **place: Any) -> None:
        self._check_stop()
        before = len(self.ledger.pieces)
        self.ledger.on_phase(phase, **place)
        if len(self.ledger.pieces) > before and not is_heading(**self.ledger.pieces[-1][1]):
            self.begun += 1
            self.stage = PHASE_WORDS[phase].replace("\n", " ")

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise RunStopped

    def _allocated_peak(self) -> int | None:
        """What the card's allocator had given out at most, beyond what was there before; None where no step began."""
        if self._before_bytes is None:
            return None
        return torch.cuda.max_memory_allocated(self.device) - self._before_bytes

    def _let_go(self, *, failed: bool) -> None:
        """No gradient stays, and on a card nothing at all: the encoder leaves it, or is gone where the run failed."""
        if self.encoder is not None:
            self.encoder.zero_grad(set_to_none=True)
        if failed:
            self.encoder = None
            gc.collect()  # an error may be held by a circle of its own frames, and these hold tensors
        if self.device.type == "cuda":
            if self.encoder is not None:
                self.encoder.to("cpu")
            torch.cuda.empty_cache()

    def _out_of_memory(self, message: str) -> str:
        """PyTorch's message as a person needs it: what was asked, what there is, and what to change."""
        asked = re.search(r"allocate ([\d.,]+ (?:[KMGT]iB|bytes))", message)
        held = f", and had held {format_bytes(self.ledger.peak_bytes)} at most" if self.ledger else ""
        place = f"in piece {self.begun:,} of {self.pieces:,}, {self.stage}" if self.begun else self.stage
        free, total = memory_of(self.device)
        change = way_out(self.settings, min(total, forecast_of(self.settings).peak_bytes - 1)).words
        return (
            f"Out of memory ({place}): the step asked for {asked[1] if asked else 'more'}{held}. "
            f"{device_words(self.device)} has {format_bytes(total)}. All that the run held was returned, and "
            f"{format_bytes(free)} are free now: the next run may start. {change}"
        )


def count_pieces(settings: LabSettings) -> int:
    """Pieces of the step, each between two reports: what progress counts."""
    timeline = forecast_of(settings).timeline
    return sum(segment.repeats for segment in timeline if not is_heading(segment.phase, segment.tower, segment.chunk))


def step_of(settings: LabSettings) -> tuple[Any, dict[str, Any]]:
    """The step and its own arguments. Chunks keep their full width, as the forecast assumes; it is a later step's."""
    if settings.step == "naive":
        return naive_step, {}
    if settings.step == "accumulation":
        return accumulation_step, {"chunk_size": settings.chunk_size}
    size, plans = settings.chunk_size, []
    for rows, length in zip((settings.batch_size, settings.passages), settings.lengths, strict=True):
        starts = range(0, rows, size)
        plans.append([Chunk(tuple(range(at, min(at + size, rows))), length) for at in starts])
    return grad_cache_step, {"plan": plans, "retain_chunks": settings.retained, "verify": "never"}


def make_batch(settings: LabSettings) -> tuple[list[dict[str, Tensor]], str]:
    """Queries (B, their length) and passages (N, theirs) of tokens, and in words what they are.

    Real pairs where the corpus has been built and both lengths are 4 or more, other pairs' passages for hard negatives;
    random tokens elsewhere. The last column, but of a length of 1, is padding: the forecast is of a padded batch.
    """
    counts, lengths = (settings.batch_size, settings.passages), settings.lengths
    texts = _real_texts()
    if texts is None or min(lengths) < 4:
        towers = []
        for rows, length in zip(counts, lengths, strict=True):
            mask = torch.ones(rows, length, dtype=torch.long)
            mask[:, -1] = int(length == 1)
            towers.append(_tokens(torch.randint(5, 8_000, (rows, length)), mask))
        return towers, "random tokens"
    pairs, tokenizer = texts
    chosen = [_with_negatives(pairs, row, settings.negatives) for row in range(counts[0])]
    towers = tokenize_pairs(chosen, tokenizer, query_length=lengths[0] - 1, passage_length=lengths[1] - 1)
    padded = [_widened(t, length, tokenizer.pad_token_id) for t, length in zip(towers, lengths, strict=True)]
    return padded, "real pairs of your own packages"


def _with_negatives(pairs: list, row: int, negatives: int) -> TextPair:
    """The row's pair, with the passages of the pairs after it for hard negatives."""
    pair, others = pairs[row % len(pairs)], range(row + 1, row + 1 + negatives)
    return replace(pair, negatives=tuple(pairs[other % len(pairs)].passage for other in others))


def _tokens(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": mask}


def _widened(tower: dict[str, Tensor], length: int, padding: int) -> dict[str, Tensor]:
    missing = length - tower["input_ids"].shape[1]
    ids = F.pad(tower["input_ids"], (0, missing), value=padding)
    return _tokens(ids, F.pad(tower["attention_mask"], (0, missing)))


def _real_texts() -> tuple[list, Any] | None:
    """Some pairs and a tokenizer trained on them; None where the corpus has not been built (that takes a minute)."""
    built = cache_folder() / f"corpus-{fingerprint(installed_sources())}.jsonl"
    return _texts_in(built) if built.is_file() else None


@lru_cache(maxsize=1)
def _texts_in(corpus: Path) -> tuple[list, Any]:
    pairs = load_pairs(limit=PAIRS, progress=False)
    return pairs, train_tokenizer(pairs)


def warm_optimizer(encoder: nn.Module, name: str = "adamw") -> torch.optim.Optimizer:
    """The optimizer with the states that it has from its second step on; the weights are as before (rate 0)."""
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    if name == "adamw":
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD(trained, lr=0.0)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


class _Trace:
    """A ledger's events as points over a picture. Finished pieces are converted once."""

    def __init__(self) -> None:
        self._finished: list[tuple[str, int | None, np.ndarray, int]] = []
        self._next = 0
        self._counts: dict[tuple, int] = {}

    def line(self, ledger: MemoryLedger, picture: TimelinePicture) -> tuple[np.ndarray, np.ndarray]:
        """x and bytes of everything recorded so far."""
        pieces, known = list(ledger.pieces), len(ledger.events)
        while self._next < len(pieces) - 1:
            self._finish(ledger, pieces[self._next], pieces[self._next + 1][0])
            self._next += 1
        running = self._piece(ledger, pieces[-1], known) if pieces else None
        points = [picture.points(*piece) for piece in (*self._finished, running) if piece is not None]
        points = [one for one in points if len(one[0])]
        if not points:
            return np.zeros(0), np.zeros(0)
        x, y = (np.concatenate(part) for part in zip(*points, strict=True))
        return x, y

    def _finish(self, ledger: MemoryLedger, piece: tuple, stop: int) -> None:
        points = self._piece(ledger, piece, stop)
        if points is not None:
            phase, tower, _, number = points
            self._finished.append(points)
            self._counts[phase, tower] = number + 1

    def _piece(self, ledger: MemoryLedger, piece: tuple, stop: int) -> tuple | None:
        start, place = piece
        if is_heading(**place) or stop <= start:
            return None
        totals = np.array([event.total_bytes for event in ledger.events[start:stop]])
        return place["phase"], place["tower"], totals, self._counts.get((place["phase"], place["tower"]), 0)
