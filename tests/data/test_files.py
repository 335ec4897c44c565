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


NO_LIST = "negatives must be a list of texts, got the "
PAIR = '{"query": "q", "passage": "p"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"query": "q", "passage": "p", "negatives": "wrong text"}\n',
            "negatives must be a list of texts, got the str",
        ),
        (
            '{"query": "q", "passage": "p", "negatives": "\u9519\u8bef"}\n',
            "negatives must be a list of texts, got the str",
        ),
        (
            '{"query": "q", "passage": "p", "negatives": {"id": "a"}}\n',
            NO_LIST + "JsonObject",
        ),
        ('{"query": "q", "passage": "p", "negatives": null}\n', "negatives must be a list of texts"),
        ('{"query": "q", "passage": "p", "negative": ["n"]}\n', r"negatives\[0\] must be a text, got the list"),
        ('{"query": "q", "passage": "p", "negative": null}\n', r"negatives\[0\] must be a text"),
        ('{"query": "q", "passage": "p", "negative": "n", "negatives": ["m"]}\n', "must name hard negatives"),
        *(
            (f'{{"query": "q", "passage": "p", "{name}": ["n"]}}\n', "must name hard negatives")
            for name in ("neg", "Negative", "hard_negatives", "negative_passages", "negatives_1")
        ),
        ('{"query": NaN, "passage": "p"}\n', "query must be a text, got the float nan"),
        ('{"query": 1, "passage": "p"}\n', "query must be a text, got the int 1"),
        ('{"query": "q", "pos": ["a"]}\n', "no \"passage\" among 'query', 'pos'"),
        ('{"query": "smile \\ud83d", "passage": "p"}\n', "the lone surrogate"),
        (b'{"query": "caf\xe9", "passage": "p"}\n', "must be UTF-8 text .*, got the byte 0xe9 as character 15"),
        (b'{"query": "\xed\xa0\xbd", "passage": "p"}\n', "must be UTF-8 text"),
        (PAIR.encode("utf-16-le"), "a zero byte, as UTF-16"),
        (b"\x1f\x8b\x08\x00", "must be UTF-8 text"),
        ("[" * 100_000 + "\n", "must be a JSON object"),
        ('{"query": "q", "pass', "must be a JSON object"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_line_with_a_fault_is_named_with_what_is_wrong_in_it(line, message, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(b'{"query": "q0", "passage": "p0"}\n\n' + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(ValueError, match=rf"pairs.jsonl, line 3, .*{message}") as caught:
        read_pair_file(file)
    str(caught.value).encode()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_file_of_another_encoding_is_named(encoding, tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(PAIR.encode(encoding))
    with pytest.raises(ValueError, match="pairs.jsonl, line 1, must be UTF-8 text .* as UTF-16 begins"):
        read_pair_file(tmp_path / "pairs.jsonl")


def test_a_byte_order_mark_is_no_part_of_a_line(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(2 * (b"\xef\xbb\xbf" + 2 * PAIR.replace("\n", "\r\n").encode()))  # two such files, joined
    assert read_pair_file(file) == 4 * [TextPair("q", "p")]


def test_odd_texts_come_as_they_are(tmp_path):
    odd = "a\u2028b\u2029c\x85d \u05d0\u05d1 \U0001f600 \u200b\u0000 e"
    lines = [json.dumps({"query": odd, "passage": odd}, ensure_ascii=ascii) + "\r\n" for ascii in (True, False)]
    (tmp_path / "pairs.jsonl").write_bytes("".join(lines).encode())
    assert read_pair_file(tmp_path / "pairs.jsonl") == 2 * [TextPair(odd, odd)]


def test_what_is_not_read_is_told(tmp_path):
    doubled = '{"query": "a", "query": "b", "passage": "p", "score": NaN, "label": 0}\n'
    with pytest.warns(UserWarning) as caught:
        assert read_pair_file(write(tmp_path / "pairs.jsonl", [doubled] * 3)) == 3 * [TextPair("b", "p")]
    words = "\n".join(str(warning.message) for warning in caught)
    assert "not read: 'score', 'label'" in words
    assert "line 1 has the key 'query' more than once, of which the last is read (and 2 more like it)" in words


def test_lines_after_the_limit_are_not_judged(tmp_path):
    assert len(read_pair_file(write(tmp_path / "pairs.jsonl", [PAIR, PAIR, "no pair\n"]), limit=2)) == 2


def test_a_column_a_negative_is_read_in_the_order_of_the_numbers(tmp_path):
    row = {"query": "q", "passage": "p", "negative_10": "n10", "negative_2": "n2", "negative": "n"}
    assert read_pair_file(write(tmp_path / "pairs.jsonl", [row])) == [TextPair("q", "p", ("n", "n2", "n10"))]


def test_lines_must_have_as_many_negatives_as_the_first(tmp_path):
    file = write(tmp_path / "pairs.jsonl", [ROWS[0], {**ROWS[1], "negatives": ["n"]}])
    with pytest.raises(ValueError, match="pairs.jsonl, line 2, must have as many hard negatives as the first pair, 0"):
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


@pytest.mark.parametrize("folder", ["{here}/trian", "./trian", "../no/where", "a/b/c"])
def test_a_folder_that_is_not_there_is_told_as_such(folder, tmp_path):
    with pytest.raises(ValueError, match="must be a retrieval set: a folder that exists, or a name on the"):
        load_own_pairs(folder.format(here=tmp_path), "train")


def test_what_a_folder_lacks_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"must hold a file train.jsonl, got .*, which is empty"):
        load_own_pairs(str(tmp_path), "train")
    (tmp_path / "train.json").write_text(f"[{PAIR}]")
    with pytest.raises(ValueError, match=r"holds no JSON lines .*, and to read its other files needs the datasets"):
        load_own_pairs(str(tmp_path), "train")
    with pytest.raises(ValueError, match=r"must be the folder that holds train.jsonl, got the file"):
        load_own_pairs(str(tmp_path / "train.json"), "train")
    with pytest.raises(ValueError, match="is no folder here, and to look for it on the .* hub needs the datasets"):
        load_own_pairs("trian", "train")
    with pytest.raises(ValueError, match=r"path must be a file that can be read, got .*nothing.jsonl: No such file"):
        read_pair_file(tmp_path / "nothing.jsonl")


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
    with pytest.raises(ValueError, match="split must be one of 'train', got 'test'"):
        pairs_from_dataset(dataset_folder, split="test")


@needs_datasets
def test_a_table_that_was_saved_alone_is_read_under_the_name_of_its_split(tmp_path):
    import datasets

    lines = {"query": ["q"], "answer": ["a"]}
    for split, name in ((None, "train"), ("train[:10%]", "train"), ("validation", "train"), ("test", "test")):
        folder = tmp_path / str(split)
        datasets.Dataset.from_dict(lines, split=split).save_to_disk(str(folder))
        assert pairs_from_dataset(str(folder), split=name) == [TextPair("q", "a")]


@needs_datasets
def test_a_set_that_is_not_there_or_has_no_such_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="name_or_folder must be a retrieval set"):
        pairs_from_dataset(str(tmp_path / "nothing"))
    (tmp_path / "train.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    with pytest.raises(ValueError, match="split must be one of 'train', got 'dev'"):
        pairs_from_dataset(str(tmp_path), split="dev")


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """The reader of a Parquet file with these rows beside query and passage."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def read(*others):
        rows = [{"query": f"q{n}", "passage": f"p{n}", **other} for n, other in enumerate(others)]
        (tmp_path / "files").mkdir()
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "files" / "train.parquet"))
        return load_own_pairs(str(tmp_path / "files"), "train")

    return read


@needs_datasets
@pytest.mark.parametrize("columns", [{"negatives": ["n", "m"]}, {"negative_1": "m", "negative": "n"}], ids=str)
def test_hard_negatives_come_out_of_a_table_as_out_of_lines(columns, parquet, tmp_path):
    rows = [{"query": f"q{n}", "passage": f"p{n}", **columns} for n in range(2)]
    pairs = parquet(columns, columns)
    assert pairs == [TextPair(f"q{n}", f"p{n}", ("n", "m")) for n in range(2)]
    assert pairs == read_pair_file(write(tmp_path / "train.jsonl", rows))


@needs_datasets
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"negatives": "text"}, "row 1, .* negatives must be a list of texts, got the str 'text'"),
        ({"negatives": {"id": "a"}}, "row 1, .* negatives must be a list of texts, got the dict"),
        ({"negatives": None}, "row 1, .* negatives must be a list of texts"),
        ({"negatives": [3]}, r"row 1, .* negatives\[0\] must be a text"),
        ({"neg": ["n"]}, "must name hard negatives"),
        ({"negative": "n", "negatives": ["n"]}, "must name hard negatives"),
        ({"passage": 3}, "row 1, .* passage must be a text, got the int 3"),
        ({"passage": " "}, "must be a list of at least one TextPair"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*are left out:UserWarning")
def test_a_row_with_a_fault_is_named_as_a_line_is(columns, message, parquet):
    with pytest.raises(ValueError, match=message):
        parquet(columns, columns)


@needs_datasets
def test_rows_and_columns_that_are_left_out_are_told(parquet):
    with pytest.warns(UserWarning) as caught:
        assert len(parquet({"id": 1}, {"id": 2, "passage": " "})) == 1
    words = "\n".join(str(warning.message) for warning in caught)
    assert "1 rows have no text as 'query' or 'passage', and are left out" in words and "not read: 'id'" in words


@needs_datasets
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_table_of_another_encoding_is_named_with_its_line(encoding, tmp_path):
    (tmp_path / "train.csv").write_bytes("query,passage\ncaf\xe9,p\n".encode(encoding))
    with pytest.raises(ValueError, match=r"train.csv, line \d, must be UTF-8 text"):
        load_own_pairs(str(tmp_path), "train")
