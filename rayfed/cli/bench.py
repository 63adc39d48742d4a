"""`rayfed bench`: prints the table of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rayfed.bench import run
from rayfed.bench.timing import machine, table, write
from rayfed.config.load import parse_override


def bench(name: str, overrides: Sequence[str], json: str | None) -> None:
    """Runs the benchmark, prints its figures and the machine, and writes them to the file ``json`` if one is given."""
    rows = run(name, dict(map(parse_override, overrides)))
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(table(rows))
    if json:
        write(Path(json), name, rows)
