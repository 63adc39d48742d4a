"""`rayfed init`: lists the configs that come with rayfed, or copies one into this folder."""

from __future__ import annotations

from pathlib import Path

from rayfed.config.shipped import named, shipped, summary
from rayfed.errors import UserError, allowed


def init(name: str | None) -> None:
    """Copies the config to `NAME.yaml` in this folder; without a name, lists all. Never replaces a file."""
    if name is None:
        for known, path in shipped().items():
            print(f"{known:<22} {summary(path)}")
        return
    source = named(name, "NAME")
    target = Path(source.name)
    try:
        with target.open("xb") as file:
            file.write(source.read_bytes())
    except FileExistsError:
        raise allowed("NAME", name, f"{target} exists here already, and is not replaced") from None
    except OSError as error:
        raise UserError(f"NAME: cannot write {target} here: {error.strerror}") from None
    print(f"config {target}")
