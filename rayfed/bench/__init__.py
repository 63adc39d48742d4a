"""Benchmarks: what is fast, against what, on this machine. `rayfed bench NAME` prints a table and may write JSON.

A benchmark runs A and B in turn, in one process, and reports ratios with their spread. Times alone say more about the
machine than about the code. Each benchmark is a module of this package with a function `measure`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from rayfed.bench.timing import Row
from rayfed.errors import UserError, allowed

BENCHMARKS = ("aggregate", "algebra", "round", "scale", "train", "wire")


def find(name: str) -> Callable[..., list[Row]]:
    """The benchmark of that name; UserError where there is none."""
    if name not in BENCHMARKS:
        raise UserError(f"bench: got {name!r}, but allowed are {', '.join(BENCHMARKS)}")
    measure: Callable[..., list[Row]] = import_module(f"rayfed.bench.{name}").measure
    return measure


def run(name: str, given: Mapping[str, Any]) -> list[Row]:
    """Runs the benchmark with the given arguments (`uploads`, `packs`, ...; for `round`, dotted settings of a run).

    UserError for an unknown benchmark or argument, or for a value that is not of the default's type.
    """
    measure = find(name)
    known = signature(measure).parameters
    if all(parameter.kind != Parameter.VAR_KEYWORD for parameter in known.values()):
        kinds = {key: p.default for key, p in known.items() if isinstance(p.default, int | str | tuple)}
        for key, value in given.items():
            if key not in kinds:
                raise UserError(f"bench {name}: got {key!r}, but allowed are {', '.join(kinds)}")
            _check(key, value, kinds[key])
    return measure(**given)


def _check(key: str, value: Any, default: int | str | tuple[Any, ...]) -> None:
    values, sample = (value, default[0]) if isinstance(default, tuple) else ([value], default)
    kind = "whole numbers of 1 or more" if isinstance(sample, int) else "words"
    fine = isinstance(values, list) and len(values) > 0
    if not fine or not all(type(v) is type(sample) and (isinstance(v, str) or v >= 1) for v in values):
        raise allowed(key, value, f"allowed is {'a list of ' if isinstance(default, tuple) else ''}{kind}")
