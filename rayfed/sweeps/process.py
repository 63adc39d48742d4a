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
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import reduce
from itertools import chain
from operator import getitem
from pathlib import Path
from typing import Any

import ray
from ray import tune

from rayfed.api import build_components, iter_rounds
from rayfed.config import Experiment, dump_config, load_config
from rayfed.config.marks import changes, data_key, live
from rayfed.errors import UserError
from rayfed.files import atomic_write, remove_path, write_json
from rayfed.run_directory import locked
from rayfed.server import checkpoint as checkpoints
from rayfed.sweeps.plan import Trial
from rayfed.sweeps.trial import in_one_line, outcome_file, read_outcome, record_outcome, trial_folder
from rayfed.sweeps.warm_start import NOTE, RUN_DIR, check_rank_change, warm_start
from rayfed.tasks.data.federation import Federation
from rayfed.tracking import Record, read_metrics

STATE = ("config.yaml", "metrics.jsonl", "ledger.parquet", "checkpoints", "clients", NOTE)
"""What a checkpoint of Tune has of a run directory."""
_last: dict[str, Federation] = {}  # at most one, by its key
RANK = ("lora.rank", "lora.alpha", "lora.rslora")


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
                _continue(Path(path), folder, experiment)
        if not (folder / "config.yaml").is_file():
            for name in STATE:  # the process died before the first round
                remove_path(folder / name)
            if start is not None:
                warm_start(Path(start), folder, experiment)
            else:  # now the folder is a run directory, whatever Tune has written into it
                atomic_write(folder / "config.yaml", dump_config(experiment))
        yield last_round(folder) if given is not None else 0


def last_round(folder: Path) -> int:
    """The round of the newest checkpoint in a run directory; 0 without one."""
    whole = checkpoints.manifests(folder / "checkpoints")
    return whole[0].round if whole else 0


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
    trial: Trial, out: Path, federation: Federation, given: tune.Checkpoint | None = None,
    tell: Callable[[Record], object] = lambda record: None,
) -> None:  # fmt: skip
    """Runs the trial of a sweep to its end, and records the outcome. Only the death of the process leaves it without.

    ``tell`` gets every record that Tune does not know; a trial that has ended already is not run, but told again. After
    a failure it gets the reason alone: a metric of an earlier round must not stand for the trial.
    """
    folder, experiment = trial_folder(out, trial), trial.experiment
    outcome = read_outcome(out, trial) if given is None else None
    if outcome is not None:
        last = outcome.round or experiment.server.rounds
        for own in read_metrics(folder / "metrics.jsonl") if outcome.status != "failed" else []:
            if own["round"] <= last:
                tell(own)
        return
    start = str(folder.with_name(trial.continues)) if trial.continues else None
    try:
        with run_folder(folder, experiment, given, start) as known:
            for record in run_rounds(experiment, folder, federation, known):
                if record["round"] == experiment.server.rounds:
                    _record_done(trial, out)
                tell(record)
        if not outcome_file(out, trial).is_file():  # the run stopped early
            _record_done(trial, out)
    except Exception as error:
        reason = in_one_line(error)
        record_outcome(out, trial, "failed", error=reason)
        tell({"failed": reason})


def _record_done(trial: Trial, out: Path) -> None:
    summary = json.loads((trial_folder(out, trial) / "summary.json").read_text(encoding="utf-8"))
    record_outcome(out, trial, "done", summary=summary)


def report(record: Record, folder: Path, take_checkpoints: bool = True) -> None:
    """Reports the record to Tune, with a checkpoint if the run has just written one and Tune shall take checkpoints.

    The keys are those of metrics.jsonl, without values that were not measured, and `run_dir`.
    """
    metrics = {key: value for key, value in record.items() if value is not None} | {RUN_DIR: str(folder)}
    if take_checkpoints and last_round(folder) == record.get("round"):
        with _snapshot(folder) as checkpoint:
            tune.report(metrics, checkpoint=checkpoint)
    else:
        tune.report(metrics)


@contextmanager
def _snapshot(folder: Path) -> Iterator[Any]:
    """The run directory with its newest checkpoint alone, as links to the files: Tune copies it."""
    with tempfile.TemporaryDirectory(prefix=".snapshot.", suffix=".partial", dir=folder) as made:
        copy = Path(made)
        for name in STATE:
            source = folder / name
            if source.is_file():
                _link(source, copy / name)
            elif name == "checkpoints":
                newest = checkpoints.folders(source)[0]
                shutil.copytree(newest, copy / name / newest.name, copy_function=_link)
            elif source.is_dir():
                shutil.copytree(source, copy / name, copy_function=_link)
        yield tune.Checkpoint.from_directory(str(copy))


def _link(source: str | Path, copy: str | Path) -> None:
    try:
        os.link(source, copy)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, copy)


def _continue(source: Path, folder: Path, experiment: Experiment) -> None:
    """Makes ``folder`` the run of ``experiment`` that continues the checkpoint ``source`` of Tune."""
    theirs = checkpoints.manifests(source / "checkpoints")[0]
    with suppress(UserError, checkpoints.Damaged):
        for path in (own := checkpoints.folders(folder / "checkpoints")):
            if checkpoints.read_manifest(path, experiment.digest()).chain == theirs.chain:
                for newer in own[: own.index(path)]:
                    shutil.rmtree(newer)
                return
    for name in STATE:
        remove_path(folder / name)
    before = load_config(source / "config.yaml")
    if theirs.experiment == experiment.digest():
        for name in STATE[1:]:
            if (path := source / name).is_dir():
                shutil.copytree(path, folder / name)
            elif path.is_file():
                shutil.copyfile(path, folder / name)
        atomic_write(folder / "config.yaml", dump_config(experiment))
        return
    old = before.model_dump(mode="json")
    changed = changes(old, experiment.model_dump(mode="json"))
    _check_changes(changed, experiment)
    warm_start(source, folder, experiment)
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    note |= {"trial": before.name, "before": {key: reduce(getitem, key.split("."), old) for key in changed}}
    if (source / NOTE).is_file():
        note["earlier"] = json.loads((source / NOTE).read_text(encoding="utf-8"))
    write_json(folder / NOTE, note)


def _check_changes(changed: Mapping[str, tuple[str, str]], experiment: Experiment) -> None:
    """UserError where a run cannot go on with these changes of its settings."""
    if any(key in changed for key in RANK):
        check_rank_change(experiment)
    for key, (old, new) in changed.items():
        if key not in (*live(), *RANK, "server.rounds"):
            raise UserError(
                f"{key}: was {old} and is {new}, but a trial that continues from a checkpoint may change only "
                f"{', '.join(live())}"
            )
