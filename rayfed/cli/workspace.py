"""`rayfed workspace`: writes a W&B workspace for rayfed's runs to a file and, with a login, to W&B."""

from __future__ import annotations

from pathlib import Path

from rayfed.errors import RunError, UserError, class_and_line


def workspace(project: str, entity: str | None, name: str, out: str, save: bool) -> None:
    """Writes the definition to the file ``out``, and with ``save`` creates the workspace in W&B.

    UserError for wrong options; RunError where W&B does not save the workspace.
    """
    from rayfed.files import write_json
    from rayfed.tracking.wandb_login import logged_in
    from rayfed.tracking.workspace import build, definition

    if save and not entity:
        raise UserError("--entity: needed with --save; the W&B user or team that owns the project")
    if save and not logged_in():
        raise UserError("--save: needs a login: run `wandb login` or set WANDB_API_KEY")
    if Path(out).is_dir():
        raise UserError(f"--out: got {out!r}, but that is a folder")
    built = build(project, entity or "", name)
    write_json(Path(out), definition(built))
    print(f"definition {out}")
    if save:
        try:
            built.save()
        except Exception as error:
            raise RunError(f"workspace: not saved ({class_and_line(error)})") from None
        print(f"workspace {built.url}")
