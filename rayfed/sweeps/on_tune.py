"""Runs the trials of a sweep on Ray Tune: one process a trial, as many at a time as fit.

Tune places the trials, reuses processes for further trials (each process imports torch once, and loads the base model
and the data again only if they change), and restarts a trial whose process died; the trial then continues from its
checkpoint. What Tune itself stores is removed at the end: a sweep is resumed from its own directory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from rayfed.engine.connect import join_for_trials
from rayfed.files import remove_path
from rayfed.sweeps.plan import FAILED, NAME, RUN_DIR, Trial
from rayfed.sweeps.search import Search
from rayfed.sweeps.trainable import make_trainable, overrides
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
    new = ENVIRONMENT.keys() - os.environ.keys()
    ours = False
    try:
        os.environ.update(ENVIRONMENT | os.environ)
        ours = join_for_trials((trial.experiment.engine for trial in search.checked), search.console.note)
        config: dict[str, Any] = {
            "search_alg": Suggestions(search),
            "num_samples": -1,
            "max_concurrent_trials": search.sweep.concurrency,
            "reuse_actors": True,
            "trial_name_creator": _name,
            "trial_dirname_creator": _name,
        }
        config |= search.tune_config()
        space = config.pop("param_space", {})
        retries = tune.FailureConfig(max(trial.experiment.engine.retries for trial in search.checked))
        run_config = tune.RunConfig(
            STORAGE, str(search.out), failure_config=retries, verbose=0, callbacks=[Watch(search)]
        )
        function = make_trainable(search.settings, search.federations, search.out / "trials", search.pauses)
        remove_path(search.out / STORAGE)
        tune.Tuner(function, param_space=space, tune_config=tune.TuneConfig(**config), run_config=run_config).fit()
    finally:
        remove_path(search.out / STORAGE)
        for name in new:  # later experiments of this process are not the sweep's
            os.environ.pop(name, None)
        if ours:
            ray.shutdown()


def _name(trial: Any) -> str:
    return str(trial.config[NAME])


class Suggestions(Searcher):
    """The trials of the search, one after the other, as Tune asks for them."""

    def __init__(self, search: Search) -> None:
        super().__init__()
        self.search = search
        self.running: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """The config of the next trial; None while others have to end first, `FINISHED` after the last one."""
        config = self.search.suggest()
        if config is None:
            return None if self.running else self.FINISHED
        self.running.add(trial_id)
        return config

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        self.running.discard(trial_id)  # the search gets the result from `Watch`

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: a sweep is resumed from its own directory."""

    restore = save


class Watch(tune.Callback):
    """Shows what happens, and tells the search which trials have ended, and how."""

    def __init__(self, search: Search) -> None:
        self.search = search

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.search.console.show(self.search.ended, len(self.search.rows))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self._trial(trial)
        self.search.console.start(own.name, own.experiment.server.rounds)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self.search.console.round(Path(result[RUN_DIR]).name, result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.search.console.note(f"{trial}: its process died; it continues in a new one")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result
        self.search.trial_ended(self._trial(trial), last.get(FAILED), last.get("round"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = "its process died, and did so again at every new start (engine.retries)"
        self.search.trial_ended(self._trial(trial), error)

    def _trial(self, trial: Any) -> Trial:
        return self.search.trial(str(trial), overrides(trial.config))
