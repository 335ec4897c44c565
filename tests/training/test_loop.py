"""The loop: batches, schedule, clipping, records, and what it leaves as it was: `gclib.training.loop`."""

import copy
import dataclasses
import functools
import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gclib.data.pairs import TextPair
from gclib.data.tokens import tokenize_pairs, train_tokenizer
from gclib.losses.module import ContrastiveLoss
from gclib.models.encoder import Encoder
from gclib.steps import accumulation_step, grad_cache_step, naive_step
from gclib.training.loop import TrainingRecord, TrainingState, draw_batches, learning_rate_factors, rows_of_rank, train
from gclib.training.retrieval import retrieval_metrics

THINGS = [
    "apples",
    "pears",
    "plums",
    "figs",
    "dates",
    "melons",
    "cherries",
    "grapes",
    "lemons",
    "limes",
    "kiwis",
    "mangos",
]
DEEDS = ["count", "sort", "weigh"]
PAIRS = [
    TextPair(f"How to {deed} the {thing}.", f"def {deed}_{thing}(): return {deed}({thing})")
    for thing in THINGS
    for deed in DEEDS
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PAIRS, vocab_size=200)


@pytest.fixture
def encoder():
    return Encoder.from_config("tiny", vocab_size=200, dropout=0.1)


def run(encoder, tokenizer, *, optimizer=None, pairs=PAIRS, loss_fn=None, **changes):
    optimizer = optimizer or torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    settings = {"step": naive_step, "batch_size": 8, "steps": 4, "seed": 0, "progress": False, **changes}
    return train((encoder, encoder), pairs, tokenizer, loss_fn or ContrastiveLoss(), optimizer=optimizer, **settings)


def weights(encoder):
    return torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()]).clone()


def take(count, pairs, size, seed=0):
    return list(itertools.islice(draw_batches(pairs, size, seed=seed), count))


@given(count=st.integers(1, 40), size=st.integers(1, 40), seed=st.integers(0, 1_000))
def test_an_epoch_sees_every_pair_at_most_once_and_drops_less_than_a_batch(count, size, seed):
    pairs = [TextPair(f"q{n}", f"p{n}") for n in range(count)]
    if size > count:
        with pytest.raises(ValueError, match="batch_size must be at most the number of pairs"):
            draw_batches(pairs, size, seed=seed)
        return
    batches = take(3 * (count // size), pairs, size, seed)
    for epoch in range(3):
        seen = [pair for number, batch in batches if number == epoch for pair in batch]
        assert len(set(seen)) == len(seen) == count // size * size
    assert all(len(batch) == size for _, batch in batches)


def test_epochs_are_shuffled_anew_and_by_seed():
    first, second = (batch for _, batch in take(2, PAIRS, len(PAIRS)))
    assert sorted(first, key=str) == sorted(second, key=str) == sorted(PAIRS, key=str)
    assert first != second
    assert take(2, PAIRS, len(PAIRS)) == take(2, PAIRS, len(PAIRS))
    assert take(1, PAIRS, len(PAIRS), seed=1)[0][1] != first


def test_twins_wait_for_a_later_batch_of_the_same_epoch():
    pairs = [TextPair(f"q{n}", f"p{n // 2}") for n in range(40)]
    batches = take(60, pairs, 5)
    assert all(len({pair.passage for pair in batch}) == 5 for _, batch in batches)
    assert len([epoch for epoch, _ in batches if epoch == 0]) >= 7
    both = [pair.passage for epoch, batch in batches if epoch == 0 for pair in batch]
    assert max(map(both.count, both)) == 2


def test_pairs_with_too_many_twins_are_told_before_anything_is_trained(encoder, tokenizer):
    pairs = [TextPair(f"query {n}", "the same") for n in range(8)]
    before = weights(encoder)

    def step(encoders, inputs, loss_fn):
        raise AssertionError("trained")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="8 of an epoch's 8 queries meet a false negative"):
            run(encoder, tokenizer, pairs=pairs, batch_size=4, step=step)
    assert torch.equal(weights(encoder), before)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"steps": 4}, [1, 3 / 4, 2 / 4, 1 / 4]),
        ({"steps": 4, "warmup_steps": 2}, [1 / 2, 1, 1, 1 / 2]),
        ({"steps": 3, "warmup_steps": 3}, [1 / 3, 2 / 3, 1]),
        ({"steps": 3, "schedule": "constant"}, [1, 1, 1]),
        ({"steps": 3, "warmup_steps": 2, "schedule": "constant"}, [1 / 2, 1, 1]),
    ],
)
def test_the_schedule(arguments, expected):
    assert learning_rate_factors(**arguments) == pytest.approx(expected)


def test_records_tell_what_happened(encoder, tokenizer):
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
    records = run(encoder, tokenizer, optimizer=optimizer, batch_size=10, steps=5, warmup_steps=1)
    assert all(isinstance(record, TrainingRecord) for record in records)
    assert [record.step for record in records] == [1, 2, 3, 4, 5]
    assert [record.epoch for record in records] == [0, 0, 0, 1, 1]
    assert [record.examples for record in records] == [10, 20, 30, 40, 50]
    assert [record.learning_rate for record in records] == pytest.approx([0.5, 0.5, 0.375, 0.25, 0.125])
    assert all(record.loss > 0 and record.gradient_norm > 0 for record in records)
    seconds = [record.seconds for record in records]
    assert seconds[0] > 0 and seconds == sorted(seconds)


def test_one_step_is_the_step_that_plain_autograd_takes(tokenizer):
    """Oracle: the same batch through the model and torch's own cross entropy, clipping and SGD."""
    encoder = Encoder.from_config("tiny", vocab_size=200, dropout=0.0).double()
    copy = Encoder.from_config("tiny", vocab_size=200, dropout=0.0).double()
    copy.load_state_dict(encoder.state_dict())
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    (record,) = run(encoder, tokenizer, optimizer=optimizer, steps=1, clip_norm=0.5, seed=3)

    batch = next(draw_batches(PAIRS, 8, seed=3))[1]
    queries, passages = (copy.train()(**inputs) for inputs in tokenize_pairs(batch, tokenizer))
    loss = nn.functional.cross_entropy(queries @ passages.T / 0.05, torch.arange(8))
    grads = torch.autograd.grad(loss, list(copy.parameters()))
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
    assert record.loss == pytest.approx(loss.item(), rel=1e-12)
    assert record.gradient_norm == pytest.approx(norm, rel=1e-9)
    assert norm > 0.5  # so that clipping is part of the test
    for updated, before, grad in zip(encoder.parameters(), copy.parameters(), grads, strict=True):
        torch.testing.assert_close(updated, before - grad * 0.5 / (norm + 1e-6), rtol=1e-9, atol=1e-12)


def test_without_clipping_the_update_has_the_gradients_length(encoder, tokenizer):
    before = weights(encoder)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    (record,) = run(encoder, tokenizer, optimizer=optimizer, steps=1, clip_norm=None)
    assert (weights(encoder) - before).norm().item() == pytest.approx(record.gradient_norm, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        naive_step,
        functools.partial(accumulation_step, chunk_size=6),
        functools.partial(grad_cache_step, chunk_size=6),
    ],
    ids=["naive", "accumulation", "grad_cache"],
)
def test_every_step_trains(step, encoder, tokenizer):
    """36 pairs, seen over and over: the loss falls, and the passages are found."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    before = retrieval_metrics((encoder, encoder), PAIRS, tokenizer, ks=(1,))
    records = run(encoder, tokenizer, optimizer=optimizer, step=step, batch_size=12, steps=18)
    after = retrieval_metrics((encoder, encoder), PAIRS, tokenizer, ks=(1,))
    assert records[-1].loss < records[0].loss / 2
    assert after["top-1"] > before["top-1"] + 0.2


def test_the_cached_steps_losses_are_the_naive_ones_without_dropout(tokenizer):
    losses = []
    for step in (naive_step, functools.partial(grad_cache_step, chunk_size=3)):
        torch.manual_seed(5)
        encoder = Encoder.from_config("tiny", vocab_size=200, dropout=0.0).double()
        losses.append([record.loss for record in run(encoder, tokenizer, step=step, steps=6)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_the_same_seed_gives_the_same_weights_whatever_the_callers_generator(tokenizer):
    results = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(7)
        encoder = Encoder.from_config("tiny", vocab_size=200, dropout=0.3)
        torch.manual_seed(noise)
        run(encoder, tokenizer, seed=seed)
        results.append(weights(encoder))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_modes_generators_and_learning_rates_are_put_back(encoder, tokenizer):
    encoder.eval()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    state, modes = torch.get_rng_state(), []
    run(encoder, tokenizer, optimizer=optimizer, on_record=lambda record: modes.append(encoder.training))
    assert modes == [True] * 4
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_raising_from_on_record_stops_after_that_step(encoder, tokenizer):
    class Enough(Exception):
        pass

    seen = []

    def stop(record):
        seen.append((record.step, weights(encoder)))
        if record.step == 2:
            raise Enough

    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    encoder.eval()
    state = torch.get_rng_state()
    with pytest.raises(Enough):
        run(encoder, tokenizer, optimizer=optimizer, on_record=stop, steps=50)
    assert [step for step, _ in seen] == [1, 2]
    assert torch.equal(weights(encoder), seen[-1][1])
    assert not encoder.training
    assert torch.equal(torch.get_rng_state(), state)
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_it_reaches_the_weights(bad, encoder, tokenizer):
    before = weights(encoder)
    with pytest.raises(FloatingPointError, match="training stopped: the loss is"):
        run(encoder, tokenizer, loss_fn=lambda queries, passages: (queries * passages).sum() * bad)
    assert torch.equal(weights(encoder), before)


def without_seconds(records):
    return [dataclasses.replace(record, seconds=0.0) for record in records]


def test_a_training_goes_on_bit_for_bit_from_any_of_its_states(tokenizer):
    """36 pairs in batches of 10: stops after a full epoch, inside one, and before the first and after the last step."""
    encoder = Encoder.from_config("tiny", vocab_size=200, dropout=0.3)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    options = {"batch_size": 10, "steps": 7, "warmup_steps": 2}
    kept = [(TrainingState(), copy.deepcopy((encoder.state_dict(), optimizer.state_dict())))]

    def keep(state):
        kept.append((state, copy.deepcopy((encoder.state_dict(), optimizer.state_dict()))))

    whole = run(encoder, tokenizer, optimizer=optimizer, on_state=keep, **options)
    assert [(state.step, state.epoch, state.batch) for state, _ in kept] == [
        *((0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 1, 1), (5, 1, 2), (6, 1, 3), (7, 2, 1))
    ]
    end = weights(encoder)
    for state, (encoder_state, optimizer_state) in kept:
        encoder.load_state_dict(encoder_state)
        optimizer.load_state_dict(optimizer_state)
        optimizer.param_groups[0]["lr"] = 1e-2  # the state was kept inside the training, under the schedule's rate
        rest = run(encoder, tokenizer, optimizer=optimizer, start=state, **options)
        assert without_seconds(rest) == without_seconds(whole[state.step :])
        assert torch.equal(weights(encoder), end)
        assert all(record.seconds > state.seconds for record in rest)


@given(size=st.integers(1, 40), processes=st.integers(1, 40))
def test_the_ranks_rows_are_the_batchs_and_differ_by_one_at_most(size, processes):
    if processes > size:
        return
    shares = [range(size)[rows_of_rank(size, rank, processes)] for rank in range(processes)]
    assert [row for share in shares for row in share] == list(range(size))
    assert {len(share) for share in shares} <= {size // processes, size // processes + 1}
    assert sorted(map(len, shares), reverse=True) == [len(share) for share in shares]


def test_a_rank_is_given_its_own_rows_of_the_same_batch_and_its_own_dropout(encoder, tokenizer):
    seen = {}
    draws = set()

    def step(encoders, inputs, loss_fn):
        seen[rank] = inputs[0]["input_ids"]
        draws.add(torch.rand(1).item())
        return naive_step(encoders, inputs, loss_fn)

    for rank in range(3):
        (record,) = run(encoder, tokenizer, step=step, steps=1, rank=rank, world_size=3)
        assert record.examples == 8
    whole = tokenize_pairs(next(draw_batches(PAIRS, 8, seed=0))[1], tokenizer)[0]["input_ids"]
    rows = [row[row != 0].tolist() for rank in range(3) for row in seen[rank]]
    assert rows == [row[row != 0].tolist() for row in whole]
    assert [len(seen[rank]) for rank in range(3)] == [3, 3, 2]
    assert len(draws) == 3


def test_a_learnable_temperature_is_trained_with_the_encoder(encoder, tokenizer):
    loss_fn = ContrastiveLoss(0.05, learnable=True)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *loss_fn.parameters()], lr=1e-2)
    run(encoder, tokenizer, optimizer=optimizer, loss_fn=loss_fn)
    assert loss_fn.temperature.item() != pytest.approx(0.05, rel=1e-3)


def test_hard_negatives_reach_the_loss(encoder, tokenizer):
    pairs = [TextPair(pair.query, pair.passage, ("def other(): return 1",)) for pair in PAIRS]
    shapes = []

    def loss_fn(queries, passages):
        shapes.append((queries.shape[0], passages.shape[0]))
        return ContrastiveLoss()(queries, passages)

    run(encoder, tokenizer, pairs=pairs, loss_fn=loss_fn, steps=1)
    assert shapes == [(8, 16)]


def test_the_progress_bar_can_be_silenced(encoder, tokenizer, capsys):
    run(encoder, tokenizer, steps=1)
    assert capsys.readouterr().err == ""
    run(encoder, tokenizer, steps=1, progress=True)
    assert "training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": []}, "pairs must be a list of at least one TextPair"),
        ({"step": None}, "step must be callable, got 'NoneType'"),
        ({"loss_fn": 3}, "loss_fn must be callable, got 'int'"),
        ({"on_record": 3}, "on_record must be callable, got 'int'"),
        ({"on_state": 3}, "on_state must be callable, got 'int'"),
        ({"start": 3}, "start must be a TrainingState, got 'int'"),
        ({"start": TrainingState(step=5)}, "start must be of a step from 0 to 4, got 5"),
        ({"start": TrainingState(generators=(torch.zeros(1),) * 2)}, "start must hold the generators of cpu, got 2"),
        ({"rank": 1}, "rank must be below world_size, 1, got 1"),
        ({"world_size": 0}, "world_size must be an int of at least 1, got 0"),
        ({"world_size": 9}, "batch_size must give each of the 9 processes a row, got 8"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an int of at least 1, got 2.5"),
        ({"batch_size": 37}, "batch_size must be at most the number of pairs, 36, got 37"),
        ({"steps": 0}, "steps must be an int of at least 1, got 0"),
        ({"steps": True}, "steps must be an int of at least 1, got True"),
        ({"seed": -1}, "seed must be an int of at least 0, got -1"),
        ({"seed": None}, "seed must be an int"),
        ({"schedule": "cosine"}, "schedule must be one of 'linear', 'constant', got 'cosine'"),
        ({"warmup_steps": 5}, "warmup_steps must be at most the number of steps, 4, got 5"),
        ({"warmup_steps": -1}, "warmup_steps must be an int of at least 0, got -1"),
        ({"clip_norm": 0}, "clip_norm must be a finite number above 0, got 0"),
        ({"clip_norm": math.nan}, "clip_norm must be a finite number above 0, got nan"),
        ({"query_length": 1}, "query_length must leave room"),
        ({"optimizer": "adamw"}, "optimizer must be a torch optimizer, got 'str'"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, "optimizer must hold parameters of the encoders"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_and_nothing_changes(change, message, encoder, tokenizer):
    before, state = weights(encoder), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        run(encoder, tokenizer, **change)
    assert torch.equal(weights(encoder), before)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("encoders", [None, (), (len,), (len, len, len), (len, "text")])
def test_two_callables_are_asked_for(encoders, tokenizer):
    optimizer = torch.optim.SGD([torch.zeros(1)])
    with pytest.raises(ValueError, match="encoders"):
        train(encoders, PAIRS, tokenizer, len, step=len, batch_size=1, steps=1, optimizer=optimizer, seed=0)
