"""Files that survive a crash, where they are kept, and checksums of code."""

import os

import pytest

from gclib.support import files as cache
from gclib.support.files import DamagedFile, cache_folder, code_digest, read_checked, write_atomically, write_checked


def test_a_process_that_dies_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_code_digest_ignores_layout_comments_docstrings_imports_and_places(tmp_path):
    folders = [
        {"a": '"""Doc."""\nimport os\ndef f(x):\n    "Doc."\n    import re\n    return x # so\nBIG = 3\n'},
        {"b": "from os import path\ndef f(x):\n\n  return x\n", "c": "BIG=3"},
        {"a": "def f(x):\n  return 2\nBIG = 3\n"},
        {"a": "def f(x):\n  return x\nBIG = 3\n", "b": "SMALL = 1"},
    ]
    for number, texts in enumerate(folders):
        (tmp_path / str(number)).mkdir()
        for name, text in texts.items():
            (tmp_path / str(number) / f"{name}.py").write_text(text)
    digests = [code_digest(str(tmp_path / str(number))) for number in range(len(folders))]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_code_digest_counts_every_module_of_a_folder():
    assert code_digest("losses") != code_digest("") != code_digest("", "losses")


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.delenv("GCLIB_CACHE", raising=False)
    assert cache_folder().parts[-2:] == ("data", "cache")
    monkeypatch.setenv("GCLIB_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("GCLIB_CACHE")
    monkeypatch.setattr(cache, "ROOT", tmp_path / "site-packages")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / "gclib"


def test_checked_files_come_back_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_checked(path, {"name": "ä"}, b"body\nof two lines")
    header, body = read_checked(path)
    assert (header["name"], body) == ("ä", b"body\nof two lines")
    with pytest.raises(FileNotFoundError):
        read_checked(tmp_path / "none")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFile, match=r"file\.json.*checksum"):
        read_checked(path)
