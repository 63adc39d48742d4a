"""`events.log`: what happened and when, one line per event. A resumed run appends to the same file."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from rayfed.files import named_errors, remove_path
from rayfed.tracking.sinks import Record, RunInfo, Sink, Table, scalars


class EventSink(Sink):
    """Appends the start, the events and the end of a run to ``path``, each as `<ISO-8601 UTC> <text>`."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._running = False

    def start(self, info: RunInfo) -> None:
        """Logs the start, or the round after which the run continues."""
        self._running = True
        verb = f"resume after round {info.start}" if info.start else "start"
        facts = {"name": info.name, "digest": info.digest, "rounds": info.rounds, **info.facts}
        self.event(f"{verb}: {_listed(facts)}")

    def event(self, text: str) -> None:
        """Logs the text as one line; ` | ` separates its own lines."""
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
        line = f"{stamp}Z {' | '.join(part.strip() for part in text.splitlines() if part.strip())}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with named_errors(self.path):
            if self.path.is_symlink() or not self.path.is_file():
                remove_path(self.path)  # to write through a planted link would change a foreign file
            with self.path.open("a+b") as file:  # opened per event: events are rare, and an actor may die at any time
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        line = f"\n{line}"  # the previous process died while it wrote
                file.write(line.encode())

    def finish(self, summary: Record, table: Table | None) -> None:
        """Logs the scalars of the summary."""
        self._running = False
        self.event(f"finish: {_listed(summary)}")

    def close(self) -> None:
        """Logs an early end, if `finish` was not called. So the last line tells how the run ended."""
        if self._running:
            self._running = False
            self.event("stopped before the end")


def _listed(values: Record) -> str:
    return ", ".join(f"{key} {value}" for key, value in scalars(values).items())
