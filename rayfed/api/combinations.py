"""Refusals of choices on two axes that do not go together, from the settings alone."""

from __future__ import annotations

from rayfed.config import Experiment
from rayfed.config.training import Server
from rayfed.errors import UserError, allowed
from rayfed.methods import METHODS, Method, method_class
from rayfed.objectives import Objective, RunFacts, Stateful
from rayfed.profiles.client_profiles import ClientProfiles
from rayfed.tasks.models.spec import ModelSpec
from rayfed.weighting import Weighting


def check_objective(experiment: Experiment, objective: Stateful, method: Method, profiles: ClientProfiles) -> None:
    """UserError where a stateful objective does not go with the method or with another setting."""
    rounds = experiment.server.rounds
    facts = RunFacts(
        method=experiment.method.name,
        fixed_gauge=method.fixed_gauge,
        averages=method.averages,
        ignores_weights=method.ignores_weights,
        mixed_ranks=profiles.mixed_ranks,
        private=experiment.privacy.kind != "none",
        sparse_down=profiles.may_be_sparse("down", rounds),
        sparse_up=profiles.may_be_sparse("up", rounds),
        client=experiment.client,
        server=experiment.server,
    )
    objective.check_run(experiment.objective.name, facts)


def check_head(experiment: Experiment, objective: Objective, model: ModelSpec) -> None:
    """UserError where a stateful objective needs the inputs of a head of one linear layer, and the model's has more."""
    if not isinstance(objective, Stateful) or not (objective.measures == "features" or objective.draws_samples):
        return
    if (layers := sum(name.endswith(".weight") for name in model.head)) != 1:
        what = (
            f"it needs a head of one linear layer, and that of model.name={experiment.model.name!r} has {layers}; "
            "allowed with model.pooling=mean"
        )
        raise allowed("objective.name", experiment.objective.name, what)


def check_weighting(server: Server, weights: str, weighting: Weighting, name: str, method: Method) -> None:
    """UserError where the weighting named ``weights`` does not go with the method of that name, or the server."""
    if server.empty_clients and weights != "uniform":
        raise UserError(
            f"server.empty_clients: got true, but the weights are {weights!r}, in which clients without training rows "
            "do not count; allowed with server.weights=uniform"
        )
    if weighting.needs is not None and method.ignores_weights:
        what = f"method.name={name} does not use these weights: {method.ignores_weights}"
        raise allowed("server.weights", weights, what)


def check_channel(
    experiment: Experiment, weights: str, weighting: Weighting, method: Method, objective: Objective, optimizer: str,
    profiles: ClientProfiles,
) -> None:  # fmt: skip
    """UserError where the channel does not go with the other parts: over the air all uploads become one noisy sum."""
    if experiment.channel.kind == "lossless":
        return
    name, up = experiment.method.name, experiment.wire.up
    if not _one_sum(method):
        what = "it averages products" if method.averages == "products" else method.refuses_privacy
        able = ", ".join(name for name in METHODS if _one_sum(method_class(name)))
        raise allowed("channel.kind", "over_the_air", f"{name} cannot use one sum of changes: {what}; taken by {able}")
    if experiment.privacy.kind != "none":
        raise allowed("privacy.kind", experiment.privacy.kind, "over the air nothing is clipped by the server; none is")
    if profiles.may_be_sparse("up", experiment.server.rounds):
        raise allowed("wire.up.density", up.density, "over the air all clients send the same entries: density 1")
    if up.values != "fp32":
        raise allowed("wire.up.values", up.values, "over the air the values are analog; fp32 is allowed")
    if experiment.profiles.kind != "same":
        what = "over the air all clients send the same entries: same is allowed"
        raise allowed("profiles.kind", experiment.profiles.kind, what)
    if optimizer not in ("fedavg", "sgd"):
        what = "over the air the channel's noise would add up in its moments; fedavg and sgd are allowed"
        raise allowed("server.optimizer", optimizer, what)
    if isinstance(objective, Stateful):
        what = "its clients send more than their change, and one sum arrives; plain and fedprox are allowed"
        raise allowed("objective.name", experiment.objective.name, what)
    if experiment.eval.diagnostics:
        raise allowed("eval.diagnostics", True, "over the air the server sees no client's model; false is allowed")
    if weighting.needs == "change_norms":
        raise allowed("server.weights", weights, "over the air the server sees no client's change")


def _one_sum(method: Method | type[Method]) -> bool:
    """Whether the method needs one sum of changes alone, of the same entries of all clients."""
    return method.summed == "changes" and method.personal is False
