"""A run from settings to a finished directory: every check first, then the engine that the settings name."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfed import config
from rayfed.config import Experiment, dump_config
from rayfed.errors import UserError
from rayfed.files import atomic_write
from rayfed.tracking import Fan, RunInfo, Sink, Table, open_console, open_sinks


@dataclass(frozen=True)
class RunResult:
    """A finished run: its directory, the summary figures, the number of rounds done."""

    out: Path
    summary: Mapping[str, Any]

    @property
    def rounds(self) -> int:
        return int(self.summary["rounds"])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl, one mapping a round."""
        from rayfed.tracking import read_metrics

        return read_metrics(self.out / "metrics.jsonl")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads a YAML file, applies `dotted.key=value` overrides, validates fields and combinations.

    Raises UserError (a ValueError), one line per mistake: the field, the value, what is allowed.
    """
    experiment = config.load_config(path, overrides)
    _resolve(experiment)
    return experiment


def run(experiment: Experiment, out: str | Path | None = None, resume: bool = False) -> RunResult:
    """Runs the experiment to the end and returns what came out.

    ``out`` is the run directory (default `runs/NAME-TIME`); it must be empty or absent unless ``resume``, which
    continues from its last whole checkpoint (from the start where there is none). Raises UserError before anything
    is started or written where something is wrong, RunError where a started run cannot go on.
    """
    _resolve(experiment)
    out = Path(out) if out is not None else Path("runs") / f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    _check_out(out, experiment, resume)
    from rayfed.tasks.federation import form_federation

    federation = form_federation(experiment)
    _check_model(experiment, len(federation.classes))
    atomic_write(out / "config.yaml", dump_config(experiment))
    console = _Kept(open_console(experiment.tracking))
    try:
        if experiment.engine.kind == "ray":
            from rayfed.engine.driver import run_on_ray

            run_on_ray(experiment, federation, out, resume, console)
        else:
            _run_here(experiment, federation, out, resume, console)
    finally:
        console.close()
    return RunResult(out, console.summary)


def _run_here(experiment: Experiment, federation: Any, out: Path, resume: bool, console: Sink) -> None:
    from rayfed.engine.local import LocalCrew
    from rayfed.server.loop import Server

    sinks = Fan(open_sinks(experiment.tracking, out), console)
    crew = LocalCrew(experiment, federation)
    try:
        server = Server(experiment, federation, crew, out, sinks, resume)
        for _ in server.rounds():
            pass
        server.finish()
    finally:
        sinks.close()
        crew.close()


def _resolve(experiment: Experiment) -> None:
    from rayfed.server.axes import resolve

    resolve(experiment)


def _check_out(out: Path, experiment: Experiment, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: got {str(out)!r}, but that is a file")
    used = out.is_dir() and any(out.iterdir())
    if used and not resume:
        raise UserError(f"--out: got {str(out)!r}, but it is not empty; continue it with --resume or name another")
    if resume and used:
        from rayfed.server.checkpoint import latest

        latest(out / "checkpoints", experiment.digest())


def _check_model(experiment: Experiment, classes: int) -> None:
    """Targets and ranks against the model's structure, without loading its weights."""
    from rayfed.lora.inject import match, peft_config
    from rayfed.tasks.models import sketch_base

    base = sketch_base(experiment.model, classes)
    match(base.model, peft_config(experiment, base.head), base.head)


class _Kept:
    """The console, and the summary that passes through it."""

    def __init__(self, console: Sink) -> None:
        self.console = console
        self.summary: Mapping[str, Any] = {}

    def start(self, info: RunInfo) -> None:
        self.console.start(info)

    def round(self, record: Mapping[str, Any]) -> None:
        self.console.round(record)

    def event(self, text: str) -> None:
        self.console.event(text)

    def finish(self, summary: Mapping[str, Any], table: Table | None) -> None:
        self.summary = summary
        self.console.finish(summary, table)

    def close(self) -> None:
        self.console.close()
