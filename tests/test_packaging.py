"""What is installed is whole: the configs come with the package, and the source distribution has the tests.

The archives are built from a copy of the project, by the installed setuptools. Nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "wandb", "build", "dist", "*.egg-info", "__pycache__", "*.partial")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the two archives, a wheel and a source distribution."""
    project, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, project, ignore=LEFT_OUT, dirs_exist_ok=True)
    for hidden in (".dockerignore", ".pre-commit-config.yaml"):
        shutil.copy(ROOT / hidden, project)
    for kind in ("wheel", "sdist"):
        build = f"import sys, setuptools.build_meta; setuptools.build_meta.build_{kind}(sys.argv[1])"
        words = [sys.executable, "-c", build, str(out)]
        done = subprocess.run(words, cwd=project, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    return out


def members(built: Path) -> tuple[set[str], set[str]]:
    """The files of the wheel and of the source distribution."""
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    return set(zipfile.ZipFile(wheel).namelist()), files


def files_of(folder: str, pattern: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}


@pytest.mark.slow
def test_the_archives_are_whole(built: Path) -> None:
    wheel, source = members(built)
    configs = {f for f in files_of("configs", "*.yaml") if "kubernetes" not in f}
    wanted = files_of("rayfed", "*.py") | {f"rayfed/{config}" for config in configs}
    assert wanted | {"rayfed/py.typed", "rayfed/reports/page.html"} == {f for f in wheel if f.startswith("rayfed/")}
    wanted |= files_of("tests", "*.py") | files_of("docs", "*.md") | files_of("configs", "*")
    wanted |= files_of("examples", "*.py") | {path.name for path in ROOT.glob("*.*") if not path.name.startswith(".")}
    alone = {"Makefile", "Dockerfile", "LICENSE"}
    assert {f for f in wanted if not f.startswith("rayfed/configs") and (ROOT / f).is_file()} | alone <= source


@pytest.mark.slow
def test_an_installed_wheel_finds_configs_by_name(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    words = [sys.executable, "-m", "rayfed", "run", "lowrank", "server.rounds=1", "--out", "out"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "config.yaml").is_file()


def test_the_image_has_the_pinned_ray_and_copies_what_setup_needs() -> None:
    text = (ROOT / "Dockerfile").read_text()
    (pin,) = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert re.findall(r"^FROM rayproject/ray:(\S+?)-", text, re.MULTILINE) == [pin]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert set(re.findall(r"REGISTRY/rayfed:(\S+)", text)) == {version}
    copied = {word for line in re.findall(r"^COPY --chown=ray (.*) \S+$", text, re.MULTILINE) for word in line.split()}
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
