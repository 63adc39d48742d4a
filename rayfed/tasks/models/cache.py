"""One base model for many runs of one process: a sweep's trials that follow each other need not load it again.

`keep_base` is for a process that does one run after another. From then on `shared_base` gives models with the weights
of the last one that was loaded, as long as the same one is asked for. Whoever gets one may exchange its modules, move
it or change its number format, but must not write into its weights: they are everybody's.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rayfed.tasks.models.base import FrozenBase, base_of, model_path

if TYPE_CHECKING:
    from rayfed.config import Experiment

_kept: dict[str, FrozenBase] | None = None  # at most one, by what was asked for; None: this process keeps none


def keep_base() -> None:
    """From here on this process keeps the last base model that it loaded."""
    global _kept
    _kept = _kept or {}


def shared_base(experiment: Experiment, classes: int) -> FrozenBase:
    """As `base_of`; in a process that keeps its base, perhaps without loading it."""
    if _kept is None:
        return base_of(experiment, classes)
    wanted = _name(experiment, classes)
    if wanted not in _kept:
        _kept.clear()  # before the next one is loaded
        _kept[wanted] = base_of(experiment, classes)
    return _copy_sharing_weights(_kept[wanted])


def _name(experiment: Experiment, classes: int) -> str:
    """Names what `base_of` would load."""
    asked: list[Any] = [experiment.data.source, experiment.seed, classes, experiment.problem.inputs]
    asked.append(experiment.model.model_dump(mode="json", exclude={"dtype"}))  # it is loaded in float32
    folder = None if experiment.data.source == "lowrank" else Path(model_path(experiment.model))
    if folder and folder.is_dir():  # other files may come under its name
        asked += sorted((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in folder.iterdir())
    return json.dumps(asked)


def _copy_sharing_weights(base: FrozenBase) -> FrozenBase:
    """The same model in modules of its own, on the same memory."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in base.model.parameters()}
    memo |= {id(buffer): buffer for buffer in base.model.buffers()}
    return replace(base, model=copy.deepcopy(base.model, memo))
