"""From token vectors to one vector a row: the poolings of an encoder, and the layers that may stand behind them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.support.shapes import shape_checked
from gclib.support.validation import one_of

# Over the unmasked tokens: the first, the last, the largest number in each dimension; the mean, the sum over the root
# of their number, and the mean weighted by their places 1, 2, 3, ... (Muennighoff 2022, arXiv 2202.08904).
TOKEN_POOLINGS = ("mean", "cls", "last", "max_tokens", "mean_sqrt", "weighted_mean")
POOLINGS = (*TOKEN_POOLINGS, "own", "tokens")
Pooling = str | tuple[str, ...]


class Dense(nn.Module):
    """A linear layer with an activation behind it, and the input added to its output if `residual`.

    The parameters have the names that sentence-transformers gives them.
    """

    def __init__(self, inputs: int, outputs: int, *, activation: nn.Module, bias: bool = True, residual: bool = False):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.activation_function = activation
        self.adds_input = residual
        if residual and inputs != outputs:
            self.residual = nn.Linear(inputs, outputs, bias=False)

    def forward(self, reps: Tensor) -> Tensor:
        """(rows, inputs) -> (rows, outputs)."""
        output = self.activation_function(self.linear(reps))
        if not self.adds_input:
            return output
        return output + (self.residual(reps) if hasattr(self, "residual") else reps)

    def extra_repr(self) -> str:
        """What its words are in a print."""
        return f"{self.linear.in_features} -> {self.linear.out_features}"


class Norm(nn.Module):
    """LayerNorm over the dimensions of a representation, under sentence-transformers' name for its parameters."""

    def __init__(self, dimension: int):
        super().__init__()
        self.norm = nn.LayerNorm(dimension)

    def forward(self, reps: Tensor) -> Tensor:
        """(rows, D) -> (rows, D)."""
        return self.norm(reps)


class UnitLength(nn.Module):
    """Each representation divided by its length."""

    def forward(self, reps: Tensor) -> Tensor:
        """(rows, D) -> (rows, D)."""
        return F.normalize(reps, dim=-1)


def check_pooling(pooling: Pooling) -> Pooling:
    """One of `POOLINGS`, or several of `TOKEN_POOLINGS`, whose vectors are then put behind one another; ValueError."""
    if isinstance(pooling, (tuple, list)) and pooling:
        for name in pooling:
            one_of("pooling", name, TOKEN_POOLINGS)
        return tuple(pooling) if len(pooling) > 1 else pooling[0]
    return one_of("pooling", pooling, POOLINGS)


def pool(tokens: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Token vectors (rows, T, D) and their mask (rows, T) -> (rows, D), or D for each of several poolings."""
    names = (pooling,) if isinstance(pooling, str) else pooling
    vectors = [_pool(tokens, mask, name) for name in names]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)


@shape_checked
def _pool(tokens: Float[Tensor, "rows T D"], mask: Shaped[Tensor, "rows T"], pooling: str) -> Float[Tensor, "rows D"]:
    """One vector a row. Reads no value, so that it runs under fake tensors too, and nothing of masked tokens."""
    if pooling in ("cls", "last"):
        return tokens[torch.arange(tokens.shape[0], device=tokens.device), _position(mask, pooling == "last")]
    masked = (mask == 0).unsqueeze(-1)
    if pooling == "max_tokens":
        return tokens.masked_fill(masked, torch.finfo(tokens.dtype).min).amax(dim=1)
    weights = mask.to(torch.promote_types(tokens.dtype, torch.float32))  # bfloat16 counts to 256
    if pooling == "weighted_mean":
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device) - _position(mask, False).unsqueeze(1)
        weights = weights * places
    total = weights.sum(dim=1, keepdim=True).clamp(min=1)
    weights = (weights / (total.sqrt() if pooling == "mean_sqrt" else total)).to(tokens.dtype)
    # 0 * NaN is NaN: what a model leaves at padding must not come in
    return (weights.unsqueeze(1) @ tokens.masked_fill(masked, 0)).squeeze(1)


def _position(mask: Tensor, last: bool) -> Tensor:
    """The column of each row's first (or last) unmasked token."""
    present = (mask != 0).to(torch.int64)
    return mask.shape[1] - 1 - present.flip(1).argmax(dim=1) if last else present.argmax(dim=1)


def words_of(head: Sequence[nn.Module]) -> list[str]:
    """The layers behind the pooling in words, such as "Dense 384 -> 128"."""
    return [f"{type(layer).__name__} {layer.extra_repr()}".strip() for layer in head]
