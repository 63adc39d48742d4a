"""What a run left, loaded for inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import nn

from rayfed import config, tasks
from rayfed.config import Experiment
from rayfed.config.task import Data
from rayfed.errors import UserError, allowed
from rayfed.keywords import suggest_keywords
from rayfed.lora.peft_files import load_peft, read_json, refuse_links
from rayfed.own_code import own_failures
from rayfed.plugins import member_class
from rayfed.tasks.base import Task
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.models.base import in_dtype, name_classes
from rayfed.tasks.models.cache import forget_base
from rayfed.tasks.models.spec import describe_model


@suggest_keywords
@own_failures(UserError)
def load_model(run: str | Path, *, task: Task | None = None, trust_remote_code: bool = False) -> nn.Module:
    """A finished run's model, ready for inference: a PeftModel of the base it was trained on and its `adapter/`.

    ``run`` is a run directory, which may come from anybody: nothing in it is executed, pickles are not opened, links
    are not followed. A base model that comes with code of its own (`model.trust_remote_code`) is loaded only if
    ``trust_remote_code`` says so as well. `adapter/README.md` has the lines that load the same without rayfed.

    ``task`` is needed where the run's model came from Python: an equal object of your own subclass of `rayfed.Task`, or
    `rayfed.TextClassification(model=..., tokenizer=...)`, `MultiLabel` or `Regression`. Of the latter, rows and
    functions are not needed.

    Raises UserError where the run has no model to load, a file is missing, damaged or a link, ``task`` is not what the
    run had, or the base cannot be loaded.
    """
    out = Path(run)
    config_file, folder = out / "config.yaml", out / "adapter"
    if config_file.is_symlink() or config_file.is_fifo():
        raise allowed("config", str(config_file), "it is a symbolic link or a pipe; only plain files are read")
    experiment = config.load_config(config_file)
    if experiment.data.source == "lowrank" and experiment.data.fingerprint is None:
        raise allowed("run", str(run), "it solved data.source=lowrank, which has no model to load")
    _check_task(experiment, task, run)
    model = experiment.model
    if model.trust_remote_code and not trust_remote_code:
        what = f"the code of {model.name} runs only with load_model(run, trust_remote_code=True)"
        raise UserError(f"model.trust_remote_code: got true in {config_file}, but {what}")
    refuse_links(folder)
    # The task alone: a method may be named by an import path. Rows that were Python objects are not needed here.
    data = experiment.data.model_copy(update={"fingerprint": None})
    names = ("problem", "partition", "model", "seed")
    sections: dict[str, Any] = {"data": data, **{name: getattr(experiment, name) for name in names}}
    task = task.configure(**sections) if task else tasks.build(**sections)
    classes = _classes(folder) if task.has_classes else []
    nothing: Any = None
    federation = Federation(nothing, nothing, nothing, tuple(classes), np.zeros(0, np.int64), np.zeros(1, np.int64))
    if not _built_in(experiment.data):
        federation = task.load_data()
    forget_base()  # before and after: no run shares the weights of this model, which may be changed
    base = in_dtype(task.load_base(federation), model.dtype)
    forget_base()
    spec = describe_model(base, task.base_name, experiment.lora, model.dtype, task.batching(base, "auto"), False)
    name_classes(base.model, classes)
    head = {**spec.head, **spec.frozen_head}
    return load_peft(base.model, folder, spec.shapes, head, base.heads, spec.root)


def _classes(folder: Path) -> list[str]:
    """The names of the classes that an adapter's head knows."""
    classes = read_json(folder / "classes.json")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise UserError(f"adapter: {folder / 'classes.json'} is no list of the names of classes")
    return classes


def _built_in(data: Data) -> bool:
    """Whether the run's task was rayfed's own, and no class of the user's."""
    made_by = (data.fingerprint or "").partition(" ")[0]
    ours = made_by in ("", *(f"{cls.__module__}:{cls.__qualname__}" for cls in _tasks()))
    return ours and not data.own_task


def _tasks() -> list[type[Task]]:
    """rayfed's own tasks whose rows may be Python objects: the classes that `data.task` names."""
    names = get_args(Data.model_fields["task"].annotation)
    return [member_class("rayfed.tasks", name, Task, "data.task") for name in names]


def _from_python(experiment: Experiment) -> str | None:
    """What names the code that made the run's base model; None where the settings name the model."""
    if _built_in(experiment.data):
        return experiment.model.fingerprint
    return experiment.data.fingerprint or experiment.data.source


def _check_task(experiment: Experiment, task: Task | None, run: str | Path) -> None:
    """UserError where the base model comes from Python, and ``task`` does not make the same one."""
    made_by, ours = _from_python(experiment), _built_in(experiment.data)
    if task is None:
        if made_by is not None:
            own = member_class("rayfed.tasks", experiment.data.task, Task, "data.task").__name__
            what = f"rayfed.{own}(model=..., tokenizer=...)" if ours else "an equal task"
            raise allowed("run", str(run), f"its model comes from {made_by}: load_model(run, task=...) needs {what}")
        return
    if not isinstance(task, Task):
        raise allowed("task", task, "it is an object of a subclass of rayfed.Task")
    data, model = task.described(Data() if ours else experiment.data, experiment.model)
    found = model.fingerprint if ours else data.fingerprint
    if not ours and experiment.data.fingerprint is None:
        found = (found or "").partition(" ")[0]  # the run had the class by its import path alone
    if found != made_by or ours != (type(task) in _tasks()):
        raise allowed("task", found or type(task).__name__, f"the run's model comes from {made_by or model.name}")
