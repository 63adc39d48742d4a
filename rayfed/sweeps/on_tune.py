"""Trials on Ray Tune: what the process of a trial does, and how Tune runs the trials of a sweep.

A trial is a run whose rounds are reported to Tune, in a run directory of its own. Tune's checkpoint of a trial is a run
directory cut off after a round (`rayfed.api.continuation`). A trial continues from it (`tune.get_checkpoint`): after a
pause, after the death of its process, or, in Population Based Training, from the checkpoint of another trial and with
other settings. Where Tune has none, the trial continues from its own run directory. Then Tune first gets the earlier
rounds, from metrics.jsonl: schedulers see every round, whatever was interrupted.

Tune places the trials, as many at a time as fit, reuses processes for further trials (each process imports torch once,
and loads the base model and the data again only if they change), and restarts a trial whose process died. What Tune
itself stores of a sweep is removed at the end: a sweep is resumed from its own directory.

Ray's W&B integration is not used: `WandbLoggerCallback` sees only what is reported to Tune, and starts the W&B run of a
restored trial with ``resume=False``. Each trial has its own W&B sink, as every run, and continues its W&B run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from rayfed.api import build_components
from rayfed.api.continuation import last_round, run_trial, snapshot
from rayfed.config import Experiment, validate
from rayfed.config.marks import data_key
from rayfed.engine.connect import join_for_trials
from rayfed.engine.placement import trial_places
from rayfed.errors import MOST_CHARACTERS, UserError, class_and_line
from rayfed.files import remove_path
from rayfed.storage import masked
from rayfed.sweeps.plan import FAILED, NAME, RUN_DIR, START_FROM, Config, Trial, trial_experiment
from rayfed.sweeps.sweep import Search
from rayfed.tasks.data.federation import Federation
from rayfed.tracking import Record

OF_TRIALS = {  # of Ray Tune, unless the user has set the variable
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in the settings start from the same folder as in `rayfed run`
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every round is evaluated
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "15",  # a run that is stopped may still have to write its checkpoint
}
ENVIRONMENT = OF_TRIALS | {  # Tune reads these variables when the sweep starts
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # one line says that a process died
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # each run writes its own metrics
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command, as it ends any other command
    "RAY_AIR_NEW_OUTPUT": "0",
}
STORAGE = "tune"  # the folder of Tune in the sweep's directory

_last: dict[str, Federation] = {}  # at most one, by its key


def make_trainable(
    settings: Mapping[str, Any], federations: Mapping[str, Federation], trials: Path | None = None, pauses: bool = True
) -> Callable[[Config], None]:
    """A function trainable of Ray Tune: one trial is one run, with the resources that it needs.

    Args:
        settings: what all trials share; the dotted settings in Tune's config take their place.
        federations: the data of trials, by `data_key`. The trials share them through Ray's object store.
        trials: the folder of run directories of a sweep. They have the names of Tune's trials, and the processes stay
            on this node. A run that fails is no error of Tune, which would try it again: its last result has the
            reason, under `FAILED`. None: the run directory is the trial's folder in Tune's storage; where the storage
            is no local path, the trial's working directory.
        pauses: whether Tune gets checkpoints, with which it can pause and copy trials.
    """
    group = str(settings.get("name", "sweep"))
    data = {key: ray.put(federation) for key, federation in federations.items()}

    def train(config: Config) -> None:
        own = tune.get_context().get_trial_name()
        folder = trials / own if trials else _own_folder()
        name = own if trials else config.get(NAME, own)  # in a sweep, PBT may have copied another trial's config
        try:
            experiment = trial_experiment(settings, overrides(config), group, name)
            federation, given = load_federation(experiment, data), tune.get_checkpoint()
            begun = given and given.as_directory()
            with closing(run_trial(experiment, folder, federation, begun, config.get(START_FROM))) as records:
                for record in records:
                    report(record, folder, pauses)
        except Exception as error:
            if trials is None:
                raise
            report({FAILED: masked(class_and_line(error, MOST_CHARACTERS))}, folder, False)

    def resources(config: Config) -> tune.PlacementGroupFactory:
        try:
            engine = trial_experiment(settings, overrides(config), group, "trial").engine
        except UserError:  # the trial itself will say so
            engine = validate(dict(settings)).engine
        return tune.PlacementGroupFactory(**trial_places(engine, here=trials is not None))

    train.__name__ = "rayfed"  # the first word of the names that Tune gives
    return tune.with_resources(train, resources)


def overrides(config: Mapping[str, Any]) -> Config:
    """The settings of the trial in its config."""
    return {key: value for key, value in config.items() if key not in (NAME, START_FROM)}


def _own_folder() -> Path:
    storage = tune.get_context().get_storage()
    local = storage.storage_filesystem.type_name == "local"
    return Path(storage.trial_fs_path if local else storage.trial_working_directory)


def load_federation(experiment: Experiment, shared: Mapping[str, ray.ObjectRef]) -> Federation:
    """The data of the trial: from Ray's object store if they are ``shared``, by `data_key`; else loaded here.

    The process keeps the last data, for the trials that follow.
    """
    key = data_key(experiment.model_dump(mode="json"))
    if key not in _last:
        _last.clear()
        _last[key] = ray.get(shared[key]) if key in shared else build_components(experiment).task.load_data()
    return _last[key]


def report(record: Record, folder: Path, take_checkpoints: bool = True) -> None:
    """Reports the record to Tune, with a checkpoint if the run has just written one and Tune shall take checkpoints.

    The keys are those of metrics.jsonl, without values that were not measured, and `run_dir`.
    """
    metrics = {key: value for key, value in record.items() if value is not None} | {RUN_DIR: str(folder)}
    due = take_checkpoints and last_round(folder) == record.get("round")
    with snapshot(folder) if due else nullcontext() as copy:
        tune.report(metrics, checkpoint=copy and tune.Checkpoint.from_directory(str(copy)))


def run_on_tune(search: Search) -> None:
    """Starts Ray (or joins it) and runs the missing trials of the search.

    UserError where the cluster can never hold one of the trials. If Ray was started here, it is shut down in the end.
    """
    new, out, ours = ENVIRONMENT.keys() - os.environ.keys(), search.out, False
    try:
        os.environ.update(ENVIRONMENT | os.environ)
        ours = join_for_trials((trial.experiment.engine for trial in search.checked), search.console.note)
        config: dict[str, Any] = {"search_alg": Suggestions(search), "num_samples": -1} | search.tune_config()
        space, at_once = config.pop("param_space", {}), search.sweep.concurrency
        names: dict[str, Any] = {"trial_name_creator": _name, "trial_dirname_creator": _name}
        tune_config = tune.TuneConfig(max_concurrent_trials=at_once, reuse_actors=True, **names, **config)
        retries = tune.FailureConfig(max(trial.experiment.engine.retries for trial in search.checked))
        run_config = tune.RunConfig(STORAGE, str(out), failure_config=retries, verbose=0, callbacks=[Watch(search)])
        function = make_trainable(search.settings, search.federations, out / "trials", search.pauses)
        remove_path(out / STORAGE)
        tune.Tuner(function, param_space=space, tune_config=tune_config, run_config=run_config).fit()
    finally:
        remove_path(out / STORAGE)
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
        self.search.trial_ended(self._trial(trial), trial.last_result.get(FAILED), trial.last_result.get("round"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = "its process died, and did so again at every new start (engine.retries)"
        self.search.trial_ended(self._trial(trial), error)

    def _trial(self, trial: Any) -> Trial:
        return self.search.trial(str(trial), overrides(trial.config))
