"""Pairs from JSON lines, and from what `datasets` reads: `gclib.data.files`."""

import importlib.util
import json
import sys

import pytest

from gclib.data import files
from gclib.data.files import load_own_pairs, pairs_from_dataset, read_pair_file
from gclib.data.pairs import TextPair

HAVE_DATASETS = importlib.util.find_spec("datasets") is not None
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
    monkeypatch.setattr(files, "pairs_from_dataset", lambda name, **options: asked.append((name, options)))
    load_own_pairs("some/set", "test", passage="answer", limit=7)
    assert asked == [("some/set", {"query": "query", "passage": "answer", "split": "test", "limit": 7})]


def test_without_the_datasets_library_a_reader_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the datasets library"):
        pairs_from_dataset("some/set")


needs_datasets = pytest.mark.skipif(
    not HAVE_DATASETS,
    reason="the datasets library is not part of the course's environment; its reader runs only with it",
)
LINES = [{"query": f"q {n}", "answer": f"a {n}", "number": n} for n in range(5)] + [
    {"query": " ", "answer": "without a query", "number": 5},
    {"query": "without an answer", "answer": None, "number": 6},
]


@pytest.fixture(params=["json lines", "csv", "saved to disk", "saved splits"])
def dataset_folder(request, tmp_path):
    datasets = pytest.importorskip("datasets")
    source, saved = tmp_path / "files", tmp_path / "saved"
    source.mkdir()
    (source / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    if request.param == "csv":
        (source / "train.jsonl").unlink()
        lines = [f"{line['query']},{line['answer'] or ''},{line['number']}\n" for line in LINES]
        (source / "train.csv").write_text("query,answer,number\n" + "".join(lines))
    if not request.param.startswith("saved"):
        return str(source)
    splits = datasets.load_dataset(str(source))
    (splits if request.param == "saved splits" else splits["train"]).save_to_disk(str(saved))
    return str(saved)


@needs_datasets
def test_a_public_set_is_read_from_a_local_folder(dataset_folder):
    expected = [TextPair(f"q {n}", f"a {n}") for n in range(5)]
    assert pairs_from_dataset(dataset_folder) == expected
    assert pairs_from_dataset(dataset_folder, limit=2) == expected[:2]
    with pytest.raises(ValueError, match=r"passage must be one of the columns .*, got 'positive'"):
        pairs_from_dataset(dataset_folder, passage="positive")


@needs_datasets
def test_a_set_that_is_not_there_or_has_no_such_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="name_or_folder must be a retrieval set"):
        pairs_from_dataset(str(tmp_path / "nothing"))
    (tmp_path / "train.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    with pytest.raises(ValueError, match="split must be one of 'train', got 'dev'"):
        pairs_from_dataset(str(tmp_path), split="dev")
