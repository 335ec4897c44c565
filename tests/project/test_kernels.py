"""Kernels that are forks: as real ones, but for the libraries that are there before they ask."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STARTED = """
import os, sys
import gclib  # what a worker of the tests has read, and a kernel has not
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, start_new_kernel
from tests.project import kernels

kernels.use_forks()
manager, client = start_new_kernel(kernel_name=CURRENT_ENV_KERNEL_NAME, cwd="/")
asked = []
client.execute_interactive(sys.argv[1], output_hook=lambda said: asked.append(said["content"].get("text", "")))
print(manager.provisioner.pid, *"".join(asked).split(), flush=True)
input()
"""
ASKED = """
import multiprocessing, os, sys
print([name for name in ("gclib", "pytest", "transformers.models.bert.modeling_bert") if name in sys.modules])
print(multiprocessing.get_start_method(), multiprocessing.parent_process(), os.getcwd())
print(len(sys.path) - len(set(sys.path)))
"""
TOLD = "['transformers.models.bert.modeling_bert'] fork None / 0"


def alive(pid: int) -> bool:
    """Whether the process is there and more than an entry of a table."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forks on Linux alone")
@pytest.mark.parametrize("end", ["killed", "at its end"])
def test_a_fork_has_read_nothing_of_the_course_and_ends_with_who_started_it(end):
    command = [sys.executable, "-c", STARTED, ASKED]
    started = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid, told = started.stdout.readline().split(maxsplit=1)
    assert told.strip() == TOLD and alive(int(pid))
    if end == "killed":
        started.kill()
    started.communicate("\n", timeout=60)
    for _ in range(100):
        if not alive(int(pid)):
            return
        time.sleep(0.1)
    pytest.fail("the kernel lives on")
