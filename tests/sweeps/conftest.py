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

from rayfed.sweeps.trial import work
from rayfed.tracking import SinkList


class HereInOrder:
    """Stands for Ray Tune: the trials one after the other, in this process; remembers which."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []

    def on_ray(self, trials) -> AbstractContextManager:
        return nullcontext()

    def run_on_tune(self, trials, sweep, out, federations, listener) -> None:
        self.ran.append([])
        for trial in trials:
            self.ran[-1].append(trial.name)
            work(trial, out, federations[trial.data], SinkList())
            listener.settled(trial.name)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> HereInOrder:
    """What Ray Tune's place is taken by."""
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
