"""Runs trials on Ray Tune: one process a trial, as many at a time as fit.

Tune places the trials, reuses processes for further trials (each process imports torch once, and loads the base model
again only if it changes), and restarts a trial whose process died; the trial then continues from its own checkpoint.

Tune's restore is not used: a sweep is resumed from the trials' directories (see `rayfed.sweeps.trial`). For Tune, a
failed trial has ended like any other; the recorded outcome says why. The outcome of a trial that `sweep.stop` ends is
recorded here.

Ray's W&B integration is not used either: `WandbLoggerCallback` sees only what is reported to Tune, and starts the W&B
run of a restored trial with ``resume=False``. Each trial has its own W&B sink, as every run, and continues its W&B run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune

from rayfed.config.sweep import Sweep
from rayfed.engine.driver import start_ray
from rayfed.errors import UserError
from rayfed.sweeps.asha import build_scheduler
from rayfed.sweeps.log import SweepLog
from rayfed.sweeps.plan import Trial
from rayfed.sweeps.resources import bundles, placement_groups
from rayfed.sweeps.trial import read_outcome, record_outcome, run_trial
from rayfed.tasks.data.federation import Federation
from rayfed.tracking import Record, Sink

ENVIRONMENT = {  # Tune reads these variables when the sweep starts
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in the settings start from the same folder as in `rayfed run`
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # one line says that a process died
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # each run writes its own metrics
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command, as it ends any other command
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # some rounds do not measure the metric of `stop`
}


def run_on_tune(
    trials: Sequence[Trial], sweep: Sweep, out: Path, federations: Mapping[str, Federation], log: SweepLog
) -> None:
    """Starts Ray (or joins it) and runs the trials; ``log`` hears of each that has ended.

    UserError where the cluster can never hold one of the trials. If Ray was started here, it is shut down in the end.
    """
    with on_ray(trials):
        groups = placement_groups(trials)
        by_name = {trial.name: trial for trial in trials}
        data = {key: ray.put(federations[key]) for key in {trial.data for trial in trials}}
        reporting = sweep.stop is not None  # else nothing needs the metrics of a running trial
        trainable = tune.with_parameters(_train, trials=by_name, data=data, out=out, reporting=reporting)
        tune.Tuner(
            tune.with_resources(trainable, lambda config: groups[config["trial"]]),
            param_space={"trial": tune.grid_search(list(by_name))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=sweep.concurrency,
                scheduler=build_scheduler(list(log.trials.values()), sweep, out),
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.config["trial"],
                trial_dirname_creator=lambda trial: trial.config["trial"],
            ),
            run_config=tune.RunConfig(
                name=time.strftime("%Y%m%d-%H%M%S"),
                storage_path=str(out / "tune"),
                verbose=0,
                failure_config=tune.FailureConfig(max(trial.experiment.engine.retries for trial in trials)),
                callbacks=[_Outcomes(by_name, out, log)],
            ),
        ).fit()


@contextmanager
def on_ray(trials: Sequence[Trial]) -> Iterator[None]:
    """Ray runs within the context. If Ray is started here, it has CPUs for any of the trials, and is shut down after.

    UserError if the trials name several clusters.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    addresses = {trial.experiment.engine.address for trial in trials}
    if len(addresses) > 1:
        raise UserError("engine.address: a sweep runs on one cluster, but its trials name several")
    ours = not ray.is_initialized()
    if ours:
        start_ray(addresses.pop(), max(sum(b.get("CPU", 0) for b in bundles(trial.experiment)) for trial in trials))
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _train(
    config: dict[str, Any], trials: Mapping[str, Trial], data: Mapping[str, ray.ObjectRef], out: Path, reporting: bool
) -> None:
    trial = trials[config["trial"]]
    sink = _TuneSink(trial.experiment.server.rounds) if reporting else None
    run_trial(trial, out, ray.get(data[trial.data]), sink)
    tune.report({"ended": 1})


class _TuneSink(Sink):
    """Reports the numbers of every round but the last to Tune. After the last round a trial cannot be stopped."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def round(self, record: Record) -> None:
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        if numbers["round"] < self.rounds:
            tune.report(numbers)


class _Outcomes(tune.Callback):
    """Tells the log which trials ended. Records the outcome of stopped trials and of those whose process died."""

    def __init__(self, trials: Mapping[str, Trial], out: Path, log: SweepLog) -> None:
        self.trials, self.out, self.log = trials, out, log

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self.trials[trial.config["trial"]]
        if read_outcome(self.out, own) is None:  # the scheduler stopped it; its process waits in `tune.report`
            record_outcome(self.out, own, "stopped", round=trial.last_result["round"])
        self.log.trial_ended(own.name)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.log.event(f"{trial.config['trial']}: its process died; it continues in a new one")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self.trials[trial.config["trial"]]
        if read_outcome(self.out, own) is None:
            error = "its process died, and did so again at every new start (engine.retries)"
            record_outcome(self.out, own, "failed", error=error)
        self.log.trial_ended(own.name)
