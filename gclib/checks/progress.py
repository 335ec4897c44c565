"""What the learner has done, in one JSON file a topic under data/cache/, written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

FOLDER_VARIABLE = "GCLIB_PROGRESS_FOLDER"


def progress_folder() -> Path:
    """The folder of the record: data/cache/ of the project, or what GCLIB_PROGRESS_FOLDER names."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return Path(chosen) if chosen else Path(__file__).parents[2] / "data" / "cache"


def load(topic: str) -> dict:
    """The record of `topic` ("exercises", "predictions"); empty when there is none, or when it is damaged."""
    try:
        record = json.loads((progress_folder() / f"{topic}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def update(topic: str, change: Callable[[dict], None]) -> dict:
    """Load the record of `topic`, let `change` alter it, write it back atomically, and return it.

    A folder that cannot be written to costs the learner the record, never the verdict: then a line says so.
    """
    record = load(topic)
    change(record)
    try:
        _write(progress_folder() / f"{topic}.json", record)
    except OSError as error:
        print(f"(Your progress could not be saved: {error})")
    return record


def _write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".json", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2, sort_keys=True)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
