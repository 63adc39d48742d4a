"""The command line. A command imports what it needs when it runs, so `--help` is instant.

Exit codes: 0 done, 2 bad usage, settings or data, 1 anything else.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import NoReturn, TypeAlias

from rayfed import __version__
from rayfed.cli import reports, workspace
from rayfed.errors import RunError, Terminated, UserError, allowed
from rayfed.storage import masked

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        with _sigterm_raises():
            options.action(options)
            sys.stdout.flush()
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


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, a UserError. An unknown command is answered with a similar one."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: str) -> None:
        if action.choices is not None and value not in action.choices:
            near = difflib.get_close_matches(value[:100], action.choices, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise allowed(str(action.metavar), value, f"{hint}allowed are {', '.join(action.choices)}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; those of `--help` where it is empty. UserError for bad usage."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments or ["--help"])
    if rest and "overrides" in options and all("=" in word and not word.startswith("-") for word in rest):
        options.overrides += rest  # overrides may also follow the flags
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> argparse.ArgumentParser:
    about = "Federated LoRA fine-tuning, simulated on Ray."
    parser: argparse.ArgumentParser = _Parser(prog="rayfed", description=about)
    parser.add_argument("--version", action="version", version=f"rayfed {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    out = "directory (default runs/NAME-TIME), or a URI such as s3://bucket"
    names = ", or a name that `rayfed init` lists"

    about = "List the configs that come with rayfed, or copy one into this folder, to edit it."
    init = _command(commands, "init:init", "copy a config that comes with rayfed", about)
    init.add_argument("name", nargs="?", metavar="NAME", help="the config to copy, to NAME.yaml")

    run = _command(commands, "run:run", "run one experiment", "Run the experiment in CONFIG.")
    _add_config(run, f"YAML file{names}", "settings to change, such as server.rounds=20")
    _add_out(run, f"run {out}/run", "continue DIR from its last checkpoint")
    dry_run = "start nothing: check CONFIG, and show what it would take, as `rayfed doctor CONFIG` does"
    run.add_argument("--dry-run", action="store_true", help=dry_run)

    sweep = _command(commands, "run:sweep", "run many trials and compare them", "Run the sweep in CONFIG.")
    changes = "settings to change; also sweep.tune=[client.lr] and such"
    _add_config(sweep, f"YAML file with a section `sweep`{names}", changes)
    _add_out(sweep, f"sweep {out}/sweep", "run the trials in DIR that are not finished")

    about = "Submit CONFIG to a Ray cluster: a run, or a sweep where it has a section `sweep`."
    submit = _command(commands, "submit:submit", "run or sweep as a job on a Ray cluster", about)
    _add_config(submit, "YAML file; it is sent to the cluster", "as for run or sweep")
    submit.add_argument("--address", metavar="URL", help="the cluster's dashboard, such as http://localhost:8265")
    folder = "folder on the cluster's head, absolute or ~/..., or a URI (default ~/runs/JOB)"
    _add_out(submit, folder, "continue the run or sweep in DIR")
    include = "also send this file or folder, by its last name"
    submit.add_argument("--include", metavar="PATH", action="append", default=[], help=include)
    submit.add_argument("--follow", action="store_true", help="show the logs until the job ends; fail if it does")

    about = (
        "Say what this machine has; with CONFIG, check it and show its plan, its messages, its memory and its hours."
    )
    doctor = _command(commands, "doctor:doctor", "what this machine can run, and how fast", about)
    _add_config(doctor, "YAML file of a run", "settings to change", nargs="?")

    about = "Show the rows of CONFIG, which client has them, and how much the clients differ. Nothing is trained."
    data = _command(commands, "data:data", "the rows of each client, and how much clients differ", about)
    _add_config(data, "YAML file of a run", "settings to change, such as partition.alpha=0.5")
    data.add_argument("--svg", metavar="FILE", help="also write the figure to FILE")

    bench = _command(commands, "bench:bench", "measure what is fast, against what, on this machine")
    bench.add_argument("name", metavar="NAME", help="which benchmark: aggregate, algebra, round, ...")
    sizes = "its sizes, such as uploads=2000 or packs=[1,8]; for round, settings of a run"
    bench.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=sizes)
    bench.add_argument("--json", metavar="FILE", help="also write the figures and the machine to FILE")

    about = "Check the files of a finished or unfinished run: its hash chain, its ledger and its checkpoints."
    verify = _command(commands, "verify:verify", "check that a run's files are as they were written", about)
    verify.add_argument("run", metavar="DIR", help="a run directory")

    reports.add_commands(commands)
    workspace.add_command(commands)

    methods = _command(commands, "methods:methods", "list the methods, or explain one")
    methods.add_argument("name", nargs="?", metavar="NAME", help="the method to explain: its algorithm and options")

    settings = _command(commands, "settings:settings", "list every setting with its default and meaning")
    settings.add_argument("section", nargs="?", help="only this section or setting, such as client or wire.up.density")
    return parser


def _command(commands: Commands, function: str, help: str, about: str | None = None) -> argparse.ArgumentParser:
    """Adds the command of this function, `module:name` below `rayfed.cli`. It gets the command's arguments by name."""

    def action(options: argparse.Namespace) -> None:
        arguments = {key: value for key, value in vars(options).items() if key not in ("command", "action")}
        if arguments.get("resume") and arguments["out"] is None:
            raise UserError("--resume: needs --out, the directory to continue")
        resolve_name(f"rayfed.cli.{function}")(**arguments)

    parser = commands.add_parser(function.partition(":")[2], help=help, description=about)
    parser.set_defaults(action=action)
    return parser


def _add_config(parser: argparse.ArgumentParser, config: str, overrides: str, nargs: str | None = None) -> None:
    parser.add_argument("config", nargs=nargs, metavar="CONFIG", help=config)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=overrides)


def _add_out(parser: argparse.ArgumentParser, out: str, resume: str) -> None:
    parser.add_argument("--out", metavar="DIR", help=out)
    parser.add_argument("--resume", action="store_true", help=resume)
