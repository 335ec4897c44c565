"""The project as a whole: pins agree, imports point left, docstrings are there, README and notebooks are honest."""

import ast
import copy
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from project import execute, readme

import gclib
from gclib.course.checks.engine import exercises_of
from gclib.course.machine import CORE, COURSE, read_pins
from gclib.support import ROOT

PACKAGE = ROOT / "gclib"
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CHAPTERS = [path for path in NOTEBOOKS if path.parent.name == "notebooks" and path.name[0].isdigit()]
SOLUTIONS = [path for path in NOTEBOOKS if path.parent.name == "solutions"]

# What may be loaded only where a person looks at something
SHOWING = {"matplotlib", "ipywidgets", "anywidget", "IPython"}
# One way: a folder imports itself, those of earlier lines, and its neighbours in its own line where that is no circle.
LAYERS = (
    ("support",),
    ("",),  # the training core, directly in gclib/
    ("losses",),
    ("models", "data"),
    ("memory",),
    ("training",),
    ("integrations", "audit"),
    ("course",),
)


def requirements():
    """Every requirement that pyproject.toml names, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for part in lists for text in part]


# --- pins -----------------------------------------------------------------------------------------------------


def test_every_requirement_is_pinned_inside_its_range():
    pins = read_pins()
    for requirement in requirements():
        assert pins[requirement.name] in requirement.specifier, requirement


def test_environment_yml_installs_the_same_pins():
    lines = [line.strip(' -"') for line in (ROOT / "environment.yml").read_text().splitlines()]
    named = [line.partition(";") for line in lines if re.match(r"[\w.-]+==", line)]
    listed = dict(pin.split("==") for pin, _, _ in named)
    assert {pin.split("==")[0]: only.strip() for pin, _, only in named if only} == {
        requirement.name: str(requirement.marker).replace('"', "'")
        for requirement in requirements()
        if requirement.marker
    }
    pins = read_pins()
    assert listed == {r.name: pins[r.name] for r in requirements()}
    assert "c constraints.txt" in lines and "e ." in lines


def test_the_pins_are_those_that_run_here():
    from importlib.metadata import version

    pins = read_pins()
    named = [one.name for one in requirements() if one.marker is None or one.marker.evaluate()]
    assert {n: version(n).split("+")[0] for n in named} == {n: pins[n] for n in named}


def test_the_machine_check_looks_at_what_the_project_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {Requirement(r).name for r in project["dependencies"]} == set(CORE)
    assert {Requirement(r).name for r in project["optional-dependencies"]["course"]} == set(COURSE)


def test_constraints_hold_versions_alone():
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"--|://|@ |\+", text)


# --- imports --------------------------------------------------------------------------------------------------


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


@cache
def imports(name: str, *, at_import_only: bool) -> set[str]:
    """Modules that module `name` imports; without those inside functions if `at_import_only`."""
    path = MODULES[name]
    found: set[str] = set()
    for node in walk(ast.parse(path.read_text("utf-8")), into_functions=not at_import_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return found


def walk(tree: ast.AST, *, into_functions: bool):
    """Every node of a module, with what only a type checker imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not into_functions:
            continue
        yield node
        yield from walk(node, into_functions=into_functions)


def own(names: set[str]) -> set[str]:
    """Those of `names` that are modules of gclib (the package itself, which re-exports, apart)."""
    return {name for name in names if name in MODULES and name != "gclib"}


def reached(start: str, *, at_import_only: bool = False) -> set[str]:
    """Every module of gclib that `start` leads to."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += own(imports(name, at_import_only=at_import_only))
    return seen


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_leads_back_to_itself(name):
    for imported in own(imports(name, at_import_only=False)):
        inside_own_package = MODULES[imported].name == "__init__.py" and name.startswith(f"{imported}.")
        if imported != name and not inside_own_package:
            assert name not in reached(imported), f"{name} imports {imported}, which leads back"


def folder_of(name: str) -> str:
    """The folder of gclib that a module stands in; "" for those directly in gclib/."""
    parts = MODULES[name].relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"gclib", "gclib.__main__"}))
def test_folders_import_one_way(name):
    layer = {folder: number for number, folders in enumerate(LAYERS) for folder in folders}
    for imported in own(imports(name, at_import_only=False)):
        assert layer[folder_of(imported)] <= layer[folder_of(name)], f"{name} imports {imported}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_pictures_and_widgets_are_loaded_below_course_alone(name):
    loaded = {imported.split(".")[0] for imported in imports(name, at_import_only=False)}
    assert folder_of(name) == "course" or not loaded & SHOWING, f"{name} imports {loaded & SHOWING}"


def test_peft_is_an_extra_that_adapters_alone_import_and_only_when_they_need_it():
    def with_peft(*, at_import_only):
        return {
            name
            for name in MODULES
            if "peft" in {p.split(".")[0] for p in imports(name, at_import_only=at_import_only)}
        }

    assert with_peft(at_import_only=False) == {"gclib.models.adapters"}
    assert with_peft(at_import_only=True) == set()


def test_the_package_shows_the_method_and_nothing_else():
    assert len(list(PACKAGE.glob("*.py"))) <= 9
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} <= {
        folder for layer in LAYERS for folder in layer
    }


# The method, in the order in which it reads
METHOD = ("steps", "towers", "chunks", "randomness", "losses/dense", "support/validation")


def test_the_method_is_read_in_about_a_thousand_lines():
    lines = {name: len((PACKAGE / f"{name}.py").read_text("utf-8").splitlines()) for name in METHOD}
    assert sum(lines.values()) <= 1_050 and lines["steps"] <= 400, lines


def functions(name: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a module, those inside others too."""
    nodes = ast.walk(ast.parse(MODULES[name].read_text("utf-8")))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function's body, its docstring apart."""
    body = function.body[bool(ast.get_docstring(function, clean=False)) :]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_function_is_longer_than_40_lines(name):
    assert {f.name: body_lines(f) for f in functions(name) if body_lines(f) > 40} == {}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_private_function_takes_more_than_8_arguments(name):
    counts = {
        f.name: len(
            [a for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "cls")]
        )
        for f in functions(name)
        if f.name.startswith("_") and not f.name.endswith("__")
    }
    assert {function: count for function, count in counts.items() if count > 8} == {}


def test_nothing_in_the_library_imports_notebooks_or_tests():
    for name in MODULES:
        roots = {imported.split(".")[0] for imported in imports(name, at_import_only=False)}
        assert not roots & {"notebooks", "tests", "nbformat", "nbclient", "pytest", "hypothesis"}, name


@pytest.mark.slow
def test_importing_gclib_loads_no_plots_no_widgets_and_no_transformers():
    unwanted = [*sorted(SHOWING), "transformers", "gclib.course.plots", "gclib.course.memory_lab.widget"]
    code = f"import sys, gclib; print([name for name in {unwanted} if name in sys.modules])"
    command, environment = [sys.executable, "-c", code], readme.plain_environment()
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert done.stdout.strip() == "[]"


# --- docstrings -----------------------------------------------------------------------------------------------


def public_things():
    """(name, object) of every public module, class, function and method that gclib defines itself."""
    for info in pkgutil.walk_packages(gclib.__path__, "gclib."):
        if info.name.endswith("__main__"):
            continue
        module = import_module(info.name)
        yield info.name, module
        for name, thing in vars(module).items():
            own_one = getattr(thing, "__module__", None) == info.name and inspect.isroutine(thing) | inspect.isclass(
                thing
            )
            if name.startswith("_") or not own_one:
                continue
            yield f"{info.name}.{name}", thing
            if inspect.isclass(thing):
                for method, value in vars(thing).items():
                    if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                        yield f"{info.name}.{name}.{method}", value


def test_everything_public_says_what_it_is_for():
    bare = [name for name, thing in public_things() if not (inspect.getdoc(thing) or "").strip()]
    assert not bare


def test_exported_names_exist():
    for name in gclib.__all__:
        assert hasattr(gclib, name), name


# --- README ---------------------------------------------------------------------------------------------------

README = readme.README.read_text("utf-8")


def test_the_readme_lists_todays_chapters_measured_ratios_and_files():
    assert readme.filled(README, *set(readme.PARTS) - {"output"}) == README, "run `make readme`"


@pytest.mark.slow
def test_the_readme_sample_prints_what_the_readme_says():
    assert readme.filled(README, "output") == README, "run `make readme`"


def test_the_readme_sample_has_twelve_lines():
    assert len([line for line in readme.sample(README).splitlines() if line.strip()]) == 12


def test_every_local_link_and_picture_of_the_readme_exists():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if "://" not in target]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_every_requirement_has_its_reason_beside_it():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert [r.name for r in requirements() if not re.search(rf'^ *"{r.name}[^"]*",  # \w.+$', text, re.MULTILINE)] == []


def test_the_readme_is_read_in_minutes():
    words = [word for word in README.split() if re.search(r"\w", word)]
    assert len(words) <= 1_500


def test_every_module_that_the_tree_names_exists():
    """A folder's first sentence leads to its modules: words in brackets are their names."""
    for folder in PACKAGE.iterdir():
        if (folder / "__init__.py").is_file():
            for names in re.findall(r"\(([^)]*)\)", readme.gloss(folder / "__init__.py")):
                for name in names.split(", "):
                    assert any((folder / place).exists() for place in (f"{name}.py", name)), f"{folder.name}: {name}"


# --- license and citation -------------------------------------------------------------------------------------


def test_license_and_citation_say_what_the_package_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["cff-version"], citation["version"], citation["license"]) == ("1.2.0", project["version"], "MIT")
    assert project["license"] == "MIT" and (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert citation["authors"] == project["authors"] == [{"name": "the gclib authors"}]
    assert {reference["url"] for reference in citation["references"]} == set(
        re.findall(r"https://arxiv.org[^)]+", README)
    )


# --- notebooks ------------------------------------------------------------------------------------------------


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: f"{path.parent.name}/{path.stem}")


@by_name(NOTEBOOKS)
def test_a_notebook_is_kept_as_a_fresh_run_left_it(path):
    notebook = nbformat.read(path, as_version=4)
    assert execute.find_problems(notebook) == []
    assert notebook.metadata.kernelspec == {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    assert path.stat().st_size <= 1_500_000


@by_name(CHAPTERS)
def test_a_chapter_has_its_measured_box_and_its_cells_in_order(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    box = next(cell.source for cell in cells if "<!-- measured -->" in cell.source)
    assert re.search(r"<!-- measured -->[\d.]+ minutes, [\d,]+ MiB at the peak<!-- /measured -->", box)
    minutes = float(re.search(r"measured -->([\d.]+) minutes", box)[1])
    # Chapter 06 plans three large jobs; 10, 12 and 14 train their rows, if they did not before; 13 has real weights and
    # two ranks. 05 took 0.6 minutes on one machine and 1.6 on a slower one.
    most = {"00": 1.0, "01": 1.0, "05": 2.0, "06": 2.5, "10": 3.0, "12": 3.0, "13": 3.0, "14": 3.0}
    assert minutes <= most.get(path.stem[:2], 1.5)


@by_name(CHAPTERS)
def test_a_chapter_begins_with_the_one_cell_that_says_what_to_type_where_gclib_is_missing(path):
    before = nbformat.read(path, as_version=4)
    after = copy.deepcopy(before)
    execute.put_guard(after)
    assert after == before, "run `make notebooks`"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("", "Kernel > Change Kernel"),
        ("import types; sys.modules['google.colab'] = types.ModuleType('google.colab')", "%pip install"),
        ("sys.platform = 'emscripten'", "on a computer"),
    ],
)
def test_without_gclib_a_chapter_says_in_words_what_to_type(place, words, tmp_path):
    code = f"import sys; {place}\n{execute.GUARD_CODE.read_text('utf-8')}"
    alone = [sys.executable, "-I", "-S", "-c", code]  # the standard library, and no package
    done = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr.split("NotHere: ")[1]
    here = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (here.returncode, here.stdout, here.stderr) == (0, "", "")


def test_make_clean_leaves_what_only_its_owner_can_make_again(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    cache, theirs = tmp_path / "data" / "cache", {"exercises.json", "predictions.json", "calibration-a-card.json"}
    for name in (*theirs, "corpus-1.jsonl", "laws/one.json", "../../_site/index.html"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).touch()
    for _ in range(2):  # again, when there is nothing left to remove
        subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"Makefile", *theirs}


@by_name(CHAPTERS)
def test_no_function_takes_the_name_of_another_cell(path):
    """An exercise's function in place of one that was imported stops the cells above it when they are run again."""
    owners, taken = {}, []
    for cell in nbformat.read(path, as_version=4).cells:
        for node in ast.parse(cell.source).body if cell.cell_type == "code" else ():
            defined = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            names = [alias.asname or alias.name for alias in getattr(node, "names", [])]
            for name in [node.name] if defined else names:
                owner, theirs = owners.setdefault(name, (cell.id, defined))
                taken += [name] if owner != cell.id and (defined or theirs) else []
    assert taken == []


@by_name(CHAPTERS)
def test_a_chapter_and_its_solutions_check_the_same_exercises(path):
    def checked_in(notebook):
        code = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
        return set(re.findall(r"\bch\d\d\.(\w+)\(", "\n".join(code)))

    module = import_module(f"gclib.course.checks.ch{path.name[:2]}")
    declared = {exercise.name for exercise in exercises_of(module)}
    assert declared == checked_in(path) == checked_in(path.parent / "solutions" / path.name)


def test_every_solution_belongs_to_a_chapter():
    assert {path.name for path in SOLUTIONS} <= {path.name for path in CHAPTERS}


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ({"output_type": "stream", "name": "stderr", "text": "UserWarning"}, "stderr"),
        ({"output_type": "stream", "name": "stdout", "text": "saved to /home/ann/x"}, "machine path: /home/ann/x"),
        ({"output_type": "stream", "name": "stdout", "text": r"saved to C:\Users\ann"}, "machine path"),
        ({"output_type": "stream", "name": "stdout", "text": "<f at 0x7f00aa12>"}, "memory address: 0x7f00aa12"),
        ({"output_type": "display_data", "data": {"image/png": "AAAA"}, "metadata": {}}, "without alt text"),
        ({"output_type": "display_data", "data": {"text/html": '<img src="x">'}, "metadata": {}}, "without alt"),
        (
            {
                "output_type": "display_data",
                "data": {"image/png": "A"},
                "metadata": {"image/png": {"alt": "but *one*"}},
            },
            "emphasised: *one*",
        ),
        ({"output_type": "error", "ename": "ValueError", "evalue": "no"}, "raised ValueError: no"),
    ],
)
def test_an_output_that_should_not_be_kept_is_named(output, problem):
    found = execute.output_problems(nbformat.from_dict(output))
    assert len(found) == 1 and problem in found[0]


def test_a_comment_for_nbval_becomes_a_tag_that_a_reader_does_not_see():
    asked = nbformat.v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(1)", metadata={"tags": ["a"]})
    other = nbformat.v4.new_code_cell("print('# NBVAL_CHECK_OUTPUT')")
    for cell in (asked, other):
        execute.tag_checked(cell)
    assert asked.source == "print(1)" and asked.metadata.tags == ["a", "nbval-check-output"]
    assert other.source.startswith("print") and "tags" not in other.metadata
