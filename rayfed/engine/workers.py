"""The Ray crew: worker actors that embody clients, and their supervision.

A worker is one process with a learner. The crew hands each idle worker the next job and waits for whichever finishes
first. When a worker dies, its job goes back to the front of the queue and a new worker takes its place: jobs are
functions of their arguments, so the result is the one the dead worker would have given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError

from rayfed.clients.blueprint import Blueprint
from rayfed.clients.jobs import Job, Result
from rayfed.config import Experiment
from rayfed.errors import RunError, UserError
from rayfed.server.crew import Done, Task
from rayfed.tasks.federation import Federation


class Worker:
    """The actor: a learner behind a remote call. Payloads arrive as bytes, resolved by Ray from the object store."""

    def __init__(self, experiment: Experiment, federation: Federation, blueprint: Blueprint) -> None:
        from rayfed.clients.learner import Learner
        from rayfed.engine.setup import prepare_process

        prepare_process(experiment)
        self.learner = Learner(experiment, federation, blueprint)

    def execute(self, job: Job, *payloads: bytes) -> Result:
        return self.learner.execute(job, payloads)


class RayCrew:
    """`engine.workers` actors, each holding `cpus_per_worker` CPUs and `gpus_per_worker` GPUs."""

    def __init__(self, experiment: Experiment, federation: ray.ObjectRef, blueprint: Blueprint) -> None:
        self.experiment, self.federation, self.blueprint = experiment, federation, ray.put(blueprint)
        self.events: list[str] = []
        self.workers: list[Any] = [self._hire() for _ in range(experiment.engine.workers)]

    def put(self, payload: bytes) -> ray.ObjectRef:
        return ray.put(payload)

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        queue = deque(range(len(tasks)))
        idle = deque(self.workers)
        retries = [0] * len(tasks)
        flying: dict[ray.ObjectRef, tuple[int, Any]] = {}
        while queue or flying:
            while queue and idle:
                index, worker = queue.popleft(), idle.popleft()
                task = tasks[index]
                flying[worker.execute.remote(task.job, *task.payloads)] = index, worker
            (ready,), _ = ray.wait(list(flying), num_returns=1)
            index, worker = flying.pop(ready)
            try:
                result = ray.get(ready)
            except (RayActorError, WorkerCrashedError) as error:
                retries[index] += 1
                self._check_retries(retries[index], error)
                idle.append(self._replace(worker))
                queue.appendleft(index)
                continue
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, UserError | RunError) else error) from None
            idle.append(worker)
            yield Done(index, result, retries[index])

    def drain_events(self) -> list[str]:
        events, self.events = self.events, []
        return events

    def close(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []

    def _hire(self) -> Any:
        engine = self.experiment.engine
        actor = ray.remote(num_cpus=engine.cpus_per_worker, num_gpus=engine.gpus_per_worker)(Worker)
        return actor.remote(self.experiment, self.federation, self.blueprint)

    def _replace(self, dead: Any) -> Any:
        replacement = self._hire()
        self.workers[self.workers.index(dead)] = replacement
        self.events.append("a worker died; a new one takes its place and its clients are trained again")
        return replacement

    def _check_retries(self, count: int, error: Exception) -> None:
        limit = self.experiment.engine.retries
        if count > limit:
            reason = str(error).strip().splitlines()[-1:] or ["no reason given"]
            raise RunError(f"a pack failed {count} times because its worker died (engine.retries={limit}): {reason[0]}")
