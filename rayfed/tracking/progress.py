"""The console on a terminal: a progress bar, with events and other output above it; and tables drawn by rich."""

from __future__ import annotations

import sys
import time
from typing import Any, Literal, TextIO

import rich.table
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from rayfed.tracking.format import clock, round_of
from rayfed.tracking.layout import column_widths, folded
from rayfed.tracking.sinks import RunInfo, Table

TEXT_WIDTH = 66  # the largest width, in columns, of the texts beside the bar: round, loss, metric, MB, time left


class RichView:
    """Draws on ``stream`` as on a terminal. The methods are those of `PlainView`."""

    def __init__(self, stream: TextIO) -> None:
        self._metric = ""
        self._console = Console(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        redirect = stream is sys.stdout  # then rich prints the output of other code above the bar
        self._progress = Progress(
            TextColumn("{task.fields[place]}", markup=False),
            BarColumn(bar_width=max(8, min(40, self._console.width - TEXT_WIDTH))),
            TextColumn("{task.fields[stats]}", markup=False),
            TextColumn("eta {task.fields[left]}", style="cyan", markup=False),
            console=self._console,
            redirect_stdout=redirect,
            redirect_stderr=redirect,
            refresh_per_second=2,
        )

    def header(self, lines: list[str], info: RunInfo) -> None:
        """Prints the lines and starts the bar below them."""
        for number, line in enumerate(lines):
            self._console.print(Text(line, style="bold" if number == 0 else "dim"))
        place, self._metric = round_of(info.start, info.rounds), info.metric
        self._progress.add_task("", total=info.rounds, completed=info.start, place=place, stats="", left="-")
        self._progress.start()

    def row(self, number: int, cells: dict[str, str], eta: float) -> None:
        """Moves the bar to round ``number``. ``eta`` is the time left in seconds."""
        stats = f"loss {cells['loss']}  {self._metric} {cells['metric']}  {cells['total MB']} MB"
        fields: dict[str, Any] = {"place": cells["round"], "stats": stats, "left": Countdown(eta)}
        self._progress.update(TaskID(0), completed=number, refresh=True, **fields)

    def note(self, text: str) -> None:
        """Prints an event above the bar."""
        self._console.print(Text(f"* {text}", style="yellow"))

    def table(self, table: Table) -> None:
        """Ends the bar and prints the table below it."""
        self.stop()
        self._console.print(rich_table(table, self._console.width))

    def stop(self) -> None:
        """Ends the bar and restores the cursor, stdout and stderr."""
        self._progress.stop()


class Countdown:
    """The time left, as text. It runs down between two rounds, because rich formats it whenever it draws the bar."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def __str__(self) -> str:
        return clock(max(0.0, self._end - time.monotonic()))


def rich_table(table: Table, room: int) -> rich.table.Table:
    """The table for rich, at most ``room`` columns wide: cells are folded over several lines, never cut."""
    drawn = rich.table.Table(title=Text(table.title), title_justify="left")
    widths = column_widths(table, room - frame(table))
    for number, (name, width) in enumerate(zip(table.columns, widths, strict=True)):
        justify: Literal["left", "right"] = "right" if number else "left"
        drawn.add_column(_cell(name, width), justify=justify, width=width or None, overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(_cell, row, widths))
    return drawn


def frame(table: Table) -> int:
    """The columns that lines and spaces between the cells take."""
    return 3 * len(table.columns) + 1


def _cell(text: str, width: int) -> Text:
    return Text("\n".join(cell for (cell,) in folded((text,), (width,))))
