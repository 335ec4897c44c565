"""Chapter 10's checks: they ask for what the library does, and mistakes written in other words are recognised."""

import math

import numpy as np
import pytest
import torch

from gclib.course.checks import ch10
from gclib.course.experiments.recipes import scaled_rate
from gclib.data.negatives import false_negative_mask
from gclib.data.pairs import TextPair
from gclib.losses.dense import contrastive_loss


def test_the_exercises_ask_for_what_the_library_does():
    rng = np.random.default_rng(0)
    for maker in ch10.false_negative_rate.makers:
        queries, passages = maker(rng).values()
        pairs = [TextPair(f"query {q}", f"passage {p}") for q, p in zip(queries, passages, strict=True)]
        share = false_negative_mask(pairs).any(dim=1).double().mean().item()
        # a pair that stands there twice has one right passage beside its own column: the mask shows it too
        assert ch10.false_negative_rate.oracle(queries, passages) == pytest.approx(share)
    for maker in ch10.fair_schedule.makers:
        size, reference, steps, rate = maker(rng).values()
        found_steps, found_rate = ch10.fair_schedule.oracle(size, reference, steps, rate)
        assert found_steps * size == steps * reference
        at_128 = rate * math.sqrt(128 / reference)
        assert found_rate == pytest.approx(scaled_rate(size, at_128=at_128))
    *_, last = ch10.chance_losses.oracle(10, 8, 1)
    reps = torch.ones(2, 4), torch.ones(4, 4)
    assert last == pytest.approx(contrastive_loss(*reps, temperature=0.05).item())


def linear_rate(batch_size, reference_batch, reference_steps, reference_rate):
    ratio = batch_size / reference_batch
    return int(reference_steps / ratio), reference_rate * ratio


def old_rate(batch_size, reference_batch, reference_steps, reference_rate):
    return reference_steps * reference_batch // batch_size, reference_rate


def same_steps(batch_size, reference_batch, reference_steps, reference_rate):
    return reference_steps, reference_rate * (batch_size / reference_batch) ** 0.5


def numpy_default(values):
    return float(np.mean(values)), float(np.std(values))


def error_of_the_mean(values):
    table = torch.tensor(values, dtype=torch.float64)
    return table.mean().item(), (table.var() / len(values)).sqrt().item()


def best_of(values):
    return sorted(values)[-1], float(np.std(values, ddof=1))


def all_pairs(queries, passages):
    q, p = torch.tensor(queries), torch.tensor(passages)
    alike = (q[:, None] == q) | (p[:, None] == p)
    return alike.fill_diagonal_(False).double().mean().item()


def with_itself(queries, passages):
    q, p = torch.tensor(queries), torch.tensor(passages)
    return ((q[:, None] == q) | (p[:, None] == p)).any(dim=1).double().mean().item()


def doubles(queries, passages):
    seen_q, seen_p, found = set(), set(), 0
    for q, p in zip(queries, passages, strict=True):
        found += q in seen_q or p in seen_p
        seen_q.add(q)
        seen_p.add(p)
    return found / len(queries)


def queries_alone(queries, passages):
    return sum(queries.count(query) - 1 > 0 for query in queries) / len(queries)


def rounded_up(pairs, batch_size, hard_negatives):
    count = math.ceil(pairs / batch_size)
    return [math.log(batch_size) + math.log(1 + hard_negatives) for _ in range(count)]


def full_only(pairs, batch_size, hard_negatives):
    return [math.log(batch_size * (1 + hard_negatives)) for _ in range(0, pairs - batch_size + 1, batch_size)]


def in_bits(pairs, batch_size, hard_negatives):
    sizes = [batch_size] * (pairs // batch_size) + [pairs % batch_size] * (pairs % batch_size > 0)
    return [math.log(size * (1 + hard_negatives), 2) for size in sizes]


def rate_first(batch_size, reference_batch, reference_steps, reference_rate):
    return reference_rate * (batch_size / reference_batch) ** 0.5, reference_steps * reference_batch // batch_size


def plus_minus(values):
    return sum(values) / len(values), (sorted(values)[-1] - sorted(values)[0]) / 2


def off_the_diagonal(queries, passages):
    rows = [(i, j) for i in range(len(queries)) for j in range(len(queries)) if i != j]
    return sum(queries[i] == queries[j] or passages[i] == passages[j] for i, j in rows) / len(rows)


def not_distinct(queries, passages):
    return (len(queries) - len(set(queries))) / len(queries)


def in_percent(queries, passages):
    return 100 * np.mean([queries.count(q) + passages.count(p) > 2 for q, p in zip(queries, passages, strict=True)])


def without_positives(pairs, batch_size, hard_negatives):
    return [math.log(hard_negatives * len(part)) for part in torch.arange(pairs).split(batch_size)]


def one_more(pairs, batch_size, hard_negatives):
    full = [math.log(batch_size * (1 + hard_negatives))] * (pairs // batch_size)
    return [*full, math.log((pairs % batch_size or 1) * (1 + hard_negatives))]


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch10.fair_schedule, linear_rate, "rate in proportion to the batch"),
        (ch10.fair_schedule, old_rate, "rate kept"),
        (ch10.fair_schedule, same_steps, "as many steps"),
        (ch10.mean_and_spread, numpy_default, "divided by n"),
        (ch10.mean_and_spread, error_of_the_mean, "standard error"),
        (ch10.mean_and_spread, best_of, "the best seed"),
        (ch10.false_negative_rate, all_pairs, "cells, not queries"),
        (ch10.false_negative_rate, with_itself, "every row is its own twin"),
        (ch10.false_negative_rate, doubles, "first of its kind not counted"),
        (ch10.false_negative_rate, queries_alone, "equal passages forgotten"),
        (ch10.chance_losses, rounded_up, "last batch counted as full"),
        (ch10.chance_losses, full_only, "last batch dropped"),
        (ch10.chance_losses, in_bits, "bits, not nats"),
        (ch10.fair_schedule, rate_first, "rate first"),
        (ch10.mean_and_spread, plus_minus, "half the range"),
        (ch10.false_negative_rate, off_the_diagonal, "pairs of rows, not queries"),
        (ch10.false_negative_rate, not_distinct, "different queries counted"),
        (ch10.false_negative_rate, in_percent, "percent"),
        (ch10.chance_losses, without_positives, "hard negatives alone"),
        (ch10.chance_losses, one_more, "an empty last batch"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    for seed in range(6):
        assert exercise.judge(answer, seed=seed).misconception == name


def test_right_answers_in_other_words_are_right():
    def fair_schedule(batch_size, reference_batch, reference_steps, reference_rate):
        steps = reference_steps * reference_batch // batch_size
        return steps, reference_rate * math.sqrt(reference_steps / steps)

    def mean_and_spread(values):
        table = torch.tensor(values, dtype=torch.float64)
        return table.mean(), table.std()

    def false_negative_rate(queries, passages):
        q, p = torch.tensor(queries), torch.tensor(passages)
        return ((q[:, None] == q) | (p[:, None] == p)).sum(dim=1).gt(1).double().mean()

    def chance_losses(pairs, batch_size, hard_negatives):
        return [math.log(len(part) * (1 + hard_negatives)) for part in torch.arange(pairs).split(batch_size)]

    for answer in (fair_schedule, mean_and_spread, false_negative_rate, chance_losses):
        for seed in range(4):
            assert getattr(ch10, answer.__name__).judge(answer, seed=seed).status == "correct"


def test_float32_is_precise_enough():
    def fair_schedule(batch_size, reference_batch, reference_steps, reference_rate):
        root = torch.sqrt(torch.tensor(batch_size / reference_batch))
        return reference_steps * reference_batch // batch_size, reference_rate * root

    def mean_and_spread(values):
        table = torch.tensor(values)
        return table.mean(), table.std()

    def false_negative_rate(queries, passages):
        q, p = torch.tensor(queries), torch.tensor(passages)
        return ((q[:, None] == q) | (p[:, None] == p)).sum(dim=1).gt(1).float().mean()

    def chance_losses(pairs, batch_size, hard_negatives):
        sizes = torch.tensor([len(part) for part in torch.arange(pairs).split(batch_size)])
        return torch.log(sizes * (1 + hard_negatives)).tolist()

    for answer in (fair_schedule, mean_and_spread, false_negative_rate, chance_losses):
        for seed in range(6):
            assert getattr(ch10, answer.__name__).judge(answer, seed=seed).status == "correct"
