"""How far one gradient is from another, part by part: the angle between them, and their sizes.

A gradient has a direction and a size. Adam divides the size away, so that a wrong size can hide for a whole training
run, and a wrong direction cannot: both are told.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from gclib.course import plots
from gclib.support.validation import refuse


@dataclass(frozen=True)
class GradientError:
    """cosine: of the angle between the two gradients (NaN where one is zero). size: ||found|| / ||expected||.
    error: ||found - expected|| / ||expected||."""

    cosine: float
    size: float
    error: float


def gradients_by_part(module: nn.Module) -> dict[str, Tensor]:
    """Every gradient in `module`, in float64, as one vector for each part: embeddings, then each layer in two halves.

    Parts are told apart by the parameters' names, as Hugging Face's encoders give them: ".layer.3.attention." is
    "layer 4 attention", the rest of a layer its "feed-forward"; what stands in no layer is "embeddings". Parameters
    without a gradient are left out. Raises ValueError where there is no gradient at all.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(_part_of(name), []).append(parameter.grad.detach().double().flatten())
    if not parts:
        raise refuse("module", "must have a parameter with a gradient: run a step first", "none")
    return {name: torch.cat(vectors) for name, vectors in parts.items()}


def compare_gradients(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, GradientError]:
    """The error of `found` in each part, and under "whole" that of all parts as one vector.

    Both as `gradients_by_part` gives them. Raises ValueError where the parts or their sizes differ, and where an
    expected part is zero.
    """
    if list(expected) != list(found):
        raise refuse("found", f"must have the parts {', '.join(expected)}", ", ".join(found))
    for name, vector in expected.items():
        if vector.shape != found[name].shape:
            raise refuse(f"found[{name!r}]", f"must have the shape {tuple(vector.shape)}", tuple(found[name].shape))
        if not vector.norm() > 0:
            raise refuse(f"expected[{name!r}]", "must not be zero", "a gradient of size 0")
    pairs = {name: (vector, found[name]) for name, vector in expected.items()}
    pairs["whole"] = (torch.cat(list(expected.values())), torch.cat(list(found.values())))
    return {name: _compare(*pair) for name, pair in pairs.items()}


def plot_gradient_errors(axes: Sequence[Axes], errors: Mapping[str, GradientError]) -> None:
    """Two panels of bars, a bar for each part: the cosine on axes[0], the size on axes[1]; a line where both are right.

    The numbers stand inside bars that are long enough and end before the line.

    A cosine that is not defined (a gradient of zero) is said in words.
    """
    panels = (("cosine", "cosine with the full batch's gradient"), ("size", "size / size of the full batch's gradient"))
    for panel, (key, label) in zip(axes, panels, strict=True):
        values = np.array([getattr(error, key) for error in errors.values()])
        look = {"color": plots.OKABE_ITO["sky blue"], "edgecolor": plots.INK, "linewidth": 0.5}
        paper = {"facecolor": plots.PAPER, "edgecolor": "none", "pad": 1.0}
        panel.barh(list(errors), np.nan_to_num(values), 0.62, **look)
        for place, value in enumerate(values):
            said = "no direction: zero" if np.isnan(value) else f"{value:.2f}"
            where = (max(0.0, np.nan_to_num(value)), place)
            inside = 0.3 < where[0] < 1.005
            beside = {"xytext": (-4, 0), "ha": "right"} if inside else {"xytext": (5, 0), "bbox": paper}
            panel.annotate(said, where, textcoords="offset points", va="center", zorder=5, **beside)
        panel.axvline(1, color=plots.INK, linestyle="--", linewidth=1)
        panel.set(xlim=(min(0.0, np.nanmin([*values, 0])), max(1.3, 1.2 * np.nanmax([*values, 1]))), xlabel=label)
        panel.invert_yaxis()


def describe_errors(errors: Mapping[str, GradientError]) -> str:
    """The picture in words: cosine and size of every part."""
    directions = {name: f"cosine {error.cosine:.2f}" for name, error in errors.items() if error.size > 0}
    return "; ".join(f"{name}: {directions.get(name, 'no direction')}, size {e.size:.2f}" for name, e in errors.items())


def _part_of(name: str) -> str:
    found = re.search(r"\blayers?\.(\d+)\.(.*)", name)
    if found is None:
        return "embeddings"
    return (
        f"layer {int(found[1]) + 1} {'attention' if 'attention' in found[2] or 'attn' in found[2] else 'feed-forward'}"
    )


def _compare(expected: Tensor, found: Tensor) -> GradientError:
    size = (found.norm() / expected.norm()).item()
    cosine = (expected @ found / (expected.norm() * found.norm())).item() if size > 0 else float("nan")
    return GradientError(cosine, size, ((found - expected).norm() / expected.norm()).item())
