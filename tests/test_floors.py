"""The floors of DESIGN: a part imports only parts strictly below it, and heavy packages only where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rayfed"

FLOORS = (
    ("errors", "seeding", "files", "device", "storage", "plugins"),
    ("config",),
    ("tracking",),
    ("lora",),
    ("tasks",),
    ("wire",),
    ("profiles", "channels"),
    ("objectives", "weighting"),
    ("methods",),
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
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
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


def violations(package: Path) -> list[str]:
    """One line for each import that breaks a rule."""
    found: dict[str, None] = {}  # ordered, without repeats
    name = package.name
    for module, is_package, path in modules(package):
        part = part_of(module)
        if part in EXEMPT:
            continue
        if part not in FLOOR:
            found[f"{module}: part {part!r} stands on no floor; add it to FLOORS"] = None
            continue
        for target, line in imported(module, is_package, path):
            where = f"{module}:{line}"
            other = part_of(target) if within(target, name) else None
            if other is not None and other in FLOOR and other != part:
                if part in HELPERS and other in HELPERS:
                    continue  # helpers are one floor of single files
                if FLOOR[other] >= FLOOR[part]:
                    found[f"{where}: {part} (floor {FLOOR[part]}) imports {other} (floor {FLOOR[other]})"] = None
            if within(target, "ray") and part not in RAY_IN:
                found[f"{where}: {part} imports ray, which belongs in {', '.join(RAY_IN)}"] = None
            for heavy, parts in NOT_IN.items():
                if within(target, heavy) and part in parts:
                    found[f"{where}: {part} imports {heavy}"] = None
    return list(found)


def test_every_part_imports_only_parts_below_it() -> None:
    assert violations(PACKAGE) == []


PLANTED = {
    "a higher floor": ("lora/x.py", "from rayfed.engine import driver", "lora (floor 3) imports engine (floor 9)"),
    "a neighbour on the same floor": ("reports/x.py", "import rayfed.sweeps.a", "reports (floor 10) imports sweeps"),
    "a part as a name": ("wire/x.py", "from rayfed import server", "wire (floor 5) imports server"),
    "inside a function": ("wire/x.py", "def f():\n    import rayfed.methods", "x:2: wire (floor 5) imports methods"),
    "relative": ("tasks/x.py", "from ..clients import pack", "tasks (floor 4) imports clients"),
    "relative, a part as a name": ("tasks/x.py", "from .. import clients", "tasks (floor 4) imports clients"),
    "relative, in a package": ("tasks/__init__.py", "from ..clients import pack", "tasks (floor 4) imports clients"),
    "deep relative": ("tasks/a/b.py", "from ...clients import pack", "tasks (floor 4) imports clients"),
    "for the type checker only": (
        "config/x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rayfed.lora import Adapter",
        "x:3: config (floor 1) imports lora",
    ),
    "by name": ("lora/x.py", "import importlib\nimportlib.import_module('rayfed.cli')", "lora (floor 3) imports cli"),
    "a helper that knows a part": ("keys.py", "from rayfed.config import Experiment", "keys (floor 0) imports config"),
    "ray": ("server/x.py", "import ray", "server imports ray"),
    "a module of ray": ("tracking/x.py", "from ray.air.integrations.wandb import setup_wandb", "tracking imports ray"),
    "transformers": ("methods/x.py", "from transformers import AutoModel", "methods imports transformers"),
    "peft": ("wire/x.py", "import peft.tuners.lora as lora", "wire imports peft"),
    "torch.nn": ("methods/x.py", "from torch import nn", "methods imports torch.nn"),
    "torch.nn as an attribute": ("methods/x.py", "import torch\ntorch.nn.Linear(1, 1)", "methods imports torch.nn"),
    "a part nobody knows": ("helpers/x.py", "", "part 'helpers' stands on no floor"),
}


@pytest.mark.parametrize(("file", "source", "message"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, message: str) -> None:
    path = tmp_path / "rayfed" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = violations(tmp_path / "rayfed")
    assert message in found


def test_what_is_allowed_is_not_reported(tmp_path: Path) -> None:
    package = tmp_path / "rayfed"
    for file, source in {
        "__init__.py": "from rayfed.engine import run",
        "__main__.py": "from rayfed.cli import main",
        "files.py": "from rayfed.errors import UserError",
        "engine/driver.py": "import ray\nfrom rayfed.wire import encode\nfrom . import worker",
        "engine/worker.py": "import rayed\nimport raytracer.scene",
        "methods/flasc.py": "import torch\nfrom rayfed.lora import Adapter\nfrom .base import Method",
        "clients/pack.py": "import torch.nn as nn",
    }.items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(source)
    assert violations(package) == []


HEAVY = ("torch", "ray", "transformers")


@pytest.mark.parametrize(
    "code",
    ["import rayfed", "from rayfed.cli import main; main(['--help'])"],
    ids=["import rayfed", "rayfed --help"],
)
def test_the_front_door_is_light(code: str) -> None:
    program = f"""
import atexit, sys
atexit.register(lambda: print("loaded:", *(name for name in {HEAVY} if name in sys.modules)))
{code}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]
