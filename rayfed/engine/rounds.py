"""A plan on an executor: from the pack size to the summary, the same in this process and on Ray."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from rayfed.clients.plan import RunPlan
from rayfed.engine.callbacks import Callback, CallbackSink
from rayfed.errors import RunError, first_line
from rayfed.own_code import own_failures
from rayfed.server.executor import Executor
from rayfed.server.loop import Record, Server
from rayfed.server.pack_size import Choice, choose_pack
from rayfed.storage import RemoteFolder
from rayfed.tracking import Sink, SinkList
from rayfed.tracking.events import EventSink


def run_rounds(
    plan: RunPlan, executor: Executor, out: Path, sinks: Sink, resume: bool, uri: str | None,
    callbacks: Sequence[Callback] = (),
) -> Generator[Record]:  # fmt: skip
    """Runs the plan from its pack size to its summary on any executor; yields each round's record.

    No round begins before it is asked for. After the last one the results are exported. ``uri``: where the run
    directory is uploaded after every checkpoint. A run that is stopped or closed, or cannot go on, leaves the
    checkpoint of its last finished round and the reason in events.log.
    """
    upload = partial(RemoteFolder(uri).upload, out) if uri else lambda: None
    plan, choice = with_pack_size(plan, executor)
    called = CallbackSink(callbacks)
    everyone = SinkList(sinks, called)
    with own_failures():
        server = Server(plan, executor, out, everyone, resume, choice, upload, called.goes_on)
    server.events += plan.notes if not server.done else ()
    try:
        with own_failures():
            yield from server.rounds()
            if called.stopped:
                everyone.event(f"a callback ended the run after round {server.done}")
            server.finish()
    except (RunError, KeyboardInterrupt, GeneratorExit) as error:
        why = "stopped" if isinstance(error, GeneratorExit) else first_line(error)
        with suppress(RunError, OSError):  # the first error is the one to report
            everyone.event(f"{why}; `--resume` continues after round {server.done}")
            for note in getattr(error, "__notes__", ()):  # the traceback of the user's own code, for this file alone
                EventSink(out / "events.log").event(note)
        with suppress(RunError, OSError):
            server.save()
        raise


def with_pack_size(plan: RunPlan, executor: Executor) -> tuple[RunPlan, Choice | None]:
    """The plan with a number of clients a pack; `engine.pack: auto` is measured on a worker."""
    if plan.pack is not None:
        return plan, None
    choice = choose_pack(plan, executor)
    return plan.with_pack(choice.size), choice
