"""A corpus of numbers in words, for experiments that are small enough to test."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gclib.course.experiments import results
from gclib.data.pairs import TextPair

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def spelled_pairs(split: str, *, limit: int | None, progress: bool) -> list[TextPair]:
    """What `load_pairs` returns, of 1,000 pairs to train on and 100 to test with."""
    numbers = range(1_000) if split == "train" else range(1_000, 1_100)
    spelled = [" ".join(WORDS[int(digit)] for digit in str(number)) for number in numbers]
    return [TextPair(f"the number {text}", f"def {text}") for text in spelled][:limit]


@contextmanager
def small_corpus(folder: Path, monkeypatch: pytest.MonkeyPatch, *more_caches: Callable) -> Iterator[None]:
    """Experiments read that corpus and keep what they train in `folder`; what was read before is forgotten."""
    caches = (results._texts, results._all_pairs, *more_caches)
    monkeypatch.setattr(results, "load_pairs", spelled_pairs)
    monkeypatch.setenv("GCLIB_CACHE", str(folder))
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()
