"""The corpus and its cache: split by file, no duplicates, damage noticed, two processes at once."""

import json
import os
import subprocess
import sys
import time
import warnings

import pytest

from gclib.data import corpus
from gclib.data.corpus import (
    PACKAGES,
    Row,
    Source,
    build_corpus,
    distinct,
    fingerprint,
    installed_sources,
    load_corpus,
    split_of,
)
from gclib.support import files as cache


def write_package(folder, modules=30, version="1.0"):
    """A package whose modules hold three functions each."""
    package = folder / "shop"
    (package / "tests").mkdir(parents=True)
    for number in range(modules):
        functions = "".join(
            f'def sell_{number}_{kind}(x):\n    """Sell {kind} number {number} to x."""\n    return x * {number}\n\n'
            for kind in ("apples", "pears", "plums")
        )
        (package / f"part{number}.py").write_text(functions)
    (package / "tests" / "check.py").write_text('def f():\n    """Never look into a test folder."""\n    return 1\n')
    return Source("shop", version, package)


@pytest.fixture
def source(tmp_path):
    return write_package(tmp_path)


@pytest.fixture(scope="session")
def whole():
    """The corpus of this environment, mined once and then read from the cache."""
    return load_corpus(progress=False)


def row(line, query, passage, module="m"):
    return Row(module, line, f"f{line}", query, passage)


def test_rows_modules_and_counts_of_a_package(source):
    built = build_corpus([source], progress=False)
    assert len(built.rows) == built.mined == 90
    assert built.files == 30
    assert built.packages == {"shop": "1.0"}
    assert {row.module for row in built.rows} == {f"shop.part{number}" for number in range(30)}


def test_the_order_is_the_same_for_any_number_of_workers_and_is_shuffled(source):
    one, three = (build_corpus([source], workers=workers, progress=False).rows for workers in (1, 3))
    assert one == three
    assert one != sorted(one)


def test_train_and_test_share_no_file_and_cover_everything(source):
    built = build_corpus([source], progress=False)
    train, test = built.split("train"), built.split("test")
    assert {row.module for row in train}.isdisjoint(row.module for row in test)
    assert sorted(train + test) == sorted(built.rows)
    assert train and test


def test_one_module_path_in_ten_is_for_testing():
    modules = [f"package.module_{number}" for number in range(10_000)]
    share = sum(split_of(module) == "test" for module in modules) / len(modules)
    assert 0.09 < share < 0.11
    assert [split_of(module) for module in modules] == [split_of(module) for module in modules]


def test_duplicates_on_either_side_are_dropped_and_the_first_stays():
    rows = [
        row(1, "Add one to x.", "def f(x): return x + 1"),
        row(2, "add ONE to x", "def g(x): return x + 2"),
        row(3, "Add two to x.", "def f(x):\n\n    return x + 1".replace("\n\n    ", "  ")),
        row(4, "Add three to x.", "def h(x): return x + 3"),
    ]
    assert [each.line for each in distinct(rows)] == [1, 4]


def test_a_second_start_reads_the_cache(source, tmp_path, monkeypatch):
    built = load_corpus([source], folder=tmp_path / "cache", progress=False)
    monkeypatch.setattr(corpus, "build_corpus", None)  # calling it would raise
    assert load_corpus([source], folder=tmp_path / "cache", progress=False) == built


def flip_a_byte(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        lambda content: content[:-10],
        lambda content: content[: len(content) // 3],
        lambda content: content + b"more\n",
        lambda content: b"",
        lambda content: b"not json\n" + content,
        lambda content: b"[1, 2]\n",
        lambda content: b"{}\n",
        lambda content: b"\xff\xfe\x00",
    ],
    ids=["flipped", "cut", "half", "longer", "empty", "header", "list", "no checksum", "binary"],
)
def test_a_damaged_cache_is_noticed_and_built_again(damage, source, tmp_path):
    folder = tmp_path / "cache"
    built = load_corpus([source], folder=folder, progress=False)
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="mined again"):
        assert load_corpus([source], folder=folder, progress=False) == built
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_corpus([source], folder=folder, progress=False) == built


def test_a_half_written_file_is_never_read_and_goes_away_when_old(source, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    old, young = (folder / f".corpus-x.jsonl.{name}.part" for name in ("old", "young"))
    for part in (old, young):
        part.write_text("half of")
    os.utime(old, (time.time() - 2 * cache.STALE_SECONDS,) * 2)
    assert len(load_corpus([source], folder=folder, progress=False).rows) == 90
    assert not old.exists()
    assert young.exists()


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_costs_the_cache_alone(source, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="can't be kept"):
        built = load_corpus([source], folder=tmp_path / "cache", progress=False)
    assert len(built.rows) == 90


@pytest.mark.slow
def test_two_processes_that_build_at_once_do_no_harm(source, tmp_path):
    code = (
        "import sys, json; from pathlib import Path; from gclib.data.corpus import Source, load_corpus\n"
        "folder = Path(sys.argv[1])\n"
        "found = load_corpus([Source('shop', '1.0', folder / 'shop')], folder=folder / 'cache', progress=False)\n"
        "print(json.dumps(found.rows))"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert len(json.loads(outputs[0])) == 90
    (path,) = (tmp_path / "cache").iterdir()  # one file, no temporary ones
    assert len(load_corpus([source], folder=path.parent, progress=False).rows) == 90


def test_the_fingerprint_follows_versions_and_nothing_else(source, tmp_path):
    other = Source("other", "1.0", tmp_path)
    same = Source("shop", "1.0", tmp_path / "elsewhere")
    newer = Source("shop", "1.1", source.path)
    keys = [fingerprint(sources) for sources in ([source], [same], [newer], [source, other])]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_the_rules_are_part_of_the_fingerprint_but_comments_are_not(source, monkeypatch):
    before = fingerprint([source])
    monkeypatch.setattr(corpus, "code_digest", lambda *files: "other rules")
    assert fingerprint([source]) != before


def test_the_list_of_packages_is_fixed_and_what_is_missing_is_left_out(monkeypatch):
    everything = {name for name, _ in PACKAGES} | {"python"}
    assert {source.name for source in installed_sources()} <= everything
    find = corpus.importlib.metadata.distribution

    def without_jupyter(name):
        if name.startswith(("jupyter", "ipy", "nb")):
            raise corpus.importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(corpus.importlib.metadata, "distribution", without_jupyter)
    names = {source.name for source in installed_sources()}
    assert {"python", "torch", "numpy"} <= names
    assert not {"jupyterlab", "IPython", "ipykernel", "nbformat"} & names


def test_the_progress_bar_says_how_many_packages(source, capsys):
    build_corpus([source], progress=True)
    assert f"mining 1 of {len(PACKAGES) + 1} packages" in capsys.readouterr().err
    build_corpus([source], progress=False)
    assert capsys.readouterr().err == ""


def test_one_module_packages_and_the_standard_library_are_named_as_imported(tmp_path):
    single = tmp_path / "six.py"
    single.write_text('def f():\n    """Do what the others do."""\n    return 1\n')
    assert Source("six", "1", single).files() == [("six", single)]
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "decoder.py").write_text("")
    modules = {module for module, _ in Source("python", "3", tmp_path).files()}
    assert modules == {"six", "json.decoder"}


@pytest.mark.slow
def test_this_environment_gives_enough_pairs_without_a_shared_file(whole):
    train, test = whole.split("train"), whole.split("test")
    assert len(train) >= 20_000
    assert len(test) >= 2_000
    assert {row.module for row in train}.isdisjoint(row.module for row in test)
    assert len(distinct(whole.rows)) == len(whole.rows)
