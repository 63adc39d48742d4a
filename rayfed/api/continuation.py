"""A trial of Ray Tune as a run: it continues from a checkpoint, from its own run directory, or from another run.

A checkpoint is a run directory that was cut off after a round (`snapshot`): settings, metrics, ledger, client state and
the run's own checkpoint. With equal settings the run goes on to the bit. With other settings, as in Population Based
Training, `continues.json` says what the run has copied.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from rayfed.api.runs import iter_rounds
from rayfed.api.warm_start import NOTE, RANK, check_rank_change, warm_start
from rayfed.config import Experiment, dump_config, load_config
from rayfed.config.marks import changes, flat, live
from rayfed.errors import UserError
from rayfed.files import atomic_write, remove_path, write_json
from rayfed.run_directory import locked
from rayfed.server import checkpoint as checkpoints
from rayfed.tasks.data.federation import Federation
from rayfed.tracking import Record, read_metrics

STATE = ("config.yaml", "metrics.jsonl", "ledger.parquet", "checkpoints", "clients", NOTE)
"""The parts of a run directory from which a run continues."""


def run_trial(
    experiment: Experiment, folder: Path, federation: Federation,
    given: AbstractContextManager[str] | None = None, start: str | None = None,
) -> Generator[Record, None, None]:  # fmt: skip
    """Runs the trial in its run directory, locked. Yields the records of the rounds that Tune does not know.

    ``given`` opens Tune's checkpoint of the trial as a folder. ``start`` is a run directory that a new trial continues.
    The last record comes once the run has ended: a scheduler that stops a trial after its last round stops nothing.
    UserError where the settings do not allow to continue.
    """
    with locked(folder, wait=math.inf):  # a trial of a killed process may live on for a moment
        if given is not None:
            with given as path:
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


def last_round(folder: Path) -> int:
    """The round of the newest checkpoint in a run directory; 0 without one."""
    whole = checkpoints.manifests(folder / "checkpoints")
    return whole[0].round if whole else 0


@contextmanager
def snapshot(folder: Path) -> Iterator[Path]:
    """A run directory cut off after its newest checkpoint, as links to the files of ``folder``; gone afterwards."""
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
        yield copy


def _link(source: str | Path, copy: str | Path) -> None:
    try:
        os.link(source, copy)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, copy)


def continue_run(source: Path, folder: Path, experiment: Experiment) -> None:
    """Makes ``folder`` the run of ``experiment`` that continues ``source``, a run directory cut off after a round.

    A folder that has come to that round by itself loses what is newer. Settings that are `live` may differ, and those
    of the rank where `check_rank_change` allows that. UserError for any other difference.
    """
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
    if any(key in changed for key in RANK):
        check_rank_change(experiment)
    for key, (was, now) in changed.items():
        if key not in (*live(), *RANK, "server.rounds"):
            allowed = f"a trial that continues from a checkpoint may change only {', '.join(live())}"
            raise UserError(f"{key}: was {was} and is {now}, but {allowed}")
    warm_start(source, folder, experiment)
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    note |= {"trial": before.name, "before": {key: value for key, value in flat(old) if key in changed}}
    if (source / NOTE).is_file():
        note["earlier"] = json.loads((source / NOTE).read_text(encoding="utf-8"))
    write_json(folder / NOTE, note)


def schedule(folder: Path, experiment: Experiment, keys: Iterable[str]) -> list[dict[str, Any]]:
    """The steps by which the model of the trial in ``folder`` came about, the first one first.

    A step has the numbers of its first and its last round (`rounds`), the trial that trained them, and the values of
    the dotted settings ``keys``. ``experiment``: the settings of the trial now.
    """
    note = json.loads((folder / NOTE).read_text(encoding="utf-8")) if (folder / NOTE).is_file() else None
    plain = dict(flat(experiment.model_dump(mode="json")))
    trial, last, settings = experiment.name, experiment.server.rounds, {key: plain[key] for key in keys}
    steps: list[dict[str, Any]] = []
    while note is not None:
        steps.append({"rounds": [note["round"] + 1, last], "trial": trial, **settings})
        trial, last = note["trial"], note["round"]
        settings = settings | {key: value for key, value in note["before"].items() if key in settings}
        note = note.get("earlier")
    return [{"rounds": [1, last], "trial": trial, **settings}, *reversed(steps)]
