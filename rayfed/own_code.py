"""Failures of a user's own code, such as a loss, a metric, a method or a model, in one line that says where.

Code is the user's own unless it is rayfed's, installed, or in the standard library.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rayfed.errors import RunError, UserError, class_and_line

OURS = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), "<frozen ")
INSTALLED = {"site-packages", "dist-packages"}

Refusal = type[UserError] | type[RunError]


@contextmanager
def own_failures(kind: Refusal = RunError) -> Iterator[None]:
    """An exception that passes through the user's own code becomes a ``kind`` in one line, see `failure`."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        if any(_own_frames(error)):
            raise failure(error, kind) from None
        raise


def failure(error: Exception, kind: Refusal = RunError, name: str = "") -> UserError | RunError:
    """The exception as one line: the function that failed (or ``name``), the exception, the user's file and line.

    The traceback, from the first call of the user's own code on, is in the notes of what is returned. So it survives
    the way out of an actor.
    """
    own = list(_own_frames(error))
    name = name or own[-1].tb_frame.f_code.co_qualname
    refusal = kind(f"{name} failed: {described(error)}")
    start = own[0] if own else error.__traceback__
    refusal.add_note("".join(traceback.format_exception(type(error), error, start)).rstrip())
    return refusal


def described(error: Exception) -> str:
    """The exception's type and message, and the file and line of the user's own code where there is any."""
    own = list(_own_frames(error))
    place = f" ({own[-1].tb_frame.f_code.co_filename}:{own[-1].tb_lineno})" if own else ""
    return class_and_line(error) + place


def _own_frames(error: Exception) -> Iterator[TracebackType]:
    """The calls of the user's own code that led to the exception, the innermost one last."""
    call = error.__traceback__
    while call is not None:
        file = call.tb_frame.f_code.co_filename
        if not file.startswith(OURS) and not INSTALLED & {*Path(file).parts}:
            yield call
        call = call.tb_next
