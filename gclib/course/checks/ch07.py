"""Chapter 07's exercises: the price of a step, tokens after sorting, rows put back, graphs that a budget holds.

Letters: B rows, T tokens of a row, F features of a token, D dimensions of a representation, C rows of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .engine import Exercise, Misconception
from .judging import Inputs, Slip

# --- the price ------------------------------------------------------------------------------------------------


def _tokens(rng: np.random.Generator, *, encoded: float, retained: float) -> Inputs:
    """About these shares: of the padded tokens encoded, of the encoded ones retained."""
    padded = int(rng.integers(10_000, 90_000))
    kept = round(padded * encoded * (rng.uniform(0.9, 1.1) if encoded < 1 else 1))
    return {"padded": padded, "encoded": kept, "retained": round(kept * retained * rng.uniform(0.8, 1.0))}


def _forwards(padded: int, encoded: int, retained: int) -> float:
    """Counted in forwards of a token: a backward is two of them."""
    once, twice = retained, encoded - retained
    return (3 * once + 4 * twice) / (3 * padded)


price = Exercise(
    chapter=7,
    name="price",
    spec="time of the cached step / that of the naive step, if time goes with tokens and a backward is two forwards.",
    line_budget=2,
    oracle=_forwards,
    makers=(
        partial(_tokens, encoded=0.4, retained=0.3),
        partial(_tokens, encoded=0.7, retained=0.0),
        partial(_tokens, encoded=1, retained=0.5),
    ),
    rtol=1e-6,
    atol=1e-9,
    misconceptions=(
        Misconception(
            "always 4/3",
            "That is 4/3 whatever the tokens. It is the price where nothing is trimmed and nothing retained: here "
            "`encoded` is less than `padded`, or `retained` more than 0.",
            lambda padded, encoded, retained: 4 / 3,
        ),
        Misconception(
            "retained tokens taken for their share",
            "It looks as if `retained` were the share r. It is a number of tokens: r is retained / encoded.",
            lambda padded, encoded, retained: encoded / padded * (1 + (1 - retained) / 3),
        ),
        Misconception(
            "encoded tokens taken for their share",
            "It looks as if `encoded` were the share rho. It is a number of tokens: rho is encoded / padded.",
            lambda padded, encoded, retained: encoded * (1 + (1 - retained / encoded) / 3),
        ),
        Misconception(
            "tokens and no shares",
            "It looks as if `encoded` and `retained` were shares. They are numbers of tokens: rho is encoded / padded, "
            "and r is retained / encoded.",
            lambda padded, encoded, retained: encoded * (1 + (1 - retained) / 3),
        ),
        Misconception(
            "retained share added",
            "The sign: what is retained saves a forward, 1 - r. Here it was added, 1 + r.",
            lambda padded, encoded, retained: (4 * encoded + retained) / (3 * padded),
        ),
        Misconception(
            "backward counted as one forward",
            "It looks as if a backward cost as much as a forward. It needs two products for each one of the forward: "
            "one for the input's gradient, one for the weight's.",
            lambda padded, encoded, retained: (2 * encoded + encoded - retained) / (2 * padded),
        ),
        Misconception(
            "everything twice",
            "It looks as if the backward ran twice too, or as if it cost nothing: forwards alone give the same ratio. "
            "Only the forward runs twice: the first one builds no graph, so there is nothing to backpropagate through.",
            lambda padded, encoded, retained: (3 * encoded + 3 * (encoded - retained)) / (3 * padded),
        ),
        Misconception(
            "trimmed in the extra forward only",
            "It looks as if only one of the two forwards were trimmed. Both encode the same chunks, and so does the "
            "backward: everything that the cached step does is done on the encoded tokens.",
            lambda padded, encoded, retained: (3 * padded + encoded - retained) / (3 * padded),
        ),
        Misconception(
            "retained share the wrong way round",
            "It looks as if the retained tokens were those that are encoded twice. They kept their graph: they are "
            "encoded once.",
            lambda padded, encoded, retained: (3 * encoded + retained) / (3 * padded),
        ),
        Misconception(
            "retained chunks forgotten",
            "It looks as if every token were encoded twice. The retained ones kept their graph.",
            lambda padded, encoded, retained: 4 * encoded / (3 * padded),
        ),
        Misconception(
            "padding forgotten",
            "It looks as if the naive step encoded as many tokens as the cached one. It encodes the padding too.",
            lambda padded, encoded, retained: (4 * encoded - retained) / (3 * encoded),
        ),
        Misconception(
            "share of the padded tokens",
            "The retained tokens were divided by the padded ones. r is their share of what is *encoded*.",
            lambda padded, encoded, retained: encoded / padded * (4 - retained / padded) / 3,
        ),
        Misconception(
            "the surcharge instead of the ratio",
            "That is by how much it differs from the naive step; the ratio is 1 more.",
            lambda padded, encoded, retained: (4 * encoded - retained) / (3 * padded) - 1,
        ),
        Misconception(
            "second forward forgotten",
            "It looks as if every token were encoded once. What is not retained is encoded a second time.",
            lambda padded, encoded, retained: encoded / padded,
        ),
        Misconception(
            "retained tokens for nothing",
            "It looks as if retained tokens cost nothing. They save their second forward alone: the first one and the "
            "backward are left.",
            lambda padded, encoded, retained: 4 * (encoded - retained) / (3 * padded),
        ),
        Misconception(
            "the naive step without its backward",
            "Three times too many: the naive step pays for its backward too, 3 for each padded token and not 1.",
            lambda padded, encoded, retained: (4 * encoded - retained) / padded,
        ),
        Misconception(
            "upside down",
            "That is the naive step over the cached one: turn it over.",
            lambda padded, encoded, retained: 3 * padded / (4 * encoded - retained),
        ),
        Misconception(
            "backward of retained chunks forgotten",
            "It looks as if a retained chunk cost its forward alone. Its graph is kept, and its backward still has "
            "to run: only the second forward is saved.",
            lambda padded, encoded, retained: (4 * encoded - 3 * retained) / (3 * padded),
        ),
        Misconception(
            "the surcharge alone",
            "That is what is added for encoding twice. Asked for is the whole step over the naive one: the first "
            "forward and the backward are in it too.",
            lambda padded, encoded, retained: (encoded - retained) / (3 * padded),
        ),
        Misconception(
            "divided without a remainder",
            "// drops what is behind the point. The price is a ratio: divide with /.",
            lambda padded, encoded, retained: (4 * encoded - retained) // (3 * padded),
        ),
        Misconception(
            "one forward padded",
            "It looks as if one of the two forwards ran over the padded batch. Both go over the same trimmed chunks.",
            lambda padded, encoded, retained: (3 * encoded + padded - retained) / (3 * padded),
        ),
    ),
    hints=(
        "Count in forwards of one token. What does the naive step cost for each padded token, forward and backward?",
        "Naive: 3 for each padded token. Cached: 3 for each encoded token, and 1 more where it is not retained.",
        "return encoded / padded * (1 + (1 - retained / encoded) / 3)",
    ),
)

# --- tokens after sorting -------------------------------------------------------------------------------------


def _lengths(rng: np.random.Generator, chunks: int, short: int) -> Inputs:
    """Log-normal lengths in file order: `chunks` chunks, and a last one that lacks `short` rows."""
    size = int(rng.integers(5, 9))
    lengths = np.clip(rng.lognormal(3.0, 0.7, chunks * size - short), 2, 128).astype(int)
    return {"lengths": lengths.tolist(), "chunk_size": size}


def _in_chunks(lengths: list[int], chunk_size: int) -> list[list[int]]:
    return [lengths[start : start + chunk_size] for start in range(0, len(lengths), chunk_size)]


def _each_at_its_longest(chunks: list[list[int]]) -> int:
    return sum(len(chunk) * max(chunk) for chunk in chunks)


def _reference_tokens(lengths: list[int], chunk_size: int) -> int:
    """Row by row: the width of the row that opens its chunk."""
    falling = sorted(lengths)[::-1]
    return sum(falling[place - place % chunk_size] for place in range(len(falling)))


padded_tokens = Exercise(
    chapter=7,
    name="padded_tokens",
    whole=True,
    spec="tokens that one forward of all chunks encodes, padding included: rows sorted longest first, each chunk "
    "trimmed to its longest row (an int).",
    line_budget=3,
    oracle=_reference_tokens,
    makers=(partial(_lengths, chunks=4, short=2), partial(_lengths, chunks=3, short=0)),
    misconceptions=(
        Misconception(
            "not sorted",
            "It looks as if the rows were cut into chunks in file order: a single long row then widens its whole "
            "chunk. Sort first.",
            lambda lengths, size: _each_at_its_longest(_in_chunks(lengths, size)),
        ),
        Misconception(
            "padded to the longest of all",
            "It looks as if every chunk were as wide as the longest row of the batch. Each is trimmed to its own "
            "longest.",
            lambda lengths, size: len(lengths) * max(lengths),
        ),
        Misconception(
            "shortest first",
            "It looks as if the shortest came first. Then the short last chunk holds the longest rows, and the "
            "sum is another one: longest first.",
            lambda lengths, size: _each_at_its_longest(_in_chunks(sorted(lengths), size)),
        ),
        Misconception(
            "short last chunk counted as full",
            "It looks as if the last chunk had chunk_size rows too. It may be short: count its own rows.",
            lambda lengths, size: sum(size * max(chunk) for chunk in _in_chunks(sorted(lengths)[::-1], size)),
        ),
        Misconception(
            "last chunk lost",
            "It looks as if the short last chunk were left out. Its rows are encoded too.",
            lambda lengths, size: size * sum(sorted(lengths)[::-1][: len(lengths) // size * size : size]),
        ),
        Misconception(
            "no padding at all",
            "That is the sum of the lengths. Rows that are encoded together are as wide as the longest of them.",
            lambda lengths, size: sum(lengths),
        ),
        Misconception(
            "trimmed to the shortest row",
            "It looks as if every chunk were as wide as its shortest row. The others would lose tokens: the longest "
            "decides.",
            lambda lengths, size: sum(len(chunk) * min(chunk) for chunk in _in_chunks(sorted(lengths)[::-1], size)),
        ),
        Misconception(
            "shortest first, trimmed to the shortest row",
            "It looks as if the rows were sorted upwards and the first of a chunk, its shortest, set the width. Sort "
            "downwards: then the first is the longest.",
            lambda lengths, size: sum(len(chunk) * chunk[0] for chunk in _in_chunks(sorted(lengths), size)),
        ),
        Misconception(
            "first row taken for the longest",
            "It looks as if each chunk were as wide as its first row, in file order. Only after sorting is the first "
            "row the longest.",
            lambda lengths, size: sum(len(chunk) * chunk[0] for chunk in _in_chunks(lengths, size)),
        ),
        Misconception(
            "chunk_size chunks",
            "It looks as if the rows were cut into chunk_size pieces. chunk_size says how many rows stand in each.",
            lambda lengths, size: _each_at_its_longest(
                [part.tolist() for part in np.array_split(sorted(lengths)[::-1], size)]
            ),
        ),
        Misconception(
            "both forwards",
            "Twice too many: one forward of all chunks is asked for.",
            lambda lengths, size: 2 * _each_at_its_longest(_in_chunks(sorted(lengths)[::-1], size)),
        ),
        Misconception(
            "widths without their rows",
            "It looks as if only the chunks' widths were added up. A chunk costs rows times width.",
            lambda lengths, size: sum(max(chunk) for chunk in _in_chunks(sorted(lengths)[::-1], size)),
        ),
        Misconception(
            "the padding alone",
            "That is the padding alone. Asked for are all tokens that are encoded, the texts' own included.",
            lambda lengths, size: _each_at_its_longest(_in_chunks(sorted(lengths)[::-1], size)) - sum(lengths),
        ),
        Misconception(
            "chunk_size chunks, evenly",
            "It looks as if the rows were cut into chunk_size pieces. chunk_size says how many rows stand in each.",
            lambda lengths, size: _each_at_its_longest(_in_chunks(sorted(lengths)[::-1], -(-len(lengths) // size))),
        ),
        Misconception(
            "rows dealt out",
            "It looks as if the sorted rows were dealt out to the chunks one by one. Then each chunk gets one of the "
            "longest: neighbours belong together.",
            lambda lengths, size: _each_at_its_longest(
                [sorted(lengths)[::-1][start :: -(-len(lengths) // size)] for start in range(-(-len(lengths) // size))]
            ),
        ),
    ),
    hints=(
        "Put the longest rows together: which rows stand in the first chunk, and how wide is it?",
        "Sort, longest first; cut into slices of chunk_size; a slice costs its number of rows times its first length.",
        "rows = sorted(lengths, reverse=True); return sum(len(rows[i : i + chunk_size]) * rows[i] for i in range(0, "
        "len(rows), chunk_size))",
    ),
)

# --- sorted, encoded, put back --------------------------------------------------------------------------------


class CountingEncoder(nn.Module):
    """Rows (rows, T, F), padded with zeros -> (rows, D), float64; padding does not change a row's representation.

    tokens: rows x T of all calls, added up. most_rows: the most rows of one call.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.tokens = self.most_rows = 0

    def forward(self, rows: Tensor) -> Tensor:
        """(rows, T, F) -> (rows, D)."""
        self.tokens += rows.shape[0] * rows.shape[1]
        self.most_rows = max(self.most_rows, rows.shape[0])
        return torch.tanh(rows @ self.weight).sum(dim=1)


def _unlike_lengths(rng: np.random.Generator, chunks: int, short: int) -> Inputs:
    """As `_lengths`, but no two rows are equally long: only one order is sorted."""
    size = int(rng.integers(5, 9))
    lengths = np.arange(2, 129)
    odds = np.exp(-(((np.log(lengths) - 3.0) / 0.7) ** 2) / 2) / lengths
    drawn = rng.choice(lengths, chunks * size - short, replace=False, p=odds / odds.sum())
    return {"lengths": drawn.tolist(), "chunk_size": size}


def _texts(
    rng: np.random.Generator, chunks: int, short: int, *, lengths_of: Callable[..., Inputs] = _unlike_lengths
) -> Inputs:
    lengths, size = lengths_of(rng, chunks, short).values()
    features, width = (int(rng.integers(2, 5)) for _ in range(2))
    rows = torch.from_numpy(rng.standard_normal((len(lengths), max(lengths), features)))
    rows *= (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).unsqueeze(2)
    encoder = CountingEncoder(torch.from_numpy(rng.standard_normal((features, width))))
    return {"encoder": encoder, "rows": rows, "lengths": lengths, "chunk_size": size}


def _reference_encode(encoder: CountingEncoder, rows: Tensor, lengths: list[int], chunk_size: int) -> Tensor:
    """Every row on its own; then what sorted chunks cost is noted on the encoder."""
    reps = torch.cat([encoder(row[None, :length]) for row, length in zip(rows, lengths, strict=True)])
    encoder.tokens, encoder.most_rows = _reference_tokens(lengths, chunk_size), min(chunk_size, len(lengths))
    return reps


def _falling(lengths: list[int]) -> Tensor:
    return torch.tensor(lengths).argsort(descending=True, stable=True)


@dataclass(frozen=True)
class _Encode:
    """Encoded in chunks, right but for the fields that are changed.

    back: into "rows", "not" at all, or by the "order" itself. last: whether a short last chunk is encoded.
    """

    order: Callable[[list[int]], Tensor] = _falling
    width: Callable[[list[int], list[int]], int] = lambda chunk, lengths: max(chunk)
    back: str = "rows"
    last: bool = True
    at_once: bool = False

    def __call__(self, encoder: Callable, rows: Tensor, lengths: list[int], chunk_size: int) -> Tensor:
        order, parts = self.order(lengths), []
        for part in order.split(len(lengths) if self.at_once else chunk_size):
            width = self.width([lengths[row] for row in part], lengths)
            if not self.last and len(part) < chunk_size:
                parts.append(rows.new_zeros(len(part), encoder.weight.shape[1]))
            else:
                parts.append(encoder(rows[part, :width]))
        reps = torch.cat(parts)
        return {"rows": reps[order.argsort()], "not": reps, "order": reps[order]}[self.back]


def _one_row_at_a_time(encoder: Callable, rows: Tensor, lengths: list[int], chunk_size: int) -> Tensor:
    return torch.cat([encoder(row[None, :length]) for row, length in zip(rows, lengths, strict=True)])


def _by_widths(
    encoder: Callable, rows: Tensor, lengths: list[int], chunk_size: int, *, order: Tensor, widths: list[int]
) -> Tensor:
    """Rows in this order; each chunk is as wide as `widths` says at the place of its first row."""
    starts = range(0, len(rows), chunk_size)
    parts = [encoder(rows[order[start : start + chunk_size], : widths[start]]) for start in starts]
    return torch.cat(parts)[order.argsort()]


def _encode_outcome(result: Any, encoder: CountingEncoder, *_: Any) -> dict[str, Any]:
    if result is None:
        return {"representations": None}
    found = {"representations": result, "most rows encoded at once": encoder.most_rows}
    if isinstance(result, Tensor):
        found["a graph from them to the encoder"] = result.requires_grad
    return found | {"tokens encoded": encoder.tokens}


def _right_in_another_order(expected: dict[str, Any], got: dict[str, Any], *_: Any) -> str:
    """A sentence for representations that are all there, each in another one's place; else nothing."""
    reps, found = expected["representations"], got["representations"]
    if not isinstance(found, Tensor) or found.shape != reps.shape or found.dtype != reps.dtype:
        return ""
    if torch.allclose(found, reps, rtol=1e-9, atol=1e-9):
        return ""
    same = torch.isclose(found[:, None], reps[None], rtol=1e-9, atol=1e-9).all(dim=2)
    return "All the right rows are there, in another order." if same.any(dim=0).all() else ""


encode_sorted = Exercise(
    chapter=7,
    name="encode_sorted",
    spec="representations (B, D) with their graph, row i that of rows[i], encoded longest first, chunk_size rows at a "
    "time, each chunk trimmed to its longest row.",
    line_budget=6,
    repeats=3,
    oracle=_reference_encode,
    makers=(
        partial(_texts, chunks=4, short=2),
        partial(_texts, chunks=3, short=0),
        partial(_texts, chunks=3, short=1, lengths_of=_lengths),
    ),
    outcome=_encode_outcome,
    note=_right_in_another_order,
    slips=(
        Slip(
            "ragged chunks stacked",
            "The last chunk may be short, and torch.stack wants equal shapes: torch.cat lays rows below rows.",
            "stack expects each tensor to be equal size",
        ),
        Slip(
            "float32 buffer",
            "The rows are float64 and the tensor that you write into is float32, torch's default: give it "
            "dtype=rows.dtype.",
            "source and destination dtypes match",
        ),
    ),
    rtol=1e-9,
    atol=1e-9,
    misconceptions=(
        Misconception(
            "not put back",
            "The representations are in the order of the lengths. The loss would hold query i against another row's "
            "passage, and nothing would crash: put each back into its own row.",
            _Encode(back="not"),
        ),
        Misconception(
            "put back with the order itself",
            "The rows were put back with reps[order]. That moves them by the same permutation once more; what takes "
            "them back is the inverse: order.argsort(), or writing result[order] = reps.",
            _Encode(back="order"),
        ),
        Misconception(
            "last chunk lost",
            "The short last chunk was never encoded: its rows are zeros. Go on until no row is left.",
            _Encode(last=False),
        ),
        Misconception(
            "not trimmed",
            "The representations are right, but every chunk was encoded at the full width: sorting alone saves "
            "nothing. Cut the chunk's columns to its longest row.",
            _Encode(width=lambda chunk, lengths: max(lengths)),
        ),
        Misconception(
            "trimmed to the shortest row",
            "The chunk was cut to its shortest row, so the others lost tokens: that changes their representations. "
            "The longest decides.",
            _Encode(width=lambda chunk, lengths: min(chunk)),
        ),
        Misconception(
            "not sorted",
            "The representations are right, but the chunks were made in file order: a long row in each of them keeps "
            "them wide. Sort first.",
            _Encode(order=lambda lengths: torch.arange(len(lengths))),
        ),
        Misconception(
            "shortest first",
            "The representations are right, but the shortest rows came first, so the short last chunk holds the "
            "longest. Sort in descending order.",
            _Encode(order=lambda lengths: torch.tensor(lengths).argsort(stable=True)),
        ),
        Misconception(
            "all rows at once",
            "All rows went through the encoder together: that is the naive forward, with its padding and its memory.",
            _Encode(at_once=True),
        ),
        Misconception(
            "one row at a time",
            "The representations are right, and nothing is padded, but the encoder is called once for every row: small "
            "calls use a machine badly. chunk_size rows at a time.",
            _one_row_at_a_time,
        ),
        Misconception(
            "chunk_size chunks",
            "It looks as if the rows were cut into chunk_size pieces, as tensor.chunk does. chunk_size says how many "
            "rows stand in each: tensor.split.",
            lambda encoder, rows, lengths, size: _Encode()(encoder, rows, lengths, -(-len(lengths) // size)),
        ),
        Misconception(
            "width from the unsorted lengths",
            "The rows were sorted, but the width was looked up in the unsorted list: lengths[start] is another row's "
            "length. The first row of the chunk is lengths[order[start]] long.",
            lambda encoder, rows, lengths, size: _by_widths(
                encoder, rows, lengths, size, order=_falling(lengths), widths=lengths
            ),
        ),
        Misconception(
            "lengths sorted, rows not",
            "The widths fall, as they should, but the rows are still in file order: long rows lost tokens to another "
            "row's width. Sort row numbers, and take rows and lengths by them.",
            lambda encoder, rows, lengths, size: _by_widths(
                encoder, rows, lengths, size, order=torch.arange(len(lengths)), widths=sorted(lengths)[::-1]
            ),
        ),
        Misconception(
            "shortest first, trimmed to the shortest row",
            "The rows were sorted upwards, so the first of a chunk is its shortest, and the others lost tokens. Sort "
            "in descending order: then the first is the longest.",
            _Encode(
                order=lambda lengths: torch.tensor(lengths).argsort(stable=True),
                width=lambda chunk, lengths: min(chunk),
            ),
        ),
        Misconception(
            "a graph was not kept",
            "The representations are right, and no gradient can reach the encoder: no_grad or .detach() cuts the "
            "graph off. Who calls this decides whether there is one.",
            lambda encoder, rows, lengths, size: _Encode()(encoder, rows, lengths, size).detach(),
        ),
        Misconception(
            "a token too few",
            "It looks as if a chunk were one token narrower than its longest row. [:, :n] holds n tokens already.",
            _Encode(width=lambda chunk, lengths: max(chunk) - 1),
        ),
        Misconception(
            "a forward too many",
            "The representations are right, but the whole batch was encoded once more beside its chunks, perhaps to "
            "learn the width of the result. torch.cat needs no width.",
            lambda encoder, rows, lengths, size: (encoder(rows), _Encode()(encoder, rows, lengths, size))[1],
        ),
        Misconception(
            "widths of the unsorted chunks",
            "The rows were sorted, but each chunk is as wide as the longest of the rows that stood at its place "
            "before: take the lengths in the same order.",
            lambda encoder, rows, lengths, size: _by_widths(
                encoder,
                rows,
                lengths,
                size,
                order=_falling(lengths),
                widths=[max(lengths[i // size * size :][:size]) for i in range(len(lengths))],
            ),
        ),
    ),
    hints=(
        "Keep the row numbers, not only the rows: then every result knows where it belongs.",
        "order = row numbers, longest first; for each slice of it: width = the slice's longest row, encode "
        "rows[slice, :width]; in the end put the parts back by the inverse of the order.",
        "order = torch.tensor(lengths).argsort(descending=True); parts = [encoder(rows[part, :lengths[part[0]]]) for "
        "part in order.split(chunk_size)]; return torch.cat(parts)[order.argsort()]",
    ),
)

# --- graphs that a budget holds -------------------------------------------------------------------------------


def _budget(
    rng: np.random.Generator, kept: int, *, spare: tuple[float, float] = (0.01, 0.45), chunks: int = 12
) -> Inputs:
    """A budget that holds `kept` graphs beside the loss, with such a part of another one to spare."""
    graph, loss = int(rng.integers(1000, 2000)), int(rng.integers(2500, 4000))
    budget = loss + kept * graph + int(graph * rng.uniform(*spare))
    replay = min(budget, loss + int(rng.integers(200, 800)) + (graph if kept else 0))
    return {"graph": graph, "loss": loss, "replay": replay, "budget": budget, "chunks": chunks}


def _count_up(graph: int, loss: int, replay: int, budget: int, chunks: int) -> int:
    kept = 0
    while kept < chunks and max(loss + (kept + 1) * graph, replay) <= budget:
        kept += 1
    return kept


def _many_graphs(rng: np.random.Generator) -> Inputs:
    return _budget(rng, int(rng.integers(6, 11)))


def _almost_one_more(rng: np.random.Generator) -> Inputs:
    return _budget(rng, int(rng.integers(3, 8)), spare=(0.55, 0.99))


def _an_exact_fit(rng: np.random.Generator) -> Inputs:
    return _budget(rng, int(rng.integers(3, 8)), spare=(0, 0))


def _a_large_loss(rng: np.random.Generator) -> Inputs:
    """The loss takes more than a replay, as the logits of a large batch do."""
    inputs = _budget(rng, int(rng.integers(3, 8)))
    more = int(rng.integers(5_000, 9_000))
    return inputs | {"loss": inputs["loss"] + more, "budget": inputs["budget"] + more}


def _more_than_there_are(rng: np.random.Generator) -> Inputs:
    return _budget(rng, int(rng.integers(15, 30)))


graphs_to_retain = Exercise(
    chapter=7,
    name="graphs_to_retain",
    spec="the largest R from 0 to `chunks` with max(loss + R * graph, replay) <= budget (an int); the budget is never "
    "below loss or replay.",
    line_budget=2,
    oracle=_count_up,
    makers=(
        _many_graphs,
        _almost_one_more,
        _an_exact_fit,
        _more_than_there_are,
        partial(_budget, kept=0),
        _a_large_loss,
    ),
    whole=True,
    misconceptions=(
        Misconception(
            "loss and replay added up",
            "It looks as if the loss and a replay had to fit together. They come one after the other: the larger of "
            "the two phases decides, and only the loss has R graphs beside it.",
            lambda graph, loss, replay, budget, chunks: max(0, min(chunks, (budget - loss - replay) // graph)),
        ),
        Misconception(
            "the smaller of loss and replay",
            "It looks as if the smaller of loss and replay was taken off. The graphs stand beside the loss, also where "
            "the loss is the larger of the two.",
            lambda graph, loss, replay, budget, chunks: min(chunks, (budget - min(loss, replay)) // graph),
        ),
        Misconception(
            "loss forgotten",
            "It looks as if the whole budget were there for graphs. Retained graphs live while the loss is computed, "
            "and that takes its own bytes.",
            lambda graph, loss, replay, budget, chunks: min(chunks, budget // graph),
        ),
        Misconception(
            "graphs held beside the replay",
            "It looks as if retained graphs had to fit beside a replay. Their backward runs first: when a chunk is "
            "encoded again, they are gone.",
            lambda graph, loss, replay, budget, chunks: min(chunks, (budget - replay) // graph),
        ),
        Misconception(
            "at least one retained",
            "Where the budget holds no graph beside the loss, nothing is retained: R = 0 is the plain gradient cache.",
            lambda graph, loss, replay, budget, chunks: max(1, min(chunks, (budget - loss) // graph)),
        ),
        Misconception(
            "not rounded",
            "A part of a graph can't be retained: // rounds down.",
            lambda graph, loss, replay, budget, chunks: min(chunks, (budget - loss) / graph),
        ),
        Misconception(
            "rounded to the nearest",
            "Right where less than half a graph's bytes are left over. Above that it was rounded up, and that graph "
            "does not fit: round down.",
            lambda graph, loss, replay, budget, chunks: min(chunks, round((budget - loss) / graph)),
        ),
        Misconception(
            "last chunk left out",
            "It looks as if the search stopped at chunks - 1: range(chunks) leaves its end out, and all chunks may be "
            "retained.",
            lambda graph, loss, replay, budget, chunks: min(chunks - 1, (budget - loss) // graph),
        ),
        Misconception(
            "one too many",
            "That is the first R that does not fit: round down. (The first graph is free only as far as a replay needs "
            "its place anyway; beside the loss it counts like any other.)",
            lambda graph, loss, replay, budget, chunks: min(chunks, (budget - loss) // graph + 1),
        ),
        Misconception(
            "exact fit refused",
            "A step that takes exactly the budget fits: it must be <=, not <.",
            lambda graph, loss, replay, budget, chunks: min(chunks, (budget - loss - 1) // graph),
        ),
        Misconception(
            "more than there are chunks",
            "There are only so many chunks: with all of them retained, nothing is encoded twice, and no more can be "
            "saved.",
            lambda graph, loss, replay, budget, chunks: (budget - loss) // graph,
        ),
        Misconception(
            "one too few",
            "One graph more would fit: round down, and take nothing off.",
            lambda graph, loss, replay, budget, chunks: max(0, min(chunks, (budget - loss) // graph - 1)),
        ),
        Misconception(
            "all or none",
            "It looks as if either all chunks were retained or none. Each of them counts for itself.",
            lambda graph, loss, replay, budget, chunks: chunks if loss + chunks * graph <= budget else 0,
        ),
    ),
    hints=(
        "Two phases: the loss, with R graphs beside it, and the replay, when they are gone. Which grows with R?",
        "Only the loss does. How many graphs fit into what the budget leaves beside it? And how many chunks are there?",
        "return min(chunks, (budget - loss) // graph)",
    ),
)
