"""`--out URI` on fsspec's file system in memory: what is uploaded and when, resuming elsewhere, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from small_runs import LOWRANK

import rayfed
from rayfed.cli import main
from rayfed.errors import RunError
from rayfed.storage import RemoteFolder, local_folder
from rayfed.tracking import read_metrics

SETTINGS: dict[str, Any] = {
    **LOWRANK, "server": {"rounds": 6, "cohort": 2}, "checkpoint": {"every": 2}
}  # fmt: skip
SWEEP = {"parameters": {"seed": {"grid": [0, 1]}}, "metric": "eval/gap", "mode": "min"}
URI = "memory://bucket/runs/one"
HERE = local_folder(URI)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield memory
    memory.store.clear()


def remote() -> set[str]:
    return set(RemoteFolder(URI).files())


def local(folder: str | Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def digests(lines: bytes, tmp_path: Path) -> list[Any]:
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    return [line["state/digest"] for line in read_metrics(tmp_path / "metrics.jsonl")]


def dying_in_round(number: int, store: dict[str, Any]) -> Callable[..., Any]:
    """`Server._round` that fails in a round; ``store`` gets what is in the bucket then."""
    from rayfed.server.loop import Server

    real = Server._round

    def round_or_death(self: Server, t: int) -> Any:
        if t + 1 == number:
            store.update(fsspec.filesystem("memory").store)
            raise RunError("the machine is gone")
        return real(self, t)

    return round_or_death


def test_a_run_is_uploaded_whole_and_its_local_folder_is_removed(
    bucket: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "tiny.yaml", "--out", URI]) == 0
    assert capsys.readouterr().out.endswith(f"run directory {URI}\n")
    assert main(["run", "tiny.yaml", "--out", "here"]) == 0
    assert remote() == local("here")
    assert "report.html" in remote()
    for name in ("config.yaml", "adapter/adapter_model.safetensors"):
        assert bucket.cat(f"/bucket/runs/one/{name}") == Path("here", name).read_bytes(), name
    assert not HERE.exists()


def test_a_checkpoint_is_at_the_uri_at_once_and_another_machine_continues_to_the_same_state(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rayfed.run(rayfed.load_config("tiny.yaml"), out=tmp_path / "whole")
    store: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr("rayfed.server.loop.Server._round", dying_in_round(5, store))
        assert main(["run", "tiny.yaml", "--out", URI]) == 1
    bucket.store.clear()
    bucket.store.update(store)  # a machine that dies uploads nothing at the end
    assert "checkpoints/round-000004/checkpoint.json" in remote()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["run", "../tiny.yaml", "--out", URI, "--resume"]) == 0
    lines = bucket.cat("/bucket/runs/one/metrics.jsonl")
    assert digests(lines, tmp_path) == [line["state/digest"] for line in whole.metrics]
    assert remote() - {"report.html"} == local(tmp_path / "whole")  # pruned checkpoints are pruned there, too


def test_a_failed_run_is_uploaded_and_continues_from_the_local_folder(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rayfed.server.loop.Server._round", dying_in_round(6, {}))
        assert main(["run", "tiny.yaml", "--out", URI]) == 1
    assert capsys.readouterr().err == "rayfed: the machine is gone\n"
    assert bucket.cat("/bucket/runs/one/metrics.jsonl").count(b"\n") == 5
    assert local(HERE) == remote()
    bucket.store.clear()
    assert main(["run", "tiny.yaml", "--out", URI]) == 2  # not by accident
    assert f"an earlier run for it is still in {HERE}; add --resume, or remove that" in capsys.readouterr().err
    assert main(["run", "tiny.yaml", "--out", URI, "--resume"]) == 0
    assert bucket.cat("/bucket/runs/one/metrics.jsonl").count(b"\n") == 6
    assert not HERE.exists()


def test_an_upload_that_fails_leaves_the_local_folder(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "put_file", full)
        assert main(["run", "tiny.yaml", "--out", URI]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"rayfed: --out: {URI} could not be written (quota exceeded); the local folder {HERE} has")
    assert err.count("\n") == 1
    assert main(["run", "tiny.yaml", "--out", URI, "--resume"]) == 0
    assert {"config.yaml", "report.html"} <= remote()


def test_refusals_are_one_line_before_anything_runs(bucket: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bucket.pipe("/bucket/runs/one/other.txt", b"mine")
    for words, line in (
        (["--out", URI], f"--out: got '{URI}', but it is not empty; continue it with --resume or name another"),
        (["--out", URI, "--resume"], f"--resume: got '{URI}', but that is no directory to resume: it has no config"),
        (["--out", "nosuch://x/y"], "--out: got 'nosuch://x/y', but it cannot be opened (Protocol not known: nosuch"),
        (["--out", "s3://key:secret@bucket/x"], "--out: the URI has a password, a key or a query string, but"),
        (["--out", "memory://two", "server.rounds=0"], "server.rounds: got 0, but"),
        (["--out", "memory://two", "server.cohort=99"], "server.cohort: got 99, but"),
    ):
        assert main(["run", "tiny.yaml", *words]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"rayfed: {line}")
        assert err.count("\n") == 1
        assert "secret" not in err
    assert main(["sweep", "tiny.yaml", "--out", URI, "--resume"]) == 2
    assert "it has no sweep.yaml" in capsys.readouterr().err
    assert list(bucket.store) == ["/bucket/runs/one/other.txt"]
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_sweep_is_uploaded_and_resumed_elsewhere(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**SETTINGS, "sweep": SWEEP}))
    ended: list[int] = []
    upload = RemoteFolder.upload

    def record(self: RemoteFolder, folder: Path) -> None:
        upload(self, folder)
        ended.append(sum(name.startswith("trials/") and name.endswith("/summary.json") for name in remote()))

    monkeypatch.setattr(RemoteFolder, "upload", record)
    assert main(["sweep", "sweep.yaml", "--out", URI]) == 0
    assert ended == [1, 2, 2]  # after every trial, and at the end
    assert {
        "sweep.yaml",
        "sweep.jsonl",
        "table.txt",
        "trials/seed=0/summary.json",
        "trials/seed=1/metrics.jsonl",
    } <= remote()
    assert not HERE.exists()
    lines = bucket.cat("/bucket/runs/one/sweep.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["sweep", "../sweep.yaml", "--out", URI, "--resume"]) == 0
    assert bucket.cat("/bucket/runs/one/sweep.jsonl") == lines
