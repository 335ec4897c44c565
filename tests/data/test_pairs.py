"""Pairs: `gclib.data.pairs`."""

import pytest

from gclib.data import corpus
from gclib.data.corpus import Corpus, Row
from gclib.data.pairs import TextPair, load_pairs, texts_of

PAIR = TextPair("Count the apples.", "def count_apples(basket): return len(basket)", ("hard", "harder of all"))


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
        PAIR.query = "other"
    assert len({PAIR, TextPair(PAIR.query, PAIR.passage, PAIR.negatives), TextPair(PAIR.query, PAIR.passage)}) == 2


def test_texts_of_names_every_text():
    assert texts_of([PAIR]) == [PAIR.query, PAIR.passage, "hard", "harder of all"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("q", "p", "wrong"), "negatives must be a list of texts, got the str 'wrong'"),
        (("q", "p", "\u9519\u8bef"), "negatives must be a list of texts"),
        (("q", "p", {"id": "a"}), "negatives must be a list of texts, got the dict"),
        (("q", "p", {"n"}), "negatives must be a list of texts, got the set"),
        (("q", "p", None), "negatives must be a list of texts"),
        (("q", "p", ("n", 3)), r"negatives\[1\] must be a text, got the int 3"),
        (("q", "p", ("\t",)), r"negatives\[0\] must be a text with more than white space"),
        ((1, "p"), "query must be a text, got the int 1"),
        (("q", None), "passage must be a text, got the NoneType None"),
        (("q", ["p1", "p2"]), "passage must be a text, got the list"),
        ((float("nan"), "p"), "query must be a text, got the float nan"),
        (("", "p"), "query must be a text with more than white space"),
        (
            ("q", "smile \ud83d"),
            "passage must be .* whole characters, got the lone surrogate .* as character 7",
        ),
    ],
)
def test_texts_that_are_none_are_refused(texts, message):
    with pytest.raises(ValueError, match=message) as caught:
        TextPair(*texts)
    str(caught.value).encode()  # can be printed


def test_a_list_of_negatives_is_taken():
    assert TextPair("q", "p", ["n"]) == TextPair("q", "p", ("n",))
