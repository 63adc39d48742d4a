"""Tasks: what is learned. One file a task; data sources, models and the known-answer problem have their own folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayfed.errors import allowed
from rayfed.plugins import member_class

if TYPE_CHECKING:
    from rayfed.config.task import Data, Model, Partition, Problem
    from rayfed.tasks.base import Task


def build(*, data: Data, problem: Problem, partition: Partition, model: Model, seed: int) -> Task:
    """The task that these sections of the settings describe. UserError where it was a Python object."""
    from rayfed.tasks.base import Task

    if data.fingerprint is not None:
        what = "the task was a Python object: give it again, rayfed.run(..., task=...)"
        raise allowed("data.fingerprint", data.fingerprint, what)
    cls = member_class("rayfed.tasks", data.task, Task, "data.source")
    return cls.from_settings(data=data, problem=problem, partition=partition, model=model, seed=seed)
