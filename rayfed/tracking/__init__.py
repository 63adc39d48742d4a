"""Sinks: where a run's numbers and events go. `metrics.jsonl` and `events.log` always, W&B and the console as set.

The process that runs the rounds opens `open_sinks`; the process that the user looks at opens `open_console`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rayfed.tracking.console import ConsoleSink
from rayfed.tracking.events import EventSink
from rayfed.tracking.jsonl import JsonlSink, read_metrics
from rayfed.tracking.sinks import Fan, Record, RunInfo, Scalar, Sink, Table
from rayfed.tracking.wandb_sink import WandbSink, wandb_mode

if TYPE_CHECKING:
    from rayfed.config.execution import Tracking

__all__ = [
    "ConsoleSink",
    "EventSink",
    "Fan",
    "JsonlSink",
    "Record",
    "RunInfo",
    "Scalar",
    "Sink",
    "Table",
    "WandbSink",
    "open_console",
    "open_sinks",
    "read_metrics",
    "wandb_mode",
]


def open_sinks(settings: Tracking, out: Path) -> Fan:
    """The sinks of a run in the directory `out`: metrics, events and, unless it is off, W&B."""
    events = EventSink(Path(out) / "events.log")
    sinks: list[Sink] = [JsonlSink(Path(out) / "metrics.jsonl"), events]
    mode = wandb_mode(settings)
    if mode != "off":
        sinks.append(WandbSink(settings, mode, say=events.event))
    return Fan(*sinks)


def open_console(settings: Tracking) -> Sink:
    """The console as set, on this process's stdout."""
    return ConsoleSink(settings.console)
