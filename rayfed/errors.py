"""Errors that a user can act on. Everything else that escapes is a defect and keeps its traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: one line that names the field, the value and what is allowed. The command line exits with 2."""


class RunError(RuntimeError):
    """A run that started and cannot go on, in one line. The command line exits with 1."""


class Stopped(RunError):
    """The run was asked to stop."""


def allowed(field: str, value: object, what: str) -> UserError:
    """The refusal that every part uses, ``field: got VALUE, but what``, as an error to raise."""
    return UserError(f"{field}: got {value!r}, but {what}")


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first non-empty line of the error's text, at most ``limit`` characters; the class name if there is none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:limit]
