"""The Ray executor: worker actors that embody clients, and their supervision.

A worker is one process with a trainer. The executor gives each idle worker the next job and waits for the first result.
When a worker dies, its job returns to the front of the queue and a new worker is started. Jobs are functions of their
arguments, so the result is the one that the dead worker would have given. A new worker gets jobs once it is ready:
where a lost node leaves no room for it, the other workers go on without it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
from ray.util.placement_group import remove_placement_group

from rayfed.clients.messages import Job, Result
from rayfed.clients.plan import RunPlan
from rayfed.config.execution import Engine
from rayfed.engine.placement import in_group, reserve
from rayfed.errors import RunError, UserError
from rayfed.server.executor import Executor, Submission, SubmissionResult

LOST = (RayActorError, WorkerCrashedError, ObjectLostError)  # the process, or the node that held its result, is gone


class Worker:
    """The actor: a trainer behind a remote call. Plan and payloads arrive resolved by Ray from the object store."""

    def __init__(self, plan: RunPlan) -> None:
        from rayfed.clients.trainer import Trainer
        from rayfed.device import prepare_process

        prepare_process(plan.engine.threads, plan.engine.device, plan.engine.deterministic)
        self.trainer = Trainer(plan)

    def execute(self, job: Job, *payloads: bytes) -> Result:
        return self.trainer.execute(job, payloads)


class RayExecutor(Executor):
    """`engine.workers` actors, each holding `cpus_per_worker` CPUs and `gpus` GPUs. ``plan``: a reference to a
    RunPlan."""

    def __init__(self, engine: Engine, plan: ray.ObjectRef) -> None:
        self.engine, self.plan = engine, plan
        self.events: list[str] = []
        self.group = reserve(engine)
        self.workers: list[Any] = []  # those that are ready
        self.starting: dict[ray.ObjectRef, Any] = {}  # the others, by the reference that resolves when they are ready
        self.failed_starts = 0  # since the last successful one
        for _ in range(engine.workers):
            self._start_worker()

    def put(self, payload: bytes) -> ray.ObjectRef:
        return ray.put(payload)

    def run(self, submissions: Sequence[Submission]) -> Iterator[SubmissionResult]:
        queue = deque(range(len(submissions)))
        idle = deque(worker for worker in self.workers if worker not in self.starting.values())
        retries = [0] * len(submissions)
        in_flight: dict[ray.ObjectRef, tuple[int, Any]] = {}
        while queue or in_flight:
            while queue and idle:
                index, worker = queue.popleft(), idle.popleft()
                submission = submissions[index]
                in_flight[worker.execute.remote(submission.job, *submission.payloads)] = index, worker
            (ready,), _ = ray.wait([*in_flight, *self.starting], num_returns=1)
            if ready in self.starting:
                idle.extend(self._started(ready))
                continue
            index, worker = in_flight.pop(ready)
            try:
                result = ray.get(ready)
            except LOST as error:
                retries[index] += 1
                self._remove_worker(worker)  # first: after an error, other submissions must find only living workers
                self._check_retries(retries[index], error)
                self._replace_worker()
                queue.appendleft(index)
                while idle:  # a lost node takes several workers: idle ones must show that they live
                    self._expect(idle.popleft())
                continue
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, UserError | RunError) else error) from None
            idle.append(worker)
            yield SubmissionResult(index, result, retries[index])

    def drain_events(self) -> list[str]:
        events, self.events = self.events, []
        return events

    def close(self) -> None:
        for worker in (*self.workers, *self.starting.values()):
            ray.kill(worker)
        self.workers, self.starting = [], {}
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None

    def _start_worker(self) -> None:
        actor = ray.remote(num_cpus=self.engine.cpus_per_worker, num_gpus=self.engine.gpus)(Worker)
        self._expect(actor.options(scheduling_strategy=in_group(self.group)).remote(self.plan))

    def _expect(self, worker: Any) -> None:
        """Waits for the worker to be ready before it gets a job."""
        self.starting[worker.__ray_ready__.remote()] = worker

    def _started(self, ready: ray.ObjectRef) -> list[Any]:
        """The worker that is ready; an empty list where it died, and another one is started."""
        worker = self.starting.pop(ready)
        known = worker in self.workers
        try:
            ray.get(ready)
        except LOST as error:
            if known:
                self._remove_worker(worker)
                self._replace_worker()
                return []
            self.failed_starts += 1
            if self.failed_starts > self.engine.retries:
                count = self.failed_starts
                raise RunError(f"workers died {count} times before their first job: {_last_line(error)}") from None
            self._start_worker()
            return []
        if not known:
            self.failed_starts = 0
            self.workers.append(worker)
        return [worker]

    def _remove_worker(self, dead: Any) -> None:
        ray.kill(dead)  # where only its result was lost it lives, and would keep its place
        self.workers.remove(dead)

    def _replace_worker(self) -> None:
        self._start_worker()
        self.events.append("a worker died; a new one takes its place and its clients are trained again")

    def _check_retries(self, count: int, error: Exception) -> None:
        limit = self.engine.retries
        if count > limit:
            raise RunError(
                f"a pack failed {count} times because its worker died (engine.retries={limit}): {_last_line(error)}"
            )


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines()[-1:] or ["no reason given"])[0]
