"""The figures of the data card: counts, lengths, licences, and how alike train and test are."""

import importlib.metadata
import itertools
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from gclib.data.corpus import PACKAGES, SPLITS, Corpus
from gclib.support import ROOT
from gclib.support.validation import refuse

CARD = ROOT / "data" / "README.md"
MARKERS = ("<!-- figures: python -m gclib data-card --write -->", "<!-- /figures -->")
SHINGLE_WORDS = 3
LICENCE_NAME = 60  # characters
TWIN_SHARE = 0.5


def figures(corpus: Corpus) -> str:
    """The figures as markdown: sizes of both splits, lengths, near-twins, then one line a package."""
    train, test = (corpus.split(name) for name in SPLITS)
    twins = near_twins([row.passage for row in test], [row.passage for row in train])
    lines = [
        f"{len(corpus.packages)} of {len(PACKAGES) + 1} packages, {corpus.files:,} files, "
        f"{corpus.mined:,} functions with a usable docstring, {len(corpus.rows):,} distinct pairs.",
        "",
        "| split | pairs | files | query characters, median (95 %) | passage characters, median (95 %) |",
        "|---|---|---|---|---|",
        *(_split_line(name, rows) for name, rows in zip(SPLITS, (train, test), strict=True)),
        "",
        f"Near-twins: {len(twins):,} of {len(test):,} test passages ({_percent(len(twins), len(test))}) have at least "
        f"{TWIN_SHARE:.0%} of their {SHINGLE_WORDS}-word sequences in common with a training passage (common / all).",
        "",
        "| package | version | pairs | licence |",
        "|---|---|---|---|",
        *_package_lines(corpus),
    ]
    return "\n".join(lines)


def write_figures(text: str, card: Path = CARD) -> None:
    """Put the figures between the card's markers. ValueError where the card lacks them."""
    before, marker, rest = card.read_text(encoding="utf-8").partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not marker or not end:
        raise refuse("card", f"must hold the markers {MARKERS[0]} and {MARKERS[1]}", str(card))
    card.write_text(f"{before}{marker}\n{text}\n{end}{after}", encoding="utf-8")


def near_twins(passages: Sequence[str], others: Sequence[str], *, share: float = TWIN_SHARE) -> list[tuple[int, int]]:
    """(passage, other) for each passage of which an other one is a near-twin: the first found, by their numbers.

    Twins share at least `share` of their distinct three-word sequences (Jaccard: common / all of both). Exact, without
    comparing all with all: of sets that alike, the rarest few elements of one must meet the rarest few of the other
    (prefix filtering: Chaudhuri et al. 2006; Bayardo et al. 2007).
    """
    sets = [shingles(text) for text in (*passages, *others)]
    counts = Counter(itertools.chain.from_iterable(sets))
    prefixes = []
    for own in sets:
        rarest_first = sorted(own, key=lambda shingle: (counts[shingle], shingle))
        prefixes.append(rarest_first[: len(own) - math.ceil(share * len(own)) + 1])
    holders = defaultdict(list)
    for number in range(len(passages), len(sets)):
        for shingle in prefixes[number]:
            holders[shingle].append(number)
    twins = []
    for number in range(len(passages)):
        candidates = dict.fromkeys(other for shingle in prefixes[number] for other in holders.get(shingle, ()))
        twin = next((other for other in candidates if _alike(sets[number], sets[other]) >= share), None)
        if twin is not None:
            twins.append((number, twin - len(passages)))
    return twins


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """The distinct sequences of three words (identifiers and numbers) in the text; a shorter text is one sequence."""
    words = re.findall(r"\w+", text)
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset(tuple(words[start : start + SHINGLE_WORDS]) for start in range(last))


def _alike(first: frozenset, second: frozenset) -> float:
    return len(first & second) / len(first | second)


def _split_line(name: str, rows: Sequence) -> str:
    files = len({row.module for row in rows})
    lengths = [_lengths(row.query for row in rows), _lengths(row.passage for row in rows)]
    return "| " + " | ".join([name, f"{len(rows):,}", f"{files:,}", *lengths]) + " |"


def _lengths(texts: Iterable[str]) -> str:
    lengths = sorted(map(len, texts))
    return f"{statistics.median(lengths):,.0f} ({lengths[int(0.95 * (len(lengths) - 1))]:,})" if lengths else "-"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _package_lines(corpus: Corpus) -> list[str]:
    """A package's pairs are those of its modules; modules of no other package are the standard library's."""
    pairs = Counter()
    for row in corpus.rows:
        top = row.module.split(".")[0]
        pairs[top if top in corpus.packages else "python"] += 1
    distributions = dict(PACKAGES)
    return [
        f"| {name} | {version} | {pairs[name]:,} | {licence(distributions.get(name))} |"
        for name, version in sorted(corpus.packages.items(), key=lambda item: -pairs[item[0]])
    ]


def licence(distribution: str | None) -> str:
    """The licence that the distribution's own metadata names; None is Python itself."""
    if distribution is None:
        return "PSF-2.0"
    try:
        metadata = importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not stated"
    text = metadata.get("License") or ""
    named = metadata.get("License-Expression") or (text if len(text) <= LICENCE_NAME else "")  # some put it all there
    if not named.strip():
        classified = [entry for entry in metadata.get_all("Classifier") or () if entry.startswith("License ::")]
        named = ", ".join(entry.split(" :: ")[-1] for entry in classified)
    return " ".join(named.split()).replace("|", "/") or "not stated"
