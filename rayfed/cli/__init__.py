"""The command line. A command imports what it needs when it runs, so `--help` is instant.

Exit codes: 0 done, 2 bad usage, settings or data, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rayfed import __version__
from rayfed.cli import doctor, reports, submit, workspace
from rayfed.errors import RunError, UserError

TAKE_OVERRIDES = ("run", "sweep", "submit", "bench", "doctor")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command in TAKE_OVERRIDES and all("=" in word and not word.startswith("-") for word in rest):
        options.overrides += rest  # overrides may also follow the flags
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        options.action(options)
        sys.stdout.flush()
    except (UserError, RunError) as error:
        for line in str(error).splitlines():
            print(f"rayfed: {line}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # `rayfed settings | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("rayfed: interrupted; `--resume` with the same --out continues", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rayfed", description="Federated LoRA fine-tuning, simulated on Ray.")
    parser.add_argument("--version", action="version", version=f"rayfed {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run one experiment", description="Run the experiment in CONFIG.")
    run.add_argument("config", metavar="CONFIG", help="YAML file; see configs/")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as server.rounds=20")
    _add_out(run, "run", "continue DIR from its last checkpoint")
    run.set_defaults(action=_run)

    sweep = commands.add_parser(
        "sweep", help="run many trials and compare them", description="Run the sweep in CONFIG."
    )
    sweep.add_argument("config", metavar="CONFIG", help="YAML file with a section `sweep`; see configs/sweeps/")
    sweep.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change; also sweep.tune=[client.lr] and such"
    )
    _add_out(sweep, "sweep", "run the trials in DIR that are not finished")
    sweep.set_defaults(action=_sweep)

    submit.add_command(commands)
    doctor.add_command(commands)

    bench = commands.add_parser("bench", help="measure what is fast, against what, on this machine")
    bench.add_argument("name", metavar="NAME", help="which benchmark: aggregate, algebra, round, ...")
    bench.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE",
        help="its sizes, such as uploads=2000 or packs=[1,8]; for round, settings of a run",
    )  # fmt: skip
    bench.add_argument("--json", metavar="FILE", help="also write the figures and the machine to FILE")
    bench.set_defaults(action=_bench)

    reports.add_commands(commands)
    workspace.add_command(commands)

    methods = commands.add_parser("methods", help="list the methods, or explain one")
    methods.add_argument("name", nargs="?", metavar="NAME", help="the method to explain: its algorithm and options")
    methods.set_defaults(action=_methods)

    settings = commands.add_parser("settings", help="list every setting with its default and meaning")
    settings.add_argument("section", nargs="?", help="only this section or setting, such as client or wire.up.density")
    settings.set_defaults(action=_settings)
    return parser


def _add_out(parser: argparse.ArgumentParser, what: str, resume: str) -> None:
    parser.add_argument(
        "--out", metavar="DIR", help=f"{what} directory (default runs/NAME-TIME), or a URI such as s3://bucket/{what}"
    )
    parser.add_argument("--resume", action="store_true", help=resume)


def _run(options: argparse.Namespace) -> None:
    from rayfed.cli.run import run

    run(options.config, options.overrides, options.out, options.resume)


def _sweep(options: argparse.Namespace) -> None:
    from rayfed.cli.run import sweep

    sweep(options.config, options.overrides, options.out, options.resume)


def _bench(options: argparse.Namespace) -> None:
    from pathlib import Path

    from rayfed.bench import run
    from rayfed.bench.timing import machine, table, write
    from rayfed.config.load import parse_override

    rows = run(options.name, dict(map(parse_override, options.overrides)))
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(table(rows))
    if options.json:
        write(Path(options.json), options.name, rows)


def _methods(options: argparse.Namespace) -> None:
    from rayfed.cli.methods import describe, describe_all

    print(describe(options.name) if options.name else describe_all())


def _settings(options: argparse.Namespace) -> None:
    from rayfed.cli.settings import describe

    print(describe(options.section))
