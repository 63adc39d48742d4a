"""The hands of the server: who does its jobs. `engine` brings two crews, Ray actors and this process itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rayfed.clients.messages import Job, Result

Handle = Any
"""What `Executor.put` returns: stands for a payload that every worker can read."""


@dataclass(frozen=True)
class Submission:
    """One job and the payloads it needs."""

    job: Job
    payloads: tuple[Handle, ...] = ()


@dataclass(frozen=True)
class SubmissionResult:
    """A finished task: its place in the list, its result, how often it had to be started anew."""

    index: int
    result: Result
    retries: int = 0


class Executor(Protocol):
    """Does tasks in whatever order suits it; a task's result never depends on who did it or when."""

    def put(self, payload: Any) -> Handle:
        """Makes a payload (bytes, or an array) readable by all workers; transported once however many tasks name it."""

    def run(self, tasks: Sequence[Submission]) -> Iterator[SubmissionResult]:
        """Yields each task's result as it arrives. RunError where a task cannot be done."""

    def drain_events(self) -> list[str]:
        """What happened since the last call, in words (a worker died and was replaced)."""
        return []

    def close(self) -> None: ...


def in_order(done: Iterator[SubmissionResult]) -> Iterator[SubmissionResult]:
    """The same results in the order of the tasks, each as soon as all before it are there."""
    waiting: dict[int, SubmissionResult] = {}
    following = 0
    for item in done:
        waiting[item.index] = item
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def results(done: Iterator[SubmissionResult]) -> list[Result]:
    """All results, in the order of the tasks."""
    return [item.result for item in in_order(done)]
