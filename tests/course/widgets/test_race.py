"""The race on buttons: it trains what was chosen, stops when asked, and says the same in words, text and picture."""

from html import unescape

import pytest
import torch
from helpers.page import alt_of

from gclib.course import plots
from gclib.course.experiments import results
from gclib.course.experiments.recipes import RECIPES, TableSetting
from gclib.course.widgets import race as race_widget
from gclib.course.widgets.race import Curve, LiveRace, RaceLab, plot_race
from gclib.data.pairs import TextPair

TINY = TableSetting(
    train_pairs=512, test_pairs=40, epochs=1, size="tiny", vocab_size=200, query_length=8, passage_length=8
)
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A corpus of numbers in words."""

    def load(split, *, limit, progress):
        numbers = range(1_000) if split == "train" else range(1_000, 1_100)
        spelled = [" ".join(WORDS[int(digit)] for digit in str(number)) for number in numbers]
        return [TextPair(f"the number {text}", f"def {text}") for text in spelled][:limit]

    monkeypatch.setattr(results, "load_pairs", load)
    monkeypatch.setattr(race_widget, "REDRAW_SECONDS", 0.05)
    results._texts.cache_clear()
    results._all_pairs.cache_clear()
    yield
    results._texts.cache_clear()
    results._all_pairs.cache_clear()


def test_a_race_looks_at_every_row_and_leaves_the_generators_alone():
    state = torch.get_rng_state()
    race = LiveRace(RECIPES[2:], TINY, 0)
    assert not race.total  # not known, and not told, before the texts are read
    assert race.run() == "finished" and race.done == race.total == 1_024
    cached, larger = race.curves.values()
    assert cached.examples == [128, 256, 384, 512] and larger.examples == [512]
    for curve in (cached, larger):
        assert len(curve.top1) == len(curve.excess) == len(curve.examples)
        assert all(0 <= share <= 100 for share in curve.top1)
    assert abs(cached.excess[0]) < 2 and cached.excess[-1] < cached.excess[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_last_look_is_what_the_experiment_finds():
    race = LiveRace(RECIPES[2:3], TINY, 1)
    race.run()
    result = results.run(RECIPES[2], TINY, seed=1)
    assert race.curves[RECIPES[2].name].top1[-1] == pytest.approx(100 * result.metrics["top-1"])


def test_stop_ends_it_after_a_step():
    race = LiveRace(RECIPES[:1], TINY, 0)
    race.stop()
    assert race.run() == "stopped" and race.done == 8


def test_what_goes_wrong_is_told(monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(race_widget, "train_encoder", fails)
    lab = RaceLab(setting=TINY, recipes=RECIPES[2:])
    lab.train.click()
    lab.wait()
    assert "The race failed: RuntimeError: no memory left" in lab.status.value
    assert not lab.train.disabled and lab.stop.disabled


def test_train_on_the_buttons():
    lab = RaceLab(setting=TINY, recipes=RECIPES[2:])
    assert "No race" in lab.describe() and "No race" in lab.table() and race_widget.READY in unescape(lab.status.value)
    lab.choices[1].value = False
    lab.train.click()
    lab.wait()
    assert lab.live.ending == "finished" and list(lab.live.curves) == [RECIPES[2].name]
    assert (lab.progress.value, lab.progress.max) == (512, 512)
    alt = alt_of(lab)
    assert alt == lab.describe() and alt in unescape(lab.status.value) and alt in lab.table()
    assert "after 512 queries" in alt
    assert 'role="status" aria-live="polite"' in lab.status.value
    assert len(lab.table().splitlines()) == 4 + len(lab.live.curves[RECIPES[2].name].examples)
    assert not lab.train.disabled and lab.stop.disabled


def test_the_buttons_stop_a_race_and_need_a_row():
    lab = RaceLab(setting=TINY, recipes=RECIPES[:2])
    for box in lab.choices:
        box.value = False
    lab.train.click()
    assert lab.live is None and "Choose at least one row" in lab.status.value
    lab.choices[0].value, lab.epochs.value, lab.seed.value = True, 8, 3
    lab.train.click()
    lab.stop.click()
    lab.wait()
    assert lab.live.ending == "stopped" and lab.live.setting.epochs == 8 and lab.live.seed == 3
    assert "has stopped" in lab.status.value and lab.live.done < lab.live.total


def test_the_picture_has_a_marked_line_for_every_row_that_has_points():
    curves = {"one": Curve([8, 16], [1.0, 2.0], [0.0, -1.0]), "two": Curve([16], [3.0], [-0.5, -0.7]), "none": Curve()}
    figure, panels = plots.new_figure(1, 2)
    with plots.style():
        plot_race(panels, curves)
    for axes in panels:
        lines = [line for line in axes.lines if line.get_marker() != "None"]
        assert [line.get_label() for line in lines] == ["one", "two"]
        assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 2
    assert list(panels[1].lines[1].get_ydata()) == [-0.5]


def test_every_control_has_a_label():
    lab = RaceLab(setting=TINY)
    for control in (*lab.choices, lab.seed, lab.epochs, lab.train, lab.stop):
        assert control.description


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"recipes": ()}, "recipes must be at least one"),
        ({"recipes": RECIPES[:1] * 2}, "recipes must be at least one, with different names"),
        ({"seed": 10}, "seed must be from 0 to 9"),
        ({"seed": -1}, "seed must be an int of at least 0"),
        ({"setting": TableSetting(epochs=9)}, "setting must have from 1 to 8 epochs"),
    ],
)
def test_a_start_that_is_no_position_of_the_controls_is_refused(start, message):
    with pytest.raises(ValueError, match=message):
        RaceLab(**start)
