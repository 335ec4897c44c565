"""The corpus: rows mined from a fixed list of installed packages, split by file, kept in a cache.

The list is fixed so that an optional install never changes the data. What is installed of it, in which
versions, with which Python and by which rules, makes the fingerprint that names the cache.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from gclib.data.mining import Row, mine_files, size_of
from gclib.support.files import DamagedFile, cache_folder, code_digest, read_checked, write_checked

SPLITS = ("train", "test")
TEST_SHARE = 10  # one file in ten

# (import name, distribution): what torch, transformers, matplotlib, jupyterlab and ipywidgets bring along.
PACKAGES = (
    ("torch", "torch"),
    ("transformers", "transformers"),
    ("numpy", "numpy"),
    ("matplotlib", "matplotlib"),
    ("mpl_toolkits", "matplotlib"),
    ("sympy", "sympy"),
    ("mpmath", "mpmath"),
    ("networkx", "networkx"),
    ("huggingface_hub", "huggingface_hub"),
    ("tokenizers", "tokenizers"),
    ("safetensors", "safetensors"),
    ("fsspec", "fsspec"),
    ("filelock", "filelock"),
    ("packaging", "packaging"),
    ("tqdm", "tqdm"),
    ("psutil", "psutil"),
    ("fontTools", "fonttools"),
    ("PIL", "pillow"),
    ("contourpy", "contourpy"),
    ("pyparsing", "pyparsing"),
    ("dateutil", "python-dateutil"),
    ("IPython", "ipython"),
    ("ipykernel", "ipykernel"),
    ("ipywidgets", "ipywidgets"),
    ("traitlets", "traitlets"),
    ("prompt_toolkit", "prompt_toolkit"),
    ("pygments", "Pygments"),
    ("jedi", "jedi"),
    ("jupyterlab", "jupyterlab"),
    ("jupyterlab_server", "jupyterlab_server"),
    ("jupyter_server", "jupyter_server"),
    ("jupyter_client", "jupyter_client"),
    ("jupyter_core", "jupyter_core"),
    ("nbformat", "nbformat"),
    ("nbconvert", "nbconvert"),
    ("nbclient", "nbclient"),
    ("jinja2", "Jinja2"),
    ("tornado", "tornado"),
    ("zmq", "pyzmq"),
    ("anyio", "anyio"),
    ("httpx", "httpx"),
    ("requests", "requests"),
    ("urllib3", "urllib3"),
    ("babel", "babel"),
    ("bs4", "beautifulsoup4"),
)
# Parts that some builds of Python leave out, copies of other packages, and tests.
SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "test", "tests", "_vendor", "vendor", "site-packages", "dist-packages", "node_modules")
    + ("idlelib", "lib2to3", "ensurepip", "turtledemo", "pydoc_data")
)


@dataclass(frozen=True)
class Source:
    """One package to mine: a folder, or a module of one file, and the version that is installed."""

    name: str
    version: str
    path: Path

    def files(self) -> list[tuple[str, Path]]:
        """(module path, file) for each Python file; the standard library's modules carry no prefix."""
        if self.path.is_file():
            return [(self.name, self.path)]
        files = []
        for folder, subfolders, names in os.walk(self.path):
            subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
            files.extend(Path(folder, name) for name in names if name.endswith(".py"))
        return [(self._module(file), file) for file in files]

    def _module(self, file: Path) -> str:
        parts = file.relative_to(self.path).with_suffix("").parts
        return ".".join(parts if self.name == "python" else (self.name, *parts))


@dataclass(frozen=True)
class Corpus:
    """Distinct rows in an order that is as good as random, and what they were mined from."""

    rows: list[Row]
    mined: int
    files: int
    packages: dict[str, str]

    def split(self, name: str) -> list[Row]:
        """The rows of "train" or "test": they have no file in common."""
        return [row for row in self.rows if split_of(row.module) == name]


def installed_sources() -> list[Source]:
    """The standard library, and those of `PACKAGES` that are installed. None of them is imported."""
    sources = [Source("python", platform.python_version(), Path(sysconfig.get_path("stdlib")))]
    for name, distribution in PACKAGES:
        try:
            installed = importlib.metadata.distribution(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        paths = (Path(installed.locate_file(name)), Path(installed.locate_file(f"{name}.py")))
        sources.extend(Source(name, installed.version, path) for path in paths if path.exists())
    return sources


def load_corpus(
    sources: Sequence[Source] | None = None, *, folder: Path | None = None, progress: bool = True
) -> Corpus:
    """The corpus of the sources, from the cache in `folder` or mined now and kept there.

    A damaged cache is rebuilt, with a warning. Where `folder` can't be written, the corpus is mined for
    this process alone, with a warning.
    """
    sources = installed_sources() if sources is None else sources
    key = fingerprint(sources)
    path = (cache_folder() if folder is None else folder) / f"corpus-{key}.jsonl"
    try:
        return _read(path)
    except OSError:
        pass  # nothing there, or nothing that may be read
    except DamagedFile as damage:
        warnings.warn(f"the cached corpus is mined again: {damage}", stacklevel=2)
    corpus = build_corpus(sources, progress=progress)
    try:
        _write(path, key, corpus)
    except OSError as error:
        warnings.warn(f"the corpus can't be kept, the next start mines it again: {error}", stacklevel=2)
    return corpus


def build_corpus(sources: Sequence[Source], *, workers: int | None = None, progress: bool = True) -> Corpus:
    """Mine the sources in `workers` processes (one a core if None), drop duplicates, settle the order.

    The result depends on the sources alone, not on `workers`.
    """
    files = [file for source in sources for file in source.files()]
    label = f"mining {len(sources)} of {len(PACKAGES) + 1} packages"
    total = sum(size_of(path) for _, path in files)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not progress, mininterval=0.5) as bar:
        mined = mine_files(files, workers=workers or _cores(), on_bytes=bar.update)
    rows = sorted(distinct(mined), key=_shuffled)
    versions = {source.name: source.version for source in sources}
    return Corpus(rows, mined=len(mined), files=len(files), packages=versions)


def distinct(rows: Sequence[Row]) -> list[Row]:
    """The rows without duplicates: neither query nor passage stands in an earlier row of the result.

    Compared are queries without case and closing stop, and passages without the width of their white space.
    """
    queries: set[str] = set()
    passages: set[str] = set()
    distinct_rows = []
    for row in rows:
        query = row.query.casefold().rstrip(". ")
        passage = " ".join(row.passage.split())
        if query in queries or passage in passages:
            continue
        queries.add(query)
        passages.add(passage)
        distinct_rows.append(row)
    return distinct_rows


def split_of(module: str) -> str:
    """ "test" for one module path in ten, by its hash; "train" for the others."""
    return "test" if _hash(module) % TEST_SHARE == 0 else "train"


def fingerprint(sources: Sequence[Source]) -> str:
    """16 hexadecimal digits of the packages' versions, the kinds of Python and system, and the code of gclib/data."""
    rules = code_digest("data")
    versions = [[source.name, source.version] for source in sources]
    depends_on = json.dumps([versions, sys.implementation.name, platform.system(), rules])
    return hashlib.sha256(depends_on.encode()).hexdigest()[:16]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _shuffled(row: Row) -> int:
    """A sort key as good as random, so that the first n rows are a sample of all packages."""
    return _hash(f"{row.module}:{row.line}:{row.name}")


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write(path: Path, key: str, corpus: Corpus) -> None:
    body = "".join(json.dumps(row) + "\n" for row in corpus.rows).encode()
    header = {"fingerprint": key, "mined": corpus.mined, "files": corpus.files, "packages": corpus.packages}
    write_checked(path, header, body)


def _read(path: Path) -> Corpus:
    header, body = read_checked(path)
    rows = [Row(*json.loads(line)) for line in body.splitlines()]
    return Corpus(rows, header["mined"], header["files"], header["packages"])
