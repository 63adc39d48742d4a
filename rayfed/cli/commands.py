"""The commands, with their arguments and their help. The module of a command is imported when the command runs."""

from __future__ import annotations

from collections.abc import Iterable
from pkgutil import resolve_name
from typing import Any

import click

from rayfed import __version__
from rayfed.cli import completion
from rayfed.errors import UserError, allowed
from rayfed.suggestions import did_you_mean

NAMES = ", or a name that `rayfed init` lists"
OUT = "directory (default runs/NAME-TIME), or a URI such as s3://bucket"


class _Commands(click.Group):
    """Lists the commands in the order in which they were added, and answers an unknown one with a similar one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not ctx.resilient_parsing:  # which completion asks for
            hint = did_you_mean(args[0], self.commands)
            raise allowed("COMMAND", args[0], f"{hint}allowed are {', '.join(self.commands)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="rayfed %(version)s")
def program() -> None:
    """Federated LoRA fine-tuning, simulated on Ray."""


def _command(function: str, short_help: str, help: str | None, *parameters: click.Parameter) -> None:
    """Adds the command of this function, `module:name` below `rayfed.cli`. It gets the command's arguments by name.

    ``help`` None: the short help, as a sentence.
    """

    def run(**arguments: Any) -> None:
        resolve_name(f"rayfed.cli.{function}")(**arguments)

    name = function.partition(":")[2]
    about = help or f"{short_help[0].upper()}{short_help[1:]}."
    program.add_command(click.Command(name, callback=run, params=[*parameters], short_help=short_help, help=about))


def _config(help: str, required: bool = True) -> click.Argument:
    return click.Argument(["config"], required=required, help=help, shell_complete=completion.configs)


def _overrides(help: str, complete: completion.Completer | None = completion.overrides) -> click.Argument:
    return click.Argument(["overrides"], nargs=-1, metavar="[key=value]...", help=help, shell_complete=complete)


def _option(name: str, metavar: str, help: str, **settings: Any) -> click.Option:
    return click.Option([f"--{name}"], metavar=metavar, help=help, **settings)


def _flag(name: str, help: str) -> click.Option:
    return click.Option([f"--{name}"], is_flag=True, help=help)


def _out(help: str, resume: str) -> Iterable[click.Option]:
    """`--out` and `--resume`, which needs `--out`."""

    def check(context: click.Context, option: click.Parameter, value: bool) -> bool:
        if value and context.params["out"] is None:
            raise UserError("--resume: needs --out, the directory to continue")
        return value

    yield _option("out", "DIR", help, is_eager=True, shell_complete=completion.folders)
    yield click.Option(["--resume"], is_flag=True, callback=check, help=resume)


def _runs() -> Iterable[click.Parameter]:
    """The directories to compare, and `--target`."""
    yield click.Argument(
        ["folders"], nargs=-1, required=True, metavar="DIR...", help="a run's directory, or a sweep's",
        shell_complete=completion.folders,
    )  # fmt: skip
    target = "accuracy (or gap) up to which bytes are counted, 0 to 1 (default: 95 % of the best)"
    yield _option("target", "SHARE", target)


_command(
    "init:init",
    "copy a config that comes with rayfed",
    "List the configs that come with rayfed, or copy one into this folder, to edit it.",
    click.Argument(
        ["name"], required=False, help="the config to copy, to NAME.yaml", shell_complete=completion.config_names
    ),
)
_command(
    "run:run",
    "run one experiment",
    "Run the experiment in CONFIG.",
    _config(f"YAML file{NAMES}"),
    _overrides("settings to change, such as server.rounds=20"),
    *_out(f"run {OUT}/run", "continue DIR from its last checkpoint"),
    _flag("dry-run", "start nothing: check CONFIG, and show what it would take, as `rayfed doctor CONFIG` does"),
)
_command(
    "run:sweep",
    "run many trials and compare them",
    "Run the sweep in CONFIG.",
    _config(f"YAML file with a section `sweep`{NAMES}"),
    _overrides("settings to change; also sweep.tune=[client.lr] and such"),
    *_out(f"sweep {OUT}/sweep", "run the trials in DIR that are not finished"),
)
_command(
    "submit:submit",
    "run or sweep as a job on a Ray cluster",
    "Submit CONFIG to a Ray cluster: a run, or a sweep where it has a section `sweep`.",
    _config("YAML file; it is sent to the cluster"),
    _overrides("as for run or sweep"),
    _option("address", "URL", "the cluster's dashboard, such as http://localhost:8265"),
    *_out(
        "folder on the cluster's head, absolute or ~/..., or a URI (default ~/runs/JOB)",
        "continue the run or sweep in DIR",
    ),
    _option(
        "include", "PATH", "also send this file or folder, by its last name", multiple=True,
        shell_complete=completion.files,
    ),
    _flag("follow", "show the logs until the job ends; fail if it does"),
)  # fmt: skip
_command(
    "doctor:doctor",
    "what this machine can run, and how fast",
    "Say what this machine has; with CONFIG, check it and show its plan, its messages, its memory and its hours.",
    _config("YAML file of a run", required=False),
    _overrides("settings to change"),
)
_command(
    "data:data",
    "the rows of each client, and how much clients differ",
    "Show the rows of CONFIG, which client has them, and how much the clients differ. Nothing is trained.",
    _config("YAML file of a run"),
    _overrides("settings to change, such as partition.alpha=0.5"),
    _option("svg", "FILE", "also write the figure to FILE", shell_complete=completion.files),
)
_command(
    "pretrain:pretrain",
    "make a small base model, from rows that no client has",
    "Train the base model of the section `pretrain` on the rows of data.pretrain_share, and save it for transformers.",
    _config(f"YAML file with a section `pretrain`{NAMES}"),
    _overrides("settings to change, such as pretrain.steps=500"),
    _option("out", "DIR", "folder of the model (default: model.name)", shell_complete=completion.folders),
)
_command(
    "bench:bench",
    "measure what is fast, against what, on this machine",
    None,
    click.Argument(
        ["name"], help="which benchmark: aggregate, algebra, round, ...", shell_complete=completion.benchmarks
    ),
    _overrides("its sizes, such as uploads=2000 or packs=[1,8]; for round, settings of a run", None),
    _option("json", "FILE", "also write the figures and the machine to FILE", shell_complete=completion.files),
)
_command(
    "verify:verify",
    "check that a run's files are as they were written",
    "Check the files of a finished or unfinished run: its hash chain, its ledger and its checkpoints.",
    click.Argument(["run"], metavar="DIR", help="a run directory", shell_complete=completion.folders),
)
_command(
    "reports:report",
    "a page with tables and figures of runs and sweeps",
    "Compare the runs in DIR on one page.",
    *_runs(),
    _option(
        "out", "DIR", "folder of report.html and figures/ (default: DIR; for several DIR: report/)",
        shell_complete=completion.folders,
    ),
    _option(
        "link", "UP,DOWN", "also show simulated time on client links of this many Mbit/s, such as 10,50"
    ),
)  # fmt: skip
_command(
    "reports:compare", "a table of runs and sweeps in the terminal", "Compare the runs in DIR in one table.", *_runs()
)
_command(
    "workspace:workspace",
    "a W&B workspace for rayfed's runs",
    "Write the definition of a W&B workspace; with --save, also create it in your project.",
    _option("project", "NAME", "W&B project (default rayfed)", default="rayfed"),
    _option("entity", "NAME", "W&B entity; needed with --save"),
    _option("name", "TEXT", "the workspace's name (default rayfed)", default="rayfed"),
    _option(
        "out", "FILE", "file of the definition (default workspace.json)", default="workspace.json",
        shell_complete=completion.files,
    ),
    _flag("save", "also create the workspace in W&B; needs `wandb login`"),
)  # fmt: skip
_command(
    "methods:methods",
    "list the methods, or explain one",
    None,
    click.Argument(
        ["name"], required=False, help="the method to explain: its algorithm and options",
        shell_complete=completion.methods,
    ),
)  # fmt: skip
_command(
    "settings:settings",
    "list every setting with its default and meaning",
    None,
    click.Argument(
        ["section"], required=False, help="only this section or setting, such as client or wire.up.density",
        shell_complete=completion.settings,
    ),
)  # fmt: skip
