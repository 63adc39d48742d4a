"""Sinks: the destinations of a run's numbers and events.

`metrics.jsonl`, `summary.json` and `events.log` are always written; W&B, TensorBoard and the console follow the section
`tracking`. The process that runs the rounds opens `open_sinks`. The process that the user started opens `open_console`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rayfed.tracking.console import ConsoleSink
from rayfed.tracking.events import EventSink
from rayfed.tracking.jsonl import JsonlSink, read_metrics
from rayfed.tracking.sinks import Record, RunInfo, Sink, SinkList, Table, Value
from rayfed.tracking.tensorboard_sink import TensorBoardSink
from rayfed.tracking.wandb_login import wandb_mode
from rayfed.tracking.wandb_sink import WandbSink

if TYPE_CHECKING:
    from rayfed.config.execution import Tracking

__all__ = ["Record", "RunInfo", "Sink", "SinkList", "Table", "Value", "open_console", "open_sinks", "read_metrics"]


def open_sinks(settings: Tracking, out: Path, console: Sink | None = None) -> SinkList:
    """The sinks of a run in the directory ``out``: metrics, events, and TensorBoard and W&B as the settings say.

    The ``console`` comes after the files and before W&B, whose start takes seconds; it is closed with them. UserError
    if a package that the settings ask for is not installed.
    """
    events = EventSink(Path(out) / "events.log")
    sinks: list[Sink] = [JsonlSink(Path(out) / "metrics.jsonl"), events, *([console] if console else [])]
    if settings.tensorboard:
        sinks.append(TensorBoardSink(Path(out) / "tensorboard"))
    if (mode := wandb_mode(settings)) != "off":
        sinks.append(WandbSink(settings, mode, notify=events.event))
    return SinkList(*sinks)


def open_console(settings: Tracking) -> Sink:
    """The console on this process's stdout. If `tracking.console` is off, a sink that shows nothing."""
    return Sink() if settings.console == "off" else ConsoleSink(settings.console)
