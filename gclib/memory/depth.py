"""A deep encoder, read off two shallow ones: each further layer that is like those before adds what they added.

Reading an encoder's events with fake tensors takes time with each of its layers, and these are alike but for a few. So
it is cut to its first layers and read at two depths, and what the deeper reading has more is repeated up to the whole
depth (`gclib.memory.laws.grown`). Layers may take turns (five of one kind, then one of another): then a turn is what is
repeated. Where layers share parameters, or the readings show no such repetition, the whole encoder is read. Whoever
reads so holds a run of the whole encoder against what came of it; `gclib.memory.fake_steps` says of how much.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
PLACES = ("layer_idx", "layer_id", "layer_index", "layer_number")  # attributes that number the layers


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    """Its longest ModuleList: also what one calls `fully_shard` on the entries of, before the encoder itself."""
    lists = (part for part in encoder.modules() if isinstance(part, nn.ModuleList))
    return max(lists, key=len, default=nn.ModuleList())


def over_depth(encoder: nn.Module, read: Callable[[], T], grow: Callable[[T, T, int], T]) -> T:
    """read() of the whole encoder, from two readings of its first layers alone where these are at most three quarters
    of its layers. Whoever asks must hold what it says against the whole encoder.

    grow: from these two, and how many times what the second has more comes on top of the first. It raises LawBroken
    where they do not show it.
    """
    layers = layers_of(encoder)
    few, turn = _first_layers(encoder, layers)
    if 4 * (2 * few + turn) <= 3 * len(layers):
        with suppress(Exception):  # a forward may count on its layers; what is wrong with the whole is told below
            readings = []
            for depth in (few, few + turn):
                with _cut(layers, depth):
                    readings.append(read())
            return grow(*readings, (len(layers) - few) // turn)
    return read()


def _first_layers(encoder: nn.Module, layers: nn.ModuleList) -> tuple[int, int]:
    """A depth that has every kind of layer, two turns of those that take turns, and ends as the encoder does; and how
    many layers make a turn. Of all such, those that take the fewest layers to read.
    """
    kinds = [_kind(layer, place) for place, layer in enumerate(layers)]
    owners = [id(p) for _, p in encoder.named_parameters(remove_duplicate=False)]
    alone = {id(layer) for layer in layers}
    if len(kinds) < 2 or len(owners) != len(set(owners)) or len(alone) != len(kinds):
        return len(kinds), 1
    turns = range(1, len(kinds) // 2 + 1)

    def least(turn: int) -> int:
        unlike = (place + 1 for place in range(len(kinds) - turn) if kinds[place] != kinds[place + turn])
        first = max(unlike, default=0)
        return first + 2 * turn + (len(kinds) - first) % turn

    turn = min(turns, key=lambda turn: 2 * least(turn) + turn)
    return least(turn), turn


def _kind(layer: nn.Module, place: int) -> list[Any]:
    """All that tells one layer from another, but for its number."""

    def described(value: Any) -> Any:
        """What is equal for alike values; of what is no plain value or tensor, that it is the same thing."""
        if isinstance(value, Tensor):
            return value.shape, value.dtype, value.device, value.requires_grad
        if isinstance(value, Mapping):
            return [(key, described(each)) for key, each in value.items()]
        if isinstance(value, (list, tuple)):
            return [described(each) for each in value]
        if isinstance(value, partial):
            return described([value.func, value.args, value.keywords])
        if isinstance(value, str):
            return value.replace(f".{place}.", ".layer.")  # adapters know the path of what they adapt
        return value if isinstance(value, (bool, int, float, set, frozenset, torch.device)) else id(value)

    seen: list[Any] = []
    for name, part in layer.named_modules():
        attributes = {key: value for key, value in vars(part).items() if key not in ("_modules", "forward")}
        numbered = [key for key in PLACES if attributes.get(key) == place]
        seen += [name, type(part), getattr(part.forward, "__func__", part.forward)]
        seen += [(key, described(value)) for key, value in attributes.items() if key not in numbered]
    return seen


@contextmanager
def _cut(layers: nn.ModuleList, depth: int) -> Iterator[None]:
    """Inside, the list holds its first layers alone."""
    kept = layers._modules
    layers._modules = dict(list(kept.items())[:depth])
    try:
        yield
    finally:
        layers._modules = kept
