"""Weights & Biases: the same numbers as `metrics.jsonl`, one W&B step a round.

Nothing that W&B does may change a run. Whatever it raises is told once, as an event, and the run goes on without it; a
start that fails online is tried again offline. The step is the round, so what a resumed run repeats lands where it was.
`<out>/wandb-run.json` remembers the run's id for the next start in the same directory.

A killed process takes with it what W&B had not written or sent yet. So a resumed run logs the rounds before it again,
from `metrics.jsonl`: offline all of them, which makes the newest folder whole by itself, online those that W&B lacks.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rayfed.files import write_json
from rayfed.tracking.jsonl import read_metrics
from rayfed.tracking.sinks import Record, RunInfo, Scalar, Table
from rayfed.tracking.wandb_login import logged_in, wandb_mode

if TYPE_CHECKING:
    from rayfed.config.execution import Tracking

__all__ = ["WandbSink", "wandb_mode"]

SERVICE = "WANDB_SERVICE"  # names the helper process wandb uses; inherited by processes started from here
QUIET = {
    "silent": True,
    "console": "off",  # stdout belongs to the console sink
    "reinit": "create_new",  # other runs in this process are left alone
    "init_timeout": 30.0,  # seconds; wandb's own 90 is long for a run that only wants to know whether it is online
    "finish_timeout": 60.0,  # then the run ends, and `wandb sync` uploads what is left
}
_started: set[str] = set()  # the helper processes that sinks in this process have started


class WandbSink:
    """One W&B run. `say` takes what a user should know: where the run is, and why W&B failed."""

    def __init__(
        self, settings: Tracking, mode: Literal["online", "offline"], say: Callable[[str], None] | None = None
    ) -> None:
        self._settings = settings
        self._mode = mode
        self._say = say or logging.getLogger(__name__).warning
        self._run: Any = None
        self._info: RunInfo | None = None
        self._finished = False

    def start(self, info: RunInfo) -> None:
        """Opens the W&B run, or continues the one of this run directory."""
        self._attempt("start", lambda: self._start(info))

    def round(self, record: Record) -> None:
        """Logs what was measured."""
        if self._run is not None:
            self._attempt("log", lambda: self._log(record))

    def event(self, text: str) -> None:
        """Events are in `events.log`; a W&B alert would mail them to people."""

    def finish(self, summary: Mapping[str, Scalar], table: Table | None) -> None:
        """Results and table go into the summary, so the history keeps one row a round; the adapter is an artifact."""
        self._finished = True
        if self._run is not None:
            self._attempt("summary", lambda: self._summarise(_present(summary), table))
        if self._run is not None and self._settings.artifact:
            self._attempt("artifact", lambda: self._give_adapter(_present(summary)))

    def close(self) -> None:
        """Ends the W&B run, as failed where `finish` was never reached, and the helper process if it is ours."""
        run, self._run = self._run, None
        code = 0 if self._finished else 1
        if run is not None:
            self._attempt("finish", lambda: run.finish(exit_code=code))
        self._attempt("close", lambda: _release(code))

    def _attempt(self, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except (Exception, SystemExit) as error:  # wandb calls sys.exit when its helper process ends badly
            self._say(f"wandb: {what} failed, going on without it ({_first_line(error)})")
            run, self._run = self._run, None
            if run is not None:
                self._attempt("finish", lambda: run.finish(exit_code=1))

    def _start(self, info: RunInfo) -> None:
        self._info = info
        mode = self._mode
        if mode == "online" and not logged_in():  # asked for online: wandb would ask for a key, and wait
            self._say("wandb: not logged in (`wandb login`), so this run is tracked offline")
            mode = "offline"
        try:
            self._run = self._init(info, mode, _run_id(info))
        except (Exception, SystemExit) as error:
            self._say(f"wandb: {mode} start failed, trying offline ({_first_line(error)})")
            _release(1)
            # Where others still need the helper process, it goes on and keeps the failed run's id to itself.
            self._run = self._init(info, mode := "offline", _run_id(info, fresh=SERVICE in os.environ))
        self._run.define_metric("round")
        self._run.define_metric("bytes/total", step_metric="round")  # named by itself, it is offered as an x-axis too
        self._run.define_metric("*", step_metric="round")
        folder = Path(self._run.dir).parent
        where = self._run.url if mode == "online" else f"offline in {folder}; upload it with `wandb sync {folder}`"
        self._say(f"wandb: {where}")
        for record in _earlier(info):
            if record["round"] >= self._run.step:  # W&B has the steps below
                self._log(record)

    def _log(self, record: Record) -> None:
        values = _present(record)
        self._run.log(values, step=values["round"], commit=True)

    def _init(self, info: RunInfo, mode: str, run_id: str) -> Any:
        import wandb

        _connect()
        known: dict[str, Any] = {name: value for name, value in QUIET.items() if name in wandb.Settings.model_fields}
        info.out.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            group=self._settings.group,
            tags=list(self._settings.tags) or None,
            name=info.name,
            config={**info.config, "digest": info.digest, "facts": dict(info.facts)},
            dir=info.out,
            id=run_id,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(**known),
        )

    def _summarise(self, summary: dict[str, Any], table: Table | None) -> None:
        if table is not None:
            import wandb

            summary["table"] = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        self._run.summary.update(summary)

    def _give_adapter(self, summary: dict[str, Any]) -> None:
        """The run directory's `adapter/`, named by the run. Its files are not copied: they will not change."""
        import wandb

        assert self._info is not None
        folder = self._info.out / "adapter"
        if folder.is_dir():
            facts = {"digest": self._info.digest, **summary}
            artifact = wandb.Artifact(f"adapter-{self._run.id}", type="model", metadata=facts)
            artifact.add_dir(str(folder), policy="immutable")
            self._run.log_artifact(artifact)


def _earlier(info: RunInfo) -> list[dict[str, Any]]:
    """The rounds before a resumed run's first one."""
    path = info.out / "metrics.jsonl"
    known = read_metrics(path) if info.start and path.is_file() else []
    return [record for record in known if record["round"] <= info.start]


def _run_id(info: RunInfo, fresh: bool = False) -> str:
    """The id stored in the run directory if it is for the same settings, so for the same numbers; else a new one."""
    path = info.out / "wandb-run.json"
    try:
        stored = json.loads(path.read_text())
        if stored["digest"] == info.digest and not fresh:
            return str(stored["id"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no file, or none of ours
    made = secrets.token_hex(6)
    write_json(path, {"id": made, "digest": info.digest})
    return made


def _connect() -> None:
    """Makes sure that wandb's helper process answers: the one named in the environment, or a new one of our own."""
    import wandb

    if SERVICE in os.environ:
        try:
            wandb.setup()
            return
        except Exception:  # inherited from a process that is gone
            del os.environ[SERVICE]
    wandb.setup(wandb.Settings(silent=True))  # else it says on stderr where it found the key
    _started.add(os.environ[SERVICE])


def _release(exit_code: int) -> None:
    """Ends wandb's helper process if a sink here started it and no run needs it any more."""
    if os.environ.get(SERVICE) not in _started:
        return
    import wandb

    if getattr(wandb.setup(), "most_recent_active_run", None) is None:
        _started.discard(os.environ[SERVICE])
        wandb.teardown(exit_code)


def _present(values: Mapping[str, Scalar]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
