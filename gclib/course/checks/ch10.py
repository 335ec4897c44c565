"""Chapter 10's exercises: a fair schedule, mean and spread, false negatives of a batch, and an epoch's last batch.

Letters: B queries of an update, K hard negatives of a query.
"""

import math
import statistics
from collections import Counter
from functools import partial

import numpy as np

from .engine import Exercise, Misconception, Slip
from .judging import Inputs

# --- as many examples, and a rate that fits -------------------------------------------------------------------


def _schedule(rng: np.random.Generator, *, smaller: bool = False) -> Inputs:
    """A batch 4, 16 or 64 times the reference's, or as much smaller."""
    reference, factor = int(2 ** rng.integers(3, 6)), int(4 ** rng.integers(1, 4))
    steps = factor * int(rng.integers(20, 90))
    rate = round(float(rng.uniform(1e-4, 9e-4)), 6)
    batches = (reference * factor, reference) if smaller else (reference, reference * factor)
    steps = steps // factor if smaller else steps
    return {"batch_size": batches[1], "reference_batch": batches[0], "reference_steps": steps, "reference_rate": rate}


def _reference_schedule(
    batch_size: int, reference_batch: int, reference_steps: int, reference_rate: float
) -> tuple[int, float]:
    """Counted in examples, and the rate through its square."""
    examples = reference_steps * reference_batch
    return examples // batch_size, math.sqrt(reference_rate**2 * batch_size / reference_batch)


fair_schedule = Exercise(
    chapter=10,
    name="fair_schedule",
    spec="(steps, rate) with which batch_size sees as many examples as the reference; the rate grows with the square "
    "root of the batch.",
    line_budget=2,
    oracle=_reference_schedule,
    makers=(_schedule, partial(_schedule, smaller=True)),
    rtol=1e-5,  # a float32 root is right, too
    atol=1e-12,
    whole=True,
    misconceptions=(
        Misconception(
            "as many steps",
            "It looks as if both took the same number of steps. Then the bigger batch sees more examples, and wins for "
            "that alone: hold the examples equal.",
            lambda b, r, steps, rate: (steps, rate * math.sqrt(b / r)),
        ),
        Misconception(
            "steps multiplied",
            "The number of steps went the wrong way: a batch that holds more examples needs fewer steps for them.",
            lambda b, r, steps, rate: (steps * b / r, rate * math.sqrt(b / r)),
        ),
        Misconception(
            "steps by the square root too",
            "It looks as if the steps were scaled by the root of the ratio. The root is for the rate; examples are "
            "steps times batch.",
            lambda b, r, steps, rate: (steps * math.sqrt(r / b), rate * math.sqrt(b / r)),
        ),
        Misconception(
            "rate kept",
            "The rate is the reference's. With fewer steps at the same rate a big batch is held back, and the "
            "comparison is not fair.",
            lambda b, r, steps, rate: (steps * r // b, rate),
        ),
        Misconception(
            "rate in proportion to the batch",
            "It looks as if the rate grew with the batch itself. Asked for is the square root of the ratio: for "
            "a batch 64 times as large 8 times the rate, and not 64 times.",
            lambda b, r, steps, rate: (steps * r // b, rate * b / r),
        ),
        Misconception(
            "rate the wrong way round",
            "The rate falls where the batch grows. A larger batch gives a steadier gradient and fewer steps: its rate "
            "is larger.",
            lambda b, r, steps, rate: (steps * r // b, rate * math.sqrt(r / b)),
        ),
        Misconception(
            "rate first",
            "The two numbers have changed places: return the steps first, then the rate.",
            lambda b, r, steps, rate: (rate * math.sqrt(b / r), steps * r // b),
        ),
        Misconception(
            "nothing changed",
            "Steps and rate are the reference's. Another batch size needs others: as many examples, and a rate that "
            "goes with the root.",
            lambda b, r, steps, rate: (steps, rate),
        ),
        Misconception(
            "ratio upside down",
            "Both went the wrong way: a larger batch takes fewer steps, and a larger rate. The ratio stands on its "
            "head.",
            lambda b, r, steps, rate: (steps * b // r, rate * math.sqrt(r / b)),
        ),
        Misconception(
            "root of the batch itself",
            "It looks as if the rate were multiplied by the root of the batch. It is the root of the batch over the "
            "reference's.",
            lambda b, r, steps, rate: (steps * r // b, rate * math.sqrt(b)),
        ),
        Misconception(
            "examples, not steps",
            "The first number is how many examples the reference sees. How many steps of batch_size are they?",
            lambda b, r, steps, rate: (steps * r, rate * math.sqrt(b / r)),
        ),
    ),
    hints=(
        "How many examples does the reference see in all? How many steps of batch_size are that?",
        "steps = reference_steps * reference_batch // batch_size; the rate is multiplied by a square root: of what?",
        "return (reference_steps * reference_batch // batch_size, "
        "reference_rate * (batch_size / reference_batch) ** 0.5)",
    ),
)

# --- mean and spread over seeds -------------------------------------------------------------------------------


def _accuracies(rng: np.random.Generator, *, seeds: int) -> Inputs:
    """Percent of a row's seeds, unlike enough that no two statistics of them agree."""
    center = rng.uniform(15, 60)
    offsets = np.concatenate([rng.uniform(1.0, 2.0, seeds - 1), rng.uniform(4.0, 6.0, 1)]).cumsum()
    values = center + rng.permutation(offsets)
    return {"values": [round(float(value), 2) for value in values]}


def _reference_spread(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values)


mean_and_spread = Exercise(
    chapter=10,
    name="mean_and_spread",
    spec="(mean, sample standard deviation) of a row's results over seeds.",
    line_budget=3,
    oracle=_reference_spread,
    makers=tuple(partial(_accuracies, seeds=seeds) for seeds in (3, 5, 2)),
    rtol=1e-5,  # float32 is enough
    atol=1e-9,
    misconceptions=(
        Misconception(
            "divided by n",
            "That is the deviation of a whole population. Three seeds are a sample, and the mean was computed from "
            "them too: divide by n - 1. With three seeds the difference is a factor of 1.22.",
            lambda values: (statistics.fmean(values), statistics.pstdev(values)),
        ),
        Misconception(
            "standard error",
            "That is the standard error, the spread divided by the root of n: how well the *mean* is known. Asked for "
            "is how much single runs differ.",
            lambda values: (statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))),
        ),
        Misconception(
            "variance",
            "That is the variance, in squared percent. Its square root has the results' own unit.",
            lambda values: (statistics.fmean(values), statistics.variance(values)),
        ),
        Misconception(
            "the best seed",
            "It looks as if the best seed stood for all. The best of three is above the mean for every method, and the "
            "noisier one gains the most.",
            lambda values: (max(values), statistics.stdev(values)),
        ),
        Misconception(
            "the median",
            "The first number is the median. Asked for is the mean.",
            lambda values: (statistics.median(values), statistics.stdev(values)),
        ),
        Misconception(
            "the range",
            "The second number is the distance from the worst to the best seed. It can only grow when seeds are added: "
            "rows with unlike numbers of seeds can't be compared by it.",
            lambda values: (statistics.fmean(values), max(values) - min(values)),
        ),
        Misconception(
            "half the range",
            "The second number is half the distance from the worst to the best seed: only two seeds count. The "
            "standard deviation asks every seed how far it is from the mean.",
            lambda values: (statistics.fmean(values), (max(values) - min(values)) / 2),
        ),
        Misconception(
            "mean distance from the mean",
            "The second number is the mean absolute distance from the mean. The standard deviation squares first.",
            lambda values: (
                statistics.fmean(values),
                statistics.fmean(abs(value - statistics.fmean(values)) for value in values),
            ),
        ),
        Misconception(
            "not squared",
            "The distances from the mean were added with their signs, and that sum is always 0. Square them first.",
            lambda values: (statistics.fmean(values), 0.0),
        ),
        Misconception(
            "never divided",
            "It looks as if the squares were added up and rooted, and never divided: then the spread grows with the "
            "number of seeds.",
            lambda values: (statistics.fmean(values), statistics.stdev(values) * math.sqrt(len(values) - 1)),
        ),
        Misconception(
            "divided outside the root",
            "It looks as if the root came before the division. Divide the sum of squares by n - 1, then take the root.",
            lambda values: (statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values) - 1)),
        ),
        Misconception(
            "mean not taken off",
            "It looks as if the values themselves were squared. The spread is how far they are from their mean.",
            lambda values: (statistics.fmean(values), math.sqrt(sum(value**2 for value in values) / (len(values) - 1))),
        ),
        Misconception(
            "spread first",
            "The two numbers have changed places: return the mean first.",
            lambda values: (statistics.stdev(values), statistics.fmean(values)),
        ),
        Misconception(
            "mean divided by n - 1",
            "The n - 1 belongs to the spread. The mean is the sum over n.",
            lambda values: (sum(values) / (len(values) - 1), statistics.stdev(values)),
        ),
        Misconception(
            "relative to the mean",
            "The second number is the spread over the mean. Asked for is the spread itself, in the results' own unit.",
            lambda values: (statistics.fmean(values), statistics.stdev(values) / statistics.fmean(values)),
        ),
    ),
    hints=(
        "How far is each value from the mean? Square, add up: by what do you divide?",
        "By n - 1, because the mean was taken from the same n values; then the square root. The statistics module and "
        "torch both have it: which of their functions divides by n - 1?",
        "return statistics.fmean(values), statistics.stdev(values)",
    ),
)

# --- false negatives of a batch -------------------------------------------------------------------------------


def _batch(rng: np.random.Generator, *, size: int) -> Inputs:
    """Text numbers of a batch: five equal queries and two, a pair that stands there twice, five equal passages.

    Three passages have the numbers of three queries. So every wrong way to count gives another number, at one of
    the two sizes at least.
    """
    queries, passages = rng.permutation(1_000)[: 2 * size].reshape(2, size).tolist()
    rows = rng.permutation(size).tolist()
    for row in rows[1:5]:
        queries[row] = queries[rows[0]]
    queries[rows[6]], passages[rows[6]] = queries[rows[5]], passages[rows[5]]
    for row in (8, 11, 12, 13):
        passages[rows[row]] = passages[rows[7]]
    queries[rows[10]] = queries[rows[9]]
    for query, passage in ((7, 9), (8, 10), (11, 14)):
        passages[rows[passage]] = queries[rows[query]]
    return {"queries": queries, "passages": passages}


def _by_counting(queries: list[int], passages: list[int]) -> float:
    asked, given = Counter(queries), Counter(passages)
    return sum(asked[q] > 1 or given[p] > 1 for q, p in zip(queries, passages, strict=True)) / len(queries)


def _repeated(texts: list[int]) -> list[bool]:
    return [texts.count(text) > 1 for text in texts]


def _later(texts: list[int]) -> list[bool]:
    return [text in texts[:place] for place, text in enumerate(texts)]


def _share(*columns: list[bool], rows: int, together: bool = False) -> float:
    join = all if together else any
    return sum(join(row) for row in zip(*columns, strict=True)) / rows


def _cells(queries: list[int], passages: list[int], *, diagonal: bool = True) -> float:
    """The share of the B * B cells, or of the B * (B - 1) off the diagonal."""
    rows = range(len(queries))
    alike = sum(i != j and (queries[i] == queries[j] or passages[i] == passages[j]) for i in rows for j in rows)
    return alike / (len(queries) * (len(queries) - (not diagonal)))


false_negative_rate = Exercise(
    chapter=10,
    name="false_negative_rate",
    spec="share of a batch's queries for which another row's passage is right: a row with an equal query, or an equal "
    "passage.",
    line_budget=4,
    oracle=_by_counting,
    makers=(partial(_batch, size=15), partial(_batch, size=40)),
    rtol=1e-5,  # a mean in float32 is right, too
    atol=1e-12,
    misconceptions=(
        Misconception(
            "equal passages forgotten",
            "It looks as if only equal queries counted. Another row with the *same passage* as its positive is a false "
            "negative too.",
            lambda q, p: _share(_repeated(q), rows=len(q)),
        ),
        Misconception(
            "equal queries forgotten",
            "It looks as if only equal passages counted. A second row with the *same query* brings a passage that is "
            "right as well.",
            lambda q, p: _share(_repeated(p), rows=len(q)),
        ),
        Misconception(
            "both at once",
            "It looks as if query and passage had both to be equal. One of the two is enough.",
            lambda q, p: _share(_repeated(q), _repeated(p), rows=len(q), together=True),
        ),
        Misconception(
            "first of its kind not counted",
            "It looks as if only the later ones of equal texts counted, as one counts what to delete. The first has a "
            "false negative too: the later ones.",
            lambda q, p: _share(_later(q), _later(p), rows=len(q)),
        ),
        Misconception(
            "cells, not queries",
            "That is the share of the B x B cells. Asked for is the share of queries that have at least one.",
            _cells,
        ),
        Misconception(
            "pairs of rows, not queries",
            "That is the share of the B (B - 1) pairs of different rows. Asked for is the share of queries that have "
            "at least one.",
            partial(_cells, diagonal=False),
        ),
        Misconception(
            "different queries counted",
            "That is 1 - (different queries) / B: it counts the later ones of equal queries, and looks at no passage. "
            "The first of them has a false negative too, and so has a row with an equal passage.",
            lambda q, p: 1 - len(set(q)) / len(q),
        ),
        Misconception(
            "every row is its own twin",
            "It looks as if a row were compared with itself. Its own passage is its positive.",
            lambda q, p: 1.0,
        ),
        Misconception(
            "counted twice",
            "A row with an equal query *and* an equal passage was counted twice. It is one query.",
            lambda q, p: (sum(_repeated(q)) + sum(_repeated(p))) / len(q),
        ),
        Misconception(
            "a count, not a share",
            "That is the number of queries. Divide by the batch.",
            lambda q, p: _by_counting(q, p) * len(q),
        ),
        Misconception(
            "percent",
            "That is the share in percent. Asked for is a number from 0 to 1.",
            lambda q, p: 100 * _by_counting(q, p),
        ),
        Misconception(
            "different passages counted",
            "That is 1 - (different passages) / B: it counts the later ones of equal passages, and looks at no "
            "query. The first of them has a false negative too, and so has a row with an equal query.",
            lambda q, p: 1 - len(set(p)) / len(p),
        ),
        Misconception(
            "false negatives of a query",
            "That is how many false negatives a query has, on the average. Asked for is the share of queries that "
            "have at least one.",
            lambda q, p: _cells(q, p) * len(q),
        ),
        Misconception(
            "duplicates of both added",
            "That counts the later ones of equal queries and of equal passages, and adds the two. A row counts once, "
            "and the first of equal ones counts too.",
            lambda q, p: (2 * len(q) - len(set(q)) - len(set(p))) / len(q),
        ),
        Misconception(
            "query against passage",
            "It looks as if queries were held against passages. Their numbers count different texts: queries against "
            "queries, passages against passages.",
            lambda q, p: sum(text in p[:row] + p[row + 1 :] for row, text in enumerate(q)) / len(q),
        ),
        Misconception(
            "divided by B - 1",
            "It looks as if there were B - 1 queries. All B of them count.",
            lambda q, p: _by_counting(q, p) * len(q) / (len(q) - 1),
        ),
    ),
    hints=(
        "Look at one row. Which other rows make a passage in this batch right for its query?",
        "Row i counts when its query, or its passage, stands in the batch more than once: list.count tells.",
        "return sum(queries.count(q) > 1 or passages.count(p) > 1 for q, p in zip(queries, passages)) / len(queries)",
    ),
)

# --- an epoch's last batch ------------------------------------------------------------------------------------


def _epoch(rng: np.random.Generator, *, full: bool = False) -> Inputs:
    """Some full batches and a last one, short unless `full`."""
    size, batches, negatives = int(rng.integers(16, 200)), int(rng.integers(2, 6)), int(rng.integers(2, 5))
    rest = 0 if full else int(rng.integers(3, size // 2))
    return {"pairs": size * batches + rest, "batch_size": size, "hard_negatives": negatives}


def _one_by_one(pairs: int, batch_size: int, hard_negatives: int) -> list[float]:
    losses, left = [], pairs
    while left > 0:
        rows = min(left, batch_size)
        losses.append(math.log(sum(1 + hard_negatives for _ in range(rows))))
        left -= rows
    return losses


def _rows(pairs: int, size: int) -> list[int]:
    return [min(size, pairs - start) for start in range(0, pairs, size)]


def _always_a_rest(pairs: int, size: int, negatives: int) -> list[float]:
    """One batch too many where the size divides the pairs: an empty one, counted as one row."""
    return [math.log(rows * (1 + negatives)) for rows in [size] * (pairs // size) + [max(1, pairs % size)]]


chance_losses = Exercise(
    chapter=10,
    name="chance_losses",
    spec="for each batch of an epoch, in order, the loss of an encoder that knows nothing, in nats; the last batch may "
    "be short (a list).",
    line_budget=3,
    oracle=_one_by_one,
    makers=(_epoch, partial(_epoch, full=True)),
    slips=(
        Slip(
            "an empty batch",
            "The logarithm of 0, or of a number below it: a batch was given no rows, or fewer; or // made a chance "
            "0, or a sign stands inside the logarithm. Where batch_size divides the pairs the last batch is full, "
            "and none comes after it.",
            "math domain error|expected a positive input",
        ),
    ),
    rtol=1e-6,
    atol=1e-9,
    misconceptions=(
        Misconception(
            "last batch counted as full",
            "The last loss is that of a full batch. The last batch has fewer rows, so fewer wrong answers: it is lower "
            "by the log of the ratio, and nothing was learned there.",
            lambda n, b, k: [math.log(b * (1 + k))] * -(-n // b),
        ),
        Misconception(
            "last batch dropped",
            "The short batch is missing. Dropping it is a good choice when training (drop_last); here its loss is "
            "asked for.",
            lambda n, b, k: [math.log(b * (1 + k))] * (n // b),
        ),
        Misconception(
            "hard negatives forgotten",
            "It looks as if each query had one passage in the batch. With K hard negatives each it brings 1 + K.",
            lambda n, b, k: [math.log(rows) for rows in _rows(n, b)],
        ),
        Misconception(
            "own hard negatives only",
            "It looks as if a query saw the others' positives and its own hard negatives. It sees the others' hard "
            "negatives too.",
            lambda n, b, k: [math.log(rows + k) for rows in _rows(n, b)],
        ),
        Misconception(
            "positive left out",
            "It looks as if the wrong passages alone were counted. The positive stands in the softmax too.",
            lambda n, b, k: [math.log(rows * (1 + k) - 1) for rows in _rows(n, b)],
        ),
        Misconception(
            "hard negatives alone",
            "It looks as if each query brought its K hard negatives and no positive. With it, it brings 1 + K.",
            lambda n, b, k: [math.log(rows * k) for rows in _rows(n, b)],
        ),
        Misconception(
            "an empty last batch",
            "There is a loss too many where the batch size divides the pairs: then the last batch is a full one, and "
            "nothing is left for another.",
            _always_a_rest,
        ),
        Misconception(
            "bits, not nats",
            "That is in bits. PyTorch's cross entropy takes the natural logarithm.",
            lambda n, b, k: [math.log2(rows * (1 + k)) for rows in _rows(n, b)],
        ),
        Misconception(
            "sum over the rows",
            "That is the sum over a batch's queries. The loss is their mean, and it does not grow with the rows but "
            "with their logarithm.",
            lambda n, b, k: [rows * math.log(rows * (1 + k)) for rows in _rows(n, b)],
        ),
        Misconception(
            "minus the loss",
            "The sign: log(1 / n) is below 0, and the loss is minus that, log n.",
            lambda n, b, k: [-math.log(rows * (1 + k)) for rows in _rows(n, b)],
        ),
        Misconception(
            "the chance itself",
            "That is the chance of a guess, 1 / n. The loss is its negative logarithm.",
            lambda n, b, k: [1 / (rows * (1 + k)) for rows in _rows(n, b)],
        ),
        Misconception(
            "all pairs at once",
            "It looks as if a query chose among all pairs. A loss sees its own batch.",
            lambda n, b, k: [math.log(n * (1 + k)) for _ in _rows(n, b)],
        ),
        Misconception(
            "base 10",
            "That is the logarithm to the base of 10. PyTorch's cross entropy takes the natural one.",
            lambda n, b, k: [math.log10(rows * (1 + k)) for rows in _rows(n, b)],
        ),
        Misconception(
            "short batch first",
            "The short batch is the last one: rows are cut from the start.",
            lambda n, b, k: [math.log(rows * (1 + k)) for rows in _rows(n, b)[::-1]],
        ),
        Misconception(
            "an empty last batch, at 0",
            "There is a loss too many where the batch size divides the pairs: nothing is left for another batch.",
            lambda n, b, k: [math.log(rows * (1 + k)) if rows else 0.0 for rows in [b] * (n // b) + [n % b]],
        ),
    ),
    hints=(
        "Among how many passages does a query choose in a batch of b rows? What does it cost to guess among them?",
        "log(b * (1 + K)) for each batch. How many rows has the batch that starts at row i, if there are `pairs` rows?",
        "return [math.log(min(batch_size, pairs - i) * (1 + hard_negatives)) for i in range(0, pairs, batch_size)]",
    ),
)
