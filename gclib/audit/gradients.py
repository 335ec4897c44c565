"""How far is one gradient from another? By parameter or by part: error, angle and size.

A gradient has a direction and a size. Adam divides the size away, so that a wrong size can hide for a whole training
run, and a wrong direction cannot: both are told.
"""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gclib.support.validation import refuse


@dataclass(frozen=True)
class GradientError:
    """How a gradient differs from the expected one.

    cosine: of the angle between the two (NaN where one is zero). size: ||found|| / ||expected||.
    error: ||found - expected|| / ||expected||.
    """

    cosine: float
    size: float
    error: float

    @property
    def scale(self) -> float:
        """The factor that brings the expected gradient nearest to the one found: <found, expected> / ||expected||^2."""
        return self.size * self.cosine if self.size else 0.0


def gradients_of(step: Callable[[], object], *modules: nn.Module) -> dict[str, Tensor]:
    """What `step()` adds to the gradients of `modules`: copies by parameter name, "0." for the first module.

    `.grad` is cleared before and after; a parameter without a gradient is left out. Raises ValueError where `step`
    can't be called, or leaves no gradient at all.
    """
    if not callable(step):
        raise refuse("step", "must be callable without arguments", type(step).__name__)
    for module in modules:
        module.zero_grad(set_to_none=True)
    step()
    gradients = {
        f"{number}.{name}": parameter.grad.detach().to_dense().clone()
        for number, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    for module in modules:
        module.zero_grad(set_to_none=True)
    if not gradients:
        raise refuse("step", "must leave a gradient in at least one parameter of the modules", "none")
    return gradients


def gradients_by_part(module: nn.Module) -> dict[str, Tensor]:
    """Every gradient in `module`, in float64, as one vector for each part: embeddings, then each layer in two halves.

    Parts are told apart by the parameters' names, as Hugging Face's encoders give them: ".layer.3.attention." is
    "layer 4 attention", the rest of a layer its "feed-forward"; what stands in no layer is "embeddings". Parameters
    without a gradient are left out. Raises ValueError where there is no gradient at all.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(_part_of(name), []).append(parameter.grad)
    if not parts:
        raise refuse("module", "must have a parameter with a gradient: run a step first", "none")
    return {name: flat(gradients) for name, gradients in parts.items()}


def worst_error(found: Mapping[Hashable, Tensor], expected: Mapping[Hashable, Tensor]) -> float:
    """The largest error of any parameter: ||found - expected|| / max(||expected||, 1e-3 * ||all expected||).

    The second term is for parameters whose gradient is zero in theory (a BERT key's bias), where rounding is all there
    is. Both as `gradients_of` gives them; infinite where `found` is not finite. Raises ValueError where names or shapes
    differ, or `expected` is all zero or not finite.
    """
    if set(found) != set(expected):
        differing = ", ".join(sorted(map(str, set(found) ^ set(expected)))[:4])
        raise refuse("found", "must have the parameters of expected", f"only in one: {differing}")
    _check_shapes(found, expected)
    whole = float(flat(expected.values()).norm())
    if not 0 < whole < math.inf:
        raise refuse("expected", "must be finite and not zero everywhere", f"a gradient of size {whole:g}")
    errors = [
        float((flat([found[name]]) - flat([gradient])).norm()) / max(float(flat([gradient]).norm()), 1e-3 * whole)
        for name, gradient in expected.items()
    ]
    return max(math.inf if math.isnan(error) else error for error in errors)


def compare_gradients(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, GradientError]:
    """The error of `found` in each part, and under "whole" that of all parts as one vector.

    Both as `gradients_by_part` gives them. Raises ValueError where the parts or their sizes differ, and where an
    expected part is zero.
    """
    if list(expected) != list(found):
        raise refuse("found", f"must have the parts {', '.join(expected)}", ", ".join(found))
    _check_shapes(found, expected)
    for name, vector in expected.items():
        if not vector.norm() > 0:
            raise refuse(f"expected[{name!r}]", "must not be zero", "a gradient of size 0")
    errors = {name: compare_vectors(vector, found[name]) for name, vector in expected.items()}
    return errors | {"whole": compare_vectors(flat(expected.values()), flat(found.values()))}


def compare_vectors(expected: Tensor, found: Tensor) -> GradientError:
    """The error of one vector (n,) against another. Of `expected` zero cosine is NaN, the others infinite or NaN."""
    size = (found.norm() / expected.norm()).item()
    cosine = (expected @ found / (expected.norm() * found.norm())).item() if size > 0 else float("nan")
    return GradientError(cosine, size, ((found - expected).norm() / expected.norm()).item())


def flat(gradients: Iterable[Tensor]) -> Tensor:
    """All gradients as one float64 vector, sparse ones with their zeros."""
    parts = [gradient.detach().to_dense().double().flatten() for gradient in gradients]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _check_shapes(found: Mapping[Hashable, Tensor], expected: Mapping[Hashable, Tensor]) -> None:
    for name, gradient in expected.items():
        if found[name].shape != gradient.shape:
            raise refuse(f"found[{name!r}]", f"must have the shape {tuple(gradient.shape)}", tuple(found[name].shape))


def _part_of(name: str) -> str:
    layer = re.search(r"\blayers?\.(\d+)\.(.*)", name)
    if layer is None:
        return "embeddings"
    half = "attention" if "attention" in layer[2] or "attn" in layer[2] else "feed-forward"
    return f"layer {int(layer[1]) + 1} {half}"
