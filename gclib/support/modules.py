"""The modules that a callable runs, as far as Python can tell, and their mode for a while."""

import dis
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from gclib.support.validation import refuse

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
DEEPEST = 3  # callables inside callables that are looked through


def modules_of(encoder: Any) -> list[nn.Module]:
    """The outermost modules behind a callable: itself, or those that it holds or names.

    Looked through are functions (closures, defaults, the globals that they load), `functools.partial`, bound methods
    and those attributes of their objects that they read, lists, mappings, and the attributes of other callable objects.
    A module that is made inside a call is not seen.
    """
    if isinstance(encoder, nn.Module):
        return [encoder]
    modules: dict[int, nn.Module] = {}
    waiting, seen = [(encoder, DEEPEST)], set()
    while waiting:
        thing, depth = waiting.pop()
        if isinstance(thing, nn.Module):
            modules[id(thing)] = thing
        elif depth and id(thing) not in seen:
            seen.add(id(thing))
            waiting += [(part, depth - 1) for part in parts_of(thing)]
    inner = {id(part) for module in modules.values() for part in module.modules() if part is not module}
    return [module for module in modules.values() if id(module) not in inner]


def parts_of(thing: Any) -> Iterable[Any]:
    """What a callable or a container holds; nothing of what is neither."""
    if isinstance(thing, FunctionType):
        if (thing.__module__ or "").partition(".")[0] in ("torch", "transformers"):
            return ()
        parts = [thing.__globals__[name] for name in read_globals(thing.__code__) if name in thing.__globals__]
        for cell in thing.__closure__ or ():
            with suppress(ValueError):  # a cell that is not filled yet
                parts.append(cell.cell_contents)
        return [*parts, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, MethodType):
        held = {} if isinstance(thing.__self__, nn.Module) else getattr(thing.__self__, "__dict__", {})
        names = held and names_read(thing.__func__, type(thing.__self__))
        return [thing.__self__, thing.__func__, *(held[name] for name in held if name in names)]
    if isinstance(thing, (list, tuple)):
        return thing
    if isinstance(thing, Mapping):
        return list(thing.values())
    held = getattr(thing, "__dict__", None)
    return list(held.values()) if isinstance(held, dict) and callable(thing) and not isinstance(thing, type) else ()


@lru_cache(maxsize=256)
def names_read(method: Any, owner: type) -> frozenset[str]:
    """The names that a method's code reads, those of the methods and properties that it names in its class included."""
    names: set[str] = set()
    waiting = [method]
    while waiting:
        function = inspect.unwrap(waiting.pop())
        codes = [function.__code__] if isinstance(function, FunctionType) else []
        for code in codes:
            codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
            new = set(code.co_names) - names
            names |= new
            members = [vars(base)[name] for name in new for base in owner.__mro__ if name in vars(base)]
            waiting += [getattr(member, "fget", None) or member for member in members]
    return frozenset(names)


@lru_cache(maxsize=256)
def read_globals(code: CodeType) -> frozenset[str]:
    """The names in its module that a function's code reads or sets, its inner functions included."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "STORE_GLOBAL")}
    return frozenset(own.union(*(read_globals(inner) for inner in code.co_consts if isinstance(inner, CodeType))))


def call(encoder: Any, /, *arguments: Any, **named: Any) -> Any:
    """What the encoder returns; ValueError where its signature does not take the arguments."""
    try:
        return encoder(*arguments, **named)
    except TypeError as error:
        if takes(encoder, arguments, named):
            raise
        words = "names as keywords" if named else "tensors one by one"
        rule = f"must take the inputs' {words} (a SentenceTransformer: lambda **f: model(f)['sentence_embedding'])"
        raise refuse("encoders", rule, f"a {type(encoder).__name__} that does not: {error}") from error


def takes(encoder: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Whether a call's arguments are those of the signature, as far as it can be seen."""
    try:
        signature = inspect.signature(encoder.forward if isinstance(encoder, nn.Module) else encoder)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        return False
    return True


def refuse_batch_norm(argument: str, encoder: Any, piece: str) -> None:
    """ValueError where BatchNorm takes statistics of its input, for a chunk has others than the batch, or InstanceNorm
    gathers running ones, for they would be gathered twice.
    """
    for part in (part for module in modules_of(encoder) for part in module.modules()):
        bare = isinstance(part, BATCH_NORMS) and part.running_mean is None
        if bare:
            kind, why = "BatchNorm without running statistics", f"it takes those of {piece}, in eval mode too"
        elif isinstance(part, BATCH_NORMS) and part.training:
            kind, why = "BatchNorm in training mode", f"its statistics would be those of {piece}, updated twice"
        elif isinstance(part, INSTANCE_NORMS) and part.training and part.track_running_stats:
            kind, why = "InstanceNorm that tracks statistics in training mode", "they would be updated twice"
        else:
            continue
        cure = "Give it running ones, or use" if bare else "Put these layers into eval mode, or use"
        raise refuse(argument, f"must not hold {kind}: {why}. {cure} LayerNorm or GroupNorm", kind)


@contextmanager
def training_mode(encoders: Iterable[Any], mode: bool) -> Iterator[None]:
    """Every module in training (or eval) mode; at exit each is as it was, also where parts of one differed."""
    roots = [root for encoder in encoders for root in modules_of(encoder)]
    before = {part: part.training for root in roots for part in root.modules()}
    for root in roots:
        root.train(mode)
    try:
        yield
    finally:
        for part, was_training in before.items():
            part.training = was_training


@dataclass(frozen=True)
class Autocast:
    """The autocast state of the first evaluation, for the second: backward may run in a thread without it."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def ambient(cls, device_type: str) -> "Autocast":
        """The autocast state of a device type as it is now."""
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def restored(self) -> torch.autocast:
        """A context in which autocast is as it was then."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)
