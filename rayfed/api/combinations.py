"""Refusals of choices on two axes that do not go together."""

from __future__ import annotations

from rayfed.config import Experiment
from rayfed.methods import Method
from rayfed.objectives import RunFacts, Stateful
from rayfed.profiles.client_profiles import ClientProfiles


def check_objective(experiment: Experiment, objective: Stateful, method: Method, profiles: ClientProfiles) -> None:
    """UserError where a stateful objective does not go with the method or with another setting."""
    rounds = experiment.server.rounds
    facts = RunFacts(
        method=experiment.method.name,
        fixed_gauge=method.fixed_gauge,
        mixed_ranks=profiles.mixed_ranks,
        private=experiment.privacy.kind != "none",
        sparse_down=profiles.may_be_sparse("down", rounds),
        sparse_up=profiles.may_be_sparse("up", rounds),
        client=experiment.client,
        server=experiment.server,
    )
    objective.check_run(experiment.objective.name, facts)
