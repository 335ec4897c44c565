"""Under nbval: solutions must be right (strict), and nobody's own record of progress is read or changed."""

import os

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Set what the notebook's kernel inherits; nbval starts it in the setup of the first cell."""
    os.environ["GCLIB_STRICT"] = str(int("solutions" in item.path.parts))
    os.environ["GCLIB_PROGRESS_FOLDER"] = str(item.config._tmp_path_factory.getbasetemp() / "progress")
