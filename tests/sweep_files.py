"""What the tests of sweeps share: the plan of a sweep file, and what a sweep's directory says."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from rayfed.config.sweep import load_sweep
from rayfed.errors import class_and_line
from rayfed.sweeps import on_tune
from rayfed.sweeps.plan import Trial, check_trials, expand, make_trials, trial_folder
from rayfed.tasks.data.federation import Federation
from rayfed.tracking import Table


def decisions(out: Path) -> list[dict[str, Any]]:
    """The lines of search.jsonl."""
    return [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[Path, int]:
    """Every file below the folder, and when it was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The lines of sweep.jsonl."""
    return [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]


def folded_width(table: Table) -> int:
    """The width of the table on a terminal that folds headings between their words."""
    columns = zip(table.columns, *table.rows, strict=True)
    widths = [max(map(len, (*head.split(), *cells)), default=0) for head, *cells in columns]
    return sum(widths) + 2 * (len(widths) - 1)


def statuses(out: Path) -> dict[str, str]:
    """The status of every trial."""
    return {row["trial"]: row["status"] for row in read_rows(out)}


def run_in_process(trial: Trial, out: Path, federation: Federation | None = None, start: str | None = None) -> str:
    """Runs the trial in this process, as that of a trial does. Returns the reason if it fails, else an empty text."""
    federation = federation or on_tune.load_federation(trial.experiment, {})
    try:
        rounds = on_tune.run_trial(trial.experiment, trial_folder(out, trial.name), federation, start=start)
        with closing(rounds):
            for _ in rounds:
                pass
    except Exception as error:
        return class_and_line(error)
    return ""


def planned(path: Path, *overrides: str) -> tuple[list[Trial], dict[str, Federation]]:
    """(trials, federations) of a sweep file without a search."""
    settings, sweep = load_sweep(path, overrides)
    trials = make_trials(settings, expand(sweep, settings.get("seed", 0)))
    return trials, check_trials(trials, sweep)
