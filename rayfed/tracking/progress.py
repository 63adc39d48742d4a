"""The console on a terminal: a progress bar with events and other output above it. Only this module knows rich."""

from __future__ import annotations

import sys
import time
from typing import TextIO

import rich.table
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from rayfed.tracking.console import clock
from rayfed.tracking.sinks import RunInfo, Table

BESIDE_THE_BAR = 66  # columns that round, loss, accuracy, MB and time left take at their widest


class RichView:
    """Draws on `stream` as on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._mine = stream is sys.stdout  # then what others print, worker logs say, has to go above the bar
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._rounds = 0

    def header(self, lines: list[str], info: RunInfo) -> None:
        """Prints the lines and starts the bar below them."""
        for number, line in enumerate(lines):
            self._console.print(Text(line, style="bold" if number == 0 else "dim"))
        self._rounds = info.rounds
        self._progress = Progress(
            TextColumn("{task.fields[place]}", markup=False),
            BarColumn(bar_width=max(8, min(40, self._console.width - BESIDE_THE_BAR))),
            TextColumn("{task.fields[stats]}", markup=False),
            TextColumn("eta {task.fields[left]}", style="cyan", markup=False),
            console=self._console,
            redirect_stdout=self._mine,
            redirect_stderr=self._mine,
            refresh_per_second=2,
        )
        place, left = self._place(info.start), Countdown(None)
        self._task = self._progress.add_task(
            "", total=info.rounds, completed=info.start, place=place, stats="", left=left
        )
        self._progress.start()

    def row(self, at: int, cells: dict[str, str], eta: float) -> None:
        """Moves the bar to round `at`."""
        assert self._progress is not None, "start comes before the first round"
        stats = f"loss {cells['loss']}  accuracy {cells['accuracy']}  {cells['total MB']} MB"
        place, left = self._place(at), Countdown(eta)
        self._progress.update(self._task, completed=at, refresh=True, place=place, stats=stats, left=left)

    def note(self, text: str) -> None:
        """Prints above the bar."""
        self._console.print(Text(f"* {text}", style="yellow"))

    def table(self, table: Table) -> None:
        """Ends the bar and prints the table below it."""
        self.stop()
        grid = rich.table.Table(title=Text(table.title), title_justify="left")
        for number, name in enumerate(table.columns):
            # A narrow terminal folds a cell over two lines and never cuts it.
            grid.add_column(Text(name), justify="right" if number else "left", overflow="fold")
        for row in table.rows:
            grid.add_row(*map(Text, row))
        self._console.print(grid)

    def stop(self) -> None:
        """Ends the bar and gives the terminal back: its cursor, and stdout and stderr as they were."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _place(self, at: int) -> str:
        return f"round {at:>{len(str(self._rounds))}}/{self._rounds}"


class Countdown:
    """Time left that runs down between two rounds: it is written anew whenever the bar is drawn."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def __str__(self) -> str:
        return clock(None if self._end is None else max(0.0, self._end - time.monotonic()))
