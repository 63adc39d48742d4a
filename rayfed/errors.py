"""Errors that a user can act on. Everything else that escapes is a defect and keeps its traceback."""

from __future__ import annotations

import reprlib

MOST_LINES = 20  # of one message
MOST_CHARACTERS = 1000  # of one line of a message


class UserError(ValueError):
    """Bad input: one line that names the field, the value and what is allowed. The command line exits with 2.

    The text of the error is `printable`, whatever the message quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class RunError(RuntimeError):
    """A run that started and cannot go on, in one line. The command line exits with 1. The text is `printable`."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Stopped(RunError):
    """The run was asked to stop."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: a cluster wants this process to end. Raised in the main thread, as Ctrl-C is."""


def allowed(field: str, value: object, what: str) -> UserError:
    """The refusal that every part uses, ``field: got VALUE, but what``, as an error to raise. Long values are cut."""
    return UserError(f"{field}: got {_SHORT.repr(value)}, but {what}")


def printable(message: str) -> str:
    """The message without control characters, at most `MOST_LINES` lines of at most `MOST_CHARACTERS` characters.

    Characters that could move the cursor or change the terminal are shown as in `repr`: an escape is ``\\x1b``. A long
    line loses its middle, and the last line says how many lines are left out.
    """
    lines = message.split("\n")
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"and {len(lines) - MOST_LINES + 1} more mistakes"]
    return "\n".join(map(_one_line, lines))


def _one_line(line: str) -> str:
    line = _cut(line)  # before the loop over its characters, because a message can have megabytes
    return _cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))


def _cut(line: str) -> str:
    return line if len(line) <= MOST_CHARACTERS else f"{line[:600]} ... {line[-300:]}"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 2, 12, 12, 4
_SHORT.maxstring = _SHORT.maxother = 240


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first non-empty line of the error's text, at most ``limit`` characters; the class name if there is none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:limit]


def class_and_line(error: BaseException, limit: int = 200) -> str:
    """`Class: first line`, for errors of other code; of rayfed's own errors the first line alone."""
    line = first_line(error, limit)
    return line if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {line}"
