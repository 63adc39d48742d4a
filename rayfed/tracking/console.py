"""The console: a progress bar on a terminal, one line per round everywhere else.

Both show the same things: a header, the rounds, the events and a final table. The time left is the median duration of
the last rounds times the number of rounds left: one slow round hardly changes a median. The metric is the task's own,
such as the accuracy, when it was measured last. Lines have at most 80 columns, except for long names, long paths and
the final table.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import textwrap
from collections import deque
from typing import TYPE_CHECKING, Literal, TextIO

from rayfed.tracking.format import clock, loss, megabytes, percent, round_of, short
from rayfed.tracking.layout import column_widths, folded, room
from rayfed.tracking.sinks import Record, RunInfo, Sink, Table, scalars

if TYPE_CHECKING:
    from rayfed.tracking.progress import RichView

WIDTH = 80
GAP = "  "  # between the columns of a table
RECENT = 9  # rounds in the median of the time left
HEADING_EVERY = 20  # rounds between two lines of column names, so that a long log shows them again
COLUMNS = (("loss", 9), ("metric", 10), ("down MB", 9), ("up MB", 8), ("total MB", 10), ("seconds", 9), ("eta", 9))


class ConsoleSink(Sink):
    """Shows a run on ``stream`` (default: stdout). `auto` is `rich` on a terminal, else `plain`."""

    def __init__(self, mode: Literal["auto", "rich", "plain"] = "auto", stream: TextIO | None = None) -> None:
        self._view = _view(mode, sys.stdout if stream is None else stream)
        self._rounds = 0
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._metric = ""
        self._measured: dict[str, float] = {}

    def start(self, info: RunInfo) -> None:
        """Shows the header."""
        self._rounds, self._metric = info.rounds, info.metric
        self._view.header(header(info), info)

    def round(self, record: Record) -> None:
        """Shows the round. A missing value is `-`. Keys without a column are left out."""
        values = {key: float(value) for key, value in record.items() if isinstance(value, int | float)}
        number, seconds = int(values["round"]), values["time/round_s"]
        self._seconds.append(seconds)
        keys = f"eval/{self._metric}", f"test/{self._metric}"
        self._measured |= {key: values[key] for key in keys if key in values}
        eta = statistics.median(self._seconds) * max(self._rounds - number, 0)
        cells = {
            "round": round_of(number, self._rounds),
            "loss": loss(values.get("train/loss")),
            "metric": percent(next((self._measured[key] for key in keys if key in self._measured), None)),
            "down MB": megabytes(values.get("bytes/down")),
            "up MB": megabytes(values.get("bytes/up")),
            "total MB": megabytes(values.get("bytes/total")),
            "seconds": f"{seconds:.1f}" if seconds < 1000 else f"{seconds:.0f}",
            "eta": clock(eta),
        }
        self._view.row(number, cells, eta)

    def event(self, text: str) -> None:
        """Shows the event."""
        self._view.note(text)

    def finish(self, summary: Record, table: Table | None) -> None:
        """Shows the table. Without a table, shows the scalars of the summary."""
        rows = tuple((key, short(value)) for key, value in scalars(summary).items())
        self._view.table(table or Table("summary", ("", "value"), rows))

    def close(self) -> None:
        """Ends the progress bar."""
        self._view.stop()


class PlainView:
    """Lines of text, for logs, pipes and remote jobs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rows = 0
        self._metric = ""

    def header(self, lines: list[str], info: RunInfo) -> None:
        """Writes the lines that come before the first round."""
        self._metric = info.metric
        for line in lines:
            self._write(line)

    def row(self, number: int, cells: dict[str, str], eta: float) -> None:
        """One line for round ``number``: ``cells`` has a text for `round` and each of COLUMNS.

        Repeats the column names at times. ``eta`` is the time left in seconds, which the plain view shows as
        a cell only.
        """
        place = cells["round"]
        if self._rows % HEADING_EVERY == 0:
            names = ((self._metric[: width - 1] if name == "metric" else name, width) for name, width in COLUMNS)
            self._write(" " * len(place) + "".join(f"{name:>{width}}" for name, width in names))
        self._rows += 1
        self._write(place + "".join(f"{cells[name]:>{width}}" for name, width in COLUMNS))

    def note(self, text: str) -> None:
        """Writes an event, marked with a star."""
        self._write(f"* {text}")

    def table(self, table: Table) -> None:
        """Writes aligned columns: the first to the left; the others, mostly numbers, to the right.

        The table is at most as wide as `room` says.
        """
        width = room(self._stream)
        widths = column_widths(table, width - len(GAP) * (len(table.columns) - 1))
        self._write("")
        self._write(textwrap.fill(table.title, width))
        for row in (table.columns, tuple("-" * width for width in widths), *table.rows):
            for first, *rest in folded(row, widths):
                cells = [f"{first:<{widths[0]}}", *map(str.rjust, rest, widths[1:])]
                self._write(GAP.join(cells).rstrip())

    def stop(self) -> None:
        """Does nothing: a plain view has nothing to release."""

    def _write(self, line: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        # A character that the stream cannot encode must not end the run.
        print(line.encode(encoding, "replace").decode(encoding), file=self._stream, flush=True)


def plain_text(table: Table) -> str:
    """The table as a `PlainView` writes it into a file."""
    page = io.StringIO()
    PlainView(page).table(table)
    return page.getvalue().lstrip("\n")


def header(info: RunInfo) -> list[str]:
    """The lines that the console shows before the first round."""
    rounds = f"{info.rounds} rounds" + (f", continuing after round {info.start}" if info.start else "")
    facts = [f"{name} {short(value)}" for name, value in scalars(info.facts).items()]
    words = ", ".join(fact.replace(" ", "\0") for fact in facts)  # so that lines break between facts, never inside one
    lines = textwrap.wrap(words, WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"{info.name}: {rounds}, digest {info.digest}", f"out {info.out}", *(s.replace("\0", " ") for s in lines)]


def on_terminal(mode: str, stream: TextIO) -> bool:
    """Whether the mode of `tracking.console` means a view that is redrawn in place."""
    return mode == "rich" or (mode == "auto" and stream.isatty() and os.environ.get("TERM") != "dumb")


def _view(mode: str, stream: TextIO) -> PlainView | RichView:
    if on_terminal(mode, stream):
        from rayfed.tracking.progress import RichView  # rich loads slowly, and plain runs do not need it

        return RichView(stream)
    return PlainView(stream)
