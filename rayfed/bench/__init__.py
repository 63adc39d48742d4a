"""Benchmarks: what is fast, against what, on this machine. `rayfed bench NAME` prints a table and may write JSON.

A benchmark pairs A and B in turn, in one process and one run, and reports ratios with their spread: times alone say
more about the machine than about the code.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from rayfed.bench.timing import Row
from rayfed.errors import UserError

BENCHMARKS = {
    "aggregate": "rayfed.bench.aggregate:measure",
    "algebra": "rayfed.bench.algebra:measure",
    "scale": "rayfed.bench.scale:measure",
    "wire": "rayfed.bench.wire:measure",
}


def find(name: str) -> Callable[..., list[Row]]:
    """The benchmark of that name; UserError where there is none."""
    if name not in BENCHMARKS:
        raise UserError(f"bench: got {name!r}, but there are {', '.join(BENCHMARKS)}")
    module, _, function = BENCHMARKS[name].partition(":")
    found: Callable[..., list[Row]] = getattr(import_module(module), function)
    return found
