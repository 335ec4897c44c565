"""What one more call of an encoder costs beside its tokens: the figures behind `gclib.chunks.CALL_TOKENS`.

    python tests/benchmarks/bench_calls.py [--device cuda] [--sizes tiny mini small]

A chunk of the gradient cache is a forward without a graph, a forward with one and a backward. Its time is measured for
one row of 8 tokens (nearly all of it the call itself) and for chunks of 16 rows of 8, 32 and 128 tokens, on a card also
for 512 rows, which keep it busy. The price of a call is the smallest chunk's time less its tokens', in tokens at the
price of the largest chunk.
"""

import argparse
import statistics
from functools import partial

import paths  # noqa: F401
import torch
from bench_steps import seconds_of

from gclib import Encoder
from gclib.chunks import price_of_a_call
from gclib.models.encoder import SIZES

SHAPES = ((1, 8), (16, 8), (16, 32), (16, 128))
ROUNDS = 7


def chunk(encoder: Encoder, tokens: torch.Tensor) -> None:
    """What the gradient cache does with a chunk."""
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        encoder(tokens, mask)
    encoder(tokens, mask).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["tiny", "mini", "small"])
    options = parser.parse_args()
    on_card = options.device == "cuda"
    shapes = SHAPES + ((512, 128),) * on_card
    print(f"milliseconds of a chunk; plans count a call as {price_of_a_call(options.device):,} tokens")
    heads = "".join(f"{f'{rows} x {width}':>11}" for rows, width in shapes)
    print(f"{'encoder':12}{'autocast':>9}{heads}  a call, tokens")
    for size in options.sizes:
        for autocast in (False, True)[: 1 + on_card]:
            encoder = Encoder.from_config(size, dropout=0.1).to(options.device).train()
            batches = [torch.randint(1, 1_000, shape, device=options.device) for shape in shapes]
            taken = []
            with torch.autocast(options.device, torch.bfloat16, enabled=autocast):
                for _ in range(1 + ROUNDS):
                    taken.append([seconds_of(partial(chunk, encoder, batch), options.device) for batch in batches])
            medians = [statistics.median(times) for times in zip(*taken[1:], strict=True)]
            per_token = medians[-1] / batches[-1].numel()
            told = "".join(f"{seconds * 1e3:11.2f}" for seconds in medians)
            price = medians[0] / per_token - batches[0].numel()
            print(f"{size:12}{'bf16' if autocast else '-':>9}{told}{price:14,.0f}", flush=True)


if __name__ == "__main__":
    main()
