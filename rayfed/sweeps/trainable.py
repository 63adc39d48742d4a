"""What the process of a trial does: a run whose rounds are reported to Ray Tune, in the trial's own run directory.

Tune's checkpoint of a trial is a run directory cut off after a round: settings, metrics, ledger, client state and the
run's own checkpoint. A trial continues from it (`tune.get_checkpoint`): after a pause, after the death of its process,
or, in Population Based Training, from the checkpoint of another trial and with other settings. Where Tune has none, the
trial continues from its own run directory. Then Tune first gets the earlier rounds, from metrics.jsonl: schedulers see
every round, whatever was interrupted.

Ray's W&B integration is not used: `WandbLoggerCallback` sees only what is reported to Tune, and starts the W&B run of a
restored trial with ``resume=False``. Each trial has its own W&B sink, as every run, and continues its W&B run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import ray
from pyarrow.fs import LocalFileSystem
from ray import tune

from rayfed.api import build_components, iter_rounds
from rayfed.api.warm_start import STATE, continue_run, last_round, snapshot, warm_start
from rayfed.config import Experiment, dump_config, validate
from rayfed.config.execution import Engine
from rayfed.config.marks import data_key
from rayfed.engine.placement import trial_bundles
from rayfed.errors import MOST_CHARACTERS, UserError, class_and_line
from rayfed.files import atomic_write, remove_path
from rayfed.run_directory import locked
from rayfed.storage import masked
from rayfed.sweeps.plan import ENDED, FAILED, NAME, RUN_DIR, START_FROM, Config, trial_experiment
from rayfed.tasks.data.federation import Federation
from rayfed.tracking import Record, read_metrics

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
            with closing(_records(config, name, folder)) as records:
                for record in records:
                    report(record, folder, pauses)
        except Exception as error:
            if trials is None:
                raise
            report({FAILED: masked(class_and_line(error, MOST_CHARACTERS))}, folder, False)

    def _records(config: Config, name: str, folder: Path) -> Generator[Record, None, None]:
        if ENDED in config:
            return (own for own in read_metrics(folder / "metrics.jsonl") if own["round"] <= config[ENDED])
        experiment = trial_experiment(settings, overrides(config), group, name)
        federation = load_federation(experiment, data)
        return run_trial(experiment, folder, federation, tune.get_checkpoint(), config.get(START_FROM))

    def resources(config: Config) -> tune.PlacementGroupFactory:
        try:
            experiment = trial_experiment(settings, overrides(config), group, "trial")
        except UserError:  # the trial itself will say so
            experiment = validate(dict(settings))
        return placement_group(experiment.engine, here=trials is not None)

    train.__name__ = "rayfed"  # the first word of the names that Tune gives
    return tune.with_resources(train, resources)


def placement_group(engine: Engine, here: bool = False) -> tune.PlacementGroupFactory:
    """The placement group of a trial: a bundle for its own process, and one for each of its workers.

    All are reserved together, so the workers of a running trial always have room. ``here``: its process stays on this
    node, where the run directories are.
    """
    process, *workers = trial_bundles(engine)
    nodes = [node for node in ray.nodes() if node["Alive"]] if here else []
    if len(nodes) > 1:
        (own,) = (node for node in nodes if node["NodeID"] == ray.get_runtime_context().get_node_id())
        process |= {f"node:{own['NodeManagerAddress']}": 1e-3}
    labels = engine.labels
    selectors: dict[str, Any] = {"bundle_label_selector": [{}, *(dict(labels) for _ in workers)]} if labels else {}
    return tune.PlacementGroupFactory([process, *workers], **selectors)


def overrides(config: Mapping[str, Any]) -> Config:
    """The settings of the trial in its config."""
    return {key: value for key, value in config.items() if key not in (NAME, START_FROM, ENDED)}


def _own_folder() -> Path:
    storage = tune.get_context().get_storage()
    local = isinstance(storage.storage_filesystem, LocalFileSystem)
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


def run_trial(
    experiment: Experiment, folder: Path, federation: Federation, given: tune.Checkpoint | None = None,
    start: str | None = None,
) -> Generator[Record, None, None]:  # fmt: skip
    """Runs the trial in its run directory, locked. Yields the records of the rounds that Tune does not know.

    ``given`` is Tune's checkpoint of the trial. ``start`` is a run directory that a new trial continues. The last
    record comes once the run has ended: a scheduler that stops a trial after its last round stops nothing. UserError
    where the settings do not allow to continue.
    """
    with locked(folder, wait=math.inf):  # a trial of a killed process may live on for a moment
        if given is not None:
            with given.as_directory() as path:
                continue_run(Path(path), folder, experiment)
        if not (folder / "config.yaml").is_file():
            for name in STATE:  # the process died before the first round
                remove_path(folder / name)
            if start is not None:
                warm_start(Path(start), folder, experiment)
            else:  # now the folder is a run directory, whatever Tune has written into it
                atomic_write(folder / "config.yaml", dump_config(experiment))
        done = last_round(folder)
        earlier = read_metrics(folder / "metrics.jsonl") if done and given is None else []
        with iter_rounds(experiment, folder, resume=True, federation=federation) as rounds:
            for record in chain((own for own in earlier if own["round"] <= done), rounds):
                if record["round"] == experiment.server.rounds:
                    for _ in rounds:  # there is none: the run ends and exports its adapter
                        pass
                yield record


def report(record: Record, folder: Path, take_checkpoints: bool = True) -> None:
    """Reports the record to Tune, with a checkpoint if the run has just written one and Tune shall take checkpoints.

    The keys are those of metrics.jsonl, without values that were not measured, and `run_dir`.
    """
    metrics = {key: value for key, value in record.items() if value is not None} | {RUN_DIR: str(folder)}
    due = take_checkpoints and last_round(folder) == record.get("round")
    with snapshot(folder) if due else nullcontext() as copy:
        tune.report(metrics, checkpoint=copy and tune.Checkpoint.from_directory(str(copy)))
