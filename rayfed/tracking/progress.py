"""The console on a terminal: a progress bar, with events and other output above it; and tables drawn by rich."""

from __future__ import annotations

import sys
import time
from typing import TextIO

import rich.table
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from rayfed.tracking.format import clock, round_of
from rayfed.tracking.sinks import RunInfo, Table

TEXT_WIDTH = 66  # the largest width, in columns, of the texts beside the bar: round, loss, accuracy, MB, time left


class RichView:
    """Draws on ``stream`` as on a terminal. The methods are those of `PlainView`."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._redirect = stream is sys.stdout  # then rich prints the output of other code above the bar
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
            BarColumn(bar_width=max(8, min(40, self._console.width - TEXT_WIDTH))),
            TextColumn("{task.fields[stats]}", markup=False),
            TextColumn("eta {task.fields[left]}", style="cyan", markup=False),
            console=self._console,
            redirect_stdout=self._redirect,
            redirect_stderr=self._redirect,
            refresh_per_second=2,
        )
        place, left = round_of(info.start, info.rounds), Countdown(None)
        self._task = self._progress.add_task(
            "", total=info.rounds, completed=info.start, place=place, stats="", left=left
        )
        self._progress.start()

    def row(self, number: int, cells: dict[str, str], eta: float) -> None:
        """Moves the bar to round ``number``. ``eta`` is the time left in seconds."""
        assert self._progress is not None, "start comes before the first round"
        stats = f"loss {cells['loss']}  accuracy {cells['accuracy']}  {cells['total MB']} MB"
        place, left = round_of(number, self._rounds), Countdown(eta)
        self._progress.update(self._task, completed=number, refresh=True, place=place, stats=stats, left=left)

    def note(self, text: str) -> None:
        """Prints an event above the bar."""
        self._console.print(Text(f"* {text}", style="yellow"))

    def table(self, table: Table) -> None:
        """Ends the bar and prints the table below it."""
        self.stop()
        self._console.print(rich_table(table))

    def stop(self) -> None:
        """Ends the bar and restores the cursor, stdout and stderr."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Countdown:
    """The time left, as text. It runs down between two rounds, because rich formats it whenever it draws the bar."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def __str__(self) -> str:
        return clock(None if self._end is None else max(0.0, self._end - time.monotonic()))


def rich_table(table: Table) -> rich.table.Table:
    """The table for rich. On a narrow terminal a cell is folded over several lines and never cut."""
    drawn = rich.table.Table(title=Text(table.title), title_justify="left")
    for number, name in enumerate(table.columns):
        drawn.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn
