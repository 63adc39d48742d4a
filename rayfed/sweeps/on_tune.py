"""Runs the trials of a sweep on Ray Tune: one process a trial, as many at a time as fit.

Tune places the trials, reuses processes for further trials (each process imports torch once, and loads the base model
and the data again only if they change), and restarts a trial whose process died; the trial then continues from its
checkpoint. What Tune itself stores is removed at the end: a sweep is resumed from its trials' directories. For Tune, a
failed trial has ended like any other; the recorded outcome says why.

Ray's W&B integration is not used: `WandbLoggerCallback` sees only what is reported to Tune, and starts the W&B run of a
restored trial with ``resume=False``. Each trial has its own W&B sink, as every run, and continues its W&B run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune

from rayfed.files import remove_path
from rayfed.sweeps.plan import make_trials, trial_experiment
from rayfed.sweeps.resources import join_ray, placement_group
from rayfed.sweeps.search import Search
from rayfed.sweeps.space import Point
from rayfed.sweeps.trainable import NAME, RUN_DIR, START_FROM, Config, load_federation, report, run_trial, runs_of
from rayfed.sweeps.trial import Status, Trial, read_outcome, record_outcome, trial_folder
from rayfed.sweeps.tune import ENVIRONMENT as OF_TRIALS

ENVIRONMENT = OF_TRIALS | {  # Tune reads these variables when the sweep starts
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # one line says that a process died
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # each run writes its own metrics
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command, as it ends any other command
    "RAY_AIR_NEW_OUTPUT": "0",
}
STORAGE = "tune"  # the folder of Tune in the sweep's directory


def run_on_tune(search: Search) -> None:
    """Starts Ray (or joins it) and runs the missing trials of the search.

    UserError where the cluster can never hold one of the trials. If Ray was started here, it is shut down in the end.
    """
    new = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    ours = join_ray([trial.experiment for trial in search.checked], ENVIRONMENT, search.progress.note)
    try:
        search.forget_failures()
        data = {key: ray.put(federation) for key, federation in search.federations.items()}
        config = {"num_samples": -1, "max_concurrent_trials": search.sweep.concurrency} | search.tuner()
        remove_path(search.out / STORAGE)
        tune.Tuner(
            _trainable(search, data),
            param_space=config.pop("param_space", {}),
            tune_config=tune.TuneConfig(
                reuse_actors=True, trial_name_creator=_name, trial_dirname_creator=_name, **config
            ),
            run_config=tune.RunConfig(
                name=STORAGE,
                storage_path=str(search.out),
                verbose=0,
                failure_config=tune.FailureConfig(max(trial.experiment.engine.retries for trial in search.checked)),
                callbacks=[_Watch(search)],
            ),
        ).fit()
    finally:
        remove_path(search.out / STORAGE)
        for name in new:  # later experiments of this process are not the sweep's
            os.environ.pop(name, None)
        if ours:
            ray.shutdown()


def _name(trial: Any) -> str:
    return str(trial.config[NAME])


def _trainable(search: Search, data: Mapping[str, ray.ObjectRef]) -> Callable[[Config], None]:
    settings, out, pauses = search.settings, search.out, search.pauses

    def train(config: Config) -> None:
        for name, own in runs_of(tune.get_context().get_trial_name(), config).items():
            (trial,) = make_trials(settings, [Point(own, own)], [name])
            tell = partial(report, folder=trial_folder(out, trial), take_checkpoints=pauses)
            federation, start = load_federation(trial.experiment, data), config.get(START_FROM)
            run_trial(trial, out, federation, tune.get_checkpoint(), start, tell)

    def resources(config: Config) -> tune.PlacementGroupFactory:
        own = next(iter(runs_of("", config).values()))
        return placement_group(trial_experiment(settings, own, "", "trial").engine, here=True)

    train.__name__ = "trial"
    return tune.with_resources(train, resources)


class _Watch(tune.Callback):
    """Shows what happens. Records the outcome of stopped trials and of those whose process died."""

    def __init__(self, search: Search) -> None:
        self.search = search

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.search.progress.show(self.search.ended, len(self.search.rows))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        for own in self._runs(trial):
            self.search.progress.start(own)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self.search.progress.round(Path(result[RUN_DIR]).name, result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.search.progress.note(f"{trial}: its process died; it continues in a new one")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # Without an outcome, the scheduler has stopped it; its process waits in `tune.report`.
        self._ended(trial, "stopped", round=trial.last_result.get("round"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial, "failed", error="its process died, and did so again at every new start (engine.retries)")

    def _runs(self, trial: Any) -> list[Trial]:
        return [self.search.trial(name, own) for name, own in runs_of(str(trial), trial.config).items()]

    def _ended(self, trial: Any, status: Status, **known: Any) -> None:
        for own in self._runs(trial):
            if read_outcome(self.search.out, own) is None:
                record_outcome(self.search.out, own, status, **known)
            self.search.trial_ended(own)
