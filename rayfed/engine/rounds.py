"""A plan on an executor: from the pack size to the summary, the same in this process and on Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from rayfed.clients.plan import RunPlan
from rayfed.errors import RunError, first_line
from rayfed.server.executor import Executor
from rayfed.server.loop import Record, Server
from rayfed.server.pack_size import Choice, choose_pack
from rayfed.storage import RemoteFolder
from rayfed.tracking import Sink


def run_rounds(
    plan: RunPlan, executor: Executor, out: Path, sinks: Sink, resume: bool, uri: str | None
) -> Iterator[Record]:
    """Runs the plan from its pack size to its summary on any executor; yields each round's record, then the summary.

    ``uri``: where the run directory is uploaded after every checkpoint. A run that is stopped, or cannot go on, leaves
    the checkpoint of its last finished round and the reason in events.log.
    """
    upload = partial(RemoteFolder(uri).upload, out) if uri else lambda: None
    plan, choice = with_pack_size(plan, executor)
    server = Server(plan, executor, out, sinks, resume, choice, upload)
    try:
        yield from server.rounds()
        yield server.finish()
    except (RunError, KeyboardInterrupt) as error:
        for text in executor.drain_events():
            sinks.event(text)
        sinks.event(f"{first_line(error)}; `--resume` continues after round {server.done}")
        with suppress(RunError, OSError):  # the first error is the one to report
            server.save()
        raise


def with_pack_size(plan: RunPlan, executor: Executor) -> tuple[RunPlan, Choice | None]:
    """The plan with a number of clients a pack; `engine.pack: auto` is measured on a worker."""
    if plan.pack is not None:
        return plan, None
    choice = choose_pack(plan, executor)
    return plan.with_pack(choice.size), choice
