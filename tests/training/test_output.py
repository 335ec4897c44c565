"""The folder of a run, before anything is loaded: `gclib.training.output`."""

import errno
import json
import os
import signal
import socket
from types import SimpleNamespace

import pytest
from helpers.ranks import exit_code

from gclib.support.words import MiB
from gclib.training import output
from gclib.training.output import LOCK, check_new_output, check_output, check_room, locked


def test_a_file_is_no_folder_and_nothing_can_be_made_below_it(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(ValueError, match=f"--output must be a folder.*{tmp_path / 'file'} is no folder"):
            check_output(path)
        with pytest.raises(ValueError, match="--output must be a folder"), locked(path):
            pass
    check_output(tmp_path / "new" / "folder")
    check_output(tmp_path)
    assert (tmp_path / "file").read_text() == "x" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["model", "records.jsonl", "evaluations.jsonl", "checkpoint-000003", "config.json"])
def test_a_new_run_writes_over_nothing(name, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    check_new_output(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="--output must be a (new folder|folder without)"):
        check_new_output(tmp_path)


def test_the_second_is_told_who_is_at_work_and_the_third_may_go_in(tmp_path):
    folder = tmp_path / "a" / "run"
    with locked(folder):
        told = f"--output must be a folder that no other run.*process {os.getpid()} on {socket.gethostname()} since 20"
        with pytest.raises(ValueError, match=told), locked(folder):
            pytest.fail("both went in")
        assert (folder / LOCK).is_file()
        (folder / "kept").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["kept"]
    with locked(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_folders_that_stay_empty_are_removed_and_no_others(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "a" / "b"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def lock_and_be_killed(folder):
    with locked(folder):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_the_lock_of_a_killed_run_holds_nobody_up(tmp_path):
    assert exit_code(lock_and_be_killed, tmp_path) == -signal.SIGKILL
    assert (tmp_path / LOCK).is_file()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_its_holder_just_removed_is_not_taken(tmp_path, monkeypatch):
    """Between opening and locking the holder goes: the file is another one by then."""
    path, lock, calls = tmp_path / LOCK, output._lock, []

    def removed_meanwhile(handle):
        if not calls:
            path.unlink()
        calls.append(handle)
        return lock(handle)

    monkeypatch.setattr(output, "_lock", removed_meanwhile)
    with locked(tmp_path):
        assert len(calls) == 2 and path.is_file()
        with pytest.raises(ValueError, match="no other run"), locked(tmp_path):
            pass


def no_locks(*_):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has none: the file alone says who is there."""
    if output.fcntl is None:
        pytest.skip("Windows always has locks")
    monkeypatch.setattr(output.fcntl, "flock", no_locks)


def write_lock(folder, pid, host):
    (folder / LOCK).write_text(json.dumps({"pid": pid, "host": host, "since": "yesterday"}))


def test_without_locks_a_process_that_lives_or_is_elsewhere_is_believed(tmp_path, without_locks):
    for pid, host in ((os.getppid(), socket.gethostname()), (1, "another-machine")):
        write_lock(tmp_path, pid, host)
        told = f"process {pid} on {host} since yesterday is at work.*if that process is gone, remove {tmp_path / LOCK}"
        with pytest.raises(ValueError, match=told), locked(tmp_path):
            pass
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == pid


def test_without_locks_a_process_that_is_gone_holds_nobody_up(tmp_path, without_locks):
    gone = 2**22 + 1  # above the largest number that Linux gives
    for content in (json.dumps({"pid": gone, "host": socket.gethostname(), "since": "x"}), "", "{"):
        (tmp_path / LOCK).write_text(content)
        with (
            locked(tmp_path),
            pytest.raises(ValueError, match=f"process {os.getpid()} on .* is at work"),
            locked(tmp_path),
        ):
            pass
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_disk_that_takes_nothing_is_told_by_its_own_word(number, tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(output, "os", SimpleNamespace(**{**vars(os), "open": refuses}))
    told = f"--output must be a folder that can be written.*{os.strerror(number)}"
    with pytest.raises(ValueError, match=told), locked(tmp_path / "new"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=10 * MiB)

    monkeypatch.setattr(output.shutil, "disk_usage", usage)
    check_room(tmp_path / "a" / "b", 9 * MiB)
    with pytest.raises(ValueError, match=r"--output must be on a disk with 10\.0 MiB free.*with 10\.0 MiB"):
        check_room(tmp_path / "a" / "b", 9 * MiB + 1)
    assert set(asked) == {tmp_path}
