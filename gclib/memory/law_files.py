"""Fitted laws on disk, so that a model is run with fake tensors once and not once a session.

A file is named by everything that its law depends on: the encoders' configs and options, the versions of torch and
transformers, and the code of every folder that a step or its ledger runs through. It holds numbers only (JSON and npz,
no pickle). A damaged file is taken for none, and written again.
"""

import hashlib
import io
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gclib.support.files import DamagedFile, cache_folder, code_digest, read_checked, write_checked

Described = list[tuple[dict[str, Any], tuple[np.ndarray, ...]]]


class LawFiles:
    """The law files of one configuration.

    text: what the laws of its encoders depend on; loss: what else a law depends on that goes through the loss, or None
    where that cannot be written down (a function), and such laws are not kept.
    """

    def __init__(self, text: str, loss: str | None):
        self.text, self.loss = text, loss

    def read(self, key: tuple, *, with_loss: bool) -> Described | None:
        """The law kept under this key: (description, differences) of each of its pieces; None where there is none."""
        path = self._path(key, with_loss)
        if path is None:
            return None
        try:
            header, body = read_checked(path)
            with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
                return [
                    (entry["described"], tuple(arrays[f"{number}_{order}"] for order in range(entry["orders"])))
                    for number, entry in enumerate(header["pieces"])
                ]
        except (DamagedFile, OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
            return None

    def write(self, key: tuple, pieces: Described, *, with_loss: bool) -> None:
        """Keep a law; where nothing can be written, it is not kept."""
        path = self._path(key, with_loss)
        if path is None:
            return
        arrays = {f"{n}_{order}": array for n, (_, law) in enumerate(pieces) for order, array in enumerate(law)}
        body = io.BytesIO()
        np.savez_compressed(body, **arrays)
        entries = [{"described": described, "orders": len(law)} for described, law in pieces]
        with suppress(OSError):
            write_checked(path, {"pieces": entries}, body.getvalue())

    def _path(self, key: tuple, with_loss: bool) -> Path | None:
        if with_loss and self.loss is None:
            return None
        parts: Sequence[Any] = (_versions(), self.text, self.loss if with_loss else "", key)
        name = hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
        return cache_folder() / "laws" / f"{name}.law"


@lru_cache(maxsize=1)
def _versions() -> tuple[str, ...]:
    peft = version("peft") if find_spec("peft") else ""
    return version("torch"), version("transformers"), peft, code_digest("support", "", "losses", "models", "memory")
