"""Runs as they lie on the disk: settings, a record a round, and whether they came to their end.

A directory is a run's, with `config.yaml` and `metrics.jsonl`, or a sweep's, whose `trials/*` are runs. Nothing here
needs torch or Ray, and a run that is still going can be read like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfed.config import Experiment
from rayfed.config.describe import iter_fields
from rayfed.config.load import read_settings
from rayfed.config.marks import decides
from rayfed.errors import UserError
from rayfed.tracking import read_metrics

SEED = "seed"
NEEDED = ("bytes/down", "bytes/up", "bytes/total")  # of every round; what was measured may be null
ENDS = ("start", "resume", "stopped", "finish")  # first words of the events that tell how far a run came
LISTED = 5  # names that a note spells out


@dataclass(frozen=True, eq=False)
class Run:
    """One run. ``settings`` has every dotted key, defaults included; ``rounds`` the lines of its metrics.jsonl."""

    folder: Path
    name: str
    settings: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    finished: bool
    trial: bool

    @property
    def seed(self) -> int:
        return int(self.settings[SEED])

    @property
    def known_answer(self) -> bool:
        """Whether its figure is the gap to a known optimum instead of an accuracy."""
        return self.settings["data.source"] == "lowrank"

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result, but for the seed."""
        return {key: value for key, value in self.settings.items() if key != SEED and decides(key)}

    def series(self, key: str) -> dict[int, float]:
        """Round -> value, in order, where the run measured a finite one."""
        return {record["round"]: record[key] for record in self.rounds if record.get(key) is not None}

    def sums(self, key: str) -> dict[int, int]:
        """Round -> what the rounds up to it add up to."""
        total, sums = 0, {}
        for record in self.rounds:
            total += record[key]
            sums[record["round"]] = total
        return sums

    def diverged(self, key: str) -> bool:
        """Whether the value was not finite when it was last measured."""
        for record in reversed(self.rounds):
            if record.get(key) is not None:
                return False
            if any(word.startswith(f"{key}=") for word in str(record.get("nonfinite", "")).split()):
                return True
        return False


def find_runs(folders: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """(the runs in these run and sweep directories, notes on what was left out of sweeps).

    A directory given twice counts once. UserError, one line, for what is neither, and for a run without a round.
    """
    runs: dict[Path, Run] = {}
    notes: list[str] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"DIR: got {str(folder)!r}, but there is no such folder")
        found = [read_run(folder)] if _is_run(folder) else _trials(folder, notes)
        for run in found:
            runs.setdefault(run.folder.resolve(), run)
    return list(runs.values()), notes


def read_run(folder: Path, trial: bool = False) -> Run:
    """The run in the folder; UserError, one line, where it has no round or is damaged."""
    rounds = read_metrics(folder / "metrics.jsonl")
    if not rounds:
        raise UserError(f"DIR: got {str(folder)!r}, but that run has no round yet")
    for record in rounds:
        for key in NEEDED:
            if not isinstance(record.get(key), int):
                raise UserError(f"{folder / 'metrics.jsonl'}: round {record['round']} has no {key}")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"DIR: got {str(folder)!r}, but it has no config.yaml, so its settings are unknown")
    given = read_settings(folder / "config.yaml")
    settings = {**_defaults(), **flatten(given)}
    finished = rounds[-1]["round"] >= settings["server.rounds"] or _last_event(folder / "events.log") == "finish"
    return Run(folder, str(settings["name"]), settings, rounds, finished, trial)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys. Tuples become lists, as YAML has them."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def natural(text: str) -> list[tuple[int, float, str]]:
    """A sort key by which `rank=4` comes before `rank=16`."""
    pieces = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", text)
    return [(0, float(piece), "") if i % 2 else (1, 0.0, piece) for i, piece in enumerate(pieces)]


def _is_run(folder: Path) -> bool:
    if (folder / "metrics.jsonl").is_file():
        return True
    if (folder / "trials").is_dir():
        return False
    if (folder / "config.yaml").is_file():
        raise UserError(f"DIR: got {str(folder)!r}, but that run has no round yet")
    raise UserError(
        f"DIR: got {str(folder)!r}, but that is no run directory (it has no metrics.jsonl) and no sweep's (no trials/)"
    )


def _trials(folder: Path, notes: list[str]) -> list[Run]:
    runs, without = [], []
    for place in sorted((p for p in (folder / "trials").iterdir() if p.is_dir()), key=lambda p: natural(p.name)):
        metrics = place / "metrics.jsonl"
        if metrics.is_file() and read_metrics(metrics):
            runs.append(read_run(place, trial=True))
        else:
            without.append(place.name)
    if not runs:
        raise UserError(f"DIR: got {str(folder)!r}, but no trial of that sweep has a round yet")
    if without:
        notes.append(f"{folder}: {listed('trial', without)} left out, without a round so far")
    return runs


def listed(noun: str, names: Sequence[str]) -> str:
    """`3 trials (a, b, c)`, and no more than a few of the names."""
    shown = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''} ({shown})"


def _defaults() -> dict[str, Any]:
    """What a setting is where an older run's config.yaml does not name it."""
    return flatten({key: field.default for key, field in iter_fields(Experiment) if not field.is_required()})


def _last_event(path: Path) -> str | None:
    """The first word of the last event that tells how far the run came."""
    if not path.is_file():
        return None
    last = None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        word = re.match(r"\S+ (\w+)", line)
        if word and word[1] in ENDS:
            last = word[1]
    return last
