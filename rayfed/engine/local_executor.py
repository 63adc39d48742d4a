"""The in-process crew: one learner, jobs in order, no Ray. The same bits as any number of Ray workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rayfed.clients.trainer import Learner
from rayfed.config import Experiment
from rayfed.engine.setup import prepare_process
from rayfed.server.executor import Done, Task
from rayfed.tasks.federation import Federation
from rayfed.tasks.models.spec import Blueprint


class LocalCrew:
    """Does every job in this process, one after the other."""

    def __init__(self, experiment: Experiment, federation: Federation, blueprint: Blueprint) -> None:
        self.threads = torch.get_num_threads()
        prepare_process(experiment)
        self.learner = Learner(experiment, federation, blueprint)

    def put(self, payload: Any) -> Any:
        return payload

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        for index, task in enumerate(tasks):
            yield Done(index, self.learner.execute(task.job, task.payloads))

    def drain_events(self) -> list[str]:
        return []

    def close(self) -> None:
        torch.set_num_threads(self.threads)  # the caller's process goes on with its own setting
