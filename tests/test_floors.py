"""The architecture: floors, cycles, the reach of the settings, the size of modules, public words, light imports.

A part of the package imports only parts below it, and heavy packages only where they belong. Every rule is a function
from a folder of source code to lines that name what breaks the rule. The rules are tested on planted code, too.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rayfed"

FLOORS = (
    (
        "errors",
        "seeding",
        "files",
        "device",
        "storage",
        "plugins",
        "suggestions",
        "run_directory",
        "keywords",
        "own_code",
    ),
    ("config",),
    ("tracking",),
    ("lora",),
    ("tasks",),
    ("wire",),
    ("profiles", "channels"),
    ("objectives", "weighting"),
    ("methods",),
    ("privacy", "topologies"),
    ("clients",),
    ("server",),
    ("engine",),
    ("api",),
    ("sweeps", "reports", "bench"),
    ("cli",),
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
HELPERS = FLOORS[0]
EXEMPT = ("__init__", "__main__")  # the package's own front door knows every part

RAY_IN = ("engine", "sweeps", "cli")
NOT_IN = {
    "transformers": ("wire", "methods", "server"),
    "peft": ("wire", "methods", "server"),
    "torch.nn": ("methods",),
}
BELOW_API = {part for part, floor in FLOOR.items() if floor < FLOOR["api"]} - {"config"}

MOST_LINES = {"*": 350, "server/loop.py": 199}
PRIVATE_WORDS = {
    "crew", "told", "kept", "held", "books", "beside", "hire", "dismiss", "flying", "catchup", "blueprint", "learner",
    "news", "graft", "questions",
}  # fmt: skip


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def part_of(module: str) -> str:
    """The part of ``rayfed.lora.packed.layers`` is ``lora``; of ``rayfed`` itself, ``__init__``."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


def modules(package: Path) -> Iterator[tuple[str, bool, Path]]:
    """Dotted name, whether it is a package's __init__, and path, of every source file."""
    for path in sorted(package.rglob("*.py")):
        pieces = list(path.relative_to(package.parent).with_suffix("").parts)
        is_package = pieces[-1] == "__init__"
        yield ".".join(pieces[:-1] if is_package else pieces), is_package, path


def imported(module: str, is_package: bool, path: Path) -> Iterator[tuple[str, int]]:
    """Every module a file may import, with its line: at the top, in functions, relative, and under TYPE_CHECKING.

    ``from a import b`` yields both ``a`` and ``a.b``: the syntax does not tell whether b is a module.
    """
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".") + ([""] if is_package else [])
                base = ".".join([*here[: -node.level], *([node.module] if node.module else [])])
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno
        elif (
            isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.nn"
        ):  # `import torch`, then torch.nn.Linear
            yield "torch.nn", node.lineno


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def floor_violations(package: Path) -> list[str]:
    """One line for each import that breaks a rule of the floors."""
    found: dict[str, None] = {}  # ordered, without repeats
    name = package.name
    for module, is_package, path in modules(package):
        part = part_of(module)
        if part in EXEMPT:
            continue
        if part not in FLOOR:
            found[f"{module}: part {part!r} is on no floor; add it to FLOORS"] = None
            continue
        for target, line in imported(module, is_package, path):
            where = f"{module}:{line}"
            other = part_of(target) if within(target, name) else None
            if other is not None and other in FLOOR and other != part:
                if part in HELPERS and other in HELPERS:
                    continue  # helpers are one floor of single files
                if FLOOR[other] >= FLOOR[part]:
                    found[f"{where}: {part} imports {other}, which is not below it"] = None
            if within(target, "ray") and part not in RAY_IN:
                found[f"{where}: {part} imports ray, which belongs in {', '.join(RAY_IN)}"] = None
            for heavy, parts in NOT_IN.items():
                if within(target, heavy) and part in parts:
                    found[f"{where}: {part} imports {heavy}"] = None
    return list(found)


def cycle_violations(package: Path) -> list[str]:
    """One line for a cycle of imports at the top of modules. Imports for the type checker only do not count."""
    names = {module for module, _, _ in modules(package)}
    graph: dict[str, set[str]] = {}
    for module, is_package, path in modules(package):
        top = [
            node
            for node in tree(path).body
            if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
        lines = {line for node in top for line in range(node.lineno, node.end_lineno + 1) if not is_definition(node)}
        targets = {target for target, line in imported(module, is_package, path) if target in names and line in lines}
        # `from a import b` names the module a as well; where b is a module, only b counts.
        graph[module] = {t for t in targets if not any(within(other, t) for other in targets - {t})} - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" imports ".join(reversed(error.args[1]))]
    return []


def is_definition(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


def settings_violations(package: Path) -> list[str]:
    """One line for each place below `api` that names the class of all settings."""
    found = []
    for module, _, path in modules(package):
        if part_of(module) in BELOW_API:
            for node in ast.walk(tree(path)):
                name = getattr(node, "id", getattr(node, "attr", getattr(node, "name", None)))
                notes = [getattr(node, "annotation", None), getattr(node, "returns", None)]
                texts = [n.value for note in notes if note for n in ast.walk(note) if isinstance(n, ast.Constant)]
                if name == "Experiment" or any("Experiment" in str(text) for text in texts):
                    found.append(f"{module}:{node.lineno}: {part_of(module)} knows Experiment; it may take a RunPlan")
    return found


def size_violations(package: Path) -> list[str]:
    """One line for each module with too many lines."""
    found = []
    for module, _, path in modules(package):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        most = MOST_LINES.get(path.relative_to(package).as_posix(), MOST_LINES["*"])
        if lines > most:
            found.append(f"{module}: {lines} lines, but at most {most} are allowed")
    return found


def word_violations(package: Path) -> list[str]:
    """One line for each public function, class, attribute or constant whose name has a private word."""
    found = []
    for module, _, path in modules(package):
        for name, line in public_names(tree(path)):
            words = set(re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()))
            if bad := words & PRIVATE_WORDS:
                found.append(f"{module}:{line}: {name} has the private word {', '.join(sorted(bad))}")
    return found


def public_names(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Names of functions, classes, methods, attributes, fields and module constants that begin with no underscore."""
    for child in ast.iter_child_nodes(node):
        names: list[str] = []
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            names = [child.name]
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            inside = isinstance(node, ast.Module | ast.ClassDef)
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Attribute) or (inside and isinstance(part, ast.Name)):
                        names.append(part.attr if isinstance(part, ast.Attribute) else part.id)
        yield from ((name, child.lineno) for name in names if not name.startswith("_"))
        yield from public_names(child)


RULES = {
    rule.__name__.removesuffix("_violations"): rule
    for rule in (floor_violations, cycle_violations, settings_violations, size_violations, word_violations)
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_package_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert rule(PACKAGE) == []


PLANTED = {
    "a higher floor": ("floor", "lora/x.py", "from rayfed.engine import driver", "x:1: lora imports engine, which is"),
    "a part of the same floor": ("floor", "reports/x.py", "import rayfed.sweeps.a", "reports imports sweeps"),
    "a part as a name": ("floor", "wire/x.py", "from rayfed import server", "wire imports server"),
    "inside a function": ("floor", "wire/x.py", "def f():\n    import rayfed.methods", "x:2: wire imports methods"),
    "relative": ("floor", "tasks/x.py", "from ..clients import pack", "tasks imports clients"),
    "relative, a part as a name": ("floor", "tasks/x.py", "from .. import clients", "tasks imports clients"),
    "relative, in a package": ("floor", "tasks/__init__.py", "from ..clients import pack", "tasks imports clients"),
    "deep relative": ("floor", "tasks/a/b.py", "from ...clients import pack", "tasks imports clients"),
    "for the type checker only": (
        "floor",
        "config/x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rayfed.lora import Adapter",
        "x:3: config imports lora",
    ),
    "by name": ("floor", "lora/x.py", "import importlib\nimportlib.import_module('rayfed.cli')", "lora imports cli"),
    "a helper that knows a part": ("floor", "files.py", "from rayfed.config import Data", "files imports config"),
    "ray": ("floor", "server/x.py", "import ray", "server imports ray"),
    "a module of ray": ("floor", "tracking/x.py", "from ray.air import session", "tracking imports ray"),
    "transformers": ("floor", "methods/x.py", "from transformers import AutoModel", "methods imports transformers"),
    "peft": ("floor", "wire/x.py", "import peft.tuners.lora as lora", "wire imports peft"),
    "torch.nn": ("floor", "methods/x.py", "from torch import nn", "methods imports torch.nn"),
    "torch.nn as an attribute": ("floor", "methods/x.py", "import torch\ntorch.nn.Linear(1, 1)", "imports torch.nn"),
    "an unknown part": ("floor", "helpers/x.py", "", "part 'helpers' is on no floor"),
    "settings as an annotation": (
        "settings",
        "server/x.py",
        "def f(a: Experiment): ...",
        "x:1: server knows Experiment",
    ),
    "settings as a string": ("settings", "clients/x.py", "def f() -> 'Experiment | None': ...", "clients knows"),
    "settings as an import": ("settings", "engine/x.py", "from rayfed.config import Experiment", "engine knows"),
    "settings as an attribute": ("settings", "tasks/x.py", "import rayfed\nrayfed.Experiment()", "x:2: tasks knows"),
    "a long module": ("size", "wire/x.py", "\n" * 351, "rayfed.wire.x: 351 lines, but at most 350 are allowed"),
    "a long loop": ("size", "server/loop.py", "\n" * 200, "rayfed.server.loop: 200 lines, but at most 199"),
    "a function": ("word", "wire/x.py", "def hire_worker(): ...", "x:1: hire_worker has the private word hire"),
    "a class": ("word", "wire/x.py", "class RunBooks: ...", "RunBooks has the private word books"),
    "a method": ("word", "wire/x.py", "class A:\n    def news(self): ...", "x:2: news has"),
    "a setting": ("word", "config/x.py", "class A:\n    kept_rounds: int = 1", "x:2: kept_rounds has"),
    "an attribute": ("word", "wire/x.py", "class A:\n    def f(self):\n        self.told, b = 1, 2", "x:3: told has"),
    "a constant": ("word", "wire/x.py", "HELD = 1", "HELD has the private word held"),
}


@pytest.mark.parametrize(("rule", "file", "source", "message"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_violation_is_found(tmp_path: Path, rule: str, file: str, source: str, message: str) -> None:
    path = tmp_path / "rayfed" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = RULES[rule](tmp_path / "rayfed")
    assert message in found


def plant(tmp_path: Path, files: dict[str, str]) -> Path:
    package = tmp_path / "rayfed"
    for file, source in files.items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(source)
    return package


@pytest.mark.parametrize(
    "files",
    [
        {"a.py": "from rayfed.b import f", "b.py": "import rayfed.a"},
        {
            "a.py": "from rayfed import b",
            "b.py": "from rayfed import c",
            "c.py": "try:\n    from . import a\nfinally: ...",
        },
        {"p/__init__.py": "from rayfed.p.m import f", "p/m.py": "from rayfed.p import g"},
    ],
)
def test_a_planted_cycle_is_found(tmp_path: Path, files: dict[str, str]) -> None:
    (found,) = cycle_violations(plant(tmp_path, files))
    assert found.count(" imports ") == len(files)


def test_what_is_no_cycle_is_not_reported(tmp_path: Path) -> None:
    files = {
        "__init__.py": "def f():\n    from rayfed import a",
        "a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rayfed.b import f",
        "b.py": "import rayfed\nfrom rayfed import a\nfrom rayfed.p import m",
        "p/__init__.py": "from rayfed.p.m import f",
        "p/m.py": "from rayfed.p import n",
        "p/n.py": "",
    }
    assert cycle_violations(plant(tmp_path, files)) == []


def test_allowed_imports_are_not_reported(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from rayfed.engine import run",
        "__main__.py": "from rayfed.cli import main",
        "files.py": "from rayfed.errors import UserError",
        "engine/driver.py": "import ray\nfrom rayfed.wire import encode\nfrom . import worker",
        "engine/worker.py": "import rayed\nimport raytracer.scene",
        "methods/flasc.py": "import torch\nfrom rayfed.lora import Adapter\nfrom .base import Method",
        "clients/pack.py": "import torch.nn as nn",
    }
    assert floor_violations(plant(tmp_path, files)) == []


def test_private_names_and_variables_are_not_public(tmp_path: Path) -> None:
    source = "def _told(): ...\ndef f(held):\n    kept = held\nclass A:\n    _books = 1\n    withheld: int = 2"
    assert word_violations(plant(tmp_path, {"a.py": source})) == []


HEAVY = (
    "datasets", "matplotlib", "numpy", "optuna", "peft", "pyarrow", "pydantic", "ray", "rich", "torch", "torchmetrics",
    "transformers", "wandb",
)  # fmt: skip
LOADED = {  # the packages that are loaded after this code and all code above it
    "import rayfed": "",
    "from rayfed.tracking import *; import rayfed.tracking.console, rayfed.tracking.events, rayfed.tracking.jsonl": "",
    "from rayfed.cli import main; main(['--help'])": "",
    "import rayfed.api": "numpy pydantic torch",
    "import rayfed.tasks.data.dataset": "numpy pydantic torch",
    "import rayfed.wire, rayfed.methods, rayfed.server.loop": "numpy pydantic torch",
    "import rayfed.engine.driver": "numpy pydantic ray torch",
    "import rayfed.sweeps.sweep": "numpy pydantic ray torch",
}


def test_imports_load_no_heavy_packages_before_they_are_needed() -> None:
    program = f"""
import json, sys
from pathlib import Path
found = {{}}
for code in {list(LOADED)}:
    try:
        exec(code)
    except SystemExit:
        pass
    found[code] = " ".join(name for name in {HEAVY} if name in sys.modules)
print(json.dumps(found))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == LOADED
