"""What holds for every test: shapes are checked, one thread a worker, seeds, and how many random cases.

Nothing here needs Jupyter or a browser, so tests/gpu also runs where neither is installed.
"""

import gc
import importlib.util
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
# Of the course's tests, those that `make check` runs too.
QUICK = ("test_the_solution_passes", "test_the_oracle_passes_its_own_check")
HAVE_BEARTYPE = importlib.util.find_spec("beartype") is not None

os.environ["GCLIB_CHECK_SHAPES"] = str(int(HAVE_BEARTYPE))  # read when gclib is first imported
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that a test starts
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# `pytest --hypothesis-profile=NAME`. The default is a share of the cases; "deep" runs ten times as many.
for name, cases in {"quick": 15, "default": 100, "deep": 1000}.items():
    settings.register_profile(
        name,
        max_examples=cases,
        deadline=None,
        derandomize=bool(os.environ.get("CI")),
        suppress_health_check=[HealthCheck.too_slow],
        print_blob=True,
    )
settings.load_profile("default")


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; some tests interrupt themselves
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)


def pytest_collection_finish():
    """Ten thousand tests and PyTorch are there to stay: a collection, of which the lab makes many, passes them by, and
    comes seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_report_header(config):
    return "gclib: shapes are " + ("checked" if HAVE_BEARTYPE else "not checked (beartype is not installed)")


def pytest_collection_modifyitems(config, items):
    """Mark by folder, skip in words what cannot run here, and put the notebooks last."""
    deep = config.getoption("--hypothesis-profile", default=None) == "deep"
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if folder == "gpu":
            item.add_marker("gpu")
        if folder == "browser":
            item.add_marker("browser")
            item.add_marker(pytest.mark.flaky(reruns=1))  # a busy machine may lose a key: press it once more
        if folder == "course" and item.function.__name__ not in QUICK:
            item.add_marker("slow")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="this machine has no CUDA device"))
        if item.get_closest_marker("deep") and not deep:
            item.add_marker(pytest.mark.skip(reason="runs only under `make test-deep`"))
    items.sort(key=_stage)  # stable: the order inside a stage stays


def _stage(item) -> int:
    """0: unit and property tests, 1: the browser, 2: notebooks: many and short, so both workers end together."""
    if item.get_closest_marker("browser"):
        return 1
    return 2 if item.path.suffix == ".ipynb" else 0


@pytest.fixture(autouse=True)
def _seeds():
    """Every test starts from the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
