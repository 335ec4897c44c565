"""Is the step that you use right? Any step against plain autograd, in float64, on your own batch; told in words.

    print(audit_step(step, [encoder, encoder], inputs, loss_fn))

`step(encoders, inputs, loss_fn) -> loss` adds to `.grad`, as gclib's steps do; another library's training step becomes
one with a few lines around it. Gradients are compared by size and not by direction alone, as the change of each
parameter in one SGD step with lr=1, because Adam hides a wrong size.

Letters: B queries, N passages, C rows of a chunk, W processes.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.audit.calls import CallLog, generator_states, logged
from gclib.audit.gradients import GradientError, compare_vectors, flat, worst_error
from gclib.chunks import Chunk
from gclib.support.validation import positive_int, positive_number, refuse
from gclib.towers import check_inputs, take

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
Step = Callable[[Sequence[Any], Sequence[Any], Any], Any]


@dataclass(frozen=True)
class Finding:
    """One trap that was recognised: its name, and what was seen, in words."""

    name: str
    explanation: str


@dataclass(frozen=True)
class AuditReport:
    """What an audit found; print it.

    error: the worst parameter's, ||difference|| / max(||its gradient||, 1e-3 ||all||). scale: the factor that brings
    the right gradient of the encoders nearest to the step's; cosine: of the angle between both. temperature: the same
    factor for the loss's own parameters, None where it has none. chunks: rows of each forward with a graph. dropout:
    whether the encoders draw random numbers; replayed: forwards with a graph that then repeated one without; alike:
    those that gave the same representations. batch: rows of each tower.
    """

    findings: tuple[Finding, ...]
    error: float
    scale: float
    cosine: float
    temperature: float | None
    chunks: tuple[int, ...]
    replayed: int
    alike: int
    dropout: bool
    batch: tuple[int, ...]

    @property
    def right(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def names(self) -> list[str]:
        """The findings by name."""
        return [finding.name for finding in self.findings]

    def __str__(self) -> str:
        rows, sizes = " + ".join(map(str, self.batch)), ", ".join(map(str, self.chunks)) or "none"
        lines = [
            f"Audit in float64: {rows} rows; encoded with a graph in pieces of {sizes}.",
            f"  gradient of the encoders: {self.scale:.3f} times the right one, cosine {self.cosine:.6f}",
        ]
        if self.temperature is not None:
            lines.append(f"  gradient of the loss's own parameters: {self.temperature:.3f} times the right one")
        drawn = f"{self.alike} of {self.replayed} second forwards gave what the first gave"
        lines.append(f"  with dropout: {drawn}" if self.dropout else "  dropout: the encoders draw no random numbers")
        verdicts = [f"  WRONG, {finding.name}: {finding.explanation}" for finding in self.findings]
        return "\n".join([*lines, *(verdicts or ["  Nothing wrong was found."])])


@dataclass(frozen=True)
class Exam:
    """Copies in float64 that the step may be run on, and what it is compared with."""

    encoders: list[nn.Module]
    inputs: list[Any]
    loss_fn: Callable[..., Tensor]
    seed: int
    tolerance: float
    ranks: int

    @property
    def encoder_parameters(self) -> list[nn.Parameter]:
        """Each parameter of the encoders that is trained, once."""
        return _trained(self.encoders)

    @property
    def loss_parameters(self) -> list[nn.Parameter]:
        """Each parameter of the loss that is trained and no encoder's, once."""
        taken = {id(parameter) for parameter in self.encoder_parameters}
        own = _trained([self.loss_fn] if isinstance(self.loss_fn, nn.Module) else [])
        return [parameter for parameter in own if id(parameter) not in taken]

    def rows(self) -> tuple[int, ...]:
        """The rows of each tower."""
        return tuple(check_inputs(given, number) for number, given in enumerate(self.inputs))

    def train(self, mode: bool) -> None:
        """Dropout on or off."""
        for encoder in self.encoders:
            encoder.train(mode)


@dataclass(frozen=True)
class Outcome:
    """What a step left: its loss, the change of encoders' and loss's parameters in an SGD step with lr=1."""

    loss: float | None
    encoders: list[Tensor]
    own: list[Tensor]
    log: CallLog
    state: Tensor


def audit_step(
    step: Step,
    encoders: Sequence[nn.Module],
    inputs: Sequence[Any],
    loss_fn: Callable[..., Tensor],
    *,
    plan: Sequence[Sequence[Chunk]] | None = None,
    ranks: int = 1,
    seed: int = 0,
    tolerance: float = 1e-6,
) -> AuditReport:
    """Run `step` on float64 copies and say what is wrong with its gradient, by name where the mistake is known.

    With dropout off against plain autograd over the whole batch; with dropout on each second forward against the
    first, and, where `plan` tells the step's chunks, the gradient against kept graphs of the same chunks. ranks: W,
    if the step stands for several processes. A small batch with a short last chunk finds most.

    The caller's modules, gradients and random generators are untouched. Raises ValueError for encoders that are no
    modules or have no parameters to train, and passes on what the step raises.
    """
    exam = _exam(step, encoders, inputs, loss_fn, seed, tolerance, ranks)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        findings = _batch_norm(step, exam)
        exam.train(False)
        truth, without_dropout = _run(_naive, exam), _run(step, exam)
        findings += _judge_loss(exam, truth, without_dropout) or _judge_gradient(exam, truth, without_dropout)
        findings += _judge_autocast(without_dropout)
        exam.train(True)
        _freeze_batch_norms(exam)
        dropout = _draws(exam)
        with_dropout = _run(step, exam) if dropout else without_dropout
        if dropout:
            findings += _judge_randomness(exam, with_dropout) + _judge_kept_graphs(exam, with_dropout, plan)
    error = _compare(without_dropout.encoders, truth.encoders)
    return AuditReport(
        findings=tuple(findings),
        error=_worst_error(without_dropout.encoders, truth.encoders),
        scale=error.scale,
        cosine=error.cosine if error.size else 0.0,
        temperature=_compare(without_dropout.own, truth.own).scale if truth.own else None,
        chunks=tuple(len(call.reps) for call in without_dropout.log.second),
        replayed=_replays(with_dropout)[0],
        alike=_replays(with_dropout)[1],
        dropout=dropout,
        batch=exam.rows(),
    )


def _exam(step: Any, encoders: Any, inputs: Any, loss_fn: Any, seed: int, tolerance: float, ranks: int) -> Exam:
    for name, value in (("step", step), ("loss_fn", loss_fn)):
        if not callable(value):
            raise refuse(name, "must be callable", type(value).__name__)
    if not isinstance(encoders, (list, tuple)) or len(encoders) != len(inputs):
        raise refuse("encoders", "must be a list with one entry for each of the inputs", encoders)
    for number, encoder in enumerate(encoders):
        if not isinstance(encoder, nn.Module):
            rule = "must be a torch module, so that its gradients can be read"
            raise refuse(f"encoders[{number}]", rule, type(encoder).__name__)
    positive_number("tolerance", tolerance)
    copies, loss = copy.deepcopy((list(encoders), loss_fn))
    for module in [*copies, *([loss] if isinstance(loss, nn.Module) else [])]:
        module.double()
    exam = Exam(copies, [_double(given) for given in inputs], loss, seed, tolerance, positive_int("ranks", ranks))
    exam.rows()
    if not exam.encoder_parameters:
        raise refuse("encoders", "must have a parameter that is trained", "none")
    return exam


def _double(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {name: _double(value) for name, value in inputs.items()}
    return tuple(map(_double, inputs)) if isinstance(inputs, (list, tuple)) else inputs


def _naive(encoders: Sequence[Any], inputs: Sequence[Any], loss_fn: Any) -> Tensor:
    """The oracle: everything with its graph, one loss, one backward."""
    loss = loss_fn(*(_encode(encoder, given) for encoder, given in zip(encoders, inputs, strict=True)))
    loss.backward()
    return loss


def _encode(encoder: nn.Module, inputs: Any) -> Tensor:
    if isinstance(inputs, Tensor):
        return encoder(inputs)
    return encoder(**inputs) if isinstance(inputs, Mapping) else encoder(*inputs)


def _run(step: Step, exam: Exam) -> Outcome:
    """One step from the exam's seed, and what an SGD optimizer with lr=1 would then take off each parameter."""
    parameters = [*exam.encoder_parameters, *exam.loss_parameters]
    for parameter in parameters:
        parameter.grad = None
    log = CallLog()
    stand_ins, loss_fn = logged(exam.encoders, exam.loss_fn, log)
    torch.manual_seed(exam.seed)
    loss = step(stand_ins, exam.inputs, loss_fn)
    changes = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters]
    split = len(exam.encoder_parameters)
    value = float(loss.detach()) if isinstance(loss, Tensor) else None
    return Outcome(value, changes[:split], changes[split:], log, generator_states(*exam.encoders))


# --- what may be wrong ----------------------------------------------------------------------------------------


def _batch_norm(step: Step, exam: Exam) -> list[Finding]:
    """BatchNorm in training mode: did a step count more forwards than one for each tower?"""
    layers = [part for part in nn.ModuleList(exam.encoders).modules() if isinstance(part, BATCH_NORMS)]
    layers = [part for part in layers if part.training and part.num_batches_tracked is not None]
    if not layers:
        return []
    before = [int(layer.num_batches_tracked) for layer in layers]
    try:
        outcome = _run(step, exam)
    except ValueError:
        return []  # refused, as it should be
    most = max(int(layer.num_batches_tracked) - count for layer, count in zip(layers, before, strict=True))
    if most <= len(exam.inputs):
        return []
    words = (
        f"statistics of chunks, not of the batch, and {most} updates of the running averages in one step "
        f"({len(outcome.log.calls)} forwards). Put BatchNorm into eval mode, or use LayerNorm."
    )
    return [Finding("BatchNorm", words)]


def _freeze_batch_norms(exam: Exam) -> None:
    for part in nn.ModuleList(exam.encoders).modules():
        if isinstance(part, BATCH_NORMS):
            part.eval()


def _judge_loss(exam: Exam, truth: Outcome, outcome: Outcome) -> list[Finding]:
    """Is the number that the step returns the loss of the whole batch?"""
    if outcome.loss is None or math.isclose(outcome.loss, truth.loss, rel_tol=exam.tolerance, abs_tol=1e-9):
        return []
    if not math.isfinite(outcome.loss):
        words = f"the loss is {outcome.loss}, plain autograd's {truth.loss:.4f}: is there a log(exp(x))? Use logsumexp."
        return [Finding("not a number", words)]
    if _fewer_rows(exam, outcome):
        return []  # told of the gradient
    without = _without_temperature(exam)
    if without is not None and math.isclose(outcome.loss, without, rel_tol=exam.tolerance):
        words = f"the loss is {outcome.loss:.4f}, that of plain dot products; yours is {truth.loss:.4f}."
        return [Finding("temperature not applied", words)]
    return [Finding("another loss", f"the loss is {outcome.loss:.6g}, plain autograd's is {truth.loss:.6g}.")]


def _without_temperature(exam: Exam) -> float | None:
    """InfoNCE of the dot products as they are; None where the representations are no pairs of vectors."""
    with torch.no_grad():
        reps = [_encode(encoder, given) for encoder, given in zip(exam.encoders, exam.inputs, strict=True)]
    if len(reps) != 2 or any(rep.ndim != 2 for rep in reps) or len(reps[1]) % len(reps[0]):
        return None
    labels = torch.arange(len(reps[0]), device=reps[0].device) * (len(reps[1]) // len(reps[0]))
    return float(F.cross_entropy(reps[0] @ reps[1].T, labels))


def _judge_gradient(exam: Exam, truth: Outcome, outcome: Outcome) -> list[Finding]:
    """The gradient with dropout off: its size, its direction, and the loss's own parameters."""
    if not any(bool(change.any()) for change in outcome.encoders):
        return [Finding("no gradient", "nothing reached the encoders that the step was given.")]
    findings, error = [], _compare(outcome.encoders, truth.encoders)
    if _worst_error(outcome.encoders, truth.encoders) > exam.tolerance:
        if not error.cosine > 1 - exam.tolerance**2:
            return [_wrong_direction(exam, truth, outcome)]
        findings.append(_wrong_size(exam, error.scale))
    if truth.own and _worst_error(outcome.own, truth.own) > exam.tolerance:
        own = _compare(outcome.own, truth.own).scale
        if math.isclose(own, error.scale, rel_tol=1e-3) and findings:
            return findings
        times, calls = f"{own:.3f} times the right one", len(outcome.log.loss_rows)
        words = f"the gradient of the loss's own parameters is {times}."
        if calls > 1 and math.isclose(own, calls, rel_tol=1e-3):
            words += f" The whole loss was backpropagated {calls} times, once for each chunk."
            findings.append(Finding("whole loss for every chunk", words))
        else:
            findings.append(Finding("temperature's gradient", words))
    return findings


def _wrong_size(exam: Exam, scale: float) -> Finding:
    """The direction is right. Which known factor is it?"""
    rows = exam.rows()
    if math.isclose(scale, rows[0], rel_tol=1e-3):
        words = f"gradients are {scale:.2f} times too large: B? A sum was backpropagated where a mean is reported."
        return Finding("B times too large", f"{words} Adam hides it; SGD and clipping by norm do not.")
    if exam.ranks > 1 and math.isclose(scale * exam.ranks, 1, rel_tol=1e-3):
        words = f"gradients are {scale:.3f} of the right size, 1/{exam.ranks}: the factor W of the processes is lost."
        return Finding("1/W of the gradient", words)
    if math.isclose(1 / scale, round(1 / scale), rel_tol=1e-3) and round(1 / scale) > 1:
        words = f"gradients are {scale:.3f} of the right size, 1/{round(1 / scale)}: divided once too often?"
        return Finding("too small", f"{words} A mean over chunks, or over W processes without the factor W.")
    return Finding("wrong size", f"gradients are {scale:.3f} times the right ones, in the right direction.")


def _wrong_direction(exam: Exam, truth: Outcome, outcome: Outcome) -> Finding:
    """Another gradient altogether: why?"""
    angle = math.degrees(math.acos(max(-1.0, min(1.0, _compare(outcome.encoders, truth.encoders).cosine))))
    off = f"the gradient is {angle:.0f} degrees off."
    if _fewer_rows(exam, outcome):
        told = ", ".join(str(rows[0]) for rows in outcome.log.loss_rows)
        words = f"{off} The loss saw {told} queries at a time: in-batch negatives are lost."
        return Finding("a loss for every chunk", words)
    misplaced, missing = _misplaced_rows(truth, outcome)
    if misplaced or missing:
        words = f"{off} {misplaced} rows were given another row's cached gradient, {missing} rows none."
        return Finding("cached gradients of other rows", f"{words} Is the cache split by a nominal size?")
    return Finding("another gradient", off)


def _misplaced_rows(truth: Outcome, outcome: Outcome) -> tuple[int, int]:
    """(rows that got another row's gradient, rows that got none), by the gradients that came back to each forward."""
    whole, pieces = truth.log.calls, [call for call in outcome.log.second if call.gradient is not None]
    calls = [*whole, *pieces]
    if not pieces or any(call.reps.ndim != 2 or call.reps.shape[1] != calls[0].reps.shape[1] for call in calls):
        return 0, 0
    known, right = torch.cat([call.reps for call in whole]), torch.cat([call.gradient for call in whole])
    given, used = torch.cat([call.reps for call in pieces]), torch.cat([call.gradient for call in pieces])
    small = 1e-6 * right.norm(dim=1).median()
    same_row, same_gradient = torch.cdist(given, known) <= 1e-6 * known.norm(dim=1), torch.cdist(used, right) <= small
    own, none = (same_row & same_gradient).any(dim=1), used.norm(dim=1) <= small
    missing = int((~same_row.any(dim=0)).sum()) + int((none & ~own).sum())
    return int((same_gradient.any(dim=1) & ~own & ~none).sum()), missing


def _judge_autocast(outcome: Outcome) -> list[Finding]:
    """Were both forwards under the same autocast?"""
    first = {call.autocast for call in outcome.log.first}
    second = {call.autocast for call in outcome.log.second}
    if not first or not second or first == second:
        return []
    told = [" and ".join(sorted(_dtype_name(dtype) for dtype in dtypes)) for dtypes in (first, second)]
    words = f"forwards without a graph ran under {told[0]}, those with one under {told[1]}."
    return [Finding("autocast not restored", f"{words} The cached gradients belong to other representations.")]


def _judge_randomness(exam: Exam, outcome: Outcome) -> list[Finding]:
    """Does each second forward give the representations of the first, and are the generators left further on?"""
    findings = []
    replayed, alike = _replays(outcome)
    if alike < replayed:
        words = f"{replayed - alike} of {replayed} second forwards gave other representations than the first:"
        words += " other dropout masks. Record the generators' states with the inputs' devices, and put them back."
        findings.append(Finding("random states not replayed", words))
    if any(torch.equal(outcome.state, call.state) for call in outcome.log.calls):
        words = "after the step the generator stands where a forward began: the next step draws the same dropout again."
        findings.append(Finding("generators turned back", words))
    return findings


def _judge_kept_graphs(exam: Exam, outcome: Outcome, plan: Sequence[Sequence[Chunk]] | None) -> list[Finding]:
    """With dropout on: the gradient against the same chunks' kept graphs, where the chunks are told."""
    if plan is None:
        return []

    def kept(encoders: Sequence[Any], inputs: Sequence[Any], loss_fn: Any) -> Tensor:
        reps = []
        for encoder, given, chunks in zip(encoders, inputs, plan, strict=True):
            parts = torch.cat([_encode(encoder, take(given, chunk)) for chunk in chunks])
            order = torch.tensor([row for chunk in chunks for row in chunk.rows], device=parts.device)
            reps.append(parts[order.argsort()])
        loss = loss_fn(*reps)
        loss.backward()
        return loss

    error = _worst_error(outcome.encoders, _run(kept, exam).encoders)
    if error <= exam.tolerance:
        return []
    return [Finding("gradient under dropout", f"it is off by {error:.2g} from the same chunks with their graphs kept.")]


# --- numbers --------------------------------------------------------------------------------------------------


def _trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [parameter for parameter in nn.ModuleList(modules).parameters() if parameter.requires_grad]


def _draws(exam: Exam) -> bool:
    """Whether a forward in training mode moves the random generator."""
    before = generator_states(*exam.encoders)
    with torch.no_grad():
        for encoder, given in zip(exam.encoders, exam.inputs, strict=True):
            _encode(encoder, given)
    return not torch.equal(before, generator_states(*exam.encoders))


def _fewer_rows(exam: Exam, outcome: Outcome) -> bool:
    return any(rows and rows[0] < exam.rows()[0] for rows in outcome.log.loss_rows)


def _compare(gradients: Sequence[Tensor], truth: Sequence[Tensor]) -> GradientError:
    """All of a step's gradients as one vector, against the right ones."""
    return compare_vectors(flat(truth), flat(gradients))


def _worst_error(gradients: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The worst parameter's error; where all of the truth is zero, 0 or infinity."""
    if not flat(truth).any():
        return math.inf if flat(gradients).any() else 0.0
    return worst_error(dict(enumerate(gradients)), dict(enumerate(truth)))


def _replays(outcome: Outcome) -> tuple[int, int]:
    """(forwards that repeat one without a graph, how many of them gave the same)."""
    pairs = outcome.log.replays()
    return len(pairs), sum(_alike(first.reps, second.reps) for first, second in pairs)


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(torch.allclose(first.double(), second.double(), rtol=1e-6, atol=1e-9))


def _dtype_name(dtype: torch.dtype | None) -> str:
    return "no autocast" if dtype is None else str(dtype).removeprefix("torch.")
