"""Text pairs out of Python source: (docstring's first paragraph, the function without it).

Files are parsed with `ast`; nothing is imported and nothing of them is run. This module needs the
standard library alone, so that `mine_files` can start it as a plain script in worker processes: no
fork of a process that holds threads, and no second run of whatever script called us.
"""

import ast
import gc
import inspect
import io
import json
import re
import subprocess
import sys
import threading
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

QUERY_CHARACTERS = (20, 300)
QUERY_WORDS = 3
PASSAGE_CHARACTERS = 4_000

# A first paragraph that opens a section, a directive or a doctest says nothing about the function.
_NOT_A_SENTENCE = re.compile(
    r"(args?|arguments|parameters?|inputs?|returns?|yields?|raises|examples?|notes?|usage|todo)\s*(:|--)|[:.>]",
    re.IGNORECASE,
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Row(NamedTuple):
    """One mined pair and where it stands: `module` names the file, `line` the function's `def` there."""

    module: str
    line: int
    name: str
    query: str
    passage: str


def mine_source(module: str, source: bytes) -> list[Row]:
    """The rows of one file in the order of lines; none where it can't be decoded or parsed as Python.

    A row is a function or method (async ones too) whose docstring opens with a sentence of 20-300
    characters. A function inside a function belongs to the passage of the outer one.
    """
    try:
        text = _decode(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError):
        return []
    lines = text.split("\n")
    functions = ((name, node, _query(node)) for name, node in _functions(tree, ""))
    return [
        Row(module, node.lineno, name, query, _passage(node, lines))
        for name, node, query in functions
        if query is not None and _does_something(node)
    ]


def mine_files(
    files: Sequence[tuple[str, Path]], *, workers: int, on_bytes: Callable[[int], object] = lambda size: None
) -> list[Row]:
    """The rows of many (module, path) files, in the order of module and line, whatever `workers` is.

    `on_bytes` is called in the calling thread with the size of each finished file. Unreadable files give no
    rows. Raises `RuntimeError` when a worker process dies: a corpus must not lack files in silence.
    """
    largest_first = sorted(files, key=lambda file: (-size_of(file[1]), file[0]))
    answers: SimpleQueue[str | None] = SimpleQueue()
    rows: list[Row] = []
    with ExitStack() as stack:
        shards = [largest_first[start::workers] for start in range(min(workers, len(files)))]
        processes = [_start_worker(shard, answers, stack) for shard in shards]
        for _ in processes:
            while (answer := answers.get()) is not None:
                size, fields_of_rows = json.loads(answer)
                rows.extend(Row(*fields) for fields in fields_of_rows)
                on_bytes(size)
        codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"a mining process ended early (exit codes {codes})")
    return sorted(rows)


def _start_worker(shard: list[tuple[str, Path]], answers: SimpleQueue, stack: ExitStack) -> subprocess.Popen[str]:
    """A process that mines `shard`; its answers, then None, reach the queue from a thread of ours."""
    # -I: this file's folder stays off sys.path, where our module names could hide the standard library's.
    command = [sys.executable, "-I", "-X", "utf8", str(Path(__file__).resolve())]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", errors="strict"
    )
    stack.callback(_stop, process)
    with suppress(BrokenPipeError), process.stdin as requests:  # one that died already is noticed by its exit code
        json.dump([(module, str(path)) for module, path in shard], requests)

    def forward() -> None:
        for line in process.stdout:
            answers.put(line)
        answers.put(None)

    threading.Thread(target=forward, daemon=True).start()
    return process


def _stop(process: subprocess.Popen[str]) -> None:
    """End the process if it still runs (we were interrupted), and close our ends."""
    process.kill()
    process.wait()


def _serve() -> None:
    """What a worker process does: requests from stdin, one line (bytes, rows) a file to stdout."""
    gc.disable()  # syntax trees hold no cycles, and walking them on every collection doubles the time
    for module, path in json.load(sys.stdin):
        size, rows = size_of(Path(path)), []
        with suppress(OSError):
            rows = mine_source(module, Path(path).read_bytes())
        print(json.dumps([size, rows]), flush=True)


def size_of(path: Path) -> int:
    """The file's bytes, 0 where it is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _decode(source: bytes) -> str:
    """The text of a Python file by its own declared encoding, with \\n alone at the ends of lines."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    return io.TextIOWrapper(io.BytesIO(source), encoding, newline=None).read()


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    """(qualified name, function) for the functions under `node`, not those inside other functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif not isinstance(child, ast.expr):
            yield from _functions(child, prefix)


def _query(node: Function) -> str | None:
    """The docstring's first paragraph on one line; None where there is none that can serve."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring is None:
        return None
    first = re.split(r"\n[ \t]*\n", inspect.cleandoc(docstring).strip(), maxsplit=1)[0]
    query = " ".join(first.split())
    shortest, longest = QUERY_CHARACTERS
    fits = shortest <= len(query) <= longest and len(query.split()) >= QUERY_WORDS
    if not fits or _NOT_A_SENTENCE.match(query) or not _is_text(query):
        return None
    return query


def _is_text(query: str) -> bool:
    """False for a lone surrogate (written as an escape): no encoder or tokenizer takes it."""
    return not any("\ud800" <= character <= "\udfff" for character in query)


def _does_something(node: Function) -> bool:
    """False where nothing but `pass` or `...` follows the docstring."""
    return not all(
        isinstance(part, ast.Pass)
        or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and part.value.value is ...)
        for part in node.body[1:]
    )


def _passage(node: Function, lines: list[str]) -> str:
    """The function's lines, decorators first, without its docstring, set flush left, cut at 4,000 characters.

    Lines are cut by number: `ast.get_source_segment` splits the whole file again for every call.
    """
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    docstring = node.body[0]
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset].decode()
    after = lines[docstring.end_lineno - 1].encode()[docstring.end_col_offset :].decode()
    joined = before + after.lstrip(" ;\t")
    docstring_line = [joined.rstrip()] if joined.strip() else []
    body = [*lines[first : docstring.lineno - 1], *docstring_line, *lines[docstring.end_lineno : node.end_lineno]]
    indent = re.match(r"\s*", body[0]).group()
    return _cut("\n".join(line.removeprefix(indent).rstrip() for line in body))


def _cut(passage: str) -> str:
    """The whole lines that fit into 4,000 characters, and at least that much of the first one."""
    if len(passage) <= PASSAGE_CHARACTERS:
        return passage
    end = passage.rfind("\n", 0, PASSAGE_CHARACTERS + 1)
    return passage[: end if end > 0 else PASSAGE_CHARACTERS]


if __name__ == "__main__":
    _serve()
