"""What the learner has done, in one JSON file a topic under data/cache/, written whole or not at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from gclib.support.files import cache_folder, write_atomically

FOLDER_VARIABLE = "GCLIB_PROGRESS_FOLDER"


def progress_folder() -> Path:
    """The folder of the record: what GCLIB_PROGRESS_FOLDER names (tests do), else the course's cache folder."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return Path(chosen) if chosen else cache_folder()


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
    content = json.dumps(record, indent=2, sort_keys=True).encode()
    try:
        write_atomically(progress_folder() / f"{topic}.json", content)
    except OSError as error:
        print(f"(Your progress could not be saved: {error})")
    return record
