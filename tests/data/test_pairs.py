"""Pairs and token batches: `gclib.data.pairs`."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from gclib.data import corpus
from gclib.data.corpus import Corpus, Row
from gclib.data.pairs import (
    SPECIAL_TOKENS,
    TextPair,
    load_pairs,
    pairs_from_dataset,
    texts_of,
    tokenize_pairs,
    train_tokenizer,
)

HAVE_DATASETS = importlib.util.find_spec("datasets") is not None

PAIRS = [
    TextPair(f"Count the {what} in the basket.", f"def count_{what}(basketOfFruit):\n    return len(basketOfFruit)")
    for what in ("apples", "pears", "plums", "figs", "dates", "melons")
]
HARD = [TextPair(pair.query, pair.passage, (f"hard {n}", f"harder {n} of all")) for n, pair in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PAIRS, vocab_size=200)


@pytest.fixture
def small_corpus(monkeypatch):
    rows = [Row(f"m{n}", 1, "f", f"Query number {n}.", f"passage {n}") for n in range(100)]
    monkeypatch.setattr("gclib.data.pairs.load_corpus", lambda progress: Corpus(rows, 100, 100, {}))
    return rows


def test_load_pairs_gives_text_pairs_of_one_split(small_corpus):
    train, test = load_pairs("train"), load_pairs("test")
    assert train + test and len(train) + len(test) == 100
    assert set(train).isdisjoint(test)
    assert train[0] == TextPair(small_corpus[0].query, small_corpus[0].passage, ())


def test_limit_takes_the_first(small_corpus):
    assert load_pairs("train", limit=7) == load_pairs()[:7]
    assert load_pairs("train", limit=10_000) == load_pairs()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, r"split must be one of 'train', 'test', got 'dev'"),
        ({"split": None}, "split must be one of"),
        ({"limit": 0}, "limit must be an int of at least 1, got 0"),
        ({"limit": 2.5}, "limit must be an int"),
        ({"limit": True}, "limit must be an int"),
    ],
)
def test_load_pairs_refuses(arguments, message, monkeypatch):
    monkeypatch.setattr("gclib.data.pairs.load_corpus", None)  # refused before anything is mined
    with pytest.raises(ValueError, match=message):
        load_pairs(**arguments)


def test_load_pairs_reads_the_mined_corpus(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text('def f(x):\n    """Add one to the number x."""\n    return x + 1\n')
    monkeypatch.setattr(corpus, "installed_sources", lambda: [corpus.Source("a", "1", tmp_path / "a.py")])
    monkeypatch.setenv("GCLIB_CACHE", str(tmp_path / "cache"))
    expected = [TextPair("Add one to the number x.", "def f(x):\n    return x + 1")]
    assert load_pairs("train", progress=False) + load_pairs("test", progress=False) == expected


def test_a_pair_is_immutable_and_hashable():
    with pytest.raises(AttributeError):
        PAIRS[0].query = "other"
    assert len({*PAIRS, *PAIRS}) == len(PAIRS)


def test_the_tokenizer_is_the_same_each_time_and_within_its_vocabulary(tokenizer):
    again = train_tokenizer(PAIRS, vocab_size=200)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) <= 200
    assert tokenizer.pad_token_id == 0
    assert set(SPECIAL_TOKENS) <= set(tokenizer.get_vocab())


def test_a_small_vocabulary_is_kept_to_even_with_many_letters():
    letters = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 500))
    tokenizer = train_tokenizer([TextPair(letters, "def f(x): return x")], vocab_size=64)
    assert len(tokenizer) <= 64
    ids = tokenizer(letters)["input_ids"]
    assert max(ids) < 64
    assert tokenizer.unk_token_id in ids


def test_names_in_code_and_words_in_sentences_share_tokens(tokenizer):
    def words(text):
        return tokenizer.tokenize(text, add_special_tokens=False)

    assert words("basketOfFruit") == words("Basket of fruit") == words("basket\n  OF fruit")
    assert words("count_apples") == [*words("count"), "_", *words("apples")]
    assert tokenizer.convert_ids_to_tokens(tokenizer("apples")["input_ids"])[:: len(words("apples")) + 1] == [
        "[CLS]",
        "[SEP]",
    ]


def test_shapes_types_and_padding(tokenizer):
    queries, passages = tokenize_pairs(PAIRS, tokenizer)
    for batch, texts in ((queries, [p.query for p in PAIRS]), (passages, [p.passage for p in PAIRS])):
        assert type(batch) is dict and list(batch) == ["input_ids", "attention_mask"]
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
        alone = [tokenizer(text)["input_ids"] for text in texts]
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(texts), max(map(len, alone)))
        for ids, mask, expected in zip(*batch.values(), alone, strict=True):
            assert ids[mask == 1].tolist() == expected
            assert set(ids[mask == 0].tolist()) <= {tokenizer.pad_token_id}


def test_passages_stand_query_major(tokenizer):
    _, passages = tokenize_pairs(HARD, tokenizer)
    assert passages["input_ids"].shape[0] == len(HARD) * 3
    for i, pair in enumerate(HARD):
        for offset, text in enumerate((pair.passage, *pair.negatives)):
            row = passages["input_ids"][i * 3 + offset][passages["attention_mask"][i * 3 + offset] == 1]
            assert row.tolist() == tokenizer(text)["input_ids"]


def test_texts_are_cut_to_the_lengths(tokenizer):
    queries, passages = tokenize_pairs(PAIRS, tokenizer, query_length=5, passage_length=3)
    assert queries["input_ids"].shape == (6, 5)
    assert passages["input_ids"].shape == (6, 3)
    assert (passages["input_ids"][:, -1] == tokenizer.sep_token_id).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": []}, "pairs must be a list of at least one TextPair, got 'none'"),
        ({"pairs": None}, "pairs must be a list.* got 'NoneType'"),
        ({"pairs": "text"}, "pairs must be a list.* got 'str'"),
        ({"pairs": [("q", "p")]}, r"pairs\[0\] must be a TextPair, got 'tuple'"),
        ({"pairs": [PAIRS[0], HARD[1]]}, r"pairs\[1\] must have as many negatives as pairs\[0\], 0, got 2"),
        ({"tokenizer": None}, "tokenizer must be a transformers tokenizer with a padding token"),
        ({"query_length": 0}, "query_length must be an int of at least 1, got 0"),
        ({"query_length": 2}, "query_length must leave room beside the tokenizer's 2 special tokens, got 2"),
        ({"passage_length": -1}, "passage_length must be an int of at least 1, got -1"),
        ({"passage_length": 2.5}, "passage_length must be an int of at least 1, got 2.5"),
        ({"passage_length": float("nan")}, "passage_length must be an int"),
    ],
)
def test_tokenize_pairs_refuses(change, message, tokenizer):
    arguments = {"pairs": PAIRS, "tokenizer": tokenizer, **change}
    with pytest.raises(ValueError, match=message):
        tokenize_pairs(arguments.pop("pairs"), arguments.pop("tokenizer"), **arguments)


def test_a_tokenizer_without_padding_is_refused(tokenizer):
    unpadded = train_tokenizer(PAIRS, vocab_size=200)
    unpadded.pad_token = None
    with pytest.raises(ValueError, match="padding token"):
        tokenize_pairs(PAIRS, unpadded)


@pytest.mark.parametrize(
    ("pairs", "vocab_size", "message"),
    [
        ([], 200, "pairs must be"),
        (PAIRS, 0, "vocab_size must be an int of at least 1"),
        (PAIRS, 63, "vocab_size must be at least 64, got 63"),
        (PAIRS, 100.0, "vocab_size must be an int"),
    ],
)
def test_train_tokenizer_refuses(pairs, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(pairs, vocab_size=vocab_size)


def test_texts_of_names_every_text():
    assert texts_of(HARD[:1]) == [HARD[0].query, HARD[0].passage, "hard 0", "harder 0 of all"]


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
    files, saved = tmp_path / "files", tmp_path / "saved"
    files.mkdir()
    (files / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    if request.param == "csv":
        (files / "train.jsonl").unlink()
        lines = [f"{line['query']},{line['answer'] or ''},{line['number']}\n" for line in LINES]
        (files / "train.csv").write_text("query,answer,number\n" + "".join(lines))
    if not request.param.startswith("saved"):
        return str(files)
    splits = datasets.load_dataset(str(files))
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


@pytest.mark.slow
def test_equally_common_letters_are_cut_alike_in_every_process():
    """More letters than get a token: two processes must leave out the same ones, or one's weights mean other tokens."""
    code = """
import hashlib
from gclib.data.pairs import TextPair, train_tokenizer
letters = [chr(0x4E00 + number) for number in range(1_200)]
pairs = [TextPair("".join(letters[i : i + 7]) + " q", "".join(letters[i : i + 5]) + " p") for i in range(1_190)]
print(hashlib.sha256(train_tokenizer(pairs).backend_tokenizer.to_str().encode()).hexdigest())
"""
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    }
    assert len(found) == 1
