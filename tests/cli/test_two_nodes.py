"""Jobs on a cluster of two nodes: what README says of `ray job submit` holds there, also when a node dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray_heads import RAY, WITH_TOKEN, Head, environment, joined, started_head
from small_runs import LOWRANK, wait_for

import rayfed
from rayfed.tracking import read_metrics

SETTINGS: dict[str, Any] = {
    **LOWRANK,
    "server": {"rounds": 2000, "cohort": 2},
    "engine": {"workers": 2, "placement": "spread"},
    "checkpoint": {"every": 500},
    "tracking": {"wandb": "off"},
}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head() as head:
        yield head


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project's folder, with the file of a run."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder


def job(head: Head, folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [RAY, "job", "submit", "--address", head.url, "--working-dir", str(folder), "--", "rayfed", *words]
    return subprocess.Popen(
        command, env=environment(**WITH_TOKEN), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finished(process: subprocess.Popen[str]) -> None:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said


def a_client_trains_on(node: subprocess.Popen[bytes]) -> bool:
    """Ray names a process after the method it runs."""
    for child in psutil.Process(node.pid).children(recursive=True):
        try:
            if child.cmdline()[:1] == ["ray::Worker.execute"]:
                return True
        except psutil.Error:
            continue
    return False


def digests(out: Path) -> list[Any]:
    return [record["state/digest"] for record in read_metrics(out / "metrics.jsonl")]


def alone(folder: Path, out: Path, *overrides: str) -> list[Any]:
    """The digests of the same run in this process."""
    overrides = (*overrides, "engine.kind=local", "tracking.console=off")
    return digests(rayfed.run(rayfed.load_config(folder / "run.yaml", overrides), out=out).out)


@pytest.mark.slow
def test_a_node_that_dies_costs_a_submitted_run_time_and_not_the_result(
    head: Head, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    metrics = out / "metrics.jsonl"
    with joined(head, cpus=2) as node:
        process = job(head, folder, "run", "run.yaml", "--out", str(out))
        there = wait_for(lambda: a_client_trains_on(node))
        os.killpg(node.pid, signal.SIGKILL)
        left = SETTINGS["server"]["rounds"] - metrics.read_bytes().count(b"\n")
        finished(process)
    assert there, "nobody trained on the second node"
    assert left > 100, "the run was over before the node died"
    assert digests(out) == alone(folder, tmp_path / "alone")
    assert "a worker died" in (out / "events.log").read_text()


@pytest.mark.slow
def test_a_sweep_of_runs_on_two_nodes(head: Head, folder: Path, tmp_path: Path) -> None:
    """Two trials of three CPUs each: more than either node has."""
    out = tmp_path / "out"
    sweep = {"parameters": {"client.lr": {"grid": [0.02, 0.05]}}, "metric": "eval/gap", "mode": "min"}
    server = {"rounds": 5, "cohort": 2}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**SETTINGS, "server": server, "sweep": sweep}))
    with joined(head, cpus=2):
        finished(job(head, folder, "sweep", "sweep.yaml", "--out", str(out)))
    lines = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["done", "done"]
    for rate in (0.02, 0.05):
        here = alone(folder, tmp_path / f"{rate}", "server.rounds=5", f"client.lr={rate}")
        assert digests(out / "trials" / f"lr={rate}") == here
