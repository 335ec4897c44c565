"""What autograd remembers: the tensors that a forward keeps for its backward, by shape.

They are the activations. A storage counts once, however many operations keep it; parameters, which are there anyway,
don't count.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gclib.support.validation import refuse


@dataclass
class SavedTensors:
    """The tensors that autograd kept inside `watch_saved`; one entry a storage, in the order of the operations."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Bytes that stay until the backward has used them."""
        return sum(self.sizes)

    def by_shape(self) -> list[tuple[tuple[int, ...], torch.dtype, int, int]]:
        """(shape, dtype, how many, bytes of all of them), most bytes first."""
        counts_of: dict[tuple, list[int]] = {}
        for shape, dtype, size in zip(self.shapes, self.dtypes, self.sizes, strict=True):
            entry = counts_of.setdefault((shape, dtype), [0, 0])
            entry[0] += 1
            entry[1] += size
        return sorted(((*key, *counts) for key, counts in counts_of.items()), key=lambda row: -row[3])


@contextmanager
def watch_saved(*modules: nn.Module) -> Iterator[SavedTensors]:
    """Note every tensor that autograd keeps inside, through `torch.autograd.graph.saved_tensors_hooks`.

    modules: their parameters and buffers are left out. The result keeps shapes and sizes, not the tensors. Where an
    operation keeps a view, the shape is that of the tensor which was made. Raises ValueError for what is no module.
    """
    if not all(isinstance(module, nn.Module) for module in modules):
        raise refuse("modules", "must be torch modules", [type(module).__name__ for module in modules])
    seen = {_storage(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
    held: list[Tensor] = []  # so that no storage's address is given to another one while we watch
    saved = SavedTensors()

    def note(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in seen:
            seen.add(_storage(tensor))
            held.append(tensor)
            made = tensor if tensor._base is None else tensor._base
            saved.shapes.append(tuple(made.shape))
            saved.dtypes.append(tensor.dtype)
            saved.sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield saved
    finally:
        held.clear()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
