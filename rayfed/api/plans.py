"""From settings to a plan.

`prepare` builds and checks everything exactly once and returns a `RunPlan`. Below this module nothing takes the whole
settings, builds a method again, or loads the base model only to describe it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from yaml.representer import RepresenterError

from rayfed import channels, config, methods, objectives, privacy, tasks, weighting
from rayfed.api.classification import by_experience, check_classification, describe_sequence
from rayfed.api.combinations import check_channel, check_head, check_objective, check_weighting
from rayfed.api.initial_adapter import initial_adapter
from rayfed.api.topologies import build_algorithm, on_graph
from rayfed.channels import Channel
from rayfed.clients.plan import RunPlan
from rayfed.config import Experiment
from rayfed.config.adapter import adapter_folder, with_digest
from rayfed.config.method import Direction
from rayfed.config.parse import dump_settings
from rayfed.config.task import Data, Model
from rayfed.errors import UserError, allowed
from rayfed.keywords import suggest_keywords
from rayfed.lora.adapter import scale_of
from rayfed.methods import Method
from rayfed.objectives import Objective, Stateful
from rayfed.own_code import own_failures
from rayfed.profiles.client_profiles import ClientProfiles
from rayfed.profiles.profile import Profile
from rayfed.server.optimizers import ServerOptimizer
from rayfed.server.sampling import cohort
from rayfed.tasks.base import Task
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.models.four_bit import linear_layers
from rayfed.tasks.models.spec import ModelSpec, check_dtype, describe_model
from rayfed.topologies import Algorithm
from rayfed.weighting import Weighting

PRETRAINED = "pretrain.json"
"""The file in the folder of a model that says how `rayfed pretrain` made it."""
Settings = Experiment | str | Path | Mapping[str, Any]
"""What a function of the API takes as settings, see `read_settings`."""


@dataclass(frozen=True)
class Components:
    """What the settings name, built: everything of a plan that needs neither data nor a model."""

    task: Task
    method: Method
    objective: Objective
    weighting: Weighting
    channel: Channel
    server_optimizer: str
    profiles: ClientProfiles
    algorithm: Algorithm | None
    """Of a topology without a server."""


def read_settings(source: Settings) -> Experiment:
    """The settings as an Experiment: they may be one, the path of a YAML file, or a mapping of sections.

    Raises UserError, one line per mistake.
    """
    if isinstance(source, Experiment):
        return with_digest(source)
    if isinstance(source, str | Path):
        return config.load_config(source)
    if isinstance(source, Mapping):
        return config.validate(dict(source))
    raise allowed("experiment", source, "it is an Experiment, the path of a YAML file, or a mapping of sections")


@contextmanager
def settings_file(source: str | Path | Mapping[str, Any]) -> Iterator[Path | str]:
    """The YAML file at this path, or a temporary one with the mapping. UserError where it is neither."""
    if isinstance(source, str | Path):
        yield source
        return
    if not isinstance(source, Mapping):
        raise allowed("config", source, "it is the path of a YAML file, or a mapping of sections")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "settings"
        try:
            path.write_text(dump_settings(dict(source)), encoding="utf-8")
        except RepresenterError as error:
            raise allowed("config", error.args[-1], "a setting is a text, a number, a list or a mapping") from None
        yield path


@suggest_keywords
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads a YAML file, applies `dotted.key=value` overrides, validates fields and combinations.

    Raises UserError (a ValueError), one line per mistake: the field, the value, what is allowed.
    """
    experiment = config.load_config(path, overrides)
    build_components(experiment)
    return experiment


@own_failures(UserError)
def build_components(experiment: Experiment, task: Task | None = None, method: Method | None = None) -> Components:
    """Builds what the settings name. UserError where parts do not go together. Every `auto` becomes a choice here."""
    data, server, lora, name = experiment.data, experiment.server, experiment.lora, experiment.method.name
    method = method or methods.build(name, **experiment.method.options)
    sections: dict[str, Any] = {
        "data": data,
        "problem": experiment.problem,
        "partition": experiment.partition,
        "model": experiment.model,
        "seed": experiment.seed,
    }
    task = task.configure(**sections) if task else tasks.build(**sections)
    task.check(lora=lora, server=server, eval=experiment.eval, engine=experiment.engine)
    if (rows := experiment.eval.generate_rows) is not None and not task.generates:
        raise UserError(f"eval.generate_rows: got {rows}, but only data.task=instruction writes responses")
    objective = objectives.build(experiment.objective.name, **experiment.objective.options)
    objective.check(experiment.objective.name, task=task, lora=lora)
    graph = experiment.topology.kind == "graph"
    optimizer = ("fedavg" if graph else method.optimizer) if server.optimizer == "auto" else server.optimizer
    if isinstance(objective, Stateful) and server.optimizer == "auto":
        optimizer = objective.server_optimizer(optimizer)
    if optimizer not in method.optimizers:
        raise UserError(f"server.optimizer: got {optimizer!r}, but {name} allows {', '.join(method.optimizers)}")
    check_classification(experiment, task, objective, ServerOptimizer(optimizer, server))
    if lora.train == "head" and getattr(method, "train", "all") == "masked":
        raise UserError("method.train: got 'masked', but lora.train=head already says what trains")
    if experiment.model.adapter is not None and method.refuses_adapter:
        reason = f"{name} cannot start from one: {method.refuses_adapter}"
        what = f"{reason}; these can: {', '.join(methods.with_adapters())}"
        raise allowed("model.adapter", experiment.model.adapter, what)
    profiles = ClientProfiles(experiment.profiles, lora, experiment.wire, experiment.seed)
    if profiles.mixed_ranks and not method.mixed_ranks:
        raise UserError(
            f"profiles.kind: got {experiment.profiles.kind!r}, which gives clients different ranks, but {name} needs "
            f"all of them at lora.rank={lora.rank}; mixed ranks are taken by {', '.join(methods.with_mixed_ranks())}"
        )
    if not method.sparse_down:
        _check_whole(name, "down", experiment.wire.down, profiles.may_be_sparse("down", server.rounds))
    if not method.sparse_up:
        _check_whole(name, "up", experiment.wire.up, profiles.may_be_sparse("up", server.rounds))
    privacy.check(experiment.privacy, name, method, server, experiment.client, experiment.model, experiment.engine)
    changed = objective.replaces_loss or objective.adds_penalty or objective.changes_gradient
    if experiment.privacy.kind == "example" and changed:
        what = "with privacy.kind=example a client minimises the task's own loss of each row alone; plain is allowed"
        raise allowed("objective.name", experiment.objective.name, what)
    algorithm = build_algorithm(experiment, method, profiles)
    by_default = method.weights if experiment.privacy.kind == "none" and not graph else "uniform"
    if isinstance(objective, Stateful):
        check_objective(experiment, objective, method, profiles)
        by_default = objective.server_weights or by_default
    weights = by_default if server.weights == "auto" else server.weights
    weigher = weighting.build(weights, **experiment.weighting.options)
    check_weighting(server, weights, weigher, name, method)
    check_channel(experiment, weights, weigher, method, objective, optimizer, profiles)
    channel = channels.build(experiment.channel, experiment.seed)
    return Components(task, method, objective, weigher, channel, optimizer, profiles, algorithm)


@suggest_keywords
def prepare(
    experiment: Settings, *, task: Task | None = None, method: Method | None = None,
    federation: Federation | None = None,
) -> RunPlan:  # fmt: skip
    """Builds and checks everything that a run consists of, exactly once. Nothing is started or written.

    ``task`` and ``method`` replace those that the settings name. ``federation`` spares loading the data again: that of
    a plan with the same `rayfed.config.marks.data_key`. Raises UserError where settings, data or model are wrong.
    `engine.pack: auto` stays open (`RunPlan.pack` is None) until a worker can measure.
    """
    settings = describe_objects(read_settings(experiment), task, method)
    return make_plan(settings, build_components(settings, task, method), federation)


def check(experiment: Experiment, federation: Federation | None = None, model: bool = True) -> Federation:
    """All that `prepare` checks; returns the data. Without ``model`` the base model is not loaded."""
    parts = build_components(experiment)
    federation = _checked_data(experiment, parts, federation)
    if model:
        spec = _described_model(experiment, parts, federation)
        initial_adapter(experiment.model, experiment.lora, experiment.seed, spec, federation.classes)
    return federation


def make_plan(experiment: Experiment, parts: Components, federation: Federation | None) -> RunPlan:
    """The plan of settings whose components are built. Errors as in `prepare`."""
    engine = experiment.engine
    federation = _checked_data(experiment, parts, federation)
    model = _described_model(experiment, parts, federation)
    mechanism = _privacy(experiment, parts, federation)
    start = initial_adapter(experiment.model, experiment.lora, experiment.seed, model, federation.classes)
    initial, *notes = start or (None,)
    built = dict(vars(parts))
    if (algorithm := built.pop("algorithm")) is not None:
        built["topology"], built["method"], about = on_graph(experiment, algorithm, parts.method, federation)
        notes += about
    return RunPlan(
        **built,
        privacy=mechanism,
        federation=federation,
        model=model,
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
        initial=initial,
        notes=(
            *notes,
            *describe_sequence(experiment.server.rounds, federation),
            *([mechanism.describe()] if mechanism else []),
        ),
    )


@own_failures(UserError)
def _checked_data(experiment: Experiment, parts: Components, federation: Federation | None) -> Federation:
    # Only for this process: Ray knows what a cluster's nodes have.
    if experiment.engine.kind == "local" and experiment.engine.device == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device: got 'cuda', but torch finds no GPU here; allowed is cpu")
    if experiment.pretrain.model is not None:
        _check_pretrained(experiment.model, experiment.data)
    if experiment.model.adapter is not None:
        adapter_folder(experiment.model.adapter)  # raises UserError; before the data, which may take minutes
    federation = federation or parts.task.load_data()
    server, clients = experiment.server, federation.clients
    for where, own in by_experience(experiment.partition.sequence, federation):
        candidates = clients if server.empty_clients else len(own.holders)
        if server.cohort > candidates:
            which = f"exist{where}" if server.empty_clients else f"hold data{where}"
            raise UserError(f"server.cohort: got {server.cohort}, but only {candidates} of {clients} clients {which}")
        parts.profiles.check(own.sizes, server.empty_clients)
    if experiment.eval.early_stop and not len(federation.validation):
        raise UserError("eval.early_stop: needs a validation split; set data.validation above 0")
    return federation


def _check_pretrained(model: Model, data: Data) -> None:
    """UserError where the base of the section `pretrain` is not there, or has seen rows of clients."""
    folder, share = Path(model.name), data.pretrain_share
    if not folder.is_dir():
        what = "there is no such folder yet: `rayfed pretrain` makes it from this config"
        raise allowed("model.name", model.name, what)
    try:
        seen = float(json.loads((folder / PRETRAINED).read_text(encoding="utf-8"))["data"]["pretrain_share"])
    except (OSError, ValueError, KeyError, TypeError):  # another model than one of `rayfed pretrain`
        return
    if seen > share:
        what = f"the base in {folder} has seen {seen}: clients would have rows on which it was trained"
        raise allowed("data.pretrain_share", share, what)


@own_failures(UserError)
def _described_model(experiment: Experiment, parts: Components, federation: Federation) -> ModelSpec:
    task, engine, model = parts.task, experiment.engine, experiment.model
    base = task.load_base(federation)
    batching = task.batching(base, engine.padding)
    spec = describe_model(base, task.base_name, experiment.lora, model.dtype, batching, engine.gradient_checkpointing)
    check_head(experiment, parts.objective, spec)
    if model.load_in_4bit:
        linear_layers(base)  # raises UserError if there are none
        spec = dataclasses.replace(spec, load_in_4bit=True)
    if model.dtype != "float32":
        check_dtype(base, model.name, model.dtype, task.sample())
    return spec


def _privacy(experiment: Experiment, parts: Components, federation: Federation) -> privacy.Privacy | None:
    server, lora = experiment.server, experiment.lora
    candidates = np.arange(federation.clients) if server.empty_clients else federation.holders
    draw = partial(cohort, candidates, server.cohort, experiment.seed, sampling=server.sampling)
    profile = Profile(-1, lora.rank, scale_of(lora.rank, lora.alpha, lora.rslora))
    own = (experiment.privacy, server, experiment.client, profile, experiment.seed)
    return privacy.build(*own, len(candidates), draw, federation.sizes.tolist())


@own_failures(UserError)
def describe_objects(experiment: Experiment, task: Task | None, method: Method | None) -> Experiment:
    """The settings with what config.yaml says of a task and a method that are objects.

    A method's import path and options take the place of `method`; for a task see `Task.described`.
    """
    if task is not None:
        if not isinstance(task, Task):
            raise allowed("task", task, "it is an object of a subclass of rayfed.Task")
        data, model = task.described(experiment.data, experiment.model)
        experiment = experiment.model_copy(update={"data": data, "model": model})
    if method is None:
        return experiment
    if not isinstance(method, Method):
        raise allowed("method", method, "it is an object of a subclass of rayfed.Method")
    cls = type(method)
    package, _, file = cls.__module__.rpartition(".")
    name = file if package == "rayfed.methods" else f"{cls.__module__}:{cls.__qualname__}"
    fields: Sequence[Any] = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    options = {field.name: getattr(method, field.name) for field in fields}
    plain = {key: value for key, value in options.items() if isinstance(value, bool | int | float | str | None)}
    section = type(experiment.method).model_validate({"name": name, **plain})
    return experiment.model_copy(update={"method": section})


def _check_whole(name: str, way: str, wire: Direction, sparse: bool) -> None:
    """Refuses sparse or rounded messages ``way`` (down or up): the method of that name needs them as they were sent."""
    if sparse:
        raise UserError(f"wire.{way}.density: got below 1, but what {name} sends {way} must arrive whole")
    if wire.values != "fp32":
        raise allowed(f"wire.{way}.values", wire.values, f"what {name} sends {way} must arrive exactly: fp32")
