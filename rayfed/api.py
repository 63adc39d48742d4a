"""The Python API: read settings, prepare a plan, run it, load what a run left.

`prepare` builds and checks everything exactly once and returns a `RunPlan`. Below this module nothing takes the whole
settings, builds a method again, or loads the base model only to describe it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from rayfed import config, methods, tasks, weighting
from rayfed.channels import Lossless
from rayfed.clients.plan import RunPlan
from rayfed.config import Experiment
from rayfed.config.marks import differences, settings_digest
from rayfed.engine.local_executor import run_here
from rayfed.errors import UserError, allowed
from rayfed.files import PARTIAL, remove_path
from rayfed.lora.peft_files import load_peft, read_json, refuse_links
from rayfed.methods import Method
from rayfed.objectives import Plain
from rayfed.profiles.client_profiles import ClientProfiles
from rayfed.run_directory import check_out, disk_errors, locked_out, share_lock
from rayfed.server.optimizers import ServerOptimizer
from rayfed.storage import RemoteFolder, fetch, is_uri, local_folder, uploaded
from rayfed.tasks.base import Task
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.models.base import in_dtype, name_classes
from rayfed.tasks.models.cache import forget_base
from rayfed.tasks.models.spec import ModelSpec, check_dtype, describe_model
from rayfed.tracking import Record, Sink, SinkList, Table, open_console, read_metrics
from rayfed.weighting import Weighting


@dataclass(frozen=True)
class RunResult:
    """A finished run: its directory, the summary figures, the number of rounds done."""

    out: Path
    summary: Mapping[str, Any]

    @property
    def rounds(self) -> int:
        """Rounds done."""
        return int(self.summary["rounds"])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl, one mapping a round."""
        return read_metrics(self.out / "metrics.jsonl")


@dataclass(frozen=True)
class Components:
    """What the settings name, built: everything of a plan that needs neither data nor a model."""

    task: Task
    method: Method
    weighting: Weighting
    server_optimizer: str
    profiles: ClientProfiles


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads a YAML file, applies `dotted.key=value` overrides, validates fields and combinations.

    Raises UserError (a ValueError), one line per mistake: the field, the value, what is allowed.
    """
    experiment = config.load_config(path, overrides)
    build_components(experiment)
    return experiment


def build_components(experiment: Experiment, task: Task | None = None, method: Method | None = None) -> Components:
    """Builds what the settings name. UserError where parts do not go together. Every `auto` becomes a choice here."""
    data, server, lora, name = experiment.data, experiment.server, experiment.lora, experiment.method.name
    method = method or methods.build(name, **experiment.method.options)
    task = task or tasks.build(
        data=data,
        problem=experiment.problem,
        partition=experiment.partition,
        model=experiment.model,
        seed=experiment.seed,
    )
    task.check(lora=lora, server=server, eval=experiment.eval, engine=experiment.engine)
    optimizer = method.optimizer if server.optimizer == "auto" else server.optimizer
    if optimizer not in method.optimizers:
        raise UserError(f"server.optimizer: got {optimizer!r}, but {name} allows {', '.join(method.optimizers)}")
    ServerOptimizer(optimizer, server)
    if lora.train == "head" and getattr(method, "train", "all") == "masked":
        raise UserError("method.train: got 'masked', but lora.train=head already says what trains")
    profiles = ClientProfiles(experiment.profiles, lora, experiment.wire, experiment.seed)
    if profiles.mixed_ranks and not method.mixed_ranks:
        raise UserError(
            f"profiles.kind: got {experiment.profiles.kind!r}, which gives clients different ranks, but {name} needs "
            f"all of them at lora.rank={lora.rank}; mixed ranks are taken by {', '.join(methods.with_mixed_ranks())}"
        )
    if not method.sparse_down:
        _check_whole(experiment, profiles, "down")
    if not method.sparse_up:
        _check_whole(experiment, profiles, "up")
    weights = method.weights if server.weights == "auto" else server.weights
    return Components(task, method, weighting.build(weights), optimizer, profiles)


def prepare(
    experiment: Experiment, *, task: Task | None = None, method: Method | None = None,
    federation: Federation | None = None,
) -> RunPlan:  # fmt: skip
    """Builds and checks everything that a run consists of, exactly once. Nothing is started or written.

    ``task`` and ``method`` replace those that the settings name. ``federation`` spares loading the data again: that of
    a plan with the same `rayfed.config.marks.data_key`. Raises UserError where settings, data or model are wrong.
    `engine.pack: auto` stays open (`RunPlan.pack` is None) until a worker can measure.
    """
    experiment = _with_method(experiment, method)
    return _plan(experiment, build_components(experiment, task, method), federation)


def check(experiment: Experiment, federation: Federation | None = None, model: bool = True) -> Federation:
    """All that `prepare` checks; returns the data. Without ``model`` the base model is not loaded."""
    parts = build_components(experiment)
    federation = _checked_data(experiment, parts, federation)
    if model:
        _described_model(experiment, parts, federation)
    return federation


def run(
    experiment: Experiment, out: str | Path | None = None, resume: bool = False, *, task: Task | None = None,
    method: Method | None = None, sink: Sink | None = None, federation: Federation | None = None,
) -> RunResult:  # fmt: skip
    """Runs the experiment to the end and returns what came out.

    ``out`` is the run directory (default `runs/NAME-TIME`), or the URI of an object store, to which the directory is
    uploaded after every checkpoint and at the end. It must be empty or absent unless ``resume``, which continues from
    the last whole checkpoint (from the start where there is none). ``sink`` receives what the console shows. ``task``,
    ``method``, ``federation``: see `prepare`.

    Raises UserError before anything is started or written where something is wrong, RunError where a started run cannot
    go on.
    """
    experiment = _with_method(experiment, method)
    parts = build_components(experiment, task, method)
    uri = str(out) if out is not None and is_uri(str(out)) else None
    remote = RemoteFolder(uri) if uri else None
    with locked_out(local_folder(uri) if uri else out, experiment.name, resume) as folder:
        if remote:
            fetch(remote, folder, resume)
        plan = _plan(_check_out(folder, experiment, resume), parts, federation)
        summary = _Summary()
        console = SinkList(open_console(plan.tracking), summary, *([sink] if sink else []))
        with uploaded(remote, folder), disk_errors(folder), closing(console):
            for leftover in folder.rglob(PARTIAL):
                remove_path(leftover)
            _start(plan, folder, resume, uri, console)
    return RunResult(folder, summary.figures)


def load_model(run: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """A finished run's model, ready for inference: a PeftModel of the base it was trained on and its `adapter/`.

    ``run`` is a run directory, which may come from anybody: nothing in it is executed, pickles are not opened, links
    are not followed. A base model that comes with code of its own (`model.trust_remote_code`) is loaded only if
    ``trust_remote_code`` says so as well. `adapter/README.md` has the lines that load the same without rayfed.

    Raises UserError where the run has no model to load, a file is missing, damaged or a link, or the base cannot be
    loaded.
    """
    out = Path(run)
    config_file, folder = out / "config.yaml", out / "adapter"
    if config_file.is_symlink() or config_file.is_fifo():
        raise allowed("config", str(config_file), "it is a symbolic link or a pipe; only plain files are read")
    experiment = config.load_config(config_file)
    if experiment.data.source == "lowrank":
        raise allowed("run", str(run), "it solved data.source=lowrank, which has no model to load")
    model = experiment.model
    if model.trust_remote_code and not trust_remote_code:
        what = f"the code of {model.name} runs only with load_model(run, trust_remote_code=True)"
        raise UserError(f"model.trust_remote_code: got true in {config_file}, but {what}")
    refuse_links(folder)
    classes = read_json(folder / "classes.json")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise UserError(f"adapter: {folder / 'classes.json'} is no list of the names of classes")
    # The task alone: a method may be named by an import path.
    task = tasks.build(
        data=experiment.data, problem=experiment.problem, partition=experiment.partition, model=model,
        seed=experiment.seed,
    )  # fmt: skip
    nothing: Any = None
    federation = Federation(nothing, nothing, nothing, tuple(classes), np.zeros(0, np.int64), np.zeros(1, np.int64))
    forget_base()  # before and after: no run shares the weights of this model, which may be changed
    base = in_dtype(task.load_base(federation), model.dtype)
    forget_base()
    spec = describe_model(base, task.base_name, experiment.lora, model.dtype, task.batching(base, "auto"), False)
    name_classes(base.model, classes)
    head = {**spec.head, **spec.frozen_head}
    return load_peft(base.model, folder, spec.shapes, head, base.heads, spec.root)


def _start(plan: RunPlan, out: Path, resume: bool, uri: str | None, console: Sink) -> None:
    if plan.engine.kind == "local":
        run_here(plan, out, resume, uri, console)
        return
    from rayfed.engine.driver import run_on_ray  # here: a run without Ray need not import it

    forget_base()
    share_lock(out)  # with the driver
    run_on_ray(plan, out, resume, uri, console)


def _plan(experiment: Experiment, parts: Components, federation: Federation | None) -> RunPlan:
    engine = experiment.engine
    federation = _checked_data(experiment, parts, federation)
    return RunPlan(
        **vars(parts),
        federation=federation,
        model=_described_model(experiment, parts, federation),
        objective=Plain(),
        channel=Lossless(),
        pack=None if engine.pack == "auto" else engine.pack,
        seed=experiment.seed,
        settings=experiment.model_dump(mode="json"),
        lora=experiment.lora,
        wire=experiment.wire,
        client=experiment.client,
        server=experiment.server,
        eval=experiment.eval,
        engine=engine,
        tracking=experiment.tracking,
        checkpoint=experiment.checkpoint,
        export=experiment.export,
    )


def _checked_data(experiment: Experiment, parts: Components, federation: Federation | None) -> Federation:
    # Only for this process: Ray knows what a cluster's nodes have.
    if experiment.engine.kind == "local" and experiment.engine.device == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device: got 'cuda', but torch finds no GPU here; allowed is cpu")
    federation = federation or parts.task.load_data()
    holders, cohort = len(federation.holders), experiment.server.cohort
    if cohort > holders:
        raise UserError(f"server.cohort: got {cohort}, but only {holders} of {federation.clients} clients hold data")
    if experiment.eval.early_stop and not len(federation.validation):
        raise UserError("eval.early_stop: needs a validation split; set data.validation above 0")
    parts.profiles.check(federation.sizes)
    return federation


def _described_model(experiment: Experiment, parts: Components, federation: Federation) -> ModelSpec:
    task, engine, model = parts.task, experiment.engine, experiment.model
    base = task.load_base(federation)
    batching = task.batching(base, engine.padding)
    spec = describe_model(base, task.base_name, experiment.lora, model.dtype, batching, engine.gradient_checkpointing)
    if model.dtype != "float32":
        check_dtype(base, model.name, model.dtype)
    return spec


def _with_method(experiment: Experiment, method: Method | None) -> Experiment:
    """The settings with a method object's import path and options in the place of `method`."""
    if method is None:
        return experiment
    cls = type(method)
    package, _, file = cls.__module__.rpartition(".")
    name = file if package == "rayfed.methods" else f"{cls.__module__}:{cls.__qualname__}"
    fields: Sequence[Any] = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    options = {field.name: getattr(method, field.name) for field in fields}
    plain = {key: value for key, value in options.items() if isinstance(value, bool | int | float | str | None)}
    section = type(experiment.method).model_validate({"name": name, **plain})
    return experiment.model_copy(update={"method": section})


def _check_whole(experiment: Experiment, profiles: ClientProfiles, direction: Literal["down", "up"]) -> None:
    """Refuses sparse or rounded messages where the method needs them to arrive as they were sent."""
    wire, name = getattr(experiment.wire, direction), experiment.method.name
    if profiles.may_be_sparse(direction, experiment.server.rounds):
        raise UserError(f"wire.{direction}.density: got below 1, but what {name} sends {direction} must arrive whole")
    if wire.values != "fp32":
        raise UserError(
            f"wire.{direction}.values: got {wire.values!r}, but what {name} sends {direction} must arrive exactly: fp32"
        )


def _check_out(out: Path, experiment: Experiment, resume: bool) -> Experiment:
    """A fresh run needs a new or empty folder; a resumed one the settings that its folder was made with.

    Returns the settings to run with: `engine.pack: auto` was chosen when the folder was made, and is that number now.
    """
    if not check_out(out, resume, "run", "config.yaml"):
        return experiment
    known = config.load_config(out / "config.yaml")
    if experiment.engine.pack == "auto" and known.engine.pack != "auto":
        engine = experiment.engine.model_copy(update={"pack": known.engine.pack})
        experiment = experiment.model_copy(update={"engine": engine})
    settings = experiment.model_dump(mode="json")
    made_with, now = known.digest(), settings_digest(settings)
    if made_with != now:
        changed = differences(known.model_dump(mode="json"), settings)
        raise UserError(
            f"--resume: {out} was made with other settings (digest {made_with}, these have {now}): {changed}; "
            "resume with its config.yaml or choose another --out"
        )
    return experiment


class _Summary(Sink):
    """Keeps the summary of a run."""

    def __init__(self) -> None:
        self.figures: Mapping[str, Any] = {}

    def finish(self, summary: Record, table: Table | None) -> None:
        self.figures = summary
