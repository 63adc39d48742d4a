"""`rayfed verify`: computes the hash chain of a run again, from the files in its directory."""

from __future__ import annotations

from pathlib import Path

from rayfed import config
from rayfed.errors import UserError
from rayfed.server.chain import continued_after
from rayfed.server.chain import verify as verify_files


def verify(run: str) -> None:
    """Prints what was checked. UserError where ``run`` is no run directory; RunError where a file was changed."""
    out = Path(run)
    if not (out / "config.yaml").is_file():
        raise UserError(f"DIR: got {run!r}, but that is no run directory: it has no config.yaml")
    print(verify_files(out, config.load_config(out / "config.yaml").digest(), continued_after(out)))
