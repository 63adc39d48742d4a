"""The books of a sweep: sweep.jsonl and table.txt, kept true to what the trials' directories say."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfed.config.sweep import Sweep
from rayfed.files import atomic_write
from rayfed.sweeps.plan import Trial
from rayfed.sweeps.table import NOT_CHOSEN, STOPPED, UNFINISHED, TrialRow, chosen, line_of, spread, table_of
from rayfed.sweeps.trial import outcome, record_of
from rayfed.tasks.data.federation import Federation
from rayfed.tracking import Table
from rayfed.tracking.console import PlainView
from rayfed.tracking.jsonl import to_line

Tabulate = Callable[[Sequence[Trial], Sequence[TrialRow], Sweep], Table]


class SweepLog:
    """A line for each trial that is known, and the table of them; says what happened. A listener of `run_on_tune`."""

    def __init__(
        self, out: Path, trials: Sequence[Trial], sweep: Sweep, view: PlainView, tabulate: Tabulate = table_of
    ) -> None:
        self.out, self.sweep, self.view, self.tabulate = out, sweep, view, tabulate
        self.trials: dict[str, Trial] = {}
        self.lines: dict[str, TrialRow] = {}
        self.know(trials)

    def know(self, trials: Sequence[Trial]) -> None:
        """Reads the lines of these trials, in this order; of others nothing is known any more."""
        self.trials = {trial.name: trial for trial in trials}
        self.lines = {trial.name: line_of(self.out, trial, self.sweep) for trial in trials}
        self.write()

    def settled(self, name: str) -> None:
        """The trial has ended: its line is read anew, and told."""
        line = self.lines[name] = line_of(self.out, self.trials[name], self.sweep)
        self.write()
        ended = sum(line["status"] != UNFINISHED for line in self.lines.values())
        self.say(f"[{ended}/{len(self.lines)}] {line['status']} {name}: {_told(line, self.sweep)}")

    def choose(self) -> list[Trial]:
        """The trials whose tuned values won; what has not run of the others is marked: it need not."""
        best = chosen(list(self.trials.values()), self.lines, self.sweep)
        for name in self.lines.keys() - {trial.name for trial in best}:
            if self.lines[name]["status"] == UNFINISHED:
                self.lines[name] = self.lines[name] | {"status": NOT_CHOSEN}
        self.write()
        return best

    def say(self, text: str) -> None:
        """Tells what happened."""
        self.view.note(text)

    def write(self) -> Table:
        """Writes both files and returns the table."""
        lines = list(self.lines.values())
        atomic_write(self.out / "sweep.jsonl", "".join(f"{to_line(line)}\n" for line in lines))
        table = self.tabulate(list(self.trials.values()), lines, self.sweep)
        page = io.StringIO()
        PlainView(page).table(table)
        atomic_write(self.out / "table.txt", page.getvalue().lstrip("\n"))
        return table


def to_run(out: Path, trials: Sequence[Trial]) -> list[Trial]:
    """Those that have not ended, and those that failed, whose records are removed."""
    todo = []
    for trial in trials:
        ended = outcome(out, trial)
        if ended is None or ended.status == "failed":
            record_of(out, trial).unlink(missing_ok=True)
            todo.append(trial)
    return todo


def run_trials(
    trials: Sequence[Trial], sweep: Sweep, out: Path, federations: Mapping[str, Federation], books: SweepLog
) -> None:
    """Runs them on Ray Tune; without any, Ray is not even loaded."""
    if trials:
        from rayfed.sweeps.on_tune import run_on_tune

        run_on_tune(trials, sweep, out, federations, books)


def _told(line: Mapping[str, Any], sweep: Sweep) -> str:
    if line["status"] == STOPPED:
        return f"after round {line['stopped']['round']} ({sweep.metric} {_figure(line['stopped'], sweep)})"
    if line["error"]:
        return str(line["error"])
    size, seconds = line.get("bytes") or 0, line.get("seconds") or 0
    return f"{sweep.metric} {_figure(line, sweep)}, {size / 1e6:.2f} MB, {seconds:.1f} s"


def _figure(line: Mapping[str, Any], sweep: Sweep) -> str:
    return spread(line.get("metric"), None, sweep.metric)
