"""What `pip wheel .` gives is the whole library and nothing else, and it works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from project import readme

from gclib.course.chapters import NOTEBOOKS, written_chapters
from gclib.support import PACKAGE, ROOT

pytestmark = pytest.mark.slow
MEASURED = ("data/recordings", "data/results", "tests/benchmarks/results")  # what the chapters compare with


def run(command, folder):
    """What a command prints, run in `folder` with nothing of the checkout on its path; it must end with 0."""
    environment = {name: value for name, value in readme.plain_environment().items() if name != "PYTHONPATH"}
    environment["GCLIB_CACHE"] = str(folder / "cache")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built offline from a copy of what is packed, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(PACKAGE, source / "gclib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(NOTEBOOKS, source / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for place in MEASURED:
        shutil.copytree(ROOT / place, source / place)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    run([sys.executable, "-m", "pip", "wheel", str(source), "-w", str(folder), *offline], folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """(a new environment's Python, its packages' folder): gclib from the wheel, all other packages from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    places = {"base": str(folder), "platbase": str(folder), "installed_base": sys.base_prefix}
    packages, scripts = (Path(sysconfig.get_path(name, "venv", places)) for name in ("purelib", "scripts"))
    offline = ["--no-deps", "--no-index", "--quiet"]
    python = scripts / Path(sys.executable).name
    run([sys.executable, "-m", "pip", "--python", str(python), "install", str(wheel), *offline], folder)
    # A path file inside a folder that a path file names isn't read: the editable gclib of this environment stays out.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python, packages


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".data/data/share/gclib/" not in name}
    package = {path for path in PACKAGE.rglob("*.*") if "__pycache__" not in path.parts and path.is_file()}
    assert {name for name in files if ".dist-info/" not in name} == {
        path.relative_to(ROOT).as_posix() for path in package
    }


def test_the_wheel_says_what_it_is_and_carries_its_license(installed):
    (folder,) = installed[1].glob("gclib-*.dist-info")
    metadata = PathDistribution(folder).metadata
    assert metadata["License-Expression"] == "MIT" and metadata["Author"] == "the gclib authors"
    assert (folder / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_readme_sample_runs_on_the_installed_wheel(installed, tmp_path):
    python, packages = installed
    page = readme.README.read_text("utf-8")
    printed = run([python, "-c", f"{readme.sample(page)}\nimport gclib\nprint(gclib.__file__)"], tmp_path)
    assert printed.splitlines()[-1] == str(packages / "gclib" / "__init__.py")
    assert "\n".join(printed.splitlines()[:-1]) in page


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_the_commands_start_from_the_installed_wheel(installed, tmp_path, arguments):
    assert "usage: " in run([installed[0], "-m", "gclib", *arguments], tmp_path)


def test_the_installed_wheel_hands_out_the_course_and_leaves_a_readers_work(installed, tmp_path):
    command = [installed[0], "-m", "gclib", "course", "mine"]
    assert "jupyter lab mine" in run(command, tmp_path)
    for path in NOTEBOOKS.rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in path.parts:
            assert (tmp_path / "mine" / path.relative_to(NOTEBOOKS)).read_bytes() == path.read_bytes()
    (tmp_path / "mine" / "glossary.ipynb").write_text("my notes")
    assert "glossary.ipynb" in run(command, tmp_path)
    assert (tmp_path / "mine" / "glossary.ipynb").read_text() == "my notes"
    code = "from gclib.course.chapters import written_chapters; print(written_chapters())"
    assert run([installed[0], "-c", code], tmp_path).strip() == str(written_chapters())


def test_the_installed_wheel_has_all_that_was_measured_and_the_chapters_read(wheel, installed, tmp_path):
    share = {name.partition("share/gclib/")[2] for name in zipfile.ZipFile(wheel).namelist() if "share/gclib" in name}
    tables = {path.relative_to(ROOT).as_posix() for folder in MEASURED for path in (ROOT / folder).iterdir()}
    assert {name for name in share if not name.startswith("notebooks/")} == {n for n in tables if not n.endswith("png")}
    code = """from gclib.course import notebook
from gclib.course.experiments import baselines, fine_tuning, other_ways, summaries
paths = [baselines.RECORDED, fine_tuning.RESULTS, other_ways.RESULTS, summaries.RECORDED]
print(len(notebook.load_recordings()), len(notebook.saved_benchmark("tiled_cuda")))
print([path.name for path in paths if path.is_file()])"""
    here = run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"], tmp_path)
    assert run([installed[0], "-c", code], tmp_path) == here
