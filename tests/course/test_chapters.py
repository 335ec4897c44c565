"""The map of the course: complete, in order, and honest about what is written."""

import pytest
from matplotlib.figure import Figure

from gclib.course.chapters import CHAPTERS, describe_map, plot_map, written_chapters


def test_chapters_are_numbered_in_order_and_need_only_earlier_ones():
    assert [chapter.number for chapter in CHAPTERS] == list(range(16))
    for chapter in CHAPTERS:
        assert chapter.file.startswith(f"{chapter.number:02d}_")
        assert all(number < chapter.number for number in chapter.needs)


def test_every_chapter_before_the_capstone_leads_somewhere():
    assert {number for chapter in CHAPTERS for number in chapter.needs} == set(range(15))


def test_boxes_do_not_share_a_place_and_arrows_point_down():
    places = [chapter.place for chapter in CHAPTERS]
    assert len(set(places)) == len(places)
    for chapter in CHAPTERS:
        assert all(CHAPTERS[number].place[1] < chapter.place[1] for number in chapter.needs)


def test_a_chapter_is_written_when_its_notebook_is_there(tmp_path):
    assert written_chapters(tmp_path) == set()
    (tmp_path / "06_live_memory_lab.ipynb").touch()
    (tmp_path / "notes.ipynb").touch()
    assert written_chapters(tmp_path) == {6}


def test_the_picture_says_planned_exactly_where_the_notebook_is_missing():
    axes = Figure().add_subplot()
    plot_map(axes, {0, 1, 6})
    texts = [text.get_text() for text in axes.texts if text.get_text()]
    assert sum(text.startswith("planned: ") for text in texts) == 13
    for chapter in CHAPTERS:
        assert f"{chapter.number:02d}  {chapter.title}" in texts
        assert (f"planned: {chapter.able_to}" in texts) == (chapter.number not in {0, 1, 6})
    arrows = [text for text in axes.texts if not text.get_text()]
    assert len(arrows) == sum(len(chapter.needs) for chapter in CHAPTERS)


def test_the_words_say_what_the_picture_shows():
    words = describe_map({0, 1, 6})
    assert "00 Start here comes first." in words
    assert "06 The live memory lab builds on 02, 05." in words
    assert "02 The memory wall (planned) builds on 01." in words


@pytest.mark.parametrize("written", [{16}, {-1}, {0, 99}])
def test_a_number_that_is_no_chapter_is_refused(written):
    with pytest.raises(ValueError, match="written must hold chapter numbers from 0 to 15"):
        plot_map(Figure().add_subplot(), written)
