"""Chapter 06's exercises: which batch is which, the peak of a step, the largest chunk for a card.

Letters: B queries, C rows of a chunk, K hard negatives per query.
"""

import numpy as np

from .engine import Exercise, Misconception
from .judging import Inputs, Slip


def _several_chunks(rng: np.random.Generator) -> Inputs:
    return {
        "batch_size": int(rng.integers(100, 900)),
        "chunk_size": int(rng.integers(8, 64)),
        "hard_negatives": int(rng.integers(1, 5)),
    }


def _one_short_chunk(rng: np.random.Generator) -> Inputs:
    """A chunk that is larger than all passages together."""
    few = {"batch_size": int(rng.integers(3, 9)), "hard_negatives": int(rng.integers(1, 4))}
    return {
        "batch_size": few["batch_size"],
        "chunk_size": int(rng.integers(64, 128)),
        "hard_negatives": few["hard_negatives"],
    }


two_batch_sizes = Exercise(
    chapter=6,
    name="two_batch_sizes",
    spec="(most passages that are encoded at once, wrong passages that each query is held against), two ints.",
    line_budget=2,
    oracle=lambda b, c, k: (c if c < b + b * k else b + b * k, b - 1 + b * k),
    makers=(_several_chunks, _one_short_chunk),
    whole=True,
    misconceptions=(
        Misconception(
            "negatives of one chunk only",
            "It looks as if a query saw only its own chunk's passages. That is gradient accumulation; the gradient "
            "cache takes one loss over the whole batch, and the chunk has no part in it.",
            lambda b, c, k: (min(c, b * (1 + k)), min(c, b) * (1 + k) - 1),
        ),
        Misconception(
            "the two are swapped",
            "It looks as if batch and chunk changed places: the chunk says what is encoded at once, the batch what is "
            "compared.",
            lambda b, c, k: (b * (1 + k) - 1, min(c, b * (1 + k))),
        ),
        Misconception(
            "whole batch encoded at once",
            "It looks as if all passages went through the encoder at once: that is the naive step. The chunk is "
            "the limit.",
            lambda b, c, k: (b * (1 + k), b * (1 + k) - 1),
        ),
        Misconception(
            "hard negatives forgotten",
            "It looks as if only the other queries' positives count: all queries' hard negatives are in the row too.",
            lambda b, c, k: (min(c, b * (1 + k)), b - 1),
        ),
        Misconception(
            "own hard negatives only",
            "It looks as if a query met its own hard negatives and the other queries' positives. The others' hard "
            "negatives stand in its row too: all B * (1 + K) passages do.",
            lambda b, c, k: (min(c, b * (1 + k)), b - 1 + k),
        ),
        Misconception(
            "own hard negatives forgotten",
            "It looks as if only the other queries' passages counted. A query's own K hard negatives are wrong "
            "passages as well.",
            lambda b, c, k: (min(c, b * (1 + k)), (b - 1) * (1 + k)),
        ),
        Misconception(
            "hard negatives alone",
            "Those are the hard negatives. The other queries' positives are wrong passages for this query too.",
            lambda b, c, k: (min(c, b * (1 + k)), b * k),
        ),
        Misconception(
            "positive counted as wrong",
            "One too many: the query's own passage is among the B * (1 + K), and it is not a wrong one.",
            lambda b, c, k: (min(c, b * (1 + k)), b * (1 + k)),
        ),
        Misconception(
            "a chunk of queries with all their passages",
            "It looks as if a chunk held C queries and brought C (1 + K) passages, as in gradient accumulation. Here C "
            "counts rows: at most C passages are encoded at once.",
            lambda b, c, k: (min(c * (1 + k), b * (1 + k)), b * (1 + k) - 1),
        ),
        Misconception(
            "both numbers of a chunk of queries",
            "Those are gradient accumulation's numbers: C queries, their passages, and a loss over them alone. Here C "
            "counts rows, and the loss is the whole batch's.",
            lambda b, c, k: (min(c, b) * (1 + k), min(c, b) * (1 + k) - 1),
        ),
        Misconception(
            "negatives of a chunk's rows",
            "It looks as if a query were held against the rows of one chunk. The loss comes after all chunks, and it "
            "is one loss over all B * (1 + K) passages.",
            lambda b, c, k: (min(c, b * (1 + k)), min(c, b * (1 + k)) - 1),
        ),
        Misconception(
            "others' hard negatives alone",
            "Those are the other queries' hard negatives. Their positives are wrong passages too, and so are this "
            "query's own K.",
            lambda b, c, k: (min(c, b * (1 + k)), (b - 1) * k),
        ),
        Misconception(
            "own hard negatives alone",
            "Those are the query's own hard negatives. All other queries' passages stand in its row as well: they are "
            "the in-batch negatives.",
            lambda b, c, k: (min(c, b * (1 + k)), k),
        ),
        Misconception(
            "both towers at once",
            "It looks as if C queries and C passages went through together. A chunk holds rows of one tower: first all "
            "queries, chunk by chunk, then all passages.",
            lambda b, c, k: (min(2 * c, 2 * b * (1 + k)), b * (1 + k) - 1),
        ),
        Misconception(
            "how many chunks",
            "That is how many chunks the passages make. Asked for is how many passages are in one of them.",
            lambda b, c, k: (-(-b * (1 + k) // c), b * (1 + k) - 1),
        ),
        Misconception(
            "limited by the queries",
            "It looks as if a chunk could hold at most B rows. There are B * (1 + K) passages to fill it.",
            lambda b, c, k: (min(c, b), b * (1 + k) - 1),
        ),
        Misconception(
            "a batch of passages at once",
            "It looks as if B passages were encoded at once. The chunk is the limit, and it does not know the batch.",
            lambda b, c, k: (b, b * (1 + k) - 1),
        ),
        Misconception(
            "chunk larger than the tower",
            "A chunk can't hold more rows than there are: here all passages fit in one short chunk.",
            lambda b, c, k: (c, b * (1 + k) - 1),
        ),
    ),
    hints=(
        "Two questions, two numbers: what goes through the encoder together, and what stands in one row of the logits?",
        "There are B * (1 + K) passages in all. The chunk limits the first number; the second does not know the chunk.",
        "return min(chunk_size, passages), passages - 1",
    ),
)


def _phases(rng: np.random.Generator, rows: tuple[int, ...], order: list[int] | None = None) -> Inputs:
    """A flat and a steep phase, 1 and 2, whose lines cross at about 60 rows, and others that are never the highest.

    In `order`, or else with some of those around the two, and among them.
    """
    fixed = np.array([500, 900, 100, 400, 450, 350, 300]) + rng.integers(0, 60, 7)
    per_row = np.array([7, 2, 15, 5, 4, 6, 3]) + rng.integers(0, 3, 7)
    if order is None:
        between = rng.permutation([1, 2, *range(4, 4 + int(rng.integers(0, 4)))])
        order = [0, *between.tolist(), 3]
    return {"fixed": fixed[order].tolist(), "per_row": per_row[order].tolist(), "rows": int(rng.choice(rows))}


def _few_rows(rng: np.random.Generator) -> Inputs:
    return _phases(rng, (35, 40, 45))


def _many_rows(rng: np.random.Generator) -> Inputs:
    return _phases(rng, (80, 90, 120, 300))


def _the_middle_is_highest(rng: np.random.Generator) -> Inputs:
    return _phases(rng, (5, 10, 35, 45), [0, 5, 1, 2, 3])


def _first_is_highest(rng: np.random.Generator) -> Inputs:
    return _phases(rng, (5, 10, 35, 45), [1, 0, 3, 2])


def _last_is_highest(rng: np.random.Generator) -> Inputs:
    return _phases(rng, (5, 10, 35, 45), [2, 0, 3, 1])


def _highest_phase(fixed: list[int], per_row: list[int], rows: int) -> int:
    highest = None
    for start, slope in zip(fixed, per_row, strict=True):
        level = start
        level += slope * rows
        highest = level if highest is None or level > highest else highest
    return highest


peak_of_step = Exercise(
    chapter=6,
    name="peak_of_step",
    spec="the step's peak in bytes: phase i holds fixed[i] + per_row[i] * rows bytes while it runs (an int).",
    line_budget=1,
    oracle=_highest_phase,
    makers=(_few_rows, _many_rows, _the_middle_is_highest, _first_is_highest, _last_is_highest),
    whole=True,
    misconceptions=(
        Misconception(
            "phases added up",
            "It looks as if the phases' bytes were added. Phases come one after another, and what is freed is there "
            "for the next: take the highest.",
            lambda fixed, per_row, rows: sum(f + p * rows for f, p in zip(fixed, per_row, strict=True)),
        ),
        Misconception(
            "maxima of the two parts",
            "It looks as if the largest fixed part met the largest slope. They belong to different phases: add first, "
            "then take the highest.",
            lambda fixed, per_row, rows: max(fixed) + max(per_row) * rows,
        ),
        Misconception(
            "steepest phase only",
            "It looks as if the phase that grows fastest always wins. With few rows another one is higher: the peak is "
            "a maximum of lines, not a line.",
            lambda fixed, per_row, rows: max(zip(per_row, fixed, strict=True))[1] + max(per_row) * rows,
        ),
        Misconception(
            "highest at no rows",
            "It looks as if the phase with the largest fixed part always wins. With many rows a steeper one "
            "overtakes it.",
            lambda fixed, per_row, rows: max(fixed) + per_row[fixed.index(max(fixed))] * rows,
        ),
        Misconception(
            "fixed part once a row",
            "It looks as if every row brought the fixed part along: only per_row is multiplied by the rows.",
            lambda fixed, per_row, rows: max((f + p) * rows for f, p in zip(fixed, per_row, strict=True)),
        ),
        Misconception(
            "fixed part forgotten",
            "It looks as if a phase held its rows alone: fixed[i] bytes are there as well.",
            lambda fixed, per_row, rows: max(p * rows for p in per_row),
        ),
        Misconception(
            "rows forgotten",
            "It looks as if there were one row: per_row[i] is what each of the rows holds.",
            lambda fixed, per_row, rows: max(f + p for f, p in zip(fixed, per_row, strict=True)),
        ),
        Misconception(
            "rows' part forgotten",
            "That is the largest fixed part: the rows hold bytes as well. (`fixed + per_row * rows` joins and repeats "
            "lists; go through the phases one by one.)",
            lambda fixed, per_row, rows: max(fixed),
        ),
        Misconception(
            "fixed parts added up",
            "It looks as if the fixed parts of all phases were there at once. Each phase has its own: add within a "
            "phase, then take the highest.",
            lambda fixed, per_row, rows: sum(fixed) + max(per_row) * rows,
        ),
        Misconception(
            "lowest phase",
            "That is the lowest phase. The peak is the highest.",
            lambda fixed, per_row, rows: min(f + p * rows for f, p in zip(fixed, per_row, strict=True)),
        ),
        Misconception(
            "which phase and not how much",
            "That says which phase is the highest. Its bytes are asked for.",
            lambda fixed, per_row, rows: int(np.argmax(np.array(fixed) + np.array(per_row) * rows)),
        ),
        Misconception(
            "MiB and not bytes",
            "That is the peak in MiB. Bytes are asked for: leave out the division by 2**20.",
            lambda fixed, per_row, rows: _highest_phase(fixed, per_row, rows) / 2**20,
        ),
        Misconception(
            "middle phase only",
            "That is what the phase in the middle of the list holds: a peak can be anywhere in the step.",
            lambda fixed, per_row, rows: fixed[len(fixed) // 2] + per_row[len(fixed) // 2] * rows,
        ),
        Misconception(
            "first phase only",
            "That is what the first phase holds: a peak can be anywhere in the step.",
            lambda fixed, per_row, rows: fixed[0] + per_row[0] * rows,
        ),
        Misconception(
            "last phase only",
            "That is what the last phase holds: a peak can be anywhere in the step.",
            lambda fixed, per_row, rows: fixed[-1] + per_row[-1] * rows,
        ),
    ),
    hints=(
        "The phases run one after another. When is most held at once?",
        "Work out each phase's bytes at this number of rows, then take the largest.",
        "return max(f + p * rows for f, p in zip(fixed, per_row))",
    ),
)


class _Forecast:
    """A peak of the kind that forecasts have: the largest of two lines in the chunk size. Called with a chunk."""

    def __init__(self, fixed: tuple[int, int], per_row: tuple[int, int]):
        self.fixed, self.per_row = fixed, per_row

    def __call__(self, chunk_size: int) -> int:
        return max(f + p * chunk_size for f, p in zip(self.fixed, self.per_row, strict=True))

    def __repr__(self) -> str:
        (a, b), (c, d) = zip(self.fixed, self.per_row, strict=True)
        return f"<max({a} + {b} C, {c} + {d} C) bytes>"

    def __deepcopy__(self, memo: dict) -> "_Forecast":
        return self


def _card(rng: np.random.Generator, chunk: float, *, exactly: bool) -> Inputs:
    """A budget that a chunk of about `chunk` rows just fits, or with some bytes to spare."""
    flat, steep = int(rng.integers(3, 6)), int(rng.integers(15, 30))
    forecast = _Forecast((int(rng.integers(400, 600)), int(rng.integers(40, 80))), (flat, steep))
    spare = 0 if exactly else int(rng.integers(1, steep - 1))
    batch_size = int(rng.integers(300, 800))
    return {"forecast_peak": forecast, "budget": forecast(round(chunk)) + spare, "batch_size": batch_size}


def _roomy_card(rng: np.random.Generator) -> Inputs:
    return _card(rng, rng.choice([37, 41, 53, 77, 101]), exactly=False)


def _exact_card(rng: np.random.Generator) -> Inputs:
    return _card(rng, rng.choice([43, 59, 85]), exactly=True)


def _tiny_card(rng: np.random.Generator) -> Inputs:
    inputs = _card(rng, 50, exactly=False)
    return inputs | {"budget": inputs["forecast_peak"](1) - int(rng.integers(1, 50))}


def _card_of_one_row(rng: np.random.Generator) -> Inputs:
    inputs = _card(rng, 50, exactly=False)
    return inputs | {"budget": inputs["forecast_peak"](1)}


def _huge_card(rng: np.random.Generator) -> Inputs:
    return _card(rng, 900, exactly=False)


def _search(forecast_peak: _Forecast, budget: int, batch_size: int) -> int:
    low, high = 0, batch_size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if forecast_peak(middle) <= budget else (low, middle - 1)
    return low


def _powers_of_two(forecast_peak: _Forecast, budget: int, batch_size: int) -> int:
    return max((c for c in (2**n for n in range(10)) if c <= batch_size and forecast_peak(c) <= budget), default=0)


def _one_line(forecast_peak: _Forecast, budget: int, batch_size: int) -> int:
    slope = forecast_peak(2) - forecast_peak(1)
    return max(0, min(batch_size, 1 + (budget - forecast_peak(1)) // slope))


largest_chunk = Exercise(
    chapter=6,
    name="largest_chunk",
    spec="the largest chunk from 1 to batch_size with forecast_peak(chunk) <= budget; 0 where not even one row fits.",
    line_budget=4,
    oracle=_search,
    makers=(_roomy_card, _exact_card, _tiny_card, _card_of_one_row, _huge_card),
    slips=(
        Slip(
            "nothing to take the largest of",
            "Where not even one row fits, no chunk is left to choose from. The answer is 0 there: max(..., default=0).",
            r"max\(\) (arg is an empty sequence|iterable argument is empty)|StopIteration",
        ),
        Slip(
            "index past the end",
            "An index is past the end of a list. Where no chunk fits, an empty list has neither a first nor a last one "
            "(the answer is 0 there); where all fit, a search must stop at the last one; in a list of all peaks, chunk "
            "c stands at place c - 1.",
            "list index out of range",
        ),
    ),
    misconceptions=(
        Misconception(
            "one line through two chunks",
            "It looks as if a line was laid through the peaks of chunks 1 and 2. The peak is the largest of several "
            "lines: another phase takes over at a bigger chunk.",
            _one_line,
        ),
        Misconception(
            "powers of two only",
            "It looks as if only 1, 2, 4, 8, ... were tried. Any chunk will do, the last one may be short.",
            _powers_of_two,
        ),
        Misconception(
            "divisors of the batch only",
            "It looks as if a chunk had to divide the batch. It need not: the last chunk may be short.",
            lambda peak, budget, batch: max(
                (c for c in range(1, batch + 1) if batch % c == 0 and peak(c) <= budget), default=0
            ),
        ),
        Misconception(
            "bytes and not rows",
            "That is the peak of the largest chunk that fits, in bytes. The chunk itself is asked for.",
            lambda peak, budget, batch: max((peak(c) for c in range(1, batch + 1) if peak(c) <= budget), default=0),
        ),
        Misconception(
            "smallest chunk that fits",
            "That is the first chunk that fits, and the smallest. Go on: the largest is asked for.",
            lambda peak, budget, batch: int(peak(1) <= budget),
        ),
        Misconception(
            "chunk of one row left out",
            "It looks as if the search never tries a chunk of 1 row: range(batch_size, 1, -1) ends at 2, and "
            "range(2, ...) begins there.",
            lambda peak, budget, batch: _search(peak, budget, batch) if peak(2) <= budget else 0,
        ),
        Misconception(
            "a tenth left free",
            "It looks as if a tenth of the budget was left free. On a card that is wise; here the budget is what may "
            "be used, all of it.",
            lambda peak, budget, batch: _search(peak, 0.9 * budget, batch),
        ),
        Misconception(
            "peak counted for each tower",
            "It looks as if the peak was doubled for two towers. forecast_peak is the whole step's, and the towers are "
            "encoded one after the other.",
            lambda peak, budget, batch: _search(peak, budget / 2, batch),
        ),
        Misconception(
            "exact fit refused",
            "A peak that equals the budget fits: it must be <=, not <.",
            lambda peak, budget, batch: _search(peak, budget - 1, batch),
        ),
        Misconception(
            "a row where none fits",
            "Where not even one row fits, the answer is 0: no chunk helps.",
            lambda peak, budget, batch: max(1, _search(peak, budget, batch)),
        ),
        Misconception(
            "whole batch where none fits",
            "Where not even one row fits, the answer is 0: the whole batch fits least of all.",
            lambda peak, budget, batch: _search(peak, budget, batch) or batch,
        ),
        Misconception(
            "one too many",
            "That is the first chunk that does not fit: the answer is the one before it.",
            lambda peak, budget, batch: min(batch, _search(peak, budget, batch) + 1),
        ),
        Misconception(
            "batch itself left out",
            "It looks as if the search stops at batch_size - 1: range(1, batch_size) leaves its end out, and a chunk "
            "that is the whole batch is allowed.",
            lambda peak, budget, batch: min(batch - 1, _search(peak, budget, batch)),
        ),
        Misconception(
            "budget divided by one row's peak",
            "It looks as if the budget was divided by the peak of one row. That counts the fixed part, the model, once "
            "for every row.",
            lambda peak, budget, batch: min(batch, budget // peak(1)),
        ),
        Misconception(
            "larger than the batch",
            "A chunk larger than the batch is the whole batch: stop at batch_size.",
            lambda peak, budget, batch: _search(peak, budget, 100 * batch),
        ),
        Misconception(
            "-1 where none fits",
            "Where not even one row fits, the answer is 0, and not -1.",
            lambda forecast_peak, budget, batch_size: max(
                (c for c in range(1, batch_size + 1) if forecast_peak(c) <= budget), default=-1
            ),
        ),
    ),
    hints=(
        "forecast_peak takes a fraction of a second: you can simply ask it about every chunk.",
        "Of all chunks from 1 to batch_size keep those that fit; the largest of them, or 0 where there is none.",
        "return max((c for c in range(1, batch_size + 1) if forecast_peak(c) <= budget), default=0)",
    ),
)
