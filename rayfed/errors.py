"""Errors that a user can act on. Everything else that escapes is a defect and keeps its traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: one line that names the field, the value and what is allowed. The command line exits with 2."""


class RunError(RuntimeError):
    """A run that started and cannot go on, in one line. The command line exits with 1."""


def allowed(field: str, value: object, what: str) -> UserError:
    """The one-line refusal every part uses: ``field: value is not allowed: what``."""
    return UserError(f"{field}: got {value!r}, but {what}")
