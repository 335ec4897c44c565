"""What an audit runs a step on: working copies in float64, in the places of the caller's own tensors and state.

A loss may be a lambda around a module, and a module may hold what cannot be copied (a lock, old weight_norm, a hook
that keeps an output). So modules and functions stay, and what they hold changes places for the length of one run:
parameters, buffers, attributes, closures, the globals that a function names. Each run starts from the same state,
and everything is put back after it, whatever happens.
"""

import copy
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from gclib.support.modules import parts_of, read_globals
from gclib.support.validation import refuse

DEEPEST = 4  # callables and containers inside each other that are looked through
LONGEST = 10_000  # items of a container: longer ones are data
LIBRARIES = (sys.stdlib_module_names - {"types"}) | {"torch", "transformers", "sentence_transformers", "numpy", "gclib"}
STATE = (list, dict, set, deque, Tensor)
REGISTERED = ("_parameters", "_buffers", "_modules")


@dataclass
class Holders:
    """All that may hold state behind some callables, and the tensors that are to be copied, by id.

    objects: modules, and what else the caller's own classes made; classes: those that hold state themselves.
    """

    objects: dict[int, Any] = field(default_factory=dict)
    classes: dict[int, type] = field(default_factory=dict)
    functions: dict[int, FunctionType] = field(default_factory=dict)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    uncopied: dict[str, None] = field(default_factory=dict)

    @classmethod
    def behind(cls, roots: Iterable[Any], more_modules: Iterable[nn.Module] = ()) -> "Holders":
        """Everything that the roots hold, as far as Python can tell; of `more_modules` what they hold themselves."""
        holders, seen = cls(), {}
        waiting = deque((root, DEEPEST) for root in roots)
        while waiting:
            thing, depth = waiting.popleft()
            if id(thing) in seen or depth < 0:
                continue
            seen[id(thing)] = thing
            for part in holders._note(thing):
                waiting.append((part, depth if isinstance(part, nn.Module) else depth - 1))
        for root in more_modules:
            for module in root.modules():
                holders._note_module(module)
        return holders

    def _note(self, thing: Any) -> Iterable[Any]:
        """Keep it, if it holds state; returns what is to be looked at inside it."""
        if isinstance(thing, nn.Module):
            self._note_module(thing)
            held = [value for name, value in vars(thing).items() if name not in REGISTERED]
            return [*thing.children(), *held, *self._of_class(type(thing))]
        if isinstance(thing, Tensor):
            self.tensors[id(thing)] = thing
        elif isinstance(thing, FunctionType) and _package(thing) not in LIBRARIES:
            self.functions[id(thing)] = thing
        if isinstance(thing, (Tensor, ModuleType, type, str, bytes)):
            return ()
        if isinstance(thing, (set, frozenset, deque)):
            return thing if len(thing) <= LONGEST else ()
        if _package(type(thing)) not in LIBRARIES and isinstance(getattr(thing, "__dict__", None), dict):
            self.objects[id(thing)] = thing
            return [*vars(thing).values(), *self._of_class(type(thing))]
        parts = parts_of(thing) if not isinstance(thing, FunctionType) or id(thing) in self.functions else ()
        return parts if not isinstance(parts, Sequence) or len(parts) <= LONGEST else ()

    def _of_class(self, kind: type) -> list[Any]:
        """What the caller's own class and its bases hold for all objects, and the globals that a call may name."""
        held = []
        for base in kind.__mro__:
            if _package(base) not in LIBRARIES:
                self.classes[id(base)] = base
                held += _state_of(base).values()
                held += [code for name in ("forward", "__call__") if (code := vars(base).get(name)) is not None]
        return held

    def _note_module(self, module: nn.Module) -> None:
        self.objects[id(module)] = module
        held = [*module._parameters.values(), *module._buffers.values()]
        self.tensors |= {id(tensor): tensor for tensor in held if tensor is not None}

    @contextmanager
    def lent(self) -> Iterator[dict[int, Any]]:
        """Inside, working copies stand in the places of the originals: gives original's id -> copy."""
        memo: dict[int, Any] = {number: working_copy(tensor) for number, tensor in self.tensors.items()}
        memo |= self.objects
        with ExitStack() as back:
            for thing in self.objects.values():
                registered = [vars(thing)[name] for name in REGISTERED if isinstance(thing, nn.Module)]
                for places in (vars(thing), *registered):
                    back.callback(_put_back, places, dict(places))
            for function in self.functions.values():
                self._lend_to_function(function, memo, back)
            for kind in self.classes.values():
                for name, value in _state_of(kind).items():
                    back.callback(setattr, kind, name, value)
                    setattr(kind, name, self.copy(value, memo, f"{kind.__name__}.{name}"))
            for thing in self.objects.values():
                self._lend_to_object(thing, memo)
            yield memo

    def copy(self, value: Any, memo: dict[int, Any], name: str) -> Any:
        """A copy in which modules are themselves and tensors their working copies; itself where it can't be copied."""
        if isinstance(value, (ModuleType, type, FunctionType)):
            return value
        try:
            return copy.deepcopy(value, memo)
        except Exception:
            self.uncopied[f"{name} ({type(value).__name__})"] = None
            return value

    def _lend_to_object(self, thing: Any, memo: dict[int, Any]) -> None:
        """Attributes, and a module's parameters and buffers."""
        registered = REGISTERED if isinstance(thing, nn.Module) else ()
        for places in [vars(thing)[name] for name in registered[:2]]:
            places.update({name: memo[id(tensor)] for name, tensor in places.items() if tensor is not None})
        for name, value in [item for item in vars(thing).items() if item[0] not in registered]:
            vars(thing)[name] = self.copy(value, memo, f"{type(thing).__name__}.{name}")

    def _lend_to_function(self, function: FunctionType, memo: dict[int, Any], back: ExitStack) -> None:
        """Closure, defaults, and the globals that its code names (also those that it sets)."""
        name = function.__name__
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            back.callback(setattr, cell, "cell_contents", value)
            cell.cell_contents = self.copy(value, memo, f"a closure of {name}")
        for attribute in ("__defaults__", "__kwdefaults__"):
            if (value := getattr(function, attribute)) is not None:
                back.callback(setattr, function, attribute, value)
                setattr(function, attribute, self.copy(value, memo, f"a default of {name}"))
        places = function.__globals__
        for key in read_globals(function.__code__):
            if key not in places:
                back.callback(places.pop, key, None)
            elif not isinstance(places[key], (ModuleType, type, FunctionType)):
                back.callback(places.__setitem__, key, places[key])
                places[key] = self.copy(places[key], memo, key)


def working_copy(tensor: Tensor) -> Tensor:
    """A tensor's copy without its graph and gradient, in float64 where it is floating point. ValueError if lazy."""
    if isinstance(tensor, UninitializedTensorMixin):
        raise refuse("encoders and loss_fn", "must have the shapes of their parameters: run them once", "a lazy module")
    values = tensor.detach()
    values = (values.double() if values.is_floating_point() else values).clone()
    trained = tensor.requires_grad and tensor.is_leaf
    return nn.Parameter(values, trained) if isinstance(tensor, nn.Parameter) else values.requires_grad_(trained)


def copy_inputs(inputs: Any) -> Any:
    """One tower's inputs, each tensor a working copy."""
    if isinstance(inputs, Tensor):
        return working_copy(inputs)
    if isinstance(inputs, Mapping):
        return {name: copy_inputs(value) for name, value in inputs.items()}
    return tuple(map(copy_inputs, inputs)) if isinstance(inputs, (list, tuple)) else inputs


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The tensors that a loss backpropagates to, wherever they were hidden."""
    leaves, seen, waiting = {}, set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if (leaf := getattr(node, "variable", None)) is not None:
                leaves[id(leaf)] = leaf
            waiting += [following for following, _ in node.next_functions]
    return list(leaves.values())


def _put_back(places: MutableMapping[str, Any], before: dict[str, Any]) -> None:
    for name in set(places) - set(before):
        del places[name]
    places.update(before)


def _state_of(kind: type) -> dict[str, Any]:
    """What runs may change of a class's attributes."""
    return {k: value for k, value in vars(kind).items() if isinstance(value, STATE) and not k.startswith("__")}


def _package(thing: Any) -> str:
    return (getattr(thing, "__module__", None) or "").partition(".")[0]
