"""What Ray Tune gets from the section `sweep`: its trials as a search algorithm, its spaces, its scheduler."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.search import Searcher

from rayfed import seeding
from rayfed.config.search import AshaSettings, PbtSettings
from rayfed.config.sweep import Sweep
from rayfed.sweeps.plan import Trial
from rayfed.sweeps.space import draw, rounded


class ListedTrials(Searcher):
    """Suggests the trials in their order.

    The list is made before Ray starts, because every trial is checked first. Random draws in it are keyed by setting
    and number, so that a sweep may grow without new draws for the trials that it has. (Tune's own generator draws one
    sequence of numbers for all settings.)
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        super().__init__()
        self.waiting = list(trials)

    def suggest(self, trial_id: str) -> Any:
        return named(self.waiting.pop(0)) if self.waiting else self.FINISHED

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Does nothing: the list does not depend on results."""

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: a sweep is resumed from its trials' directories."""

    restore = save


def named(trial: Trial) -> dict[str, Any]:
    """The config of the trial in Tune: its settings and its name."""
    return {"name": trial.name, **trial.overrides}


def domain(space: Mapping[str, Any]) -> Any:
    """The space of Tune for a `choice`, `uniform` or `loguniform`."""
    ((kind, values),) = space.items()
    return tune.choice(values) if kind == "choice" else getattr(tune, kind)(*values)


def asha(stop: AshaSettings, sweep: Sweep, rounds: int) -> ASHAScheduler:
    """Asynchronous successive halving (Li et al., arXiv 1810.05934), for trials of at most so many rounds.

    Tune compares trials in the order of arrival, so which trials are stopped may depend on timing (not with
    `sweep.concurrency: 1`). The results of a trial never do.
    """
    return ASHAScheduler(
        time_attr="round",
        metric=sweep.metric,
        mode=sweep.mode,
        max_t=rounds,
        grace_period=stop.grace,
        reduction_factor=stop.factor,
        brackets=stop.brackets,
        stop_last_trials=False,
    )


class Generations(PopulationBasedTraining):
    """Population Based Training in generations, for runs of so many ``rounds``; see `rayfed.sweeps.pbt`.

    ``done``: the rounds of the generations that all members have behind them, on a resume. Random choices are keyed by
    (``seed``, round, member): equal metrics give equal decisions.
    """

    def __init__(self, search: PbtSettings, sweep: Sweep, rounds: int, seed: int, done: int = 0) -> None:
        spaces = sweep.parameters
        super().__init__(
            time_attr="round",
            metric=sweep.metric,
            mode=sweep.mode,
            perturbation_interval=search.rounds,
            hyperparam_mutations={
                key: space.get("choice") or partial(_drawn, space, key) for key, space in spaces.items()
            },
            quantile_fraction=search.quantile,
            resample_probability=search.resample,
            perturbation_factors=search.factors,
            custom_explore_fn=partial(_within, spaces),
            log_config=False,
            synch=True,
        )
        self.rounds, self.seed, self.done = rounds, seed, done
        self._next_perturbation_sync = done + search.rounds

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        self._trial_state[trial].last_perturbation_time = self.done

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if self._metric not in result or result["round"] >= self.rounds:
            return str(self.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def _checkpoint_or_exploit(self, trial: Any, *rest: Any) -> None:
        state = random.getstate()
        random.seed(seeding.derive_seed(self.seed, "sweep.pbt", int(self._next_perturbation_sync), str(trial)))
        try:
            super()._checkpoint_or_exploit(trial, *rest)
        finally:
            random.setstate(state)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Where all others wait for this one, which has failed, begins the next generation without it."""
        end, state = self._next_perturbation_sync, cast(Any, self._trial_state)
        state[trial].last_score, state[trial].last_train_time = None, end
        others = [other for other in tune_controller.get_live_trials() if other is not trial]
        if others and all(state[other].last_train_time >= end for other in others):
            super().on_trial_result(tune_controller, others[0], state[others[0]].last_result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.on_trial_complete(tune_controller, trial, {})


def _drawn(space: Mapping[str, Any], key: str) -> Any:
    return draw(space, key, random.getrandbits(60), 0)


def _within(spaces: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The changed config, with readable numbers within their ranges."""
    for key, space in spaces.items():
        if "choice" not in space:
            low, high = (rounded(limit) for limit in next(iter(space.values())))
            config[key] = min(max(rounded(config[key]), low), high)
    return config
