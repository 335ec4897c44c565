"""Is it the same gradient? One step's gradients by parameter, and how far they are from another step's."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from gclib.support.validation import refuse


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
    found = {
        f"{number}.{name}": parameter.grad.detach().clone()
        for number, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    for module in modules:
        module.zero_grad(set_to_none=True)
    if not found:
        raise refuse("step", "must leave a gradient in at least one parameter of the modules", "none")
    return found


def worst_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest error of any parameter: ||found - expected|| / max(||expected||, 1e-3 * ||all expected||).

    The second term is for parameters whose gradient is zero in theory (a BERT key's bias), where rounding is all there
    is. Both as `gradients_of` gives them. Raises ValueError where names or shapes differ, or `expected` is all zero.
    """
    if set(found) != set(expected):
        differing = sorted(set(found) ^ set(expected))
        raise refuse("found", "must have the parameters of expected", f"only in one: {', '.join(differing[:4])}")
    for name, gradient in expected.items():
        if found[name].shape != gradient.shape:
            raise refuse(f"found[{name!r}]", f"must have the shape {tuple(gradient.shape)}", tuple(found[name].shape))
    whole = sum(float(gradient.double().square().sum()) for gradient in expected.values()) ** 0.5
    if not whole > 0:
        raise refuse("expected", "must not be zero everywhere", "a gradient of size 0")
    return max(
        float((found[name].double() - gradient.double()).norm()) / max(float(gradient.double().norm()), 1e-3 * whole)
        for name, gradient in expected.items()
    )
