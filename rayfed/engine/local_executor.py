"""The in-process executor: one trainer, jobs in order, no Ray. The same bits as any number of Ray workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rayfed.clients.trainer import Trainer
from rayfed.config import Experiment
from rayfed.engine.setup import prepare_process
from rayfed.server.executor import Submission, SubmissionResult
from rayfed.tasks.federation import Federation
from rayfed.tasks.models.spec import ModelSpec


class LocalExecutor:
    """Does every job in this process, one after the other."""

    def __init__(self, experiment: Experiment, federation: Federation, model_spec: ModelSpec) -> None:
        self.threads = torch.get_num_threads()
        prepare_process(experiment)
        self.trainer = Trainer(experiment, federation, model_spec)

    def put(self, payload: Any) -> Any:
        return payload

    def run(self, tasks: Sequence[Submission]) -> Iterator[SubmissionResult]:
        for index, task in enumerate(tasks):
            yield SubmissionResult(index, self.trainer.execute(task.job, task.payloads))

    def drain_events(self) -> list[str]:
        return []

    def close(self) -> None:
        torch.set_num_threads(self.threads)  # the caller's process goes on with its own setting
