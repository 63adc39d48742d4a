"""The Ray executor: worker actors that embody clients, and their supervision.

A worker is one process with a trainer. The executor hands each idle worker the next job and waits for whichever finishes
first. When a worker dies, its job goes back to the front of the queue and a new worker takes its place: jobs are
functions of their arguments, so the result is the one the dead worker would have given. A new worker gets jobs once it
is there: where a lost node leaves no room for it, the others go on without it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
from ray.util.placement_group import remove_placement_group

from rayfed.clients.messages import Job, Result
from rayfed.config import Experiment
from rayfed.engine.placement import in_group, reserve
from rayfed.errors import RunError, UserError
from rayfed.server.executor import Submission, SubmissionResult
from rayfed.tasks.federation import Federation
from rayfed.tasks.models.spec import ModelSpec

LOST = (RayActorError, WorkerCrashedError, ObjectLostError)  # the process, or the node that held its result, is gone


class Worker:
    """The actor: a trainer behind a remote call. Payloads arrive resolved by Ray from the object store."""

    def __init__(self, experiment: Experiment, federation: Federation, model_spec: ModelSpec) -> None:
        from rayfed.clients.trainer import Trainer
        from rayfed.engine.setup import prepare_process

        prepare_process(experiment)
        self.trainer = Trainer(experiment, federation, model_spec)

    def execute(self, job: Job, *payloads: Any) -> Result:
        return self.trainer.execute(job, payloads)


class RayExecutor:
    """`engine.workers` actors, each holding `cpus_per_worker` CPUs and `gpus` GPUs."""

    def __init__(self, experiment: Experiment, federation: ray.ObjectRef, model_spec: ModelSpec) -> None:
        self.experiment, self.federation, self.model_spec = experiment, federation, ray.put(model_spec)
        self.events: list[str] = []
        self.group = reserve(experiment.engine)
        self.workers: list[Any] = []  # those that are there
        self.starting: dict[ray.ObjectRef, Any] = {}  # those that are not yet, by what resolves when they are
        self.failed_starts = 0  # since the last one that came
        for _ in range(experiment.engine.workers):
            self._start_worker()

    def put(self, payload: Any) -> ray.ObjectRef:
        return ray.put(payload)

    def run(self, tasks: Sequence[Submission]) -> Iterator[SubmissionResult]:
        queue = deque(range(len(tasks)))
        idle = deque(worker for worker in self.workers if worker not in self.starting.values())
        retries = [0] * len(tasks)
        in_flight: dict[ray.ObjectRef, tuple[int, Any]] = {}
        while queue or in_flight:
            while queue and idle:
                index, worker = queue.popleft(), idle.popleft()
                task = tasks[index]
                in_flight[worker.execute.remote(task.job, *task.payloads)] = index, worker
            (ready,), _ = ray.wait([*in_flight, *self.starting], num_returns=1)
            if ready in self.starting:
                idle.extend(self._started(ready))
                continue
            index, worker = in_flight.pop(ready)
            try:
                result = ray.get(ready)
            except LOST as error:
                retries[index] += 1
                self._remove_worker(
                    worker
                )  # first: whoever runs other tasks after an error finds only workers that live
                self._check_retries(retries[index], error)
                self._replace_worker()
                queue.appendleft(index)
                while idle:  # a lost node takes several: who is idle has to show that it is there
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
        engine = self.experiment.engine
        actor = ray.remote(num_cpus=engine.cpus_per_worker, num_gpus=engine.gpus)(Worker)
        placed = actor.options(scheduling_strategy=in_group(self.group))
        worker = placed.remote(self.experiment, self.federation, self.model_spec)
        self._expect(worker)

    def _expect(self, worker: Any) -> None:
        self.starting[worker.__ray_ready__.remote()] = worker

    def _started(self, ready: ray.ObjectRef) -> list[Any]:
        """The worker that is there; none where it is not, and another is on its way."""
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
            if self.failed_starts > self.experiment.engine.retries:
                count = self.failed_starts
                raise RunError(f"workers died {count} times before their first job: {_last(error)}") from None
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
        limit = self.experiment.engine.retries
        if count > limit:
            raise RunError(
                f"a pack failed {count} times because its worker died (engine.retries={limit}): {_last(error)}"
            )


def _last(error: Exception) -> str:
    return (str(error).strip().splitlines()[-1:] or ["no reason given"])[0]
