"""`events.log`: what happened and when, one stamped line each. It is appended to; a resumed run continues it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from rayfed.tracking.sinks import Record, RunInfo, Scalar, Table


class EventSink:
    """Writes start, events, finish and an early end to `path`, each as `<ISO-8601 UTC> <text>`."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._running = False

    def start(self, info: RunInfo) -> None:
        """Logs the start, or where the run goes on."""
        self._running = True
        verb = f"resume after round {info.start}" if info.start else "start"
        facts = {"name": info.name, "digest": info.digest, "rounds": info.rounds, **info.facts}
        self.event(f"{verb}: {_listed(facts)}")

    def round(self, record: Record) -> None:
        """Rounds are in `metrics.jsonl`."""

    def event(self, text: str) -> None:
        """Logs the text; if it has several lines, as one."""
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
        line = f"{stamp}Z {' | '.join(part.strip() for part in text.splitlines() if part.strip())}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:  # opened for each line: events are rare, and an actor may die at any time
            if file.tell() and _last_byte(file) != b"\n":
                line = f"\n{line}"  # the process before this one died while it wrote
            file.write(line.encode())

    def finish(self, summary: Mapping[str, Scalar], table: Table | None) -> None:
        """Logs the results."""
        self._running = False
        self.event(f"finish: {_listed(summary)}")

    def close(self) -> None:
        """A run that closes without `finish` says so: the log's last line tells how the run ended."""
        if self._running:
            self._running = False
            self.event("stopped before the end")


def _listed(values: Mapping[str, Scalar]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, 2)
    return file.read(1)
