"""Evaluation targets: which models are evaluated after a round, and the metrics they get.

The targets are the global model; the sparse model that clients receive (`eval.masked`, suffix `_masked`); and what each
tier of clients receives (`eval.tiers`, suffix `_rank_4` and such): its start adapter as it decodes it, over its base.
FLASC evaluates under every tier's mask; with mixed ranks, the truncation counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from rayfed.clients.messages import SplitName
from rayfed.clients.plan import RunPlan
from rayfed.lora.adapter import Adapter, LowRank, flatten_changes
from rayfed.methods import Method
from rayfed.seeding import numpy_rng
from rayfed.server.downlink import Downlink
from rayfed.server.evaluation.evaluate import Model, evaluate, metrics
from rayfed.server.evaluation.experiences import experience_metrics
from rayfed.server.evaluation.own_models import own_metrics
from rayfed.server.evaluation.per_client import client_metrics, unseen_metrics
from rayfed.server.evaluation.responses import response_metrics
from rayfed.server.executor import Executor
from rayfed.tasks.base import Metric


def round_metrics(
    plan: RunPlan, state: Any, t: int, downlink: Downlink, executor: Executor, sent: int
) -> dict[str, Metric]:
    """The metrics of the state after round ``t`` (from 0): None where the round is not evaluated, see `eval.subset`.

    ``sent``: the bytes of all messages so far. The last round of a run is evaluated.

    ``downlink`` has the downloads of the round: the masked model is the new state under the mask that its clients got.
    """
    experience = plan.experience(t)
    where: dict[str, Metric] = {} if experience is None else {"sequence/experience": experience + 1}
    return where | _measured(plan, state, t, downlink, executor, sent)


def _measured(
    plan: RunPlan, state: Any, t: int, downlink: Downlink, executor: Executor, sent: int
) -> dict[str, Metric]:
    changes = global_changes(plan.method, state)
    exact = plan.task.exact_metrics(plan.federation, changes)
    if exact is not None:
        return {**exact}
    splits: tuple[SplitName, ...] = ("validation", "test")
    one_mask = plan.eval.masked and plan.one_mask
    suffixes = ("", "_masked") if one_mask else ("",)
    full, seen = plan.fully_evaluated(t) or plan.server.spent(sent), plan.seen_classes(t)
    if not full and not plan.eval.subset:
        return metrics(plan.task, plan.federation, {}, suffixes, splits)
    vector, layout = flatten_changes(changes, plan.method.head(state))
    models: dict[str, Model] = {"": (vector, layout)}
    if not full:
        nothing = metrics(plan.task, plan.federation, {}, suffixes, splits)
        return nothing | subset_metrics(plan, models, t, executor)
    first = downlink.first
    if one_mask and first and first.has is not None and first.start.layout == layout and first.start.known is None:
        models["_masked"] = vector * first.has, layout
    if plan.eval.tiers:
        models |= tier_models(plan, state, t, downlink, executor)
    outputs = evaluate(executor, plan.federation, models, splits, plan.eval.batch_size, None, plan.seen_rows(t), seen)
    found = metrics(plan.task, plan.federation, outputs, [*dict.fromkeys((*suffixes, *models))], splits)
    found |= experience_metrics(plan, t, outputs.get(("", "test")))
    if plan.eval.clients:
        found |= client_metrics(plan, state, t, executor)
    if plan.eval.own_models:
        found |= own_metrics(plan, state, t, executor)
    if plan.eval.unseen:
        found |= unseen_metrics(plan, models[""], t, executor)
    if plan.eval.generate_rows:
        found |= response_metrics(plan, models[""], executor)
    return found


def subset_metrics(plan: RunPlan, models: Mapping[str, Model], t: int, executor: Executor) -> dict[str, Metric]:
    """`eval_subset/loss` and `eval_subset/accuracy` (or the task's metric) on `eval.subset` validation rows.

    Of these the rows of classes and domains that are seen after round ``t`` (from 0).

    The rows are the same in every round, and the server chooses nothing by them. None without validation rows.
    """
    order = numpy_rng(plan.seed, "eval.subset").permutation(len(plan.federation.validation))
    rows, seen = np.sort(order[: plan.eval.subset]), plan.seen_rows(t)
    chosen: dict[SplitName, np.ndarray] = {
        "validation": rows if seen is None else np.intersect1d(rows, seen["validation"])
    }
    classes, size = plan.seen_classes(t), plan.eval.batch_size
    outputs = evaluate(executor, plan.federation, models, ("validation",), size, None, chosen, classes)
    found = metrics(plan.task, plan.federation, outputs, ("",), ("validation",))
    return {f"eval_subset/{name}": found[f"eval/{name}"] for name in ("loss", plan.task.metric) if name}


def adapter_metrics(plan: RunPlan, adapter: Adapter, executor: Executor) -> dict[str, Metric]:
    """The test metrics of an adapter, with the trained head and a pair for every layer that trains."""
    exact = plan.task.exact_metrics(plan.federation, adapter.layers)
    if exact is not None:
        return {**exact}
    models = {"": (adapter.flatten(), adapter.layout)}
    outputs = evaluate(executor, plan.federation, models, ("test",), plan.eval.batch_size)
    return metrics(plan.task, plan.federation, outputs, ("",), ("test",))


def global_changes(method: Method, state: Any) -> dict[str, LowRank | Tensor]:
    """The global model: every layer's change."""
    return {name: method.delta(state, name) for name in method.layers(state)}


def tier_models(plan: RunPlan, state: Any, t: int, downlink: Downlink, executor: Executor) -> dict[str, Model]:
    """Each tier's model, by the suffix of its metric keys: `_rank_4`, with `_density_0.25` where downloads are sparse.

    ``downlink`` has the downloads of round ``t``, which led to the state: `eval.tier_masks` may ask for their masks.
    None for methods whose clients all have models of their own.
    """
    if plan.method.personal:
        return {}
    following = Downlink(plan, state, t + 1, executor)
    models = {}
    for tier in plan.profiles.tier_mix(plan.federation.sizes, plan.server.empty_clients):
        profile = plan.profiles.of_tier(tier, t)
        density = f"_density_{profile.density_down:g}" if profile.density_down < 1 else ""
        download = following.of(profile)
        if plan.eval.tier_masks == "round":
            start, before = download.start, downlink.of(profile)
            if before.start.layout == start.layout:  # else a mask of the round says nothing about the new state
                vector = start.vector if before.has is None else start.vector * before.has
                download = replace(download, vector=vector)
        models[f"_rank_{tier.rank}{density}"] = download.model()
    return models
