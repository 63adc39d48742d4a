"""The bundles that a trial asks for, and the clusters on which they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from rayfed.config import load_config
from rayfed.errors import UserError
from rayfed.sweeps.plan import Trial
from rayfed.sweeps.resources import bundles, fits, join_ray, placement_group


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
    one = [{"CPU": 1.0}, {"CPU": 1.0}]
    assert not fits(one, {"CPU": 9}, [], workers_here=False)  # this node lacks engine.labels
    assert fits(one, {"CPU": 1}, [{"CPU": 1}], workers_here=False)


def test_workers_of_a_trial_go_to_nodes_with_the_labels(ray_cluster: None) -> None:
    node = ray.get_runtime_context().get_node_id()
    there, elsewhere = (
        Trial(name, {}, {}, settings("engine.workers=1", f"engine.labels={{ray.io/node-id: '{condition}'}}"), "", ())
        for name, condition in (("there", node), ("elsewhere", f"!{node}"))
    )
    assert not join_ray([there], {})
    group = placement_group(there.experiment).to_placement_group()
    assert ray.get(group.ready(), timeout=20)
    ray.util.remove_placement_group(group)
    with pytest.raises(UserError, match=rf"^engine.labels: got '!{node}' for ray.io/node-id, .* \(trial elsewhere\)"):
        join_ray([elsewhere], {})
