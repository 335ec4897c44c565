"""What a step assumes, checked: arguments before it begins, an encoder in its first step.

A chunk's gradient is right if (1) encoding it again returns the same representations, (2) a row has the same one in
whatever company, and (3) with or without its padding. Spectral norm, running statistics and generators of numpy break
the first; BatchNorm, a mean over the batch or routing with a capacity the second; an LSTM, a convolution or a Fourier
layer over padded rows the third. None of them raises: the gradient is another one, silently. So the first step of an
encoder looks; later ones trust it.
"""

import random
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from gclib.chunks import Chunk, choose_largest, halved_to
from gclib.distributed import data_parallel, numbers_of_ranks, refuse_flat_shards, sharded_units, world_size
from gclib.support.modules import Autocast, modules_of, refuse_batch_norm, takes, training_mode
from gclib.support.validation import check_mask, has_values, one_of, refuse
from gclib.towers import (
    WRITES,
    Job,
    Tower,
    encode_chunk,
    generators_of,
    named_tensors,
    plan_jobs,
    row_lengths,
    trimmed_names,
)

PASSED_THROUGH = (bool, int, float, str, type(None))  # what inputs may hold beside tensors
WHEN = ("first", "always", "never")
# How far two forwards of the same rows may be apart, ||difference|| / ||representations||: their kernels may differ.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
SAMPLED = 8  # rows that are looked at in other company, at most
TF32_TOLERANCE = 5e-3  # float32 products on a card that rounds their factors to 10 bits
TINY = float(np.finfo(np.float64).tiny)
CAUSES = (
    "The gradient would be another one. Modules that change their own state in a forward (spectral norm, running "
    "statistics) belong into eval mode; random numbers must be torch's. verify='never' trusts the encoder all the same"
)
_seen: WeakKeyDictionary[Any, dict[tuple, bool]] = WeakKeyDictionary()


def check_towers(
    encoders: Any,
    inputs: Any,
    loss_fn: Any,
    *,
    mask: Any = None,
    on_phase: Any = None,
    scaler: Any = None,
    in_chunks: bool = True,
    token_inputs: Any = None,
    hooks: bool = False,
) -> list[Tower]:
    """The towers of a step, once all of its arguments are found to fit; ValueError naming the one that does not."""
    if not torch.is_grad_enabled():
        raise refuse("torch.no_grad()", "or inference_mode must not be around a step, which makes gradients", "one")
    for name, value in (("encoders", encoders), ("inputs", inputs)):
        if not isinstance(value, (list, tuple)) or len(value) == 0:
            raise refuse(name, "must be a list or tuple with one entry for each tower", type(value).__name__)
    if len(encoders) != len(inputs):
        raise refuse("inputs", f"must be one for each of the {len(encoders)} towers", f"{len(inputs)} inputs")
    for name, value in (("loss_fn", loss_fn), ("on_phase", on_phase)):
        if not callable(value) and not (name == "on_phase" and value is None):
            raise refuse(name, "must be callable", type(value).__name__)
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise refuse("scaler", "must have a scale(loss) method, as torch.amp.GradScaler has", type(scaler).__name__)
    _check_token_inputs(token_inputs, inputs)
    towers = []
    for number, (encoder, tower_inputs) in enumerate(zip(encoders, inputs, strict=True)):
        if not callable(encoder):
            raise refuse(f"encoders[{number}]", "must be callable", type(encoder).__name__)
        rows = check_inputs(tower_inputs, number)
        names = trimmed_names(tower_inputs, token_inputs)
        width = tower_inputs["attention_mask"].shape[1] if names else 0
        towers.append(Tower(number, encoder, tower_inputs, rows, names, width))
        _check_devices(towers[-1])
        if in_chunks:
            refuse_batch_norm(f"encoders[{number}]", encoder, "a chunk")
            refuse_flat_shards(f"encoders[{number}]", encoder)
            _refuse_history(towers[-1])
        if hooks:
            check_hooks(f"encoders[{number}]", encoder, towers[-1].kind, stacklevel=4)
    if mask is not None and not takes(loss_fn, towers, {"mask": mask}):
        got = f"a {getattr(loss_fn, '__name__', type(loss_fn).__name__)} that does not"
        raise refuse("loss_fn", f"must take the representations of {len(towers)} towers and mask=", got)
    _check_positives_stay(mask, towers)
    return towers


def _check_token_inputs(names: Any, inputs: Sequence[Any]) -> None:
    """ValueError for anything but names of which each is an entry of some tower's inputs."""
    if names is None:
        return
    if isinstance(names, str) or not isinstance(names, Collection):
        raise refuse("token_inputs", "must be a list of names of entries, or None", names)
    known = {key for tower_inputs in inputs if isinstance(tower_inputs, Mapping) for key in tower_inputs}
    if unknown := [name for name in names if name not in known]:
        raise refuse("token_inputs", "must name entries of the inputs", unknown)


def check_inputs(inputs: Any, tower: int) -> int:
    """The number of rows, where `inputs` is well formed; ValueError naming tower and entry where not."""
    name = f"inputs[{tower}]"
    if not isinstance(inputs, (Tensor, tuple, list, Mapping)):
        raise refuse(name, "must be a Tensor, a tuple of Tensors or a mapping of Tensors", type(inputs).__name__)
    if not isinstance(inputs, Tensor):
        items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
        for key, value in items:
            if not isinstance(value, (Tensor, *PASSED_THROUGH)):
                rule = "must be a Tensor with rows first or a plain value (put anything else into a lambda)"
                raise refuse(f"{name}[{key!r}]", rule, type(value).__name__)
    tensors = named_tensors(inputs)
    if not tensors:
        raise refuse(name, "must hold at least one Tensor", "no tensor")
    rows = {f"{name}{key}" if key.startswith("[") else name: t.shape[0] if t.ndim else 0 for key, t in tensors.items()}
    first = next(iter(rows.values()))
    for key, count in rows.items():
        if count == 0:
            raise refuse(key, "must have at least one row", "an empty batch or a tensor without rows")
        if count != first:
            raise refuse(key, f"must have the {first} rows that its tower's first tensor has", f"{count} rows")
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1 or "meta" in {device.type for device in devices}:
        raise refuse(name, "must be on one device, and not on meta", f"{sorted(map(str, devices))}")
    if any(tensor.is_inference() for tensor in tensors.values()):
        raise refuse(name, "must not be made under inference_mode, or be cloned outside of it", "an inference tensor")
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if isinstance(ids, Tensor) and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise refuse(f"{name}['input_ids']", "must be whole numbers (torch.long)", str(ids.dtype))
    return first


def _check_devices(tower: Tower) -> None:
    """Inputs must be on a device that the encoder's parameters are on."""
    devices = {parameter.device for parameter in tower.parameters}
    if devices and tower.tensors[0].device not in devices:
        rule = f"must be on its encoder's device {sorted(map(str, devices))}"
        raise refuse(f"inputs[{tower.number}]", rule, str(tower.tensors[0].device))


def _refuse_history(tower: Tower) -> None:
    """Each chunk would backpropagate through the graph that made the inputs, once more each time."""
    if any(tensor.requires_grad and not tensor.is_leaf for tensor in tower.tensors):
        rule = "must not have a graph of their own in a chunked step: detach them, or make that part of the encoder"
        raise refuse(f"inputs[{tower.number}]", rule, "a tensor with a grad_fn")


def _check_positives_stay(mask: Any, towers: Sequence[Tower]) -> None:
    """A mask (B, N) of the first two towers' rows leaves out no positive; its values are read, where it has any. A rule
    (`gclib.losses.masks`), which never does, says itself whether it is this batch's.
    """
    if mask is None:
        return
    queries = towers[0].rows
    passages = towers[1].rows if len(towers) > 1 else queries
    device = towers[0].tensors[0].device
    if callable(getattr(mask, "check", None)):
        mask.check(queries, passages, device)
        return
    check_mask(mask, queries, passages, device)
    if not has_values(mask) or passages % queries:
        return
    if bool(mask[torch.arange(queries), torch.arange(queries) * (passages // queries)].any()):
        raise refuse("mask", "must not leave out a positive (query i, passage i * (1 + K))", "a mask that does")


def plan_verified(towers: Sequence[Tower], verify: str, **cut: Any) -> tuple[list[Job], "Verification"]:
    """`plan_jobs`, and what the step still has to see; once the rows of new encoders have been looked at.

    A tower that padding changes is planned untrimmed, with a warning; ValueError where a ready plan would trim it.
    """
    one_of("verify", verify, WHEN)
    for tower in towers if verify != "never" else ():
        check_hooks(f"encoders[{tower.number}]", tower.encoder, tower.kind, stacklevel=5)
    jobs = plan_jobs(towers, **cut)
    for tower in {job.tower.number: job.tower for job in jobs}.values() if cut["plan"] is not None else ():
        _refuse_cut_off(tower)
    padded = Verification(jobs, verify).find_padded()
    if padded and cut["plan"] is not None:
        rule = f"must not trim the rows of towers {sorted(padded)}, whose encoders depend on padding"
        raise refuse("plan", rule, "chunks that are narrower than the batch")
    if padded:
        towers = [replace(tower, trimmed=(), width=0) if tower.number in padded else tower for tower in towers]
        jobs = plan_jobs(towers, **cut)
    if world_size() > 1 and sharded_units([tower.encoder for tower in towers]):
        jobs = same_calls(jobs)
    checks = Verification(jobs, verify)
    checks.check_company()
    return jobs, checks


def _refuse_cut_off(tower: Tower) -> None:
    """ValueError where a ready chunk is narrower than one of its rows: tokens would be lost."""
    lengths = row_lengths(tower.inputs, tower.trimmed)
    for chunk in tower.chunks if lengths and has_values(tower.inputs["attention_mask"]) else ():
        if (longest := max(lengths[row] for row in chunk.rows)) > chunk.width:
            rule = f"must have chunks as wide as their rows of inputs[{tower.number}], here {longest} tokens"
            raise refuse("plan", rule, f"a chunk of width {chunk.width}")


def check_hooks(argument: str, encoder: Any, device_type: str, *, stacklevel: int) -> None:
    """ValueError for parameters that are stepped as soon as they have a gradient; a warning for hooks on gradients.

    Both run once a chunk: an optimizer would step on a part of the gradient, and what is not linear (a clamp) gives
    another one than on the whole. A hook whose `only_reads` is true (the ledger's) may stay.
    """
    named = [(name, p) for module in modules_of(encoder) for name, p in module.named_parameters()]
    for name, parameter in named:
        hooks = (parameter._post_accumulate_grad_hooks or {}).values()
        if not all(getattr(hook, "only_reads", False) for hook in hooks):
            rule = "must have no hooks that run as soon as a gradient is there: in a chunked step it is a chunk's"
            raise refuse(argument, rule, f"one on {name}")
    hooked = [name for name, parameter in named if parameter._backward_hooks]
    if hooked and seen(encoder, "hooks", device_type) is None:
        learn(encoder, "hooks", device_type, True)
        words = "runs once a chunk, not once a step: right if it is linear; clip or clamp after the step instead."
        warnings.warn(f"{argument}: the gradient hook on {hooked[0]} {words}", stacklevel=stacklevel)


def same_calls(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, in as many chunks a tower, and with as many of them retained, on this rank as on every other.

    Sharded encoders communicate at each call, and a rank that calls once less leaves the others waiting. The tower's
    biggest chunk is halved until there are as many as the rank with the most has. How many of a tower are retained is
    decided alike on all ranks: those of the tower with the most tokens a chunk first. One message, read before the step
    begins. Raises ValueError, on every rank, where one has fewer rows than another has chunks.
    """
    towers = sorted({job.tower.number: job.tower for job in jobs}.values(), key=lambda tower: tower.number)
    own = [(len(tower.chunks), tower.rows, sum(chunk.tokens for chunk in tower.chunks)) for tower in towers]
    flat = [number for numbers in own for number in numbers]
    retain = sum(job.retained for job in jobs)
    *ranks, retained = zip(*numbers_of_ranks([*flat, retain], towers[0].tensors[0].device), strict=True)
    left, evened = max(retained), []
    counts = [max(chunks) for chunks in ranks[::3]]
    for number, (count, rows) in enumerate(zip(counts, map(min, ranks[1::3]), strict=True)):
        if rows < count:
            rule = (
                f"must make at most {rows} chunks, the rows of the smallest rank: sharded encoders need as many on all"
            )
            raise refuse(f"the cut of inputs[{number}]", rule, f"{count} on one rank")
    sizes = [sum(tokens) / count for tokens, count in zip(ranks[2::3], counts, strict=True)]
    for place in sorted(range(len(towers)), key=lambda place: -sizes[place]):
        chunks = halved_to(towers[place].chunks, counts[place])
        largest = choose_largest([chunks], left)
        tower, left = replace(towers[place], chunks=tuple(chunks)), left - len(largest)
        evened += [Job(tower, number, chunk, (0, number) in largest) for number, chunk in enumerate(chunks)]
    return sorted(evened, key=lambda job: (job.retained, job.tower.number))


def even_cuts(towers: Sequence[Tower], count: int) -> None:
    """ValueError, on every rank, where an encoder is sharded and one rank would call it more often than another: the
    one that calls once less leaves the others waiting. An unsorted batch has no chunk that could be halved for it.
    """
    if world_size() == 1 or not sharded_units([tower.encoder for tower in towers]):
        return
    counts = [rank[0] for rank in numbers_of_ranks([count], towers[0].tensors[0].device)]
    if len(set(counts)) > 1:
        got = ", ".join(f"{count:,} on rank {rank}" for rank, count in enumerate(counts))
        raise refuse("chunk_size", "must make as many chunks on every rank where encoders are sharded", got)


class Conditions:
    """Those under which a loss was taken and its backward must run: autocast is put back, what else moved is refused.

    `synchronised`: the DistributedDataParallel modules that were to average this loss's gradients.
    """

    def __init__(self, encoders: Sequence[Any], towers: Sequence[Tower]):
        self.synchronised = data_parallel(encoders, synchronising=True)
        self._wrapped = bool(data_parallel(encoders))
        self._autocasts = [Autocast.ambient(kind) for kind in {tower.kind for tower in towers}]
        self._modules = [part for encoder in encoders for module in modules_of(encoder) for part in module.modules()]
        self._inputs = [tower.inputs for tower in towers]
        self._units = {part for unit in sharded_units(encoders) for part in unit.modules()}
        self._sharded = [
            p for module in self._modules if module in self._units for p in module.parameters(recurse=False)
        ]
        self._held = self._tensors()  # held, so that no other tensor gets an identity of theirs
        self._then = self._now()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Autocast as it was, and graphs are made; ValueError where weights, inputs or modes are other ones."""
        for name, then, now in zip(("encoders' modes", "weights or inputs"), self._then, self._now(), strict=True):
            if then != now:
                rule = "must be at backward() what they were when grad_cache_loss was called, for chunks are replayed"
                raise refuse(name, rule, "ones that changed in between")
        with ExitStack() as stack:
            for autocast in self._autocasts:
                stack.enter_context(autocast.restored())
            stack.enter_context(torch.enable_grad())
            try:
                yield
            except RuntimeError as error:
                if not self._wrapped or "reducer.cpp" not in str(error):
                    raise
                rule = "must take the forwards of other losses before grad_cache_loss, where one backward() is for both"
                raise refuse("DistributedDataParallel", rule, "one after it") from error

    def _tensors(self) -> list[Tensor]:
        """The inputs and weights that are there now; of sharded units, whose weights FSDP2 exchanges around each
        forward, those that were there then.
        """
        tensors = [tensor for inputs in self._inputs for tensor in named_tensors(inputs).values()]
        plain = [module for module in self._modules if module not in self._units]
        return tensors + self._sharded + [p for module in plain for p in module.parameters(recurse=False)]

    def _now(self) -> tuple[list[bool], list[tuple[int, int]]]:
        """Modes, and of each tensor which it is and how often it was written to (never, of one of inference_mode)."""
        tensors = [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in self._tensors()]
        return [module.training for module in self._modules], tensors


class Verification:
    """What a step still has to see of its towers' encoders before it trusts them.

    verify: "first" until an encoder has passed once (in its mode and autocast), "always", or "never". A callable that
    is made anew for each step, as a lambda may be, is a new encoder each time. Off under fake tensors.
    """

    def __init__(self, jobs: Sequence[Job], verify: str):
        towers = {job.tower.number: job.tower for job in jobs}
        seeing = verify != "never" and all(has_values(tensor) for tower in towers.values() for tensor in tower.tensors)
        self._always = verify == "always"
        self._towers = towers if seeing else {}
        self._jobs = [job for job in jobs if seeing and not job.retained]
        self._first: dict[tuple[int, int], tuple[np.ndarray, float]] = {}
        self._compared: set[int] = set()

    def find_padded(self) -> set[int]:
        """The towers whose rows change with their padding. Among several processes each looks, trimmed or not, for the
        sake of encoders that communicate.
        """
        padded = set()
        for number, tower in self._towers.items():
            narrow = min(tower.chunks, key=lambda chunk: chunk.width)
            if tower.trimmed and (narrow.width < tower.width or world_size() > 1):
                ignores = seen(tower.encoder, "padding", tower.kind)
                if self._is_new(tower, "padding"):
                    learn(tower.encoder, "padding", tower.kind, ignores := _ignores_padding(tower, narrow))
                if not ignores:
                    padded.add(number)
        return padded

    def check_company(self) -> None:
        """ValueError for a tower whose rows depend on each other, unless it is one chunk: so the naive step has it."""
        for tower in self._towers.values():
            if (len(tower.chunks) > 1 or world_size() > 1) and self._is_new(tower, "company"):
                tokens, widest = (max(getattr(chunk, n) for chunk in tower.chunks) for n in ("tokens", "width"))
                _check_company(tower, tokens // widest)
                learn(tower.encoder, "company", tower.kind, True)

    def keep(self, reps: Sequence[Tensor]) -> None:
        """A sketch of each chunk's first representations, of the towers whose second forward is to be seen."""
        for job in self._jobs:
            if self._is_new(job.tower, "replay"):
                stored = reps[job.tower.number].detach()
                self._first[job.tower.number, job.number] = sketch(stored[job.chunk.index(stored.device)])

    def compare(self, job: Job, output: Tensor) -> None:
        """A chunk's second representations against its first, by their sketches: the only values read. ValueError."""
        if (first := self._first.pop((job.tower.number, job.number), None)) is not None:
            numbers, length = sketch(output)[0] - first[0], first[1]
            off = float(np.sqrt(np.square(numbers).mean())) / max(length, TINY)
            _refuse_other(f"encoders[{job.tower.number}]", off, tolerance(output))
            self._compared.add(job.tower.number)

    def passed(self) -> None:
        """The step is done: what was compared is trusted from now on."""
        for number in self._compared:
            tower = self._towers[number]
            learn(tower.encoder, "replay", tower.kind, True)

    def _is_new(self, tower: Tower, what: str) -> bool:
        return self._always or seen(tower.encoder, what, tower.kind) is None


def sketch(reps: Tensor) -> tuple[np.ndarray, float]:
    """(s, ||reps||) of a chunk: s_k = sum over i, j of reps_ij a_ik b_jk, a and b normal and always the same: (16,).

    For two chunks E (s_k - s'_k)^2 = ||reps - reps'||^2, so 16 such numbers tell two chunks apart as the difference
    itself does, to a factor of about 2 (a thousandth of it would be told less than once in 1e25), and nothing of the
    size of the representations is kept. Trailing zeros of an axis (trimmed tokens) change nothing. The
    numbers are numpy's: autocast and the ledger leave them alone.
    """
    wide = torch.promote_types(reps.dtype, torch.float32)
    numbers = reps.detach().to("cpu", wide).numpy()
    if not np.isfinite(numbers).all():
        numbers = np.nan_to_num(numbers, nan=1.0, posinf=2.0, neginf=-2.0)  # the same in both counts as equal
    factors = [np.random.default_rng(n).standard_normal((size, 16)) for n, size in enumerate(numbers.shape)]
    sums = numbers @ factors.pop().astype(numbers.dtype)
    for factor in reversed(factors):
        sums = np.einsum("...tk,tk->...k", sums, factor)
    return sums, float(np.linalg.norm(numbers))


def check_again(argument: str, second: Tensor, first: Tensor) -> None:
    """ValueError where a second forward is another one than the first. Reads one value."""
    _refuse_other(argument, _distance(second.detach(), first), tolerance(second))


def _refuse_other(argument: str, off: float, allowed: float) -> None:
    if not off <= allowed:
        rule = f"must return the second time what it returned the first. {CAUSES}"
        raise refuse(argument, rule, f"numbers that are off by {off:.2g} of their length")


def faults_of(tower: Tower) -> dict[str, str]:
    """What a step assumes of an encoder and this one breaks, in words: "inputs", "replay", "company", "padding".

    In its present mode, on all of the tower's rows; padding where rows can be trimmed. The first fault is returned, for
    what comes after it could not be told from it.
    """
    third, whole = -(-tower.rows // 3), Chunk(tuple(range(tower.rows)), tower.width)
    pieces = [Chunk(whole.rows[first : first + third], tower.width) for first in range(0, tower.rows, third)]
    with torch.no_grad(), _generators_kept(tower):
        try:
            state = generators_of([tower])
            first = torch.cat([encode_chunk(tower, chunk) for chunk in pieces])
            drew = not all(map(torch.equal, generators_of([tower]).tensors, state.tensors))
            state.restore()
            second = torch.cat([encode_chunk(tower, chunk) for chunk in pieces])
        except ValueError as error:
            if WRITES in str(error):
                return {"inputs": str(error)}
            encode_chunk(tower, whole)  # or the error has nothing to do with the other rows
            return {
                "company": f"encoders[{tower.number}] must encode a part of the batch as it does the whole: {error}"
            }
        try:
            check_again(f"encoders[{tower.number}]", second, first)
        except ValueError as error:
            return {"replay": str(error)}
        try:
            _check_company(tower, third)
            if not drew and (off := _distance(first, encode_chunk(tower, whole))) > tolerance(first):
                raise _in_company(tower, off)
        except ValueError as error:
            return {"company": str(error)}
        lengths = row_lengths(tower.inputs, tower.trimmed) or [tower.width]
        shortest = Chunk((lengths.index(min(lengths)),), min(lengths))
        if shortest.width < tower.width and (off := _off_by_padding(tower, shortest)):
            return {"padding": _depends_on_padding(tower, off)}
    return {}


def seen(encoder: Any, what: str, device_type: str) -> bool | None:
    """Whether `what` holds of the encoder, as it was seen in its present mode and autocast; None where it was not."""
    try:
        known = _seen.get(_subject(encoder), {})
    except TypeError:  # no hash, or no weak reference: such an encoder is new in each step
        return None
    return known.get((what, *_conditions(encoder, device_type)))


def learn(encoder: Any, what: str, device_type: str, holds: bool) -> None:
    """Remember for later steps whether `what` holds of the encoder."""
    with suppress(TypeError):  # as in `seen`
        _seen.setdefault(_subject(encoder), {})[what, *_conditions(encoder, device_type)] = holds


def _subject(encoder: Any) -> Any:
    """What is trusted: the encoder, or for a bound method, which is made anew at each access, the object behind it."""
    return getattr(encoder, "__self__", encoder)


def _conditions(encoder: Any, device_type: str) -> tuple:
    """Another method of the object, another mode or another autocast may take other operations."""
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    modes = tuple(part.training for module in modules_of(encoder) for part in module.modules())
    return getattr(encoder, "__name__", ""), modes, device_type, autocast


def tolerance(reps: Tensor) -> float:
    """What rounding may do to these representations: that of the least precise type in use."""
    kind = reps.device.type
    used = [reps.dtype, *([torch.get_autocast_dtype(kind)] if torch.is_autocast_enabled(kind) else [])]
    rounding = max(TOLERANCES.get(dtype, 3e-2) for dtype in used)
    tf32 = reps.is_cuda and reps.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return max(rounding, TF32_TOLERANCE) if tf32 else rounding


def whole_shape(job: Job, output: Tensor) -> list[int]:
    """The shape of all representations of a tower, by one chunk's: token representations get the full width.

    What is a token is decided by how the output's width moves with the chunk's, once for an encoder: two rows are
    encoded at another width too, full or, where several processes all have to look, one less. ValueError where it moves
    in another way.
    """
    tower, missing = job.tower, job.tower.width - job.chunk.width
    shape = [tower.rows, *output.shape[1:]]
    if output.ndim == 3 and (missing > 0 or (job.chunk.width > 1 and tower.trimmed and world_size() > 1)):
        if (follows := seen(tower.encoder, "follows", tower.kind)) is None:
            more = missing or -1
            with torch.no_grad(), _generators_kept(tower):
                other = _encode_rows(tower, job.chunk.rows[:2], job.chunk.width + more)
            moved = other.shape[1] - output.shape[1]
            if moved not in (0, more):
                rule = "must return one vector a token, or as many for every text, or be given sort_by_length=False"
                raise refuse(f"encoders[{tower.number}]", rule, f"{moved} more vectors for {more} more tokens")
            learn(tower.encoder, "follows", tower.kind, follows := moved == more)
        shape[1] += missing * follows
    return shape


def refuse_untrained(loss_fn: Callable[..., Tensor]) -> None:
    """ValueError, as in the naive step, where neither encoders nor loss have anything to train."""
    if not any(p.requires_grad for module in modules_of(loss_fn) for p in module.parameters()):
        rule = (
            "must hold something to train: all is frozen, or reentrant checkpointing over a frozen base lost the graph "
            "(use_reentrant=False, or model.enable_input_require_grads())"
        )
        raise refuse("encoders", rule, "representations without a graph")


def _check_company(tower: Tower, size: int) -> None:
    """ValueError where a row's representation goes with the rows beside it, its place or how many they are.

    Seen are 2 to `SAMPLED` rows from all over the batch, as many of the widest as a chunk has tokens for: each of them
    beside others at the same place, in the encoder's own mode and with the same random numbers; then in reversed order,
    and two alone. Where random numbers are drawn, they fall otherwise on other places: that is seen in eval mode, if
    none are drawn there.
    """
    count, planned = max(2, min(size, SAMPLED)), [row for chunk in tower.chunks for row in chunk.rows]
    order, width = planned or range(tower.rows), max((chunk.width for chunk in tower.chunks), default=tower.width)
    rows = [order[place * (tower.rows - 1) // (count - 1)] for place in range(count)]
    backwards = rows[::-1]
    twice = [[rows[min(place // 2 * 2 + odd, count - 1)] for place in range(count)] for odd in (0, 1)]
    with torch.no_grad(), _generators_kept(tower) as again:
        encoded = lambda rows: again(lambda: _encode_rows(tower, rows, width))  # noqa: E731
        together, drew = again(lambda: _encode_rows(tower, rows, width), told=True)
        off = max(
            _furthest(encoded(other), together, [r == o for r, o in zip(rows, other, strict=True)]) for other in twice
        )
        with training_mode([tower.encoder], False) if drew else nullcontext():
            alone, draws = again(lambda: _encode_rows(tower, rows, width), told=True) if drew else (together, False)
            for turned, step in ((backwards, 1), (backwards[:: count - 1], count - 1)) if not draws else ():
                off = max(off, _furthest(encoded(turned).flip(0), alone[::step]))
        if off > tolerance(together):
            check_again(f"encoders[{tower.number}]", encoded(rows), together)
            raise _in_company(tower, off)


def _furthest(reps: Tensor, others: Tensor, where: Sequence[bool] | None = None) -> float:
    """How far the row that is furthest off is from the same one among others, of all rows or of those `where`."""
    places = [place for place in range(len(reps)) if where is None or where[place]]
    return max(_distance(reps[place], others[place]) for place in places)


def _in_company(tower: Tower, off: float) -> ValueError:
    rule = (
        "must encode each row by itself, whatever rows stand beside it: BatchNorm in training mode, a mean "
        "over the batch or routing with a capacity do not, and chunks would train something else"
    )
    return refuse(f"encoders[{tower.number}]", rule, f"a row that is off by {off:.2g} of its length in other company")


def _ignores_padding(tower: Tower, chunk: Chunk) -> bool:
    """Whether rows are the same as wide as the batch and as wide as their chunk; a warning where they are not."""
    if not (off := _off_by_padding(tower, chunk)):
        return True
    words = "So its rows are encoded as wide as the batch, as with sort_by_length=False: right, but slower."
    warnings.warn(f"{_depends_on_padding(tower, off)} {words}", stacklevel=6)
    return False


def _depends_on_padding(tower: Tower, off: float) -> str:
    seen_as = f"rows are off by {off:.2g} of their length" if off < torch.inf else "rows can't be encoded alike"
    return (
        f"encoders[{tower.number}] depends on how far a row is padded (an LSTM, a convolution or a Fourier layer over "
        f"padded rows does, or vectors of padding that are not zero): {seen_as} once trimmed."
    )


def _off_by_padding(tower: Tower, chunk: Chunk) -> float:
    """How far rows as wide as their chunk are from themselves as wide as the batch; 0 where rounding may be all of it.

    In eval mode, for dropout falls otherwise on other widths; of an encoder that draws random numbers all the same
    nothing can be said. Looked at is an odd width where there is one below the batch's: it cuts a block or a stride of
    any even length in two.
    """
    width = chunk.width + (chunk.width % 2 == 0 and chunk.width + 1 < tower.width)
    with torch.no_grad(), training_mode([tower.encoder], False), _generators_kept(tower) as again:
        pair = _cut_to(tower, chunk, width)
        full, drew = again(lambda: _encode_rows(pair, (0, 1), tower.width), told=True)
        off = again(lambda: _off_at(pair, width, full))
    return 0.0 if drew or off <= tolerance(full) else off


def _cut_to(tower: Tower, chunk: Chunk, width: int) -> Tower:
    """Two rows: the chunk's first one, and the longest with the shortest one's padding from column `width` on."""
    lengths = row_lengths(tower.inputs, tower.trimmed)
    pair = [chunk.rows[0], lengths.index(max(lengths))]
    inputs = {name: v[pair] if isinstance(v, Tensor) else v for name, v in tower.inputs.items()}
    for name in tower.trimmed:
        inputs[name][1, width:] = tower.inputs[name][lengths.index(min(lengths)), width:]
    return replace(tower, inputs=inputs, rows=2)


def _off_at(tower: Tower, width: int, full: Tensor) -> float:
    """How far two rows at this width are from the same at full width; infinite where they can't be encoded so."""
    try:
        trimmed = _encode_rows(tower, (0, 1), width)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return torch.inf  # some architectures have a least width, or a fixed one
    if trimmed.ndim == 3 and full.shape[1] - trimmed.shape[1] == tower.width - width:
        trimmed = nn.functional.pad(trimmed, (0, 0, 0, tower.width - width))
    return _distance(trimmed, full) if trimmed.shape == full.shape else torch.inf


def _encode_rows(tower: Tower, rows: Sequence[int], width: int) -> Tensor:
    """These rows at this width, by the module itself where it is compiled: for two rows nothing is compiled anew."""
    encoder = getattr(tower.encoder, "_orig_mod", tower.encoder)
    return encode_chunk(replace(tower, encoder=encoder), Chunk(tuple(rows), width))


@contextmanager
def _generators_kept(tower: Tower) -> Iterator[Callable]:
    """Gives a function that calls another with generators and buffers as they are now; they are so at the end too, and
    so are the modules' plain attributes and parts: BigBird takes other attention for good once it met a short text.

    again(call) returns what call() does; again(call, told=True) also whether random numbers were drawn.
    """
    state, others = generators_of([tower]), (random.getstate(), np.random.get_state())
    parts = [part for module in modules_of(tower.encoder) for part in module.modules()]
    buffers = [(part, name, b, b.clone()) for part in parts for name, b in part._buffers.items() if b is not None]
    attributes = [(part, type(part), _plain_attributes(part), dict(part._modules)) for part in parts]

    def put_back() -> None:
        state.restore()
        random.setstate(others[0])
        np.random.set_state(others[1])
        for part, name, buffer, value in buffers:
            part._buffers[name] = buffer.copy_(value)  # the same tensor: a forward may have put another one there

    def again(call: Callable[[], Tensor], *, told: bool = False) -> Any:
        put_back()
        reps = call()
        if not told:
            return reps
        moved = not all(map(torch.equal, generators_of([tower]).tensors, state.tensors))
        python, numpy = random.getstate(), np.random.get_state()
        moved |= python != others[0] or numpy[2:] != others[1][2:] or not np.array_equal(numpy[1], others[1][1])
        return reps, moved

    try:
        yield again
    finally:
        put_back()
        for part, kind, plain, inner in attributes:
            if type(part) is kind:  # a lazy module becomes another one in its first forward, and may stay it
                vars(part).update(plain)
                part._modules.update(inner)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}


def _distance(one: Tensor, other: Tensor) -> float:
    """||one - other|| / ||other||, where numbers that are the same, infinite or NaN in both count as equal."""
    wide = torch.promote_types(other.dtype, torch.float32)
    one, other = one.to(wide), other.to(wide)
    off = torch.where((one == other) | (one.isnan() & other.isnan()), 0, one - other)
    length = other.nan_to_num(0, 0, 0).norm().clamp(min=torch.finfo(wide).tiny)
    return float((off.norm() / length).nan_to_num(torch.inf))
