"""The command line. Commands import what they need when they run, so that `--help` is instant.

Exit codes: 0 done, 2 bad usage or settings, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from rayfed import __version__
from rayfed.cli import doctor, reports, store, submit, workspace
from rayfed.errors import RunError, UserError

TAKE_OVERRIDES = ("run", "sweep", "submit", "bench", "doctor")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command in TAKE_OVERRIDES and all("=" in word and not word.startswith("-") for word in rest):
        options.overrides += rest  # overrides may also stand behind the flags
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        options.action(options)
        sys.stdout.flush()
    except (UserError, RunError) as error:
        for line in str(error).splitlines():
            print(f"rayfed: {line}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # `rayfed settings | head`: whoever read has seen enough
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
    run.add_argument(
        "--out", metavar="DIR", help="run directory (default runs/NAME-TIME), or a URI such as s3://bucket/run"
    )
    run.add_argument("--resume", action="store_true", help="continue DIR from its last checkpoint")
    run.set_defaults(action=_run)

    sweep = commands.add_parser(
        "sweep", help="run many trials and compare them", description="Run the sweep in CONFIG."
    )
    sweep.add_argument("config", metavar="CONFIG", help="YAML file with a section `sweep`; see configs/sweeps/")
    sweep.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as for run; also sweep.tune=[client.lr] and such"
    )
    sweep.add_argument("--out", metavar="DIR", help="the sweep's directory (default runs/NAME-TIME)")
    sweep.add_argument("--resume", action="store_true", help="run the trials in DIR that are not finished")
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

    methods = commands.add_parser("methods", help="list the methods, their papers and traffic")
    methods.set_defaults(action=_methods)

    settings = commands.add_parser("settings", help="list every setting with its default and meaning")
    settings.add_argument("section", nargs="?", help="only this section or setting, such as client or wire.up.density")
    settings.set_defaults(action=_settings)
    return parser


def _run(options: argparse.Namespace) -> None:
    import rayfed

    if options.resume and not options.out:
        raise UserError("--resume: needs --out, the directory of the run to continue")
    uri = store.is_uri(options.out)
    experiment = rayfed.load_config(options.config, options.overrides)
    open_yet = " (engine.pack is yet to be chosen)" if experiment.engine.pack == "auto" else ""
    print(f"settings {experiment.digest()}{open_yet}", flush=True)
    with store.folder_for(options.out, options.resume) if uri else nullcontext(options.out) as out:
        result = rayfed.run(experiment, out=out, resume=options.resume)
        reports.write_page(result.out)
    print(f"run directory {options.out if uri else result.out}")


def _sweep(options: argparse.Namespace) -> None:
    if options.resume and not options.out:
        raise UserError("--resume: needs --out, the directory of the sweep to continue")
    if store.is_uri(options.out):
        raise UserError(f"--out: got {options.out!r}, but a sweep needs a folder: its trials are resumed from there")
    from rayfed.sweeps.sweep import check_failed, run_sweep

    result = run_sweep(options.config, options.overrides, options.out, options.resume)
    print(f"sweep directory {result.out}", flush=True)
    check_failed(result)


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
    from rayfed.methods import METHODS

    for name, card in sorted(METHODS.items()):
        print(f"{name:<10} {card.paper:<18} {card.says}\n{'':<10} down {card.down}, up {card.up}, per layer and round")


def _settings(options: argparse.Namespace) -> None:
    from rayfed.cli.settings import describe

    print(describe(options.section))
