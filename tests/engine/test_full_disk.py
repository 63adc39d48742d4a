"""A full disk ends a run in one line. With room again, the run continues from its last checkpoint to the same bits."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from faults.disk import can_limit, run_on_full_disk, sizes
from faults.store import register
from small_runs import lowrank

import rayfed
from rayfed import files
from rayfed.config import dump_config
from rayfed.errors import RunError
from rayfed.storage import local_folder
from rayfed.tracking import read_metrics

needs_mounts = pytest.mark.skipif(not can_limit(), reason="needs user and mount namespaces")


def digests(folder: Path) -> list[Any]:
    return [record["state/digest"] for record in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return digests(rayfed.run(lowrank(), out=tmp_path_factory.mktemp("whole") / "run").out)


@pytest.mark.parametrize("flushes", [1, 3, 9, 20])
def test_the_first_write_that_finds_no_room_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: list[Any], flushes: int
) -> None:
    count, real = [0], os.fsync

    def full(handle: int) -> None:
        count[0] += 1
        if count[0] >= flushes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(RunError) as caught:
            rayfed.run(lowrank(), out=out)
    where, _, rest = str(caught.value).partition(": ")
    assert rest == "No space left on device; --resume continues from the last checkpoint"
    assert Path(where).is_relative_to(out)
    assert ".partial" not in where
    assert list(out.rglob(files.PARTIAL)) == []
    assert digests(rayfed.run(lowrank(), out=out, resume=True).out) == whole


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, whole: list[Any]) -> None:
    (tmp_path / "checkpoints/.round-000001.7.partial").mkdir(parents=True)
    (tmp_path / "checkpoints/.round-000001.7.partial/state.safetensors").touch()
    (tmp_path / "config.yaml").write_text(dump_config(lowrank()))
    (tmp_path / ".config.yaml.7.partial").write_text("name: ha")
    assert digests(rayfed.run(lowrank(), out=tmp_path, resume=True).out) == whole
    assert list(tmp_path.rglob(files.PARTIAL)) == []


def test_a_store_that_refuses_leaves_a_run_that_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"refusing://{tmp_path}/remote"
    register(writes=12)
    with pytest.raises(RunError, match=r"^--out: .* could not be written \(refused: the quota is used up\); the local"):
        rayfed.run(lowrank(), out=uri)
    assert not (local_folder(uri) / "adapter").exists()
    register(writes=None)
    assert digests(rayfed.run(lowrank(), out=uri, resume=True).out) == whole
    assert digests(tmp_path / "remote") == whole


@needs_mounts
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_disk_that_gets_full_at_any_level(tmp_path: Path, engine: str) -> None:
    """Five fill levels in process, one on Ray: between a disk too small for the settings and one for half the run."""
    experiment = lowrank("server.rounds=60", f"engine.kind={engine}", "engine.workers=2")
    (tmp_path / "tiny.yaml").write_text(dump_config(experiment))
    whole = digests(rayfed.run(lowrank("server.rounds=60"), out=tmp_path / "whole").out)
    room = sizes(0, 5, 4096, 150_000) if engine == "local" else [100_000]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for size in room:
        disk, copy = tmp_path / "disk", tmp_path / str(size)
        command = [sys.executable, "-m", "rayfed", "run", str(tmp_path / "tiny.yaml"), "--out", str(disk / "run")]
        done = run_on_full_disk(command, size, disk, copy, environment)
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith(f"rayfed: {disk}/run/")
        assert done.stderr.endswith(": No space left on device; --resume continues from the last checkpoint\n")
        assert done.stderr.count("\n") == 1
        assert digests(rayfed.run(lowrank("server.rounds=60"), out=copy / "run", resume=True).out) == whole
