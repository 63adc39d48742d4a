"""`rayfed workspace`: writes a W&B workspace for rayfed's runs to a file and, with a login, to W&B."""

from __future__ import annotations

import argparse
from pathlib import Path

from rayfed.errors import RunError, UserError


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    workspace = commands.add_parser(
        "workspace",
        help="a W&B workspace for rayfed's runs",
        description="Write the definition of a W&B workspace; with --save, also create it in your project.",
    )
    workspace.add_argument("--project", metavar="NAME", default="rayfed", help="W&B project (default rayfed)")
    workspace.add_argument("--entity", metavar="NAME", help="W&B entity; needed with --save")
    workspace.add_argument("--name", metavar="TEXT", default="rayfed", help="the workspace's name (default rayfed)")
    workspace.add_argument(
        "--out", metavar="FILE", default="workspace.json", help="file of the definition (default workspace.json)"
    )
    workspace.add_argument("--save", action="store_true", help="also create the workspace in W&B; needs `wandb login`")
    workspace.set_defaults(action=_workspace)


def _workspace(options: argparse.Namespace) -> None:
    from rayfed.files import write_json
    from rayfed.tracking.wandb_login import logged_in
    from rayfed.tracking.workspace import build, definition

    if options.save and not options.entity:
        raise UserError("--entity: needed with --save; the W&B user or team that owns the project")
    if options.save and not logged_in():
        raise UserError("--save: needs a login: run `wandb login` or set WANDB_API_KEY")
    if Path(options.out).is_dir():
        raise UserError(f"--out: got {options.out!r}, but that is a folder")
    workspace = build(options.project, options.entity or "", options.name)
    write_json(Path(options.out), definition(workspace))
    print(f"definition {options.out}")
    if options.save:
        try:
            workspace.save()
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise RunError(f"workspace: not saved ({type(error).__name__}: {line})") from None
        print(f"workspace {workspace.url}")
