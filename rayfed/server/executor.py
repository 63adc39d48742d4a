"""The interface between server and workers: jobs go in, results come out.

`rayfed.engine` has two executors: Ray actors, and this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rayfed.clients.messages import Job, Result

Handle = Any
"""What `Executor.put` returns: stands for a payload that every worker can read."""


@dataclass(frozen=True)
class Submission:
    """One job and the payloads that it needs."""

    job: Job
    payloads: tuple[Handle, ...] = ()


@dataclass(frozen=True)
class SubmissionResult:
    """A finished submission: its index in the list, its result, how often it had to be started again."""

    index: int
    result: Result
    retries: int = 0


class Executor:
    """Runs submissions in any order. A result never depends on the worker that computed it, or on the time."""

    capability: str = ""
    """That of the run's first worker, see `rayfed.device.capability`; empty until it is ready. A resume sets it."""

    def put(self, payload: bytes) -> Handle:
        """Makes a payload readable by all workers. It is transported once, however many submissions name it."""
        return payload

    def run(self, submissions: Sequence[Submission]) -> Iterator[SubmissionResult]:
        """Yields each submission's result as it arrives. RunError where a submission cannot be finished."""
        raise NotImplementedError

    def stop(self) -> None:
        """Asks a running `run` to end soon; it raises `Stopped`."""

    def subscribe(self, event: Callable[[str], None]) -> None:
        """Calls ``event`` with a line for each event, such as a worker that was replaced: past ones now, others as they
        happen, in the thread that runs `run`."""

    def close(self) -> None:
        """Stops the workers."""


def other_capability(found: str, first: str) -> str:
    """The event of a worker whose device has not the capability of the run's first one."""
    return (
        f"a worker trains on {found}, and this run began on {first}: they may round differently, so the bits of the "
        "result may depend on which of them trains which clients"
    )


def in_order(results: Iterator[SubmissionResult]) -> Iterator[SubmissionResult]:
    """The same results in the order of the submissions, each as soon as all before it have arrived."""
    waiting: dict[int, SubmissionResult] = {}
    following = 0
    for result in results:
        waiting[result.index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def run_all(executor: Executor, submissions: Sequence[Submission]) -> list[Result]:
    """All results, in the order of the submissions."""
    return [item.result for item in in_order(executor.run(submissions))]
