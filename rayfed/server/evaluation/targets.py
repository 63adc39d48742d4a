"""What is asked about the global model after a round: of which models, and what is known without asking a crew."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rayfed.config import Experiment
from rayfed.lora.adapter import LowRank, flatten_changes
from rayfed.methods import Method
from rayfed.server.downlink import Downlink
from rayfed.server.evaluation.evaluate import Evaluation
from rayfed.server.evaluation.per_client import client_metrics
from rayfed.server.evaluation.tiers import tier_models
from rayfed.server.executor import Crew
from rayfed.tasks.federation import Federation
from rayfed.tasks.known_answer.problem import Problem, loss, share


def questions(
    method: Method, state: Any, experiment: Experiment, federation: Federation, t: int, downlink: Downlink, crew: Crew
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
    if settings.masked and sent and sent.has is not None and sent.start.layout == layout and sent.start.held is None:
        models["_masked"] = vector * sent.has, layout
    if settings.tiers:
        models |= tier_models(method, state, experiment, federation.sizes, t, crew)
    if settings.clients:
        known |= client_metrics(method, state, experiment, federation, t, crew)
    return known, Evaluation.of(crew, federation, models, ("validation", "test"), settings.batch_size)


def changes(method: Method, state: Any) -> dict[str, LowRank | Tensor]:
    """The global model: every layer's change."""
    return {name: method.delta(state, name) for name in method.layers(state)}


def _answer(problem: Problem, changes: dict[str, LowRank | Tensor]) -> dict[str, float | None]:
    """Where the answer is known: F(W) and the share of the initial gap F(0) - F(W*) that is left."""
    (change,) = changes.values()
    W = (change.dense() if isinstance(change, LowRank) else change).double().numpy()
    return {"eval/loss": loss(problem, W), "eval/gap": share(problem, W)}
