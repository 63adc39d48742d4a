"""Asynchronous successive halving (Li et al., arXiv 1810.05934) by Ray Tune's own scheduler, with a memory on the disk.

At the rungs, rounds grace, grace * factor, grace * factor^2, ..., a trial goes on only if its metric is among the best
1 / factor of those that came to the rung before it. Rungs are met at the first measured round at or after them; the
last round is no rung: who comes that far has finished. Tune compares in the order of arrival, so which trials are
stopped may depend on timing (not with sweep.concurrency=1); what a trial computes never does.

A stop is a fact once the trial's record says `stopped`. The scheduler that resumes a sweep is told first what the
directories tell: the figures of trials that have ended, and of the others those up to their last checkpoint (until
there they were let go on); so nothing is compared twice, and later trials meet the same rungs as they would have.
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
from rayfed.sweeps.trial import outcome, place
from rayfed.tracking import read_metrics


class Halving(ASHAScheduler):
    """Tune's scheduler, by the trials' names instead of Tune's own ids: those last for one start of a sweep only."""

    def __init__(self, rule: AshaSettings, sweep: Sweep, rounds: int) -> None:
        super().__init__(
            time_attr="round",
            metric=sweep.metric,
            mode=sweep.mode,
            max_t=rounds,
            grace_period=rule.grace,
            reduction_factor=rule.factor,
            stop_last_trials=False,
        )
        self.compared = sweep.metric

    def recall(self, name: str, rounds: Sequence[Mapping[str, Any]]) -> None:
        """Takes in what a trial has shown in an earlier start of the sweep; decides nothing."""
        trial, nobody = _named(name), cast(Any, None)  # the controller, which takes no part in this
        super().on_trial_add(nobody, trial)
        for record in rounds:
            if record.get(self.compared) is not None:
                super().on_trial_result(nobody, trial, dict(record))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _named(trial.config["trial"]))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return str(super().on_trial_result(tune_controller, _named(trial.config["trial"]), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Its figures were taken in as they came."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """As for one that completed."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """As for one that completed."""


def scheduler_of(known: Sequence[Trial], sweep: Sweep, out: Path) -> Halving | None:
    """The scheduler of a sweep with the section `stop`, told what all its ``known`` trials have shown; else None."""
    if sweep.stop is None:
        return None
    halving = Halving(sweep.stop, sweep, max(trial.experiment.server.rounds for trial in known))
    for trial in known:
        halving.recall(trial.name, shown(out, trial))
    return halving


def shown(out: Path, trial: Trial) -> list[dict[str, Any]]:
    """The rounds after which the trial was let go on or stopped, as far as the directory vouches for that."""
    folder = place(out, trial)
    if not (folder / "metrics.jsonl").is_file():
        return []
    ended = outcome(out, trial)
    if ended is None or ended.status == "failed":  # it will run again, from its checkpoint
        found = checkpoints.latest(folder / "checkpoints", trial.experiment.digest())
        last = found.round if found else 0
    else:
        last = ended.round or trial.experiment.server.rounds - 1
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["round"] <= last]


def _named(name: str) -> Any:
    return SimpleNamespace(trial_id=name)
