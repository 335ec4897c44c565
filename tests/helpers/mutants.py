"""Syntax-tree mutants of a function, and what an answer does, seen without the checks that judge it.

for mutant in mutants_of(definition):        # an ast.FunctionDef; one small change each
    answer = mutant.compiled(names)
    difference(observe(solution, ...), observe(answer, ...))
"""

import ast
import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from numbers import Real

import numpy as np
import torch
from torch import Tensor, nn

from gclib.course.checks.running import TooSlow, run_limited

Change = tuple[str, ast.AST | list[ast.AST] | None]  # what is done, and what stands in the node's place

ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv)  # no Pow: 4 ** 200_000_000 never ends
ORDER = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
OPPOSITES = {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
ALIKE = (  # names of functions and methods that are taken for one another
    ("max", "min", "sum"),
    ("amax", "amin", "sum", "mean", "logsumexp"),
    ("sum", "mean", "amax", "prod"),
    ("maximum", "minimum", "add"),
    ("logsumexp", "amax", "sum"),
    ("logaddexp", "maximum", "add"),
    ("exp", "log", "sigmoid"),
    ("log", "exp", "log2"),
    ("softmax", "log_softmax", "sigmoid"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("ceil", "floor"),
    ("fmean", "median"),
    ("stdev", "pstdev", "variance"),
    ("split", "chunk", "tensor_split"),
    ("no_grad", "enable_grad"),
    ("get_rng_state", "initial_seed"),
    ("eye", "ones_like"),
)
INSTEAD = {family[0]: family[1:] for family in ALIKE}


@dataclass(frozen=True)
class Mutant:
    """One changed copy of a function: `what` was changed, in words with its line, and the tree."""

    what: str
    tree: ast.FunctionDef

    def compiled(self, names: dict) -> Callable:
        """The function, with the notebook's imports as `names`."""
        namespace = dict(names)
        module = ast.fix_missing_locations(ast.Module(body=[self.tree], type_ignores=[]))
        exec(compile(module, "<mutant>", "exec"), namespace)
        return namespace[self.tree.name]


def mutants_of(function: ast.FunctionDef, texts: frozenset[str] = frozenset()) -> list[Mutant]:
    """Every mutant of `function` that is another tree and compiles; docstring, signature and decorators stay.

    texts: arguments that are strings. None of them stands in for a number: "adamw" * 200_000_000 fills the memory.
    """
    function = copy.deepcopy(function)
    if ast.get_docstring(function) is not None:
        del function.body[0]
    found, seen = [], {ast.unparse(function)}
    for path, node in _places(function.body, ("body",)):
        for what, new in _changes(node, function):
            tree = _replaced(function, path, new)
            text = ast.unparse(tree) if tree is not None else ""
            if isinstance(new, ast.Name) and new.id in texts:
                continue
            if text and text not in seen and _compiles(tree):
                seen.add(text)
                found.append(Mutant(f"line {node.lineno}: {what}", tree))
    return found


def _places(value: object, path: tuple) -> Iterator[tuple[tuple, ast.AST]]:
    """Every node below `value` that has a line, with the attributes and indices that lead to it."""
    if isinstance(value, list):
        for place, part in enumerate(value):
            yield from _places(part, (*path, place))
    elif isinstance(value, ast.AST):
        if hasattr(value, "lineno"):
            yield path, value
        for name, part in ast.iter_fields(value):
            yield from _places(part, (*path, name))


def _replaced(function: ast.FunctionDef, path: tuple, new: ast.AST | list[ast.AST] | None) -> ast.FunctionDef | None:
    """A copy of `function` with `new` at `path`: a list in place of a statement, or nothing there at all."""
    tree = copy.deepcopy(function)
    *above, last = path
    parent = reduce(lambda part, step: part[step] if isinstance(step, int) else getattr(part, step), above, tree)
    if isinstance(last, str):
        setattr(parent, last, copy.deepcopy(new))
        return tree if new is not None or last in ("lower", "upper", "step") else None
    parts = new if isinstance(new, list) else [new] if new is not None else []
    parent[last : last + 1] = copy.deepcopy(parts)
    return tree if parent else None


def _compiles(tree: ast.FunctionDef) -> bool:
    try:
        compile(ast.fix_missing_locations(ast.Module(body=[tree], type_ignores=[])), "<mutant>", "exec")
    except (SyntaxError, ValueError, TypeError):
        return False
    return True


def _changes(node: ast.AST, function: ast.FunctionDef) -> Iterator[Change]:
    """All one-step changes of one node."""
    text = ast.unparse(node).splitlines()[0]
    for kind, changes in _BY_KIND.items():
        if isinstance(node, kind):
            for what, new in changes(node, function):
                yield f"{what}: {text}", new


def _with(node: ast.AST, **fields: object) -> ast.AST:
    """`node` with other fields."""
    new = copy.deepcopy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _without(parts: Sequence, place: int) -> list:
    return [*parts[:place], *parts[place + 1 :]]


def _swapped(parts: Sequence, place: int) -> list:
    return [*parts[:place], parts[place + 1], parts[place], *parts[place + 2 :]]


def _arithmetic(node: ast.BinOp, function: ast.FunctionDef) -> Iterator[Change]:
    for op in ARITHMETIC:
        yield f"{op.__name__} instead", _with(node, op=op())
    yield "operands swapped", _with(node, left=node.right, right=node.left)
    yield "left alone", node.left
    yield "right alone", node.right
    yield "negated", ast.UnaryOp(ast.USub(), node)


def _comparison(node: ast.Compare, function: ast.FunctionDef) -> Iterator[Change]:
    op = type(node.ops[0])
    for other in ORDER if op in ORDER else (OPPOSITES[op],):
        yield f"{other.__name__} instead", _with(node, ops=[other()])
    for value in (True, False):
        yield f"always {value}", ast.Constant(value)


def _constant(node: ast.Constant, function: ast.FunctionDef) -> Iterator[Change]:
    value = node.value
    if isinstance(value, bool):
        yield f"{not value} instead", ast.Constant(not value)
    elif isinstance(value, int):
        for other in (value - 1, value + 1):
            yield f"{other} instead", ast.Constant(other)
    elif isinstance(value, float):
        for other in (value / 2, -value):
            yield f"{other} instead", ast.Constant(other)
    elif isinstance(value, str):
        for other in _strings(function) - {value}:
            yield f"{other!r} instead", ast.Constant(other)


def _strings(function: ast.FunctionDef) -> set[str]:
    return {part.value for part in ast.walk(function) if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def _name(node: ast.Name, function: ast.FunctionDef) -> Iterator[Change]:
    stored = {part.id for part in ast.walk(function) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    known = [argument.arg for argument in function.args.args] + sorted(stored)
    if isinstance(node.ctx, ast.Load) and node.id in known:
        for other in dict.fromkeys(known):
            yield f"{other} instead", ast.Name(other, ast.Load())
        yield "negated", ast.UnaryOp(ast.USub(), node)
    elif isinstance(node.ctx, ast.Load):
        for other in INSTEAD.get(node.id, ()):
            yield f"{other} instead", ast.Name(other, ast.Load())


def _call(node: ast.Call, function: ast.FunctionDef) -> Iterator[Change]:
    if isinstance(node.func, ast.Attribute):
        yield f".{node.func.attr}() dropped", node.func.value
    if node.args and not isinstance(node.args[0], ast.Starred):
        yield "its first argument instead", node.args[0]
    for place in range(len(node.args)):
        yield f"argument {place} dropped", _with(node, args=_without(node.args, place))
        if place + 1 < len(node.args):
            yield f"arguments {place} and {place + 1} swapped", _with(node, args=_swapped(node.args, place))
    for place, keyword in enumerate(node.keywords):
        yield f"{keyword.arg} dropped", _with(node, keywords=_without(node.keywords, place))


def _attribute(node: ast.Attribute, function: ast.FunctionDef) -> Iterator[Change]:
    for other in INSTEAD.get(node.attr, ()):
        yield f".{other} instead", _with(node, attr=other)
    yield f".{node.attr} dropped", node.value


def _subscript(node: ast.Subscript, function: ast.FunctionDef) -> Iterator[Change]:
    if isinstance(node.ctx, ast.Load):
        yield "index dropped", node.value


def _slice(node: ast.Slice, function: ast.FunctionDef) -> Iterator[Change]:
    for bound in ("lower", "upper", "step"):
        yield f"{bound} bound dropped", _with(node, **{bound: None})


def _parts(node: ast.Tuple | ast.List, function: ast.FunctionDef) -> Iterator[Change]:
    for place in range(len(node.elts) if isinstance(node.ctx, ast.Load) else 0):
        yield f"item {place} dropped", _with(node, elts=_without(node.elts, place))
        if place + 1 < len(node.elts):
            yield f"items {place} and {place + 1} swapped", _with(node, elts=_swapped(node.elts, place))


def _dict(node: ast.Dict, function: ast.FunctionDef) -> Iterator[Change]:
    for place in range(len(node.keys)):
        yield f"item {place} dropped", _with(node, keys=_without(node.keys, place), values=_without(node.values, place))
        if place + 1 < len(node.keys):
            yield f"values {place} and {place + 1} swapped", _with(node, values=_swapped(node.values, place))


def _choice(node: ast.IfExp, function: ast.FunctionDef) -> Iterator[Change]:
    yield "branches swapped", _with(node, body=node.orelse, orelse=node.body)
    yield "first branch always", node.body
    yield "second branch always", node.orelse


def _both(node: ast.BoolOp, function: ast.FunctionDef) -> Iterator[Change]:
    yield "and <-> or", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    for place in range(len(node.values)):
        yield f"only condition {place}", node.values[place]


def _sign(node: ast.UnaryOp, function: ast.FunctionDef) -> Iterator[Change]:
    yield "sign dropped", node.operand


def _comprehension(node: ast.AST, function: ast.FunctionDef) -> Iterator[Change]:
    first, *rest = node.generators
    if first.ifs:
        yield "condition dropped", _with(node, generators=[_with(first, ifs=[]), *rest])
    for what, items in _shorter(first.iter):
        yield what, _with(node, generators=[_with(first, iter=items), *rest])


def _shorter(items: ast.expr) -> Iterator[Change]:
    """`items` without the first, without the last, and backwards."""
    whole = ast.Call(ast.Name("list", ast.Load()), [items], [])
    one, minus = ast.Constant(1), ast.Constant(-1)
    for what, part in (
        ("first turn skipped", ast.Slice(lower=one)),
        ("last turn skipped", ast.Slice(upper=minus)),
        ("turns backwards", ast.Slice(step=minus)),
    ):
        yield what, ast.Subscript(whole, part, ast.Load())


def _loop(node: ast.For, function: ast.FunctionDef) -> Iterator[Change]:
    for what, items in _shorter(node.iter):
        yield what, _with(node, iter=items)
    yield "body once, after the loop", [_with(node, body=[ast.Pass()]), *node.body]


def _condition(node: ast.If, function: ast.FunctionDef) -> Iterator[Change]:
    yield "condition turned round", _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    yield "always", node.body


def _context(node: ast.With, function: ast.FunctionDef) -> Iterator[Change]:
    yield "context dropped", node.body
    yield "body behind the context", [_with(node, body=[ast.Pass()]), *node.body]


def _statement(node: ast.stmt, function: ast.FunctionDef) -> Iterator[Change]:
    yield "statement dropped", None
    yield "statement passed over", ast.Pass()
    if isinstance(node, ast.Assign | ast.Expr):
        yield "statement twice", [node, node]


def _returned(node: ast.Return, function: ast.FunctionDef) -> Iterator[Change]:
    yield "negated", _with(node, value=ast.UnaryOp(ast.USub(), node.value))


_BY_KIND: dict[type, Callable] = {
    ast.BinOp: _arithmetic,
    ast.Compare: _comparison,
    ast.Constant: _constant,
    ast.Name: _name,
    ast.Call: _call,
    ast.Attribute: _attribute,
    ast.Subscript: _subscript,
    ast.Slice: _slice,
    ast.Tuple: _parts,
    ast.List: _parts,
    ast.Dict: _dict,
    ast.IfExp: _choice,
    ast.BoolOp: _both,
    ast.UnaryOp: _sign,
    ast.GeneratorExp: _comprehension,
    ast.ListComp: _comprehension,
    ast.SetComp: _comprehension,
    ast.DictComp: _comprehension,
    ast.For: _loop,
    ast.If: _condition,
    ast.With: _context,
    ast.stmt: _statement,
    ast.Return: _returned,
}

# --- what an answer does ----------------------------------------------------------------------------------------------


def observe(
    answer: Callable,
    inputs: Mapping[str, object],
    *,
    seed: int,
    gradients: bool,
    seconds: float,
    uncounted: frozenset[str] = frozenset(),
) -> dict:
    """Everything that `answer` does with a copy of `inputs`, as plain numbers and tensors.

    Its value, whether tensors in it carry a graph, their gradients at the float inputs (if `gradients`), and what it
    left in the inputs: tensors, `.grad`, and whatever numbers the inputs count, but for those named in `uncounted`.
    Or the name of its error.
    """
    leaves, given = {}, {}
    for name, value in copy.deepcopy(dict(inputs)).items():
        given[name] = value
        if gradients and isinstance(value, Tensor) and value.is_floating_point():
            leaves[name] = value.requires_grad_()
            given[name] = value.clone()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        result = run_limited(lambda: answer(*given.values()), seconds)
        return {
            "value": _plain(result, uncounted),
            "gradients": _gradients(result, leaves),
            "inputs": _plain({name: value for name, value in given.items() if name not in leaves}, uncounted),
            "kept": _plain({name: given[name].detach() for name in leaves}, uncounted),
        }
    except (Exception, TooSlow) as error:
        return {"error": type(error).__name__}


def _gradients(result: object, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(result, Tensor) or not result.requires_grad or not leaves:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(result.sum(), list(leaves.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def _plain(value: object, uncounted: frozenset[str]) -> object:
    """Copies of the tensors and numbers in `value`, by their places; functions and private attributes are left out."""
    if isinstance(value, Tensor):
        graph = {"asks for a gradient": value.requires_grad, "leaf": value.is_leaf}
        grad = value.grad if value.is_leaf else None
        return {"tensor": value.detach().clone(), "grad": None if grad is None else grad.clone(), **graph}
    if value is None or isinstance(value, Real | str):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(part, uncounted) for key, part in value.items() if key not in uncounted}
    if isinstance(value, list | tuple | set):
        return [_plain(part, uncounted) for part in value]
    public = {name: part for name, part in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    if isinstance(value, nn.Module):
        public |= dict(value.named_parameters()) | dict(value.named_buffers())
    return _plain(public, uncounted)


def differs(expected: object, got: object, *, whole: bool = False) -> bool:
    """Whether two observations are not of the same thing, beyond rounding; `whole`: an int and a float are not."""
    if isinstance(expected, Tensor) or isinstance(got, Tensor):
        return not isinstance(expected, Tensor) or not isinstance(got, Tensor) or _tensors_differ(expected, got)
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        keys = expected.keys() == got.keys()
        return not keys or any(differs(value, got[key], whole=whole) for key, value in expected.items())
    if isinstance(expected, list) and isinstance(got, list):
        pairs = zip(expected, got, strict=False)
        return len(expected) != len(got) or any(differs(one, two, whole=whole) for one, two in pairs)
    if _is_number(expected) and isinstance(got, Mapping) and "tensor" in got and got["tensor"].ndim == 0:
        return differs(expected, got["tensor"].item(), whole=whole)
    if _is_number(expected) and _is_number(got):
        if whole and isinstance(expected, int) != isinstance(got, int):
            return True
        return not (expected == got or math.isclose(expected, got, rel_tol=1e-6, abs_tol=1e-9))
    return type(expected) is not type(got) or expected != got


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _tensors_differ(expected: Tensor, got: Tensor) -> bool:
    """Another shape or dtype, other infinities, or further apart than float32 rounds at logits of some hundreds."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return True
    if not expected.is_floating_point():
        return not torch.equal(expected, got)
    finite = expected.isfinite()
    if not torch.equal(finite, got.isfinite()) or not torch.equal(expected[~finite].sign(), got[~finite].sign()):
        return True
    bound = 3e-3 if expected.dtype == torch.float32 else 1e-7
    apart = (expected[finite].double() - got[finite].double()).norm()
    return bool(apart > bound * expected[finite].double().norm().clamp(min=0.1))
