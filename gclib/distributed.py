"""Several processes, one batch: representations gathered with their gradient, gradients averaged once a step.

Each of W processes (ranks) encodes its own rows. One rule keeps every scale right (Gao et al. 2021, section 3.4,
name none): every rank's loss has the value of the whole batch's loss, and a gradient that is W times its own share
of it. `average_gradients` then divides the sum over ranks by W, and what every parameter is left with, the
temperature too, is the gradient that one process would have had for the whole batch.

Weights may be sharded too: FSDP2 (`torch.distributed.fsdp.fully_shard`) works with every step as it is, and averages
what it shards by itself. A unit is a module that fully_shard was called on. A step with n chunks (of all its towers,
R of them retained) runs a model of L units and a root around them n + (n - R) times forward and n times backward:

- as FSDP does it, a unit's weights are gathered before each of its forwards and backwards, the root's once for each
  backward: (3n - R) * L + n all-gathers, and n * (L + 1) reduce-scatters of gradients. Never more than the root and two
  units whole. The sum of the chunks' averages is the average of their sum: the gradient is right.
- inside `weights_kept`: L + 1 of each, however many chunks there are, for a whole model's weights and gradients.

DeepSpeed cannot be run by this project's tests; this is read in its source and issues. ZeRO-2 reduces a parameter's
gradient from a hook, once in an `engine.backward`; the cached step runs n backwards inside of that one, and the second
ends in the assertion "Gradient computed twice for this partition" (as one model over two inputs does there under
reentrant checkpointing). `engine.no_sync()` is refused by stages 2 and 3. (DeepSpeed's own tiled layers mark parameters
`ds_grad_is_ready = False` until their last piece, and so may a step: whole gradients, one reduction.) ZeRO-3 gathers
each module's weights for each of its 2n - R forwards and n backwards, and wants the same calls on every rank. What to
do: ZeRO-1 without overlap_comm, which sets no hooks and reduces once; or FSDP2, which shards what ZeRO-3 does by
itself, and inside `weights_kept(reduce_once=False)` what ZeRO-2 does: gradients and optimizer states.

Letters: W ranks, B queries of the whole batch, b of one rank (ranks may differ), K hard negatives per query.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gclib.support.modules import modules_of
from gclib.support.validation import one_of, positive_number, refuse

BACKENDS = ("gloo", "nccl")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_rehearsed: ContextVar[int] = ContextVar("rehearsed", default=1)
_kept: WeakSet[nn.Module] = WeakSet()  # the units inside `weights_kept`


@dataclass(frozen=True)
class Rank:
    """Which process this is: `rank` of `world_size`, computing on `device`."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0


@contextmanager
def process_group(*, backend: str | None = None, timeout_seconds: float = 300.0) -> Iterator[Rank]:
    """Join the processes that `torchrun` started; alone, be rank 0 of 1 and set nothing up.

    backend: None for nccl where CUDA is available, else gloo. timeout_seconds: how long a rank waits for another
    before it stops with an error. The group is left at the end, also after an error. Verified with gloo on processors;
    with nccl only a world of one was run (tests/gpu); its watchdog may end a process that waits instead of raising.

    Raises ValueError for another backend, a timeout not above 0, and more processes on a machine than it has GPUs.
    """
    seconds = positive_number("timeout_seconds", timeout_seconds)
    cuda = torch.cuda.is_available() and backend != "gloo"
    chosen = one_of("backend", backend or ("nccl" if cuda else "gloo"), BACKENDS)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        if device.index >= torch.cuda.device_count():
            raise refuse("--nproc-per-node", f"must be at most the {torch.cuda.device_count()} GPUs", device.index + 1)
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Rank(0, 1, device)
        return
    dist.init_process_group(chosen, timeout=timedelta(seconds=seconds))
    try:
        yield Rank(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


@contextmanager
def rehearsal(ranks: int) -> Iterator[None]:
    """In this thread be rank 0 of so many, all with as many rows, whose messages are not sent: shapes are right, values
    are not. For who wants to know what a rank holds.
    """
    token = _rehearsed.set(ranks)
    try:
        yield
    finally:
        _rehearsed.reset(token)


def world_size(group: Any = None) -> int:
    """W: 1 where no process group was set up. ValueError for a group that this process is not in."""
    if _rehearsed.get() > 1:
        return _rehearsed.get()
    size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    if size < 1:
        raise refuse("group", "must hold this process", "one that does not")
    return size


def rank_of(group: Any = None) -> int:
    """This process's place in the group; 0 where there is none."""
    return dist.get_rank(group) if world_size(group) > 1 and not is_rehearsal() else 0


def is_rehearsal() -> bool:
    """Whether messages are not sent at present."""
    return _rehearsed.get() > 1


def gather_with_grad(reps: Tensor, *, rows: Sequence[int] | None = None, group: Any = None) -> Tensor:
    """Every rank's rows, in the order of ranks: (b, ...) -> (B, ...). The gradient flows back to the rank of each row.

    Forward: an all-gather. Backward: the sum over ranks of the gradient at the gathered rows, of which each rank keeps
    its own. So where every rank takes the same loss of the gathered rows, each row's gradient is W times that loss's,
    and `average_gradients` takes the W out again. Ranks may have unlike numbers of rows (b >= 1). rows: those of each
    rank, where they are known (saves their exchange).

    Alone it returns `reps`. Raises ValueError, on every rank, where the ranks' dtypes or columns differ (with
    `rows` they are not exchanged), and RuntimeError where a rank does not answer. Source: Gao et al. 2021, section 3.4.
    """
    if world_size(group) == 1:
        return reps
    return _Gather.apply(reps, list(rows or rows_of_ranks(reps, group=group)), group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reps, rows, group):
        ctx.rows, ctx.group = rows, group
        return torch.cat(_all_gather(reps.detach(), rows, group))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        _all_reduce(gradient, "gather_with_grad's backward pass", ctx.group)
        return gradient[own_rows(ctx.rows, ctx.group)].clone(), None, None


def rows_of_ranks(*tensors: Tensor, group: Any = None) -> list[int]:
    """Each rank's number of rows of the first tensor, once the ranks have shown each other all tensors' shapes.

    The only values that are read while a loss is computed: three numbers a tensor, in one small message. Raises
    ValueError, the same on all ranks, where they differ in dtype, in columns, or in rows for each row of the first.
    """
    for tensor in tensors:
        if tensor.dtype not in DTYPES or tensor.ndim == 0 or tensor.shape[0] == 0:
            got = f"shape {tuple(tensor.shape)} of {tensor.dtype}"
            raise refuse("representations", "must be floating point, with at least one row on every rank", got)
    own = [(t.shape[0], t[0].numel(), DTYPES.index(t.dtype)) for t in tensors]
    flat = numbers_of_ranks([number for sizes in own for number in sizes], tensors[0].device, group=group)
    ranks = [list(zip(*[iter(numbers)] * 3, strict=True)) for numbers in flat]
    for place in range(len(tensors)):
        alike = {(r[place][0] / r[0][0], r[place][1], r[place][2]) for r in ranks}
        if len(alike) > 1:
            got = ", ".join(
                f"rank {n}: {r[place][0]} x {r[place][1]} {DTYPES[r[place][2]]}" for n, r in enumerate(ranks)
            )
            raise refuse("representations", "must have the same columns, dtype and K on all ranks", got)
    return [rank[0][0] for rank in ranks]


def numbers_of_ranks(own: Sequence[int], device: torch.device, *, group: Any = None) -> list[list[int]]:
    """Every rank's ints, equally many on each, in one small message; a card waits until they are read."""
    ranks = world_size(group)
    if ranks == 1 or is_rehearsal():
        return [list(own)] * ranks
    numbers = torch.tensor(own, device=device)
    received = [torch.empty_like(numbers) for _ in range(ranks)]
    with waiting_for_ranks("the exchange of shapes"):
        all_gather(received, numbers, group=group)
    return [part.tolist() for part in received]


def all_gather(received: Sequence[Tensor], own: Tensor, *, group: Any = None) -> None:
    """Fill `received`, one tensor for each rank, all of one shape, with every rank's own.

    On CUDA tensors gloo has an all-reduce and a broadcast, and no all-gather (the table of backends in PyTorch's
    documentation of torch.distributed): there every rank broadcasts its own.
    """
    if is_rehearsal():
        return
    if not is_gloo_on_cuda(own, group):
        dist.all_gather(list(received), own, group=group)
        return
    received[rank_of(group)].copy_(own)
    for number, part in enumerate(received):
        dist.broadcast(part, number if group is None else dist.get_global_rank(group, number), group=group)


def _all_reduce(tensor: Tensor, what: str, group: Any) -> None:
    """The sum over ranks, in place."""
    if not is_rehearsal():
        with waiting_for_ranks(what):
            dist.all_reduce(tensor, group=group)


def is_gloo_on_cuda(tensor: Tensor, group: Any = None) -> bool:
    """Whether a tensor is on a GPU while its group's backend is the processor's."""
    return not is_rehearsal() and tensor.is_cuda and dist.get_backend(group) == "gloo"


def own_rows(rows: Sequence[int], group: Any = None) -> slice:
    """Where this rank's rows stand among all of them."""
    rank = rank_of(group)
    return slice(sum(rows[:rank]), sum(rows[: rank + 1]))


def average_gradients(*modules: nn.Module, group: Any = None) -> None:
    """Replace every gradient by its mean over the ranks: after a step, once, in one flattened all-reduce.

    modules: all that was trained, the loss too if its temperature is learnable; tied towers count once. Parameters
    without a gradient on any rank keep none; one that some rank lacks counts as zero there. What is trained
    (`requires_grad`) must be the same on all ranks. Parameters of k dtypes take k all-reduces. Alone it does nothing.
    What `fully_shard` shards is left as it is: FSDP averaged it already. Call it before clipping and before the
    optimizer's step, and after `weights_kept`.

    Raises ValueError for what is not a module, for other DTensors and inside `weights_kept`, RuntimeError where another
    rank does not answer.
    Source: Gao et al. 2021, section 3.4: the one reduction of step 4.
    """
    for number, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise refuse(f"modules[{number}]", "must be a torch module", type(module).__name__)
    if world_size(group) == 1:
        return
    units = sharded_units(modules)
    if _kept.intersection(units):
        raise refuse("modules", "must be averaged after weights_kept, which reduces at its end", "a call inside of it")
    for unit in units:
        unit.reshard()
    reduced = {id(p) for unit in units for p in unit.parameters() if is_dtensor(p)}
    every = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    trained = [parameter for key, parameter in every.items() if key not in reduced]
    if any(map(is_dtensor, trained)):
        raise refuse("modules", "must hold plain parameters, or such as fully_shard shards", "other DTensors")
    for kind in dict.fromkeys((p.dtype, p.device) for p in trained):
        _average([p for p in trained if (p.dtype, p.device) == kind], group)


class _Modules(dict):
    """What a backward pass averages when it ends. (A dict can't be weakly referenced.)"""


_averaged_at_the_end: WeakValueDictionary[int, _Modules] = WeakValueDictionary()


def average_after_backward(modules: Iterable[nn.Module]) -> None:
    """Inside of a backward pass: `average_gradients` of these modules, once, when the pass ends, whoever else asks.

    So several cached losses added up cost one all-reduce, as one does, and what else the pass adds is averaged too.
    (The pass's callback alone holds the modules: after an error nothing is left of them.)
    """
    if not (asked := {id(module): module for module in modules}):
        return
    number = torch._C._current_graph_task_id()
    waiting = _averaged_at_the_end.get(number)
    if waiting is None:
        waiting = _averaged_at_the_end[number] = _Modules()
        torch.autograd.Variable._execution_engine.queue_callback(lambda: average_gradients(*waiting.values()))
    waiting |= asked


@torch.no_grad()
def _average(parameters: list[nn.Parameter], group: Any) -> None:
    """One all-reduce of all gradients, and behind them one number a parameter: how many ranks have it."""
    present = parameters[0].new_tensor([float(p.grad is not None) for p in parameters])
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([part.reshape(-1) for part in parts] + [present])
    _all_reduce(flat, "average_gradients", group)
    flat[: -len(parameters)] /= world_size(group)
    missing = [p.grad is None for p in parameters]
    somewhere = (flat[-len(parameters) :] > 0).tolist() if any(missing) else [True] * len(parameters)
    pieces = flat[: -len(parameters)].split([p.numel() for p in parameters])
    for parameter, piece, is_missing, has_some in zip(parameters, pieces, missing, somewhere, strict=True):
        if not is_missing:
            parameter.grad.copy_(piece.view_as(parameter))
        elif has_some:
            parameter.grad = piece.view_as(parameter).clone()


@torch.no_grad()
def mean_over_ranks(value: Tensor, *, group: Any = None) -> Tensor:
    """A detached number, averaged over the ranks: what a record shows, no gradient."""
    mean = value.detach().clone()
    if world_size(group) > 1:
        _all_reduce(mean, "the mean of a loss", group)
    return mean / world_size(group)


@contextmanager
def waiting_for_ranks(what: str) -> Iterator[None]:
    """A rank that is not answered (another one failed, or the group's timeout passed) says so in words."""
    try:
        yield
    except RuntimeError as error:
        rule = "got no answer: another rank failed or is late. Look for the first error that another rank printed"
        raise RuntimeError(f"rank {rank_of()}, {what}: {rule}. ({error})") from error


def _all_gather(tensor: Tensor, rows: list[int], group: Any) -> list[Tensor]:
    """Every rank's rows. Shorter ranks are padded on the way: a collective wants equal shapes."""
    longest = max(rows)
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    received = [torch.empty_like(padded) for _ in rows]
    with waiting_for_ranks("gather_with_grad"):
        all_gather(received, padded, group=group)
    return [part[:count] for part, count in zip(received, rows, strict=True)]


def data_parallel(encoders: Sequence[Any], *, synchronising: bool = False) -> list[nn.Module]:
    """The DistributedDataParallel modules inside the encoders; with `synchronising` those outside of their no_sync."""
    inner = [part for encoder in encoders for module in modules_of(encoder) for part in module.modules()]
    wrapped = [part for part in dict.fromkeys(inner) if isinstance(part, nn.parallel.DistributedDataParallel)]
    return [part for part in wrapped if part.require_backward_grad_sync or not synchronising]


def sharded_units(modules: Sequence[Any]) -> list[Any]:
    """The modules inside these that FSDP2's `fully_shard` was called on, outermost first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", ())
    inner = [part for thing in modules for module in modules_of(thing) for part in module.modules()]
    return [part for part in dict.fromkeys(inner) if isinstance(part, kind)]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is one rank's part of a tensor of all ranks."""
    return hasattr(tensor, "full_tensor")


def refuse_flat_shards(argument: str, encoder: Any) -> None:
    """ValueError for FullyShardedDataParallel (FSDP1): it is not made for several forwards before a backward."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FullyShardedDataParallel", ())
    if any(isinstance(part, kind) for module in modules_of(encoder) for part in module.modules()):
        rule = "must be sharded by FSDP2 (torch.distributed.fsdp.fully_shard) for a step in chunks"
        raise refuse(argument, rule, "FullyShardedDataParallel")


@contextmanager
def own_sync_off(encoders: Sequence[Any]) -> Iterator[None]:
    """DistributedDataParallel modules inside the encoders leave the gradients alone meanwhile; FSDP2's shard as ever.

    DDP's hooks average what the first chunk's backward pass added, and nothing of what the next ones add: with several
    chunks the ranks would end with unlike gradients. `average_gradients` does it instead, once and for all chunks. A
    module that is made inside a call cannot be seen. (Hidden, its hooks send a message a chunk, and ranks with unlike
    numbers of chunks end in an error of gloo's that nobody can catch.)

    FSDP2 reduces after each backward, which adds up right. Two habits of its are put right here. A root stays whole
    after its forward, until a backward: a step that ends without one would leave weights there that the next
    optimizer's step does not reach, so all are sharded at the end. And inside of a backward (that of
    `grad_cache_loss`) no unit is sharded after its forward, so that a whole model would be there: the inner ones are.
    """
    units = [unit for unit in sharded_units(encoders) if unit not in _kept]
    task = torch._C._current_graph_task_id()

    def shard_again(unit: Any, inputs: Any, output: Any) -> None:
        """Not while a backward inside of this one runs the unit (checkpointing)."""
        if torch._C._current_graph_task_id() == task:
            unit.reshard()

    with ExitStack() as stack:
        for module in data_parallel(encoders):
            stack.enter_context(module.no_sync())
        for unit in units if task != -1 else ():
            if unit not in roots_of(units):
                stack.callback(unit.register_forward_hook(shard_again).remove)
        for unit in units:
            stack.callback(unit.reshard)
        yield


def roots_of(units: Sequence[Any]) -> list[Any]:
    """The units that are in no other one."""
    inner = {part for unit in units for part in unit.modules() if part is not unit}
    return [unit for unit in units if unit not in inner]


@contextmanager
def weights_kept(*modules: nn.Module, reduce_once: bool = True) -> Iterator[None]:
    """FSDP2 units inside `modules` gather their weights once for all that runs inside, and reduce gradients once.

    Put it around a step, or around `grad_cache_loss` and its backward(); the optimizer's step comes after it. Holds a
    whole model's weights from the first forward to the end, and with reduce_once its gradients until they are reduced
    (P bytes each for P bytes of weights, where FSDP itself holds those of the root and two units). Without reduce_once
    gradients are reduced after each chunk. One all-gather a unit, and one reduce-scatter a unit (without reduce_once:
    a unit and chunk), instead of the counts in this module's docstring; the same gradient, up to rounding.

    At the end all weights are sharded and FSDP is set to its defaults: inner units are sharded after a forward, all
    after a backward. After an error gradients that were not reduced are dropped. Raises ValueError for what is not a
    module, where nothing is sharded by fully_shard, and inside of another one.
    """
    for number, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise refuse(f"modules[{number}]", "must be a torch module", type(module).__name__)
    units = sharded_units(modules)
    if not units or _kept.intersection(units):
        rule = "must hold modules that fully_shard was called on, and not be kept already"
        raise refuse("modules", rule, "kept ones" if units else "none")
    _set_keeping(units, True, reduce_once)
    names = {unit: [name for name, p in unit.named_parameters() if is_dtensor(p)] for unit in units}
    _kept.update(units)
    try:
        yield
        for unit in roots_of(units) if reduce_once else ():
            unit.set_requires_gradient_sync(True)
            # What FSDP does when a backward through this root is over, without a public name: what is held is reduced.
            unit._get_fsdp_state()._root_post_backward_final_callback()
    except BaseException:
        for unit in roots_of(units):
            for name in names[unit]:
                parameter = unit.get_parameter(name)
                if not is_dtensor(parameter):
                    parameter.grad = None
            unit.reset_iter_state()
        raise
    finally:
        _kept.difference_update(units)
        _set_keeping(units, False, reduce_once)


def _set_keeping(units: Sequence[Any], on: bool, reduce_once: bool) -> None:
    """FSDP's switches, and all weights sharded: what was gathered before may be of older weights."""
    roots = roots_of(units)
    for unit in units:
        unit.set_reshard_after_forward(not on and unit not in roots, recurse=False)
        unit.set_reshard_after_backward(not on, recurse=False)
        unit.set_requires_gradient_sync(not (on and reduce_once), recurse=False)
        unit.reshard()
