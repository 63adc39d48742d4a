"""The resources that a trial asks of Ray: one bundle for its own process, and one for each of its workers.

All bundles of a trial are reserved together, so the workers of a running trial always have room.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray import tune

from rayfed.config import Experiment
from rayfed.config.execution import Engine
from rayfed.engine.driver import start_ray
from rayfed.engine.placement import check_trial, trial_bundles
from rayfed.errors import UserError


def join_ray(
    trials: Sequence[Experiment], environment: Mapping[str, str], event: Callable[[str], None] = lambda text: None
) -> bool:
    """Joins the trials' cluster, or starts Ray here with CPUs for any of them, unless this process uses Ray already.

    Whether Ray was started or joined now. ``environment``: variables that are set before, unless they are. ``event``
    gets a line first, since that takes seconds. UserError where the trials name several clusters, or the cluster can
    never hold one of them.
    """
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    engines = list({str(trial.engine): trial.engine for trial in trials}.values())
    addresses = {engine.address for engine in engines}
    if len(addresses) > 1:
        raise UserError("engine.address: trials run on one cluster, but these name several")
    if ours := not ray.is_initialized():
        cpus = max(sum(bundle.get("CPU", 0) for bundle in trial_bundles(engine)) for engine in engines)
        start_ray(addresses.pop(), cpus, any(engine.dashboard for engine in engines), event)
    try:
        for engine in engines:
            check_trial(engine)
    except UserError:
        if ours:
            ray.shutdown()
        raise
    return ours


def placement_group(engine: Engine, here: bool = False) -> tune.PlacementGroupFactory:
    """The placement group of a trial. ``here``: its process stays on this node, where the run directories are."""
    process, *workers = trial_bundles(engine)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if here and len(nodes) > 1:
        (own,) = (node for node in nodes if node["NodeID"] == ray.get_runtime_context().get_node_id())
        process |= {f"node:{own['NodeManagerAddress']}": 1e-3}
    labels = engine.labels
    selectors: dict[str, Any] = {"bundle_label_selector": [{}, *(dict(labels) for _ in workers)]} if labels else {}
    return tune.PlacementGroupFactory([process, *workers], **selectors)
