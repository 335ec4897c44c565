"""A small honest loop: draw a batch, take a step, clip, update, record. The step is passed in."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from gclib.data.pairs import TextPair
from gclib.data.sampling import draw_batches, rows_of_rank
from gclib.data.tokens import check_tokenizer, tokenize_pairs
from gclib.randomness import RandomState
from gclib.support.modules import training_mode
from gclib.support.validation import int_at_least, one_of, positive_int, positive_number, refuse
from gclib.training.modules import check_encoders, device_of, to_device

SCHEDULES = ("linear", "constant")


@dataclass(frozen=True)
class TrainingRecord:
    """What one optimizer step did.

    step counts from 1, epoch from 0. loss: in nats, before the update. gradient_norm: over all the optimizer's
    parameters, before clipping. learning_rate: of the first parameter group. examples: queries seen so far. seconds:
    since training began, drawing and tokenizing included, the time that `on_record` took left out. temperature: of the
    loss that was taken, where `loss_fn` has one.
    """

    step: int
    epoch: int
    loss: float
    gradient_norm: float
    learning_rate: float
    examples: int
    seconds: float
    temperature: float | None = None


@dataclass(frozen=True)
class TrainingState:
    """Where a training stands between two steps: with weights and optimizer, all that it goes on from.

    step: how many are taken. epoch, batch: the epoch of the last one, and how many of its batches are used up. seconds:
    as in the last record. generators: states of the random generators, the CPU's first; none: they follow the seed.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    generators: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Training:
    """All that a training's steps share: what is trained, in what batches, how often, at which rates.

    encoders: the queries' and the passages' (twice the same: tied). step(encoders, inputs, loss_fn) -> loss adds to
    .grad: `naive_step`, or `functools.partial(grad_cache_step, chunk_size=16)`. optimizer: any torch optimizer over the
    parameters to train (the loss's too, if it has any). Its learning rates are the schedule's top: a linear warm-up
    over `warmup_steps`, then "linear" towards 0 at the end, or "constant"; they are put back at the end. clip_norm:
    longest allowed gradient, None for no clipping. world_size: so many processes draw the same batches, and `rank`
    takes its own rows (`rows_of_rank`) with dropout by seed + rank; `step` must then give each of them the loss and the
    gradient of the whole batch. chunks: the settings of `step`'s chunks that were planned, for the record. Raises
    ValueError for what can't be.
    """

    encoders: Sequence[Callable[..., Tensor]]
    tokenizer: Any
    loss_fn: Callable[..., Tensor]
    step: Callable[..., Tensor]
    optimizer: Optimizer
    batch_size: int
    steps: int
    seed: int
    schedule: str = "linear"
    warmup_steps: int = 0
    clip_norm: float | None = 1.0
    query_length: int = 64
    passage_length: int = 256
    rank: int = 0
    world_size: int = 1
    chunks: Mapping[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_encoders(self.encoders)
        _check_callables({"step": self.step, "loss_fn": self.loss_fn})
        _check_optimizer(self.optimizer, self.encoders)
        learning_rate_factors(self.steps, warmup_steps=self.warmup_steps, schedule=self.schedule)
        if self.clip_norm is not None:
            positive_number("clip_norm", self.clip_norm)
        for name, length in self.lengths.items():
            check_tokenizer(self.tokenizer, length, name)
        int_at_least("seed", self.seed, 0)
        rows_of_rank(self.batch_size, self.rank, self.world_size)

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens that texts are cut to, as `tokenize_pairs` and `retrieval_metrics` take them."""
        return {"query_length": self.query_length, "passage_length": self.passage_length}

    def run(
        self,
        pairs: Sequence[TextPair],
        *,
        start: TrainingState | None = None,
        on_record: Callable[[TrainingRecord], object] | None = None,
        on_state: Callable[[TrainingState], object] | None = None,
        progress: bool = True,
    ) -> list[TrainingRecord]:
        """Take the steps that follow `start`; their records. `train` has the whole contract."""
        hooks = {"on_record": on_record, "on_state": on_state}
        _check_callables({name: hook for name, hook in hooks.items() if hook is not None})
        state, records = TrainingState() if start is None else start, []
        if not isinstance(state, TrainingState):
            raise refuse("start", "must be a TrainingState", type(state).__name__)
        if not 0 <= state.step <= self.steps:
            raise refuse("start", f"must be of a step from 0 to {self.steps}", state.step)
        factors = learning_rate_factors(self.steps, warmup_steps=self.warmup_steps, schedule=self.schedule)
        rows = rows_of_rank(self.batch_size, self.rank, self.world_size)
        batches = draw_batches(pairs, self.batch_size, seed=self.seed, epoch=state.epoch, batch=state.batch)
        done = {"total": self.steps, "initial": state.step}
        bar = tqdm(desc="training", unit="step", disable=not progress, mininterval=0.5, **done)
        with bar, _set_up(self.encoders, self.optimizer, self.seed + self.rank, state.generators) as top_rates:
            clock = time.perf_counter() - state.seconds
            for factor, (epoch, batch) in zip(factors[state.step :], batches, strict=False):
                _set_rates(self.optimizer, [factor * rate for rate in top_rates])
                temperature = temperature_of(self.loss_fn)
                loss, norm = self.update(batch[rows])
                number, elapsed = state.step + 1, time.perf_counter() - clock
                rate = float(self.optimizer.param_groups[0]["lr"])
                seen = number * len(batch)
                records.append(TrainingRecord(number, epoch, loss, norm, rate, seen, elapsed, temperature))
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                if on_record is not None:
                    on_record(records[-1])
                state = TrainingState(number, epoch, state.batch + 1 if epoch == state.epoch else 1, elapsed)
                if on_state is not None:
                    on_state(replace(state, generators=_recorded(self.encoders)))
                clock = time.perf_counter() - elapsed
        return records

    def update(self, pairs: Sequence[TextPair]) -> tuple[float, float]:
        """One optimizer step; the loss and the gradient's norm before clipping."""
        inputs = tokenize_pairs(pairs, self.tokenizer, **self.lengths)
        placed = [to_device(batch, device_of(encoder)) for encoder, batch in zip(self.encoders, inputs, strict=True)]
        self.optimizer.zero_grad(set_to_none=True)
        loss = float(self.step(self.encoders, placed, self.loss_fn))
        longest = math.inf if self.clip_norm is None else self.clip_norm
        norm = float(torch.nn.utils.clip_grad_norm_(_parameters(self.optimizer), longest))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"training stopped: the loss is {loss} and the gradient's norm {norm}")
        self.optimizer.step()
        return loss, norm


def train(
    encoders: Sequence[Callable[..., Tensor]],
    pairs: Sequence[TextPair],
    tokenizer: Any,
    loss_fn: Callable[..., Tensor],
    *,
    start: TrainingState | None = None,
    on_record: Callable[[TrainingRecord], object] | None = None,
    on_state: Callable[[TrainingState], object] | None = None,
    progress: bool = True,
    **options: Any,
) -> list[TrainingRecord]:
    """Take `steps` optimizer steps and return their records.

    options: `Training`'s other fields, which it explains: step, optimizer, batch_size, steps and seed, and those that
    have a default: schedule, warmup_steps, clip_norm, query_length, passage_length, rank, world_size.

    Batches: as `draw_batches` says. Each epoch is a new order by `seed` and epoch, in which every pair stands once but
    the few that fill no batch at its end, and no batch holds a false negative: a passage that is right for one of its
    queries, as another pair's positive or hard negative. Pairs with too many twins for that are told in a warning
    before training. Dropout follows `seed` too; the random generators of the processor and of the encoders' cards, and
    the encoders' training modes, are put back. `on_record` sees each record; raising from it stops the training after
    that step, with weights and optimizer as they then are.

    start: go on from this state, with weights and optimizer as they then were (but for the learning rates: again the
    schedule's top), to the same records, bit for bit on the same machine; the records of the steps still to take are
    returned. on_state sees the state after each step, after on_record.

    Raises ValueError for arguments that can't be, before anything is computed, and FloatingPointError as soon as a loss
    or a gradient is not finite, before it reaches the weights.
    """
    training = Training(encoders, tokenizer, loss_fn, **options)
    return training.run(pairs, start=start, on_record=on_record, on_state=on_state, progress=progress)


def temperature_of(loss_fn: Callable[..., Tensor]) -> float | None:
    """The loss's temperature as a number; None for a loss that has none, or keeps something else by that name."""
    temperature = getattr(loss_fn, "temperature", None)
    if isinstance(temperature, Tensor) and temperature.numel() == 1:
        return float(temperature.detach())
    return float(temperature) if isinstance(temperature, (int, float)) else None


def learning_rate_factors(steps: int, *, warmup_steps: int = 0, schedule: str = "linear") -> list[float]:
    """What each step's learning rate is multiplied by: (t + 1) / w for t < w, then 1 or (steps - t) / (steps - w).

    t counts from 0; the top is 1 and no factor is 0, so that every step trains.
    """
    steps = positive_int("steps", steps)
    one_of("schedule", schedule, SCHEDULES)
    warmup = int_at_least("warmup_steps", warmup_steps, 0)
    if warmup > steps:
        raise refuse("warmup_steps", f"must be at most the number of steps, {steps}", warmup_steps)
    falling = [(steps - t) / (steps - warmup) if schedule == "linear" else 1.0 for t in range(warmup, steps)]
    return [(t + 1) / warmup for t in range(warmup)] + falling


@contextmanager
def _set_up(
    encoders: Sequence[Any], optimizer: Optimizer, seed: int, generators: Sequence[Tensor]
) -> Iterator[list[Any]]:
    """Training mode, generators by the seed or as given, and the rates at entry: all of it put back at exit."""
    rates = [group["lr"] for group in optimizer.param_groups]
    forked = [device for device in _devices(encoders) if device.type == "cuda"]
    with training_mode(encoders, True), torch.random.fork_rng(devices=forked):
        torch.manual_seed(seed)
        if generators:
            _restore(encoders, generators)
        try:
            yield rates
        finally:
            _set_rates(optimizer, rates)


def _devices(encoders: Sequence[Any]) -> list[torch.device]:
    """The CPU, then the encoders' other devices."""
    others = {device_of(encoder) for encoder in encoders} - {torch.device("cpu")}
    return [torch.device("cpu"), *sorted(others, key=str)]


def _recorded(encoders: Sequence[Any]) -> tuple[Tensor, ...]:
    return RandomState.record(torch.empty(0, device=device) for device in _devices(encoders)).tensors


def _restore(encoders: Sequence[Any], generators: Sequence[Tensor]) -> None:
    devices = _devices(encoders)
    if len(generators) != len(devices):
        raise refuse(
            "start", f"must hold the generators of {', '.join(map(str, devices))}", f"{len(generators)} states"
        )
    RandomState(dict(zip(devices, generators, strict=True))).restore()


def _set_rates(optimizer: Optimizer, rates: Sequence[Any]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_callables(named: dict[str, Any]) -> None:
    for name, value in named.items():
        if not callable(value):
            raise refuse(name, "must be callable", type(value).__name__)


def _check_optimizer(optimizer: Any, encoders: Sequence[Any]) -> None:
    """A torch optimizer that holds parameters of the encoders; ValueError otherwise."""
    if not isinstance(optimizer, Optimizer):
        raise refuse("optimizer", "must be a torch optimizer", type(optimizer).__name__)
    modules = [encoder for encoder in encoders if isinstance(encoder, nn.Module)]
    owned = {id(parameter) for module in modules for parameter in module.parameters()}
    if modules and owned.isdisjoint(map(id, _parameters(optimizer))):
        raise refuse("optimizer", "must hold parameters of the encoders", "none of them")
