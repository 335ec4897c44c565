"""Under nbval: solutions must be right (strict), and nobody's own record of progress is read or changed.

A plugin of pytest, so that no file of the tests stands among the chapters: `-p tests.project.kernels`, from the
project's folder. GCLIB_STRICT=1 makes the chapters strict too: a teacher marks with it.

On Linux a kernel is the fork of a process that has read PyTorch and transformers, and nothing of the course: else each
of the thirty kernels reads them again, which takes longer than many a notebook. The rest of a kernel is as ever;
`make notebooks` has real ones.
"""

import atexit
import multiprocessing
import os
import sys
from importlib.metadata import EntryPoint
from multiprocessing import forkserver
from typing import Any
from unittest.mock import patch

import pytest
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from tests.project.forked import be_kernel

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two kernels that fight for threads take several times as long
ALL_STRICT = os.environ.get("GCLIB_STRICT") == "1"
SERVER = forkserver.ForkServer()  # of its own: the tests' ranks are forks of another, that has read the course
SERVER.set_forkserver_preload(
    ["ipykernel.kernelapp", "ipywidgets", "torch._dynamo", "transformers.models.bert.modeling_bert"]
)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Set what the notebook's kernel inherits; nbval starts it in the setup of the first cell."""
    os.environ["GCLIB_STRICT"] = str(int(ALL_STRICT or "solutions" in item.path.parts))
    os.environ["GCLIB_PROGRESS_FOLDER"] = str(item.config._tmp_path_factory.getbasetemp() / "progress")
    if item.path.suffix == ".ipynb" and sys.platform == "linux":
        use_forks()


def use_forks():
    """Start the kernels of this process so from now on."""
    factory = KernelProvisionerFactory.instance()
    factory.provisioners["forked"] = EntryPoint("forked", f"{__name__}:ForkedKernel", factory.GROUP_NAME)
    factory.default_provisioner_name = "forked"


class ForkedKernel(LocalProvisioner):
    """Starts a kernel as a fork of multiprocessing's fork server, in a session of its own."""

    async def launch_kernel(self, cmd: list[str], **options: Any) -> KernelConnectionInfo:
        """Launch a kernel with a command, which is `python -m ipykernel_launcher ...`; another one is run as it is."""
        if cmd[1:3] != ["-m", "ipykernel_launcher"]:
            return await super().launch_kernel(cmd, **options)
        context = multiprocessing.get_context("forkserver")
        kernel = context.Process(target=be_kernel, args=(cmd[3:], options["env"], options.get("cwd")))
        with patch.object(forkserver, "connect_to_new_process", SERVER.connect_to_new_process):
            kernel.start()
        atexit.register(kernel.kill)  # before multiprocessing waits for it
        self.process = _AsPopen(kernel)
        self.pid = self.pgid = kernel.pid
        return self.connection_info


class _AsPopen:
    """A process of multiprocessing, with the names that a provisioner knows."""

    stdin = stdout = stderr = None

    def __init__(self, process: Any):
        self.process, self.wait = process, process.join
        self.kill, self.terminate = process.kill, process.terminate

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.process.pid, signum)
