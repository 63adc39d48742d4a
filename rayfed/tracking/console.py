"""The console: a progress bar on a terminal, one line a round everywhere else.

Both show the same things: a header, the rounds, events, a closing table. MB are 1e6 bytes. The time left is the median
of the last rounds times the rounds to go, so one slow evaluation or a replaced worker does not throw it off. Accuracy
is the last that was measured. Nothing is wider than 80 columns unless a name, a path or the closing table is.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import textwrap
import time
from collections import deque
from collections.abc import Mapping
from typing import Literal, Protocol, TextIO

from rayfed.tracking.sinks import Record, RunInfo, Scalar, Table

WIDTH = 80
RECENT = 9  # rounds the time left is judged by
HEADING_EVERY = 20  # rounds between two lines of column names: in a shared log the first has long scrolled away
COLUMNS = (("loss", 9), ("accuracy", 10), ("down MB", 9), ("up MB", 8), ("total MB", 10), ("seconds", 9), ("eta", 9))


class View(Protocol):
    """How the console writes: plain lines, or rich."""

    def header(self, lines: list[str], info: RunInfo) -> None:
        """The lines before the first round."""

    def row(self, at: int, cells: dict[str, str], eta: float) -> None:
        """Round `at` is done; `cells` are the texts of COLUMNS, `eta` the seconds left."""

    def note(self, text: str) -> None:
        """An event."""

    def table(self, table: Table) -> None:
        """The results."""

    def stop(self) -> None:
        """Nothing more will come."""


class ConsoleSink:
    """Shows a run to the person who started it. `auto`: rich on a terminal, else plain; writes to stdout by default."""

    def __init__(self, mode: Literal["auto", "rich", "plain", "off"] = "auto", stream: TextIO | None = None) -> None:
        self._view = _view(mode, sys.stdout if stream is None else stream)
        self._rounds = 0
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._known: dict[str, float] = {}
        self._clock = time.monotonic()

    def start(self, info: RunInfo) -> None:
        """Shows what is about to run."""
        self._rounds = info.rounds
        self._clock = time.monotonic()
        if self._view:
            self._view.header(header(info), info)

    def round(self, record: Record) -> None:
        """Shows the round. What is missing shows as `-`, and keys the console has no place for do not show."""
        now = time.monotonic()
        passed, self._clock = now - self._clock, now
        values = {key: number for key, value in record.items() if (number := _number(value)) is not None}
        seconds = values.get("time/round_s", passed)
        self._seconds.append(seconds)
        self._known |= {key: values[key] for key in ("eval/accuracy", "test/accuracy") if key in values}
        at = int(values.get("round", 0))
        eta = statistics.median(self._seconds) * max(self._rounds - at, 0)
        cells = {
            "loss": loss(values.get("train/loss")),
            "accuracy": percent(self._known.get("eval/accuracy", self._known.get("test/accuracy"))),
            "down MB": megabytes(values.get("bytes/down")),
            "up MB": megabytes(values.get("bytes/up")),
            "total MB": megabytes(values.get("bytes/total")),
            "seconds": f"{seconds:.1f}" if seconds < 1000 else f"{seconds:.0f}",
            "eta": clock(eta),
        }
        if self._view:
            self._view.row(at, cells, eta)

    def event(self, text: str) -> None:
        """Shows the event."""
        if self._view:
            self._view.note(text)

    def finish(self, summary: Mapping[str, Scalar], table: Table | None) -> None:
        """Shows the table; without one, the summary as a table."""
        rows = tuple((key, short(value)) for key, value in summary.items() if value is not None)
        if self._view:
            self._view.table(table or Table("summary", ("", "value"), rows))

    def close(self) -> None:
        """Gives the terminal back."""
        if self._view:
            self._view.stop()


class PlainView:
    """Lines of text, for logs, pipes and jobs that run elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rounds = 0
        self._rows = 0

    def header(self, lines: list[str], info: RunInfo) -> None:
        """Writes the lines as they are."""
        self._rounds = info.rounds
        for line in lines:
            self._write(line)

    def row(self, at: int, cells: dict[str, str], eta: float) -> None:
        """One line of aligned cells, now and then below a line with their names."""
        place = f"round {at:>{len(str(self._rounds))}}/{self._rounds}"
        if self._rows % HEADING_EVERY == 0:
            self._write(" " * len(place) + "".join(f"{name:>{width}}" for name, width in COLUMNS))
        self._rows += 1
        self._write(place + "".join(f"{cells[name]:>{width}}" for name, width in COLUMNS))

    def note(self, text: str) -> None:
        """Marked with a star, so that it stands out from the rounds."""
        self._write(f"* {text}")

    def table(self, table: Table) -> None:
        """Aligned columns: the first to the left, the others, mostly numbers, to the right."""
        self._write("")
        self._write(table.title)
        widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
        for row in (table.columns, tuple("-" * width for width in widths), *table.rows):
            first, rest = f"{row[0]:<{widths[0]}}", zip(row[1:], widths[1:], strict=True)
            self._write((first + "".join(f"  {cell:>{width}}" for cell, width in rest)).rstrip())

    def stop(self) -> None:
        """Nothing is held."""

    def _write(self, line: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        # A name this stream cannot spell is no reason to lose a run.
        print(line.encode(encoding, "replace").decode(encoding), file=self._stream, flush=True)


def header(info: RunInfo) -> list[str]:
    """What the console says before the first round."""
    rounds = f"{info.rounds} rounds" + (f", continuing after round {info.start}" if info.start else "")
    facts = [f"{name} {short(value)}" for name, value in info.facts.items() if value is not None]
    words = ", ".join(fact.replace(" ", "\0") for fact in facts)  # so that a line ends between facts, never inside one
    lines = textwrap.wrap(words, WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"{info.name}: {rounds}, digest {info.digest}", f"out {info.out}", *(s.replace("\0", " ") for s in lines)]


def loss(value: float | None) -> str:
    """`1.234`."""
    return "-" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:.1e}"


def percent(value: float | None) -> str:
    """`71.2 %` from 0.712."""
    return "-" if value is None else f"{100 * value:.1f} %"


def megabytes(count: float | None) -> str:
    """Bytes as MB (1e6 bytes) with two or three digits that mean something."""
    if count is None:
        return "-"
    size = count / 1e6
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 or size == 0 else 4
    return f"{size:.{digits}f}"


def clock(seconds: float | None) -> str:
    """`0:31`, `12:05`, `1:02:03`, and from 100 hours on `4d 12h`."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short(value: Scalar) -> str:
    """`1,234,567`, `0.7123`, or the text itself."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: Scalar) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _view(mode: str, stream: TextIO) -> View | None:
    if mode == "off":
        return None
    if mode == "rich" or (mode == "auto" and stream.isatty() and os.environ.get("TERM") != "dumb"):
        from rayfed.tracking.progress import RichView  # rich takes a while to load, and jobs elsewhere never need it

        return RichView(stream)
    return PlainView(stream)
