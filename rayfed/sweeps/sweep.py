"""A sweep from its file to its table: first every check, then the trials that have not ended, then the results.

The sweep's directory holds `sweep.yaml` (the file with all overrides), `trials/NAME/` (each an ordinary run directory),
`sweep.jsonl` (one line a trial) and `table.txt`. A search adds `search.jsonl` with its decisions. A sweep may be killed
at any moment: `resume` repeats no finished trial, continues the others from their own checkpoints, and runs failed
trials again. The file may have gained or lost trials in between. It may not have changed a trial that has a directory.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfed.config.parse import dump_settings
from rayfed.config.sweep import load_sweep
from rayfed.errors import RunError
from rayfed.files import PARTIAL, atomic_write, remove_path
from rayfed.run_directory import check_out, disk_errors, locked_out
from rayfed.sweeps.plan import NOT_SELECTED, STOPPED, Trial
from rayfed.sweeps.search import build_search
from rayfed.sweeps.table import TrialRow
from rayfed.tracking import Table
from rayfed.tracking.console import RECENT, PlainView
from rayfed.tracking.format import clock, format_mb, format_mean

if TYPE_CHECKING:
    from rich.live import Live

EVERY_S, REDRAWN_S = 30.0, 0.5
"""Seconds between two reports on the running trials: in lines, and in the table on a terminal."""


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: its directory, the rows of sweep.jsonl, the table."""

    out: Path
    rows: list[TrialRow]
    table: Table

    @property
    def failed(self) -> list[TrialRow]:
        """The rows of trials that should have finished, but did not."""
        return [row for row in self.rows if row["status"] not in ("done", NOT_SELECTED, STOPPED)]


def run_sweep(
    path: str | Path, overrides: Sequence[str] = (), out: str | Path | None = None, resume: bool = False,
    on_trial_end: Callable[[Trial], object] | None = None,
) -> SweepResult:  # fmt: skip
    """Runs the sweep in the file at ``path`` to its end. A failed trial is recorded, and the others continue.

    ``out`` (default `runs/NAME-TIME`) must be empty or absent unless ``resume``. ``on_trial_end`` is called with every
    trial that has ended, after its row is written. Raises UserError, before anything is started or written, where a
    trial is wrong or another process runs the sweep.
    """
    settings, sweep = load_sweep(path, overrides)
    with locked_out(out, str(settings.get("name", "sweep")), resume) as folder:
        out = folder.resolve()
        check_out(out, resume, "sweep", "sweep.yaml")
        search = build_search(settings, sweep, out)
        mode = str((settings.get("tracking") or {}).get("console", "auto"))
        with disk_errors(out), _console(mode) as (view, live):
            for leftover in (*out.glob(PARTIAL), *out.glob(f"trials/{PARTIAL}")):  # a trial's own run removes the rest
                remove_path(leftover)
            atomic_write(out / "sweep.yaml", dump_settings({**settings, "sweep": sweep.model_dump(mode="json")}))
            search.progress = Progress(view, sweep.metric, live)
            search.on_trial_end = on_trial_end or search.on_trial_end
            search.run()
            table = search.table()
        if mode != "off":  # now on stdout itself, which folds no lines
            PlainView(sys.stdout).table(table)
    return SweepResult(out, list(search.rows.values()), table)


@contextmanager
def _console(mode: str) -> Iterator[tuple[PlainView, Live | None]]:
    """(where lines go, the table that stays in place below them): a terminal has both, as `tracking.console` says."""
    if mode == "rich" or (mode == "auto" and sys.stdout.isatty()):
        from rich.live import Live  # loads slowly

        with Live(auto_refresh=False, transient=True) as live:
            yield PlainView(sys.stdout), live  # `live` has replaced sys.stdout: lines go above the table
    else:
        yield PlainView(io.StringIO() if mode == "off" else sys.stdout), None


def check_failed(result: SweepResult) -> None:
    """RunError if a trial did not finish: then the command's exit code is 1."""
    if result.failed:
        raise RunError(
            f"{len(result.failed)} of {len(result.rows)} trials did not finish; --resume tries them again "
            f"({result.out / 'sweep.jsonl'} says why)"
        )


class Progress:
    """The running trials on the console, in a table that stays in place on a terminal, and every trial's end.

    Lines go to ``view``. ``metric`` is the key that is shown. ``live``: the table on a terminal.
    """

    def __init__(self, view: PlainView, metric: str, live: Live | None = None) -> None:
        self.view, self.note, self.metric, self.live = view, view.note, metric, live
        self._running: dict[str, dict[str, Any]] = {}  # the last record of each running trial, and its seconds
        self._shown = 0.0

    def start(self, trial: Trial) -> None:
        """The trial's process begins its work, or goes on after a pause."""
        new = {"round": 0, "rounds": trial.experiment.server.rounds, "seconds": deque(maxlen=RECENT)}
        self._running.setdefault(trial.name, new)

    def round(self, name: str, record: Mapping[str, Any]) -> None:
        """The trial has finished a round."""
        if name in self._running and "round" in record:
            self._running[name] |= {key: record[key] for key in ("round", "bytes/total", self.metric) if key in record}
            self._running[name]["seconds"].append(record["time/round_s"])

    def end(self, row: TrialRow, ended: int, trials: int) -> None:
        """The trial of this row has ended, as so many of all ``trials``."""
        self._running.pop(row["trial"], None)
        metric = format_mean((row.get("stopped") or row).get("metric"), None, self.metric)
        result = row["error"] or f"{self.metric} {metric}"
        if row["status"] == STOPPED:
            result = f"after round {row['stopped']['round']} ({result})"
        elif not row["error"]:
            result += f", {format_mb(row['bytes'], 2)} MB, {row['seconds']:.1f} s"
        self.note(f"[{ended}/{trials}] {row['status']} {row['trial']}: {result}")

    def show(self, ended: int, trials: int) -> None:
        """Shows the running trials, unless that was done a moment ago. So many of all ``trials`` have ``ended``."""
        now = time.monotonic()
        if not self._running or now - self._shown < (EVERY_S if self.live is None else REDRAWN_S):
            return
        self._shown, table = now, self.table(ended, trials)
        if self.live is not None:
            from rayfed.tracking.progress import rich_table

            self.live.update(rich_table(table, self.live.console.width), refresh=True)
            return
        self.note(table.title)
        for name, place, metric, size, eta in table.rows:
            self.note(f"  {name}: round {place}, {self.metric} {metric}, {size} MB, eta {eta}")

    def table(self, ended: int, trials: int) -> Table:
        """One row a running trial."""
        rows = []
        for name, last in self._running.items():
            left = last["rounds"] - last["round"]
            eta = clock(statistics.median(last["seconds"]) * left) if last["seconds"] else "-"
            metric, size = format_mean(last.get(self.metric), None, self.metric), format_mb(last.get("bytes/total"), 2)
            rows.append((name, f"{last['round']}/{last['rounds']}", metric, size, eta))
        title = f"{ended} of {trials} trials have ended"
        return Table(title, ("running", "round", self.metric, "MB", "eta"), tuple(rows))
