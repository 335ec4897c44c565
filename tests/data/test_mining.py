"""What one file gives, whatever is in it: `gclib.data.mining`."""

import ast
import json
import textwrap
from pathlib import Path

import pytest

from gclib.data import mining
from gclib.data.mining import mine_files, mine_source

FUNCTION = '''def {name}({argument}):
    """{query}"""
    return {argument} + 1
'''


def mined(text, encoding="utf-8"):
    return mine_source("module", textwrap.dedent(text).encode(encoding))


def test_the_pair_is_the_first_paragraph_and_the_function_without_it():
    (row,) = mined('''
        import os

        def add(a, b):
            """Add one number
            to   another one.

            A second paragraph.
            """
            # keep me
            return a + b
    ''')
    assert row.query == "Add one number to another one."
    assert row.passage == "def add(a, b):\n    # keep me\n    return a + b"
    assert (row.module, row.name, row.line) == ("module", "add", 4)


def test_methods_async_functions_decorators_and_branches():
    rows = mined('''
        if True:
            class Outer:
                class Inner:
                    @property
                    @cached(
                        size=3)
                    def first(self):
                        """The first one of all the things."""
                        return self.things[0]

                    async def second(self):
                        """Wait for the second of the things."""
                        return await self.things[1]
    ''')
    assert [row.name for row in rows] == ["Outer.Inner.first", "Outer.Inner.second"]
    assert rows[0].passage.startswith("@property\n@cached(\n    size=3)\ndef first(self):\n    return")
    assert rows[1].passage == "async def second(self):\n    return await self.things[1]"


def test_a_function_inside_a_function_belongs_to_the_outer_one():
    (row,) = mined('''
        def outer():
            """Make a function that adds one."""
            def inner(x):
                """Add one to a number, then stop."""
                return x + 1
            class Local:
                def method(self):
                    """Do something of the kind here."""
                    return 2
            return inner
    ''')
    assert row.name == "outer"
    assert "def inner(x):" in row.passage


@pytest.mark.parametrize(
    ("source", "passage"),
    [
        ('def f(x): "Add one to the number x."; return x + 1', "def f(x): return x + 1"),
        ('def f(x):\n    "Add one to the number é."; return x + 1', "def f(x):\n    return x + 1"),
        ('def f(x):\n    """Add one to the number x.""" # note\n    return 1', "def f(x):\n    # note\n    return 1"),
        ("def f(x):\n    r'''Add one to the number x.'''\n    return 1", "def f(x):\n    return 1"),
        ('def f(x):\n    ("Add one "\n     "to the number x.")\n    return 1', None),
        ('    # comment\ndef f(x):\n\t"""Add one to the number x."""\n\treturn 1', "def f(x):\n\treturn 1"),
    ],
)
def test_docstrings_written_in_other_ways(source, passage):
    rows = mine_source("m", source.encode())
    if passage is None:  # only what parses again is asked of a docstring in brackets
        ast.parse(rows[0].passage)
    else:
        assert [row.passage for row in rows] == [passage]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(:\n", "syntax"),
        ("def f():\n    '''Nothing but a \\ud800 surrogate.'''\n    return 1\n", "surrogate"),
        ("x = 1\0\n", "NUL"),
        ("# -*- coding: no-such-codec -*-\n", "codec"),
        ("(" * 5_000, "nesting"),
        ("", "empty"),
        ("def f():\n    '''Too short.'''\n    return 1\n", "short"),
        (f"def f():\n    '''{'long words ' * 40}'''\n    return 1\n", "long"),
        ("def f():\n    '''Unbelievablylongsingleword here.'''\n    return 1\n", "words"),
        ("def f():\n    '''Args: x is the first number.'''\n    return 1\n", "section"),
        (
            "def f():\n    '''Parameters\n    ----------\n    x: a number of things\n    '''\n    return 1\n",
            "numpy section",
        ),
        ("def f():\n    ''':param x: the first number.'''\n    return 1\n", "directive"),
        ("def f():\n    '''>>> f() and some more of it'''\n    return 1\n", "doctest"),
        ("def f():\n    '''A function that does nothing.'''\n", "no body"),
        ("def f():\n    '''A function that does nothing.'''\n    ...\n", "dots"),
        ("def f():\n    '''A function that does nothing.'''\n    pass\n", "pass"),
        ("def f():\n    b'''Bytes are not a docstring.'''\n    return 1\n", "bytes"),
    ],
    ids=lambda value: value if len(value) < 16 and "\n" not in value and "(" not in value else "",
)
def test_what_gives_no_pair(source, reason):
    assert mine_source("m", source.encode("utf-8", "surrogatepass")) == [], reason


def test_undecodable_bytes_give_no_pair():
    assert mine_source("m", b'def f():\n    """Add one to the \xff number x."""\n    return 1\n') == []


def test_other_encodings_and_ends_of_lines():
    text = 'def f(x):\n    """Größe eines Dings in Metern."""\n    return "ß"\n'
    expected = [("Größe eines Dings in Metern.", 'def f(x):\n    return "ß"')]
    for source in (
        text.encode(),
        b"\xef\xbb\xbf" + text.encode(),
        b"# -*- coding: latin-1 -*-\n" + text.encode("latin-1"),
        text.replace("\n", "\r\n").encode(),
        text.replace("\n", "\r").encode(),
    ):
        assert [(row.query, row.passage) for row in mine_source("m", source)] == expected


def test_characters_that_split_lines_elsewhere_do_not_shift_the_cut():
    (row,) = mine_source(
        "m", 'x = "\x0c \x1c \x85 \u2028"\n\x0c\ndef f():\n    """Add one to the number."""\n    return 1\n'.encode()
    )
    assert row.passage == "def f():\n    return 1"


def test_a_string_that_hangs_left_of_the_function_is_kept_whole():
    (row,) = mined(
        'class A:\n    def f(self):\n        """Give the text of a page."""\n        return """\nleft\n  two"""\n'
    )
    assert row.passage == 'def f(self):\n    return """\nleft\n  two"""'


def test_long_passages_end_at_a_whole_line():
    body = "".join(f"    x{number} = {number}\n" for number in range(1_000))
    (row,) = mine_source("m", f'def f():\n    """Set a thousand variables."""\n{body}'.encode())
    assert len(row.passage) <= mining.PASSAGE_CHARACTERS
    assert body.startswith(row.passage.split("\n", 1)[1] + "\n")
    (row,) = mine_source("m", f'def f():\n    """Set one very long variable."""\n    return "{"x" * 9_000}"\n'.encode())
    assert row.passage == "def f():"


@pytest.mark.parametrize("module", ["json.decoder", "asyncio.base_events", "typing", "contextlib"])
def test_on_real_files_the_passage_is_the_function_without_its_docstring(module):
    """Oracle: the syntax tree with the docstring taken out, against the passage parsed again."""
    path = Path(ast.__file__).parent / (module.replace(".", "/") + ".py")
    tree = ast.parse(path.read_bytes())
    functions = {node.lineno: node for node in ast.walk(tree) if isinstance(node, mining.Function)}
    rows = mine_source(module, path.read_bytes())
    assert len(rows) > 2
    for row in rows:
        node = functions[row.line]
        assert ast.get_docstring(node).split()[:3] == row.query.split()[:3]
        if len(row.passage) < mining.PASSAGE_CHARACTERS - 200:
            node.body = node.body[1:]
            assert ast.unparse(ast.parse(row.passage)) == ast.unparse(node)


def write_functions(folder, count):
    files = []
    for number in range(count):
        path = folder / f"m{number}.py"
        path.write_text(
            FUNCTION.format(name=f"f{number}", argument="x" * (number + 1), query=f"Add one to number {number}.")
        )
        files.append((f"m{number}", path))
    return files


def test_any_number_of_workers_gives_the_same_rows_in_the_same_order(tmp_path):
    files = [*write_functions(tmp_path, 7), ("gone", tmp_path / "gone.py")]
    sizes = []
    one = mine_files(files, workers=1, on_bytes=sizes.append)
    assert len(one) == 7
    assert sum(sizes) == sum(path.stat().st_size for _, path in files[:-1])
    assert one == mine_files(files[::-1], workers=3) == sorted(one)
    assert mine_files([], workers=2) == []


def test_a_worker_that_dies_is_an_error_not_a_smaller_corpus(tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("import sys; sys.stdin.read(); sys.exit(3)")
    monkeypatch.setattr(mining, "__file__", str(broken))
    with pytest.raises(RuntimeError, match=r"exit codes \[3\]"):
        mine_files(write_functions(tmp_path, 2), workers=1)


def test_nothing_mined_is_imported_or_run(tmp_path):
    trap = tmp_path / "trap.py"
    trap.write_text(
        f"open({json.dumps(str(tmp_path / 'ran'))}, 'w')\n"
        + FUNCTION.format(name="f", argument="x", query="Add one to x.")
    )
    assert mine_files([("trap", trap)], workers=1) == []  # 13 characters: too short
    trap.write_text(trap.read_text().replace("Add one to x.", "Add one to the number x."))
    assert len(mine_files([("trap", trap)], workers=1)) == 1
    assert not (tmp_path / "ran").exists()
