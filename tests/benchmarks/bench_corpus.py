"""Seconds to build the corpus from the installed packages, and to start again from its cache.

    python tests/benchmarks/bench_corpus.py

Builds into a folder of its own, so that the learner's cache stays. The bars: under 60 s on two cores, and under 2 s.
"""

import tempfile
import time
from pathlib import Path

import paths  # noqa: F401

from gclib.data.corpus import load_corpus


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first start (built)", "second start (cached)"):
            start = time.perf_counter()
            corpus = load_corpus(folder=Path(folder), progress=False)
            seconds = time.perf_counter() - start
            pairs = " and ".join(f"{len(corpus.split(split)):,} {split} pairs" for split in ("train", "test"))
            print(f"{name}: {seconds:.1f} s, {pairs}")


if __name__ == "__main__":
    main()
