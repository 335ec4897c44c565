"""Answers to chapter 10, in the styles and with the mistakes of readers."""

import math
import statistics
from collections import Counter

import numpy as np
import torch

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch10")


@right("fair_schedule")
def schedule_by_examples(batch_size, reference_batch, reference_steps, reference_rate):
    steps = reference_batch * reference_steps // batch_size
    return steps, reference_rate * math.sqrt(batch_size / reference_batch)


@right("fair_schedule")
def schedule_as_list(batch_size, reference_batch, reference_steps, reference_rate):
    ratio = batch_size / reference_batch
    return [round(reference_steps / ratio), reference_rate * ratio**0.5]


@right("fair_schedule")
def schedule_of_numpy(batch_size, reference_batch, reference_steps, reference_rate):
    steps = np.int64(reference_steps * reference_batch) // batch_size
    return steps, reference_rate * np.sqrt(batch_size) / np.sqrt(reference_batch)


@right("fair_schedule")
def schedule_with_roots_apart(batch_size, reference_batch, reference_steps, reference_rate):
    return int(reference_steps * reference_batch / batch_size), reference_rate * (batch_size / reference_batch) ** (
        1 / 2
    )


@wrong("fair_schedule", "rate in proportion to the batch")
def linear_rate(batch_size, reference_batch, reference_steps, reference_rate):
    return reference_batch * reference_steps // batch_size, reference_rate * batch_size / reference_batch


@wrong("fair_schedule", "as many steps")
def same_steps(batch_size, reference_batch, reference_steps, reference_rate):
    return reference_steps, reference_rate * math.sqrt(batch_size / reference_batch)


@wrong("fair_schedule", "rate kept")
def same_rate(batch_size, reference_batch, reference_steps, reference_rate):
    return reference_batch * reference_steps // batch_size, reference_rate


@wrong("fair_schedule", "ratio upside down")
def ratio_upside_down(batch_size, reference_batch, reference_steps, reference_rate):
    ratio = reference_batch / batch_size
    return int(reference_steps / ratio), reference_rate * math.sqrt(ratio)


@wrong("fair_schedule", "rate the wrong way round")
def rate_falls(batch_size, reference_batch, reference_steps, reference_rate):
    return reference_batch * reference_steps // batch_size, reference_rate * math.sqrt(reference_batch / batch_size)


@wrong("fair_schedule", None)
def steps_grow(batch_size, reference_batch, reference_steps, reference_rate):
    return int(reference_steps * batch_size / reference_batch), reference_rate * math.sqrt(batch_size / reference_batch)


@wrong("fair_schedule", "root of the batch itself")
def root_of_the_batch(batch_size, reference_batch, reference_steps, reference_rate):
    return reference_batch * reference_steps // batch_size, reference_rate * math.sqrt(batch_size)


@wrong("fair_schedule", "a float for an int")
def float_steps(batch_size, reference_batch, reference_steps, reference_rate):
    return reference_batch * reference_steps / batch_size, reference_rate * math.sqrt(batch_size / reference_batch)


@wrong("fair_schedule", None)
def whole_ratio_first(batch_size, reference_batch, reference_steps, reference_rate):
    ratio = batch_size // reference_batch
    return reference_steps // max(ratio, 1), reference_rate * math.sqrt(max(ratio, 1))


@wrong("fair_schedule", "rate first")
def order_swapped(batch_size, reference_batch, reference_steps, reference_rate):
    return reference_rate * math.sqrt(batch_size / reference_batch), reference_batch * reference_steps // batch_size


@wrong("fair_schedule", "examples, not steps")
def examples_returned(batch_size, reference_batch, reference_steps, reference_rate):
    return reference_batch * reference_steps, reference_rate * math.sqrt(batch_size / reference_batch)


@wrong("fair_schedule", "nothing changed")
def nothing_changes(batch_size, reference_batch, reference_steps, reference_rate):
    return reference_steps, reference_rate


@wrong("fair_schedule", "steps by the square root too")
def root_of_the_steps(batch_size, reference_batch, reference_steps, reference_rate):
    ratio = math.sqrt(batch_size / reference_batch)
    return round(reference_steps / ratio), reference_rate * ratio


@wrong("fair_schedule", None)
def logarithmic_rate(batch_size, reference_batch, reference_steps, reference_rate):
    steps = reference_batch * reference_steps // batch_size
    return steps, reference_rate * (1 + math.log2(batch_size / reference_batch))


@right("mean_and_spread")
def by_hand(values):
    mean = sum(values) / len(values)
    return mean, (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5


@right("mean_and_spread")
def by_statistics(values):
    return statistics.mean(values), statistics.stdev(values)


@right("mean_and_spread")
def by_numpy(values):
    return np.mean(values), np.std(values, ddof=1)


@right("mean_and_spread")
def by_torch(values):
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item()


@right("mean_and_spread")
def by_tensors(values):
    values = torch.tensor(values, dtype=torch.float64)
    return [values.mean(), values.std()]


@wrong("mean_and_spread", "divided by n")
def population(values):
    return statistics.fmean(values), statistics.pstdev(values)


@wrong("mean_and_spread", "divided by n")
def numpy_default(values):
    return float(np.mean(values)), float(np.std(values))


@wrong("mean_and_spread", "variance")
def variance(values):
    return statistics.fmean(values), statistics.variance(values)


@wrong("mean_and_spread", "standard error")
def standard_error(values):
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


@wrong("mean_and_spread", "the range")
def value_range(values):
    return statistics.fmean(values), max(values) - min(values)


@wrong("mean_and_spread", "half the range")
def half_range(values):
    return statistics.fmean(values), (max(values) - min(values)) / 2


@wrong("mean_and_spread", "the median")
def median_for_mean(values):
    return statistics.median(values), statistics.stdev(values)


@wrong("mean_and_spread", "mean distance from the mean")
def mean_absolute_deviation(values):
    mean = sum(values) / len(values)
    return mean, sum(abs(v - mean) for v in values) / len(values)


@wrong("mean_and_spread", "not squared")
def signed_deviations(values):
    mean = sum(values) / len(values)
    return mean, sum(v - mean for v in values) / (len(values) - 1)


@wrong("mean_and_spread", "never divided")
def deviations_summed(values):
    mean = sum(values) / len(values)
    return mean, sum((v - mean) ** 2 for v in values) ** 0.5


@wrong("mean_and_spread", "mean not taken off")
def root_without_mean(values):
    mean = sum(values) / len(values)
    return mean, (sum(v**2 for v in values) / (len(values) - 1)) ** 0.5


@wrong("mean_and_spread", "mean divided by n - 1")
def both_over_n_minus_one(values):
    mean = sum(values) / (len(values) - 1)
    return mean, statistics.stdev(values)


@wrong("mean_and_spread", "divided outside the root")
def root_before_the_division(values):
    mean = sum(values) / len(values)
    return mean, sum((v - mean) ** 2 for v in values) ** 0.5 / (len(values) - 1)


@wrong("mean_and_spread", "spread first")
def spread_first(values):
    return statistics.stdev(values), statistics.fmean(values)


@wrong("mean_and_spread", "relative to the mean")
def in_per_cent(values):
    return statistics.fmean(values), statistics.stdev(values) / statistics.fmean(values)


@wrong("mean_and_spread", None)
def two_deviations(values):
    return statistics.fmean(values), 2 * statistics.stdev(values)


@right("false_negative_rate")
def rate_by_counting(queries, passages):
    q, p = Counter(queries), Counter(passages)
    return sum(q[a] > 1 or p[b] > 1 for a, b in zip(queries, passages, strict=True)) / len(queries)


@right("false_negative_rate")
def rate_by_loops(queries, passages):
    hits = 0
    for i in range(len(queries)):
        hits += any(j != i and (queries[i] == queries[j] or passages[i] == passages[j]) for j in range(len(queries)))
    return hits / len(queries)


@right("false_negative_rate")
def rate_by_torch(queries, passages):
    q, p = torch.tensor(queries), torch.tensor(passages)
    same = (q[:, None] == q) | (p[:, None] == p)
    return (same.sum(1) > 1).double().mean().item()


@right("false_negative_rate")
def rate_by_numpy(queries, passages):
    q, p = np.array(queries), np.array(passages)
    same = np.equal.outer(q, q) | np.equal.outer(p, p)
    np.fill_diagonal(same, False)
    return same.any(axis=1).mean()


@right("false_negative_rate")
def rate_by_count_method(queries, passages):
    pairs = list(zip(queries, passages, strict=True))
    return len([1 for q, p in pairs if queries.count(q) > 1 or passages.count(p) > 1]) / len(pairs)


@wrong("false_negative_rate", "equal queries forgotten")
def passages_only(queries, passages):
    return sum(passages.count(p) > 1 for p in passages) / len(passages)


@wrong("false_negative_rate", "equal passages forgotten")
def queries_only(queries, passages):
    return sum(queries.count(q) > 1 for q in queries) / len(queries)


@wrong("false_negative_rate", "both at once")
def both_equal(queries, passages):
    pairs = list(zip(queries, passages, strict=True))
    return sum(queries.count(q) > 1 and passages.count(p) > 1 for q, p in pairs) / len(pairs)


@wrong("false_negative_rate", "both at once")
def same_pair(queries, passages):
    pairs = list(zip(queries, passages, strict=True))
    return sum(pairs.count(pair) > 1 for pair in pairs) / len(pairs)


@wrong("false_negative_rate", "every row is its own twin")
def self_counted(queries, passages):
    return sum(
        any(q == a or p == b for a, b in zip(queries, passages, strict=True))
        for q, p in zip(queries, passages, strict=True)
    ) / len(queries)


@wrong("false_negative_rate", "pairs of rows, not queries")
def share_of_pairs(queries, passages):
    B = len(queries)
    hits = sum(i != j and (queries[i] == queries[j] or passages[i] == passages[j]) for i in range(B) for j in range(B))
    return hits / (B * (B - 1))


@wrong("false_negative_rate", "false negatives of a query")
def pairs_per_query(queries, passages):
    B = len(queries)
    hits = sum(i != j and (queries[i] == queries[j] or passages[i] == passages[j]) for i in range(B) for j in range(B))
    return hits / B


@wrong("false_negative_rate", "first of its kind not counted")
def later_rows_only(queries, passages):
    B = len(queries)
    return sum(any(queries[i] == queries[j] or passages[i] == passages[j] for j in range(i)) for i in range(B)) / B


@wrong("false_negative_rate", "a count, not a share")
def count_not_share(queries, passages):
    pairs = list(zip(queries, passages, strict=True))
    return sum(queries.count(q) > 1 or passages.count(p) > 1 for q, p in pairs)


@wrong("false_negative_rate", "different passages counted")
def duplicates_by_set(queries, passages):
    return 1 - len(set(passages)) / len(passages)


@wrong("false_negative_rate", "duplicates of both added")
def duplicates_of_both_by_set(queries, passages):
    return (2 * len(queries) - len(set(queries)) - len(set(passages))) / len(queries)


@wrong("false_negative_rate", None)
def share_of_whole_rows(queries, passages):
    return sum(queries.count(q) > 1 or passages.count(p) > 1 for q, p in zip(queries, passages, strict=True)) // 99


@wrong("false_negative_rate", "query against passage")
def query_against_passage(queries, passages):
    B = len(queries)
    return sum(any(queries[i] == passages[j] for j in range(B) if j != i) for i in range(B)) / B


@wrong("false_negative_rate", None)
def neighbours_only(queries, passages):
    B = len(queries)
    near = [(i, j) for i in range(B) for j in (i - 1, i + 1) if 0 <= j < B]
    return len({i for i, j in near if queries[i] == queries[j] or passages[i] == passages[j]}) / B


@wrong("false_negative_rate", "counted twice")
def two_shares_added(queries, passages):
    return sum(queries.count(q) > 1 for q in queries) / len(queries) + sum(
        passages.count(p) > 1 for p in passages
    ) / len(passages)


@wrong("false_negative_rate", "divided by B - 1")
def without_one(queries, passages):
    pairs = list(zip(queries, passages, strict=True))
    return sum(queries.count(q) > 1 or passages.count(p) > 1 for q, p in pairs) / (len(pairs) - 1)


@right("chance_losses")
def chance_by_range(pairs, batch_size, hard_negatives):
    starts = range(0, pairs, batch_size)
    return [math.log(min(batch_size, pairs - start) * (1 + hard_negatives)) for start in starts]


@right("chance_losses")
def chance_by_divmod(pairs, batch_size, hard_negatives):
    full, rest = divmod(pairs, batch_size)
    sizes = [batch_size] * full + ([rest] if rest else [])
    return [math.log(b + b * hard_negatives) for b in sizes]


@right("chance_losses")
def chance_by_numpy(pairs, batch_size, hard_negatives):
    sizes = np.diff([*range(0, pairs, batch_size), pairs])
    return list(np.log(sizes * (1 + hard_negatives)))


@right("chance_losses")
def chance_by_while(pairs, batch_size, hard_negatives):
    losses = []
    while pairs > 0:
        b = min(pairs, batch_size)
        losses.append(-math.log(1 / (b * (hard_negatives + 1))))
        pairs -= b
    return losses


@right("chance_losses")
def chance_by_torch(pairs, batch_size, hard_negatives):
    parts = torch.arange(pairs).split(batch_size)
    return [torch.tensor(float(len(p) * (1 + hard_negatives)), dtype=torch.float64).log().item() for p in parts]


@wrong("chance_losses", "hard negatives forgotten")
def hard_negatives_forgotten(pairs, batch_size, hard_negatives):
    return [math.log(min(batch_size, pairs - s)) for s in range(0, pairs, batch_size)]


@wrong("chance_losses", "own hard negatives only")
def own_hard_negatives(pairs, batch_size, hard_negatives):
    return [math.log(min(batch_size, pairs - s) + hard_negatives) for s in range(0, pairs, batch_size)]


@wrong("chance_losses", "last batch counted as full")
def last_is_full(pairs, batch_size, hard_negatives):
    return [math.log(batch_size * (1 + hard_negatives))] * math.ceil(pairs / batch_size)


@wrong("chance_losses", "last batch dropped")
def last_is_dropped(pairs, batch_size, hard_negatives):
    return [math.log(batch_size * (1 + hard_negatives))] * (pairs // batch_size)


@wrong("chance_losses", "bits, not nats")
def bits(pairs, batch_size, hard_negatives):
    return [math.log2(min(batch_size, pairs - s) * (1 + hard_negatives)) for s in range(0, pairs, batch_size)]


@wrong("chance_losses", "positive left out")
def wrong_passages_only(pairs, batch_size, hard_negatives):
    sizes = [min(batch_size, pairs - s) * (1 + hard_negatives) - 1 for s in range(0, pairs, batch_size)]
    return [math.log(n) if n else 0.0 for n in sizes]


@wrong("chance_losses", "minus the loss")
def negative_logarithm(pairs, batch_size, hard_negatives):
    return [-math.log(min(batch_size, pairs - s) * (1 + hard_negatives)) for s in range(0, pairs, batch_size)]


@wrong("chance_losses", "an empty last batch, at 0")
def always_a_rest(pairs, batch_size, hard_negatives):
    full, rest = divmod(pairs, batch_size)
    sizes = [batch_size] * full + [rest]
    return [math.log(b * (1 + hard_negatives)) if b else 0.0 for b in sizes]


@wrong("chance_losses", "an empty batch")
def always_a_rest_and_raises(pairs, batch_size, hard_negatives):
    full, rest = divmod(pairs, batch_size)
    return [math.log(b * (1 + hard_negatives)) for b in [batch_size] * full + [rest]]


@wrong("chance_losses", "another form")
def mean_loss(pairs, batch_size, hard_negatives):
    found = [math.log(min(batch_size, pairs - s) * (1 + hard_negatives)) for s in range(0, pairs, batch_size)]
    return sum(found) / len(found)


@wrong("chance_losses", "the chance itself")
def share_of_chance(pairs, batch_size, hard_negatives):
    return [1 / (min(batch_size, pairs - s) * (1 + hard_negatives)) for s in range(0, pairs, batch_size)]


@wrong("chance_losses", "all pairs at once")
def of_all_pairs(pairs, batch_size, hard_negatives):
    return [math.log(pairs * (1 + hard_negatives)) for _ in range(0, pairs, batch_size)]


@wrong("chance_losses", "hard negatives alone")
def hard_negatives_alone(pairs, batch_size, hard_negatives):
    return [math.log(min(batch_size, pairs - s) * max(hard_negatives, 1)) for s in range(0, pairs, batch_size)]


@wrong("chance_losses", "base 10")
def decimal_logarithm(pairs, batch_size, hard_negatives):
    return [math.log10(min(batch_size, pairs - s) * (1 + hard_negatives)) for s in range(0, pairs, batch_size)]


@wrong("chance_losses", "short batch first")
def short_one_first(pairs, batch_size, hard_negatives):
    full, rest = divmod(pairs, batch_size)
    return [math.log(b * (1 + hard_negatives)) for b in ([rest] if rest else []) + [batch_size] * full]


@wrong("chance_losses", "another form")
def a_numpy_array(pairs, batch_size, hard_negatives):
    return np.log(np.diff([*range(0, pairs, batch_size), pairs]) * (1 + hard_negatives))
