"""Weights & Biases: the scalars of `metrics.jsonl`, one W&B step per round; results, tables and files at the end.

W&B never changes a run. Its first error becomes an event, and the run continues without W&B. If the online start fails,
the sink starts offline. The W&B step is the round, so a repeated round keeps its step. `<out>/wandb-run.json` stores
the id of the W&B run, which the next start in the same directory continues.

When a process is killed, the rounds that W&B had not written or sent are lost. So a resumed run logs earlier rounds
again, from `metrics.jsonl`: offline all of them, so that the newest folder is complete; online those that W&B lacks.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rayfed.errors import class_and_line
from rayfed.files import write_json
from rayfed.tracking.jsonl import read_metrics
from rayfed.tracking.sinks import Record, RunInfo, Sink, Table, scalars
from rayfed.tracking.wandb_login import Mode, logged_in

if TYPE_CHECKING:
    from rayfed.config.execution import Tracking

FILES = ("config.yaml", "metrics.jsonl", "summary.json", "ledger.parquet", "partition.json", "report.html")
CONFUSION, PER_CLIENT = "test/confusion_matrix", "test/accuracy_per_client"
SERVICE = "WANDB_SERVICE"  # names wandb's helper process; child processes inherit the variable
QUIET = {
    "silent": True,
    "console": "off",  # stdout belongs to the console sink
    "reinit": "create_new",  # other W&B runs in this process continue
    "init_timeout": 30.0,  # seconds; wandb's default of 90 delays the start of a run without network too much
    "finish_timeout": 60.0,  # seconds; then the run ends, and `wandb sync` uploads the rest
}
_started: set[str] = set()  # helper processes that sinks in this process started


class WandbSink(Sink):
    """One W&B run. ``notify`` gets messages for the user: where the W&B run is, and why W&B failed."""

    def __init__(self, settings: Tracking, mode: Mode, notify: Callable[[str], None]) -> None:
        self._settings = settings
        self._mode = mode
        self._notify = notify
        self._run: Any = None
        self._info: RunInfo | None = None
        self._defined: set[str] = set()  # metrics whose summary is the best value
        self._lists: dict[str, Any] = {}  # the last confusion matrix and accuracies of the clients
        self._finished = False

    def start(self, info: RunInfo) -> None:
        """Opens the W&B run, or continues the one of this run directory."""
        self._attempt("start", lambda: self._start(info))

    def round(self, record: Record) -> None:
        """Logs the scalars of the round."""
        if self._run is not None:
            self._attempt("log", lambda: self._log(record))

    def finish(self, summary: Record, table: Table | None) -> None:
        """Writes results and tables to the W&B summary, and logs the adapter as an artifact if the settings say so."""
        self._finished = True
        if self._run is not None:
            self._attempt("summary", lambda: self._summarise(summary, table))
        if self._run is not None and self._settings.artifact:
            self._attempt("artifact", lambda: self._log_adapter(summary))

    def close(self) -> None:
        """Ends the W&B run, as failed if `finish` was not called. Ends the helper process if no other run needs it.

        Logs the files of a finished run first: by now all other sinks have written theirs.
        """
        if self._run is not None and self._finished and self._settings.artifact:
            self._attempt("artifact", self._log_files)
        run, self._run = self._run, None
        code = 0 if self._finished else 1
        if run is not None:
            self._attempt("finish", lambda: run.finish(exit_code=code))
        self._attempt("close", lambda: _release(code))

    def _attempt(self, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except (Exception, SystemExit) as error:  # wandb calls sys.exit when its helper process ends badly
            self._notify(f"wandb: {what} failed, the run continues without W&B ({class_and_line(error)})")
            run, self._run = self._run, None
            if run is not None:
                self._attempt("finish", lambda: run.finish(exit_code=1))

    def _start(self, info: RunInfo) -> None:
        self._info = info
        mode = self._mode
        if mode == "online" and not logged_in():  # wandb would ask for a key and wait
            self._notify("wandb: not logged in (`wandb login`), so this run is tracked offline")
            mode = "offline"
        try:
            self._run = self._init(info, mode, _run_id(info))
        except (Exception, SystemExit) as error:
            self._notify(f"wandb: {mode} start failed, trying offline ({class_and_line(error)})")
            _release(1)
            # While other runs need the helper process, it stays alive and blocks the id of the failed run.
            self._run = self._init(info, mode := "offline", _run_id(info, fresh=SERVICE in os.environ))
        self._run.define_metric("round")
        self._run.define_metric("bytes/total", step_metric="round")  # a metric defined by name can be an x-axis
        self._run.define_metric("*", step_metric="round")
        folder = Path(self._run.dir).parent
        where = self._run.url if mode == "online" else f"offline in {folder}; upload it with `wandb sync {folder}`"
        self._notify(f"wandb: {where}")
        path = info.out / "metrics.jsonl"
        for record in read_metrics(path) if info.start and path.is_file() else []:
            if self._run.step <= record["round"] <= info.start:  # W&B has the earlier steps
                self._log(record)

    def _log(self, record: Record) -> None:
        values = scalars(record)
        self._lists |= {key: record[key] for key in (CONFUSION, PER_CLIENT) if record.get(key)}
        for key in (key for key in values if key not in self._defined):
            if best := best_value(key):
                self._defined.add(key)
                self._run.define_metric(key, step_metric="round", summary=best)
        self._run.log(values, step=values["round"], commit=True)

    def _init(self, info: RunInfo, mode: str, run_id: str) -> Any:
        import wandb

        _connect()
        quiet: dict[str, Any] = {name: value for name, value in QUIET.items() if name in wandb.Settings.model_fields}
        info.out.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            group=self._settings.group,
            tags=list(self._settings.tags) or None,
            name=run_name(info),
            job_type="train",
            config={**info.config, "digest": info.digest, "facts": dict(info.facts)},
            dir=info.out,
            id=run_id,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(**quiet),
        )

    def _summarise(self, summary: Record, table: Table | None) -> None:
        values: dict[str, Any] = dict(scalars(summary))
        import wandb

        if table is not None:
            rows = table.values or table.rows
            values["table"] = wandb.Table(columns=list(table.columns), data=[list(row) for row in rows])
        if CONFUSION in self._lists:
            cells = _confusion_cells(self._lists[CONFUSION], self._class_names())
            values["confusion"] = wandb.Table(columns=["label", "prediction", "rows"], data=cells)
        if PER_CLIENT in self._lists:
            accuracies = [[i, value] for i, value in enumerate(self._lists[PER_CLIENT]) if value is not None]
            values["clients"] = wandb.Table(columns=["client", "accuracy"], data=accuracies)
        if cells := self._partition_cells():
            values["partition"] = wandb.Table(columns=["client", "class", "rows"], data=cells)
        self._run.summary.update(values)

    def _log_adapter(self, summary: Record) -> None:
        """The folder `adapter/` of the run directory as an artifact. The files are not copied: they will not change."""
        import wandb

        assert self._info is not None
        folder = self._info.out / "adapter"
        if folder.is_dir():
            metadata = {"digest": self._info.digest, **scalars(summary)}
            artifact = wandb.Artifact(f"adapter-{self._run.id}", type="model", metadata=metadata)
            artifact.add_dir(str(folder), policy="immutable")
            self._run.log_artifact(artifact)

    def _log_files(self) -> None:
        """The FILES that the run directory has, as an artifact."""
        import wandb

        assert self._info is not None
        artifact = wandb.Artifact(f"run-{self._run.id}", type="run", metadata={"digest": self._info.digest})
        for path in (self._info.out / name for name in FILES):
            if path.is_dir():
                artifact.add_dir(str(path), name=path.name, policy="immutable")
            elif path.is_file():
                artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def _partition_cells(self) -> list[list[Any]]:
        """[client, class, rows] of every cell of the heat map in partition.json; none where there is no such map.

        Where several classes share a column, the first one names it: `card ...`.
        """
        assert self._info is not None
        path = self._info.out / "partition.json"
        grid = json.loads(path.read_text(encoding="utf-8"))["heat_map"] if path.is_file() else None
        if grid is None:
            return []
        columns = [f"{name} ..." if grid["columns_of"] > 1 else name for name in grid["classes"]]
        return [
            [client, column, count]
            for client, counts in zip(grid["clients"], grid["counts"], strict=True)
            for column, count in zip(columns, counts, strict=True)
        ]

    def _class_names(self) -> list[str] | None:
        assert self._info is not None
        path = self._info.out / "adapter" / "classes.json"
        return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else None


def best_value(key: str) -> Literal["max", "min"] | None:
    """What the W&B summary shows of a metric; None: its last value, as for all test metrics, which choose nothing."""
    split, _, name = key.partition("/")
    if split not in ("train", "eval", "eval_subset"):
        return None
    if name.startswith(("accuracy", "macro_f1", "micro_f1", "map", "spearman", "exact_match", "rouge_l")):
        return "max"
    return "min" if name.startswith(("loss", "gap")) else None


def run_name(info: RunInfo) -> str:
    """The name of the W&B run: runs that differ in method, rank, density or seed differ in it.

    `quickstart flasc rank 8 density 0.25 seed 0`; both densities, down and up, where they differ.
    """
    config = info.config
    density = " / ".join(dict.fromkeys(f"{config['wire'][way]['density']:g}" for way in ("down", "up")))
    words = {"rank": config["lora"]["rank"], "density": density, "seed": config["seed"]}
    return " ".join([info.name, config["method"]["name"], *(f"{key} {value}" for key, value in words.items())])


def _confusion_cells(matrix: list[list[int]], names: list[str] | None) -> list[list[Any]]:
    """[label, prediction, rows] of every pair that occurs."""
    named = names or [str(i) for i in range(len(matrix))]
    return [[named[i], named[j], count] for i, row in enumerate(matrix) for j, count in enumerate(row) if count]


def _run_id(info: RunInfo, fresh: bool = False) -> str:
    """The id stored in the run directory, if it belongs to the same settings and not ``fresh``; else a new id."""
    path = info.out / "wandb-run.json"
    try:
        stored = json.loads(path.read_text())
        if stored["digest"] == info.digest and not fresh:
            return str(stored["id"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is no such file, or another program wrote it
    new = secrets.token_hex(6)
    write_json(path, {"id": new, "digest": info.digest})
    return new


def _connect() -> None:
    """Connects to wandb's helper process: the one named in the environment, or a new one."""
    import wandb

    if SERVICE in os.environ:
        try:
            wandb.setup()
            return
        except Exception:  # inherited from a process that has ended
            del os.environ[SERVICE]
    wandb.setup(wandb.Settings(silent=True))  # else wandb prints to stderr where it found the key
    _started.add(os.environ[SERVICE])


def _release(exit_code: int) -> None:
    """Ends wandb's helper process if a sink in this process started it and no run needs it."""
    if os.environ.get(SERVICE) not in _started:
        return
    import wandb

    if getattr(wandb.setup(), "most_recent_active_run", None) is None:
        _started.discard(os.environ[SERVICE])
        wandb.teardown(exit_code)
