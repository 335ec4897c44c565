"""Shapes in signatures, checked at run time only under pytest.

`shape_checked` marks a private function whose jaxtyping annotations are enforced when the
environment says `GCLIB_CHECK_SHAPES=1` (tests/conftest.py does). Everywhere else it returns the
function untouched, so training pays nothing. Public functions validate in words instead
(`gclib.support.validation`): a type checker would answer before their `ValueError` could.
"""

import functools
import os
from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def shape_checked(function: F) -> F:
    """Enforce the annotations of `function` under pytest (not inside torch.compile); leave it alone otherwise."""
    if os.environ.get("GCLIB_CHECK_SHAPES") != "1":
        return function
    import torch
    from beartype import beartype
    from jaxtyping import jaxtyped

    checked = jaxtyped(typechecker=beartype)(function)

    @functools.wraps(function)
    def choose(*args, **kwargs):
        """A compiler traces the function itself: its symbolic sizes are not ints, which the checker asks for."""
        return (function if torch.compiler.is_compiling() else checked)(*args, **kwargs)

    return choose
