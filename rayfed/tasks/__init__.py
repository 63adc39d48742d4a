"""Tasks: what is learned. One file a task; data sources, models and the known-answer problem have their own folders.

A task of your own is a subclass of `Task`; examples/own_task.py shows one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayfed.errors import allowed
from rayfed.plugins import member_class
from rayfed.tasks.base import Metric, Task
from rayfed.tasks.data.federation import Federation, NumberRows, Rows
from rayfed.tasks.models.base import FrozenBase

if TYPE_CHECKING:
    from rayfed.config.task import Data, Model, Partition, Problem

__all__ = ["Federation", "FrozenBase", "Metric", "NumberRows", "Rows", "Task", "build"]


def build(*, data: Data, problem: Problem, partition: Partition, model: Model, seed: int) -> Task:
    """The task that these sections of the settings describe. UserError where it was a Python object."""
    if data.fingerprint is not None:
        what = "the task was a Python object: give it again, rayfed.run(..., task=...)"
        raise allowed("data.fingerprint", data.fingerprint, what)
    cls = member_class("rayfed.tasks", data.task, Task, "data.source")
    return cls.from_settings(data=data, problem=problem, partition=partition, model=model, seed=seed)
