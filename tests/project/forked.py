"""What a forked kernel does first. Nothing is imported here that a real one has not: a notebook would not miss it."""

import multiprocessing
import os
import sys
import threading


def be_kernel(arguments: list[str], environment: dict[str, str], folder: str | None) -> None:
    """Be what `python -m ipykernel_launcher ARGUMENTS` is, with its words for the machine thrown away."""
    os.setsid()
    _end_with(multiprocessing.parent_process())
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder or ".")
    sys.argv = ["ipykernel_launcher", *arguments]
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    sys.path[:] = [each for each in sys.path if each not in ("", os.path.join(root, "tests"))]
    if sys.path.count(root) > 1:
        sys.path.remove(root)  # the tests' own; where gclib is installed from here, it is there once more
    multiprocessing.set_start_method(None, force=True)
    multiprocessing.current_process().name = "MainProcess"
    multiprocessing.process._parent_process = None
    sys.modules["numpy"].random.seed()  # else all kernels draw what the server would
    assert not {"gclib", "pytest", "hypothesis"} & {name.split(".")[0] for name in sys.modules}
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance()


def _end_with(parent: "multiprocessing.process.BaseProcess") -> None:
    """End this process when its parent does, however that ends."""

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
