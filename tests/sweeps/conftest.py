"""Sweeps over the problem with a known answer: trained in milliseconds a round, no model to load."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import LOWRANK

from rayfed.sweeps.search import Search
from rayfed.sweeps.trainable import RUN_DIR, START_FROM, load_federation, run_trial, runs_of
from rayfed.sweeps.trial import read_outcome, trial_folder


class HereInOrder:
    """Replaces Ray Tune: runs the trials that are suggested one after the other in this process.

    `ran` has their names: a list for each use of Ray Tune.
    """

    def __init__(self) -> None:
        self.ran: list[list[str]] = []

    def run_on_tune(self, search: Search) -> None:
        self.ran.append([])
        search.forget_failures()
        searcher = search.tuner()["search_alg"]
        for number in count():
            config = searcher.suggest(str(number))
            if not isinstance(config, dict):
                break
            trials = [search.trial(name, own) for name, own in runs_of(config["name"], config).items()]
            records: list[Any] = []
            for trial in trials:
                if read_outcome(search.out, trial) is None:
                    self.ran[-1].append(trial.name)
                start, federation = config.get(START_FROM), load_federation(trial.experiment, {})
                run_trial(trial, search.out, federation, start=start, tell=records.append)
            folder = str(trial_folder(search.out, trials[-1]))
            searcher.on_trial_complete(str(number), {**records[-1], RUN_DIR: folder})
            for trial in trials:
                search.trial_ended(trial)


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
