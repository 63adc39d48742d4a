"""A run from settings to a finished directory: every check first, then the engine that the settings name."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfed import config
from rayfed.config import Experiment
from rayfed.errors import UserError
from rayfed.tracking import RunInfo, Sink, SinkList, Table, open_console, open_sinks

if TYPE_CHECKING:
    from rayfed.tasks.federation import Federation
    from rayfed.tasks.models.spec import ModelSpec

# Sections that no part of a federation depends on (but for server.cohort and eval.early_stop, see `federation_key`).
NO_MATTER_OF_DATA = (
    "name", "lora", "method", "wire", "profiles", "client", "server", "eval", "engine", "tracking", "checkpoint",
    "export",
)  # fmt: skip


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


def run(
    experiment: Experiment,
    out: str | Path | None = None,
    resume: bool = False,
    *,
    sink: Sink | None = None,
    federation: Federation | None = None,
) -> RunResult:
    """Runs the experiment to the end and returns what came out.

    ``out`` is the run directory (default `runs/NAME-TIME`); it must be empty or absent unless ``resume``, which
    continues from its last whole checkpoint (from the start where there is none). ``sink`` is told what the console
    is told. ``federation`` spares loading the data again: that of a run with the same `federation_key`. Raises
    UserError before anything is started or written where something is wrong, RunError where a started run cannot go on.
    """
    _resolve(experiment)
    _check_device(experiment)
    if "://" in str(out or ""):
        raise UserError(
            f"out: got {str(out)!r}, but a run writes a folder; `rayfed run --out URI` copies it from there"
        )
    out = Path(out) if out is not None else Path("runs") / f"{slug(experiment.name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    experiment = _check_out(out, experiment, resume)
    from rayfed.tasks.models.spec import describe_model

    federation = _formed(experiment, federation)
    model_spec = describe_model(experiment, len(federation.classes))
    console = _Kept(SinkList(open_console(experiment.tracking), *([sink] if sink else [])))
    try:
        if experiment.engine.kind == "ray":
            from rayfed.engine.driver import run_on_ray

            run_on_ray(experiment, federation, model_spec, out, resume, console)
        else:
            _run_here(experiment, federation, model_spec, out, resume, console)
    finally:
        console.close()
    return RunResult(out, console.summary)


def check(experiment: Experiment, federation: Federation | None = None, base: bool = True) -> Federation:
    """All that `run` checks before it looks at its directory; returns the data it formed, or was given.

    Without ``base`` the model is not loaded. UserError where something is wrong.
    """
    _resolve(experiment)
    _check_device(experiment)
    federation = _formed(experiment, federation)
    if base:
        from rayfed.tasks.models.spec import describe_model

        describe_model(experiment, len(federation.classes))
    return federation


def federation_key(experiment: Experiment) -> str:
    """Names the settings that decide the data and who holds them: equal keys, equal federations and refusals."""
    decides = experiment.model_dump(mode="json", exclude=set(NO_MATTER_OF_DATA))
    decides |= {"cohort": experiment.server.cohort, "early_stop": experiment.eval.early_stop is not None}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _formed(experiment: Experiment, federation: Federation | None) -> Federation:
    from rayfed.profiles.client_profiles import check_profiles
    from rayfed.tasks.federation import form_federation

    federation = federation or form_federation(experiment)
    check_profiles(experiment, federation.sizes)
    return federation


def _run_here(
    experiment: Experiment, federation: Federation, model_spec: ModelSpec, out: Path, resume: bool, console: Sink
) -> None:
    from rayfed.engine.local_executor import LocalExecutor
    from rayfed.server.loop import Server

    sinks = SinkList(open_sinks(experiment.tracking, out), console)
    executor = LocalExecutor(experiment, federation, model_spec)
    try:
        server = Server(experiment, federation, model_spec, executor, out, sinks, resume)
        for _ in server.rounds():
            pass
        server.finish()
    finally:
        sinks.close()
        executor.close()


def slug(name: str) -> str:
    """A run's name as one part of a path."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run"


def _resolve(experiment: Experiment) -> None:
    from rayfed.profiles.client_profiles import check_profiles
    from rayfed.server.axes import resolve

    resolve(experiment)
    check_profiles(experiment)


def _check_device(experiment: Experiment) -> None:
    """Only for this process: what a cluster's nodes have, Ray knows."""
    if experiment.engine.kind == "local" and experiment.engine.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("engine.device: got 'cuda', but torch finds no GPU here; allowed is cpu")


def _check_out(out: Path, experiment: Experiment, resume: bool) -> Experiment:
    """A fresh run wants a new or empty folder; a resumed one the same settings that its folder was made with.

    Returns the settings to run with: `engine.pack: auto` was chosen when the folder was made, and is that number now.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: got {str(out)!r}, but that is a file")
    for place in out.parents:
        if place.exists() and not place.is_dir():
            raise UserError(f"--out: got {str(out)!r}, but {place} is a file")
    if not out.is_dir() or not any(out.iterdir()):
        return experiment
    if not resume:
        raise UserError(f"--out: got {str(out)!r}, but it is not empty; continue it with --resume or name another")
    if not (out / "config.yaml").is_file():
        raise UserError(f"--resume: got {str(out)!r}, but that is no run directory: it has no config.yaml")
    known = config.load_config(out / "config.yaml")
    if experiment.engine.pack == "auto" and known.engine.pack != "auto":
        experiment = experiment.with_pack(known.engine.pack)
    made_with, now = known.digest(), experiment.digest()
    if made_with != now:
        raise UserError(
            f"--resume: {out} was made with other settings (digest {made_with}, these have {now}); "
            "resume with its config.yaml or choose another --out"
        )
    return experiment


class _Kept(Sink):
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
