"""The ring as a picture: the tiles are the library's, gradients come home complete, moves never raise."""

import random

import pytest
from helpers.page import alt_of

from gclib.course import plots
from gclib.course.widgets.ring import (
    MOST_RANKS,
    RingWalk,
    describe_moment,
    done_tiles,
    plot_ring,
    plot_tiles,
    ring_moments,
    sentence_of,
    table_of,
    title_of,
)
from gclib.losses.ring import Ring

every_size = pytest.mark.parametrize("ranks", range(2, MOST_RANKS + 1))


@every_size
def test_what_is_where_is_what_the_library_sends(ranks):
    moments = ring_moments(ranks)
    assert [moment.phase for moment in moments] == ["forward"] * ranks + ["backward"] * ranks + ["home"]
    for moment in moments[:-1]:
        owners = [
            Ring(rank, [1] * ranks, 1, side=4, directions=None, rule=None, group=None).owner(moment.hop)
            for rank in range(ranks)
        ]
        assert list(moment.owners) == owners
    assert moments[-1].owners == tuple(range(ranks))


@every_size
def test_every_tile_is_computed_once_in_each_pass(ranks):
    moments = ring_moments(ranks)
    whole = {(row, column) for row in range(ranks) for column in range(ranks)}
    for index in (ranks - 1, 2 * ranks - 1):
        done = done_tiles(moments, index) + moments[index].tiles
        assert len(done) == len(whole) and set(done) == whole
    assert done_tiles(moments, ranks) == [] and len(done_tiles(moments, 2 * ranks)) == ranks**2


@every_size
def test_a_gradient_has_the_parts_of_the_ranks_where_it_was_and_all_at_home(ranks):
    moments = ring_moments(ranks)
    for moment in moments[ranks : 2 * ranks]:
        for rank, (owner, added) in enumerate(zip(moment.owners, moment.added, strict=True)):
            assert added[0] == owner and added[-1] == rank and len(set(added)) == moment.hop + 1
    assert all(set(added) == set(range(ranks)) for added in moments[-1].added)


@every_size
def test_the_picture_shows_the_tiles_and_what_leaves(ranks):
    moments = ring_moments(ranks)
    for index, moment in enumerate(moments):
        figure, (left, right) = plots.new_figure(1, 2)
        plot_ring(left, moment)
        plot_tiles(right, moments, index)
        assert [text.get_text() for text in right.texts] == ["now"] * len(moment.tiles)
        hatched = [patch for patch in right.patches if patch.get_hatch()]
        assert len(hatched) == len(done_tiles(moments, index))
        said = [text.get_text() for text in left.texts if text.get_text()]
        arrows = [text for text in said if not text.startswith("rank")]
        moving = moment.phase == "backward" or (moment.phase == "forward" and moment.hop + 1 < ranks)
        assert len(arrows) == (ranks if moving else 0)


def test_titles_and_words():
    moments = ring_moments(3)
    assert title_of(moments[1]) == "forward, hop 2 of 3" and "rank 1 takes Q1 × P0" in sentence_of(moments[1])
    assert "Meanwhile the next block arrives" in sentence_of(moments[1])
    assert "No block moves on" in sentence_of(moments[2])
    assert "it is home" in sentence_of(moments[5]) and "all 3 ranks" in sentence_of(moments[6])
    assert "6 of 9 tiles were done before, 3 are computed now" in describe_moment(moments, 2)


def test_the_table_has_every_moment_and_every_rank():
    headings, rows = table_of(4)
    assert len(headings) == 5 and len(rows) == 9 and all(len(row) == 5 for row in rows)
    assert rows[7][1] == "Q0 × P1, ∂P1 of 1+2+3+0"


def test_buttons_stay_inside_and_words_follow():
    walk = RingWalk(2)
    assert walk.previous.disabled and not walk.next.disabled
    for _ in range(10):
        walk.next.click()
    assert walk.moment.value == 5 and walk.next.disabled and "home" in walk.words.value
    walk.previous.click()
    assert walk.moment.value == 4 and "backward, hop 2 of 2" in walk.words.value
    assert 'role="status" aria-live="polite"' in walk.words.value


def test_another_number_of_ranks_starts_anew():
    walk = RingWalk(5)
    walk.moment.value = 11
    walk.ranks.value = 2
    assert (walk.moment.value, walk.moment.max) == (1, 5) and alt_of(walk).startswith("2 ranks in a ring: forward")
    walk.ranks.value = 6
    assert (walk.moment.value, walk.moment.max) == (1, 13) and alt_of(walk) == walk.describe()
    assert walk.table().count("\n") == 14


@pytest.mark.slow
def test_random_moves_never_raise_and_keep_words_and_picture_together():
    walk, draw = RingWalk(), random.Random(0)
    for _ in range(12):
        which = draw.randrange(3)
        if which == 0:
            walk.ranks.value = draw.randint(2, MOST_RANKS)
        elif which == 1:
            walk.moment.value = draw.randint(1, walk.moment.max)
        else:
            draw.choice([walk.previous, walk.next]).click()
        assert alt_of(walk) == walk.describe()


def test_every_control_has_a_label():
    walk = RingWalk()
    assert all(control.description for control in (walk.ranks, walk.moment, walk.previous, walk.next))


@pytest.mark.parametrize(("ranks", "message"), [(1, "at least 2"), (7, "at most 6"), (2.0, "must be an int")])
def test_a_ring_that_cannot_be_drawn_is_refused(ranks, message):
    with pytest.raises(ValueError, match=message):
        RingWalk(ranks)
