"""The animation of a step: what is lit and what moves was measured, and the page is told Python's numbers."""

import json
import re
import subprocess
from html import unescape

import pytest
import torch
from helpers.node import node
from matplotlib.patches import Rectangle

from gclib import ContrastiveLoss, Encoder, accumulation_step, grad_cache_step, naive_step
from gclib.course.widgets.walk import (
    HERE,
    GraphWalk,
    StepView,
    describe_moment,
    edges,
    figure_of,
    going_back,
    moves,
    page_of,
    row_name,
    sentence_of,
    states,
    table_of,
    title_of,
)
from gclib.memory.ledger import KINDS
from gclib.memory.walk import AFTER, WHOLE, record_walk
from gclib.support.words import format_bytes

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


@pytest.mark.parametrize("name", STEPS)
def test_each_row_gives_its_part_of_the_gradient_once(walks, name):
    walk, given = walks[name], []
    for index, moment in enumerate(walk.moments):
        parts = {row: state for (kind, row), state in states(walk, index).items() if kind == "part"}
        assert {row for row, state in parts.items() if state == "held"} == set(given)
        assert bool(given) <= (moment.kind_bytes["gradients"] > 0)
        given += going_back(walk, index)
    assert sorted(given) == sorted(walk.rows) and set(parts.values()) == {"held"}


def moved(walk, phase):
    """From and to of what moves in the first moment of a phase, in order."""
    index = next(n for n, moment in enumerate(walk.moments) if moment.phase == phase and moment.piece != WHOLE)
    return [(start[0], end[0]) for start, end, _ in moves(walk, index)], walk.moments[index].piece


def test_what_moves_goes_in_order_and_belongs_to_the_moments_own_rows(walks):
    cached = walks["gradient cache"]
    assert moved(cached, "first_forward")[0] == [("text", "graph"), ("graph", "rep")]
    assert moved(cached, "replay")[0] == [("text", "graph"), ("graph", "rep"), ("cache", "graph"), ("graph", "part")]
    assert moved(walks["one retained"], "backward")[0] == [("cache", "graph"), ("graph", "part")]
    loss = next(n for n, moment in enumerate(cached.moments) if moment.phase == "loss")
    kinds = [(start[0], end[0]) for start, end, _ in moves(cached, loss)]
    assert kinds == [("rep", "loss")] * 4 + [("loss", "cache")] * 4
    kinds = [(start[0], end[0]) for start, end, _ in moves(walks["naive"], 3)]
    assert kinds[::2] == [("loss", "rep"), ("rep", "graph"), ("graph", "part")]
    for walk, index in every_moment(walks):
        going, piece = moves(walk, index), walk.moments[index].piece
        assert set(going) <= set(edges(walk, index))
        assert piece not in walk.rows or all(piece in (start[1], end[1]) for start, end, _ in going)


def test_the_page_is_told_every_moment_to_the_byte(walks):
    for walk in walks.values():
        page = json.loads(json.dumps(page_of(walk)))
        assert len(page["moments"]) == len(walk.moments) and len(page["rows"]) == len(walk.rows)
        assert page["spans"][0][1] == 0 and page["spans"][-1][2] == len(walk.moments)
        assert all(stop == start for (_, _, stop), (_, start, _) in zip(page["spans"], page["spans"][1:], strict=False))
        for index, (told, moment) in enumerate(zip(page["moments"], walk.moments, strict=True)):
            assert dict(zip(KINDS, told["bytes"], strict=True)) == moment.kind_bytes
            assert max(told["columns"], key=sum) == told["bytes"] and len(told["columns"]) <= 24
            assert sum(told["graphs"].values()) == sum(moment.graph_bytes.values())
            assert told["words"] == describe_moment(walk, index)
            assert all(start in told["nodes"] and end in told["nodes"] for start, end, _, _ in told["edges"])
            assert sum(turn >= 0 for *_, turn in told["edges"]) == len(moves(walk, index))


def test_accumulations_phases_are_its_chunks(walks):
    accumulation = walks["accumulation"]
    assert [name for name, *_ in page_of(accumulation)["spans"]] == ["chunk 1", "chunk 2", "backward", "after"]
    assert title_of(accumulation, len(accumulation.moments) - 2) == "end of the backward"
    names = ["first forward", "loss", "backward", "after"]
    assert [name for name, *_ in page_of(walks["naive"])["spans"]] == names


LAYOUT = """
import { layout, route } from "%s";
import fs from "node:fs";
const asked = JSON.parse(fs.readFileSync(0));
console.log(JSON.stringify(asked.map(({ rows, moments }) => [300, 350, 560, 700, 1400].map((width) => {
  const place = layout(rows, width, "cache 0" in moments[0].nodes);
  return { width, ...place, paths: moments.map(({ edges }) => edges.map((edge) => route(place, rows, edge))) };
}))));
"""


def test_boxes_stand_apart_inside_the_width_and_arrows_end_at_them(walks, tmp_path):
    driver = tmp_path / "driver.mjs"
    driver.write_text(LAYOUT % (HERE / "layout.js").as_uri())
    pages = [page_of(walk) for walk in walks.values()]
    said = subprocess.run([node(), driver], input=json.dumps(pages), capture_output=True, text=True, check=True).stdout
    for page, places in zip(pages, json.loads(said), strict=True):
        for place in places:
            boxes = {name: (b["x"], b["y"], b["x"] + b["w"], b["y"] + b["h"]) for name, b in place["boxes"].items()}
            nodes = set(page["moments"][0]["nodes"]) - {"gradients"}
            assert set(boxes) == nodes
            corners = list(boxes.values())
            assert all(0 <= x < right <= place["width"] for x, _, right, _ in corners)
            assert all(0 <= y < low <= place["height"] for _, y, _, low in corners)
            assert not any(overlap(one, other) for n, one in enumerate(corners) for other in corners[:n])
            assert boxes["graph 0"][2] - boxes["graph 0"][0] >= 62  # "no graph" fits, at 11 pixels
            for moment, paths in zip(page["moments"], place["paths"], strict=True):
                for (start, end, *_), path in zip(moment["edges"], paths, strict=True):
                    assert touches(boxes[start], path[0]) and touches(boxes[end], path[-1]), (start, end)


def overlap(one, other):
    return min(one[2], other[2]) - max(one[0], other[0]) > 0.01 and min(one[3], other[3]) - max(one[1], other[1]) > 0.01


def touches(box, point):
    return box[0] - 1 <= point[0] <= box[2] + 1 and box[1] - 1 <= point[1] <= box[3] + 1


def test_the_modules_are_small_and_joined_they_are_one(tmp_path):
    lines = {path.name: len(path.read_text("utf-8").splitlines()) for path in HERE.glob("*.js")}
    assert max(lines.values()) <= 300 and sum(lines.values()) <= 350, lines
    assert not re.search("^import ", StepView._esm, re.MULTILINE) and "export default" in StepView._esm
    joined = tmp_path / "joined.mjs"
    joined.write_text(StepView._esm, "utf-8")
    subprocess.run([node(), "--check", joined], check=True)


def test_the_static_picture_fills_what_is_there(walks):
    for walk in walks.values():
        roll, stack = figure_of(walk).axes
        drawn = [patch.get_linewidth() for patch in roll.patches if isinstance(patch, Rectangle)]
        nodes = [node for n in range(len(walk.moments)) for node in states(walk, n).items()]
        alive = [state for (kind, _), state in nodes if kind not in ("text", "part") and state != "gone"]
        assert (len(drawn), sum(map(bool, drawn))) == (len(alive), alive.count("passing"))
        peak = max(sum(moment.kind_bytes.values()) for moment in walk.moments)
        assert [text.get_text() for text in stack.texts] == [f"peak {format_bytes(peak)}"]


def test_a_page_without_widgets_gets_the_picture_with_its_words(walks):
    widget = GraphWalk(walks)
    data = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    alt = unescape(re.search('alt="([^"]*)"', data["text/html"])[1])
    assert data["text/plain"] == f"Figure: {alt}"
    assert "of the step, gradient cache: 1 first forward: queries, chunk 1; 2" in alt
    assert "Most graphs in the encoder at once: 1 of 4." in alt
    widget.view.step = "naive"
    assert "Most graphs in the encoder at once: 2 of 2." in widget._repr_mimebundle_()["text/plain"]


def test_step_and_moment_are_the_pages_and_stay_inside(walks):
    widget = GraphWalk(walks)
    assert widget.describe() == describe_moment(walks["gradient cache"], 0) and widget.walk is walks["gradient cache"]
    widget.view.moment = 9
    assert widget.describe() == describe_moment(walks["gradient cache"], 8)
    widget.view.step = "naive"
    assert widget.view.moment == 1 and widget.describe() == describe_moment(walks["naive"], 0)
    widget.view.moment = 99
    assert widget.view.moment == 5 and widget.table().count("\n") == 6
    widget.view.moment = -3
    assert widget.view.moment == 1
    with pytest.raises(ValueError, match="step must be one of"):
        widget.view.step = "another"
    assert widget.view.step == "naive"


@pytest.mark.parametrize("walks", [{}, {"naive": "a walk"}])
def test_without_a_walk_there_is_no_widget(walks):
    with pytest.raises(ValueError, match="walks must hold a Walk for each name"):
        GraphWalk(walks)
