"""The console of a sweep: the running trials, in a table that stays in place on a terminal, and every trial's end.

Elsewhere than on a terminal the table comes as lines, every 30 s. The time left of a trial is the median duration of
its last rounds times the number of its rounds left.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rayfed.tracking.console import RECENT, PlainView, on_terminal
from rayfed.tracking.format import clock, format_mb, format_mean
from rayfed.tracking.sinks import Table

if TYPE_CHECKING:
    from rich.live import Live

EVERY_S, REDRAWN_S = 30.0, 0.5
"""Seconds between two reports on the running trials: in lines, and in the table on a terminal."""


@contextmanager
def open_trials(mode: str, metric: str) -> Iterator[TrialsView]:
    """The console of a sweep, as `tracking.console` says: `auto`, `rich`, `plain` or `off`.

    At the end it shows the table `TrialsView.result`. ``metric`` is the key of metrics.jsonl that is shown.
    """
    live = None
    if on_terminal(mode, sys.stdout):
        from rich.live import Live  # loads slowly

        live = Live(auto_refresh=False, transient=True)
    with live or nullcontext():  # a live table replaces sys.stdout: lines go above the table
        shown = TrialsView(PlainView(io.StringIO() if mode == "off" else sys.stdout), metric, live)
        yield shown
    if mode != "off" and shown.result is not None:
        PlainView(sys.stdout).table(shown.result)  # on stdout itself, which folds no lines


class TrialsView:
    """Shows trials. Lines go to ``view``. ``live``: the table of running trials on a terminal."""

    def __init__(self, view: PlainView, metric: str, live: Live | None = None) -> None:
        self.view, self.note, self.metric, self.live = view, view.note, metric, live
        self.result: Table | None = None
        """The table of the sweep, set when the sweep has ended."""
        self._running: dict[str, dict[str, Any]] = {}  # the last record of each running trial, and its seconds
        self._shown = 0.0

    def start(self, name: str, rounds: int) -> None:
        """The trial's process begins its work, or goes on after a pause."""
        self._running.setdefault(name, {"round": 0, "rounds": rounds, "seconds": deque(maxlen=RECENT)})

    def round(self, name: str, record: Mapping[str, Any]) -> None:
        """The trial has finished a round."""
        if name in self._running and "round" in record:
            self._running[name] |= {key: record[key] for key in ("round", "bytes/total", self.metric) if key in record}
            self._running[name]["seconds"].append(record["time/round_s"])

    def end(self, row: Mapping[str, Any], ended: int, trials: int) -> None:
        """The trial of this row of sweep.jsonl has ended, as so many of all ``trials``."""
        self._running.pop(row["trial"], None)
        stopped = row.get("stopped")
        metric = format_mean((stopped or row).get("metric"), None, self.metric)
        result = row["error"] or f"{self.metric} {metric}"
        if stopped:
            result = f"after round {stopped['round']} ({result})"
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
