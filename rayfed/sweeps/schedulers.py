"""What Ray Tune gets from the section `sweep`: its trials as a search algorithm, and ASHA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from rayfed.config.search import AshaSettings
from rayfed.config.sweep import Sweep
from rayfed.sweeps.trainable import NAME, Config
from rayfed.sweeps.trial import Trial


class ListedTrials(Searcher):
    """Suggests the trials in their order. The list is made before Ray starts, because every trial is checked first."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        super().__init__()
        self.waiting = list(trials)

    def suggest(self, trial_id: str) -> Any:
        return config_of(self.waiting.pop(0)) if self.waiting else self.FINISHED

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Does nothing: the list does not depend on results."""

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: a sweep is resumed from its trials' directories."""

    restore = save


def config_of(trial: Trial) -> Config:
    """The config of the trial in Tune: its settings and its name."""
    return {NAME: trial.name, **trial.overrides}


def asha(stop: AshaSettings, sweep: Sweep, rounds: int) -> ASHAScheduler:
    """Asynchronous successive halving (Li et al., arXiv 1810.05934), for trials of at most so many rounds.

    Tune compares trials in the order of arrival, so which trials are stopped may depend on timing (not with
    `sweep.concurrency: 1`). The results of a trial never do.
    """
    return ASHAScheduler(
        "round", sweep.metric, sweep.mode, rounds, stop.grace, stop.factor, stop.brackets, stop_last_trials=False
    )
