"""What Ray Tune gets from the section `sweep`: its trials as a search algorithm, its spaces, its scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from rayfed.config.search import AshaSettings
from rayfed.config.sweep import Sweep
from rayfed.sweeps.plan import Trial


class ListedTrials(Searcher):
    """Suggests the trials in their order.

    The list is made before Ray starts, because every trial is checked first. Random draws in it are keyed by setting and
    number, so that a sweep may grow without new draws for the trials that it has. (Tune's own generator draws one
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
