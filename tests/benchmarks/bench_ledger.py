"""What recording a step costs in time: recorded / plain, medians of interleaved runs. Run: make bench."""

import statistics
import time
from contextlib import nullcontext

import paths  # noqa: F401
import torch

from gclib import ContrastiveLoss, Encoder, grad_cache_step, record_memory


def seconds(record: bool, encoder: Encoder, inputs: list[dict]) -> float:
    """One cached step of 64 pairs in chunks of 16, recorded or not."""
    encoder.zero_grad()
    started = time.perf_counter()
    with record_memory(encoder) if record else nullcontext() as ledger:
        on_phase = ledger.on_phase if record else None
        grad_cache_step([encoder] * 2, inputs, ContrastiveLoss(), chunk_size=16, on_phase=on_phase)
    return time.perf_counter() - started


def main() -> None:
    """Print a line for each size of encoder."""
    torch.manual_seed(0)
    ids = torch.randint(5, 8000, (64, 64))
    inputs = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 2
    for size in ("tiny", "mini", "small"):
        encoder = Encoder.from_config(size)
        times = [(seconds(False, encoder, inputs), seconds(True, encoder, inputs)) for _ in range(6)][1:]
        plain, recorded = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"ledger, {size:5}: recorded / plain step = {recorded / plain:.2f}  ({1e3 * plain:.0f} ms plain)")


if __name__ == "__main__":
    main()
