"""Sweeps over the problem with a known answer: trained in milliseconds a round, no model to load."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import LOWRANK
from sweep_files import run_in_process

from rayfed.sweeps.on_tune import overrides
from rayfed.sweeps.plan import NAME, START_FROM
from rayfed.sweeps.sweep import Search


class HereInOrder:
    """Replaces Ray Tune: runs the trials that are suggested one after the other in this process.

    `ran` has their names: a list for each use of Ray Tune.
    """

    def __init__(self) -> None:
        self.ran: list[list[str]] = []

    def run_on_tune(self, search: Search) -> None:
        self.ran.append([])
        search.tune_config()
        while config := search.suggest():
            trial = search.trial(config[NAME], overrides(config))
            self.ran[-1].append(trial.name)
            error = run_in_process(trial, search.out, start=config.get(START_FROM))
            search.trial_ended(trial, error or None)


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of tests need not reach the disk. Waiting for it takes more than half of the time of these tests."""
    monkeypatch.setattr("rayfed.files._flush", lambda path: None)


@pytest.fixture(scope="module")
def ray_cluster() -> None:
    """Ray with 4 CPUs in this process: started once, and again if a module with a Ray of its own has stopped it."""
    import ray

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> HereInOrder:
    """Replaces Ray Tune by this process."""
    here = HereInOrder()
    monkeypatch.setattr("rayfed.sweeps.on_tune.run_on_tune", here.run_on_tune)
    return here


@pytest.fixture
def tiny_settings() -> dict[str, Any]:
    """The settings without a sweep, fresh."""
    return copy.deepcopy(LOWRANK)


@pytest.fixture
def sweep_file(tmp_path: Path) -> Callable[..., Path]:
    """sweep_file({"parameters": ...}, server={"rounds": 9}) -> a file with that section `sweep` and those settings."""

    def write(sweep: Any, **sections: Any) -> Path:
        settings = dict(LOWRANK)
        for name, value in sections.items():
            settings[name] = {**settings[name], **value} if isinstance(settings.get(name), dict) else value
        if isinstance(sweep, dict) and "metric" not in sweep:
            sweep = {"metric": "eval/gap", "mode": "min", **sweep}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**settings, "sweep": sweep}, sort_keys=False))
        return path

    return write
