"""The bundles that a trial asks for, and the clusters on which they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayfed.config import load_config
from rayfed.sweeps.resources import bundles, fits


def settings(*overrides: str) -> Any:
    return load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml", overrides)


def test_what_a_trial_asks_of_ray() -> None:
    assert bundles(settings("engine.kind=local", "engine.threads=2")) == [{"CPU": 2}]
    local = settings("engine.kind=local", "engine.device=cuda", "engine.gpus_per_worker=0.25")
    assert bundles(local) == [{"CPU": 1, "GPU": 0.25}]
    assert bundles(settings("engine.kind=local", "engine.device=cuda")) == [{"CPU": 1, "GPU": 1}]
    shared = settings("engine.workers=2", "engine.device=cuda")
    assert bundles(shared) == [{"CPU": 1}] + 2 * [{"CPU": 1, "GPU": 1, "memory": 2**28}]
    ray = settings(
        "engine.workers=3", "engine.cpus_per_worker=0.5", "engine.gpus_per_worker=1", "engine.memory_per_worker=0"
    )
    assert bundles(ray) == [{"CPU": 1}] + 3 * [{"CPU": 0.5, "GPU": 1}]
    nothing = settings("engine.cpus_per_worker=0", "engine.memory_per_worker=0")
    assert bundles(nothing) == [{"CPU": 1}]  # Ray takes no empty bundle


def test_which_trials_can_ever_run() -> None:
    asked = [{"CPU": 1.0}, *3 * [{"CPU": 1.0, "GPU": 0.5}]]
    assert fits(asked, {"CPU": 4, "GPU": 2}, [])
    assert not fits(asked, {"CPU": 3, "GPU": 2}, [])
    assert not fits(asked, {"CPU": 4, "GPU": 1}, [])
    assert fits(asked, {"CPU": 1}, [{"CPU": 9, "GPU": 1}, {"CPU": 1, "GPU": 1}])
    assert not fits(asked, {"CPU": 0}, [{"CPU": 9, "GPU": 9}])  # its own process stays with the run directories
    assert not fits([{"CPU": 1.0}, {"CPU": 2.0}], {"CPU": 2}, [{"CPU": 1}])  # no bundle is split
    assert fits([{"CPU": 0.1}] * 11, {"CPU": 1.1}, [])
