"""What the process of a trial does: a run whose rounds are reported to Ray Tune, in the trial's own run directory.

Tune's checkpoint of a trial is a run directory cut off after a round: settings, metrics, ledger, client state and the
run's own checkpoint. A trial continues from it (`tune.get_checkpoint`): after a pause, after the death of its process,
or, in Population Based Training, from the checkpoint of another trial and with other settings. Where Tune has none, the
trial continues from its own run directory. Then Tune first gets the earlier rounds, from metrics.jsonl: schedulers see
every round, whatever was interrupted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import ray
from ray import tune

from rayfed.api import build_components, iter_rounds
from rayfed.api.warm_start import STATE, continue_run, last_round, snapshot, warm_start
from rayfed.config import Experiment, dump_config
from rayfed.config.marks import data_key
from rayfed.files import atomic_write, remove_path
from rayfed.run_directory import locked
from rayfed.sweeps.trial import Trial, in_one_line, outcome_file, read_outcome, record_outcome, trial_folder
from rayfed.tasks.data.federation import Federation
from rayfed.tracking import Record, read_metrics

Config = dict[str, Any]
"""Tune's config of a trial: dotted settings and their values, and the entries below."""
NAME = "name"  # the name of the run
RUNS = "rayfed.runs"  # name -> settings, of the runs of a trial that has several
START_FROM = "rayfed.start_from"  # the run directory of the trial that it continues
RUN_DIR = "run_dir"  # in the results of a trial: its run directory
_last: dict[str, Federation] = {}  # at most one, by its key


def overrides(config: Mapping[str, Any]) -> Config:
    """The settings of the trial in its config."""
    return {key: value for key, value in config.items() if key not in (NAME, RUNS, START_FROM)}


def runs_of(trial: str, config: Mapping[str, Any]) -> Mapping[str, Config]:
    """The runs of the ``trial``, named as in Tune: their settings by name.

    The config of a trial that copies another one has the other's `NAME`.
    """
    return config.get(RUNS) or {trial: overrides(config)}


@contextmanager
def run_folder(
    folder: Path, experiment: Experiment, given: tune.Checkpoint | None = None, start: str | None = None
) -> Iterator[int]:
    """Locks the run directory and prepares it for the trial. Yields the last round that Tune knows of the trial.

    ``given`` is Tune's checkpoint of the trial. ``start`` is a run directory that a new trial continues. UserError
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
        yield last_round(folder) if given is not None else 0


def load_federation(experiment: Experiment, shared: Mapping[str, ray.ObjectRef]) -> Federation:
    """The data of the trial: from Ray's object store if they are ``shared``, by `data_key`; else loaded here.

    The process keeps the last data, for the trials that follow.
    """
    key = data_key(experiment.model_dump(mode="json"))
    if key not in _last:
        _last.clear()
        _last[key] = ray.get(shared[key]) if key in shared else build_components(experiment).task.load_data()
    return _last[key]


def run_rounds(experiment: Experiment, folder: Path, federation: Federation, known: int) -> Iterator[Record]:
    """Runs the experiment. Yields the records of all rounds after round ``known``: the last one once the run has ended.

    So a scheduler that stops a trial after its last round stops nothing.
    """
    done = last_round(folder)
    earlier = read_metrics(folder / "metrics.jsonl") if known < done else []
    with iter_rounds(experiment, folder, resume=True, federation=federation) as rounds:
        for record in chain((own for own in earlier if known < own["round"] <= done), rounds):
            if record["round"] == experiment.server.rounds:
                for _ in rounds:  # there is none: the run ends and exports its adapter
                    pass
            yield record


def run_trial(
    trial: Trial, out: Path, federation: Federation, given: tune.Checkpoint | None = None, start: str | None = None,
    tell: Callable[[Record], object] = lambda record: None,
) -> None:  # fmt: skip
    """Runs the trial of a sweep to its end, and records the outcome. Only the death of the process leaves it without.

    ``given`` and ``start``: see `run_folder`. ``tell`` gets every record that Tune does not know; a trial that has
    ended already is not run, but told again. After a failure it gets the reason alone: a metric of an earlier round
    must not stand for the trial.
    """
    folder, experiment = trial_folder(out, trial), trial.experiment
    if given is None and (outcome := read_outcome(out, trial)) is not None:
        for own in read_metrics(folder / "metrics.jsonl"):
            if own["round"] <= (outcome.round or experiment.server.rounds):
                tell(own)
        return
    try:
        with run_folder(folder, experiment, given, start) as known:
            for record in run_rounds(experiment, folder, federation, known):
                if record["round"] == experiment.server.rounds:
                    _record_done(out, trial)
                tell(record)
        if not outcome_file(out, trial).is_file():  # the run stopped early
            _record_done(out, trial)
    except Exception as error:
        reason = in_one_line(error)
        record_outcome(out, trial, "failed", error=reason)
        tell({"failed": reason})


def _record_done(out: Path, trial: Trial) -> None:
    summary = json.loads((trial_folder(out, trial) / "summary.json").read_text(encoding="utf-8"))
    record_outcome(out, trial, "done", summary=summary)


def report(record: Record, folder: Path, take_checkpoints: bool = True) -> None:
    """Reports the record to Tune, with a checkpoint if the run has just written one and Tune shall take checkpoints.

    The keys are those of metrics.jsonl, without values that were not measured, and `run_dir`.
    """
    metrics = {key: value for key, value in record.items() if value is not None} | {RUN_DIR: str(folder)}
    if take_checkpoints and last_round(folder) == record.get("round"):
        with snapshot(folder) as copy:
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(str(copy)))
    else:
        tune.report(metrics)
