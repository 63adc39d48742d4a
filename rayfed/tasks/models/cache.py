"""The base model of a process: runs that follow each other load it only once.

All trainers of the process share its weights. They may replace modules, move the model or change its number format, but
they must never write to the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from rayfed.tasks.models.base import FrozenBase

_cached: dict[str, FrozenBase] = {}  # at most one base, by its key


def shared_base(key: str, load: Callable[[], FrozenBase]) -> FrozenBase:
    """New modules that share the weights of the last base if that has the same ``key``, otherwise of ``load()``."""
    if key not in _cached:
        _cached.clear()  # first, so that memory never contains two
        _cached[key] = load()
    return _copy_sharing_weights(_cached[key])


def forget_base() -> None:
    """Drops the last base. Its memory is free once no trainer uses it."""
    _cached.clear()


def _copy_sharing_weights(base: FrozenBase) -> FrozenBase:
    """A copy of all modules, with the same memory for parameters and buffers."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in base.model.parameters()}
    memo |= {id(buffer): buffer for buffer in base.model.buffers()}
    return replace(base, model=copy.deepcopy(base.model, memo))
