"""The in-process executor: one trainer, jobs in order, no Ray. The same bits as any number of Ray workers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch

from rayfed.clients.plan import RunPlan
from rayfed.clients.trainer import Trainer
from rayfed.device import prepare_process
from rayfed.engine.callbacks import Callback
from rayfed.engine.rounds import run_rounds
from rayfed.server.executor import Executor, Submission, SubmissionResult, other_capability
from rayfed.tracking import Record, Sink, open_sinks


class LocalExecutor(Executor):
    """Executes every job in this process, one after the other."""

    def __init__(self, plan: RunPlan) -> None:
        self.threads = torch.get_num_threads()
        prepare_process(plan.engine.threads, plan.engine.device, plan.engine.deterministic)
        self.trainer = Trainer(plan)
        self.capability = self.own_capability = plan.capability

    def run(self, submissions: Sequence[Submission]) -> Iterator[SubmissionResult]:
        for index, submission in enumerate(submissions):
            yield SubmissionResult(index, self.trainer.execute(submission.job, submission.payloads))

    def subscribe(self, event: Callable[[str], None]) -> None:
        if self.own_capability != self.capability:
            event(other_capability(self.own_capability, self.capability))

    def close(self) -> None:
        torch.set_num_threads(self.threads)  # the caller's process goes on with its own setting


def run_here(
    plan: RunPlan, out: Path, resume: bool, uri: str | None, console: Sink, callbacks: Sequence[Callback] = ()
) -> Generator[Record]:
    """Runs the plan in this process, one round whenever a record is asked for; see `rayfed.engine.rounds.run_rounds`.

    ``console`` is shown what happens.
    """
    with closing(LocalExecutor(plan)) as executor, closing(open_sinks(plan.tracking, out, console)) as sinks:
        yield from run_rounds(plan, executor, out, sinks, resume, uri, callbacks)
