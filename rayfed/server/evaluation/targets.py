"""Evaluation targets: which models are evaluated after a round, and the metrics they get.

The targets are the global model; the sparse model that clients receive (`eval.masked`, suffix `_masked`); and what each
tier of clients receives (`eval.tiers`, suffix `_rank_4` and such): its start adapter as it decodes it, over its base.
FLASC evaluates under every tier's mask; with mixed ranks, the truncation counts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rayfed.clients.messages import SplitName
from rayfed.clients.plan import RunPlan
from rayfed.lora.adapter import LowRank, flatten_changes
from rayfed.methods import Method
from rayfed.server.downlink import Downlink
from rayfed.server.evaluation.evaluate import Model, evaluate, metrics
from rayfed.server.evaluation.per_client import client_metrics, unseen_metrics
from rayfed.server.executor import Executor
from rayfed.tasks.base import Metric


def round_metrics(plan: RunPlan, state: Any, t: int, downlink: Downlink, executor: Executor) -> dict[str, Metric]:
    """The metrics of the state after round ``t`` (from 0): None where the round is not evaluated.

    ``downlink`` has the downloads of the round: the masked model is the new state under the mask that its clients got.
    """
    changes = global_changes(plan.method, state)
    exact = plan.task.exact_metrics(plan.federation, changes)
    if exact is not None:
        return {**exact}
    splits: tuple[SplitName, ...] = ("validation", "test")
    one_mask = plan.eval.masked and plan.one_mask
    suffixes = ("", "_masked") if one_mask else ("",)
    if (t + 1) % plan.eval.every and t + 1 < plan.server.rounds:
        return metrics(plan.task, plan.federation, {}, suffixes, splits)
    vector, layout = flatten_changes(changes, plan.method.head(state))
    models: dict[str, Model] = {"": (vector, layout)}
    first = downlink.first
    if one_mask and first and first.has is not None and first.start.layout == layout and first.start.known is None:
        models["_masked"] = vector * first.has, layout
    if plan.eval.tiers:
        models |= tier_models(plan, state, t, executor)
    outputs = evaluate(executor, plan.federation, models, splits, plan.eval.batch_size)
    found = metrics(plan.task, plan.federation, outputs, [*dict.fromkeys((*suffixes, *models))], splits)
    if plan.eval.clients:
        found |= client_metrics(plan, state, t, executor)
    if plan.eval.unseen:
        found |= unseen_metrics(plan, models[""], t, executor)
    return found


def global_changes(method: Method, state: Any) -> dict[str, LowRank | Tensor]:
    """The global model: every layer's change."""
    return {name: method.delta(state, name) for name in method.layers(state)}


def tier_models(plan: RunPlan, state: Any, t: int, executor: Executor) -> dict[str, Model]:
    """Each tier's model, by the suffix of its metric keys: `_rank_4`, with `_density_0.25` where downloads are sparse.

    None for methods whose clients all have models of their own.
    """
    if plan.method.personal:
        return {}
    downlink = Downlink(plan.method, state, plan.wire.down.values, plan.channel, executor)
    models = {}
    for tier in plan.profiles.tier_mix(plan.federation.sizes):
        profile = plan.profiles.of_tier(tier, t)
        density = f"_density_{profile.density_down:g}" if profile.density_down < 1 else ""
        models[f"_rank_{tier.rank}{density}"] = downlink.of(profile).model()
    return models
