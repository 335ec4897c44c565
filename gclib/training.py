"""A small honest loop: draw a batch, take a step, clip, update, record. The step is passed in."""

import itertools
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from gclib.data import TextPair, check_pairs, check_tokenizer, tokenize_pairs
from gclib.towers import check_encoders, device_of, to_device, training_mode
from gclib.validation import int_at_least, one_of, positive_int, positive_number, refuse

SCHEDULES = ("linear", "constant")


@dataclass(frozen=True)
class TrainingRecord:
    """What one optimizer step did.

    step counts from 1, epoch from 0. loss: in nats, before the update. gradient_norm: over all the optimizer's
    parameters, before clipping. learning_rate: of the first parameter group. examples: queries seen so far. seconds:
    since training began, drawing and tokenizing included, the time that `on_record` took left out.
    """

    step: int
    epoch: int
    loss: float
    gradient_norm: float
    learning_rate: float
    examples: int
    seconds: float


def train(
    encoders: Sequence[Callable[..., Tensor]],
    pairs: Sequence[TextPair],
    tokenizer: Any,
    loss_fn: Callable[..., Tensor],
    *,
    step: Callable[..., Tensor],
    batch_size: int,
    steps: int,
    optimizer: Optimizer,
    seed: int,
    on_record: Callable[[TrainingRecord], object] | None = None,
    schedule: str = "linear",
    warmup_steps: int = 0,
    clip_norm: float | None = 1.0,
    query_length: int = 64,
    passage_length: int = 256,
    progress: bool = True,
) -> list[TrainingRecord]:
    """Take `steps` optimizer steps and return their records.

    step(encoders, inputs, loss_fn) -> loss adds to .grad: `naive_step`, or
    `functools.partial(grad_cache_step, chunk_size=16)`. optimizer: any torch optimizer over the parameters to
    train (the loss's too, if it has any). Its learning rates are the schedule's top: a linear warm-up over
    `warmup_steps`, then "linear" towards 0 at the end, or "constant"; they are put back at the end. clip_norm: longest
    allowed gradient, None for no clipping.

    Batches: each epoch is a new shuffle by `seed` and epoch. No text stands twice in a batch (it would be a false
    negative): a twin waits for a later batch, and what can't fill a batch at an epoch's end is left out of that epoch.
    Only pairs that hold fewer than `batch_size` different texts give batches with twins, one an epoch. Dropout follows
    `seed` too; the caller's random generators and the encoders' training modes are put back. `on_record` sees each
    record; raising from it stops the training after that step, with weights and optimizer as they then are.

    Raises ValueError for arguments that can't be, before anything is computed, and FloatingPointError as soon as a loss
    or a gradient is not finite, before it reaches the weights.
    """
    _check(encoders, pairs, step, optimizer, loss_fn, on_record)
    steps, batch_size = positive_int("steps", steps), positive_int("batch_size", batch_size)
    factors = learning_rate_factors(steps, warmup_steps=warmup_steps, schedule=schedule)
    longest = math.inf if clip_norm is None else positive_number("clip_norm", clip_norm)
    check_tokenizer(tokenizer, query_length, "query_length")
    check_tokenizer(tokenizer, passage_length, "passage_length")
    batches = draw_batches(pairs, batch_size, seed=seed)
    records: list[TrainingRecord] = []
    bar = tqdm(total=steps, desc="training", unit="step", disable=not progress, mininterval=0.5)
    with bar, _set_up(encoders, optimizer, seed) as top_rates:
        clock = time.perf_counter()
        for factor, (epoch, batch) in zip(factors, batches, strict=False):
            inputs = tokenize_pairs(batch, tokenizer, query_length=query_length, passage_length=passage_length)
            _set_rates(optimizer, [factor * rate for rate in top_rates])
            loss, norm = _update(encoders, inputs, loss_fn, step, optimizer, longest)
            rate, done = float(optimizer.param_groups[0]["lr"]), len(records) + 1
            elapsed = time.perf_counter() - clock
            records.append(TrainingRecord(done, epoch, loss, norm, rate, done * batch_size, elapsed))
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if on_record is not None:
                on_record(records[-1])
                clock = time.perf_counter() - elapsed
    return records


def draw_batches(pairs: Sequence[TextPair], batch_size: int, *, seed: int) -> Iterator[tuple[int, list[TextPair]]]:
    """(epoch, batch) without end: full batches only, every epoch in its own order, as `train` describes."""
    check_pairs(pairs)
    if positive_int("batch_size", batch_size) > len(pairs):
        raise refuse("batch_size", f"must be at most the number of pairs, {len(pairs)}", batch_size)
    int_at_least("seed", seed, 0)
    return _drawn(pairs, batch_size, seed)


def learning_rate_factors(steps: int, *, warmup_steps: int = 0, schedule: str = "linear") -> list[float]:
    """What each step's learning rate is multiplied by: (t + 1) / w for t < w, then 1 or (steps - t) / (steps - w).

    t counts from 0; the top is 1 and no factor is 0, so that every step trains.
    """
    one_of("schedule", schedule, SCHEDULES)
    warmup = int_at_least("warmup_steps", warmup_steps, 0)
    if warmup > steps:
        raise refuse("warmup_steps", f"must be at most the number of steps, {steps}", warmup_steps)
    falling = [(steps - t) / (steps - warmup) if schedule == "linear" else 1.0 for t in range(warmup, steps)]
    return [(t + 1) / warmup for t in range(warmup)] + falling


def _drawn(pairs: Sequence[TextPair], batch_size: int, seed: int) -> Iterator[tuple[int, list[TextPair]]]:
    for epoch in itertools.count():
        order = list(range(len(pairs)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        waiting = deque(pairs[row] for row in order)
        batch = _take_batch(waiting, batch_size)
        yield epoch, batch + [waiting.popleft() for _ in range(batch_size - len(batch))]
        while len(batch) == batch_size:
            batch = _take_batch(waiting, batch_size)
            if len(batch) == batch_size:
                yield epoch, batch


def _take_batch(waiting: deque[TextPair], size: int) -> list[TextPair]:
    """At most `size` pairs without a common query or passage; their twins stay first in line for the next batch."""
    batch: list[TextPair] = []
    twins: list[TextPair] = []
    seen: set[str] = set()
    while waiting and len(batch) < size:
        pair = waiting.popleft()
        if seen.isdisjoint((pair.query, pair.passage)):
            batch.append(pair)
            seen.update((pair.query, pair.passage))
        else:
            twins.append(pair)
    waiting.extendleft(reversed(twins))
    return batch


@contextmanager
def _set_up(encoders: Sequence[Any], optimizer: Optimizer, seed: int) -> Iterator[list[Any]]:
    """Training mode, generators that follow the seed, and the learning rates at entry: all put back at exit."""
    rates = [group["lr"] for group in optimizer.param_groups]
    with training_mode(encoders, True), torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield rates
        finally:
            _set_rates(optimizer, rates)


def _set_rates(optimizer: Optimizer, rates: Sequence[Any]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _update(
    encoders: Sequence[Any],
    inputs: Sequence[dict[str, Tensor]],
    loss_fn: Callable[..., Tensor],
    step: Callable[..., Tensor],
    optimizer: Optimizer,
    longest: float,
) -> tuple[float, float]:
    """One optimizer step; the loss and the gradient's norm before clipping."""
    placed = [to_device(batch, device_of(encoder)) for encoder, batch in zip(encoders, inputs, strict=True)]
    optimizer.zero_grad(set_to_none=True)
    loss = float(step(encoders, placed, loss_fn))
    norm = float(torch.nn.utils.clip_grad_norm_(_parameters(optimizer), longest))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"training stopped: the loss is {loss} and the gradient's norm {norm}")
    optimizer.step()
    return loss, norm


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check(encoders: Any, pairs: Any, step: Any, optimizer: Any, loss_fn: Any, on_record: Any) -> None:
    check_encoders(encoders)
    check_pairs(pairs)
    for name, value in (("step", step), ("loss_fn", loss_fn), ("on_record", on_record)):
        if not callable(value) and not (name == "on_record" and value is None):
            raise refuse(name, "must be callable", type(value).__name__)
    if not isinstance(optimizer, Optimizer):
        raise refuse("optimizer", "must be a torch optimizer", type(optimizer).__name__)
    modules = [encoder for encoder in encoders if isinstance(encoder, nn.Module)]
    owned = {id(parameter) for module in modules for parameter in module.parameters()}
    if modules and owned.isdisjoint(map(id, _parameters(optimizer))):
        raise refuse("optimizer", "must hold parameters of the encoders", "none of them")
