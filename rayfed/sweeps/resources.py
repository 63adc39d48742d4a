"""The resources that a trial asks of Ray: one bundle for its own process, and one for each of its workers.

All bundles of a trial are reserved together, so the workers of a running trial always have room.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray import tune

from rayfed.config import Experiment
from rayfed.engine.driver import start_ray
from rayfed.engine.labels import mistake_in_labels, satisfies
from rayfed.engine.placement import Bundle, bundle_of, count_bundles
from rayfed.errors import UserError
from rayfed.sweeps.plan import Trial


def bundles(experiment: Experiment) -> list[Bundle]:
    """The bundle of the trial's process, then one for each worker if the engine is Ray and workers reserve anything."""
    engine = experiment.engine
    if engine.kind == "local":
        gpus = {"GPU": engine.gpus} if engine.device == "cuda" else {}
        return [{"CPU": float(engine.threads), **gpus}]
    worker = bundle_of(engine)
    return [{"CPU": 1.0}, *(dict(worker) for _ in range(engine.workers) if worker)]


def fits(asked: Sequence[Bundle], here: Bundle, others: Sequence[Bundle], workers_here: bool = True) -> bool:
    """Whether the trial can ever run: its process on the node ``here``, where --out is, its workers there or elsewhere.

    ``workers_here``: whether the node ``here`` has `engine.labels`. ``others``: the other nodes that have.
    """
    process, *workers = asked
    if not count_bundles(here, process):
        return False
    left = {name: amount - process.get(name, 0) for name, amount in here.items()}
    nodes = (left, *others) if workers_here else others
    return not workers or sum(count_bundles(node, workers[0]) for node in nodes) >= len(workers)


def join_ray(
    trials: Sequence[Trial], environment: Mapping[str, str], event: Callable[[str], None] = lambda text: None
) -> bool:
    """Joins the trials' cluster, or starts Ray here with CPUs for any of them, unless this process uses Ray already.

    Whether Ray was started or joined now. ``environment``: variables that are set before, unless they are. ``event``
    gets a line first, since that takes seconds. UserError where the trials name several clusters, or the cluster can
    never hold one of them.
    """
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    addresses = {trial.experiment.engine.address for trial in trials}
    if len(addresses) > 1:
        raise UserError("engine.address: trials run on one cluster, but these name several")
    if ours := not ray.is_initialized():
        cpus = max(sum(bundle.get("CPU", 0) for bundle in bundles(trial.experiment)) for trial in trials)
        start_ray(addresses.pop(), cpus, any(trial.experiment.engine.dashboard for trial in trials), event)
    try:
        _check_fits(trials)
    except UserError:
        if ours:
            ray.shutdown()
        raise
    return ours


def _check_fits(trials: Sequence[Trial]) -> None:
    here, others = _nodes()
    for trial in trials:
        asked, selector = bundles(trial.experiment), trial.experiment.engine.labels or {}
        labelled = [node for node in (here, *others) if satisfies(node["Labels"], selector)]
        if not labelled and (mistake := mistake_in_labels(selector, [node["Labels"] for node in (here, *others)])):
            raise UserError(f"{mistake} (trial {trial.name})")
        elsewhere = [node["Resources"] for node in labelled if node is not here]
        if not fits(asked, here["Resources"], elsewhere, here in labelled):
            raise UserError(_refusal(trial, asked, here["Resources"], elsewhere))


def placement_group(experiment: Experiment, here: bool = False) -> tune.PlacementGroupFactory:
    """The placement group of a trial. ``here``: its process stays on this node, where the run directories are."""
    process, *workers = bundles(experiment)
    if here:
        own, others = _nodes()
        names = [name for name in own["Resources"] if name.startswith("node:") and name != "node:__internal_head__"]
        process = {**process, **(dict.fromkeys(names, 1e-3) if others else {})}
    labels = experiment.engine.labels
    selectors: dict[str, Any] = {"bundle_label_selector": [{}, *(dict(labels) for _ in workers)]} if labels else {}
    return tune.PlacementGroupFactory([process, *workers], **selectors)


def _nodes() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """This node as Ray describes it, and every other living node."""
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    here = nodes.pop(ray.get_runtime_context().get_node_id())
    return here, list(nodes.values())


def _refusal(trial: Trial, asked: Sequence[Bundle], here: Bundle, others: Sequence[Bundle]) -> str:
    engine = trial.experiment.engine
    field, value = ("threads", engine.threads) if engine.kind == "local" else ("workers", engine.workers)
    have = {name: sum(node.get(name, 0) for node in (here, *others)) for name in ("CPU", "GPU")}
    return (
        f"engine.{field}: got {value}, so that a trial needs {_format(asked)}, which can never fit: Ray has "
        f"{_format([have])}, {_format([here])} of it on this node, where the trial's process runs (trial {trial.name})"
    )


def _format(amounts: Sequence[Mapping[str, float]]) -> str:
    """`1 CPU + 2 x (0.5 GPU)`."""
    counts = Counter(
        " and ".join(f"{bundle[name]:g} {name}" for name in ("CPU", "GPU") if bundle.get(name)) or "nothing"
        for bundle in amounts
    )
    return " + ".join(text if count == 1 else f"{count} x ({text})" for text, count in counts.items())
