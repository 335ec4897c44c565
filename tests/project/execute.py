"""Run notebooks top to bottom in fresh kernels, measure them, and keep their outputs: `make notebooks`.

    python tests/project/execute.py [NOTEBOOK ...]        without names: every chapter, then every solution

Minutes and the peak resident memory of the kernel and its children are written between `<!-- measured -->`
and `<!-- /measured -->` in the chapter's box. A notebook that raises, writes to stderr, shows a machine path,
a memory address or an image without alt text, or has a cell of more than 20 lines, is reported and left as it
was, and the exit status is 1. Figures and widgets are kept as PNGs (see `snapshots.py`). A comment that asks nbval
to compare a cell's output becomes a tag, which a reader does not see.
"""

import copy
import getpass
import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from project.snapshots import WIDGET, WRITE_STATE, Snapshots, keep_figure, widget_outputs  # noqa: E402

from gclib.support.files import cache_folder  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
MEASURED = re.compile(r"(<!-- measured -->).*?(<!-- /measured -->)", re.DOTALL)
MIB = 2**20
MAX_LINES = 20
CELL_SECONDS = 180
GUARD, GUARD_CODE = "where-it-runs", Path(__file__).with_name("where_it_runs.py")
CHECKED = {"comment": "# NBVAL_CHECK_OUTPUT\n", "tag": "nbval-check-output"}
WIDGET_NOTE = "*A widget stands here: run the notebook to use it.*"
COMMON_USERS = {"root", "user", "runner", "jovyan"}  # words that mean nobody
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
}


def main(names: list[str]) -> int:
    """Execute the notebooks named, or all; return the exit status."""
    paths = [Path(name).resolve() for name in names] or find_notebooks()
    failed = 0
    with Snapshots() as snapshots:
        for path in paths:
            try:
                minutes, peak_mib = execute(path, snapshots)
            except (CellExecutionError, CellTimeoutError, ValueError) as error:
                failed += 1
                print(f"{path.name}: FAILED\n{error}", flush=True)
            else:
                size = path.stat().st_size / 1000
                print(f"{path.name}: {minutes:.2f} minutes, {peak_mib:,} MiB, {size:,.0f} kB", flush=True)
    return int(failed > 0)


def find_notebooks() -> list[Path]:
    """Every chapter in order, then every solution."""
    return sorted(NOTEBOOKS.glob("*.ipynb")) + sorted(NOTEBOOKS.glob("solutions/*.ipynb"))


def execute(path: Path, snapshots: Snapshots) -> tuple[float, int]:
    """Run `path`, write it back with its outputs and measurements; return (minutes, peak MiB).

    snapshots: takes the pictures of the notebook's widgets.

    Raises CellExecutionError when a cell raises, ValueError when the result is not fit to be kept.
    """
    notebook = nbformat.read(path, as_version=4)
    if is_chapter(path):
        put_guard(notebook)
    refuse(long_cells(notebook))  # before minutes are spent
    there = saved_rows()
    minutes, peak_mib, widgets = run(notebook, path)
    if saved_rows() > there and any("already saved" in cell.source for cell in notebook.cells[:2]):
        minutes, peak_mib, widgets = run(notebook, path)  # as its box says; the first run trained
    snapshots.keep(notebook, widgets)
    tidy(notebook)
    refuse(find_problems(notebook))
    write_measured(notebook, minutes, peak_mib)
    nbformat.validate(notebook)
    temporary = path.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)
    return minutes, peak_mib


def saved_rows() -> set[Path]:
    """What trainings left in the cache."""
    return set(cache_folder().glob("*.json"))


def is_chapter(path: Path) -> bool:
    """Whether this is a chapter's notebook: no solution, and not the glossary."""
    return path.parent.name == "notebooks" and path.name[0].isdigit()


def put_guard(notebook: nbformat.NotebookNode) -> None:
    """Make the first cell of code the one, folded away, that says what to type where gclib is missing."""
    place = next(place for place, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    if notebook.cells[place].id != GUARD:
        notebook.cells.insert(place, nbformat.v4.new_code_cell(id=GUARD))
    notebook.cells[place].source = GUARD_CODE.read_text("utf-8").strip()
    notebook.cells[place].metadata = nbformat.from_dict({"jupyter": {"source_hidden": True}, "tags": [GUARD]})


def run(notebook: nbformat.NotebookNode, path: Path) -> tuple[float, int, dict]:
    """Execute every cell in a fresh kernel, in the notebook's folder; return (minutes, peak MiB, widgets' state)."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = nbformat.from_dict(copy.deepcopy(METADATA))
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
    )
    with tempfile.TemporaryDirectory() as progress:
        environment = os.environ | {
            "GCLIB_STRICT": str(int(path.parent.name == "solutions")),
            "GCLIB_BARS": "0",  # they write to stderr
            "GCLIB_PROGRESS_FOLDER": progress,
        }
        with client.setup_kernel(env=environment), PeakMemory(client.km.provisioner.pid) as memory:
            started = time.perf_counter()
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
            minutes = (time.perf_counter() - started) / 60
            widgets = read_state(client, Path(progress) / "widgets.json") if widget_outputs(notebook) else {}
    return minutes, round(memory.peak_bytes / MIB), widgets


def read_state(client: NotebookClient, path: Path) -> dict:
    """The state of every widget in the client's kernel, which writes it to `path`."""
    cell = nbformat.v4.new_code_cell(f"{WRITE_STATE}_write_state({str(path)!r})")
    client.nb.cells.append(cell)  # the client puts what it ran back into its place
    client.execute_cell(cell, len(client.nb.cells) - 1, store_history=False)
    client.nb.cells.pop()
    return json.loads(path.read_text("utf-8"))


class PeakMemory:
    """The largest resident memory of a process and its children, looked at every 20 ms in a thread."""

    def __init__(self, pid: int, seconds: float = 0.02) -> None:
        self.peak_bytes = 0
        self._process = psutil.Process(pid)
        self._seconds = seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._seconds):
            self.peak_bytes = max(self.peak_bytes, self._resident())

    def _resident(self) -> int:
        total = 0
        try:
            for process in [self._process, *self._process.children(recursive=True)]:
                total += process.memory_info().rss
        except psutil.NoSuchProcess:
            pass
        return total


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Normalise metadata, keep figures as PNGs, put words where a widget stands, cut our folder out of paths."""
    notebook.metadata = nbformat.from_dict(copy.deepcopy(METADATA))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
            tag_checked(cell)
        for output in cell.get("outputs", []):
            keep_figure(output)
            data = output.get("data", {})
            if WIDGET in data:
                output["data"] = nbformat.from_dict({"text/markdown": WIDGET_NOTE})
            for part, key in [(output, "text"), *((data, key) for key in data if key.startswith("text/"))]:
                if isinstance(part.get(key), str):
                    part[key] = part[key].replace(f"{ROOT}{os.sep}", "").replace(str(ROOT), ".")


def tag_checked(cell: nbformat.NotebookNode) -> None:
    """Ask nbval for the comparison of a cell's output by a tag, where a comment did."""
    if cell.source.startswith(CHECKED["comment"]):
        cell.source = cell.source.removeprefix(CHECKED["comment"])
        cell.metadata["tags"] = sorted({*cell.metadata.get("tags", []), CHECKED["tag"]})


def merge_streams(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Neighbouring pieces of stdout (or of stderr) as one, as JupyterLab keeps them."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        if merged and output.output_type == "stream" and output.get("name") == merged[-1].get("name"):
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def refuse(problems: list[str]) -> None:
    """Raise ValueError where there are any."""
    if problems:
        raise ValueError("\n".join(f"  {problem}" for problem in problems))


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Those that are not empty."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def long_cells(notebook: nbformat.NotebookNode) -> list[str]:
    """Which cells of code have more lines than a cell may have, in words."""
    counts = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in code_cells(notebook)]
    return [
        f"cell {n} has {count} lines; {MAX_LINES} are allowed" for n, count in enumerate(counts, 1) if count > MAX_LINES
    ]


def find_problems(notebook: nbformat.NotebookNode) -> list[str]:
    """Why this executed notebook should not be kept: one sentence for each reason."""
    problems = long_cells(notebook)
    for count, cell in enumerate(code_cells(notebook), start=1):
        if cell.execution_count != count:
            problems.append(f"cell {count} has execution count {cell.execution_count}")
        for output in cell.outputs:
            problems += [f"cell {count} {problem}" for problem in output_problems(output)]
    return problems


def output_problems(output: nbformat.NotebookNode) -> list[str]:
    """What is wrong with one output: an error, stderr, a path, a user's name, an address, no alt text, markup."""
    problems = []
    data = output.get("data", {})
    text = "\n".join([output.get("text", ""), *(v for k, v in data.items() if k.startswith("text/"))])
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    if output.output_type == "error":
        problems.append(f"raised {output.ename}: {output.evalue}")
    if output.get("name") == "stderr":
        problems.append(f"wrote to stderr: {output.text[:200]!r}")
    if found := re.search(r"(/(home|root|work|tmp|Users|opt)/|[A-Z]:\\)\S*", text):
        problems.append(f"shows a machine path: {found[0]}")
    user = getpass.getuser()
    if user not in COMMON_USERS and re.search(rf"\b{re.escape(user)}\b", text):
        problems.append(f"shows the user's name: {user}")
    if found := re.search(r"\b0x[0-9a-f]{6,}\b", text):
        problems.append(f"shows a memory address: {found[0]}")
    if not has_alt_text(output):
        problems.append("shows an image without alt text")
    if found := re.search(r"\*[a-z][^*]*\*", output.get("metadata", {}).get("image/png", {}).get("alt", "")):
        problems.append(f"shows asterisks where words were to be emphasised: {found[0]}")
    return problems


def has_alt_text(output: nbformat.NotebookNode) -> bool:
    """True when every image in the output says in words what it shows."""
    data, metadata = output.get("data", {}), output.get("metadata", {})
    tags = re.findall(r"<img\b[^>]*>", data.get("text/html", ""))
    bare = [kind for kind in data if kind.startswith("image/") and not metadata.get(kind, {}).get("alt")]
    return not bare and all(re.search(r'\balt="[^"]+"', tag) for tag in tags)


def write_measured(notebook: nbformat.NotebookNode, minutes: float, peak_mib: int) -> None:
    """Put the figures between the markers in the box. A solution needs no box."""
    text = f"{max(minutes, 0.1):.1f} minutes, {peak_mib:,} MiB at the peak"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = MEASURED.sub(rf"\g<1>{text}\g<2>", cell.source)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
