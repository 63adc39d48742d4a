"""The workers of a run: they start, show that they live, and are killed; all of this on Ray, by the rules of
`rayfed.engine.supervision`.

A worker is started in two steps. First Ray finds a place for its process, which may take as long as a cluster needs to
grow. Then the worker loads its model, and this has a deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.placement_group import PlacementGroup

from rayfed.config.execution import Engine
from rayfed.engine.placement import in_group, named, release
from rayfed.engine.supervision import Supervision
from rayfed.errors import RunError, UserError, first_line
from rayfed.server.executor import other_capability

# The process, or the node with its result, is gone, or Ray has killed it.
LOST = (
    RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError, ActorUnschedulableError,
)  # fmt: skip
PROBE = 15.0  # seconds in which an idle worker must show that it lives


@dataclass
class Start:
    """A worker that is not ready. ``placed`` resolves when its process runs; None: it did a job before."""

    worker: Any
    placed: ray.ObjectRef | None
    begun: float  # by the supervision's clock: when it got its place, or now where it still waits for one


class WorkerPool:
    """`engine.workers` actors of the class ``worker``, which load ``plan`` (a reference to a RunPlan).

    ``group`` has their places; `close` gives them back. In Ray's dashboard the workers of the run ``run`` are numbered
    from 0 in the order in which they start: a new worker in the place of a lost one has a number of its own.
    """

    def __init__(
        self, engine: Engine, worker: type, plan: ray.ObjectRef, group: PlacementGroup | None, supervision: Supervision,
        run: str,
    ) -> None:  # fmt: skip
        self.engine, self.plan, self.supervision, self.clock = engine, plan, supervision, supervision.clock
        reserve: Any = ray.remote(num_cpus=engine.cpus_per_worker, num_gpus=engine.gpus, memory=engine.memory)
        self.actor = reserve(worker)
        self.group, self.run, self.begun = group, run, 0
        self.events: list[str] = []  # until somebody subscribes
        self.event: Callable[[str], None] = self.events.append
        self.capability = ""  # of the run's first worker, see `rayfed.device.capability`
        self.others: set[str] = set()  # the capabilities that other workers have
        self.ready: list[Any] = []  # those that have loaded their model
        self.starting: dict[ray.ObjectRef, Start] = {}  # by the reference that resolves when the worker may get a job
        self.due: list[float] = []  # when further workers start
        for _ in range(engine.workers):
            self.start()

    def start(self) -> None:
        """Starts a worker; later, where starts have failed."""
        if wait := self.supervision.wait_before_start():
            self.due.append(self.clock() + wait)
        else:
            self._start()

    def subscribe(self, event: Callable[[str], None]) -> None:
        """Calls ``event`` with every event so far, and from now on with each as it happens."""
        for text in self.events:
            event(text)
        self.event = event

    def probe(self, worker: Any) -> None:
        """Waits for a sign of life of an idle worker before it may get a job."""
        self.starting[worker.__ray_ready__.remote()] = Start(worker, None, self.clock())

    def replace(self, worker: Any) -> None:
        """Kills a worker that may be dead already, and starts another one.

        Ray sends SIGKILL to a process that does not end within 5 s; then its place is free. A stopped one ends so, too.
        """
        ray.kill(worker)
        if worker in self.ready:
            self.ready.remove(worker)
        self.start()

    def idle(self) -> list[Any]:
        """The workers that may get a job, if none has one."""
        probed = [start.worker for start in self.starting.values()]
        return [worker for worker in self.ready if worker not in probed]

    def started(self, ref: ray.ObjectRef) -> list[Any]:
        """The worker that is ready; an empty list where it died instead, and another one is started.

        RunError or UserError where its model cannot be loaded.
        """
        start = self.starting.pop(ref)
        try:
            capability = ray.get(ref)
        except LOST as error:
            self._failed(start, reason_of(error))
            return []
        except RayTaskError as error:
            if isinstance(error.cause, UserError | RunError):
                raise error.cause from None
            cause = error.cause or error
            self._failed(start, f"{type(cause).__name__}: {first_line(cause)}", raised=True)
            return []
        if start.placed is not None:
            self.supervision.start_done(self.clock() - start.begun)
            self.ready.append(start.worker)
            self.capability = self.capability or capability
            if capability not in (self.capability, *self.others):
                self.others.add(capability)
                self.event(other_capability(capability, self.capability))
        return [start.worker]

    def check(self) -> float:
        """Starts the workers whose time has come, and replaces those that missed their deadline.

        Returns the deadline of the workers that load their model, in seconds; 0 if none does.
        """
        now, deadline = self.clock(), self.supervision.start_deadline()
        for _ in [time for time in self.due if time <= now]:
            self._start()
        self.due = [time for time in self.due if time > now]
        placed = resolved(start.placed for start in self.starting.values() if start.placed is not None)
        waiting = [start for start in self.starting.values() if start.placed is not None and start.placed not in placed]
        for start in waiting:
            start.begun = now
        self.supervision.placed(bool(self.ready or self.due or len(waiting) < len(self.starting)))
        for ref, start in [*self.starting.items()]:
            seconds = deadline if start.placed is not None else min(PROBE, deadline)
            if now - start.begun > seconds and ref not in resolved([ref]):
                del self.starting[ref]
                self._failed(start, f"no answer in {seconds:.3g} s")
        return deadline if placed else 0.0

    def close(self) -> None:
        """Kills all workers and gives their places back."""
        for worker in (*self.ready, *(start.worker for start in self.starting.values())):
            ray.kill(worker)
        self.ready, self.starting, self.due = [], {}, []
        release(self.group)
        self.group = None

    def _start(self) -> None:
        name = named(self.run, f"worker-{self.begun}")
        self.begun += 1
        worker = self.actor.options(**in_group(self.group, self.engine), **name).remote()
        placed = worker.__ray_ready__.remote()
        self.starting[worker.load.remote(self.plan)] = Start(worker, placed, self.clock())

    def _failed(self, start: Start, reason: str, raised: bool = False) -> None:
        """A worker died or hung before it got a job."""
        if start.placed is None:
            self.supervision.idle_lost(reason)
            self.event(f"a worker died between two jobs ({reason}); a new one takes its place")
        else:
            self.supervision.start_failed(reason, raised)
            wait = self.supervision.wait_before_start()
            self.event(f"a worker did not start ({reason}); the next one starts in {wait:.0f} s")
        self.replace(start.worker)


def resolved(refs: Iterable[ray.ObjectRef]) -> set[ray.ObjectRef]:
    """The references whose values, or errors, are there."""
    refs = list(refs)
    return set(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else set()


def reason_of(error: Exception) -> str:
    """Why a worker is lost, in one line."""
    if isinstance(error, OutOfMemoryError) or "running low on memory" in str(error):
        return "killed by Ray because its node ran out of memory"
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return last.partition(" Some common causes")[0].strip()[:200]
