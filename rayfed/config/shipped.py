"""The configs that come with rayfed: found by name, wherever rayfed is installed.

In a clone they are the YAML files of `configs/`. setup.py puts the same files into an installed package, as
`rayfed/configs/`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from rayfed.errors import allowed
from rayfed.suggestions import did_you_mean


def folder() -> Path:
    """The folder of the configs: that of the installed package, else that of the clone."""
    package = Path(__file__).parents[1]
    return next((path for path in (package / "configs", package.parent / "configs") if path.is_dir()), package)


def shipped() -> dict[str, Path]:
    """The configs by name: the file's name without `.yaml`. Those of runs come first, then recipes, then sweeps."""
    files = (sorted(folder().glob(pattern)) for pattern in ("*.yaml", "recipes/*.yaml", "sweeps/*.yaml"))
    return {path.stem: path for own in files for path in own}


def find_config(given: str | Path) -> Path:
    """The file that ``given`` names: a path, or else one of the shipped configs. UserError for an unknown name.

    A path that leads to no file is returned as it is: reading it says what is wrong.
    """
    path = Path(given)
    if path.suffix or path.name != str(given) or os.path.isfile(path):  # unlike is_file, never an error
        return path
    return named(str(given), "config", "there is no such file")


def named(name: str, field: str, wrong: str = "there is no such config") -> Path:
    """The shipped config of that name. UserError, which names ``field`` and says what is ``wrong``, for others."""
    known = shipped()
    if name not in known:
        hint = did_you_mean(name, known)
        raise allowed(field, name, f"{wrong}; {hint}configs that come with rayfed are {', '.join(known)}")
    return known[name]


def summary(path: Path) -> str:
    """The first sentence of the comment with which the file starts."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return re.split(r"(?<=[.?]) ", " ".join(comment), maxsplit=1)[0]
