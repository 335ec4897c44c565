"""All that a step's bytes depend on in an encoder or a loss, code included, as one checksum: what laws are kept under.

`repr` shows little of a module: not a Matryoshka loss's dimensions, not its forward's code, not a closure's value. So
everything is walked that a forward can reach: attributes, hooks, closures, defaults, the globals that code names, the
bytecode of every class. Of tensors only what bytes depend on counts: shape, dtype, device, what is trained, which of
them are one. Of installed packages the namespace that a class was defined in counts as it is now, so that a patched
function is seen; what is behind that is known by the packages' versions. Where something cannot be written down (a
generator, a handle of the system), `Indescribable` is raised, and nothing is kept.
"""

import enum
import hashlib
import logging
import sys
import sysconfig
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from operator import attrgetter, itemgetter, methodcaller
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    NoneType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gclib.support import PACKAGE

PLAIN = (NoneType, bool, int, float, complex, str, bytes, type(...), type(NotImplemented), range, slice)
PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, Path)
COUNTED = (FunctionType, staticmethod, classmethod, property, *PLAIN)
SEQUENCES = (list, tuple, deque, set, frozenset)
CONTENTS = (list, tuple, set, frozenset, dict, str, bytes, int, float)  # what classes may be derived of
MAPPINGS = (dict, OrderedDict, defaultdict, MappingProxyType)
NAMED_ONLY = (logging.Logger, BuiltinFunctionType, type(list.append), type(list.__add__), type("".__add__))
NAMED_ONLY += (GetSetDescriptorType, MemberDescriptorType, RemovableHandle)
SKIPPED = frozenset(("__doc__", "__module__", "__dict__", "__weakref__", "__annotations__", "__annotate__"))
SKIPPED |= {"__static_attributes__", "__firstlineno__", "__orig_bases__", "__parameters__", "__type_params__"}
SKIPPED |= {"_abc_impl", "__abstractmethods__", "__dataclass_fields__", "__dataclass_params__", "__slots__"}
_PATHS = sysconfig.get_paths()
LIBRARIES = tuple({*(_PATHS[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")), str(PACKAGE)})


class Indescribable(Exception):
    """A thing that bytes may depend on and that cannot be written down."""


def fingerprint(*things: Any) -> str:
    """A checksum of these things and of all that they can reach. Raises Indescribable."""
    walk = _Walk()
    for thing in (*things, *_surroundings()):
        walk.add(thing)
    return walk.checksum()


def _surroundings() -> Iterator[Any]:
    """What every forward can reach."""
    yield torch.get_default_dtype(), torch.get_default_device()
    yield from map(_namespace_of, ("torch.functional", "torch.nn.functional", "torch.utils.checkpoint"))
    hooks = vars(nn.modules.module)
    yield {name: hooks[name] for name in sorted(hooks) if name.startswith("_global_") and hooks[name]}
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError:
        return
    yield dict(ALL_ATTENTION_FUNCTIONS)


class _Namespace:
    """Names of an installed package, a module's or a class's: its functions count, with their own code."""

    def __init__(self, name: str, names: Any, kinds: tuple[type, ...]):
        self.name = name
        self.counted = sorted((item for item in list(names.items()) if type(item[1]) in kinds), key=itemgetter(0))


class _Walk:
    """A walk through things, each once: the second time it is known by the number that it had."""

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._parts_of: dict[type, Callable] = {}
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no id is given to another thing meanwhile
        self._waiting: list[Any] = []

    def note(self, *words: Any) -> None:
        self._notes.append(repr(words))

    def checksum(self) -> str:
        return hashlib.sha256("".join(self._notes).encode("utf-8", "backslashreplace")).hexdigest()

    def add(self, root: Any) -> None:
        """The thing and all behind it, without recursion: models are deep."""
        self._waiting.append(root)
        while self._waiting:
            thing = self._waiting.pop()
            if type(thing) in PLAIN or isinstance(thing, Path):
                self.note(type(thing).__name__, thing)
            elif id(thing) in self._numbers:
                self.note("again", self._numbers[id(thing)])
            else:
                self._numbers[id(thing)] = len(self._numbers)
                self._alive.append(thing)
                self._waiting += list(self._parts(thing))[::-1]

    def _parts(self, thing: Any) -> Iterator[Any]:
        """What a thing is made of; what is no thing is noted."""
        kind = type(thing)
        if kind not in self._parts_of:
            found = (parts for kinds, parts in _KINDS if isinstance(thing, kinds))
            self._parts_of[kind] = next(found, _Walk._object)
        parts = self._parts_of[kind]
        self.note("object" if parts is _Walk._object else kind.__name__)
        return parts(self, thing)

    def _object(self, thing: Any) -> Iterator[Any]:
        """The class and the attributes of any other thing; what it keeps outside of Python can't be known."""
        kind = type(thing)
        if kind is object:
            return
        outside = [base for base in kind.__mro__ if not _of_python(base) and base not in (object, *CONTENTS)]
        if outside or not _of_python(kind):
            raise Indescribable(f"{kind.__module__}.{kind.__qualname__}")
        yield kind
        for name in _slots(kind):
            yield name, getattr(thing, name, NotImplemented)
        yield _attributes(thing)
        for base in CONTENTS:
            if isinstance(thing, base):
                yield base(thing)

    def _tensor(self, tensor: Tensor) -> Iterator[Any]:
        shape, dtype, device = tuple(tensor.shape), tensor.dtype, tensor.device
        self.note(shape, str(dtype), str(device), str(tensor.layout), tensor.requires_grad, tensor.is_leaf)
        if tensor.layout == torch.strided:
            self.note(tensor.stride(), tensor.storage_offset())
            try:
                storage = tensor.untyped_storage()
                self.note(storage.nbytes(), self._numbers.setdefault(("storage", storage._cdata), len(self._numbers)))
                self._alive.append(storage)
            except (RuntimeError, NotImplementedError) as error:
                raise Indescribable("a tensor without a storage") from error
        yield {name: value for name, value in vars(tensor).items()}
        yield dict(tensor._backward_hooks or {})

    def _array(self, array: np.ndarray) -> Iterator[Any]:
        if array.dtype.hasobject:
            raise Indescribable("an array of objects")
        self.note(array.shape, str(array.dtype), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest())
        yield from ()

    def _function(self, function: FunctionType) -> Iterator[Any]:
        code, library = function.__code__, _from_library(function.__code__.co_filename)
        self.note(function.__qualname__, _code_checksum(code))
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
        yield from (value if not library or type(value) in PLAIN else type(value).__name__ for value in defaults)
        for cell in function.__closure__ or ():
            try:
                inside = cell.cell_contents
            except ValueError:  # not filled yet
                inside = NotImplemented
            if not library or type(inside) in (FunctionType, *PLAIN):
                yield inside
        if not library:
            yield dict(vars(function))
            yield from self._globals(function)

    def _globals(self, function: FunctionType) -> Iterator[Any]:
        """What the names in a function's code stand for: in its module, and in the modules that it names."""
        names = sorted(_names(function.__code__))
        for name in names:
            value = function.__globals__.get(name, NotImplemented)
            if isinstance(value, ModuleType):
                yield from self._named_in(value, names)
            elif value is not NotImplemented:
                yield name, value

    def _named_in(self, module: ModuleType, names: list[str]) -> Iterator[Any]:
        """What names stand for in a module that the code names too."""
        self.note("module", module.__name__)
        for name in names:
            value = vars(module).get(name, NotImplemented)
            if isinstance(value, (FunctionType, type, *PLAIN)) or not _is_library(module):
                yield name, value

    def _module(self, module: ModuleType) -> Iterator[Any]:
        self.note(module.__name__)
        if not _is_library(module):
            raise Indescribable(f"module {module.__name__}")
        yield from ()

    def _class(self, kind: type) -> Iterator[Any]:
        self.note(kind.__module__, kind.__qualname__)
        if not _of_python(kind):
            return  # of C: known by its name
        yield kind.__bases__
        own = {name: value for name, value in list(vars(kind).items()) if name not in SKIPPED}
        if not _from_library(_file_of(kind.__module__)):
            yield own
            return
        yield _Namespace(f"{kind.__module__}.{kind.__qualname__}", own, COUNTED)
        if issubclass(kind, nn.Module):
            yield _namespace_of(kind.__module__)

    def _namespace(self, names: _Namespace) -> Iterator[Any]:
        self.note(names.name)
        yield names.counted

    def _enum(self, thing: enum.Enum) -> Iterator[Any]:
        self.note(str(thing))
        yield type(thing)

    def _sequence(self, thing: Any) -> Iterator[Any]:
        self.note(len(thing))
        if isinstance(thing, (set, frozenset)):
            if not all(isinstance(value, (type, *PLAIN)) for value in thing):
                raise Indescribable("a set of objects")
            thing = sorted(thing, key=repr)
        yield from thing

    def _mapping(self, thing: Any) -> Iterator[Any]:
        self.note(len(thing))
        for key, value in list(thing.items()):
            yield key
            yield value

    def _named(self, thing: Any) -> Iterator[Any]:
        self.note(getattr(thing, "__qualname__", getattr(thing, "name", "")))
        if isinstance(thing, BuiltinFunctionType):
            owner = thing.__self__
            if owner is not None and not isinstance(owner, (ModuleType, type)):
                yield owner


def _attributes(thing: Any) -> dict[str, Any]:
    """A thing's attributes. A module's hooks are numbered in their order; torch numbers all that there ever were."""
    attributes = dict(getattr(thing, "__dict__", {}))
    if not isinstance(thing, nn.Module):
        return attributes
    hooks = {name: value for name, value in attributes.items() if "_hooks" in name and isinstance(value, dict)}
    places = {number: place for place, number in enumerate(sorted({n for value in hooks.values() for n in value}))}
    return attributes | {name: {places[n]: hook for n, hook in value.items()} for name, value in hooks.items()}


def _exactly(*kinds: type) -> Any:
    """A check for these types, and none derived of them: those hold more."""

    class Exactly(type):
        def __instancecheck__(cls, thing: Any) -> bool:
            return type(thing) in kinds

    return Exactly("exactly", (), {})


_KINDS: tuple[tuple[Any, Callable], ...] = (
    (_Namespace, _Walk._namespace),
    (Tensor, _Walk._tensor),
    (enum.Enum, _Walk._enum),
    (type, _Walk._class),
    (FunctionType, _Walk._function),
    (MethodType, lambda walk, method: [method.__self__, method.__func__]),
    (_exactly(partial), lambda walk, thing: [thing.func, thing.args, dict(thing.keywords)]),
    (_exactly(weakref.ref), lambda walk, reference: [reference()]),
    ((staticmethod, classmethod), lambda walk, thing: [thing.__func__]),
    (_exactly(property), lambda walk, thing: [thing.fget, thing.fset, thing.fdel]),
    (_exactly(attrgetter, itemgetter, methodcaller), lambda walk, getter: [getter.__reduce__()[1]]),
    (_exactly(np.ndarray), _Walk._array),
    (_exactly(*SEQUENCES), _Walk._sequence),
    (_exactly(*MAPPINGS), _Walk._mapping),
    (ModuleType, _Walk._module),
    (NAMED_ONLY, _Walk._named),
)


@lru_cache(maxsize=4_096)
def _of_python(kind: type) -> bool:
    """Whether a class was made by a class statement."""
    heap_type, immutable = 1 << 9, 1 << 8
    made = kind.__flags__ & heap_type and not kind.__flags__ & immutable
    return bool(made) and any(name in vars(base) for base in kind.__mro__ for name in ("__dict__", "__slots__"))


def _slots(kind: type) -> list[str]:
    """The names of a class's slots."""
    slot_lists = (vars(base).get("__slots__", ()) for base in kind.__mro__)
    names = [name for slots in slot_lists for name in ([slots] if isinstance(slots, str) else slots)]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _namespace_of(module: str) -> _Namespace:
    return _Namespace(module, vars(sys.modules[module]) if module in sys.modules else {}, (FunctionType,))


def _file_of(module: str) -> str:
    loaded = sys.modules.get(module)
    if loaded is None:
        return ""
    return getattr(loaded, "__file__", None) or ("<frozen" if module in sys.builtin_module_names else "")


def _is_library(module: ModuleType) -> bool:
    return _from_library(_file_of(module.__name__))


@lru_cache(maxsize=4_096)
def _from_library(file_name: str) -> bool:
    """Whether code of this file is an installed package's, Python's own, or gclib's: known by its version."""
    return file_name.startswith(("<frozen", *LIBRARIES)) or "/torch/" in file_name and file_name.startswith("<")


@lru_cache(maxsize=65_536)
def _code_checksum(code: CodeType) -> str:
    """All that a function's code does, without its place in the file."""
    constants = [_constant(each) for each in code.co_consts]
    parts = (code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    parts += (code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_exceptiontable)
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()


def _constant(value: Any) -> str:
    """A constant of a function's code; the order of a set is another one in each session."""
    if isinstance(value, CodeType):
        return _code_checksum(value)
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


@lru_cache(maxsize=65_536)
def _names(code: CodeType) -> frozenset[str]:
    """The names in a function's code, and in the code of functions inside it."""
    inner = (_names(each) for each in code.co_consts if isinstance(each, CodeType))
    return frozenset(code.co_names).union(*inner)
