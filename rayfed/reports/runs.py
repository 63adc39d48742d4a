"""Reads runs from the disk: their settings, their rounds, and whether they finished.

A directory belongs to a run, with `config.yaml` and `metrics.jsonl`, or to a sweep, whose `trials/*` are runs. Reading
needs neither torch nor Ray. A run that is still going can be read too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from rayfed.config import Experiment
from rayfed.config.describe import iter_fields
from rayfed.config.load import read_settings
from rayfed.config.marks import decides, flat
from rayfed.errors import UserError
from rayfed.tracking import read_metrics
from rayfed.tracking.jsonl import is_measured

SEED = "seed"
REQUIRED = ("bytes/down", "bytes/up", "bytes/total")  # keys of every round; metrics may be null
STATES = ("start", "resume", "stopped", "finish")  # first words of the events that start or end a run
LISTED = 5  # names in a note


@dataclass(frozen=True, eq=False)
class Run:
    """One run. ``settings`` maps every dotted key to its value, defaults included.

    ``rounds`` are the records of its metrics.jsonl, ``summary`` is its summary.json (empty before the end), ``classes``
    are the names of its classes, if it has exported any. ``trial``: whether the run belongs to a sweep.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    classes: Sequence[str]
    finished: bool
    trial: bool

    @property
    def seed(self) -> int:
        return int(self.settings[SEED])

    def result_settings(self) -> dict[str, Any]:
        """The settings that can change the result, without the seed."""
        return {key: value for key, value in self.settings.items() if key != SEED and decides(key)}

    def series(self, key: str) -> dict[int, float]:
        """Round -> value, for the rounds with a finite number. Lists, such as a recall per class, are left out."""
        values = ((record["round"], record.get(key)) for record in self.rounds)
        return {t: value for t, value in values if isinstance(value, int | float)}

    def comparable(self, key: str) -> dict[int, float]:
        """`series`, of the rounds that are measured on the same rows as the last one.

        With `partition.sequence` these are the rounds of the last experience.
        """
        now = self.rounds[-1].get("sequence/experience")
        same = {record["round"] for record in self.rounds if record.get("sequence/experience") == now}
        return {t: value for t, value in self.series(key).items() if t in same}

    def cumulative(self, key: str) -> dict[int, int]:
        """Round -> the sum of the values up to and including that round."""
        return dict(zip((r["round"] for r in self.rounds), accumulate(r[key] for r in self.rounds)))

    def by_experience(self) -> list[list[float | None]]:
        """The test accuracies after each experience, of the experiences up to it; empty without `partition.sequence`.

        An experience of which no round has been evaluated has no entries.
        """
        rows: list[list[float | None]] = []
        for record in self.rounds:
            if (now := record.get("sequence/experience")) is not None:
                rows += [[] for _ in range(now - len(rows))]
                keys = [f"test/accuracy_experience_{j + 1}" for j in range(now)]
                rows[now - 1] = [record[key] for key in keys if key in record] or rows[now - 1]
        return rows

    def last_list(self, key: str) -> tuple[int, list[Any]] | None:
        """(round, value) of the last round that has a list under the key; None if no round has."""
        return next(((r["round"], r[key]) for r in reversed(self.rounds) if r.get(key)), None)

    def last_ranks(self) -> dict[int, int]:
        """Client -> the rank at which it trained last, for the clients that trained."""
        return {client: rank for record in self.rounds for client, rank in record.get("clients/trained") or ()}

    def measured(self, key: str) -> bool:
        """Whether the run has a value of the metric in any round, finite or not."""
        return bool(self.series(key)) or self.diverged(key)

    def diverged(self, key: str) -> bool:
        """Whether the last measured value was not finite."""
        values = [record.get(key) for record in self.rounds if is_measured(record, key)]
        return bool(values) and values[-1] is None


def find_runs(folders: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """(the runs in these run and sweep directories, notes on trials that are left out).

    A run that is given twice counts once. UserError if a directory has no run or a run has no round.
    """
    runs: dict[Path, Run] = {}
    notes: list[str] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"DIR: got {str(folder)!r}, but there is no such folder")
        is_sweep = (folder / "trials").is_dir() and not (folder / "metrics.jsonl").is_file()
        found = _trials(folder, notes) if is_sweep else [read_run(folder)]
        for run in found:
            runs.setdefault(run.folder.resolve(), run)
    return list(runs.values()), notes


def read_run(folder: Path, trial: bool = False) -> Run:
    """The run in the folder. UserError if it has no round, no settings or a damaged file."""
    metrics, config = folder / "metrics.jsonl", folder / "config.yaml"
    if not (metrics.is_file() or config.is_file()):
        raise UserError(
            f"DIR: got {str(folder)!r}, but it is neither a run directory (no metrics.jsonl) nor a sweep's (no trials/)"
        )
    rounds = _rounds(folder)
    if not rounds:
        raise UserError(f"DIR: got {str(folder)!r}, but that run has no round yet")
    for record in rounds:
        for key in REQUIRED:
            if not isinstance(record.get(key), int):
                raise UserError(f"{metrics}: round {record['round']} has no {key}")
    if not config.is_file():
        raise UserError(f"DIR: got {str(folder)!r}, but it has no config.yaml, so its settings are unknown")
    # An older run's config.yaml may lack new settings; these have their defaults.
    defaults = {key: field.default for key, field in iter_fields(Experiment) if not field.is_required()}
    settings = {**flatten(defaults), **flatten(read_settings(config))}
    finished = rounds[-1]["round"] >= settings["server.rounds"] or _last_event(folder / "events.log") == "finish"
    summary, classes = _json(folder / "summary.json", {}), _json(folder / "adapter" / "classes.json", [])
    return Run(folder, str(settings["name"]), settings, rounds, summary, classes, finished, trial)


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of the nested settings. Tuples become lists, as in YAML."""
    plain = flat(settings, leaf=lambda value: False)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain}


def natural_key(text: str) -> list[tuple[int, float, str]]:
    """A sort key that orders numbers in the text by size: `rank=4` before `rank=16`."""
    pieces = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", text)
    return [(0, float(piece), "") if i % 2 else (1, 0.0, piece) for i, piece in enumerate(pieces)]


def _trials(folder: Path, notes: list[str]) -> list[Run]:
    trials = sorted((p for p in (folder / "trials").iterdir() if p.is_dir()), key=lambda p: natural_key(p.name))
    started = [trial for trial in trials if _rounds(trial)]
    if not started:
        raise UserError(f"DIR: got {str(folder)!r}, but no trial of that sweep has a round yet")
    if without := [trial.name for trial in trials if trial not in started]:
        notes.append(f"{folder}: {listed('trial', without)} left out, without a round yet")
    return [read_run(trial, trial=True) for trial in started]


def _rounds(folder: Path) -> list[dict[str, Any]]:
    metrics = folder / "metrics.jsonl"
    return read_metrics(metrics) if metrics.is_file() else []


def _json(path: Path, default: Any) -> Any:
    """The JSON value of the file, of the type of ``default``; the default if there is no file. UserError if damaged."""
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, type(default)):
        raise UserError(f"{path}: not a JSON {'object' if isinstance(default, dict) else 'array'}, so it is damaged")
    return value


def listed(noun: str, names: Sequence[str]) -> str:
    """`3 trials (a, b, c)`, with at most five names."""
    shown = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''} ({shown})"


def _last_event(path: Path) -> str | None:
    """The first word of the last event that started or ended the run."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    words = (re.match(r"\S+ (\w+)", line) for line in reversed(text.splitlines()))
    return next((word[1] for word in words if word and word[1] in STATES), None)
