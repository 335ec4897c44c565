"""The tile lab: its laws are the ledger's bytes, what is drawn is what is told, moves never raise."""

import random

import pytest
import torch
from helpers.allocator import allocator_peak
from helpers.page import alt_of

from gclib.course import plots
from gclib.course.widgets.tiles import (
    BATCHES,
    CHUNK_ROWS,
    DIMENSIONS,
    ENCODER,
    MOST_DRAWN,
    TILES,
    TOKENS,
    TileLab,
    TileSettings,
    dense_loss_bytes,
    forecast_loss,
    loss_and_backward,
    losses_of,
    measured_loss_bytes,
    obstacle,
    plot_tiles,
    random_reps,
    tiled_loss_bytes,
)
from gclib.losses.module import ContrastiveLoss
from gclib.memory.forecast import forecast_step

SHAPES = [(1024, 64, 64), (1500, 32, 128), (512, 64, 512), (300, 16, 1024), (1100, 48, 64), (1024, 256, 256)]


@pytest.fixture(scope="module")
def shared():
    return TileLab()


@pytest.fixture
def lab(shared):
    """One lab for all tests, put back to where it starts."""
    shared.measured.clear()
    shared.batch.value, shared.tile.value, shared.dimensions.value, shared.symmetric.value = 32_768, 1024, 768, True
    return shared


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("batch", "dimensions", "tile"), SHAPES)
def test_the_laws_are_the_ledgers_bytes(batch, dimensions, tile, symmetric):
    settings = TileSettings(batch, tile, dimensions, symmetric)
    reps, losses = random_reps(batch, dimensions), losses_of(settings)
    dense = dense_loss_bytes(batch, symmetric=symmetric)
    tiled = tiled_loss_bytes(batch, dimensions, tile, symmetric=symmetric)
    assert measured_loss_bytes(losses["dense"], reps) == dense
    assert measured_loss_bytes(losses["tiled"], reps) == pytest.approx(tiled, rel=0.01)


@pytest.mark.parametrize("name", ["dense", "tiled"])
def test_the_allocator_says_the_same(name):
    settings = TileSettings(1024, 128, 64, True)
    reps, loss_fn = random_reps(1024, 64), losses_of(settings)[name]
    law = {"dense": dense_loss_bytes(1024, symmetric=True), "tiled": tiled_loss_bytes(1024, 64, 128, symmetric=True)}
    loss_and_backward(loss_fn, reps)
    for rep in reps:
        rep.grad = None
    assert allocator_peak(lambda: loss_fn(*reps).backward()) == pytest.approx(law[name], rel=0.02)


@pytest.mark.parametrize("batch", [256, 8192, 2**17])
def test_the_peak_is_the_steps_forecast(batch):
    loss, length = ContrastiveLoss(symmetric=True), {"query_length": TOKENS, "passage_length": TOKENS}
    given = {"config": ENCODER, "batch_size": batch, "chunk_size": CHUNK_ROWS}
    expected = forecast_step("grad_cache", loss=loss, **given, **length).peak_bytes
    peak = forecast_loss(TileSettings(batch, 1024, 768, True)).peak(tiled=False)
    assert peak == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("tile", [2**13, 2**15])  # the peak is the replay, or the loss
def test_the_tiled_peak_is_the_steps_forecast(tile):
    loss, length = ContrastiveLoss(symmetric=True, tile_size=tile), {"query_length": TOKENS, "passage_length": TOKENS}
    given = {"config": ENCODER, "batch_size": 2**16, "chunk_size": CHUNK_ROWS}
    expected = forecast_step("grad_cache", loss=loss, **given, **length).peak_bytes
    peak = forecast_loss(TileSettings(2**16, tile, 768, True)).peak(tiled=True)
    assert peak == pytest.approx(expected, rel=0.01)


def test_dense_grows_with_the_square_and_tiled_with_the_batch():
    assert dense_loss_bytes(2**20) == pytest.approx(4**5 * dense_loss_bytes(2**15), rel=1e-6)
    growth = tiled_loss_bytes(2**20, 768, 64) / tiled_loss_bytes(2**19, 768, 64)
    assert growth == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dense_loss_bytes(0), "batch_size must be an int of at least 1"),
        (lambda: tiled_loss_bytes(8, 0, 4), "dimensions must be an int of at least 1"),
        (lambda: tiled_loss_bytes(8, 4, 2.5), "tile_size must be an int of at least 1"),
        (lambda: TileLab(batch_size=1000), "batch_size must be one of"),
        (lambda: TileLab(tile_size=100), "tile_size must be one of"),
        (lambda: TileLab(dimensions=3), "dimensions must be one of"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_lab_tells_what_it_draws(lab):
    found = lab.forecast()
    assert alt_of(lab) == lab.describe() and "32 x 32 tiles" in lab.describe()
    assert "does not fit" not in lab.words.value and 'aria-live="polite"' in lab.words.value
    lab.batch.value = 1024
    lab.dimensions.value = 1024
    assert "which is more" in lab.words.value  # two tiles as large as the square, and the gradients
    lab.dimensions.value, lab.batch.value = 768, 2**20
    assert found.dense < lab.forecast().dense and "16.0 TiB" in lab.words.value
    assert "dense 16.0 TiB, which does not fit; tiled 14.5 GiB, which fits" in lab.words.value
    assert "1,048,576" in lab.table() and alt_of(lab) == lab.describe()
    lab.batch.value, lab.tile.value = 1024, 512
    assert "takes 11.0 MiB, 69 % of that" in lab.words.value


@pytest.mark.slow
def test_random_moves_never_raise_and_keep_words_and_picture_together(lab):
    draw = random.Random(0)
    controls = ((lab.batch, BATCHES), (lab.tile, TILES), (lab.dimensions, DIMENSIONS), (lab.symmetric, (True, False)))
    for _ in range(12):
        control, values = draw.choice(controls)
        control.value = draw.choice(values)
        assert alt_of(lab) == lab.describe()


@pytest.mark.slow
def test_measuring_counts_bytes_and_flops_and_is_remembered(lab, monkeypatch):
    monkeypatch.setattr("gclib.course.widgets.tiles.ROUNDS", 1)
    lab.dimensions.value, lab.tile.value, lab.batch.value = 64, 256, 1024
    state = torch.get_rng_state()
    lab.measure.click()
    found = lab.measured[lab.settings()]
    assert found.dense_bytes == lab.forecast().dense and found.time_ratio > 0
    assert found.tiled_bytes == pytest.approx(lab.forecast().tiled, rel=0.01)
    assert found.flops_ratio == pytest.approx(8 / 6)
    assert "Measured here: dense" in lab.status.value and not lab.measure.disabled
    assert torch.equal(torch.get_rng_state(), state) and "tiled, forecast" in lab.table()
    lab.tile.value = 512
    assert "Not measured with these settings" in lab.status.value


def test_what_is_too_big_is_refused_in_words_and_nothing_runs(lab, monkeypatch):
    monkeypatch.setattr("gclib.course.widgets.tiles.measure", lambda settings: pytest.fail("it ran"))
    lab.measure.click()
    assert "Not run: at B = 32,768 the dense loss would take 16.0 GiB" in lab.status.value
    assert "are free here" in obstacle(TileSettings(4096), free_bytes=2**20)
    assert obstacle(TileSettings(4096), free_bytes=2**33) is None


def test_a_measurement_that_fails_is_told_in_words(lab, monkeypatch):
    def fails(_):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr("gclib.course.widgets.tiles.measure", fails)
    lab.batch.value = 1024
    lab.measure.click()
    assert "Not measured: not enough memory" in lab.status.value and not lab.measure.disabled


def test_an_interrupted_measurement_is_told(lab, monkeypatch):
    def stopped(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("gclib.course.widgets.tiles.measure", stopped)
    lab.batch.value = 1024
    lab.measure.click()
    assert "Interrupted" in lab.status.value and not lab.measure.disabled and not lab.measured


def test_every_control_has_a_label(lab):
    for control in (lab.batch, lab.tile, lab.dimensions, lab.symmetric, lab.measure):
        assert control.description


@pytest.mark.parametrize(("batch", "tile", "drawn"), [(1024, 8192, 1), (1024, 256, 4), (2**20, 64, MOST_DRAWN)])
def test_as_many_tiles_are_drawn_as_there_are_up_to_a_limit(batch, tile, drawn):
    _, axes = plots.new_figure()
    plot_tiles(axes, TileSettings(batch, tile, 64, symmetric=False))
    assert len(axes.patches) == drawn**2 + 2  # the tile that is alive, and the sums of the rows
