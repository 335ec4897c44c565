"""The folder of a run before anything is loaded: can it be written, is another run at work there, is there room?

A run holds a lock in its folder (`locked`), so that no two write there at once. The system lets go of a killed run's
lock by itself; where a file system has no locks, the file in the folder says who holds it.
"""

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gclib.support.validation import refuse
from gclib.support.words import MiB, format_bytes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

LOCK = "run.lock"


def check_output(output: Path) -> None:
    """A folder, or a place where one can be made; ValueError for a file, or below one."""
    try:
        there = next(path for path in (output, *output.absolute().parents) if path.exists() or path.is_symlink())
        is_folder = there.is_dir()
    except OSError as error:
        raise refuse("--output", f"must be a folder that can be read ({error.strerror})", str(output)) from error
    if not is_folder:
        raise refuse("--output", "must be a folder, or one that can be made", f"{output}, and {there} is no folder")


def check_new_output(output: Path) -> None:
    """ValueError where a new run would write over an older one, or over something else of its names."""
    if (output / "config.json").exists():
        raise refuse("--output", "must be a new folder, or be given with --resume", f"{output}, which holds a run")
    present = [name for name in ("model", "adapter", "records.jsonl", "evaluations.jsonl") if (output / name).exists()]
    present += [path.name for path in sorted(output.glob("checkpoint-*"))]
    if present:
        rule = f"must be a folder without {present[0]}, which a run would write over"
        raise refuse("--output", rule, str(output))


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Inside, this process alone is at work in the folder, which is made, and removed again where it stays empty.

    Raises ValueError, in words, where another run is at work there, and where nothing can be written.
    """
    check_output(output)
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        try:
            output.mkdir(parents=True, exist_ok=True)
            handle = _take(output / LOCK)
        except OSError as error:
            raise refuse("--output", f"must be a folder that can be written ({error.strerror})", str(output)) from error
        try:
            yield
        finally:
            _release(output / LOCK, handle)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds the run
                folder.rmdir()


def check_room(output: Path, needed_bytes: int) -> None:
    """ValueError unless the disk of the folder, or of the folder that it would be made in, has so much room."""
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes + MiB:
        rule = f"must be on a disk with {format_bytes(needed_bytes + MiB)} free, for checkpoints and model"
        raise refuse("--output", rule, f"{output} with {format_bytes(free)}")


def _take(path: Path) -> int:
    """The open lock file, locked, with who holds it inside."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            holder, advice = _holder(handle), ""
            try:
                if not _lock(handle) and holder and _may_live(holder):
                    advice = f" (if that process is gone, remove {path})"
                    raise BlockingIOError
            except BlockingIOError as error:
                who = "process {pid} on {host} since {since}".format_map(holder) if holder else "another process"
                got = f"{path.parent}, where {who} is at work{advice}"
                raise refuse("--output", "must be a folder that no other run writes into", got) from error
            if _is_at(path, handle):  # and not one that its holder has just removed
                _write_holder(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int) -> bool:
    """Whether the file system has locks, and this process the file's. BlockingIOError where another one has it."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(handle, MiB, os.SEEK_SET)  # behind what is written, which others read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except BlockingIOError:
        raise
    except OSError as error:
        if fcntl is None:
            raise BlockingIOError from error
        return False
    return True


def _release(path: Path, handle: int) -> None:
    """Remove the file while it is still locked, where a system can remove open files, and let go of it."""
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(handle)
    if fcntl is None:
        with contextlib.suppress(OSError):
            path.unlink()


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _write_holder(handle: int) -> None:
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps(about).encode())


def _holder(handle: int) -> dict[str, Any]:
    """Who wrote the lock file; nothing where that can't be read."""
    try:
        holder = json.loads(os.read(handle, 4_096))
        return {name: holder[name] for name in ("pid", "host", "since")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _may_live(holder: dict[str, Any]) -> bool:
    """Whether that process may still be running: it does here, or it is on another machine."""
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except (OSError, TypeError):
        return True
    return True
