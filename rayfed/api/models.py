"""What a run left, loaded for inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from rayfed import config, tasks
from rayfed.keywords import suggest_keywords
from rayfed.errors import UserError, allowed
from rayfed.lora.peft_files import load_peft, read_json, refuse_links
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.models.base import in_dtype, name_classes
from rayfed.tasks.models.cache import forget_base
from rayfed.tasks.models.spec import describe_model


@suggest_keywords
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
    made_by = (experiment.data.fingerprint or "").partition(" ")[0]
    if made_by not in ("", "rayfed.tasks.text_classification:TextClassification"):
        raise allowed(
            "run", str(run), f"its model comes from a task of its own, {made_by}, which load_model cannot build"
        )
    model = experiment.model
    if model.trust_remote_code and not trust_remote_code:
        what = f"the code of {model.name} runs only with load_model(run, trust_remote_code=True)"
        raise UserError(f"model.trust_remote_code: got true in {config_file}, but {what}")
    refuse_links(folder)
    classes = read_json(folder / "classes.json")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise UserError(f"adapter: {folder / 'classes.json'} is no list of the names of classes")
    # The task alone: a method may be named by an import path. Rows that were Python objects are not needed here.
    data = experiment.data.model_copy(update={"fingerprint": None})
    task = tasks.build(
        data=data, problem=experiment.problem, partition=experiment.partition, model=model, seed=experiment.seed
    )
    nothing: Any = None
    federation = Federation(nothing, nothing, nothing, tuple(classes), np.zeros(0, np.int64), np.zeros(1, np.int64))
    forget_base()  # before and after: no run shares the weights of this model, which may be changed
    base = in_dtype(task.load_base(federation), model.dtype)
    forget_base()
    spec = describe_model(base, task.base_name, experiment.lora, model.dtype, task.batching(base, "auto"), False)
    name_classes(base.model, classes)
    head = {**spec.head, **spec.frozen_head}
    return load_peft(base.model, folder, spec.shapes, head, base.heads, spec.root)
