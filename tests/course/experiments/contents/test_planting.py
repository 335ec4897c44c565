"""False negatives that are planted: `gclib.course.experiments.contents.planting`."""

from gclib.course.experiments.contents.planting import apart, right_negatives, several_passages, two_queries
from gclib.data.negatives import false_negative_mask
from gclib.data.pairs import TextPair

LONG = TextPair("Adds two numbers.", "def add_two(first, second): " + " ".join(f"word{n}" for n in range(29)))


def test_a_passage_under_two_queries():
    first, second = two_queries(TextPair("Reads a file.", "def readXMLFile2(path):\n    pass"))
    assert (first.query, second.query) == ("Reads a file.", "read xml file 2")
    assert first.passage == second.passage
    assert two_queries(TextPair("No function", "x = 1")) == []
    assert two_queries(TextPair("Add two", "def add_two(a, b): pass")) == []


def test_a_query_with_several_passages():
    pieces = several_passages(LONG)
    assert [piece.query for piece in pieces] == [LONG.query] * 4
    assert " ".join(piece.passage for piece in pieces).split() == LONG.passage.split()
    assert max(len(piece.passage.split()) for piece in pieces) == 8
    assert several_passages(TextPair("q", " ".join("abcdefghijklmno"))) == []


def test_a_hard_negative_that_is_right():
    first, second = right_negatives(LONG)
    assert first.negatives == (second.passage,) and second.negatives == (first.passage,)
    mask = false_negative_mask([first, second, TextPair("another", "passage", ("wrong",))])
    assert mask.tolist() == [
        [False, True, True, True, False, False],
        [True, True, False, True, False, False],
        [False] * 6,
    ]
    assert right_negatives(TextPair("q", "too short to cut")) == []


def test_groups_with_a_text_in_common_are_dropped():
    groups = [
        [TextPair("a", "p"), TextPair("b", "p")],
        [TextPair("A.", "another")],
        [TextPair("c", "d"), TextPair("c", "D")],
        [TextPair("e", "f")],
    ]
    assert apart(groups) == [groups[0], groups[3]]
