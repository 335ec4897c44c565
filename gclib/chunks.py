"""Plan which rows are encoded together, how wide, and how to put them back.

A plan is plain Python: ints that are settled before a step begins. Every row of a tower stands in exactly one
chunk. Sorting by length before cutting makes rows of a chunk equally long, so that little padding is encoded; as every
row keeps its index, representations go back to their own rows and nothing else ever sees the new order.

Sorted rows are not cut evenly: where lengths fall steeply, a chunk that ends early encodes less padding. Each chunk
more is one more call of the encoder, twice, so there is a price to weigh it against (`CALL_TOKENS`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from gclib.support.validation import int_at_least, positive_int, refuse

# What calling an encoder costs beside its tokens, as padded tokens that could be encoded in that time. Measured with
# `python tests/benchmarks/bench_calls.py`: on two CPU cores 67 (BERT 4 x 256) to 232 (the "tiny" one); with `--device
# cuda --sizes small bert-base` on an H100 2,023 (BERT-base, float32), 14,851 (BERT-base, bf16) and 57,951 (4 x 256,
# bf16): a card encodes faster, but starts its kernels no faster.
CALL_TOKENS = {"cpu": 128}
CALL_TOKENS_ELSEWHERE = 16_384


@dataclass(frozen=True)
class Chunk:
    """Rows that are encoded together, and how many token columns of them are kept."""

    rows: tuple[int, ...]
    width: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Padded tokens that encoding this chunk costs: rows x width."""
        return len(self.rows) * self.width

    def index(self, device: torch.device) -> slice | Tensor:
        """A slice where the rows stand side by side (a view, no copy), a LongTensor elsewhere."""
        first = self.rows[0]
        if self.rows == tuple(range(first, first + len(self.rows))):
            return slice(first, first + len(self.rows))
        return torch.tensor(self.rows, device=device)


def plan_chunks(
    lengths: Sequence[int],
    *,
    chunk_size: int | None = None,
    chunk_tokens: int | None = None,
    sort: bool = True,
    call_tokens: int | None = CALL_TOKENS["cpu"],
) -> list[Chunk]:
    """Cut rows of these lengths (in tokens) into chunks. Exactly one of chunk_size and chunk_tokens is given.

    chunk_size: at most this many rows a chunk. chunk_tokens: at most this many padded tokens a chunk (rows x the
    longest of them); a single longer row is a chunk of its own. sort: longest rows first, ties in the batch's order.

    call_tokens: the price of one chunk more, in padded tokens (`price_of_a_call`). Sorted rows are cut by chunk_size so
    that the sum of rows x width + call_tokens over all chunks is least; among equals the fullest come first. None cuts
    evenly, as unsorted rows always are: every chunk is full, the last may be short (and a compiled encoder meets fewer
    shapes).

    Examples: lengths [3, 9, 4, 8], chunk_size=2 -> rows (1, 3) at width 9, then rows (2, 0) at width 4. Lengths
    [200, 5, 5, 5], chunk_size=4 -> row (0,) at width 200, then rows (1, 2, 3) at width 5: 215 tokens, not 800.
    """
    lengths = _checked_lengths(lengths)
    if (chunk_size is None) == (chunk_tokens is None):
        rule = "and chunk_tokens: exactly one of them must be given"
        raise refuse("chunk_size", rule, f"chunk_size={chunk_size} and chunk_tokens={chunk_tokens}")
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row]) if sort else range(len(lengths))
    if call_tokens is not None:
        int_at_least("call_tokens", call_tokens, 0)
    if chunk_size is not None:
        size = positive_int("chunk_size", chunk_size)
        widths = tuple(lengths[row] for row in order)
        even = not sort or call_tokens is None or widths[0] == widths[-1]
        if even:
            sizes = [size] * -(-len(widths) // size)
        else:  # larger prices and sizes make no other cut: bounded, for the integers and the cache
            rows = len(widths)
            sizes = cheapest_cut(widths, min(size, rows), min(call_tokens, rows * widths[0]))
        groups = [order[end - taken : end] for end, taken in zip(accumulate(sizes), sizes, strict=True)]
    else:
        groups = _packed(order, lengths, positive_int("chunk_tokens", chunk_tokens))
    return [Chunk(tuple(rows), max(lengths[row] for row in rows)) for rows in groups]


def price_of_a_call(device: torch.device | str) -> int:
    """What one more call of an encoder costs on a device, in padded tokens: `call_tokens` for `plan_chunks`."""
    return CALL_TOKENS.get(torch.device(device).type, CALL_TOKENS_ELSEWHERE)


def check_plan(plan: Sequence[Chunk], rows: int, width: int) -> list[Chunk]:
    """`plan`, if each of `rows` rows stands in exactly one chunk no wider than `width`; ValueError otherwise."""
    if not all(isinstance(chunk, Chunk) for chunk in plan):
        raise refuse("plan", "must be a list of Chunk for each tower", plan)
    planned = sorted(row for chunk in plan for row in chunk.rows)
    if planned != list(range(rows)) or any(len(chunk) == 0 for chunk in plan):
        raise refuse("plan", f"must hold each of the {rows} rows exactly once", f"{len(planned)} rows")
    for chunk in plan:
        if not 1 <= int_at_least("plan", chunk.width, 1) <= width:
            raise refuse("plan", f"must keep 1 to {width} columns", f"a chunk of width {chunk.width}")
    return list(plan)


def halved_to(plan: Sequence[Chunk], count: int) -> list[Chunk]:
    """The plan in `count` chunks, at least as many as it has and at most as many as rows: the one that holds the most
    tokens is halved until there are so many; ties go to the earliest."""
    chunks = list(plan)
    while len(chunks) < count:
        place = max((n for n, chunk in enumerate(chunks) if len(chunk) > 1), key=lambda n: chunks[n].tokens)
        rows, width, half = chunks[place].rows, chunks[place].width, -(-len(chunks[place]) // 2)
        chunks[place : place + 1] = [Chunk(rows[:half], width), Chunk(rows[half:], width)]
    return chunks


def choose_largest(plans: Sequence[Sequence[Chunk]], count: int) -> set[tuple[int, int]]:
    """The `count` chunks, as (tower, chunk), that hold the most padded tokens; ties go to the earliest.

    Retaining these saves the most encoding: a retained chunk's tokens are encoded once and not twice.
    """
    places = [(tower, chunk) for tower, plan in enumerate(plans) for chunk in range(len(plan))]
    places.sort(key=lambda place: -plans[place[0]][place[1]].tokens)
    return set(places[:count])


def schedule(plans: Sequence[Sequence[Chunk]], retain: int) -> list[tuple[int, int, bool]]:
    """(tower, chunk, retained) in the order of the first forward: those that are encoded twice, then the retained.

    The retained come last so that no other chunk is encoded beside their graphs.
    """
    retained = choose_largest(plans, retain)
    places = [(tower, chunk) for tower, plan in enumerate(plans) for chunk in range(len(plan))]
    return sorted(((*place, place in retained) for place in places), key=lambda place: place[2])


def _checked_lengths(lengths: Sequence[int]) -> list[int]:
    if isinstance(lengths, (Tensor, str)) or not isinstance(lengths, Sequence):
        raise refuse("lengths", "must be a sequence of plain ints", type(lengths).__name__)
    if len(lengths) == 0:
        raise refuse("lengths", "must name at least one row", lengths)
    return [positive_int("lengths", length) for length in lengths]


def _packed(order: Sequence[int], lengths: list[int], budget: int) -> list[list[int]]:
    """Fill one chunk after another, opening a new one where the next row would exceed the budget."""
    groups: list[list[int]] = []
    widest = 0
    for row in order:
        widest_with = max(widest, lengths[row]) if groups else lengths[row]
        if groups and (len(groups[-1]) + 1) * widest_with <= budget:
            groups[-1].append(row)
            widest = widest_with
        else:
            groups.append([row])
            widest = lengths[row]
    return groups


@lru_cache(maxsize=64)
def cheapest_cut(widths: tuple[int, ...], size: int, call_tokens: int) -> tuple[int, ...]:
    """Rows of each chunk such that the sum of rows x width + call_tokens is least, for widths that fall.

    A dynamic program from the last row back: least[i] is the least price of the rows from i on, taken[i] the rows of
    their first chunk.
    """
    counts = np.arange(1, size + 1)
    least = np.zeros(len(widths) + 1, dtype=np.int64)
    taken = np.zeros(len(widths), dtype=np.int64)
    for start in range(len(widths) - 1, -1, -1):
        rows = counts[: len(widths) - start]
        costs = widths[start] * rows + least[start + 1 : start + 1 + len(rows)]
        taken[start] = len(rows) - costs[::-1].argmin()
        least[start] = costs[taken[start] - 1] + call_tokens
    sizes, start = [], 0
    while start < len(widths):
        sizes.append(int(taken[start]))
        start += sizes[-1]
    return tuple(sizes)
