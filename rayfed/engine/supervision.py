"""The rules of supervision: when a worker hangs, when another one starts, and when a run cannot go on.

- A worker hangs when its job lasts longer than the job's deadline. It is killed, and the job runs again.
- A lost job runs again. Evictions strike all jobs and starts, a poisonous job only its own workers. The run ends when a
  job was lost more than `engine.retries` times and the fate of the others says that this is no chance.
- After failed starts the next start waits, each time twice as long, up to LONGEST_WAIT.
- A run ends where nothing has finished for `engine.stall_s` after a failure, or no worker got a place in this time.

Everything here is plain Python with a clock that is passed in. `rayfed.engine.ray_executor` applies the rules.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from rayfed.clients.messages import EvalJob, FeatureJob, Job, MeasureJob, TrainJob
from rayfed.config.execution import Engine
from rayfed.errors import RunError

FACTOR = 10.0  # a deadline is this many times the slowest measured time
SHORTEST = 60.0  # seconds: no deadline of engine.deadline=auto is shorter
FIRST = 1800.0  # seconds: the deadline of a kind of job that was not measured yet
GROWTH = 4.0  # a job that missed its deadline gets this many times as long: it may be slow, not hung
CHANCE = 1e-6  # losses in a row that chance explains with less probability than this are the job's own fault
LONGEST_WAIT = 30.0  # seconds between two failed starts


@dataclass
class Losses:
    """How often one job was lost, and the counters of the executor when that happened first."""

    count: int = 0
    missed: int = 0  # of them, by the job's deadline
    successes: int = 0
    losses: int = 0


class Supervision:
    """The measured times and counted losses of one executor, and what follows from them. ``clock`` gives seconds."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine, self.clock = engine, clock
        self.slowest: dict[str, float] = {}  # by kind of job: the most seconds for a unit of work
        self.successes = self.losses = 0  # of jobs and starts, over the run
        self.busy = 0.0  # seconds that finished jobs took, over all workers
        self.failed_starts = 0  # since the last one that succeeded
        self.raised_starts = 0  # of them, by an exception instead of a dead process
        self.failing_since: float | None = None  # the first failure after the last finished job
        self.unplaced_since: float | None = None  # since when no worker has a place
        self.last_reason = ""

    def begin(self) -> None:
        """A new list of jobs begins: the time before it does not count as a failure's."""
        self.failing_since = self.unplaced_since = None

    def deadline(self, job: Job, losses: Losses) -> float:
        """Seconds that the job may take; inf without a deadline."""
        setting = self.engine.deadline
        if isinstance(setting, str):
            return self._measured(*kind_and_work(job)) * GROWTH**losses.missed
        return math.inf if setting is None else setting

    def start_deadline(self) -> float:
        """Seconds in which a worker that has its place must have loaded its model; inf without a deadline."""
        return math.inf if self.engine.deadline is None else self._measured("start", 1)

    def job_done(self, job: Job, seconds: float) -> None:
        """Counts a finished job."""
        self._record(*kind_and_work(job), seconds)
        self.successes += 1
        self.busy += seconds
        self.failing_since = None

    def start_done(self, seconds: float) -> None:
        """Counts a worker that has loaded its model."""
        self._record("start", 1, seconds)
        self.successes += 1
        self.failed_starts = self.raised_starts = 0

    def job_lost(self, job: Job, losses: Losses, reason: str, hung: bool = False) -> None:
        """Counts a job whose worker died, or hung. RunError where this is no longer chance."""
        self._failed(reason)
        if not losses.count:
            losses.successes, losses.losses = self.successes, self.losses - 1
        losses.count += 1
        losses.missed += hung
        if losses.count > self.engine.retries and self._chance(losses) < CHANCE:
            raise RunError(
                f"{describe(job)}: its worker was lost {losses.count} times in a row, more often than by chance "
                f"(engine.retries={self.engine.retries}): {reason}"
            )

    def idle_lost(self, reason: str) -> None:
        """Counts a worker that died without a job."""
        self._failed(reason)

    def start_failed(self, reason: str, raised: bool = False) -> None:
        """Counts a worker that died, hung or ``raised`` before it was ready. RunError where it raises every time."""
        self._failed(reason)
        self.failed_starts += 1
        self.raised_starts += raised
        if self.raised_starts > self.engine.retries:
            raise RunError(f"no worker could be started, tried {self.raised_starts} times: {reason}")

    def wait_before_start(self) -> float:
        """Seconds before the next worker is started."""
        return min(2.0 ** (self.failed_starts - 1), LONGEST_WAIT) if self.failed_starts else 0.0

    def placed(self, any_worker: bool) -> None:
        """Whether any worker has a place on the cluster, or had one and is to start again."""
        if any_worker:
            self.unplaced_since = None
        elif self.engine.wait_for_nodes:
            self.failing_since = None  # the run was asked to wait for as long as it takes
        elif self.unplaced_since is None:
            self.unplaced_since = self.clock()

    def check(self, longest: float) -> None:
        """RunError where nothing has finished for too long after a failure, or no worker got a place for so long.

        ``longest``: the longest deadline of a running job or start, which is waited for in any case; 0 if none runs.
        """
        if self.unplaced_since is not None and self.clock() - self.unplaced_since > self.engine.stall_s:
            raise RunError(
                f"no worker has got a place on the cluster for {self.engine.stall_s:.0f} s (engine.stall_s): "
                "other work uses it, or nodes are gone; engine.wait_for_nodes=true waits for them"
            )
        if self.failing_since is None:
            return
        limit = max(self.engine.stall_s, longest if math.isfinite(longest) else 0.0)
        if self.clock() - self.failing_since > limit:
            raise RunError(
                f"no job has finished for {limit:.0f} s, in which workers failed again and again "
                f"(engine.stall_s={self.engine.stall_s:g}): {self.last_reason}"
            )

    def _chance(self, losses: Losses) -> float:
        """The probability that the job's attempts are all among the lost ones, if losses strike all attempts alike.

        Attempts are those of all jobs and starts since the job's first loss. This is Fisher's exact test: whatever the
        share of lost attempts, it gives the probability of drawing the job's ones from them.
        """
        others_lost = self.losses - losses.losses - losses.count
        others = self.successes - losses.successes + others_lost
        return math.comb(others, others_lost) / math.comb(others + losses.count, others_lost + losses.count)

    def _measured(self, kind: str, work: int) -> float:
        if kind not in self.slowest:
            return FIRST
        return max(FACTOR * self.slowest[kind] * work, SHORTEST)

    def _record(self, kind: str, work: int, seconds: float) -> None:
        self.slowest[kind] = max(self.slowest.get(kind, 0.0), seconds / work)

    def _failed(self, reason: str) -> None:
        self.losses += 1
        self.last_reason = reason
        if self.failing_since is None:
            self.failing_since = self.clock()


def kind_and_work(job: object) -> tuple[str, int]:
    """The kind of a job, and its work in units that take about as long as each other: clients, or rows."""
    match job:
        case TrainJob():
            return "train", len(job.orders)
        case EvalJob() | FeatureJob():
            return type(job).__name__, max(job.stop - job.start, 1)
    return type(job).__name__, 1


def describe(job: object) -> str:
    """What a job does, in words: whose training, or the rows of which split."""
    match job:
        case TrainJob():
            return f"round {job.t + 1}, training {_clients([order.client for order in job.orders])}"
        case EvalJob() | FeatureJob():
            what = "evaluation" if isinstance(job, EvalJob) else "features"
            return f"{what} of the {job.split} rows {job.start} to {job.stop - 1} in order of length"
        case MeasureJob():
            return f"engine.pack=auto, measuring {_clients(job.clients)}"
    return "a job"


def _clients(ids: list[int] | tuple[int, ...]) -> str:
    return f"client{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids))}"
