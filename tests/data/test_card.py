"""The data card's figures are those that the command prints: `gclib.data.card`."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gclib.data import card
from gclib.data.card import CARD, MARKERS, figures, licence, near_twins, shingles, write_figures
from gclib.data.corpus import Corpus, Row, installed_sources, load_corpus, split_of

WORDS = ["alpha", "beta", "gamma", "delta", "(", ")"]


def brute_force(passages, others, share):
    """The oracle: all against all."""
    found = []
    for number, passage in enumerate(passages):
        mine = shingles(passage)
        if any(len(mine & shingles(other)) >= share * len(mine | shingles(other)) for other in others):
            found.append(number)
    return found


@given(
    seed=st.integers(0, 2**20),
    sizes=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    share=st.sampled_from([0.3, 0.5, 0.75, 0.8, 1.0]),
)
def test_near_twins_are_those_of_a_comparison_of_all_with_all(seed, sizes, share):
    draw = random.Random(seed)
    passages, others = ([" ".join(draw.choices(WORDS, k=draw.randint(0, 9))) for _ in range(n)] for n in sizes)
    found = near_twins(passages, others, share=share)
    assert [number for number, _ in found] == brute_force(passages, others, share)
    for number, other in found:
        assert brute_force([passages[number]], [others[other]], share) == [0]


def test_shingles_are_sequences_of_words():
    assert shingles("def f(x): return x") == {("def", "f", "x"), ("f", "x", "return"), ("x", "return", "x")}
    assert shingles("f()") == {("f",)}
    assert shingles("") == {()}


def row(module, number, passage):
    return Row(module, number, f"f{number}", f"Query number {number} of some.", passage)


def test_the_figures_count_what_is_there():
    modules = [f"torch.m{number}" for number in range(40)]
    test_module = next(module for module in modules if split_of(module) == "test")
    train_module = next(module for module in modules if split_of(module) == "train")
    rows = [
        row(train_module, 1, "one two three four five six"),
        row(train_module, 2, "nothing like any of the others here"),
        row("json.decoder", 3, "the standard library has its own words"),
        row(test_module, 4, "one two three four five seven"),
        row(test_module, 5, "not a twin of anything at all"),
    ]
    text = figures(Corpus(rows, mined=9, files=7, packages={"python": "3.99", "torch": "9.9"}))
    standard = split_of("json.decoder")
    assert "2 of 46 packages, 7 files, 9 functions with a usable docstring, 5 distinct pairs." in text
    assert f"| train | {2 + (standard == 'train')} | {1 + (standard == 'train')} |" in text
    assert f"| test | {2 + (standard == 'test')} |" in text
    assert "Near-twins: 1 of " in text
    assert "| torch | 9.9 | 4 | " in text
    assert "| python | 3.99 | 1 | PSF-2.0 |" in text


def test_licences_come_from_the_metadata():
    assert licence("numpy").startswith("BSD")
    assert licence("no-such-distribution") == "not stated"


def test_figures_are_written_between_the_markers_and_nowhere_else(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    write_figures("new", card)
    write_figures("newer", card)
    assert card.read_text() == f"before\n{MARKERS[0]}\nnewer\n{MARKERS[1]}\nafter\n"
    card.write_text("no markers")
    with pytest.raises(ValueError, match="card must hold the markers"):
        write_figures("new", card)


def written():
    return CARD.read_text(encoding="utf-8").partition(MARKERS[0])[2].partition(MARKERS[1])[0].strip().splitlines()


def test_the_card_holds_figures():
    assert "distinct pairs" in written()[0]
    assert sum(line.startswith("Near-twins: ") for line in written()) == 1


@pytest.mark.slow
def test_the_cards_figures_are_this_environments(monkeypatch):
    told = re.findall(r"^\| (\S+) \| (\S+) \| [\d,]+ \| [^|]+ \|$", "\n".join(written()), re.MULTILINE)
    assert told
    if sorted(told) != sorted((source.name, source.version) for source in installed_sources()):
        pytest.skip("the card was written with other versions of Python or of the packages")
    monkeypatch.setattr(card, "near_twins", lambda *passages: [])  # a quarter of a minute: `data-card --write`
    fresh = figures(load_corpus(progress=False)).splitlines()
    same = [line for line in written() if not line.startswith("Near-twins")]
    assert same == [line for line in fresh if not line.startswith("Near-twins")]
