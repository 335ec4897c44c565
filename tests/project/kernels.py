"""Under nbval: solutions must be right (strict), and nobody's own record of progress is read or changed.

A plugin of pytest, so that no file of the tests stands among the chapters: `-p tests.project.kernels`, from the
project's folder. GCLIB_STRICT=1 makes the chapters strict too: a teacher marks with it.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two kernels that fight for threads take several times as long
ALL_STRICT = os.environ.get("GCLIB_STRICT") == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Set what the notebook's kernel inherits; nbval starts it in the setup of the first cell."""
    os.environ["GCLIB_STRICT"] = str(int(ALL_STRICT or "solutions" in item.path.parts))
    os.environ["GCLIB_PROGRESS_FOLDER"] = str(item.config._tmp_path_factory.getbasetemp() / "progress")
