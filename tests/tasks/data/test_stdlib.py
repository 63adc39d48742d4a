from __future__ import annotations

import ast
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from rayfed.config.task import Data
from rayfed.errors import UserError
from rayfed.tasks.data import stdlib as stdlib_source
from rayfed.tasks.data.dataset import load_data
from rayfed.tasks.data.stdlib import read_stdlib
from rayfed.tasks.data.table import Source

FILE = '''
"""Module docstring."""
import functools


def documented(a, b):
    """A docstring
    # with a line like a comment"""
    # why
    total = a + b + 1

    # inner comment, at the end of three lines of
    # several words
    return total  # and this


def one_line(): return alpha, beta, gamma, delta, epsilon, zeta, eta, theta


def only_documented():
    """Nothing else stands in here but these more than eight words."""


def short(self):
    return 1


class Thing:
    """A class docstring that is no row of its own at all."""

    @property
    def method(self):
        @functools.wraps(self)
        def nested(x, y, z):
            return x + y + z + self.one + self.two + self.three
        return nested

    async def wait(self):
        "é"; value = await self.one(a, b, c, d, e, f)
        return """
kept
    as it is"""


if True:
    def documented_again(a, b):
        # why
        total = a + b + 1

        # inner comment, at the end of three lines of
        # several words
        return total  # and this
'''

BODIES = [
    "# why\ntotal = a + b + 1\n\n# inner comment, at the end of three lines of\n# several words\n"
    "return total  # and this",
    "return alpha, beta, gamma, delta, epsilon, zeta, eta, theta",
    "@functools.wraps(self)\ndef nested(x, y, z):\n    return x + y + z + self.one + self.two + self.three\n"
    "return nested",
    'value = await self.one(a, b, c, d, e, f)\nreturn """\nkept\n    as it is"""',
]


def library(root: Path, sizes: dict[str, int]) -> Path:
    """A folder of modules, each with so many one-line functions."""
    for name, size in sizes.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        words = "a, b, c, d, e, f, g"
        path.write_text(
            "\n".join(f"def f{i}():\n    return {name.replace('/', '_')[:-3]}{i}, {words}" for i in range(size))
        )
    return root


@pytest.fixture(scope="module")
def source() -> Source:
    return read_stdlib()


def test_a_body_leaves_out_def_line_decorators_and_docstring(tmp_path: Path) -> None:
    path = tmp_path / "thing.py"
    path.write_text(FILE, encoding="utf-8")
    bodies = [body for body in stdlib_source._bodies(path) if len(body.split()) > 3]
    assert bodies == [*BODIES, BODIES[0]]


def test_short_and_repeated_bodies_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thing.py").write_text(FILE, encoding="utf-8")
    monkeypatch.setattr(stdlib_source, "CLASSES", 1)
    columns = read_stdlib(tmp_path).tables["train"].columns
    assert sorted(columns["text"]) == sorted(BODIES)
    assert set(columns["label"]) == {"thing"}
    assert set(columns["file"]) == {"thing.py"}


def test_private_modules_tests_and_other_packages_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"b.py": 3, "a/__init__.py": 1, "a/x.py": 2, "a/b/c.py": 3}
    dropped = {"_c.py": 9, "test/__init__.py": 9, "a/test/t.py": 9, "site-packages/p.py": 9, "data/no_init.py": 9}
    monkeypatch.setattr(stdlib_source, "CLASSES", 2)
    columns = read_stdlib(library(tmp_path, kept | dropped)).tables["train"].columns
    assert Counter(columns["file"]) == kept
    assert columns["label"] == ["a"] * 6 + ["b"] * 3


def test_large_classes_are_cut_to_a_common_limit_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_source, "CLASSES", 3)
    monkeypatch.setattr(stdlib_source, "ROWS", 26)
    root = library(tmp_path, {"a.py": 20, "b.py": 5, "c/__init__.py": 15, "c/d.py": 15, "e.py": 4})
    columns = read_stdlib(root).tables["train"].columns
    assert Counter(columns["label"]) == {"a": 10, "b": 5, "c": 10}  # e is poorest; 26 would need 10.5 each
    assert Counter(columns["file"])["c/d.py"] == 5


def test_the_rows_do_not_follow_the_order_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = library(tmp_path, {"a.py": 3, "b/__init__.py": 2, "b/x.py": 2, "c.py": 3})
    monkeypatch.setattr(stdlib_source, "CLASSES", 3)
    there = read_stdlib(root)
    for name in ("iterdir", "rglob"):
        listed = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda *a, _listed=listed: reversed(list(_listed(*a))))
    assert read_stdlib(root) == there


def test_it_is_the_same_every_time(source: Source) -> None:
    assert read_stdlib() == source


def test_twenty_classes_and_no_repeats(source: Source) -> None:
    columns = source.tables["train"].columns
    assert len(set(columns["label"])) == 20
    assert 3000 <= len(columns["text"]) <= 4000
    assert len(set(columns["text"])) == len(columns["text"])
    assert min(Counter(columns["label"]).values()) >= 50
    assert {"asyncio", "email", "logging"} <= set(columns["label"])


def test_it_is_a_task_and_its_files_can_be_the_clients(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_source, "read_stdlib", lambda: source)
    data = load_data(Data(examples=400, client="file"), seed=0)
    assert len(data.classes) == 20
    assert (len(data.train), len(data.validation), len(data.test)) == (288, 32, 80)
    assert data.train.owners is not None
    owners = [owner.split("/")[0].removesuffix(".py") for owner in data.train.owners.tolist()]
    assert owners == [data.classes[label] for label in data.train.labels]


def test_no_row_holds_its_docstring(source: Source) -> None:
    columns = source.tables["train"].columns
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(set(columns["file"]))[::10]:
        tree = ast.parse((root / file).read_bytes())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        nested = {child for function in functions for child in ast.walk(function) if child is not function}
        documents = [ast.get_docstring(function, clean=False) for function in functions if function not in nested]
        bodies = [text for text, of in zip(columns["text"], columns["file"]) if of == file]
        # Long ones only: a short docstring may also be a message in some code.
        assert not [d for d in documents if d and len(d) > 60 for body in bodies if d in body]


def test_a_python_without_sources_is_refused(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "python311.zip"):
        with pytest.raises(UserError, match=r"^data.source: got 'stdlib', but .* does not hold the source"):
            read_stdlib(root)
