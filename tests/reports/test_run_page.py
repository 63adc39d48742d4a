"""The page that a run writes itself, in the process that runs its rounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import lowrank
from wandb_files import runs

import rayfed
from rayfed.config import dump_config


def test_the_callback_writes_the_page(tmp_path: Path) -> None:
    out = rayfed.run(lowrank("server.rounds=1"), tmp_path / "run", callbacks=[rayfed.ReportCallback()]).out
    assert "1 of 1, finished" in (out / "report.html").read_text()
    assert not (out / "figures").exists()


@pytest.mark.slow
def test_on_ray_wandb_gets_the_page(tmp_path: Path) -> None:
    """The driver writes the page before its sinks close."""
    config, out = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(dump_config(lowrank("engine.kind=ray", "engine.workers=1", "tracking.wandb=offline")))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    command = [sys.executable, "-m", "rayfed", "run", str(config), "--out", str(out)]
    subprocess.run(command, check=True, timeout=300, env=environment, capture_output=True)
    (run,) = runs(out)
    _, files = run["artifacts"][f"run-{run['id']}"]
    assert {"report.html", "summary.json"} <= set(files)
