"""SIGTERM and Ctrl-C: one line, exit code 1, everything copied that `--out` promises, and a run that continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import LOWRANK, wait_for

import rayfed
from rayfed.cli import main
from rayfed.server.loop import Server
from rayfed.storage import RemoteFolder, local_folder
from rayfed.tracking import read_metrics

SETTINGS: dict[str, Any] = {**LOWRANK, "server": {"rounds": 6, "cohort": 2}}
TERMINATED = "rayfed: terminated; `--resume` with the same --out continues\n"

needs_main_thread = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread alone"
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    return tmp_path / "tiny.yaml"


def digests(folder: Path) -> list[Any]:
    return [record["state/digest"] for record in read_metrics(folder / "metrics.jsonl")]


def signalled_in_round(number: int) -> Callable[..., Any]:
    """`Server._round` that gets SIGTERM in a round."""
    real = Server._round

    def round_with_signal(self: Server, t: int) -> Any:
        if t + 1 == number:
            signal.raise_signal(signal.SIGTERM)
        return real(self, t)

    return round_with_signal


@needs_main_thread
def test_sigterm_leaves_the_last_round_at_the_uri_and_the_run_continues_to_the_same_bits(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = digests(rayfed.run(rayfed.load_config(config), out=tmp_path / "whole").out)
    before, remote = signal.getsignal(signal.SIGTERM), tmp_path / "remote"
    upload = RemoteFolder.upload

    def upload_at_the_end(self: RemoteFolder, folder: Path) -> None:
        if "stopped" in (folder / "events.log").read_text():
            signal.raise_signal(signal.SIGTERM)  # the cluster repeats it: this does not end the clean-up
            upload(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Server, "_round", signalled_in_round(5))
        patch.setattr(RemoteFolder, "upload", upload_at_the_end)
        assert main(["run", str(config), "--out", f"file://{remote}"]) == 1
    assert capsys.readouterr().err == TERMINATED
    assert signal.getsignal(signal.SIGTERM) is before
    assert digests(remote) == whole[:4]
    assert (remote / "checkpoints/round-000004/checkpoint.json").is_file()
    assert (remote / "events.log").read_text().endswith("stopped before the end\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["run", str(config), "--out", f"file://{remote}", "--resume"]) == 0
    assert digests(remote) == whole


@needs_main_thread
def test_sigterm_during_the_last_upload_repeats_it(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uploads: list[int] = []
    upload = RemoteFolder.upload

    def interrupted(self: RemoteFolder, folder: Path) -> None:
        uploads.append(1)
        if len(uploads) == 3:  # two checkpoints before it
            signal.raise_signal(signal.SIGTERM)
        upload(self, folder)

    monkeypatch.setattr(RemoteFolder, "upload", interrupted)
    words = ["run", str(config), "server.rounds=2", "--out", f"file://{tmp_path}/remote"]
    assert main(words) == 1
    assert capsys.readouterr().err == TERMINATED
    assert (tmp_path / "remote/report.html").is_file()
    assert len(uploads) == 4


def test_an_error_of_the_console_does_not_skip_the_last_upload(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def broken(*_: object) -> None:
        calls.append("close")
        raise ZeroDivisionError

    monkeypatch.setattr("rayfed.api.runs._Summary.close", broken)
    monkeypatch.setattr(RemoteFolder, "upload", lambda *_: calls.append("upload"))
    with pytest.raises(ZeroDivisionError):
        rayfed.run(rayfed.load_config(config), out=f"file://{tmp_path}/remote")
    assert calls[-2:] == ["close", "upload"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group", "how"),
    [(signal.SIGTERM, False, "terminated"), (signal.SIGTERM, True, "terminated"), (signal.SIGINT, True, "interrupted")],
)
def test_on_ray_a_signal_to_the_starter_or_to_all_processes_is_one_line_and_the_rest_is_uploaded(
    config: Path, tmp_path: Path, number: signal.Signals, group: bool, how: str
) -> None:
    rounds, uri, here = "server.rounds=400", f"file://{tmp_path}/remote", tmp_path / local_folder("x").parent
    whole = digests(rayfed.run(rayfed.load_config(config, [rounds]), out=tmp_path / "whole").out)
    words = ["run", str(config), rounds, "engine.kind=ray", "engine.workers=2", "--out", uri]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "rayfed", *words], env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            assert wait_for(lambda: any(f.read_bytes().count(b"\n") > 9 for f in here.glob("*/metrics.jsonl")))
            (os.killpg if group else os.kill)(process.pid, number)
            assert process.wait(timeout=40) == 1
            assert process.stderr is not None
            assert process.stderr.read() == TERMINATED.replace("terminated", how)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    remote = tmp_path / "remote"
    done = len(digests(remote))
    assert 10 <= done < 400
    assert digests(remote) == whole[:done]
    assert (remote / f"checkpoints/round-{done:06d}/checkpoint.json").is_file()
    assert main(["run", str(config), rounds, "--out", uri, "--resume"]) == 0
    assert digests(remote) == whole
