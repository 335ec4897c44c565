"""Hard negatives are close and wrong; the mask holds exactly what is right and not said to be."""

import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gclib.data.negatives import (
    _rankings,
    false_negative_mask,
    mine_hard_negatives,
    normal_form,
    pair_ids,
    twin_numbers,
)
from gclib.data.pairs import TextPair
from gclib.losses.dense import contrastive_loss
from gclib.losses.masks import SameIds
from gclib.support import ROOT

TOPICS = ["matrix product", "file reader", "socket server", "date parser", "colour map"]


def topical_pairs(each=6):
    """Passages about a few topics: the other passages of a topic are the hard ones."""
    return [
        TextPair(
            f"How does the {topic} number {number} work?", f"def {topic.replace(' ', '_')}_{number}(): return {number}"
        )
        for number in range(each)
        for topic in TOPICS
    ]


def topic_of(text):
    return next(topic for topic in TOPICS if all(word in text for word in topic.split()))


def test_negatives_share_the_querys_words_and_are_not_its_passage():
    pairs = topical_pairs()
    mined = mine_hard_negatives(pairs, per_query=1, seed=0)
    assert [(pair.query, pair.passage) for pair in mined] == [(pair.query, pair.passage) for pair in pairs]
    for pair in mined:
        assert len(pair.negatives) == 1 and pair.passage not in pair.negatives
        assert topic_of(pair.negatives[0]) == topic_of(pair.query)


def test_negatives_that_pairs_have_already_are_replaced_however_many():
    pairs = topical_pairs()
    own = [TextPair(pair.query, pair.passage, ("old",) * (number % 3)) for number, pair in enumerate(pairs)]
    assert mine_hard_negatives(own, per_query=1, seed=0) == mine_hard_negatives(pairs, per_query=1, seed=0)


def test_of_passages_as_near_as_each_other_the_first_are_candidates():
    """Three in depth of 40 equal ones: by number, and not as a partial sort happens to leave them on this processor."""
    passages = [f"same words {number}" for number in range(40)]
    pairs = [TextPair(query, passage) for query, passage in zip(["same words", "words"] * 20, passages, strict=True)]
    assert _rankings(pairs, passages, 3) == [[0, 1, 2]] * 40
    assert _rankings([TextPair("unheard of", "x")], passages, 3) == [[]]
    assert _rankings([TextPair("7 words", "x")], passages, 100) == [[7, *(n for n in range(40) if n != 7)]]


def test_humps_and_underscores_part_words():
    pairs = [TextPair("parse date", "x = 1"), TextPair("nothing", "def parseDate(): ..."), TextPair("none", "zzz = 3")]
    assert mine_hard_negatives(pairs, per_query=1, seed=0)[0].negatives == ("def parseDate(): ...",)


def test_twins_of_the_positive_are_never_mined():
    """The same query asked twice, and a passage that differs in layout and case, are right answers."""
    pairs = [
        TextPair("Read a file.", "def read(path): return open(path)"),
        TextPair("read a  FILE", "def slurp(file): read(file)"),
        TextPair("Something else", "DEF READ(path):\n    return open( path )"),
        *topical_pairs(2),
    ]
    for seed in range(20):
        for pair in mine_hard_negatives(pairs, per_query=3, seed=seed)[:2]:
            forms = {normal_form(text) for text in pair.negatives}
            assert not forms & {normal_form(other.passage) for other in pairs[:3]}


@pytest.mark.parametrize(
    ("one", "other", "twins"),
    [
        ("Return the sum.", "return  the\nsum", True),
        ("f( x ) + 1", "F(x)+1", True),
        ("f(x)", "f(-x)", False),
        ("a + b", "a - b", False),
        ("x[1:]", "x[:1]", False),
        ("snake_case", "snake case", False),
        ("...", "?", False),
    ],
)
def test_twins_differ_in_case_space_and_closing_signs_alone(one, other, twins):
    assert (normal_form(one) == normal_form(other)) is twins


def test_the_seed_decides_and_the_order_of_the_pairs_does_not():
    pairs = topical_pairs()
    first = mine_hard_negatives(pairs, per_query=1, seed=0)
    assert first == mine_hard_negatives(pairs, per_query=1, seed=0)
    assert first != mine_hard_negatives(pairs, per_query=1, seed=1)
    order = random.Random(0).sample(range(len(pairs)), len(pairs))
    shuffled = mine_hard_negatives([pairs[place] for place in order], per_query=1, seed=0)
    assert shuffled == [first[place] for place in order]


def test_queries_that_share_no_word_get_other_passages():
    pairs = [TextPair("qqq", f"passage {number}") for number in range(2)] + [
        TextPair(f"zzz{number}", f"text {number}") for number in range(4)
    ]
    mined = mine_hard_negatives(pairs, per_query=4, seed=3)
    assert set(mined[0].negatives) == {f"text {number}" for number in range(4)}
    for pair in mined[2:]:
        assert len(set(pair.negatives)) == 4 and pair.passage not in pair.negatives


words = st.sampled_from(["read", "file", "Read", "open", "path", "x", "server"])
texts = st.lists(words, min_size=1, max_size=3).map(" ".join)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 99))
def test_any_pairs_get_distinct_wrong_negatives_or_are_refused(rows, per_query, seed):
    pairs = [TextPair(query, passage) for query, passage in rows]
    right = {
        pair.query: {normal_form(p.passage) for p in pairs if normal_form(p.query) == normal_form(pair.query)}
        for pair in pairs
    }
    pool = {normal_form(pair.passage) for pair in pairs}
    if any(len(pool - forms) < per_query for forms in right.values()):
        with pytest.raises(ValueError, match="per_query must be at most"):
            mine_hard_negatives(pairs, per_query=per_query, seed=seed)
        return
    for pair in mine_hard_negatives(pairs, per_query=per_query, seed=seed):
        forms = {normal_form(text) for text in pair.negatives}
        assert len(forms) == per_query and forms <= pool - right[pair.query]


@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=8))
def test_the_mask_is_what_its_definition_says_pair_by_pair(rows):
    pairs = [TextPair(query, passage, (negative,)) for query, passage, negative in rows]
    mask = false_negative_mask(pairs)
    passages = [text for pair in pairs for text in (pair.passage, *pair.negatives)]
    for i, pair in enumerate(pairs):
        right = [other.passage.lower() for other in pairs if other.query.lower() == pair.query.lower()]
        for j, passage in enumerate(passages):
            assert mask[i, j] == (j != 2 * i and passage.lower() in right)


def test_a_loss_takes_the_mask():
    pairs = [TextPair("a", "x", ("y",)), TextPair("A", "z", ("X!",)), TextPair("b", "y", ("w",))]
    mask = false_negative_mask(pairs)
    expected = [[0, 0, 1, 1, 0, 0], [1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert mask.tolist() == [[bool(value) for value in row] for row in expected]
    reps = torch.randn(3, 4), torch.randn(6, 4)
    masked = contrastive_loss(*reps, temperature=1.0, mask=mask)
    assert masked.isfinite() and masked < contrastive_loss(*reps, temperature=1.0)


@pytest.mark.parametrize(
    ("pairs", "settings", "message"),
    [
        ([], {}, "pairs must be a list of at least one TextPair, got 'none'"),
        ("text", {}, "pairs must be a list"),
        (["text"], {}, r"pairs\[0\] must be a TextPair, got 'str'"),
        (None, {}, "pairs must be a list"),
        (topical_pairs(1), {"per_query": 0}, "per_query must be an int of at least 1"),
        (topical_pairs(1), {"per_query": 1.5}, "per_query must be an int of at least 1"),
        (topical_pairs(1), {"per_query": 5}, "per_query must be at most 4"),
        (topical_pairs(1), {"seed": -1}, "seed must be an int of at least 0"),
        ([TextPair("a", "b")], {}, "per_query must be at most 0"),
    ],
)
def test_bad_input_to_mining_is_refused_in_words(pairs, settings, message):
    with pytest.raises(ValueError, match=message):
        mine_hard_negatives(pairs, **({"per_query": 1, "seed": 0} | settings))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "pairs must be a list of at least one TextPair"),
        ([1], r"pairs\[0\] must be a TextPair, got 'int'"),
        (
            [TextPair("a", "b"), TextPair("c", "d", ("e",))],
            r"pairs\[1\] must have as many negatives as pairs\[0\], 0, got 1",
        ),
    ],
)
def test_bad_input_to_the_mask_is_refused_in_words(pairs, message):
    with pytest.raises(ValueError, match=message):
        false_negative_mask(pairs)


@pytest.mark.slow
def test_mining_starts_no_other_library_that_takes_a_card(tmp_path):
    """bm25s starts JAX where it finds it, and JAX takes most of a GPU's memory: in a new process, a JAX that tells."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise RuntimeError('JAX was started')")
    code = (
        "import sys; from gclib.data.pairs import TextPair; from gclib.data.negatives import mine_hard_negatives\n"
        "pairs = [TextPair(f'add {n}', f'def add{n}(): {n}') for n in range(4)]\n"
        "assert all(len(pair.negatives) == 1 for pair in mine_hard_negatives(pairs, per_query=1, seed=0))\n"
        "assert 'jax' not in sys.modules"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


@given(st.lists(st.text(alphabet="aB .,!?\n\u00a0-(", max_size=6), max_size=20))
def test_twins_have_the_same_number(texts):
    numbers, forms = twin_numbers(texts), [normal_form(text) for text in texts]
    assert [[a == b for b in numbers] for a in numbers] == [[a == b for b in forms] for a in forms]


def test_ids_of_a_batch_leave_out_what_the_whole_mask_does():
    """The same passage under two queries, and the same query with two passages, in other case; hard negatives."""
    texts = [("how", "one", "two"), ("why", "One.", "six"), ("when", "three", "one"), ("When?", "four", "five")]
    pairs = [TextPair(query, passage, (wrong,)) for query, passage, wrong in texts]
    queries, passages = torch.randn(4, 3), torch.randn(8, 3)
    by_ids, by_mask, plain = (
        contrastive_loss(queries, passages, temperature=0.2, symmetric=True, mask=mask)
        for mask in (SameIds(*pair_ids(pairs)), false_negative_mask(pairs), None)
    )
    assert torch.equal(by_ids, by_mask) and not torch.equal(by_ids, plain)
