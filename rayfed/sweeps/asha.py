"""Asynchronous successive halving (Li et al., arXiv 1810.05934): Ray Tune's scheduler, made resumable.

At the rungs, rounds grace, grace * factor, grace * factor^2, ..., a trial continues only if its metric is among the
best 1 / factor of the trials that reached the rung before. A rung is reached at the first measured round at or after
it. The last round is no rung: a trial that comes so far has finished. Tune compares trials in the order of arrival, so
which trials are stopped may depend on timing (not with sweep.concurrency=1). The results of a trial never do.

A trial stays stopped once its recorded outcome says `stopped`. When a sweep is resumed, the scheduler first gets the
metrics of all earlier trials from their directories: of ended trials all, of others those up to the last checkpoint (up
to there they were allowed to continue). So no result is compared twice, and later trials meet the same rungs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from ray.tune.schedulers import ASHAScheduler

from rayfed.config.search import AshaSettings
from rayfed.config.sweep import Sweep
from rayfed.server import checkpoint as checkpoints
from rayfed.sweeps.plan import Trial
from rayfed.sweeps.trial import read_outcome, trial_folder
from rayfed.tracking import read_metrics


class ResumableASHA(ASHAScheduler):
    """Tune's scheduler. It knows trials by their names, because Tune's own ids change when a sweep is resumed."""

    def __init__(self, rule: AshaSettings, sweep: Sweep, rounds: int) -> None:
        super().__init__(
            time_attr="round", metric=sweep.metric, mode=sweep.mode, max_t=rounds, grace_period=rule.grace,
            reduction_factor=rule.factor, stop_last_trials=False,
        )  # fmt: skip
        self.key = sweep.metric

    def replay(self, name: str, rounds: Sequence[Mapping[str, Any]]) -> None:
        """Adds the results of a trial from earlier starts of the sweep. Decides nothing."""
        trial, no_controller = _by_name(name), cast(Any, None)
        super().on_trial_add(no_controller, trial)
        for record in rounds:
            if record.get(self.key) is not None:
                super().on_trial_result(no_controller, trial, dict(record))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _by_name(trial.config["trial"]))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return str(super().on_trial_result(tune_controller, _by_name(trial.config["trial"]), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Does nothing: the scheduler has all results already."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Does nothing, as `on_trial_complete`."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Does nothing, as `on_trial_complete`."""


def build_scheduler(trials: Sequence[Trial], sweep: Sweep, out: Path) -> ResumableASHA | None:
    """The scheduler of a sweep with the section `stop`, with all earlier results of its ``trials``; else None."""
    if sweep.stop is None:
        return None
    scheduler = ResumableASHA(sweep.stop, sweep, max(trial.experiment.server.rounds for trial in trials))
    for trial in trials:
        scheduler.replay(trial.name, compared_rounds(out, trial))
    return scheduler


def compared_rounds(out: Path, trial: Trial) -> list[dict[str, Any]]:
    """The trial's records of the rounds about which a scheduler has decided, as far as its directory proves it."""
    folder = trial_folder(out, trial)
    if not (folder / "metrics.jsonl").is_file():
        return []
    outcome = read_outcome(out, trial)
    if outcome is None or outcome.status == "failed":  # it will run again, from its checkpoint
        whole = checkpoints.manifests(folder / "checkpoints")
        last = whole[0].round if whole else 0
    else:
        last = outcome.round or trial.experiment.server.rounds - 1
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["round"] <= last]


def _by_name(name: str) -> Any:
    return SimpleNamespace(trial_id=name)
