"""Evaluation targets: which models are evaluated after a round.

The targets are the dense global model; the sparse model that the round's clients received (`eval.masked`); and, with
`eval.tiers`, what each tier of clients would receive: its start adapter as it would decode it, over its base.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from rayfed.config import Experiment
from rayfed.lora.adapter import Layout, LowRank, flatten_changes
from rayfed.methods import Method, Profile
from rayfed.profiles.client_profiles import Tier, client_scale, tier_mix
from rayfed.server.downlink import Downlink, received_model
from rayfed.server.evaluation.evaluate import Evaluation
from rayfed.server.evaluation.per_client import client_metrics
from rayfed.server.executor import Executor
from rayfed.tasks.federation import Federation
from rayfed.tasks.known_answer.problem import Problem, loss, share


def evaluation_targets(
    method: Method,
    state: Any,
    experiment: Experiment,
    federation: Federation,
    t: int,
    downlink: Downlink,
    executor: Executor,
) -> tuple[dict[str, float | None], Evaluation]:
    """After round ``t`` (from 0): the figures, None where they are not known yet, and the evaluation that finds them.

    That is of the dense global model, and of the sparse one under the mask its clients were sent at the round's start
    (``downlink``). A round that is not evaluated asks nothing.
    """
    settings = experiment.eval
    if federation.problem is not None:
        return _answer(federation.problem, changes(method, state)), Evaluation()
    names = [f"{s}/{m}{x}" for s in ("eval", "test") for m in ("loss", "accuracy") for x in ("", "_masked")]
    known: dict[str, float | None] = dict.fromkeys(names)
    if (t + 1) % settings.every and t + 1 < experiment.server.rounds:
        return known, Evaluation()
    vector, layout = flatten_changes(changes(method, state), method.head(state))
    models = {"": (vector, layout)}
    sent = downlink.first
    # Where clients of a round receive different adapters, none of them is "the sparse model".
    if settings.masked and sent and sent.has is not None and sent.start.layout == layout and sent.start.known is None:
        models["_masked"] = vector * sent.has, layout
    if settings.tiers:
        models |= tier_models(method, state, experiment, federation.sizes, t, executor)
    if settings.clients:
        known |= client_metrics(method, state, experiment, federation, t, executor)
    return known, Evaluation.of(executor, federation, models, ("validation", "test"), settings.batch_size)


def changes(method: Method, state: Any) -> dict[str, LowRank | Tensor]:
    """The global model: every layer's change."""
    return {name: method.delta(state, name) for name in method.layers(state)}


def _answer(problem: Problem, changes: dict[str, LowRank | Tensor]) -> dict[str, float | None]:
    """Where the answer is known: F(W) and the share of the initial gap F(0) - F(W*) that is left."""
    (change,) = changes.values()
    W = (change.dense() if isinstance(change, LowRank) else change).double().numpy()
    return {"eval/loss": loss(problem, W), "eval/gap": share(problem, W)}


def tier_models(
    method: Method, state: Any, experiment: Experiment, sizes: np.ndarray, t: int, executor: Executor
) -> dict[str, tuple[Tensor, Layout]]:
    """Each tier's model, by a suffix for its metrics: `_rank_4`, with `_density_0.25` where downloads are sparse.

    Nothing for methods whose clients all have models of their own. At most one model a tier is in memory beside the
    state; ``sizes`` (clients,) are the training rows per client.
    """
    if method.personal:
        return {}
    downlink = Downlink(method, state, experiment.wire.down.values, executor)
    models = {}
    for tier in tier_mix(experiment, sizes):
        density = experiment.wire.down.density_at(t, tier.density_down)
        scale = client_scale(tier.rank, experiment)
        received = downlink.of(Profile(client=-1, rank=tier.rank, scale=scale, density_down=density))
        models[suffix(tier, density)] = received_model(received)
    return models


def suffix(tier: Tier, density: float) -> str:
    """How a tier is named in the metrics."""
    return f"_rank_{tier.rank}" + (f"_density_{density:g}" if density < 1 else "")
