"""Real labelled text that every machine has: the functions of Python's own standard library, label = module.

One row is the body of a function or method: no decorators, no `def` line (it holds the name) and no docstring, but
with its comments, dedented. Nested functions stay inside their parent's body and are no rows of their own. Bodies of
fewer than 8 words and repeated bodies (the first stays) are dropped. Of the modules and packages that every Python
ships as source, the 20 with most rows are the classes.

At most 4,000 rows are used (`ROWS`): classes above a common limit are cut to it, by taking rows at even steps through
their files; the limit is the largest with which the total fits. So large packages do not crowd out small modules.

The rows depend on the Python version (another one has other functions, and perhaps another 20th module), and on
nothing else: not on the platform's file order and not on a seed. Say which Python a result comes from.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rayfed.errors import UserError
from rayfed.tasks.data.dataset import Source, Table

CLASSES = 20
ROWS = 4000
WORDS = 8
SKIPPED = (
    {"test", "tests", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}  # not the library itself
    | {"encodings", "pydoc_data", "this", "antigravity", "turtledemo"}  # tables, generated text and demos
    | {"distutils", "lib2to3", "ensurepip", "venv"}  # gone from later versions, or packaged apart by distributions
    | {"tkinter", "idlelib", "turtle"}  # need Tk, and are packaged apart too
)


class Row(NamedTuple):
    """A function's body, the top-level module or package it is in, and its file relative to the library."""

    text: str
    label: str
    file: str


def read_stdlib(root: Path | None = None) -> Source:
    """The standard library's functions as one table (to be split by the caller): columns text, label and file.

    ``root``: the library's folder; None: the running Python's. ``file`` (such as `email/charset.py`) can serve as
    ``data.client``: clients are then source files. Takes some seconds, most of them in the parser. Raises UserError
    where the sources are not on the machine (some embedded Pythons ship them zipped or compiled).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    texts: set[str] = set()
    rows: list[Row] = []
    for path in _files(root):
        for body in _bodies(path):
            if len(re.findall(r"\w+", body)) >= WORDS and body not in texts:
                texts.add(body)
                file = path.relative_to(root)
                rows.append(Row(body, file.parts[0].removesuffix(".py"), file.as_posix()))
    rows = _balanced(rows)
    if len({row.label for row in rows}) < CLASSES:
        raise UserError(
            f"data.source: got 'stdlib', but {root} does not hold the source of Python's standard library; "
            "use data.source=files or hub"
        )
    columns = {name: [getattr(row, name) for row in rows] for name in Row._fields}
    return Source({"train": Table("the standard library", columns)})


def _files(root: Path) -> list[Path]:
    """The library's source files, sorted by name. Private modules are left out: they are parts of public ones."""
    found: list[Path] = []
    for entry in root.iterdir() if root.is_dir() else ():
        if entry.name.startswith("_") or entry.stem in SKIPPED:
            continue
        if entry.suffix == ".py":
            found.append(entry)
        elif (entry / "__init__.py").is_file():
            found += (path for path in entry.rglob("*.py") if SKIPPED.isdisjoint(path.relative_to(root).parts))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _bodies(path: Path) -> Iterator[str]:
    """The bodies of a file's outermost functions and of its classes' methods, in source order."""
    with tokenize.open(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parser warns of old escapes; they are not ours to mend
        source = file.read()
        tree = ast.parse(source)
    lines = source.split("\n")  # as the parser counts lines; str.splitlines would also split at form feeds
    for function in _outermost(tree):
        yield _body(function, lines)


def _outermost(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif not isinstance(child, ast.expr):  # into classes, and into `if` and `try` around definitions
            yield from _outermost(child)


def _body(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """From the first statement after the docstring to the function's last line; "" where there is none."""
    documented = ast.get_docstring(function, clean=False) is not None
    above = function.body[0].end_lineno if documented else function.lineno
    statements = function.body[1:] if documented else function.body
    assert above is not None  # the parser sets it
    if not statements:
        return ""
    first = statements[0]
    start = min([first.lineno, *(decorator.lineno for decorator in getattr(first, "decorator_list", []))])
    line = lines[first.lineno - 1]
    before = line.encode()[: first.col_offset].decode()  # the parser counts columns in UTF-8 bytes
    if before.strip():  # `def f(): return 1`, or a docstring with `; x = 1` behind it: they share the line
        body = [line[len(before) :], *lines[first.lineno : function.end_lineno]]
    else:
        while start - 1 > above and lines[start - 2].lstrip().startswith("#"):  # comments above the first statement
            start -= 1
        body = lines[start - 1 : function.end_lineno]
    margin = line[: len(line) - len(line.lstrip())]
    return "\n".join(line.removeprefix(margin) for line in body)


def _balanced(rows: list[Row]) -> list[Row]:
    """The rows of the richest modules, none with more than the common limit with which the total is at most ROWS."""
    counts = Counter(row.label for row in rows)
    richest = sorted(counts, key=lambda label: (-counts[label], label))[:CLASSES]
    limit = max((m for m in range(ROWS + 1) if sum(min(counts[label], m) for label in richest) <= ROWS), default=0)
    kept: list[Row] = []
    for label in sorted(richest):
        own = [row for row in rows if row.label == label]
        used = min(len(own), limit)
        kept += (own[i * len(own) // used] for i in range(used))
    return kept
