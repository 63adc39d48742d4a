"""Sweeps over the problem with a known answer: trained in milliseconds a round, no model to load."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import LOWRANK

from rayfed.sweeps.trial import run_trial


class HereInOrder:
    """Replaces Ray Tune: runs the trials one after the other in this process; `ran` has their names, by stage."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []

    def on_ray(self, trials) -> AbstractContextManager:
        return nullcontext()

    def run_on_tune(self, trials, sweep, out, federations, listener) -> None:
        self.ran.append([])
        for trial in trials:
            self.ran[-1].append(trial.name)
            run_trial(trial, out, federations[trial.data])
            listener.trial_ended(trial.name)


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
    monkeypatch.setitem(sys.modules, "rayfed.sweeps.on_tune", here)
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
