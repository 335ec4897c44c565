"""Pairs from JSON lines, and from what `datasets` reads: `gclib.data.files`."""

import json

import pytest

from gclib.data import files as pairfiles
from gclib.data.files import load_own_pairs, read_pair_file
from gclib.data.pairs import TextPair

ROWS = [{"query": f"q{number}", "passage": f"p{number}", "id": number} for number in range(4)]


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_a_line_is_a_pair_and_other_keys_are_left_alone(tmp_path):
    file = write(tmp_path / "pairs.jsonl", [*ROWS[:2], "\n", *ROWS[2:]])
    assert read_pair_file(file) == [TextPair(f"q{number}", f"p{number}") for number in range(4)]
    assert read_pair_file(file, limit=2) == [TextPair("q0", "p0"), TextPair("q1", "p1")]
    assert read_pair_file(file, query="passage", passage="query")[0] == TextPair("p0", "q0")


def test_negatives_come_along(tmp_path):
    file = write(tmp_path / "pairs.jsonl", [{**row, "negatives": ["n1", "n2"]} for row in ROWS])
    assert read_pair_file(file)[3] == TextPair("q3", "p3", ("n1", "n2"))


@pytest.mark.parametrize(
    "bad",
    [
        *("{\n", '"text"\n', "[]\n", "3\n", '{"query": "q"}\n', '{"query": "q", "passage": 3}\n'),
        *('{"query": " ", "passage": "p"}\n', '{"query": "q", "passage": "p", "negatives": [1]}\n'),
        '{"query": "q", "passage": "p", "negatives": 1}\n',
    ],
)
def test_a_line_that_is_no_pair_is_named(bad, tmp_path):
    file = write(tmp_path / "pairs.jsonl", [ROWS[0], bad])
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 2, must be a JSON object with texts"):
        read_pair_file(file)


def test_lines_must_have_as_many_negatives_as_the_first(tmp_path):
    file = write(tmp_path / "pairs.jsonl", [ROWS[0], {**ROWS[1], "negatives": ["n"]}])
    with pytest.raises(ValueError, match="pairs.jsonl"):
        read_pair_file(file)


def test_a_file_without_pairs_and_a_limit_of_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a list of at least one TextPair"):
        read_pair_file(write(tmp_path / "pairs.jsonl", ["\n"]))
    with pytest.raises(ValueError, match="limit must be an int of at least 1, got 0"):
        read_pair_file(write(tmp_path / "pairs.jsonl", ROWS), limit=0)


def test_a_folder_gives_the_split_that_is_asked_for(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    assert len(load_own_pairs(str(tmp_path), "train", limit=3)) == 3
    with pytest.raises(ValueError, match="must hold a file test.jsonl"):
        load_own_pairs(str(tmp_path), "test")


def test_anything_else_is_left_to_datasets(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pairfiles, "pairs_from_dataset", lambda name, **options: asked.append((name, options)))
    load_own_pairs("some/set", "test", passage="answer", limit=7)
    assert asked == [("some/set", {"query": "query", "passage": "answer", "split": "test", "limit": 7})]
