"""The picture of a walk: what is lit was measured, every moment can be drawn, and buttons stay inside the slider."""

import random
from html import unescape

import pytest
import torch
from helpers.page import alt_of
from matplotlib.patches import FancyBboxPatch

from gclib import ContrastiveLoss, Encoder, accumulation_step, grad_cache_step, naive_step
from gclib.course import plots
from gclib.course.widgets.walk import (
    GraphWalk,
    describe_moment,
    edges,
    plot_moment,
    plot_walk,
    row_name,
    sentence_of,
    states,
    table_of,
    title_of,
)
from gclib.memory.walk import AFTER, WHOLE, record_walk

STEPS = {
    "gradient cache": (grad_cache_step, {"chunk_size": 2, "verify": "never"}),
    "one retained": (grad_cache_step, {"chunk_size": 2, "retain_chunks": 1, "verify": "never"}),
    "naive": (naive_step, {}),
    "accumulation": (accumulation_step, {"chunk_size": 2}),
}


@pytest.fixture(scope="module")
def walks():
    torch.manual_seed(0)
    found = {}
    for name, (step, options) in STEPS.items():
        encoder = Encoder.from_config("tiny", vocab_size=50)
        inputs = [{"input_ids": torch.randint(5, 50, (4, 8))} for _ in range(2)]
        found[name] = record_walk(step, [encoder, encoder], inputs, ContrastiveLoss(), **options)
    return found


def every_moment(walks):
    for walk in walks.values():
        for index in range(len(walk.moments)):
            yield walk, index


def test_what_is_lit_was_measured(walks):
    for walk, index in every_moment(walks):
        moment, state = walk.moments[index], states(walk, index)
        remembered = {row for (kind, row), found in state.items() if kind == "graph" and found == "remembered"}
        assert remembered == {piece for piece in moment.graph_bytes if piece[0] is not None}
        assert (state["loss", WHOLE] == "remembered") == any(tower is None for tower, _ in moment.graph_bytes)
        assert (state["gradients", WHOLE] == "held") == (moment.kind_bytes["gradients"] > 0)
        for row in walk.rows:
            assert (state.get(("cache", row)) == "held") == (moment.kind_bytes["cache"] > 0)
        if moment.phase == "loss" and moment.piece == WHOLE:
            assert all(state["rep", row] == "held" for row in walk.rows)


def test_accumulation_shows_the_loss_its_own_chunk_only(walks):
    walk = walks["accumulation"]
    for index, moment in enumerate(walk.moments):
        if moment.phase == "loss":
            seen = {row for (kind, row), state in states(walk, index).items() if kind == "rep" and state == "held"}
            assert seen == {row for row in walk.rows if row[1] == moment.piece[1]}


def test_representations_are_gone_once_the_cache_is_there(walks):
    walk = walks["gradient cache"]
    index = [title_of(walk, n) for n in range(len(walk.moments))].index("the cache alone")
    state = states(walk, index)
    assert all(state["rep", row] == "gone" and state["cache", row] == "held" for row in walk.rows)
    assert edges(walk, index) == []


def test_a_step_without_a_cache_has_no_node_for_one(walks):
    kinds = {name: {kind for kind, _ in states(walk, 0)} for name, walk in walks.items()}
    assert "cache" not in kinds["naive"] | kinds["accumulation"]
    assert "cache" in kinds["gradient cache"] & kinds["one retained"]


def test_panels_share_one_legend_that_names_what_is_drawn(walks):
    for name, cached in (("naive", False), ("gradient cache", True)):
        figure, panels = plots.new_figure(1, 2)
        plot_walk(panels, walks[name], [0, 1])
        (legend,) = figure.legends
        named = [text.get_text() for text in legend.get_texts()]
        assert ("u, cached gradients" in named) == cached
        assert {"a graph in the encoder", "the loss's graph", "gradients going back"} <= set(named)


def test_edges_join_only_what_is_there(walks):
    for walk, index in every_moment(walks):
        state = states(walk, index)
        for start, end, kind in edges(walk, index):
            assert "gone" not in (state[start], state[end])
            assert kind != "remembered" or "remembered" in (state[start], state[end])


def test_gradients_go_back_from_the_cache_or_from_the_loss(walks):
    def sources(name, phase):
        walk = walks[name]
        found = set()
        for index, moment in enumerate(walk.moments):
            if moment.phase == phase:
                found |= {start[0] for start, end, kind in edges(walk, index) if kind == "backward"}
        return found

    assert sources("gradient cache", "replay") == {"cache", "graph"}
    assert sources("one retained", "backward") == {"cache", "graph"}
    assert sources("naive", "backward") == {"loss", "rep", "graph"}
    assert sources("gradient cache", "loss") == {"loss"}
    assert sources("naive", "loss") == sources("gradient cache", "first_forward") == set()


def test_every_moment_has_a_name_of_its_own_and_words(walks):
    for walk in walks.values():
        titles = [title_of(walk, index) for index in range(len(walk.moments))]
        assert len(set(titles)) == len(titles) and titles[-1] == "after the step"
        for index, title in enumerate(titles):
            said = describe_moment(walk, index)
            assert said.startswith(title) and sentence_of(walk, index) in said
        assert walk.moments[-1].phase == AFTER
    assert row_name((2, 0)) == "tower 3, chunk 1"


def test_the_table_has_a_row_for_each_moment(walks):
    for walk in walks.values():
        headings, rows = table_of(walk)
        assert len(rows) == len(walk.moments) and {len(row) for row in rows} == {len(headings)}


def test_the_words_of_every_box_can_be_read_on_its_colour(walks):
    for walk in walks.values():
        for index in range(len(walk.moments)):
            _, axes = plots.new_figure(1, 1)
            plot_moment(axes, walk, index)
            boxes = [patch for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
            assert len(boxes) == len(axes.texts) - len([text for text in axes.texts if not text.get_text()]) > 0
            for text in filter(lambda text: text.get_text(), axes.texts):
                x, y = text.get_position()
                (box,) = [b for b in boxes if b.get_x() < x < b.get_x() + b.get_width() and abs(middle(b) - y) < 1e-6]
                assert plots.contrast(text.get_color(), box.get_facecolor()) >= 4.5, text.get_text()


def middle(box):
    return box.get_y() + box.get_height() / 2


def test_moments_side_by_side_are_numbered_as_on_the_slider(walks):
    figure, panels = plots.new_figure(1, 3)
    plot_walk(panels, walks["naive"], [0, 2, 4])
    assert [axes.get_title(loc="left")[:2] for axes in panels] == ["1.", "3.", "5."]


@pytest.mark.slow
def test_next_and_previous_walk_to_the_ends_and_no_further(walks):
    widget = GraphWalk(walks)
    seen = [alt_of(widget)]
    assert widget.previous.disabled and not widget.next.disabled
    for _ in range(20):
        widget.next.click()
        seen.append(alt_of(widget))
    last = len(widget.walk.moments)
    assert widget.moment.value == last and widget.next.disabled and len(set(seen)) == last
    assert f"{last} of {last} · after the step" in widget.words.value
    for _ in range(20):
        widget.previous.click()
    assert widget.moment.value == 1 and alt_of(widget) == seen[0]


def test_another_step_starts_from_its_first_moment(walks):
    widget = GraphWalk(walks)
    widget.moment.value = 9
    widget.step.value = "naive"
    assert (widget.moment.value, widget.moment.max) == (1, 5)
    assert alt_of(widget) == describe_moment(walks["naive"], 0)
    widget.step.value = "accumulation"
    assert alt_of(widget) == describe_moment(walks["accumulation"], 0)


@pytest.mark.slow
def test_random_moves_never_raise_and_keep_words_and_picture_together(walks):
    widget, draw = GraphWalk(walks), random.Random(0)
    for _ in range(30):
        if draw.random() < 0.2:
            widget.step.value = draw.choice(list(walks))
        else:
            widget.moment.value = draw.randint(1, widget.moment.max)
        assert alt_of(widget) == describe_moment(widget.walk, widget.moment.value - 1)
        assert title_of(widget.walk, widget.moment.value - 1) in unescape(widget.words.value)


@pytest.mark.parametrize("walks", [{}, {"naive": "a walk"}])
def test_without_a_walk_there_is_no_widget(walks):
    with pytest.raises(ValueError, match="walks must hold a Walk for each name"):
        GraphWalk(walks)
