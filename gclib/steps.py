"""Three ways to a gradient, side by side: naive, accumulation, gradient cache.

Gao et al. 2021 (arXiv 2101.06983). All take the same arguments, add to `.grad` and return the detached loss.

- `naive_step` encodes the whole batch with its graph: the gradient that the others are judged by.
- `accumulation_step` gives each chunk a loss of its own: little memory, but in-batch negatives are lost, and the
  gradient is another one.
- `grad_cache_step` gives the gradient of the naive step in the memory of a chunk (section 3.3), and so does
  `grad_cache_loss`, for trainers that call backward() themselves. Both are `CachedStep`: `first_forward` is the paper's
  step 1, `cache_gradients` step 2, `backward_retained` and `replay` step 3.

Letters: B queries, K hard negatives a query, N = B * (1 + K) passages, D dimensions, C rows of a chunk, R retained.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gclib.chunks import Chunk, plan_chunks
from gclib.distributed import average_after_backward, own_sync_off, world_size
from gclib.randomness import RandomState
from gclib.support.validation import describe, positive_int, refuse
from gclib.towers import Job, Tower, encode, encode_chunk, generators_back_on_error, generators_of, take
from gclib.verify import Conditions, Verification, check_towers, even_cuts, plan_verified, refuse_untrained, whole_shape

OnPhase = Callable[..., None]


def naive_step(
    encoders: Sequence[Callable[..., Tensor]],
    inputs: Sequence[Any],
    loss_fn: Callable[..., Tensor],
    *,
    mask: Any = None,
    on_phase: OnPhase | None = None,
    scaler: Any = None,
) -> Tensor:
    """Encode everything with its graph, take the loss, backpropagate. Memory grows with B.

    encoders: one callable a tower (the same object twice: tied weights). inputs: one a tower, a Tensor, a tuple or a
    mapping of Tensors with rows first. loss_fn(*reps) or loss_fn(*reps, mask=mask) -> scalar. mask: (B, N) bool, True =
    left out of the denominator, or a rule (`losses.masks`). scaler: a GradScaler; it scales once, at the loss.

    on_phase(phase, *, tower=None, chunk=None, chunks=None, tensors=()) hears of "first_forward", "loss", "replay" or
    "backward" as a piece begins or tensors appear, (kind, tensor) pairs for the ledger. Raising from it stops the step.

    Adds to .grad, returns the detached, unscaled loss. Bad arguments are refused (ValueError) before anything is
    computed or changed. After a later error the generators are as at entry, and .grad may hold a part: zero it.
    """
    options = {"mask": mask, "on_phase": on_phase, "scaler": scaler}
    towers = check_towers(encoders, inputs, loss_fn, **options, in_chunks=False)
    report = on_phase or silent
    with own_sync_off(encoders), generators_back_on_error(towers) as entry:
        torch.clear_autocast_cache()
        reps = []
        for tower in towers:
            report("first_forward", tower=tower.number, tensors=_batch(towers) + _states(entry) + _reps(reps))
            reps.append(encode(tower.encoder, tower.inputs))
        loss = take_loss(reps, loss_fn, mask, report)
        del reps
        report("backward")
        (loss if scaler is None else scaler.scale(loss)).backward()
    return loss.detach()


def accumulation_step(
    encoders: Sequence[Callable[..., Tensor]],
    inputs: Sequence[Any],
    loss_fn: Callable[..., Tensor],
    *,
    chunk_size: int,
    mask: Any = None,
    on_phase: OnPhase | None = None,
    scaler: Any = None,
) -> Tensor:
    """Backpropagate a loss for each chunk of queries, weighted by its share of the queries.

    chunk_size: queries a chunk, each with its own 1 + K passages; the last may be short. The mask is cut to each
    chunk's rows and columns. Negatives of other chunks are lost, so this is *not* the naive step's gradient (section
    3.2) but the mean of the chunks' own. Sharded encoders want as many on every rank. The rest as in `naive_step`.
    """
    towers = check_towers(encoders, inputs, loss_fn, mask=mask, on_phase=on_phase, scaler=scaler, hooks=True)
    if world_size() > 1 and getattr(loss_fn, "needs_whole_batch", False):
        raise refuse("loss_fn", "must not gather: a chunk of accumulation has a loss of its own", loss_fn)
    queries = towers[0].rows
    for tower in towers:
        if tower.rows % queries:
            raise refuse(f"inputs[{tower.number}]", f"must have a multiple of B = {queries} rows", f"{tower.rows} rows")
    report = on_phase or silent
    chunks = plan_chunks([1] * queries, chunk_size=positive_int("chunk_size", chunk_size), sort=False)
    even_cuts(towers, len(chunks))
    total = None
    with own_sync_off(encoders), generators_back_on_error(towers) as entry:
        torch.clear_autocast_cache()
        report("first_forward", tensors=_batch(towers) + _states(entry))
        for number, chunk in enumerate(chunks):
            named = {"chunk": number, "chunks": len(chunks)}
            part = _accumulate_chunk(towers, chunk, loss_fn, mask, report, scaler, named)
            total = part if total is None else total.add_(part)
            del part
        report("backward")
    return total


def grad_cache_step(
    encoders: Sequence[Callable[..., Tensor]],
    inputs: Sequence[Any],
    loss_fn: Callable[..., Tensor],
    *,
    chunk_size: int | Sequence[int] | None = None,
    chunk_tokens: int | Sequence[int] | None = None,
    retain_chunks: int = 0,
    sort_by_length: bool = True,
    token_inputs: Sequence[str] | None = None,
    plan: Sequence[Any] | None = None,
    verify: str = "first",
    mask: Any = None,
    on_phase: OnPhase | None = None,
    scaler: Any = None,
) -> Tensor:
    """The gradient of `naive_step` in the memory of one chunk (Gao et al. 2021, section 3.3).

    Exactly one of: chunk_size, at most so many rows a chunk, one int or one a tower; chunk_tokens, padded tokens a
    chunk; plan, ready chunks (a list of Chunk a tower). sort_by_length: rows of like length are encoded together and
    trimmed (mappings with an attention mask; others are left as they are); loss and mask never see that order. In a
    process alone a sorted chunk ends early where lengths fall steeply, if that saves more than a call costs
    (`plan_chunks`). Trimming is exact for encoders that ignore padding, as transformers do; one that does not (an LSTM,
    a convolution) is found by `verify`, and left untrimmed with a warning. token_inputs: a list of further entries as
    long as the texts, beside `gclib.towers.TOKEN_INPUTS`; None trims nothing where an unknown one is as wide as the
    mask. retain_chunks: R chunks, those with the most tokens, keep their graph and are encoded once; rows that are
    trained are encoded 2 - (retained rows / all rows) times. Their graphs live during the loss. Else as `naive_step`.

    verify: "first" checks an encoder in its first step, "always" in each, "never" trusts it (`gclib.verify`): that it
    encodes a chunk the second time as the first, a row alike in any company, and trimmed as untrimmed. It costs five to
    eight forwards of two to eight rows and 16 numbers a chunk, compared; no bytes of tensors beside a later step's.

    Holds, beside one chunk's graph: all representations, then their gradients (the cache), and the generators' states.
    Errors as in `naive_step`. BatchNorm of its input's statistics and InstanceNorm that tracks some are refused.
    """
    cut = {"chunk_size": chunk_size, "chunk_tokens": chunk_tokens, "plan": plan, "sort_by_length": sort_by_length}
    options = {"mask": mask, "on_phase": on_phase, "scaler": scaler, "token_inputs": token_inputs}
    step = CachedStep(encoders, inputs, loss_fn, verify, options, cut | {"retain_chunks": retain_chunks})
    with step.by_itself() as entry:
        loss = step.forward(entry)
        step.backward(scaler=scaler)
    return loss


def grad_cache_loss(
    encoders: Sequence[Callable[..., Tensor]],
    inputs: Sequence[Any],
    loss_fn: Callable[..., Tensor],
    *,
    chunk_size: int | Sequence[int] | None = None,
    chunk_tokens: int | Sequence[int] | None = None,
    retain_chunks: int = 0,
    sort_by_length: bool = True,
    token_inputs: Sequence[str] | None = None,
    plan: Sequence[Any] | None = None,
    verify: str = "first",
    mask: Any = None,
    on_phase: OnPhase | None = None,
) -> Tensor:
    """`grad_cache_step` as a loss for a trainer that calls backward() itself: it may be scaled, divided and added up.

    Step 1 and the loss are taken now, steps 2 and 3 in its backward(), which adds to `.grad` as the step does, times
    the gradient that arrives. Until then it holds representations, the loss's graph (B * N logits where it is dense),
    generators' states and retained graphs; they go with the loss. The replay runs under the autocast of this call;
    where DistributedDataParallel synchronises now, gradients are averaged once, when backward() ends. Arguments as in
    `grad_cache_step`. Raises ValueError from backward() for a second one, create_graph=True, and weights, inputs or
    modes that are other ones by then. `torch.autograd.grad` and backward(inputs=) see no parameters: use backward().
    """
    cut = {"chunk_size": chunk_size, "chunk_tokens": chunk_tokens, "plan": plan, "sort_by_length": sort_by_length}
    options = {"mask": mask, "on_phase": on_phase, "scaler": None, "token_inputs": token_inputs}
    step = CachedStep(encoders, inputs, loss_fn, verify, options, cut | {"retain_chunks": retain_chunks})
    with step.by_itself() as entry:
        loss = step.forward(entry)
    return _Deferred.apply(step, loss, torch.zeros((), requires_grad=True))


class CachedStep:
    """The gradient-cache step, forward and backward: what `grad_cache_step` and `grad_cache_loss` share."""

    def __init__(self, encoders: Any, inputs: Any, loss_fn: Any, verify: str, options: dict, cut: dict):
        towers = check_towers(encoders, inputs, loss_fn, **options)
        self.encoders, self.loss_fn, self.mask = encoders, loss_fn, options["mask"]
        self.report = options["on_phase"] or silent
        self.jobs, self.checks = plan_verified(towers, verify, **cut)
        self.towers = list({job.tower.number: job.tower for job in self.jobs}.values())
        self.states: list[RandomState] = []
        self.graphs: list[Tensor] = []

    @contextmanager
    def by_itself(self) -> Iterator[RandomState]:
        """Inside, DDP averages nothing; an error puts the generators back as at entry, the states that are given."""
        with own_sync_off(self.encoders), generators_back_on_error(self.towers) as entry:
            yield entry

    def forward(self, entry: RandomState) -> Tensor:
        """Step 1 and the loss, whose graph ends at the representations and is kept for `backward`."""
        self.report("first_forward", tensors=_batch(self.towers) + _states(entry))
        self.reps = first_forward(self.towers, self.jobs, self.states, self.graphs, self.report)
        self.loss = take_loss(self.reps, self.loss_fn, self.mask, self.report)
        return self.loss.detach()

    def backward(self, gradient: Tensor | None = None, *, scaler: Any = None) -> None:
        """Steps 2 and 3, times the gradient that arrives at the loss, or scaled."""
        loss, reps = vars(self).pop("loss"), vars(self).pop("reps")
        cache_gradients(loss if scaler is None else scaler.scale(loss), gradient, reps, self.report)
        caches = [rep.grad for rep in reps]
        self.checks.keep(reps)
        del loss, reps
        trained = backward_retained(self.jobs, self.graphs, caches, self.report)
        trained += replay(self.jobs, self.states, caches, self.report, self.checks)
        if not trained:
            refuse_untrained(self.loss_fn)


class _Deferred(torch.autograd.Function):
    """The value of the loss now; `CachedStep.backward` when a gradient arrives. The last argument makes it a node."""

    @staticmethod
    def forward(ctx: Any, step: CachedStep, loss: Tensor, _: Tensor) -> Tensor:
        ctx.held = step, Conditions(step.encoders, step.towers)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        if torch.is_grad_enabled():
            raise refuse("create_graph", "must be False: what is replayed has no graph of its gradient", True)
        (step, then), ctx.held = ctx.held, (None, None)
        if step is None:
            raise refuse("loss", "must be backpropagated once: take grad_cache_loss again", "a second backward()")
        with then.restored(), step.by_itself():
            step.backward(gradient)
        average_after_backward(then.synchronised)
        return None, None, None


def first_forward(
    towers: Sequence[Tower], jobs: Sequence[Job], states: list, graphs: list, report: OnPhase
) -> list[Tensor]:
    """Step 1: every representation, without a graph (retained chunks: with): f(s_i), g(t_j).

    Fills `states`, one RandomState a job, and `graphs`, the retained chunks' outputs. Returns one leaf a tower.
    """
    reps: list[Tensor | None] = [None] * len(towers)
    for job in jobs:
        states.append(generators_of([job.tower]))
        report("first_forward", **job.named(), tensors=_reps(reps) + _states(states[-1]))
        with torch.set_grad_enabled(job.retained):
            output = encode_chunk(job.tower, job.chunk)
        tower = job.tower.number
        if reps[tower] is None:
            reps[tower] = output.new_zeros(whole_shape(job, output))
            report("first_forward", **job.named(), tensors=_named("representations", [reps[tower]]))
        _put(reps[tower], output.detach(), job)
        if job.retained:
            graphs.append(output)
        del output
    return [rep.requires_grad_() for rep in reps]


def take_loss(
    reps: Sequence[Tensor], loss_fn: Callable[..., Tensor], mask: Any, report: OnPhase, **named: int
) -> Tensor:
    """The loss of the representations, with its graph. ValueError for what is no loss of them."""
    report("loss", **named, tensors=_reps(reps))
    loss = loss_fn(*reps) if mask is None else loss_fn(*reps, mask=mask)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = describe(loss) if isinstance(loss, Tensor) else type(loss).__name__
        raise refuse("loss_fn", "must return one floating point number as a tensor", got)
    if not loss.requires_grad:
        raise refuse("loss_fn", "must return a loss that depends on the representations", "a loss without a graph")
    return loss


def cache_gradients(loss: Tensor, gradient: Tensor | None, reps: Sequence[Tensor], report: OnPhase) -> None:
    """Step 2: the loss's gradient at the representations: u_i = dL/df(s_i), v_j = dL/dg(t_j), equations (5)-(7).

    The cache is left in each representation's .grad; the loss's own parameters get their gradient here, once.
    """
    loss.backward(gradient)
    report("loss", tensors=_named("cache", [rep.grad for rep in reps]))


def backward_retained(
    jobs: Sequence[Job], graphs: list[Tensor], caches: Sequence[Tensor | None], report: OnPhase
) -> int:
    """Step 3 for the retained chunks: their graphs are there; backpropagate the cached gradients and let go.

    Returns how many chunks had a graph to backpropagate through, as `replay` does.
    """
    trained = 0
    for job in (job for job in jobs if job.retained):
        report("backward", **job.named())
        trained += _backpropagate(graphs.pop(0), caches[job.tower.number], job.chunk)
    return trained


def replay(
    jobs: Sequence[Job],
    states: Sequence[RandomState],
    caches: Sequence[Tensor | None],
    report: OnPhase,
    checks: Verification,
) -> int:
    """Step 3: encode each chunk again, with its graph and the first forward's randomness; equations (8)-(9).

    The authors' code backpropagates r . u, a chunk's representations times their cache; r.backward(u) adds the same,
    (dr/dtheta)^T u, to the weights theta.
    """
    trained = 0
    drawn = generators_of([job.tower for job in jobs])
    report("replay", tensors=_states(drawn))
    for job, state in zip(jobs, states, strict=True):
        if not job.retained and caches[job.tower.number] is not None and job.tower.needs_gradient():
            report("replay", **job.named())
            state.restore()
            output = encode_chunk(job.tower, job.chunk)
            checks.compare(job, output)
            trained += _backpropagate(output, caches[job.tower.number], job.chunk)
            del output
    report("replay")
    drawn.restore()
    checks.passed()
    return trained


def _backpropagate(output: Tensor, cache: Tensor | None, chunk: Chunk) -> bool:
    """Backpropagate the chunk's rows of the cache from its representations; False where they have no graph."""
    if cache is None or not output.requires_grad:
        return False
    rows = cache[chunk.index(cache.device)]
    output.backward(rows[:, : output.shape[1]] if output.ndim == 3 else rows)
    return True


def _put(reps: Tensor, output: Tensor, job: Job) -> None:
    """Write a chunk's representations into their own rows; trimmed token representations stay zero at the end."""
    if list(reps.shape) != whole_shape(job, output):
        rule = "must return representations of one shape for all rows, or with the tokens' width"
        raise refuse(f"encoders[{job.tower.number}]", rule, f"{tuple(output.shape[1:])} after {tuple(reps.shape[1:])}")
    rows = job.chunk.index(output.device)
    if output.ndim == 3:
        reps[rows, : output.shape[1]] = output
    else:
        reps[rows] = output


def _accumulate_chunk(
    towers: Sequence[Tower],
    chunk: Chunk,
    loss_fn: Callable,
    mask: Any,
    report: OnPhase,
    scaler: Any,
    named: dict,
) -> Tensor:
    queries = towers[0].rows
    first, last = chunk.rows[0], chunk.rows[-1] + 1
    spans = [slice(first * tower.rows // queries, last * tower.rows // queries) for tower in towers]
    part = mask[spans[0], spans[:2][-1]] if mask is not None else None
    reps = []
    for tower, span in zip(towers, spans, strict=True):
        report("first_forward", tower=tower.number, **named, tensors=_reps(reps))
        rows = Chunk(tuple(range(span.start, span.stop)), tower.width)
        reps.append(encode(tower.encoder, take(tower.inputs, rows, tower.trimmed)))
    loss = take_loss(reps, loss_fn, part, report, **named) * ((last - first) / queries)
    del reps
    report("backward", **named)
    (loss if scaler is None else scaler.scale(loss)).backward()
    torch.clear_autocast_cache()
    return loss.detach()


def _batch(towers: Sequence[Tower]) -> list[tuple[str, Tensor]]:
    return _named("inputs", [tensor for tower in towers for tensor in tower.tensors])


def _states(state: RandomState) -> list[tuple[str, Tensor]]:
    return _named("random states", state.tensors)


def _reps(reps: Sequence[Tensor | None]) -> list[tuple[str, Tensor]]:
    return _named("representations", reps)


def _named(kind: str, tensors: Sequence[Tensor | None]) -> list[tuple[str, Tensor]]:
    return [(kind, tensor) for tensor in tensors if tensor is not None]


def silent(phase: str, **named: Any) -> None:
    """The on_phase of a caller that asked for none."""


STEPS = {"naive": naive_step, "accumulation": accumulation_step, "grad_cache": grad_cache_step}
