"""The placement of workers: one bundle a worker in a placement group, spread over the cluster's nodes or packed on few.

The driver is not in the group. It runs on the node of the process that started the run, because the run directory is
there, and holds no resources. On a cluster whose head has no GPU, that is a CPU node. When a node of the group is lost,
Ray places its bundles again as soon as there is room; meanwhile the executor goes on with the other workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rayfed.clients.plan import RunPlan
from rayfed.config.execution import Engine
from rayfed.errors import UserError, allowed

Bundle = dict[str, float]


def bundle_of(engine: Engine) -> Bundle:
    """The resources of one worker; empty where it asks for none."""
    asked = {"CPU": engine.cpus_per_worker, "GPU": engine.gpus}
    return {name: amount for name, amount in asked.items() if amount}


def reserve(engine: Engine) -> PlacementGroup | None:
    """A placement group with a bundle for each worker, not yet placed. It lives until `release`, or the end of the job.

    None where workers need no resources, or where a trial of a sweep has reserved places for them.
    """
    bundle = bundle_of(engine)
    if not bundle or ray.util.get_current_placement_group() is not None:
        return None
    return placement_group([dict(bundle) for _ in range(engine.workers)], strategy=engine.placement.upper())


def release(group: PlacementGroup | None) -> None:
    """Gives the places of a group back. A group that was released already, and None, are allowed."""
    if group is not None:
        remove_placement_group(group)


def in_group(group: PlacementGroup | None) -> Any:
    """A worker's scheduling strategy: any free bundle of the group. None: the trial's group, or Ray's default."""
    return None if group is None else PlacementGroupSchedulingStrategy(group)


def on_this_node() -> Any:
    """The driver's scheduling strategy: the node of the starting process.

    A trial of a sweep has a placement group. Its driver joins the first bundle, the trial's own, and its workers use
    the others; outside the group they might wait for resources that other trials hold.
    """
    group = ray.util.get_current_placement_group()
    if group is not None:
        return PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def with_gpu_share(plan: RunPlan) -> RunPlan:
    """The plan with `engine.gpus_per_worker: auto` as a number: an equal share of the GPUs that the cluster has.

    A trial of a sweep has its places already. UserError where the share cannot be known, because there is no GPU yet.
    """
    engine = plan.engine
    if engine.gpus_per_worker != "auto" or ray.util.get_current_placement_group() is not None:
        return plan
    if engine.device == "cpu":
        return plan.with_gpus(0.0)
    have = sum(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
    if not have:
        waits = "a number is needed until its nodes are there"
        raise allowed("engine.gpus_per_worker", "auto", waits if engine.wait_for_nodes else "Ray has no GPUs to share")
    return plan.with_gpus(have)


def check_places(engine: Engine) -> str | None:
    """UserError where the cluster can never hold the workers; a line to show where it has to grow first."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    mistake = _mistake(engine, nodes)
    if mistake is None:
        return None
    if not engine.wait_for_nodes:
        raise UserError(mistake)
    return f"waiting for nodes: {mistake}"


def _mistake(engine: Engine, nodes: Sequence[Bundle]) -> str | None:
    """Why the nodes, empty as they may be, cannot hold the workers; None where they can."""
    for name, each in bundle_of(engine).items():
        field = f"engine.{name.lower()}s_per_worker"
        have = sum(node.get(name, 0) for node in nodes)
        if each * engine.workers > have + 1e-9:
            return f"{field}: got {each:g} for each of {engine.workers} workers, but Ray has {have:g} {name}s"
    places = sum(count_bundles(node, bundle_of(engine)) for node in nodes) if bundle_of(engine) else engine.workers
    if places < engine.workers:
        asked = " and ".join(f"{amount:g} {name}" for name, amount in bundle_of(engine).items())
        return f"engine.workers: got {engine.workers} with {asked} each, but Ray's nodes have room for {places} of them"
    return None


def count_bundles(node: Bundle, bundle: Bundle) -> int:
    """The number of bundles for which the node has resources. A bundle asks for at least one resource."""
    return min(math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in bundle.items())
