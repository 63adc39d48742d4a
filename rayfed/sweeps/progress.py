"""The running trials of a sweep on the console: a table that stays in place on a terminal, lines everywhere else."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rayfed.sweeps.plan import Trial
from rayfed.sweeps.table import format_mb, format_mean
from rayfed.tracking import Table
from rayfed.tracking.console import RECENT, PlainView
from rayfed.tracking.format import clock

if TYPE_CHECKING:
    from rich.live import Live

EVERY_S = 30.0
"""Seconds between two reports in lines."""


class RunningTrials:
    """What is known of the running trials. `show` is called often; it decides whether to write. ``metric``: its key."""

    def __init__(self, view: PlainView, metric: str) -> None:
        self.view, self.metric = view, metric
        self.live: Live | None = None
        self._trials: dict[str, _Running] = {}
        self._shown = float("-inf")
        self._changed = False

    def start(self, trial: Trial) -> None:
        """The trial's process begins its work, or goes on after a pause."""
        self._trials.setdefault(trial.name, _Running(trial.experiment.server.rounds))

    def round(self, name: str, record: Mapping[str, Any]) -> None:
        """The trial has finished a round."""
        if name in self._trials and "round" in record:
            self._trials[name].add(record, self.metric)
            self._changed = True

    def end(self, name: str) -> None:
        """The trial has ended."""
        self._trials.pop(name, None)

    def show(self, ended: int, trials: int) -> None:
        """Shows the running trials. So many of all ``trials`` have ``ended``."""
        if self.live is not None:
            from rayfed.tracking.progress import rich_table

            self.live.update(rich_table(self.table(ended, trials)), refresh=True)
        elif self._changed and time.monotonic() - self._shown >= EVERY_S:
            table = self.table(ended, trials)
            self.view.note(table.title)
            for name, place, metric, size, eta in table.rows:
                self.view.note(f"  {name}: round {place}, {self.metric} {metric}, {size} MB, eta {eta}")
            self._shown, self._changed = time.monotonic(), False

    def table(self, ended: int, trials: int) -> Table:
        """One row a running trial."""
        rows = tuple((name, *own.cells(self.metric)) for name, own in self._trials.items())
        return Table(f"{ended} of {trials} trials have ended", ("running", "round", self.metric, "MB", "eta"), rows)


class _Running:
    """A running trial of so many ``rounds``."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.last: dict[str, Any] = {"round": 0}
        self.seconds: deque[float] = deque(maxlen=RECENT)

    def add(self, record: Mapping[str, Any], metric: str) -> None:
        keys = ("round", "bytes/total", metric)
        self.last |= {key: record[key] for key in keys if key in record}
        self.seconds.append(record.get("time/round_s", 0.0))

    def cells(self, metric: str) -> tuple[str, ...]:
        left = self.rounds - self.last["round"]
        return (
            f"{self.last['round']}/{self.rounds}",
            format_mean(self.last.get(metric), None, metric),
            format_mb(self.last.get("bytes/total"), 2),
            clock(statistics.median(self.seconds) * left) if self.seconds else "-",
        )
