"""A module's code in other words: what each function does stays, how it is written does not.

Products become einsum, sums of tensors loops, means sums divided by a count, softmaxes exponentials of differences,
cross entropy a picked log-probability; comprehensions become loops in functions; arguments of lambdas get new names.
"""

import ast
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

PREFIX = "_reworded_"


def rewritten(module: ModuleType) -> ModuleType:
    """The same module, compiled from a rewritten tree. It keeps classes and values of its own."""
    with open(module.__file__, encoding="utf-8") as source:
        tree = ast.parse(source.read())
    tree = ast.fix_missing_locations(_Rewriter().visit(tree))
    spec = importlib.util.spec_from_loader(f"{module.__name__}_reworded", loader=None)
    new = importlib.util.module_from_spec(spec)
    vars(new).update(__file__=module.__file__, __package__=module.__package__)
    vars(new).update({PREFIX + name: function for name, function in WORDS.items()})
    sys.modules[new.__name__] = new  # dataclasses look themselves up
    try:
        exec(compile(tree, f"<{new.__name__}>", "exec"), vars(new))
    finally:
        del sys.modules[new.__name__]
    return new


def is_other_code(one: Callable, other: Callable) -> bool:
    """Whether two functions, what they are partials of, or values that can be called, are compiled to other code.

    The functions of their own module that they call, and what they close over, count as well.
    """
    return _codes(one) != _codes(other)


def _codes(value: object, above: tuple = ()) -> object:
    if isinstance(value, partial):
        return [_codes(part, above) for part in (value.func, *value.args, *value.keywords.values())]
    if is_dataclass(value) and not isinstance(value, type):
        return [_codes(part, above) for part in (type(value), *(getattr(value, field.name) for field in fields(value)))]
    if isinstance(value, type):
        return [_codes(part, above) for part in vars(value).values() if isinstance(part, FunctionType)]
    if not isinstance(value, FunctionType) or value in above:
        return repr(type(value))
    own = [part for part in (value.__globals__.get(name) for name in _names(value.__code__)) if _is_of(value, part)]
    closed = [cell.cell_contents for cell in value.__closure__ or ()]
    return _told(value.__code__), [_codes(part, (*above, value)) for part in own + closed]


def _is_of(function: FunctionType, part: object) -> bool:
    return isinstance(part, FunctionType | type) and part.__module__ == function.__module__


def _names(code: CodeType) -> list[str]:
    return [*code.co_names, *(name for part in code.co_consts if isinstance(part, CodeType) for name in _names(part))]


def _told(code: CodeType) -> tuple:
    return code.co_code, code.co_names, [_told(part) for part in code.co_consts if isinstance(part, CodeType)]


# --- other words for one operation ------------------------------------------------------------------------------------


def matmul(left: Any, right: Any) -> Any:
    """left @ right, entry by entry of the sum over their common side."""
    if not isinstance(left, Tensor) or left.ndim > 2 or right.ndim > 2:
        return left @ right
    letters = ("ik" if left.ndim == 2 else "k", "kj" if right.ndim == 2 else "k")
    out = "".join(letter for letter in "ij" if letter in "".join(letters))
    return torch.einsum(f"{letters[0]},{letters[1]}->{out}", left, right)


def times(left: Any, right: Any) -> Any:
    """left * right, the other way round."""
    numbers = all(isinstance(value, Tensor | int | float) for value in (left, right))
    return right * left if numbers else left * right


def plus(left: Any, right: Any) -> Any:
    """left + right, the other way round where that is the same."""
    numbers = all(isinstance(value, Tensor | int | float) for value in (left, right))
    return right + left if numbers else left + right


def minus(left: Any, right: Any) -> Any:
    """left - right as the sum with the opposite."""
    return left + -right if isinstance(left, Tensor | int) and isinstance(right, Tensor | int) else left - right


def over(left: Any, right: Any) -> Any:
    """left / right as a product with the reciprocal, for tensors; 1 / an int tensor would be float32."""
    floats = all(
        isinstance(value, float) or torch.is_tensor(value) and value.is_floating_point() for value in (left, right)
    )
    return left * (1 / right) if floats and isinstance(left, Tensor) else left / right


def whole_over(left: Any, right: Any) -> Any:
    """left // right for ints by divmod."""
    return divmod(left, right)[0] if isinstance(left, int) and isinstance(right, int) else left // right


def power(base: Any, exponent: Any) -> Any:
    """base ** exponent by repeated products."""
    if not isinstance(exponent, int) or not 1 <= exponent <= 3 or not isinstance(base, Tensor | int):
        return base**exponent
    found = base
    for _ in range(exponent - 1):
        found = found * base
    return found


def added(items: Iterable, start: Any = 0) -> Any:
    """sum(items) as a loop."""
    for item in items:
        start = start + item
    return start


def listed(items: Iterable) -> list:
    """A comprehension's list, item by item."""
    found = []
    for item in items:
        found.append(item)
    return found


def largest(*values: Any, **options: Any) -> Any:
    """max(...) by sorting, where nothing else is asked."""
    if options or len(values) == 1 and not isinstance(values[0], list | tuple):
        return max(*values, **options)
    return sorted(values[0] if len(values) == 1 else values)[-1]


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """F.cross_entropy by picking each row's log-probability."""
    picked = torch.stack([row.log_softmax(0)[label] for row, label in zip(logits, labels, strict=True)])
    if reduction == "none":
        return -picked
    return -picked.sum() / (len(picked) if reduction == "mean" else 1)


def normalize(values: Tensor, dim: int = 1) -> Tensor:
    """F.normalize by the root of the sum of squares."""
    return values / (values * values).sum(dim=dim, keepdim=True).sqrt().clamp(min=1e-12)


def mean(values: Any, *dims: Any, **named: Any) -> Any:
    """values.mean(...) as a sum divided by the count."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        return values.mean(*dims, **named)
    total = values.sum(*dims, **named)
    return total / (values.numel() / max(total.numel(), 1))


def total_of(values: Any, *dims: Any, **named: Any) -> Any:
    """values.sum(...); without a dimension as an einsum over everything."""
    if dims or named or not isinstance(values, Tensor) or not values.is_floating_point():
        return values.sum(*dims, **named)
    return torch.einsum("i->", values.reshape(-1))


def softmax(values: Any, *dims: Any, **named: Any) -> Any:
    """values.softmax(dim) from differences to the log-sum-exp."""
    dim = dims[0] if dims else named["dim"]
    return (values - values.logsumexp(dim, keepdim=True)).exp()


WORDS: dict[str, Callable] = {
    word.__name__: word
    for word in (matmul, times, plus, minus, over, whole_over, power, added, listed, largest, cross_entropy)
} | {word.__name__: word for word in (normalize, mean, total_of, softmax)}
_OPERATORS = {
    ast.MatMult: "matmul",
    ast.Mult: "times",
    ast.Add: "plus",
    ast.Sub: "minus",
    ast.Div: "over",
    ast.FloorDiv: "whole_over",
    ast.Pow: "power",
}
_METHODS = {"mean": "mean", "sum": "total_of", "softmax": "softmax"}
_BUILTINS = {"sum": "added", "max": "largest"}
_FUNCTIONS = {"cross_entropy": "cross_entropy", "normalize": "normalize"}


class _Rewriter(ast.NodeTransformer):
    """Puts the words above in place of operators and calls, and renames what lambdas take."""

    def __init__(self) -> None:
        self.numbers = itertools.count()

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        word = _OPERATORS.get(type(node.op))
        return node if word is None else _call(word, [node.left, node.right])

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = node.func
        if isinstance(called, ast.Name) and called.id in _BUILTINS:
            return _call(_BUILTINS[called.id], node.args, node.keywords)
        if not isinstance(called, ast.Attribute):
            return node
        if isinstance(called.value, ast.Name) and called.value.id == "F" and called.attr in _FUNCTIONS:
            return _call(_FUNCTIONS[called.attr], node.args, node.keywords)
        if called.attr in _METHODS and not (isinstance(called.value, ast.Name) and called.value.id in ("torch", "np")):
            return _call(_METHODS[called.attr], [called.value, *node.args], node.keywords)
        return node

    def visit_ListComp(self, node: ast.ListComp) -> ast.AST:
        self.generic_visit(node)
        return _call("listed", [ast.GeneratorExp(node.elt, node.generators)])

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        self.generic_visit(node)
        takes = node.args
        if takes.kwonlyargs or takes.defaults or takes.vararg or takes.kwarg:
            return node
        inner = {part.arg for part in ast.walk(node.body) if isinstance(part, ast.arg)}
        names = {argument.arg: f"{argument.arg}_{next(self.numbers)}" for argument in takes.args}
        if inner & names.keys():  # a lambda inside it has an argument of the same name
            return node
        arguments = ast.arguments([], [ast.arg(new) for new in names.values()], None, [], [], None, [])
        return ast.Lambda(arguments, _Renamer(names).visit(node.body))


class _Renamer(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.names.get(node.id, node.id), node.ctx)


def _call(word: str, arguments: list[ast.expr], keywords: Sequence[ast.keyword] = ()) -> ast.Call:
    return ast.Call(ast.Name(PREFIX + word, ast.Load()), arguments, list(keywords))
