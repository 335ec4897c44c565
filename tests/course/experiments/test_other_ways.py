"""Ways at equal bytes and FLOPs, small: sizes, hooks and gradients of `gclib.course.experiments.other_ways`."""

import copy
import csv
import dataclasses

import pytest
import torch
from helpers.numbers import small_corpus

from gclib import ContrastiveLoss
from gclib.audit.gradients import compare_gradients
from gclib.course.experiments import other_ways, results
from gclib.course.experiments.other_ways import (
    NAMES,
    QueueWay,
    SigmoidWay,
    gradient,
    peak_bytes,
    sized_ways,
    update_flops,
    way_of,
)
from gclib.course.experiments.recipes import TableSetting
from gclib.data.tokens import tokenize_pairs
from gclib.losses.sigmoid import SigmoidLoss

TINY = TableSetting(train_pairs=192, test_pairs=40, size="tiny", vocab_size=200, query_length=8, passage_length=8)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """A corpus of numbers in words, and an empty cache."""
    with small_corpus(tmp_path, monkeypatch, other_ways.sized_ways, other_ways._mined):
        yield


def batch(count=64):
    pairs, _, tokenizer = results.pairs_and_tokenizer(TINY)
    return tokenize_pairs(pairs[:count], tokenizer, **TINY.lengths())


@pytest.fixture
def encoder():
    return results.fresh_encoder(TINY, 0).double()


def test_with_nothing_stale_a_bank_of_both_sides_has_the_exact_direction_and_its_share_of_the_size(encoder):
    exact = gradient(way_of("small batch", 64), encoder, encoder, batch(), TINY)

    def error(name, older=encoder):
        return compare_gradients(exact, gradient(way_of(name, 16), encoder, older, batch(), TINY))["whole"]

    assert error("gradient cache").error <= 1e-12
    bank = error("two-sided bank")
    assert bank.cosine == pytest.approx(1, abs=1e-12) and bank.size == pytest.approx(16 / 64, rel=1e-12)
    assert error("accumulation") == error("small batch")
    assert 0 < error("queue").cosine < 0.999
    moved = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert error("two-sided bank", moved).cosine < 0.999 and error("gradient cache", moved).error <= 1e-12


def test_a_queue_s_gradient_is_that_of_the_queries_alone(encoder):
    """The first sum of the formula, by autograd with passages detached."""
    inputs = batch()
    found = gradient(way_of("queue", 16), encoder, encoder, inputs, TINY)
    encoder.eval()
    with torch.no_grad():
        passages = encoder(**inputs[1])
    encoder.zero_grad(set_to_none=True)
    ContrastiveLoss(TINY.temperature)(encoder(**inputs[0]), passages).backward()
    expected = other_ways.gradients_by_part(encoder)
    assert compare_gradients(expected, found)["whole"].error <= 1e-12


def test_weights_stand_still_and_the_training_mode_is_put_back(encoder):
    before = copy.deepcopy(encoder.state_dict())
    encoder.train()
    for name in NAMES[:-1]:
        gradient(way_of(name, 16), encoder, encoder, batch(), TINY)
    assert encoder.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_bytes_hold_the_bank_and_a_queue_s_second_weights():
    encoder = results.fresh_encoder(TINY, 0)
    weights = sum(parameter.nbytes for parameter in encoder.parameters())
    queue = peak_bytes(way_of("queue", 16), TINY)
    alone = peak_bytes(dataclasses.replace(way_of("queue", 16), chunk_size=other_ways.AGAINST), TINY)  # no bank
    kept = (other_ways.AGAINST - 16) * encoder.model.config.hidden_size * 4
    assert queue >= alone + kept and queue > 2 * weights


def test_flops_are_those_of_the_step():
    """Unsorted rows of one length: the cache costs a third more but for the loss; a queue's passages no backward."""
    naive, cached, queue = (update_flops(way_of(name, 64), TINY) for name in ("small batch", "gradient cache", "queue"))
    mined = update_flops(way_of("mined negatives", 64), TINY)
    assert queue < naive < cached < 1.4 * naive and naive < mined < 1.8 * naive


@pytest.mark.slow
def test_every_way_fits_the_budgets_and_one_row_more_does_not():
    ways = sized_ways(TINY)
    assert tuple(way.name for way in ways) == NAMES
    small = ways[0]
    assert small.rows == other_ways.ROWS and small.update_count == 192 // 16
    budget = small.update_count * small.update_flops
    for way in ways:
        assert way.peak_bytes <= small.peak_bytes
        assert budget - way.update_flops < way.update_count * way.update_flops <= budget
        if way.rows < other_ways.AGAINST:
            assert peak_bytes(way_of(way.name, way.rows + 1), TINY) > small.peak_bytes


@pytest.mark.slow
def test_every_way_trains_and_is_read_again(tmp_path):
    ways = sized_ways(TINY)
    runs = results.race(TINY, recipes=ways, seeds=(0,), progress=False)
    assert len({run.metrics["mrr"] for run in runs}) >= 6
    assert all(run.examples == run.recipe.update_count * run.recipe.batch_size for run in runs)
    again = results.race(TINY, recipes=ways, seeds=(0,), progress=False)
    assert again == [dataclasses.replace(run, saved=True) for run in runs]
    line = other_ways.as_line(runs[3])
    assert line["way"] == "queue" and int(line["flops"]) == ways[3].update_flops * ways[3].update_count


@pytest.mark.slow
def test_the_command_writes_a_line_for_each_way_and_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(other_ways, "QUICK", TINY)
    monkeypatch.setattr(other_ways, "SEEDS", (0,))
    other_ways.main(["--quick", "--output", str(tmp_path / "ways.csv")])
    with (tmp_path / "ways.csv").open(newline="") as file:
        assert [row["way"] for row in csv.DictReader(file)] == list(NAMES)


def test_the_queue_s_copy_follows_after_each_update(monkeypatch):
    """Of so few updates the momentum is 0: each time the copy becomes the encoder."""
    assert dataclasses.replace(way_of("queue", 16), update_count=20).momentum == 0.5
    way, trained = dataclasses.replace(way_of("queue", 16), update_count=2), results.fresh_encoder(TINY, 0)
    towers = way.towers(trained)
    monkeypatch.setattr(QueueWay, "towers", lambda self, encoder: towers)
    results.train_encoder(trained, way, TINY, seed=0)
    first = results.fresh_encoder(TINY, 0).parameters()
    for copied, now, before in zip(towers[1].copy.parameters(), trained.parameters(), first, strict=True):
        assert torch.equal(copied, now)
        assert not torch.equal(now, before) or now.grad is None or not now.grad.any()


def test_the_sigmoid_loss_s_own_parameters_are_trained(monkeypatch):
    way, loss_fn = dataclasses.replace(way_of("sigmoid", 16), update_count=2), SigmoidLoss()
    monkeypatch.setattr(SigmoidWay, "loss_fn", lambda self, setting: loss_fn)
    results.train_encoder(results.fresh_encoder(TINY, 0), way, TINY, seed=0)
    assert loss_fn.bias.item() != -10 and loss_fn.temperature.item() != pytest.approx(0.1, rel=1e-6)


def test_mined_pairs_have_their_negative():
    pairs, _, _ = results.pairs_and_tokenizer(TINY)
    assert {len(pair.negatives) for pair in way_of("mined negatives", 8).training_pairs(pairs)} == {1}


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="name must be one of small batch"):
        way_of("bigger batch", 16)
    with pytest.raises(ValueError, match="rows must be"):
        way_of("queue", 0)
