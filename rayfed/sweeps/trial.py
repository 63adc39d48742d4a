"""A trial of a sweep: its settings, its run directory, and the file with its outcome.

A resumed sweep reads the run directories `trials/NAME/` and the outcomes `trials/NAME.json`, and nothing that Ray Tune
remembers. A trial has ended once its outcome is recorded. Until then it starts, or continues from its own checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rayfed.config import Experiment, load_config
from rayfed.errors import RunError, UserError
from rayfed.files import write_json
from rayfed.storage import masked

Status = Literal["done", "failed", "stopped"]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    overrides: Mapping[str, Any]
    labels: Mapping[str, Any]
    """The settings that tell trials apart, or the label of their case."""
    experiment: Experiment
    data: str
    """The key of its data: trials with equal keys share a federation."""
    metrics: tuple[str, ...]
    """The keys of metrics.jsonl by which trials can be compared."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. ``digest`` is that of its settings, ``summary`` that of its run."""

    status: Status
    digest: str
    error: str | None = None
    """One line, if the trial failed."""
    summary: dict[str, Any] = field(default_factory=dict)
    round: int | None = None
    """The last round of a trial that was stopped early."""


def trial_folder(out: Path, trial: Trial) -> Path:
    """The trial's run directory in the sweep's directory ``out``."""
    return out / "trials" / trial.name


def outcome_file(out: Path, trial: Trial) -> Path:
    """The file with the trial's outcome."""
    return out / "trials" / f"{trial.name}.json"


def read_outcome(out: Path, trial: Trial) -> Outcome | None:
    """The trial's outcome; None before its end. UserError if the trial was made with other settings."""
    path, config = outcome_file(out, trial), trial_folder(out, trial) / "config.yaml"
    outcome = None
    old = now = trial.experiment.digest()
    if path.is_file():
        try:
            outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"--resume: {path} is damaged ({error}); remove it to run the trial again") from None
        old = outcome.digest
    elif config.is_file():
        old = load_config(config).digest()
    if old != now:
        raise UserError(
            f"--resume: {config.parent} was made with other settings (digest {old}, these have {now}); "
            "resume with the sweep's own sweep.yaml or choose another --out"
        )
    return outcome


def record_outcome(out: Path, trial: Trial, status: Status, **known: Any) -> None:
    """Writes the trial's outcome; ``known``: further fields of `Outcome`."""
    write_json(outcome_file(out, trial), asdict(Outcome(status, trial.experiment.digest(), **known)))


def in_one_line(error: Exception) -> str:
    """The message of the error on one line; with the error's class if the error is not one of rayfed's own."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    line = masked(line)
    return line if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {line}"
