"""`--out URI` on fsspec's file system in memory: what arrives, what a resume goes on from, what is refused."""

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
from rayfed.errors import UserError
from rayfed.tracking import read_metrics

SETTINGS: dict[str, Any] = {**LOWRANK, "server": {"rounds": 6, "cohort": 2}}
URI = "memory://bucket/runs/one"
HERE = Path("runs/memory-bucket-runs-one")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield memory
    memory.store.clear()


def names(bucket: Any) -> set[str]:
    return {path.removeprefix("/bucket/runs/one/") for path in bucket.store}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dying_in_round(number: int) -> Callable[..., Any]:
    from rayfed.server.loop import Server

    real = Server._round

    def round_or_death(self: Server, t: int, *beside: Any) -> Any:
        if t + 1 == number:
            raise MemoryError("no room")
        return real(self, t, *beside)

    return round_or_death


def test_a_run_arrives_whole_and_leaves_nothing_here(bucket: Any, tmp_path: Path) -> None:
    assert main(["run", "tiny.yaml", "--out", URI]) == 0
    assert main(["run", "tiny.yaml", "--out", "here"]) == 0
    assert names(bucket) == set(files(Path("here")))
    for name in ("config.yaml", "ledger.parquet/part-000001.parquet", "adapter/adapter_model.safetensors"):
        assert bucket.cat(f"/bucket/runs/one/{name}") == files(Path("here"))[name], name
    assert not HERE.exists()


def test_a_run_that_failed_is_kept_and_goes_on_on_another_machine(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rayfed.run(rayfed.load_config("tiny.yaml"), out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("rayfed.server.loop.Server._round", dying_in_round(4))
        with pytest.raises(MemoryError):
            main(["run", "tiny.yaml", "--out", URI])
    early = {name for name in names(bucket) if name.startswith("checkpoints/")}
    assert early
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["run", "../tiny.yaml", "--out", URI, "--resume"]) == 0
    Path("metrics.jsonl").write_bytes(bucket.cat("/bucket/runs/one/metrics.jsonl"))
    now = read_metrics(Path("metrics.jsonl"))
    assert [line["state/digest"] for line in now] == [line["state/digest"] for line in whole.metrics]
    assert names(bucket) - {"report.html"} == set(files(tmp_path / "whole"))  # pruned checkpoints are gone there too
    assert early - names(bucket)


def test_a_killed_command_goes_on_from_the_folder_here(bucket: Any, tmp_path: Path) -> None:
    """Nothing was copied; the folder is what a SIGKILL leaves."""
    experiment = rayfed.load_config("tiny.yaml")
    rayfed.run(experiment, out=HERE)
    lines = (HERE / "metrics.jsonl").read_bytes()
    assert main(["run", "tiny.yaml", "--out", URI]) == 2  # not by accident
    assert main(["run", "tiny.yaml", "--out", URI, "--resume"]) == 0
    assert bucket.cat("/bucket/runs/one/metrics.jsonl") == lines
    assert not HERE.exists()


def test_a_copy_that_fails_leaves_the_run_here_and_says_so(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError("quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr("rayfed.cli.store._Place.publish", full)
        assert main(["run", "tiny.yaml", "--out", URI]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"rayfed: --out: {URI} could not be written (quota exceeded); all of the run stays in {HERE}")
    assert (HERE / "config.yaml").is_file()
    assert main(["run", "tiny.yaml", "--out", URI, "--resume"]) == 0
    assert "config.yaml" in names(bucket)


def test_what_is_wrong_is_said_before_anything_runs(bucket: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bucket.pipe("/bucket/runs/one/other.txt", b"mine")

    def said(*words: str) -> str:
        assert main(["run", "tiny.yaml", *words]) == 2
        return capsys.readouterr().err

    assert "is not empty; continue it with --resume or name another" in said("--out", URI)
    assert "that is no run directory: it has no config.yaml" in said("--out", URI, "--resume")
    assert "cannot be opened (Protocol not known: nosuch" in said("--out", "nosuch://x/y")
    assert "keys belong in the store's own settings" in said("--out", "s3://key:secret@bucket/x")
    assert "server.rounds: got 0" in said("--out", "memory://bucket/two", "server.rounds=0")
    assert main(["sweep", "tiny.yaml", "--out", URI]) == 2
    assert "a sweep needs a folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="a run writes a folder"):
        rayfed.run(rayfed.load_config("tiny.yaml"), out=URI)
    assert list(bucket.store) == ["/bucket/runs/one/other.txt"]
    assert not Path("runs").exists()


def test_a_file_uri_is_pyarrows_own(bucket: Any, tmp_path: Path) -> None:
    assert main(["run", "tiny.yaml", "--out", f"file://{tmp_path}/there"]) == 0
    assert (tmp_path / "there" / "config.yaml").is_file()
