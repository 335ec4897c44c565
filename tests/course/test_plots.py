"""Pictures: the data that is drawn, and what is put on the axes. Never pixels."""

import io
import re
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from gclib.course import plots
from gclib.memory.forecast import forecast_step
from gclib.memory.ledger import KINDS, Segment
from gclib.memory.timeline import COLUMNS, largest_kinds, picture_of
from gclib.support.words import format_bytes, unit_for


def segment(phase, totals, *, tower=0, chunk=None, rows=None, repeats=1, net=0):
    """A piece whose activations go through `totals`, with a net growth in the cache."""
    held = np.zeros((len(totals), len(KINDS)), dtype=np.int64)
    held[:, KINDS.index("activations")] = totals
    growth = np.zeros(len(KINDS), dtype=np.int64)
    growth[KINDS.index("cache")] = net
    return Segment(phase, tower, chunk, rows, repeats, held, growth)


def forecast(step, batch_size, chunk_size, length=12):
    lengths = {"query_length": length, "passage_length": length}
    return forecast_step(step, config="tiny", batch_size=batch_size, chunk_size=chunk_size, **lengths)


# --- the timeline as data -------------------------------------------------------------------------------------


def test_the_highest_point_of_a_picture_is_the_peak_of_the_step_to_the_byte():
    for step, batch_size, chunk_size in [
        *(("naive", size, None) for size in (2, 7)),
        *(("accumulation", 9, size) for size in (1, 2, 3, 9)),
        *(("grad_cache", size, chunk) for size in (9, 40) for chunk in (1, 2, 4, 9)),
    ]:
        found = forecast(step, batch_size, chunk_size)
        picture = picture_of(found.timeline)
        assert picture.peak_bytes == found.peak_bytes
        assert picture.at_peak() == found.at_peak()
        assert max(peak for _, peak in picture.span_peaks()) == found.peak_bytes


def test_a_run_of_equal_pieces_is_first_between_and_last():
    picture = picture_of([segment("first_forward", [5, 9, 6], repeats=100, net=2)])
    first, between, last = picture.panels
    assert (first.pieces, between.pieces, last.pieces) == (range(1), range(1, 99), range(99, 100))
    assert (first.between, between.between, last.between) == (False, True, False)
    assert first.kind_bytes.sum(axis=1).tolist() == [5, 9, 6]
    assert last.kind_bytes.sum(axis=1).tolist() == [5 + 198, 9 + 198, 6 + 198]
    peaks = between.kind_bytes.sum(axis=1)
    assert peaks[0] == 9 + 2 and peaks[-1] == 9 + 2 * 98 and (np.diff(peaks) >= 0).all()
    assert [span.label for span in picture.spans] == ["forward\nqueries × 100"]


@pytest.mark.parametrize(("repeats", "panels"), [(1, 1), (2, 2), (3, 3), (10**6, 3)])
def test_a_picture_does_not_grow_with_the_batch(repeats, panels):
    picture = picture_of([segment("replay", range(1, 900), repeats=repeats)])
    assert len(picture.panels) == panels
    assert len(picture.kind_bytes) <= COLUMNS + 3 * 8


def test_panels_stand_side_by_side_from_0_to_1():
    picture = picture_of(forecast("grad_cache", 40, 4).timeline)
    assert picture.panels[0].start == 0 and picture.panels[-1].stop == 1
    assert all(before.stop == after.start for before, after in pairwise(picture.panels))
    assert (np.diff(picture.edges) > 0).all()
    assert len(picture.edges) == len(picture.kind_bytes) + 1
    assert all(span.stop > span.start for span in picture.spans)


def test_a_short_phase_can_still_be_seen():
    picture = picture_of([segment("replay", range(1, 20_000)), segment("loss", [3, 4], tower=None)])
    assert picture.panels[1].stop - picture.panels[1].start > 0.03


def test_thinning_keeps_the_highest_column_and_kinds_that_add_up():
    totals = np.random.default_rng(0).integers(1, 1000, 5000)
    picture = picture_of([segment("replay", totals)])
    assert picture.peak_bytes == totals.max()
    assert set(picture.kind_bytes.sum(axis=1)) <= set(totals)


def test_phases_are_named_in_order():
    labels = [span.label for span in picture_of(forecast("grad_cache", 20, 4).timeline).spans]
    first, second = "first forward\n{} × 5", "second forward\nand backward\n{} × 5"
    towers = ("queries", "passages")
    assert labels == [*map(first.format, towers), "loss", *map(second.format, towers)]
    labels = [span.label for span in picture_of(forecast("naive", 20, None).timeline).spans]
    assert labels == ["forward\nqueries", "forward\npassages", "loss", "backward"]


def test_accumulation_is_drawn_chunk_by_chunk_with_a_short_last_one():
    labels = [span.label for span in picture_of(forecast("accumulation", 23, 4).timeline).spans]
    assert labels == ["chunk 1", "chunk 2", "… × 2", "chunk 5", "chunk 6"]


def test_every_piece_of_a_step_has_its_place():
    for step, pieces in (("grad_cache", 5), ("accumulation", 5)):
        picture = picture_of(forecast(step, 20, 4).timeline)
        for phase in ("first_forward", "replay" if step == "grad_cache" else "backward"):
            tower = 1 if phase in ("first_forward", "replay") else None
            places = [picture.place(phase, tower, piece) for piece in range(pieces)]
            assert None not in places
            assert [place.start for place in places] == sorted(place.start for place in places)
        assert picture.place("first_forward", 1, pieces) is None
    assert picture.place("replay", 7, 0) is None


def test_an_empty_timeline_is_refused():
    with pytest.raises(ValueError, match="timeline must hold at least one piece"):
        picture_of([])


def test_the_largest_kinds_come_first_and_small_ones_are_left_out():
    assert largest_kinds({"loss": 10, "cache": 85, "other": 4, "inputs": 1}) == [("cache", 85), ("loss", 10)]
    assert largest_kinds({"loss": 0}) == []


# --- on the axes ----------------------------------------------------------------------------------------------


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


def drawn(**options):
    figure, axes = plots.new_figure()
    picture = plots.plot_timeline(axes, forecast("grad_cache", 20, 4).timeline, **options)
    return axes, picture


def test_the_axis_has_a_unit_and_the_peak_is_named():
    axes, picture = drawn()
    assert axes.get_ylabel() == f"live bytes ({unit_for(picture.peak_bytes)[0]})"
    assert f"peak {format_bytes(picture.peak_bytes)}" in texts_of(axes)
    assert axes.get_ylim()[1] * unit_for(picture.peak_bytes)[1] > picture.peak_bytes


def test_areas_are_labelled_in_the_order_of_the_stack():
    axes, _ = drawn()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == sorted(labels, key=KINDS.index, reverse=True)


def test_a_card_near_the_peak_is_a_line_and_a_far_one_is_told_in_words():
    _, picture = drawn()
    near, far = int(1.4 * picture.peak_bytes), 50 * picture.peak_bytes
    axes, _ = drawn(card_bytes=near, card_name="a card")
    size = unit_for(picture.peak_bytes)[1]
    assert any(np.allclose(line.get_ydata(), near / size) for line in axes.lines)
    assert f"a card: {format_bytes(near)}" in texts_of(axes)
    axes, _ = drawn(card_bytes=far, card_name="a card")
    assert not any(np.allclose(line.get_ydata(), far / size) for line in axes.lines)
    assert any("50 times the peak" in text for text in texts_of(axes))


def test_a_live_line_above_the_forecast_stays_inside_the_picture():
    _, picture = drawn()
    axes, _ = drawn(live=(np.array([0.1, 0.5]), np.array([1.0, 3.0 * picture.peak_bytes])))
    assert axes.get_ylim()[1] * unit_for(3 * picture.peak_bytes)[1] > 3 * picture.peak_bytes


def test_the_words_for_a_timeline_hold_phases_peak_and_card():
    _, picture = drawn()
    words = plots.describe_timeline(picture, card_bytes=2**30, card_name="a card")
    assert "first forward queries × 5" in words and format_bytes(picture.peak_bytes) in words
    assert words.endswith("It fits within a card (1.00 GiB).")
    assert "does not fit within a card" in plots.describe_timeline(picture, card_bytes=1, card_name="a card")


def test_bars_are_as_long_as_the_peaks_and_divided_by_kind():
    peaks = {"one": {"loss": 3 * 2**20, "cache": 2**20}, "two": {"activations": 8 * 2**20}}
    figure, axes = plots.new_figure()
    plots.plot_peaks(axes, peaks, card_bytes=6 * 2**20, card_name="a card")
    lengths = {(round(bar.get_y() + bar.get_height() / 2), round(bar.get_width(), 6)) for bar in axes.patches}
    assert {(0, 1.0), (0, 3.0), (1, 8.0)} <= lengths
    assert {"4.00 MiB", "8.00 MiB", "a card: 6.00 MiB"} <= set(texts_of(axes))
    assert axes.get_xlabel() == "peak of live bytes (MiB)"


# --- the one style --------------------------------------------------------------------------------------------


def test_every_kind_has_a_look_of_its_own():
    for looks in (plots.COLORS, plots.HATCHES, plots.LINE_STYLES):
        assert set(looks) == set(KINDS)
    assert len({(plots.COLORS[kind], plots.HATCHES[kind]) for kind in KINDS}) == len(KINDS)
    assert set(plots.COLORS.values()) <= set(plots.OKABE_ITO.values())


def test_the_style_is_put_back_and_importing_changed_nothing():
    before = dict(matplotlib.rcParams)
    with plots.style():
        assert matplotlib.rcParams["figure.facecolor"] == plots.PAPER
    assert dict(matplotlib.rcParams) == before


def test_a_picture_is_opaque_and_white_in_its_corners():
    figure, axes = plots.new_figure()
    axes.plot([0, 1])
    image = np.asarray(Image.open(io.BytesIO(plots.to_png(figure))).convert("RGBA"))
    assert (image[..., 3] == 255).all()
    assert all((image[y, x, :3] == 255).all() for y in (0, -1) for x in (0, -1))


def test_show_displays_an_image_with_alt_text_and_no_open_figure(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append((data, raw)))
    figure, axes = plots.new_figure()
    axes.plot([0, 1])
    plots.show(figure, 'A line from 0 to 1, "straight".')
    ((data, raw),) = shown
    assert raw and data["text/plain"] == 'Figure: A line from 0 to 1, "straight".'
    assert re.search(r'<img alt="A line from 0 to 1, &quot;straight&quot;\." .*src="data:image/png', data["text/html"])


@pytest.mark.parametrize("alt", ["", "   ", None, "plot"])
def test_a_picture_without_words_is_refused(alt):
    with pytest.raises(ValueError, match="alt must say in words what the picture shows"):
        plots.show(Figure(), alt)


def test_contrast_of_known_pairs():
    assert plots.contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert plots.contrast("#FFFFFF", "#767676") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("color", plots.OKABE_ITO.values())
def test_the_ink_of_a_colour_can_be_read_and_dark_colours_stay(color):
    assert plots.contrast(plots.ink_of(color), plots.PAPER) >= 4.5
    if plots.contrast(color, plots.PAPER) >= 4.5:
        assert plots.ink_of(color) == color.lower()
