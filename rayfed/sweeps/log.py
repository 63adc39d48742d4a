"""The log of a sweep: sweep.jsonl, table.txt and the console, made from the trials' directories."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from rayfed.config.sweep import Sweep
from rayfed.files import atomic_write
from rayfed.sweeps.plan import Trial
from rayfed.sweeps.progress import RunningTrials
from rayfed.sweeps.table import (
    NOT_SELECTED,
    STOPPED,
    UNFINISHED,
    TrialRow,
    format_mb,
    format_mean,
    selected_trials,
    trial_row,
)  # fmt: skip
from rayfed.tracking import Table
from rayfed.tracking.console import PlainView
from rayfed.tracking.jsonl import to_line

MakeTable = Callable[[Mapping[str, TrialRow]], Table]


class SweepLog:
    """One row for each trial, and the table of the rows.

    ``on_trial_end`` is called with every trial that has ended, after its outcome and its row are written.
    """

    def __init__(
        self, out: Path, sweep: Sweep, view: PlainView, make_table: MakeTable,
        on_trial_end: Callable[[Trial], object] | None = None,
    ) -> None:  # fmt: skip
        self.out, self.sweep, self.view, self.make_table, self.on_trial_end = out, sweep, view, make_table, on_trial_end
        self.trials: dict[str, Trial] = {}
        self.rows: dict[str, TrialRow] = {}
        self.progress = RunningTrials(view, sweep.metric)

    def set_trials(self, trials: Iterable[Trial]) -> None:
        """Replaces the trials, in this order; reads their rows from the directories."""
        trials = list(trials)
        self.trials = {trial.name: trial for trial in trials}
        self.rows = {trial.name: trial_row(self.out, trial, self.sweep) for trial in trials}
        self.write()

    def add(self, trial: Trial) -> None:
        """Adds a trial, or its new settings."""
        self.trials[trial.name] = trial
        self.rows[trial.name] = trial_row(self.out, trial, self.sweep)

    def trial_ended(self, trial: Trial) -> None:
        """Reads the row of the trial again and shows it."""
        self.add(trial)
        self.progress.end(trial.name)
        self.write()
        row = self.rows[trial.name]
        self.event(f"[{self.ended}/{len(self.rows)}] {row['status']} {trial.name}: {self._result(row)}")
        if self.on_trial_end:
            self.on_trial_end(trial)

    @property
    def ended(self) -> int:
        """How many trials have ended."""
        return sum(row["status"] != UNFINISHED for row in self.rows.values())

    def show_progress(self) -> None:
        """Shows the running trials from time to time."""
        self.progress.show(self.ended, len(self.rows))

    def select(self) -> list[Trial]:
        """The trials with the best tuned values. Of the others, those that have not ended are marked."""
        selected = selected_trials(list(self.trials.values()), self.rows, self.sweep)
        for name in self.rows.keys() - {trial.name for trial in selected}:
            if self.rows[name]["status"] == UNFINISHED:
                self.rows[name]["status"] = NOT_SELECTED
        self.write()
        return selected

    def event(self, text: str) -> None:
        """Shows the text on the console."""
        self.view.note(text)

    def write(self) -> Table:
        """Writes both files. Returns the table."""
        atomic_write(self.out / "sweep.jsonl", "".join(f"{to_line(row)}\n" for row in self.rows.values()))
        table = self.make_table(self.rows)
        page = io.StringIO()
        PlainView(page).table(table)
        atomic_write(self.out / "table.txt", page.getvalue().lstrip("\n"))
        return table

    def _result(self, row: TrialRow) -> str:
        key = self.sweep.metric
        if row["status"] == STOPPED:
            stopped = row["stopped"]
            return f"after round {stopped['round']} ({key} {format_mean(stopped['metric'], None, key)})"
        if row["error"]:
            return str(row["error"])
        metric, size = format_mean(row.get("metric"), None, key), format_mb(row.get("bytes") or 0, 2)
        return f"{key} {metric}, {size} MB, {row.get('seconds') or 0:.1f} s"
