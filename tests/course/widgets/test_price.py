"""The price on sliders: what is drawn is the step's own plan, predictions are the cost model's, moves never raise."""

import random
from html import unescape

import pytest
import torch
from helpers.page import alt_of

from gclib.course import plots
from gclib.course.widgets.price import (
    BATCH,
    CHUNKS,
    LONGEST,
    SPREADS,
    PriceLab,
    PriceSettings,
    lengths_of,
    plan_of,
    plot_plan,
    random_tokens,
    spread_lengths,
)
from gclib.memory.flops import count_tokens


@pytest.fixture(scope="module")
def shared():
    return PriceLab()


@pytest.fixture
def lab(shared):
    """One lab for all tests, put back to where it starts."""
    shared.chunk_size.value, shared.spread.value, shared.sort.value, shared.retain.value = 8, 0.5, True, 0
    return shared


def test_lengths_are_always_the_same_and_as_unlike_as_asked():
    assert spread_lengths(5, 0.0, median=9, longest=20) == [9] * 5
    one, other = (spread_lengths(64, 0.75, median=20, longest=64) for _ in range(2))
    assert one == other and one != sorted(one)
    widths = [max(spread_lengths(64, s, median=20, longest=64)) for s in SPREADS]
    assert widths == sorted(widths) and widths[-1] == 64
    assert 2 <= min(one) < 20 < max(one) <= 64


@pytest.mark.parametrize("spread", [-0.1, float("nan")])
def test_a_spread_below_zero_is_refused(spread):
    with pytest.raises(ValueError, match="spread must be at least 0"):
        spread_lengths(4, spread, median=9, longest=20)


def test_the_plan_holds_every_row_once_and_keeps_the_largest_chunks():
    plans, kept = plan_of(PriceSettings(chunk_size=8, retain_chunks=3, spread=0.75))
    for plan in plans:
        assert sorted(row for chunk in plan for row in chunk.rows) == list(range(BATCH))
    tokens = sorted((chunk.tokens for plan in plans for chunk in plan), reverse=True)
    assert sorted((plans[tower][chunk].tokens for tower, chunk in kept), reverse=True) == tokens[:3]


def test_random_tokens_are_as_long_as_asked():
    batch = random_tokens([3, 5, 1])
    assert batch["input_ids"].shape == (3, 5) and batch["attention_mask"].sum(dim=1).tolist() == [3, 5, 1]
    assert torch.equal(batch["input_ids"] != 0, batch["attention_mask"] == 1)


def test_equal_lengths_cost_four_thirds_sorted_or_not(lab):
    for sort in (True, False):
        price = lab.predict(PriceSettings(8, 0, 0.0, sort))
        assert price.tokens.time_ratio == pytest.approx(4 / 3) and price.flops_ratio == pytest.approx(4 / 3, rel=1e-3)
    every = lab.predict(PriceSettings(8, 16, 0.0, True))
    assert every.tokens.time_ratio == every.flops_ratio == 1.0


def test_sorting_and_retaining_make_it_cheaper(lab):
    plain, by_length, kept = (
        lab.predict(PriceSettings(8, retained, 0.75, sort)).flops_ratio
        for retained, sort in ((0, False), (0, True), (4, True))
    )
    assert plain > 1.3 > 0.8 > by_length > kept


def test_the_picture_has_a_rectangle_for_each_chunk_its_kept_ones_named():
    settings = PriceSettings(chunk_size=16, retain_chunks=2, spread=0.75)
    plans, kept = plan_of(settings)
    figure, axes = plots.new_figure()
    plot_plan(axes, lengths_of(settings)[1], plans[1], [chunk for tower, chunk in kept if tower], name="passages")
    shapes = [(patch.get_width(), patch.get_height()) for patch in axes.patches]
    for chunk in plans[1]:
        assert shapes.count((chunk.width, len(chunk))) >= 2  # padding, and outline
    assert shapes[-1] == (max(lengths_of(settings)[1]), BATCH)  # the naive step's frame
    assert [text.get_text() for text in axes.texts] == ["kept"] * sum(tower for tower, _ in kept)


def test_words_picture_and_prediction_say_the_same(lab):
    lab.spread.value, lab.retain.value = 0.75, 2
    tokens = count_tokens(lengths_of(lab.settings()), chunk_size=8, retain_chunks=2)
    said = f"time {tokens.time_ratio:.2f} of the padded naive step's"
    for text in (unescape(lab.words.value), alt_of(lab), lab.table()):
        assert said in text
    assert 'role="status" aria-live="polite"' in lab.words.value and 'aria-live="polite"' in lab.status.value
    assert f"{tokens.encoded:,} of {tokens.padded:,} padded tokens" in alt_of(lab)


def test_bigger_chunks_leave_fewer_to_retain(lab):
    lab.spread.value, lab.retain.value = 0, 16  # all rows alike: chunks are cut evenly
    lab.chunk_size.value = 64
    assert (lab.retain.max, lab.retain.value) == (2, 2)
    assert "queries: 1 chunk," in alt_of(lab) and lab.predict().tokens.retained_share == 1.0
    lab.chunk_size.value = 4
    assert (lab.retain.max, lab.retain.value) == (32, 2) and "queries: 16 chunks," in alt_of(lab)


def test_unlike_lengths_make_more_chunks_and_sorting_off_makes_them_even(lab):
    lab.chunk_size.value, lab.spread.value = 64, 1
    assert lab.retain.max == sum(map(len, plan_of(lab.settings())[0])) > 2
    lab.retain.value = lab.retain.max
    assert lab.predict().tokens.retained_share == 1.0
    lab.sort.value = False
    assert (lab.retain.max, lab.retain.value) == (2, 2) and lab.predict().tokens.retained_share == 1.0


@pytest.mark.slow
def test_random_moves_never_raise_and_keep_words_and_picture_together(lab):
    draw = random.Random(0)
    for _ in range(15):
        which = draw.randrange(4)
        if which == 0:
            lab.chunk_size.value = draw.choice(CHUNKS)
        elif which == 1:
            lab.retain.value = draw.randint(0, lab.retain.max)
        elif which == 2:
            lab.spread.value = draw.choice(SPREADS)
        else:
            lab.sort.value = not lab.sort.value
        assert alt_of(lab) == lab.describe()


@pytest.mark.slow
def test_measuring_counts_the_forecast_flops_and_is_remembered(lab, monkeypatch):
    monkeypatch.setattr("gclib.course.widgets.price.ROUNDS", 1)
    lab.spread.value, lab.chunk_size.value, lab.retain.value = 1.0, 32, 1
    state = torch.get_rng_state()
    lab.measure.click()
    found = lab.measured[lab.settings()]
    assert found.flops_ratio == lab.predict().flops_ratio and found.time_ratio > 0
    assert "Measured here: time" in lab.status.value and not lab.measure.disabled
    assert torch.equal(torch.get_rng_state(), state)
    assert "FLOPs, predicted" in lab.table()
    lab.retain.value = 0
    assert "Not measured with these settings" in lab.status.value
    lab.retain.value = 1
    assert "Measured here" in lab.status.value


def test_a_measurement_that_fails_is_told_in_words(lab, monkeypatch):
    def fails(*_):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr("gclib.course.widgets.price.count_flops", fails)
    lab.measure.click()
    assert "Not measured: not enough memory" in lab.status.value and not lab.measure.disabled


def test_every_control_has_a_label(lab):
    for control in (lab.chunk_size, lab.retain, lab.spread, lab.sort, lab.measure):
        assert control.description


def test_the_widest_lengths_are_cut_at_the_longest(lab):
    assert [max(lengths) for lengths in lengths_of(PriceSettings(spread=1.0))] == list(LONGEST)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"chunk_size": 5}, "chunk_size must be one of"),
        ({"spread": 0.3}, "spread must be one of"),
        ({"retain_chunks": 17}, "retain_chunks must be at most the 16 chunks"),
        ({"retain_chunks": -1}, "retain_chunks must be an int of at least 0"),
    ],
)
def test_a_start_that_is_no_position_of_the_controls_is_refused(start, message):
    with pytest.raises(ValueError, match=message):
        PriceLab(**start)
