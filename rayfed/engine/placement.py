"""The placement of workers: one bundle a worker in a placement group, spread over the cluster's nodes or packed on few.

The driver is not in the group. It runs on the node of the process that started the run, because the run directory is
there, and holds no resources. On a cluster whose head has no GPU, that is a CPU node. When a node of the group is lost,
Ray places its bundles again as soon as there is room; meanwhile the executor goes on with the other workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayfed.clients.plan import RunPlan
from rayfed.config.execution import Engine
from rayfed.engine.labels import mistake_in_labels, satisfies
from rayfed.errors import UserError, allowed

Bundle = dict[str, float]
_SHOWN = {  # each resource's field, unit and name in messages
    "CPU": ("cpus_per_worker", 1, "CPUs"),
    "GPU": ("gpus_per_worker", 1, "GPUs"),
    "memory": ("memory_per_worker", 2**30, "GiB of memory"),
}


def bundle_of(engine: Engine) -> Bundle:
    """The resources of one worker; empty where it asks for none."""
    asked = {"CPU": engine.cpus_per_worker, "GPU": engine.gpus, "memory": engine.memory}
    return {name: amount for name, amount in asked.items() if amount}


def trial_bundles(engine: Engine) -> list[Bundle]:
    """A trial of a sweep: its process, then each worker if the engine is Ray and workers reserve anything."""
    if engine.kind == "local":
        return [{"CPU": float(engine.threads), **({"GPU": engine.gpus} if engine.device == "cuda" else {})}]
    return [{"CPU": 1.0}, *([bundle_of(engine)] * engine.workers if bundle_of(engine) else [])]


def trial_places(engine: Engine, here: bool) -> dict[str, Any]:
    """The arguments of Tune's PlacementGroupFactory for a trial: a bundle for its process, and one for each worker.

    All are reserved together, so the workers of a running trial always have room. ``here``: its process stays on this
    node, where the run directories are.
    """
    process, *workers = trial_bundles(engine)
    nodes = [node for node in ray.nodes() if node["Alive"]] if here else []
    if len(nodes) > 1:
        (own,) = (node for node in nodes if node["NodeID"] == ray.get_runtime_context().get_node_id())
        process |= {f"node:{own['NodeManagerAddress']}": 1e-3}
    selectors = {"bundle_label_selector": [{}, *[dict(engine.labels)] * len(workers)]} if engine.labels else {}
    return {"bundles": [process, *workers], **selectors}


def reserve(engine: Engine) -> PlacementGroup | None:
    """A placement group with a bundle for each worker, not yet placed. It lives until `release`, or the end of the job.

    None where workers need no resources, or where a trial of a sweep has reserved places for them.
    """
    bundle = bundle_of(engine)
    if not bundle or ray.util.get_current_placement_group() is not None:
        return None
    bundles = [dict(bundle) for _ in range(engine.workers)]
    labels = [dict(engine.labels) for _ in bundles] if engine.labels else None
    return placement_group(bundles, strategy=engine.placement.upper(), bundle_label_selector=labels)


def release(group: PlacementGroup | None) -> None:
    """Gives the places of a group back. A group that was released already, and None, are allowed."""
    if group is not None:
        remove_placement_group(group)


def in_group(group: PlacementGroup | None, engine: Engine) -> dict[str, Any]:
    """A worker's options: any free bundle of the group. None: a node with the labels, or the trial's group."""
    if group is not None:
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group)}
    if ray.util.get_current_placement_group() is not None:
        return {}
    return {"label_selector": engine.labels}


def on_this_node() -> dict[str, Any]:
    """The driver's options: the node of the starting process.

    A trial of a sweep has a placement group. Its driver joins the first bundle, the trial's own, and its workers use
    the others; outside the group they might wait for resources that other trials hold.
    """
    group = ray.util.get_current_placement_group()
    if group is not None:
        inside = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
        return {"scheduling_strategy": inside}
    return {"label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}


def named(run: str, part: str) -> dict[str, str]:
    """An actor's options: `rayfed-RUN-PART` is its name in Ray's dashboard and in `ray list actors`.

    Two actors of one namespace must not have one name, so every actor has its own namespace.
    """
    return {"name": f"rayfed-{run}-{part}", "namespace": f"rayfed-{uuid4().hex}"}


def with_gpu_share(plan: RunPlan) -> RunPlan:
    """The plan with `engine.gpus_per_worker: auto` as a number: an equal share of the GPUs that the cluster has.

    A trial of a sweep has its places already. UserError where the share cannot be known, because there is no GPU yet.
    """
    engine = plan.engine
    if engine.gpus_per_worker != "auto" or ray.util.get_current_placement_group() is not None:
        return plan
    if engine.device == "cpu":
        return plan.with_gpus(0.0)
    have = sum(node["Resources"].get("GPU", 0) for node in _nodes(engine))
    if not have:
        if not engine.wait_for_nodes and (mistake := _label_mistake(engine)):
            raise UserError(mistake)
        waits = "a number is needed until its nodes are there"
        raise allowed("engine.gpus_per_worker", "auto", waits if engine.wait_for_nodes else "Ray has no GPUs to share")
    return plan.with_gpus(have)


def check_places(engine: Engine) -> str | None:
    """UserError where the cluster can never hold the workers; a line to show where it has to grow first."""
    mistake = _label_mistake(engine) or _mistake(engine, [node["Resources"] for node in _nodes(engine)])
    if mistake is None:
        return None
    if not engine.wait_for_nodes:
        raise UserError(mistake)
    return f"waiting for nodes: {mistake}"


def check_trial(engine: Engine) -> None:
    """UserError where the cluster can never hold a trial of a sweep, whose process runs on this node."""
    own_id = ray.get_runtime_context().get_node_id()
    (here,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == own_id)
    labelled = {node["NodeID"]: node["Resources"] for node in _nodes(engine)}
    mistake = trial_mistake(engine, here, labelled.pop(own_id, None) is not None, [*labelled.values()])
    if mistake := (engine.kind == "ray" and _label_mistake(engine)) or mistake:
        raise UserError(mistake)


def trial_mistake(engine: Engine, here: Bundle, workers_here: bool, others: Sequence[Bundle]) -> str | None:
    """Why the trial can never run, its process on the node ``here``; None where it can.

    ``workers_here``: whether that node has `engine.labels`. ``others``: the other nodes that have.
    """
    process, *workers = trial_bundles(engine)
    for name, amount in process.items():
        if amount > here.get(name, 0) + 1e-9:
            field = {"CPU": "threads", "GPU": "gpus_per_worker"}[name] if engine.kind == "local" else "workers"
            has = f"the process of a trial needs {amount:g} {name} of this node, which has {here.get(name, 0):g}"
            return f"engine.{field}: got {getattr(engine, field)}, but {has}"
    left = {name: amount - process.get(name, 0) for name, amount in here.items()}
    beside = "" if engine.kind == "local" else ", beside 1 CPU for the process of the trial"
    mistake = _mistake(engine, [left] * workers_here + list(others)) if workers else None
    return f"{mistake}{beside}" if mistake else None


def _nodes(engine: Engine) -> list[dict[str, Any]]:
    """The living nodes on which workers may run."""
    return [node for node in ray.nodes() if node["Alive"] and satisfies(node["Labels"], engine.labels or {})]


def _label_mistake(engine: Engine) -> str | None:
    """Why no living node has the labels; None where one does."""
    return mistake_in_labels(engine.labels or {}, [node["Labels"] for node in ray.nodes() if node["Alive"]])


def _mistake(engine: Engine, nodes: Sequence[Bundle]) -> str | None:
    """Why the nodes, empty as they may be, cannot hold the workers; None where they can."""
    bundle, workers = bundle_of(engine), engine.workers
    who, has = ("Ray's nodes with engine.labels", "have") if engine.labels else ("Ray", "has")
    for name, each in bundle.items():
        have = sum(node.get(name, 0) for node in nodes)
        if each * workers > have + 1e-9:
            field, unit, noun = _SHOWN[name]
            hint = "; 0 reserves none" if name == "memory" else ""
            lacks = f"but {who} {has} {have / unit:g} {noun}{hint}"
            return f"engine.{field}: got {each / unit:g} for each of {workers} workers, {lacks}"
    places = sum(count_bundles(node, bundle) for node in nodes) if bundle else workers
    if places < workers:
        shown = [(amount / _SHOWN[name][1], _SHOWN[name][2].removesuffix("s")) for name, amount in bundle.items()]
        asked = " and ".join(f"{amount:g} {noun}" for amount, noun in shown)
        whose = who if engine.labels else "Ray's nodes"
        return f"engine.workers: got {workers} with {asked} each, but {whose} have room for {places} of them"
    return None


def count_bundles(node: Bundle, bundle: Bundle) -> int:
    """The number of bundles for which the node has resources. A bundle asks for at least one resource."""
    return min(math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in bundle.items())
