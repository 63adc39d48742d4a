"""The project files agree with each other: dependencies, pins, the cluster file, and what the code imports."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: [Requirement(r) for r in extra] for name, extra in PROJECT["optional-dependencies"].items()}
DEPENDENCIES = [Requirement(r) for r in PROJECT["dependencies"]]
DISTRIBUTION = {"yaml": "pyyaml", "PIL": "pillow"}  # import names that differ from the distribution's


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), f"not an exact version: {line}"
    assert lines == sorted(lines, key=str.lower)
    found = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(found) == len(lines)
    return found


def imports(folder: Path) -> dict[str, str]:
    """Top-level names that the code imports absolutely, each with one file that does."""
    found = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            found.update({name.split(".")[0]: str(path.relative_to(ROOT)) for name in names})
    return found


@pytest.mark.parametrize("requirement", [*DEPENDENCIES, *(r for extra in EXTRAS.values() for r in extra)], ids=str)
def test_every_dependency_is_pinned_to_a_version_it_allows(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_the_lock_has_the_pinned_releases_with_hashes_and_all_that_it_promises() -> None:
    text, own = (ROOT / "requirements.lock").read_text(), pins()
    entry = r"^([\w.-]+)==([^ ]+)( ; [^\\]+)? \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+"
    found = {canonicalize_name(name): version for name, version, _ in re.findall(entry, text, re.M)}
    assert len(found) == len(re.findall(r"^[^#\s]", text, re.M)), "a release without a hash"
    cuda = {name for name in found if re.match("cuda-|nvidia-|triton$", name)}  # torch's, and not pinned by rayfed
    assert {name: version for name, version in found.items() if name not in cuda} == {
        n: own[n] for n in found.keys() - cuda
    }
    promised = [*DEPENDENCIES, *(r for extra in ("minilm", "report", "optuna") for r in EXTRAS[extra])]
    assert {canonicalize_name(r.name) for r in promised} <= found.keys()
    assert "://" not in text


def test_every_import_is_a_declared_dependency() -> None:
    optional = [r for name, extra in EXTRAS.items() if name != "dev" for r in extra]
    declared = {canonicalize_name(r.name) for r in DEPENDENCIES + optional}
    undeclared = {
        name: file
        for name, file in imports(ROOT / "rayfed").items()
        if name not in sys.stdlib_module_names
        and name != "rayfed"
        and canonicalize_name(DISTRIBUTION.get(name, name)) not in declared
    }
    assert undeclared == {}


def test_the_version_is_the_same_in_the_code() -> None:
    assert f'__version__ = "{PROJECT["version"]}"' in (ROOT / "rayfed" / "__init__.py").read_text()


def cluster() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_the_cluster_file_satisfies_rays_schema() -> None:
    ray = find_spec("ray")
    if ray is None or ray.origin is None:
        pytest.skip("ray is not installed")
    schema = json.loads((Path(ray.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster(), schema)
    with pytest.raises(jsonschema.ValidationError):  # the schema does refuse
        jsonschema.validate({**cluster(), "head_nodes": {}}, schema)


def test_the_cluster_file_names_the_pinned_ray_and_a_head_without_gpu_workers() -> None:
    settings = cluster()
    (install,) = [command for command in settings["setup_commands"] if "ray==" in command]
    assert f"ray=={pins()['ray']} " in install
    assert settings["head_node_type"] in settings["available_node_types"]
    workers = settings["available_node_types"]["gpu"]
    assert workers["min_workers"] == 0
    assert workers["max_workers"] == settings["max_workers"]


def test_the_cluster_file_mounts_files_that_exist_and_is_edited_in_two_places() -> None:
    mounted = [local for local in cluster()["file_mounts"].values() if not local.startswith("~")]
    assert [local for local in mounted if not (ROOT / local).exists()] == []
    assert re.findall(r"^ *# (EDIT \d):", (ROOT / "cluster.yaml").read_text(), re.MULTILINE) == ["EDIT 1", "EDIT 2"]


def test_the_makefile_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony.split() == re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE)
