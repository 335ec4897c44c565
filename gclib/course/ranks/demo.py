"""Real ranks for chapter 09: every way of `ways` on one small batch, one line a rank, gradients in a folder.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m gclib.course.ranks.demo --rows 6 3 --chunks 3

`launch` starts that from a notebook. Everything is float64 and on the CPU (gloo), so that a difference is a mistake and
not rounding. Letters: W ranks, b pairs of a rank, B of all.
"""

import argparse
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from gclib.audit.gradients import gradients_of
from gclib.course.ranks.ways import TEMPERATURE, WAYS, RankLoss
from gclib.distributed import Rank, average_gradients, process_group
from gclib.losses.gathered import gathered_contrastive_loss
from gclib.losses.ring import ring_contrastive_loss
from gclib.memory.ledger import record_memory
from gclib.steps import grad_cache_step
from gclib.support.validation import positive_int, refuse

FEATURES, HIDDEN, DIMENSIONS = 12, 16, 8
SEED, LAUNCH_SECONDS, MOST_RANKS = 0, 150, 8
PEAK_DIMENSIONS, PEAK_TILE = 64, 32
Message = tuple[str, int]  # which call of torch.distributed, and the bytes that it was given


class TinyEncoder(nn.Module):
    """(rows, FEATURES) -> unit vectors (rows, DIMENSIONS). The same weights in every process."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, DIMENSIONS)

    def forward(self, inputs: Tensor) -> Tensor:
        """One hidden layer, then the unit vector."""
        return F.normalize(self.second(self.first(inputs).tanh()), dim=1)


def make_encoder() -> TinyEncoder:
    """The encoder that all ranks start from, float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return TinyEncoder().double()


def make_batch(pairs: int) -> tuple[Tensor, Tensor]:
    """Queries and passages (pairs, FEATURES) of the whole batch, float64, the same in every process."""
    generator = torch.Generator().manual_seed(SEED)
    queries, noise = torch.randn(2, positive_int("pairs", pairs), FEATURES, generator=generator, dtype=torch.float64)
    return queries, queries + 0.5 * noise


@contextmanager
def messages_noted() -> Iterator[list[Message]]:
    """What is sent through torch.distributed inside, in order: (name, bytes that were handed over)."""
    noted: list[Message] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "batch_isend_irecv")}

    def noting(name: str) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            carriers = {"all_reduce": arguments[0], "all_gather": arguments[-1]}
            tensor = carriers[name] if name in carriers else arguments[0][0].tensor
            noted.append((name, tensor.numel() * tensor.element_size()))
            return originals[name](*arguments, **settings)

        return call

    for name in originals:
        setattr(dist, name, noting(name))
    try:
        yield noted
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def own_part(batch: Sequence[Tensor], rows: Sequence[int], rank: int) -> list[Tensor]:
    """This rank's rows of every tensor."""
    start = sum(rows[:rank])
    return [tensor[start : start + rows[rank]] for tensor in batch]


def chunk_sizes(rows: Sequence[int], chunks: int) -> list[int]:
    """Each rank's chunk_size, so that all have `chunks` chunks: DDP's hooks would wait for one that is missing."""
    positive_int("chunks", chunks)
    sizes = [-(-positive_int("rows", count) // chunks) for count in rows]
    counts = [-(-count // size) for count, size in zip(rows, sizes, strict=True)]
    if set(counts) != {chunks}:
        raise refuse("chunks", f"must be possible for all of the rows {list(rows)}", f"{chunks}, which makes {counts}")
    return sizes


def run_way(name: str, rows: Sequence[int], rank: int, chunk_size: int) -> dict[str, Any]:
    """One gradient-cache step by this way: its loss, its gradients by name, and what was sent in it and after it."""
    encoder, loss_fn = make_encoder(), RankLoss(name, rows)
    inputs, outcome = own_part(make_batch(sum(rows)), rows, rank), {}

    def step() -> None:
        with messages_noted() as outcome["in_step"]:
            outcome["loss"] = float(grad_cache_step([encoder] * 2, inputs, loss_fn, chunk_size=chunk_size))
        with messages_noted() as outcome["after"]:
            if WAYS[name].averaged:
                average_gradients(encoder, loss_fn)

    outcome["gradients"] = gradients_of(step, encoder, loss_fn)
    return outcome


def hooks_of_ddp(rows: Sequence[int], rank: int, chunk_size: int, *, retain_chunks: int) -> dict[str, Any]:
    """A step in which DistributedDataParallel's hooks average: bytes of each of their messages, and the gradients."""
    encoder, loss_fn, sent = make_encoder(), RankLoss("gather", rows), []
    wrapped = nn.parallel.DistributedDataParallel(encoder)
    options = {"chunk_size": chunk_size, "retain_chunks": retain_chunks}

    def reduce(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        work = dist.all_reduce(bucket.buffer().div_(len(rows)), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def step() -> None:
        unseen = weakref.ref(wrapped)  # a module that the step sees, it keeps from averaging
        hidden = [lambda inputs: unseen()(inputs)] * 2
        grad_cache_step(hidden, own_part(make_batch(sum(rows)), rows, rank), loss_fn, **options)
        average_gradients(loss_fn)

    wrapped.register_comm_hook(None, reduce)
    return {"gradients": gradients_of(step, encoder, loss_fn), "sent": sent}


def peaks_of(pairs: int, ranks: int, rank: int) -> dict[str, int]:
    """Peak bytes of this rank's loss and its backward, `pairs` pairs over all ranks, in three forms.

    By the ledger, beside the representations and the room for their gradients, which are there before.
    """
    own = pairs // ranks
    torch.manual_seed(SEED + rank)
    forms = {
        "gathered, dense": (gathered_contrastive_loss, {}),
        "gathered, tiled": (gathered_contrastive_loss, {"tile_size": PEAK_TILE}),
        "ring": (ring_contrastive_loss, {"tile_size": PEAK_TILE}),
    }
    found = {}
    for name, (form, settings) in forms.items():
        reps = nn.ParameterList(torch.randn(own, PEAK_DIMENSIONS) for _ in range(2))
        for rep in reps:
            rep.grad = torch.zeros_like(rep)
        with record_memory(reps) as ledger:
            form(*reps, temperature=TEMPERATURE, symmetric=True, **settings).backward()
        found[name] = ledger.peak_bytes - sum(2 * rep.numel() * rep.element_size() for rep in reps)
    return found


def first_draws(rank: int) -> dict[str, str]:
    """Which of eight numbers dropout keeps on this rank, after the same seed on all ranks and after one of its own."""
    draws = {}
    for name, seed in (("seed 0 on every rank", SEED), ("seed 0 + rank", SEED + rank)):
        torch.manual_seed(seed)
        survivors = F.dropout(torch.ones(8)) > 0
        draws[name] = "".join("1" if one else "0" for one in survivors)
    return draws


def say_in_turn(here: Rank, text: str) -> None:
    """Print the ranks' lines one after the other, so that they always come in the same order."""
    for turn in range(here.world_size):
        if turn == here.rank:
            print(text, flush=True)
        if here.world_size > 1:
            dist.barrier()


def describe(here: Rank, rows: Sequence[int], results: dict[str, Any]) -> str:
    """This rank's line: what it has, what it gathers, and the loss that it returns."""
    start, own, whole = sum(rows[: here.rank]), rows[here.rank], sum(rows)
    loss = results["ways"]["gather"]["loss"]
    return (
        f"rank {here.rank} of {here.world_size}: encodes pairs {start} to {start + own - 1}, gathers {whole} passages, "
        f"has {own} x {whole} logits, loss of the whole batch {loss:.6f}"
    )


def work(here: Rank, rows: Sequence[int], chunks: int, peak_pairs: int) -> dict[str, Any]:
    """Everything that a rank finds out: plain numbers, strings and tensors."""
    if len(rows) != here.world_size:
        raise refuse("rows", f"must be {here.world_size} numbers, one a rank", list(rows))
    size = chunk_sizes(rows, chunks)[here.rank]
    return {
        "ways": {name: run_way(name, rows, here.rank, size) for name in WAYS},
        "hooks": {
            "replayed": hooks_of_ddp(rows, here.rank, size, retain_chunks=0),
            "retained": hooks_of_ddp(rows, here.rank, size, retain_chunks=2 * chunks),
        },
        "peaks": peaks_of(peak_pairs, here.world_size, here.rank),
        "draws": first_draws(here.rank),
    }


def launch(rows: Sequence[int], *, chunks: int = 3, peak_pairs: int = 384) -> list[dict[str, Any]]:
    """Start one process for each of `rows`, print what they print, and return what each rank found, in their order.

    rows: at most MOST_RANKS numbers, for each rank is a process that imports PyTorch. chunks: of each rank's rows; the
    ranks must come to the same number of chunks for DDP's hooks to meet. peak_pairs: the batch whose loss is measured,
    a multiple of the number of ranks. Raises ValueError for what no ranks could run, before any is started, and
    RuntimeError with the ranks' own words where one fails, or all of them are late.
    """
    if not 1 <= len(rows) <= MOST_RANKS:
        raise refuse("rows", f"must be 1 to {MOST_RANKS} numbers, one a rank", list(rows))
    chunk_sizes(rows, chunks)
    results, said = run_ranks(
        "gclib.course.ranks.demo", len(rows), [*_typed(rows, chunks), "--peak-pairs", str(peak_pairs)]
    )
    print(said, end="")
    return results


def run_ranks(module: str, ranks: int, arguments: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """What each of `ranks` processes that run `module` leaves in its folder, in their order, and what they print.

    RuntimeError with the ranks' own words where one fails, or all of them are late.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PET_LOCAL_ADDR": "localhost"}
    with TemporaryDirectory() as folder:
        line = [sys.executable, *_torchrun(ranks), module, *arguments, "--folder", folder]
        with subprocess.Popen(
            line, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as started:
            try:
                said, complained = started.communicate(timeout=LAUNCH_SECONDS)
            except subprocess.TimeoutExpired as error:
                started.terminate()
                late = f"the ranks gave no answer in {LAUNCH_SECONDS} seconds, and were stopped: is the computer busy?"
                raise RuntimeError(f"{late} Try again.") from error
            except BaseException:
                started.terminate()  # torchrun passes it on to its ranks
                raise
        if started.returncode:
            raise RuntimeError(f"the ranks failed: {_own_words(complained)}")
        return [torch.load(Path(folder, f"rank{rank}.pt"), weights_only=True) for rank in range(ranks)], said


def _own_words(complained: str) -> str:
    """The lines in which ranks name their errors, each once; where there are none, the end of all that was said."""
    named = re.findall(r"^(?:\[rank\d+\]: )?(\w+(?:\.\w+)*Error: .+)$", complained, re.MULTILINE)
    return "\n".join(dict.fromkeys(named)) or complained[-2000:]


def command(rows: Sequence[int], chunks: int = 3) -> list[str]:
    """The command line that starts one rank for each of `rows`, as one would type it; `chunks` of each rank's rows."""
    return ["python", *_torchrun(len(rows)), "gclib.course.ranks.demo", *_typed(rows, chunks)]


def _torchrun(ranks: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]


def _typed(rows: Sequence[int], chunks: int) -> list[str]:
    return ["--rows", *map(str, rows), "--chunks", str(chunks)]


def main(arguments: Sequence[str] | None = None) -> None:
    """What each process runs."""
    parser = argparse.ArgumentParser(prog="python -m gclib.course.ranks.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", required=True, help="pairs of each rank")
    parser.add_argument("--chunks", type=int, default=3, help="chunks of a rank's rows")
    parser.add_argument("--peak-pairs", type=int, default=384, help="batch whose loss is measured")
    parser.add_argument("--folder", help="where to leave what was found")
    typed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with process_group(backend="gloo", timeout_seconds=60) as here:
        results = work(here, typed.rows, typed.chunks, typed.peak_pairs)
        say_in_turn(here, describe(here, typed.rows, results))
        if typed.folder:
            torch.save(results, Path(typed.folder, f"rank{here.rank}.pt"))


if __name__ == "__main__":
    main()
