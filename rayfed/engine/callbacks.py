"""Callbacks: a user's own code that runs between the rounds, in the process that runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayfed.errors import UserError, allowed
from rayfed.own_code import failure
from rayfed.tracking import Record, RunInfo, Sink, Table


class Callback:
    """Base class of callbacks; every method does nothing. Override what you need.

    With `engine.kind: local` the object itself is called. On Ray a copy is called in the driver actor: the object is
    pickled there, and what the copy stores is not seen here. Write to a file what you need later.

    An exception ends the run: RunError names the callback, the file and the line; its notes and events.log have the
    traceback. The last finished round is in the checkpoint, and a resume continues after it.
    """

    def on_start(self, info: RunInfo) -> None:
        """The run begins, or continues after ``info.start`` rounds."""

    def on_round(self, record: Record) -> bool | None:
        """A round is finished. ``record`` has the keys of metrics.jsonl, where it is already written.

        False ends the run after this round, as early stopping does: the adapter is exported and the summary is written.
        The checkpoint says that the run has ended, so a resume adds no rounds. Any other value goes on.
        """
        return None

    def on_event(self, text: str) -> None:
        """Something happened: a worker was replaced, a client diverged, ..."""

    def on_finish(self, summary: Mapping[str, Any]) -> None:
        """The run has ended, and its adapter is exported. ``summary`` has the keys of summary.json."""


class CallbackSink(Sink):
    """Passes the calls of a run to callbacks, in their order. After an exception no callback is called again."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = callbacks
        self.failed = self.stopped = False

    def start(self, info: RunInfo) -> None:
        self._call("on_start", info)

    def event(self, text: str) -> None:
        self._call("on_event", text)

    def finish(self, summary: Record, table: Table | None) -> None:
        self._call("on_finish", dict(summary))

    def goes_on(self, record: Record) -> bool:
        """Calls every `on_round`. Whether none of them asks to stop."""
        self.stopped = any(answer is False for answer in self._call("on_round", dict(record)))
        return not self.stopped

    def _call(self, name: str, argument: Any) -> list[Any]:
        answers = []
        for callback in () if self.failed else self.callbacks:
            try:
                answers.append(getattr(callback, name)(argument))
            except Exception as error:
                self.failed = True
                raise failure(error, name=f"callbacks: {type(callback).__name__}.{name}") from None
        return answers


def check_callbacks(callbacks: Sequence[Callback]) -> tuple[Callback, ...]:
    """The callbacks as a tuple. UserError where one of them is no Callback."""
    if not isinstance(callbacks, Sequence):
        raise allowed("callbacks", callbacks, "it is a list of rayfed.Callback objects")
    for callback in callbacks:
        if isinstance(callback, type):
            raise UserError(f"callbacks: got the class {callback.__name__}, but an object is needed: make one of it")
        if not isinstance(callback, Callback):
            raise allowed("callbacks", callback, "each is an object of a subclass of rayfed.Callback")
    return tuple(callbacks)
