"""Shapes in signatures, checked at run time only under pytest.

`shape_checked` marks a private function whose jaxtyping annotations are enforced when the
environment says `GCLIB_CHECK_SHAPES=1` (tests/conftest.py does). Everywhere else it returns the
function untouched, so training pays nothing. Public functions validate in words instead
(`gclib.validation`): a type checker would answer before their `ValueError` could.
"""

import os
from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def shape_checked(function: F) -> F:
    """Enforce the annotations of `function` under pytest; leave it alone otherwise."""
    if os.environ.get("GCLIB_CHECK_SHAPES") != "1":
        return function
    from beartype import beartype
    from jaxtyping import jaxtyped

    return jaxtyped(typechecker=beartype)(function)
