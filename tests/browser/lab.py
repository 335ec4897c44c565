"""JupyterLab and Notebook 7 as a person meets them: a server on a free port, a page in Chromium, clicks and keys."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

from gclib.support import ROOT

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
APPLICATIONS = {"lab": "LabApp", "notebook": "JupyterNotebookApp"}
KERNEL = "globalThis.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
# Every request of the page to the kernel, until the kernel has said that it is done with it.
COUNT_REQUESTS = f"""() => {{
    window.unanswered = new Set();
    {KERNEL}.anyMessage.connect((_, {{direction, msg}}) => {{
        if (direction === "send" && msg.channel === "shell") unanswered.add(msg.header.msg_id);
        if (msg.content.execution_state === "idle") unanswered.delete(msg.parent_header.msg_id);
    }});
}}"""
# A widget sends what it held back only after the answer to what it sent before: no request in three looks.
CALM = "() => (window.calm = unanswered.size ? 0 : window.calm + 1) > 2"
START_SECONDS = 90
MOST_MS = 240_000  # for one thing to appear; a busy machine is slow, never wrong


def find_chromium() -> str | None:
    """The first Chromium on the PATH, or None."""
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def watched(page, address, ready):
    """The page of this address once `ready` (JavaScript) is true; nothing went to its console when the test is over."""
    told = []
    page.on("console", lambda message: told.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto(address)
    page.wait_for_function(ready)
    yield page
    assert told == []


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A server of plain files; the address of the folder's index.html."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/index.html"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def jupyter(folder: Path, application: str = "lab", cells: str = "none") -> Iterator[str]:
    """A server of JupyterLab ("lab") or Notebook 7 ("notebook") on a copy of the notebooks in `folder`; its address.

    cells: JupyterLab's windowing mode; "none" draws every cell at once, "contentVisibility" is what a reader has.
    """
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    _write_settings(folder / "settings", cells)
    port, token = _free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyter", application, "--no-browser", "--allow-root", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={folder / 'notebooks'}"]
    command += [f"--{APPLICATIONS[application]}.expose_app_in_browser=True"]
    with (folder / "jupyter.log").open("w") as log:
        server = subprocess.Popen(command, env=_environment(folder), stdout=log, stderr=log, cwd=folder)
        try:
            _wait_until_up(server, port, token, folder / "jupyter.log")
            # reset: else JupyterLab brings back the tabs of the page before, and their cells mix with this one's.
            page = "lab/tree" if application == "lab" else "notebooks"
            yield f"http://127.0.0.1:{port}/{page}/{{notebook}}?token={token}&reset"
        finally:
            _stop(server)


def _environment(folder: Path) -> dict[str, str]:
    """Everything that Jupyter, IPython and the course write goes into `folder`."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "IPYTHONDIR": str(folder / "ipython"),
        "GCLIB_PROGRESS_FOLDER": str(folder / "progress"),
        "GCLIB_CHECK_SHAPES": "0",
        "GCLIB_STRICT": "0",
    }


def _write_settings(folder: Path, cells: str) -> None:
    """Cells are drawn in this mode, and nothing is asked of the network."""
    settings = {
        "notebook-extension/tracker": {"windowingMode": cells},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, values in settings.items():
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_up(server: subprocess.Popen, port: int, token: str, log: Path) -> None:
    address = f"http://127.0.0.1:{port}/api/status?token={token}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            with opener.open(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"Jupyter did not start:\n{log.read_text()[-3000:]}")


def _stop(server: subprocess.Popen) -> None:
    """End the server and its kernels, whatever state they are in."""
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    server.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=15)
    for process in alive:
        process.kill()
    server.wait(timeout=15)


@contextmanager
def fresh_page(chromium) -> Iterator:
    """A page of 1400 x 1000 pixels. Kernels end with it: a test that is run once more counts its cells from 1."""
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(MOST_MS)
    page = context.new_page()
    try:
        yield page
    finally:
        page.evaluate("globalThis.jupyterapp?.serviceManager.sessions.shutdownAll()")
        context.close()


class NotebookPage:
    """One notebook open in the browser."""

    def __init__(self, page, address: str, notebook: str, folder: Path = ROOT / "notebooks") -> None:
        self.page = page
        cells = json.loads((folder / notebook).read_text("utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        hidden = [cell["metadata"].get("jupyter", {}).get("source_hidden", False) for cell in code]
        self.numbers = [
            f"[{number}]:" for number, folded in enumerate(hidden, 1) if not folded
        ]  # as the page shows them
        page.goto(address.format(notebook=notebook))
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.wait_for_function(f"() => {KERNEL}?.status === 'idle'")  # before that, Run is silently lost
        page.evaluate(COUNT_REQUESTS)

    def settle(self) -> None:
        """Wait until Python has answered all that was done on the page; its threads may still have something to say.

        Keys are quicker than a busy kernel.
        """
        self.page.evaluate("window.calm = 0")
        self.page.wait_for_function(CALM, polling=50)

    def run_all(self) -> None:
        """Run > Run All Cells, and wait until the last cell has its number. A folded cell shows none."""
        self.page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
        self.page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
        texts = (
            "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent.trim())"
        )
        prompts = f"{texts}.filter(text => text)"
        self.page.wait_for_function(f"() => {prompts}.includes('[*]:')")  # begun: saved numbers are gone
        self.page.wait_for_function(f"numbers => {prompts}.join() === numbers.join()", arg=self.numbers)

    def choose_theme(self, theme: str) -> None:
        """Settings > Theme, by its command."""
        self.page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
        light = "true" if theme.endswith("Light") else "false"
        self.page.wait_for_selector(f"body[data-jp-theme-light='{light}']", state="attached")

    def errors(self) -> list[str]:
        """Text of every error, of every line on stderr, and of every widget that could not be shown."""
        selectors = (
            '[data-mime-type="application/vnd.jupyter.error"]',
            '[data-mime-type="application/vnd.jupyter.stderr"]',
            ".jupyter-widgets-error-widget",
        )
        return [text for selector in selectors for text in self.page.locator(selector).all_inner_texts()]

    def violations(self) -> list[str]:
        """What axe finds serious or critical in texts and outputs (the editors are JupyterLab's): rule, element."""
        from axe_core_python.sync_playwright import Axe

        found = Axe().run(self.page, context={"include": [[".jp-OutputArea"], [".jp-MarkdownOutput"]]})
        assert found["passes"], "axe looked at nothing"
        worse = [rule for rule in found["violations"] if rule["impact"] in ("serious", "critical")]
        return [f"{rule['id']}: {node['html'][:200]}" for rule in worse for node in rule["nodes"]]

    def press_on_slider(self, slider, key: str) -> None:
        """Focus a slider's handle, as Tab would, and press a key."""
        handle = slider.locator(".noUi-handle")
        handle.scroll_into_view_if_needed()
        handle.focus()
        handle.press(key)


def reopen(page, address: str, notebook: str, widgets: int, tries: int = 3) -> None:
    """Open a saved notebook afresh, and wait until its widgets are shown from their saved state.

    Jupyter gives a widget two seconds to be restored and then calls it lost for good, which a busy machine exceeds:
    then it is opened once more. Raises RuntimeError where some are lost each time.
    """
    shown = ".jp-OutputArea-output:is(.jupyter-widgets, :has(.jupyter-widgets))"
    for _ in range(tries):
        page.goto("about:blank")
        page.goto(address.format(notebook=notebook))
        page.wait_for_function(f"() => {KERNEL}?.status === 'idle'", timeout=MOST_MS)
        page.wait_for_function(f"() => document.querySelectorAll('{shown}').length >= {widgets}", timeout=MOST_MS)
        if page.get_by_text("model not found").count() == 0:
            return
    raise RuntimeError(f"{notebook}: widgets were not restored from their state, {tries} times")


def wait_until(holds: Callable[[], bool], describe: Callable[[], str]) -> None:
    """Return once `holds()`; fail after MOST_MS with what `describe()` says then."""
    end = time.monotonic() + MOST_MS / 1000
    while not holds():
        if time.monotonic() > end:
            raise AssertionError(f"nothing came of it in {MOST_MS / 1000:.0f} s: {describe()[:300]}")
        time.sleep(0.05)
