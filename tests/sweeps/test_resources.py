"""The bundles that a trial asks for, and the clusters on which they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from ray.tune import PlacementGroupFactory

from rayfed.config import load_config
from rayfed.engine.connect import join_for_trials
from rayfed.engine.placement import trial_bundles, trial_mistake, trial_places
from rayfed.errors import UserError


def settings(*overrides: str) -> Any:
    return load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml", overrides)


def bundles(*overrides: str) -> Any:
    return trial_bundles(settings(*overrides).engine)


def test_what_a_trial_asks_of_ray() -> None:
    assert bundles("engine.kind=local", "engine.threads=2") == [{"CPU": 2}]
    local = ("engine.kind=local", "engine.device=cuda")
    assert bundles(*local, "engine.gpus_per_worker=0.25") == [{"CPU": 1, "GPU": 0.25}]
    assert bundles(*local) == [{"CPU": 1, "GPU": 1}]
    shared = bundles("engine.workers=2", "engine.device=cuda")
    assert shared == [{"CPU": 1}] + 2 * [{"CPU": 1, "GPU": 1, "memory": 2**28}]
    ray = ("engine.workers=3", "engine.cpus_per_worker=0.5", "engine.gpus_per_worker=1", "engine.memory_per_worker=0")
    assert bundles(*ray) == [{"CPU": 1}] + 3 * [{"CPU": 0.5, "GPU": 1}]
    nothing = bundles("engine.cpus_per_worker=0", "engine.memory_per_worker=0")
    assert nothing == [{"CPU": 1}]  # Ray takes no empty bundle


def test_which_trials_can_ever_run() -> None:
    memory = "engine.memory_per_worker=0"
    three = settings("engine.workers=3", "engine.device=cuda", "engine.gpus_per_worker=0.5", memory).engine
    assert trial_mistake(three, {"CPU": 4, "GPU": 2}, True, []) is None
    assert trial_mistake(three, {"CPU": 3, "GPU": 2}, True, []) == (
        "engine.cpus_per_worker: got 1 for each of 3 workers, but Ray has 2 CPUs, beside 1 CPU for the process of the "
        "trial"
    )
    assert "gpus_per_worker: got 0.5" in str(trial_mistake(three, {"CPU": 4, "GPU": 1}, True, []))
    assert trial_mistake(three, {"CPU": 1}, True, [{"CPU": 9, "GPU": 1}, {"CPU": 1, "GPU": 1}]) is None
    # Its own process stays with the run directories.
    assert trial_mistake(three, {"CPU": 0}, True, [{"CPU": 9, "GPU": 9}]) == (
        "engine.workers: got 3, but the process of a trial needs 1 CPU of this node, which has 0"
    )
    wide = settings("engine.workers=1", "engine.cpus_per_worker=2", memory).engine
    assert trial_mistake(wide, {"CPU": 2}, True, [{"CPU": 1}])  # no bundle is split
    many = settings("engine.workers=10", "engine.cpus_per_worker=0.1", memory).engine
    assert trial_mistake(many, {"CPU": 2.0}, True, []) is None
    one = settings("engine.workers=1", memory).engine
    assert trial_mistake(one, {"CPU": 9}, False, [])  # this node lacks engine.labels
    assert trial_mistake(one, {"CPU": 1}, False, [{"CPU": 1}]) is None
    threads = settings("engine.kind=local", "engine.threads=3").engine
    assert trial_mistake(threads, {"CPU": 3}, True, []) is None
    assert "engine.threads: got 3, but the process of a trial needs 3 CPU" in str(
        trial_mistake(threads, {"CPU": 2}, True, [{"CPU": 9}])
    )


def test_workers_of_a_trial_go_to_nodes_with_the_labels(ray_cluster: None) -> None:
    node = ray.get_runtime_context().get_node_id()
    there, elsewhere = (
        settings("engine.workers=1", f"engine.labels={{ray.io/node-id: '{condition}'}}")
        for condition in (node, f"!{node}")
    )
    assert not join_for_trials([there.engine])
    group = PlacementGroupFactory(**trial_places(there.engine, here=False)).to_placement_group()
    assert ray.get(group.ready(), timeout=20)
    ray.util.remove_placement_group(group)
    with pytest.raises(UserError, match=rf"^engine.labels: got '!{node}' for ray.io/node-id, "):
        join_for_trials([elsewhere.engine])
