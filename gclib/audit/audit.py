"""Is the step that you use right? Any step against plain autograd, in float64, on your own batch; told in words.

    print(audit_step(step, [encoder, encoder], inputs, loss_fn))

`step(encoders, inputs, loss_fn) -> loss` adds to `.grad`, as gclib's steps do; another library's training step becomes
one with a few lines around it. Gradients are compared by size and not by direction alone, as the change of each
parameter in one SGD step with lr=1, because Adam hides a wrong size. The encoders are judged too: whether a second
forward is the first, rows stand alone, and padding does not matter.

Letters: B queries, N passages, C rows of a chunk, W processes.
"""

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.audit.calls import CallLog, generator_states, logged
from gclib.audit.copies import Holders, copy_inputs, leaves_of
from gclib.audit.gradients import GradientError, compare_vectors, flat, worst_error
from gclib.chunks import Chunk
from gclib.support.modules import BATCH_NORMS, modules_of
from gclib.support.validation import positive_int, positive_number, refuse
from gclib.towers import named_tensors, take
from gclib.verify import check_towers, faults_of

Step = Callable[[Sequence[Any], Sequence[Any], Any], Any]
FAULTS = {  # what an encoder may break, as `faults_of` calls it -> the finding's name
    "inputs": "the encoder writes into its inputs",
    "replay": "the second forward is another",
    "company": "rows depend on each other",
    "padding": "padding matters",
}
VAGUE = ("another gradient", "another loss", "cached gradients of other rows")  # what an encoder's fault explains


@dataclass(frozen=True)
class Finding:
    """What was recognised: its name, what was seen, in words, and whether this step is wrong because of it."""

    name: str
    said: str
    wrong: bool = True


@dataclass(frozen=True)
class AuditReport:
    """What an audit found; print it.

    error: the worst parameter's, ||difference|| / max(||its gradient||, 1e-3 ||all||). scale: the factor that brings
    the right gradient of the encoders nearest to the step's; cosine: of the angle between both; NaN where there is no
    gradient to judge. temperature: the same factor for the loss's own parameters, wherever they are hidden, None where
    it has none. chunks: rows of each forward with a graph. dropout: whether the encoders draw random numbers; replayed:
    forwards with a graph that then repeated one without; alike: those that gave the same representations. batch: rows
    of each tower. unjudged: what this audit says nothing about.
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
    unjudged: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        """Whether nothing is wrong with this step; what is worth knowing of its encoders may be told all the same."""
        return not any(finding.wrong for finding in self.findings)

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
        told = [f"  {'WRONG' if one.wrong else 'NOTE'}, {one.name}: {one.said}" for one in self.findings]
        lines += [*told, *(["  Nothing wrong was found."] if self.right else [])]
        return "\n".join([*lines, *(f"  Not judged: {what}." for what in self.unjudged)])


@dataclass(frozen=True)
class Working:
    """Copies in float64 for one run: inputs and loss, and what is trained: of the encoders, and of the loss alone."""

    inputs: list[Any]
    loss_fn: Callable[..., Tensor]
    encoder_leaves: list[Tensor]
    own_leaves: list[Tensor]
    copies: dict[int, Any]


@dataclass(frozen=True)
class Exam:
    """The caller's encoders, inputs and loss, and how they are lent to a run.

    own: the loss's parameters, and all other tensors that it trains; hidden: those of them that no copy stands for.
    """

    encoders: list[nn.Module]
    inputs: list[Any]
    loss_fn: Callable[..., Tensor]
    holders: Holders
    seed: int
    tolerance: float
    ranks: int
    own: tuple[Tensor, ...] = ()
    hidden: tuple[Tensor, ...] = ()

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows of each tower."""
        return tuple(len(next(iter(named_tensors(given).values()))) for given in self.inputs)

    @property
    def batch_norms(self) -> list[nn.Module]:
        """The encoders' layers of that kind."""
        return [part for part in nn.ModuleList(self.encoders).modules() if isinstance(part, BATCH_NORMS)]

    @contextmanager
    def working(self, training: bool | None) -> Iterator[Working]:
        """Inside, a run may do what it likes. training: dropout on or off, BatchNorm as in use; None: all as given."""
        trained, own = _trained(self.encoders), self.own
        with self.holders.lent() as copies, ExitStack() as back:
            for leaf in self.hidden:
                back.callback(setattr, leaf, "grad", leaf.grad)
                leaf.grad = None
            loss_fn = self.holders.copy(self.loss_fn, copies, "loss_fn")
            inputs = [copy_inputs(given) for given in self.inputs]
            leaves = [copies[id(leaf)] for leaf in trained]
            leaves += [t for given in inputs for t in named_tensors(given).values() if t.requires_grad]
            if training is not None:
                self._set_mode(training)
            torch.manual_seed(self.seed)
            random.seed(self.seed)
            np.random.seed(self.seed % 2**32)
            yield Working(inputs, loss_fn, leaves, [copies.get(id(leaf), leaf) for leaf in own], copies)

    def _set_mode(self, training: bool) -> None:
        """Parts that the caller froze in an encoder that trains stay frozen."""
        for encoder in self.encoders:
            if not training or not any(part.training for part in encoder.modules()):
                encoder.train(training)
        for part in self.batch_norms:
            part.eval()


@dataclass(frozen=True)
class Outcome:
    """What a step left: its loss, the change of encoders' and loss's parameters in an SGD step with lr=1.

    updates: the most that a BatchNorm layer counted.
    """

    loss: float | None
    encoders: list[Tensor]
    own: list[Tensor]
    log: CallLog
    state: Tensor
    updates: int


@dataclass(frozen=True)
class Sitting:
    """The encoders in one mode: their faults, whether they draw random numbers, the step's outcome or its refusal."""

    faults: dict[str, str]
    draws: bool
    outcome: Outcome | None
    refusal: str = ""

    @property
    def replays(self) -> tuple[int, int]:
        """(forwards that repeat one without a graph, how many of them gave the same)."""
        pairs = self.outcome.log.replays() if self.outcome else []
        return len(pairs), sum(_alike(first.reps, second.reps) for first, second in pairs)


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
    if the step stands for several processes. A small batch with a short last chunk finds most. Encoders that a chunked
    step can't take (their second forward is another, rows depend on each other, padding matters, inputs are written
    to) are named, also where the step refuses them.

    The caller's modules, gradients, inputs, closures and random generators are untouched: each run starts from their
    present state, in copies. Raises ValueError for encoders that are no modules, where there is nothing to train, for
    inputs with a graph of their own or from inference_mode, and for what can't be run twice or in float64; passes on
    what the step raises for other reasons.
    """
    exam = _exam(step, encoders, inputs, loss_fn, seed=seed, tolerance=tolerance, ranks=ranks)
    with _alone():
        exam, first_loss = _find_own_leaves(exam)
        findings = _batch_norm(step, exam)
        truth = _run(_naive, exam, False)
        if not _close(exam, truth.loss, first_loss):
            rule = "must give the same number again: it has a memory that an audit can't put back (keep it in a module)"
            raise refuse("loss_fn", rule, f"{truth.loss} after {first_loss}")
        calm = _sit(step, exam, False)
        findings += _judge_calm(exam, truth, calm)
        lively = _sit(step, exam, True) or replace(calm, draws=False)
        findings += _judge_lively(exam, lively, plan)
    return _report(exam, truth, calm, lively, _merged(findings), plan)


def _report(
    exam: Exam, truth: Outcome, calm: Sitting, lively: Sitting, findings: Sequence[Finding], plan: Any
) -> AuditReport:
    outcome, nan = calm.outcome, float("nan")
    error = _compare(outcome.encoders, truth.encoders) if outcome else GradientError(nan, nan, nan)
    worst = _worst_error(outcome.encoders, truth.encoders) if outcome else nan
    unjudged = {
        "the gradient, for the step refuses its encoders": outcome is None,
        "the loss, for the step returns no number": outcome is not None and outcome.loss is None,
        "the gradient, for the encoders draw random numbers in eval mode too": calm.draws and worst > exam.tolerance,
        "the gradient with dropout on (`plan` would tell its chunks)": lively.draws and plan is None,
        "the gradient with BatchNorm in training mode": bool(exam.batch_norms),
        **{f"{name}, which cannot be copied: runs share it": True for name in exam.holders.uncopied},
    }
    return AuditReport(
        findings=tuple(findings),
        error=worst,
        scale=error.scale,
        cosine=0.0 if error.size == 0 else error.cosine,
        temperature=_compare(outcome.own, truth.own).scale if truth.own and outcome else None,
        chunks=tuple(len(call.reps) for call in outcome.log.second) if outcome else (),
        replayed=lively.replays[0],
        alike=lively.replays[1],
        dropout=lively.draws,
        batch=exam.rows,
        unjudged=tuple(what for what, holds in unjudged.items() if holds),
    )


def _exam(step: Any, encoders: Any, inputs: Any, loss_fn: Any, *, seed: int, tolerance: float, ranks: int) -> Exam:
    if not callable(step):
        raise refuse("step", "must be callable", type(step).__name__)
    if isinstance(encoders, (list, tuple)):
        for number, encoder in enumerate(encoders):
            if not isinstance(encoder, nn.Module):
                rule = "must be a torch module, so that its gradients can be read"
                raise refuse(f"encoders[{number}]", rule, type(encoder).__name__)
    check_towers(encoders, inputs, loss_fn, in_chunks=False)
    for number, given in enumerate(inputs):
        if any(tensor.grad_fn is not None for tensor in named_tensors(given).values()):
            rule = "must not have a graph of their own: detach them, or make that part of the encoder"
            raise refuse(f"inputs[{number}]", rule, "a tensor with a grad_fn")
    leaves = [tensor for given in inputs for tensor in named_tensors(given).values() if tensor.requires_grad]
    if not _trained(encoders) and not leaves:
        raise refuse("encoders", "must have a parameter that is trained", "none")
    holders = Holders.behind([*encoders, loss_fn], modules_of(step))
    tolerance, ranks = positive_number("tolerance", tolerance), positive_int("ranks", ranks)
    return Exam(list(encoders), list(inputs), loss_fn, holders, seed, tolerance, ranks)


@contextmanager
def _alone() -> Iterator[None]:
    """The random generators of torch, numpy and Python are put back; steps need not warn of what is judged here."""
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"encoders\[\d+\] depends on how far a row is padded")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _find_own_leaves(exam: Exam) -> tuple[Exam, float]:
    """The exam with all that the loss trains beside the encoders, read off its graph; and the loss."""
    own = {id(leaf): leaf for leaf in _trained([exam.loss_fn] if isinstance(exam.loss_fn, nn.Module) else [])}
    with exam.working(False) as working:
        originals = {id(copy): exam.holders.tensors.get(number) for number, copy in working.copies.items()}
        known = {id(leaf) for leaf in working.encoder_leaves}
        try:
            loss = working.loss_fn(*map(_encode, exam.encoders, working.inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise refuse(
                "encoders and loss_fn", "must run in float64, as an audit does", f"an error: {error}"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.grad_fn is None:
            raise refuse("loss_fn", "must return one number that depends on the representations", type(loss).__name__)
        leaves = [leaf for leaf in leaves_of(loss) if id(leaf) not in known]
        hidden = tuple(leaf for leaf in leaves if originals.get(id(leaf)) is None)
        found = [originals.get(id(leaf)) if originals.get(id(leaf)) is not None else leaf for leaf in leaves]
    own |= {id(leaf): leaf for leaf in found}
    for leaf in _trained(exam.encoders):
        own.pop(id(leaf), None)
    return replace(exam, own=tuple(own.values()), hidden=hidden), float(loss.detach())


def _naive(encoders: Sequence[Any], inputs: Sequence[Any], loss_fn: Any) -> Tensor:
    """The oracle: everything with its graph, one loss, one backward."""
    loss = loss_fn(*map(_encode, encoders, inputs))
    loss.backward()
    return loss


def kept_graphs_step(
    encoders: Sequence[Any], inputs: Sequence[Any], loss_fn: Any, *, plan: Sequence[Sequence[Chunk]]
) -> Tensor:
    """The oracle where random numbers are drawn: each tower's chunks in their order, all graphs kept, one backward."""
    reps = []
    for encoder, given, chunks in zip(encoders, inputs, plan, strict=True):
        parts = torch.cat([_encode(encoder, take(given, chunk)) for chunk in chunks])
        order = torch.tensor([row for chunk in chunks for row in chunk.rows], device=parts.device)
        reps.append(parts[order.argsort()])
    loss = loss_fn(*reps)
    loss.backward()
    return loss


def _encode(encoder: nn.Module, inputs: Any) -> Tensor:
    if isinstance(inputs, Tensor):
        return encoder(inputs)
    return encoder(**inputs) if isinstance(inputs, Mapping) else encoder(*inputs)


def _run(step: Step, exam: Exam, training: bool | None) -> Outcome:
    """One step from the exam's seed, and what an SGD optimizer with lr=1 would then take off each parameter."""
    log = CallLog()
    with exam.working(training) as working:
        layers = [part for part in exam.batch_norms if part.training and part.num_batches_tracked is not None]
        before = [int(layer.num_batches_tracked) for layer in layers]
        stand_ins, loss_fn = logged(exam.encoders, working.loss_fn, log)
        loss = step(stand_ins, working.inputs, loss_fn)
        loss = loss.detach() if isinstance(loss, Tensor) else loss
        updates = [int(layer.num_batches_tracked) - count for layer, count in zip(layers, before, strict=True)]
        return Outcome(
            loss=float(loss) if isinstance(loss, (Tensor, Real)) else None,
            encoders=[_change(leaf) for leaf in working.encoder_leaves],
            own=[_change(leaf) for leaf in working.own_leaves],
            log=log,
            state=generator_states(*exam.encoders),
            updates=max(updates, default=0),
        )


def _change(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf).detach() if leaf.grad is None else leaf.grad.detach().to_dense().clone()


def _sit(step: Step, exam: Exam, training: bool) -> Sitting | None:
    """The encoders, then the step, in one mode. None in training mode where that mode changes nothing that is known.

    A step may refuse BatchNorm by its encoder's mode: layers that are frozen here are no reason to ask it again.
    """
    faults: dict[str, str] = {}
    with exam.working(training) as working:
        for tower in check_towers(exam.encoders, working.inputs, working.loss_fn, in_chunks=False):
            faults = faults_of(tower) | faults
        before = generator_states(*exam.encoders)
        with torch.no_grad():
            list(map(_encode, exam.encoders, working.inputs))
        draws = not torch.equal(before, generator_states(*exam.encoders))
    if training and exam.batch_norms and not draws and not faults:
        return None
    try:
        return Sitting(faults, draws, _run(step, exam, training))
    except ValueError as error:
        if not faults and not str(error).startswith("encoders["):
            raise
        return Sitting(faults, draws, None, str(error))


# --- what may be wrong ----------------------------------------------------------------------------------------


def _judge_calm(exam: Exam, truth: Outcome, calm: Sitting) -> list[Finding]:
    """With dropout off: the gradient against plain autograd's, and the encoders' faults, which may explain it."""
    if calm.outcome is None:
        return _judge_faults(exam, calm, wrong=True)
    if not math.isfinite(truth.loss) or not bool(flat(truth.encoders).isfinite().all()):
        words = f"plain autograd itself gives a loss of {truth.loss:.4g} and a gradient that is not finite."
        return [Finding("not a number", words), *_judge_faults(exam, calm, wrong=False)]
    findings = _judge_loss(exam, truth, calm.outcome) or _judge_gradient(exam, truth, calm.outcome)
    faults = _judge_faults(exam, calm, wrong=bool(findings))
    if calm.draws or any(fault.wrong for fault in faults):
        findings = [finding for finding in findings if finding.name not in VAGUE]
    return [*faults, *findings, *_judge_autocast(calm.outcome), *(_judge_randomness(calm) if calm.draws else [])]


def _judge_lively(exam: Exam, lively: Sitting, plan: Sequence[Sequence[Chunk]] | None) -> list[Finding]:
    """With dropout on: faults of the encoders in training mode, if they were given so, and the replay.

    What padding does is judged with dropout off.
    """
    lively = replace(lively, faults={kind: words for kind, words in lively.faults.items() if kind != "padding"})
    given = any(part.training for encoder in exam.encoders for part in encoder.modules())
    words = "" if given else " That is in training mode; the encoder was given in eval mode."
    findings = [replace(one, said=one.said + words) for one in _judge_faults(exam, lively, wrong=given)]
    if lively.outcome is None:
        return findings
    return [*findings, *_judge_randomness(lively), *(_judge_kept_graphs(exam, lively.outcome, plan) if plan else [])]


def _judge_faults(exam: Exam, sitting: Sitting, *, wrong: bool) -> list[Finding]:
    """The encoders' faults. One is wrong where `wrong`, and where the step does what it forbids."""
    widths = {given["attention_mask"].shape[1] for given in exam.inputs if _masked(given)}
    calls = sitting.outcome.log.calls if sitting.outcome else []
    done = {
        "inputs": True,
        "replay": len(calls) > len(exam.inputs),
        "company": any(len(call.reps) not in exam.rows for call in calls),
        "padding": any(t.shape[1] not in widths for call in calls for t in call.inputs if widths and t.ndim == 2),
    }
    if sitting.refusal and not sitting.faults:
        return [Finding("the step refuses the encoders", sitting.refusal, wrong)]
    refused = f" The step refuses it: {sitting.refusal}." if sitting.refusal else ""
    return [
        Finding(FAULTS[kind], words + refused, kind == "inputs" or wrong and (bool(refused) or done[kind]))
        for kind, words in sitting.faults.items()
    ]


def _masked(inputs: Any) -> bool:
    return isinstance(inputs, Mapping) and isinstance(inputs.get("attention_mask"), Tensor)


def _merged(findings: Sequence[Finding]) -> list[Finding]:
    """One for each name, in their order: the first that is wrong, or else the first."""
    merged: dict[str, Finding] = {}
    for finding in findings:
        earlier = merged.setdefault(finding.name, finding)
        if finding.wrong and not earlier.wrong:
            merged[finding.name] = finding
    return list(merged.values())


def _batch_norm(step: Step, exam: Exam) -> list[Finding]:
    """BatchNorm in training mode: did a step count more forwards than one for each tower?"""
    if not any(part.training for part in exam.batch_norms):
        return []
    try:
        outcome = _run(step, exam, None)
    except ValueError:
        return []  # refused, as it should be
    if outcome.updates <= len(exam.inputs):
        return []
    words = (
        f"statistics of chunks, not of the batch, and {outcome.updates} updates of the running averages in one step "
        f"({len(outcome.log.calls)} forwards). Put BatchNorm into eval mode, or use LayerNorm."
    )
    return [Finding("BatchNorm", words)]


def _judge_loss(exam: Exam, truth: Outcome, outcome: Outcome) -> list[Finding]:
    """Is the number that the step returns the loss of the whole batch?"""
    if outcome.loss is None or _close(exam, outcome.loss, truth.loss):
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
    with torch.no_grad(), exam.working(False) as working:
        reps = list(map(_encode, exam.encoders, working.inputs))
    if len(reps) != 2 or any(rep.ndim != 2 for rep in reps) or len(reps[1]) % len(reps[0]):
        return None
    labels = torch.arange(len(reps[0]), device=reps[0].device) * (len(reps[1]) // len(reps[0]))
    return float(F.cross_entropy(reps[0] @ reps[1].T, labels))


def _judge_gradient(exam: Exam, truth: Outcome, outcome: Outcome) -> list[Finding]:
    """The gradient with dropout off: its size, its direction, and the loss's own parameters."""
    if not any(bool(change.any()) for change in outcome.encoders):
        return [Finding("no gradient", "nothing reached the encoders that the step was given.")]
    if not bool(flat(outcome.encoders).isfinite().all()):
        return [Finding("not a number", "the step's gradient is not finite, and plain autograd's is.")]
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
    rows = exam.rows
    if math.isclose(scale, rows[0], rel_tol=1e-3):
        words = f"gradients are {scale:.2f} times too large: B? A sum was backpropagated where a mean is wanted."
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


def _judge_randomness(sitting: Sitting) -> list[Finding]:
    """Does each second forward give the representations of the first, and are the generators left further on?"""
    findings, log = [], sitting.outcome.log
    other = [(first, second) for first, second in log.replays() if not _alike(first.reps, second.reps)]
    replayed, redrawn = sitting.replays[0], sum(not torch.equal(one.state, two.state) for one, two in other)
    if redrawn:
        words = f"{redrawn} of {replayed} second forwards gave other representations than the first:"
        words += " other dropout masks. Record the generators' states of the inputs' and the weights' devices, and put "
        words += "them back."
        findings.append(Finding("random states not replayed", words))
    if len(other) > redrawn and "replay" not in sitting.faults:
        words = f"{len(other) - redrawn} of {replayed} second forwards gave other representations than the first, from"
        words += " the same random states: a state of the encoder, or a generator that is not torch's, has moved."
        findings.append(Finding(FAULTS["replay"], words))
    if any(call.drew and torch.equal(sitting.outcome.state, call.state) for call in log.calls):
        words = (
            "after the step the generator stands where a forward began that draws random numbers: the next step draws "
        )
        words += "the same again."
        findings.append(Finding("generators turned back", words))
    return findings


def _judge_kept_graphs(exam: Exam, outcome: Outcome, plan: Sequence[Sequence[Chunk]]) -> list[Finding]:
    """With dropout on: the gradient against the same chunks' kept graphs."""
    truth = _run(partial(kept_graphs_step, plan=plan), exam, True)
    error = _worst_error(outcome.encoders, truth.encoders)
    if error <= exam.tolerance:
        return []
    return [Finding("gradient under dropout", f"it is off by {error:.2g} from the same chunks with their graphs kept.")]


# --- numbers --------------------------------------------------------------------------------------------------


def _trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [parameter for parameter in nn.ModuleList(modules).parameters() if parameter.requires_grad]


def _fewer_rows(exam: Exam, outcome: Outcome) -> bool:
    return any(rows and rows[0] < exam.rows[0] for rows in outcome.log.loss_rows)


def _compare(gradients: Sequence[Tensor], truth: Sequence[Tensor]) -> GradientError:
    """All of a step's gradients as one vector, against the right ones."""
    return compare_vectors(flat(truth), flat(gradients))


def _worst_error(gradients: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The worst parameter's error; where all of the truth is zero, 0 or infinity; NaN where it is not finite."""
    if not flat(truth).isfinite().all():
        return math.nan
    if not flat(truth).any():
        return math.inf if flat(gradients).any() else 0.0
    return worst_error(dict(enumerate(gradients)), dict(enumerate(truth)))


def _close(exam: Exam, one: float, other: float) -> bool:
    """Whether two losses are the same number, NaN too."""
    same = math.isclose(one, other, rel_tol=exam.tolerance, abs_tol=1e-9)
    return same or (math.isnan(one) and math.isnan(other))


def _alike(first: Tensor, second: Tensor) -> bool:
    one, two = first.double(), second.double()
    return one.shape == two.shape and torch.allclose(one, two, rtol=1e-6, atol=1e-9, equal_nan=True)


def _dtype_name(dtype: torch.dtype | None) -> str:
    return "no autocast" if dtype is None else str(dtype).removeprefix("torch.")
