"""Labelled texts without a download: the functions of Python's standard library, labelled by module.

One row is the body of a function or method, with its comments, dedented. Decorators, the `def` line (it contains the
name) and the docstring are removed. Nested functions are part of the outer function's body and not rows themselves.
Bodies of fewer than 8 words are dropped, and of equal bodies all but the first. The classes are the 20 modules and
packages with the most rows, among those that every Python has as source.

At most 4,000 rows are used (`ROWS`). Every class gets at most L of its rows, evenly spaced through its files, where L
is the largest number for which the total fits. So large packages do not crowd out small modules.

The rows depend only on the Python version: another version has other functions, and perhaps another 20th module. They
depend neither on the order of files on the platform nor on a seed. Report the Python version with a result.
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
from rayfed.tasks.data.table import Source, Table

CLASSES = 20
ROWS = 4000
WORDS = 8
SKIPPED = (
    {"test", "tests", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}  # not the library itself
    | {"encodings", "pydoc_data", "this", "antigravity", "turtledemo"}  # tables, generated text and demos
    | {"distutils", "lib2to3", "ensurepip", "venv"}  # removed in later versions, or separate packages in distributions
    | {"tkinter", "idlelib", "turtle"}  # need Tk, and are separate packages, too
)


class Row(NamedTuple):
    """A function's body, its top-level module or package, and its file relative to the library."""

    text: str
    label: str
    file: str


def read_stdlib(root: Path | None = None) -> Source:
    """The standard library's functions as one training table with the columns text, label and file.

    ``root`` is the library's folder (None: of the running Python). With ``data.client: file``, every source file (such
    as `email/charset.py`) is a client. Takes some seconds, mostly for parsing. Raises UserError if the machine does not
    have the source files (some embedded Pythons have only zipped or compiled modules).
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
    """The library's source files, sorted by name, without private modules, which are parts of public ones."""
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
        warnings.simplefilter("ignore")  # the parser warns of invalid escapes in the library
        source = file.read()
        tree = ast.parse(source)
    lines = source.split("\n")  # as the parser does; str.splitlines also splits at form feeds
    for function in _outermost(tree):
        yield _body(function, lines)


def _outermost(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The outermost functions below ``node``, and the methods of classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif not isinstance(child, ast.expr):  # classes, and `if` and `try` around definitions
            yield from _outermost(child)


def _body(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The lines from the first statement after the docstring to the end; "" if there is no statement."""
    documented = ast.get_docstring(function, clean=False) is not None
    above = function.body[0].end_lineno if documented else function.lineno
    statements = function.body[1:] if documented else function.body
    assert above is not None  # always set by the parser
    if not statements:
        return ""
    first = statements[0]
    start = min([first.lineno, *(decorator.lineno for decorator in getattr(first, "decorator_list", []))])
    line = lines[first.lineno - 1]
    before = line.encode()[: first.col_offset].decode()  # the parser counts columns in UTF-8 bytes
    if before.strip():  # the statement shares its line with `def f():` or with a docstring
        body = [line[len(before) :], *lines[first.lineno : function.end_lineno]]
    else:
        while start - 1 > above and lines[start - 2].lstrip().startswith("#"):  # comments above the first statement
            start -= 1
        body = lines[start - 1 : function.end_lineno]
    margin = line[: len(line) - len(line.lstrip())]
    return "\n".join(line.removeprefix(margin) for line in body)


def _balanced(rows: list[Row]) -> list[Row]:
    """The rows of the CLASSES largest modules, at most ROWS in total; see the module's docstring."""
    counts = Counter(row.label for row in rows)
    largest = sorted(counts, key=lambda label: (-counts[label], label))[:CLASSES]
    limit = max((m for m in range(ROWS + 1) if sum(min(counts[label], m) for label in largest) <= ROWS), default=0)
    balanced: list[Row] = []
    for label in sorted(largest):
        own = [row for row in rows if row.label == label]
        used = min(len(own), limit)
        balanced += (own[i * len(own) // used] for i in range(used))
    return balanced
