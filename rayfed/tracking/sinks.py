"""The interface between a run and the places that record or show the run.

A sink gets `start` once, then `round` after every finished round and `event` whenever something happens, then
`finish`. `close` is always called, also after an error. The code that runs the rounds knows no sink by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Scalar = float | int | str | None
Value = Scalar | list[Any]
"""A scalar, or a list of finite floats, ints, strings, None and such lists: recall per class, a confusion matrix."""
Record = Mapping[str, Value]
"""One round: the keys of `metrics.jsonl`. `round` counts from 1. A metric that was not measured is None or absent."""


@dataclass(frozen=True)
class RunInfo:
    """What is known when a run starts. ``digest`` is the digest of the settings in ``config``."""

    name: str
    out: Path
    digest: str
    config: Mapping[str, Any]
    rounds: int
    start: int = 0
    """Number of finished rounds: 0, or the round after which a resumed run continues."""
    facts: Mapping[str, Scalar] = field(default_factory=dict)
    """Facts for the reader that are no settings: population, clients without data, trainable parameters, ..."""
    metric: str = "accuracy"
    """The metric that chooses the best round, which metrics.jsonl has as `eval/accuracy` and so on."""


@dataclass(frozen=True)
class Table:
    """A small table of formatted text. Every row has one cell per column.

    ``values`` may have the same rows as numbers, None in an empty cell.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    values: tuple[tuple[Scalar, ...], ...] = ()


class Sink:
    """Base class of all sinks; every method does nothing. A sink ignores keys that it does not know."""

    def start(self, info: RunInfo) -> None:
        """The run begins, or continues after ``info.start`` rounds."""

    def round(self, record: Record) -> None:
        """A round is finished."""

    def event(self, text: str) -> None:
        """Something happened: a worker died and was replaced, the run stops early, ..."""

    def finish(self, summary: Record, table: Table | None) -> None:
        """All rounds are finished. ``summary`` and ``table`` are the results."""

    def close(self) -> None:
        """Releases files, terminals and processes. A second call does nothing."""


class SinkList(Sink):
    """Passes every call to several sinks, in order. An error in one sink stops the call, except in `close`."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def start(self, info: RunInfo) -> None:
        """Starts every sink."""
        for sink in self.sinks:
            sink.start(info)

    def round(self, record: Record) -> None:
        """Passes the round to every sink."""
        for sink in self.sinks:
            sink.round(record)

    def event(self, text: str) -> None:
        """Passes the event to every sink."""
        for sink in self.sinks:
            sink.event(text)

    def finish(self, summary: Record, table: Table | None) -> None:
        """Passes the results to every sink."""
        for sink in self.sinks:
            sink.finish(summary, table)

    def close(self) -> None:
        """Closes every sink, even if one fails. Then raises the first error."""
        errors = []
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


def scalars(values: Record) -> dict[str, float | int | str]:
    """The measured values that are scalars: without None and without lists."""
    return {key: value for key, value in values.items() if value is not None and not isinstance(value, list)}
