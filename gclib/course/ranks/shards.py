"""FSDP2 on real ranks, for chapter 13: what a step in chunks sends and holds, weights gathered a chunk or kept.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m gclib.course.ranks.shards --pairs 8 --chunks 4

`launch_sharded` starts that from a notebook. float64, on the CPU (gloo). Letters: W ranks, b pairs of a rank, n chunks
of both towers, L layers.
"""

import argparse
import functools
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gclib.course.ranks.demo import FEATURES, MOST_RANKS, SEED, make_batch, own_part, run_ranks
from gclib.distributed import Rank, is_dtensor, process_group, weights_kept
from gclib.losses.module import ContrastiveLoss
from gclib.steps import grad_cache_step
from gclib.support.validation import positive_int, refuse

WIDTH, TEMPERATURE = 128, 0.4
MESSAGES = {"_allgather_base_": "all-gathers", "_reduce_scatter_base_": "reduce-scatters"}
CHOICES: dict[str, Callable[[nn.Module], Any]] = {
    "gathered a chunk": lambda encoder: nullcontext(),
    "weights kept": functools.partial(weights_kept, reduce_once=False),
    "weights kept, one reduction": weights_kept,
}


class LayeredEncoder(nn.Module):
    """(rows, FEATURES) -> unit vectors (rows, WIDTH): a layer in, L layers in between, one out."""

    def __init__(self, layers: int):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers))

    def forward(self, inputs: Tensor) -> Tensor:
        """All layers, then the unit vector."""
        hidden = self.first(inputs).tanh()
        for layer in self.layers:
            hidden = layer(hidden)
        return F.normalize(self.last(hidden), dim=1)


def layered_encoder(layers: int, *, sharded: bool) -> LayeredEncoder:
    """The encoder that all ranks start from, float64; sharded: each layer a unit, and a root around them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        encoder = LayeredEncoder(positive_int("layers", layers)).double()
    for layer in encoder.layers if sharded else ():
        fully_shard(layer)
    return fully_shard(encoder) if sharded else encoder


class Watch(TorchDispatchMode):
    """What is sent through torch.distributed inside, in this thread, and the most bytes that its tensors hold at once.

    FSDP frees and refills storages in place, which no operation shows: all that live are asked for their size at each.
    """

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.messages: list[tuple[str, int]] = []
        self._storages: dict[int, weakref.ref] = {}
        self._see(before)
        self.peak_bytes = self.start_bytes = self._live_bytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sides = [side.nbytes for side in args[:2] if isinstance(side, Tensor)]
            self.messages.append((MESSAGES.get(func._opname, func._opname), max(sides, default=0)))
        result = func(*args, **(kwargs or {}))
        self._see((args, kwargs, result))
        self.peak_bytes = max(self.peak_bytes, self._live_bytes())
        return result

    def _see(self, tree: Any) -> None:
        for value in tree_leaves(tree):
            if isinstance(value, Tensor) and not is_dtensor(value):
                storage = value.untyped_storage()
                known = self._storages.get(storage._cdata)
                if known is None or known() is None:  # one that is gone may have had the same address
                    self._storages[storage._cdata] = weakref.ref(storage)

    def _live_bytes(self) -> int:
        total, gone = 0, []
        for key, ref in self._storages.items():
            storage = ref()
            if storage is None:
                gone.append(key)
            else:
                total += storage.nbytes()
        for key in gone:
            del self._storages[key]
        return total

    def count(self, operation: str) -> int:
        """How often it was asked for."""
        return sum(name == operation for name, _ in self.messages)

    def bytes_of(self, operation: str) -> int:
        """The bytes of its larger sides, added up."""
        return sum(size for name, size in self.messages if name == operation)


def run_choice(choice: str, here: Rank, rows: Sequence[int], chunk_size: int, layers: int) -> dict[str, Any]:
    """Two steps by this choice: the second one is watched, for the first sets FSDP up and looks at the encoder."""
    encoder, loss_fn = layered_encoder(layers, sharded=True), ContrastiveLoss(TEMPERATURE, across="gather")
    inputs = own_part(make_batch(sum(rows)), rows, here.rank)

    def step() -> float:
        encoder.zero_grad()
        with CHOICES[choice](encoder):
            return float(grad_cache_step([encoder] * 2, inputs, loss_fn, chunk_size=chunk_size))

    step()
    encoder.zero_grad()
    with Watch(*(parameter.to_local() for parameter in encoder.parameters())) as watch:
        result: dict[str, Any] = {"loss": step()}
    result |= {"shard bytes": watch.start_bytes, "peak bytes": watch.peak_bytes}
    for name in MESSAGES.values():
        result |= {name: watch.count(name), f"bytes of {name}": watch.bytes_of(name)}
    gradients = {name: parameter.grad.full_tensor() for name, parameter in encoder.named_parameters()}
    return result | {"gradients": gradients}


def launch_sharded(pairs: int = 8, *, ranks: int = 2, chunks: int = 4, layers: int = 6) -> list[dict[str, Any]]:
    """Start `ranks` processes with `pairs` pairs each, and return what each found, by choice: see `CHOICES`.

    chunks: of each tower, so that n = 2 * chunks. A choice's entry has "all-gathers" and "reduce-scatters" (how many)
    of a step, "bytes of all-gathers" and "bytes of reduce-scatters" (whole units' weights and gradients, of which
    (W - 1) / W come from or go to other ranks), "shard bytes" (a rank's weights at rest), "peak bytes" (the most that
    its tensors hold at once in a step, shards included), the "loss", and the "gradients", whole, by name.

    Raises ValueError for what cannot run, RuntimeError with the ranks' own
    words where one fails or they are late.
    """
    for name, value in {"pairs": pairs, "ranks": ranks, "chunks": chunks, "layers": layers}.items():
        positive_int(name, value)
    if not 2 <= ranks <= MOST_RANKS:
        raise refuse("ranks", f"must be 2 to {MOST_RANKS}", ranks)
    if pairs % chunks:
        raise refuse("chunks", f"must divide the {pairs} pairs of a rank", chunks)
    arguments = ["--pairs", pairs, "--chunks", chunks, "--layers", layers]
    return run_ranks("gclib.course.ranks.shards", ranks, list(map(str, arguments)))[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """What each process runs."""
    parser = argparse.ArgumentParser(prog="python -m gclib.course.ranks.shards", description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=8, help="pairs of each rank")
    parser.add_argument("--chunks", type=int, default=4, help="chunks of each tower")
    parser.add_argument("--layers", type=int, default=6, help="layers, each a unit")
    parser.add_argument("--folder", help="where to leave what was found")
    typed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with process_group(backend="gloo", timeout_seconds=60) as here:
        rows = [typed.pairs] * here.world_size
        size = typed.pairs // typed.chunks
        results = {choice: run_choice(choice, here, rows, size, typed.layers) for choice in CHOICES}
        if typed.folder:
            torch.save(results, Path(typed.folder, f"rank{here.rank}.pt"))


if __name__ == "__main__":
    main()
