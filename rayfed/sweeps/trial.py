"""One trial: a rayfed run in its own directory, and the record of how it ended.

The run directory `trials/NAME/` and the record `trials/NAME.json` are the truth; what Ray Tune remembers is not. A
trial is done when its record says so. Until then it starts, or continues from its run's own checkpoint; the first time,
where it `continues` another trial, from that one's.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rayfed.api import run
from rayfed.config import load_config
from rayfed.errors import RunError, UserError
from rayfed.files import write_json
from rayfed.sweeps.plan import Trial
from rayfed.sweeps.warm_start import warm_start
from rayfed.tasks.data.federation import Federation
from rayfed.tracking import Sink


@dataclass(frozen=True)
class Outcome:
    """How a trial ended, the digest of its settings, and its run's summary, its one-line error or its last round."""

    status: Literal["done", "failed", "stopped"]
    digest: str
    error: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    round: int | None = None  # after which it was stopped


def place(out: Path, trial: Trial) -> Path:
    """The trial's run directory in the sweep's directory ``out``."""
    return out / "trials" / trial.name


def outcome(out: Path, trial: Trial) -> Outcome | None:
    """The trial's record, or None where it has not ended. UserError where it was made with other settings."""
    path = record_of(out, trial)
    made_with = None
    known = None
    if path.is_file():
        try:
            known = Outcome(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"--resume: {path} is damaged ({error}); remove it to run the trial again") from None
        made_with = known.digest
    elif (place(out, trial) / "config.yaml").is_file():
        made_with = load_config(place(out, trial) / "config.yaml").digest()
    now = trial.experiment.digest()
    if made_with not in (None, now):
        raise UserError(
            f"--resume: {place(out, trial)} was made with other settings (digest {made_with}, these have {now}); "
            "resume with the sweep's own sweep.yaml or choose another --out"
        )
    return known


def record_of(out: Path, trial: Trial) -> Path:
    """The file that holds the trial's outcome."""
    return out / "trials" / f"{trial.name}.json"


def settle(out: Path, trial: Trial, error: str | None, summary: Mapping[str, Any] | None = None) -> None:
    """Writes how the trial ended."""
    figures = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in (summary or {}).items()}
    status: Literal["done", "failed"] = "failed" if error else "done"
    write_json(record_of(out, trial), asdict(Outcome(status, trial.experiment.digest(), error, figures)))


def settle_stopped(out: Path, trial: Trial, round: int) -> None:
    """Writes that the trial was stopped after that round: it has not finished, and never will."""
    write_json(record_of(out, trial), asdict(Outcome("stopped", trial.experiment.digest(), round=round)))


def work(trial: Trial, out: Path, federation: Federation, sink: Sink) -> None:
    """Runs the trial to its end and records it. Only what kills the process leaves it without a record."""
    folder = place(out, trial)
    with locked(folder, f"{folder}: another process is still writing it"):
        if not (folder / "config.yaml").is_file():  # killed before its first round
            _empty(folder)
        try:
            if trial.continues and not (folder / "config.yaml").is_file():
                warm_start(folder.with_name(trial.continues), folder, trial.experiment)
            result = run(trial.experiment, folder, resume=True, sink=sink, federation=federation)
        except Exception as error:
            settle(out, trial, in_one_line(error))
        else:
            settle(out, trial, None, result.summary)


def in_one_line(error: Exception) -> str:
    """What went wrong, on one line; the kind of error too, where it is none of rayfed's own."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return line if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {line}"


@contextmanager
def locked(folder: Path, refusal: str, wait: bool = True) -> Iterator[None]:
    """Holds the folder, made where it is missing, against other processes; the lock ends with the process.

    A trial whose sweep was killed may live on for a moment: with ``wait`` that is waited for, else RunError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RunError(refusal) from None
        yield
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
