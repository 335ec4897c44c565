"""Plan which rows are encoded together, how wide, and how to put them back.

A plan is plain Python: ints that are settled before a step begins. Every row of a tower stands in exactly one
chunk. Sorting by length before cutting makes rows of a chunk equally long, so that little padding is encoded; as every
row keeps its index, representations go back to their own rows and nothing else ever sees the new order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gclib.validation import int_at_least, positive_int, refuse


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
) -> list[Chunk]:
    """Cut rows of these lengths (in tokens) into chunks. Exactly one of chunk_size and chunk_tokens is given.

    chunk_size: at most this many rows a chunk; the last may be short. chunk_tokens: at most this many padded
    tokens a chunk (rows x the longest of them); a single longer row is a chunk of its own. sort: longest rows
    first, ties in file order, so that the largest chunk, which decides whether a step fits, comes first.

    Example: lengths [3, 9, 4, 8], chunk_size=2 -> rows (1, 3) at width 9, then rows (2, 0) at width 4.
    """
    lengths = _checked_lengths(lengths)
    if (chunk_size is None) == (chunk_tokens is None):
        rule = "and chunk_tokens: exactly one of them must be given"
        raise refuse("chunk_size", rule, f"chunk_size={chunk_size} and chunk_tokens={chunk_tokens}")
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row]) if sort else range(len(lengths))
    if chunk_size is not None:
        size = positive_int("chunk_size", chunk_size)
        groups = [order[start : start + size] for start in range(0, len(lengths), size)]
    else:
        groups = _packed(order, lengths, positive_int("chunk_tokens", chunk_tokens))
    return [Chunk(tuple(rows), max(lengths[row] for row in rows)) for rows in groups]


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


def choose_largest(plans: Sequence[Sequence[Chunk]], count: int) -> set[tuple[int, int]]:
    """The `count` chunks, as (tower, chunk), that hold the most padded tokens; ties go to the earliest.

    Retaining these saves the most encoding: a retained chunk's tokens are encoded once and not twice.
    """
    places = [(tower, chunk) for tower, plan in enumerate(plans) for chunk in range(len(plan))]
    places.sort(key=lambda place: -plans[place[0]][place[1]].tokens)
    return set(places[:count])


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
