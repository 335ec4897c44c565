"""Files that survive a crash: written under a temporary name, renamed when whole, checked when read.

A file is one JSON header line (its own checksum among it), then the body. Two processes that write the
same file at once each write their own temporary one; the last rename wins, and readers see a whole file always.
"""

import ast
import contextlib
import hashlib
import json
import os
import secrets
import stat
import time
from pathlib import Path

from gclib.support import PACKAGE, ROOT

STALE_SECONDS = 3_600


class DamagedFile(Exception):
    """A cached file that was cut, changed, or written by other rules."""


def cache_folder() -> Path:
    """Where built things are kept: `$GCLIB_CACHE`, else data/cache of the checkout, else the user's cache folder."""
    chosen = os.environ.get("GCLIB_CACHE")
    if chosen:
        return Path(chosen)
    if (ROOT / "data" / "README.md").is_file() and (ROOT / "pyproject.toml").is_file():
        return ROOT / "data" / "cache"
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(home) / "gclib"


def code_digest(*folders: str) -> str:
    """A checksum of what the modules directly in these folders of gclib do ("": gclib itself).

    Layout, comments, docstrings and imports don't count, nor in which of the modules a definition stands: code that
    moves from one to another leaves the checksum as it is.
    """
    parts = [part for folder in folders for path in (PACKAGE / folder).glob("*.py") for part in _definitions(path)]
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


def _definitions(path: Path) -> list[str]:
    """Each statement of a module as a text: without layout, comments, docstrings and imports."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            del node.body[0]
        if isinstance(getattr(node, "body", None), list):
            node.body = [one for one in node.body if not isinstance(one, (ast.Import, ast.ImportFrom))]
    return [ast.dump(statement) for statement in tree.body]


def write_checked(path: Path, header: dict, body: bytes) -> None:
    """Write the header (with the body's size and checksum added) and the body; all of it or nothing."""
    stamped = {**header, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    write_atomically(path, json.dumps(stamped).encode() + b"\n" + body)


def read_checked(path: Path) -> tuple[dict, bytes]:
    """The header and the body. Raises `FileNotFoundError`, or `DamagedFile` saying what is wrong."""
    first, newline, body = path.read_bytes().partition(b"\n")
    try:
        header = json.loads(first)
        expected = header["bytes"], header["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path.name}: the header can't be read") from error
    if (len(body), hashlib.sha256(body).hexdigest()) != expected:
        raise DamagedFile(f"{path.name}: {len(body)} bytes that don't match the checksum in the header")
    return header, body


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name beside `path`, then rename it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_parts(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:  # with the permissions of any new file, which mkstemp would narrow
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def as_new_files(folder: Path) -> None:
    """Give every file in the folder the permissions of a new one: some writers keep theirs to their owner alone."""
    probe = folder / f".{secrets.token_hex(8)}.part"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _remove_stale_parts(folder: Path) -> None:
    """Remove what a process left that was ended in the middle of writing, an hour ago or more."""
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink()
