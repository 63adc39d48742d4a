"""What a run tells the world, and the one interface for listening to it.

A sink gets `start`, then a `round` for every finished round and an `event` whenever something happened, then `finish`;
`close` is always called, also after an error. Where a run is shown is never known to the code that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Scalar = float | int | str | None
Record = Mapping[str, Scalar]
"""One round: the keys of `metrics.jsonl`. `round` counts from 1; what was not measured is None or absent."""


@dataclass(frozen=True)
class RunInfo:
    """What is known when a run starts."""

    name: str
    out: Path
    digest: str
    config: Mapping[str, Any]
    rounds: int
    start: int = 0
    """Rounds already done: 0, or where a resumed run continues."""
    facts: Mapping[str, Scalar] = field(default_factory=dict)
    """Worth knowing, not worth a setting: population, clients without data, trainable parameters, ..."""


@dataclass(frozen=True)
class Table:
    """A small table of finished text. Every row has one cell a column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"{self.title}: a row lacks or adds a cell"


class Sink(Protocol):
    """Something that watches a run. Keys it does not know are no error."""

    def start(self, info: RunInfo) -> None:
        """The run begins, or continues after `info.start` rounds."""

    def round(self, record: Record) -> None:
        """A round is finished."""

    def event(self, text: str) -> None:
        """Something happened: a worker died and was replaced, the run stops early, ..."""

    def finish(self, summary: Mapping[str, Scalar], table: Table | None) -> None:
        """All rounds are done and these are the results."""

    def close(self) -> None:
        """Lets go of files, terminals and processes: after success, after errors, and a second time does nothing."""


class Fan:
    """A sink that passes everything on to several sinks, in order."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def start(self, info: RunInfo) -> None:
        """To all. A sink that fails stops it, here and below: what must be kept could not be."""
        for sink in self.sinks:
            sink.start(info)

    def round(self, record: Record) -> None:
        """To all."""
        for sink in self.sinks:
            sink.round(record)

    def event(self, text: str) -> None:
        """To all."""
        for sink in self.sinks:
            sink.event(text)

    def finish(self, summary: Mapping[str, Scalar], table: Table | None) -> None:
        """To all."""
        for sink in self.sinks:
            sink.finish(summary, table)

    def close(self) -> None:
        """Closes every sink, also when one fails; then the first failure is raised."""
        failures = [error for sink in self.sinks if (error := _failure(sink.close)) is not None]
        if failures:
            raise failures[0]


def _failure(call: Callable[[], None]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None
