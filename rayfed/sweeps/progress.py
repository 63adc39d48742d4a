"""A sweep on the console: its running trials, in a table that stays in place on a terminal, and every trial's end."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rayfed.sweeps.plan import STOPPED, Trial
from rayfed.sweeps.table import TrialRow
from rayfed.tracking import Table
from rayfed.tracking.console import RECENT, PlainView
from rayfed.tracking.format import clock, format_mb, format_mean

if TYPE_CHECKING:
    from rich.live import Live

EVERY_S, REDRAWN_S = 30.0, 0.5
"""Seconds between two reports on the running trials: in lines, and in the table on a terminal."""


class Progress:
    """Lines go to ``view``. ``metric`` is the key that is shown. ``live``: the table on a terminal."""

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
