"""The command line. A command imports what it needs when it runs, so `--help` is instant.

Exit codes: 0 done, 2 bad usage, settings or data, 1 anything else.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from click.exceptions import Exit, NoSuchOption, UsageError
from click.shell_completion import shell_complete

from rayfed.cli.commands import program
from rayfed.errors import RunError, Terminated, UserError
from rayfed.storage import masked

COMPLETE = "_RAYFED_COMPLETE"  # the variable by which a shell asks for completions


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Without ``arguments``, those of the process; `--help` where none."""
    if arguments is None and COMPLETE in os.environ:
        return shell_complete(program, {}, "rayfed", COMPLETE, os.environ[COMPLETE])
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    try:
        with (
            _sigterm_raises(),
            _usage_in_one_line(words),
            program.make_context("rayfed", words or ["--help"]) as context,
        ):
            program.invoke(context)
            sys.stdout.flush()
    except Exit as exit_:  # after `--help` and `--version`
        return exit_.exit_code
    except (UserError, RunError) as error:
        for line in masked(str(error)).splitlines():
            print(f"rayfed: {line}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # `rayfed settings | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as error:
        how = "terminated" if isinstance(error, Terminated) else "interrupted"
        print(f"rayfed: {how}; `--resume` with the same --out continues", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises Terminated in the block, once: nothing interrupts the clean-up. In the main thread only."""

    def terminate(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def _usage_in_one_line(words: Sequence[str]) -> Iterator[None]:
    """Turns the errors of Click about these words, of several lines, into a UserError of one."""
    try:
        yield
    except UsageError as error:
        text = error.message if isinstance(error, NoSuchOption) else error.format_message()
        near = error.possibilities if isinstance(error, NoSuchOption) else None
        hint = f"did you mean {near[0]}? " if near else ""
        command = " ".join(["rayfed", *(word for word in words[:1] if word in program.commands)])
        raise UserError(f"{text[:1].lower()}{text[1:].rstrip('.')}; {hint}see `{command} --help`") from None
