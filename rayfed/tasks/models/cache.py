"""One base model for many runs of a process: runs that follow each other need not load it again.

A base is shared by all trainers of the process. They may replace modules, move the model or change its number format,
but must never write to its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from rayfed.tasks.models.base import FrozenBase

_cached: dict[str, FrozenBase] = {}  # at most one, by its key


def shared_base(key: str, load: Callable[[], FrozenBase]) -> FrozenBase:
    """The base model of that key, in modules of its own: the last one that was loaded, or what ``load`` returns."""
    if key not in _cached:
        _cached.clear()  # before the next one is loaded
        _cached[key] = load()
    return _copy_sharing_weights(_cached[key])


def forget_base() -> None:
    """Gives the memory of the last base back, once no trainer uses it."""
    _cached.clear()


def _copy_sharing_weights(base: FrozenBase) -> FrozenBase:
    """The same model in modules of its own, on the same memory."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in base.model.parameters()}
    memo |= {id(buffer): buffer for buffer in base.model.buffers()}
    return replace(base, model=copy.deepcopy(base.model, memo))
