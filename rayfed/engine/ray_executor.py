"""The Ray executor: worker actors that embody clients, and who gets which job.

A worker is one process with a trainer. The executor gives each idle worker the next job and waits for the first result.
When a worker dies or hangs, its job returns to the front of the queue and a new worker is started. Jobs are functions
of their arguments, so the result is the one that the lost worker would have given; whatever a hung worker answers later
is never read. A new worker gets jobs once it has loaded its model: where a lost node leaves no room for it, the other
workers go on without it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup

from rayfed.clients.messages import Job, Result
from rayfed.clients.plan import RunPlan
from rayfed.config.execution import Engine
from rayfed.engine.supervision import Losses, Supervision, describe
from rayfed.engine.worker_pool import LOST, WorkerPool, reason_of, resolved
from rayfed.errors import RunError, Stopped, UserError
from rayfed.server.executor import Executor, Submission, SubmissionResult

POLL = 0.5  # seconds between two looks at the deadlines, while nothing arrives


class Worker:
    """The actor: a trainer behind a remote call. Plan and payloads arrive resolved by Ray from the object store."""

    def load(self, plan: RunPlan) -> str:
        """Loads the plan's model; returns the capability of the worker's device.

        Not the constructor's work, which ends when the process has its place.
        """
        from rayfed.clients.trainer import Trainer
        from rayfed.device import prepare_process

        prepare_process(plan.engine.threads, plan.engine.device, plan.engine.deterministic)
        self.trainer = Trainer(plan)
        return plan.capability

    def execute(self, job: Job, *payloads: bytes) -> Result:
        return self.trainer.execute(job, payloads)


@dataclass
class Running:
    """A submission on a worker: when it began, by the supervision's clock, and the seconds that it may take."""

    index: int
    worker: Any
    begun: float
    deadline: float


class RayExecutor(Executor):
    """`engine.workers` actors, each holding `cpus_per_worker` CPUs and `gpus` GPUs.

    ``plan``: a reference to a RunPlan. ``group``: the workers' places (`rayfed.engine.placement.reserve`), which
    `close` gives back; None: any place of the cluster, or of a trial. ``run``: the name of the run.
    """

    def __init__(
        self, engine: Engine, plan: ray.ObjectRef, group: PlacementGroup | None = None, run: str = "run"
    ) -> None:
        self.supervision = Supervision(engine)
        self.pool = WorkerPool(engine, Worker, plan, group, self.supervision, run)
        self.stopping = threading.Event()

    @property
    def capability(self) -> str:
        return self.pool.capability

    @capability.setter
    def capability(self, capability: str) -> None:
        self.pool.capability = capability

    def put(self, payload: bytes) -> ray.ObjectRef:
        return ray.put(payload)

    def run(self, submissions: Sequence[Submission]) -> Iterator[SubmissionResult]:
        rules, pool = self.supervision, self.pool
        rules.begin()
        queue, losses = deque(range(len(submissions))), [Losses() for _ in submissions]
        idle, running = deque(pool.idle()), dict[ray.ObjectRef, Running]()

        def lose(ref: ray.ObjectRef, reason: str, hung: bool = False) -> None:
            lost = running.pop(ref)
            pool.replace(lost.worker)  # first: after an error, other submissions must find only living workers
            job = submissions[lost.index].job
            rules.job_lost(job, losses[lost.index], reason, hung)
            pool.event(f"a worker {'hung' if hung else 'died'} ({reason}); {describe(job)} runs again")
            queue.appendleft(lost.index)
            while idle:  # a lost node takes several workers: idle ones must show that they live
                pool.probe(idle.popleft())

        while queue or running:
            while queue and idle:
                index, worker = queue.popleft(), idle.popleft()
                job, payloads = submissions[index].job, submissions[index].payloads
                ref = worker.execute.remote(job, *payloads)
                running[ref] = Running(index, worker, rules.clock(), rules.deadline(job, losses[index]))
            ready = self._wait([*running, *pool.starting])
            if ready in pool.starting:
                idle.extend(pool.started(ready))
            elif ready is not None:
                try:
                    result = ray.get(ready)
                except LOST as error:
                    lose(ready, reason_of(error))
                except RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, UserError | RunError) else error) from None
                else:
                    done = running.pop(ready)
                    rules.job_done(submissions[done.index].job, rules.clock() - done.begun)
                    idle.append(done.worker)
                    yield SubmissionResult(done.index, result, losses[done.index].count)
            now = rules.clock()
            late = {ref: job.deadline for ref, job in running.items() if now - job.begun > job.deadline}
            for ref in late.keys() - resolved(late):  # results that only wait to be read are in time
                lose(ref, f"no answer in {late[ref]:.3g} s, its deadline", hung=True)
            rules.check(max([pool.check(), *(job.deadline for job in running.values())]))

    def stop(self) -> None:
        self.stopping.set()

    def subscribe(self, event: Callable[[str], None]) -> None:
        self.pool.subscribe(event)

    def close(self) -> None:
        self.pool.close()

    def _wait(self, refs: list[ray.ObjectRef]) -> ray.ObjectRef | None:
        """A reference that is ready; None where there is none yet. Stopped after a call of `stop`."""
        if not refs:
            self.stopping.wait(POLL)  # all workers start later
        ready = ray.wait(refs, num_returns=1, timeout=POLL)[0] if refs else []
        if self.stopping.is_set():
            raise Stopped("the run was asked to stop")
        return ready[0] if ready else None
