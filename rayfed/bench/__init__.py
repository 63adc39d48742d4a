"""Benchmarks: what is fast, against what, on this machine. `rayfed bench NAME` prints a table and may write JSON.

A benchmark runs A and B in turn, in one process, and reports ratios with their spread. Times alone say more about the
machine than about the code. Each benchmark is a module of this package with a function `measure`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import signature
from typing import Annotated, Any, get_type_hints

from pydantic import Field, PositiveInt, create_model

from rayfed.bench.timing import Row
from rayfed.config.load import validate_as
from rayfed.config.types import Section
from rayfed.errors import UserError

BENCHMARKS = ("aggregate", "algebra", "round", "scale", "step", "train", "wire")
Sizes = Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]


def find(name: str) -> Callable[..., list[Row]]:
    """The benchmark of that name; UserError where there is none."""
    if name not in BENCHMARKS:
        raise UserError(f"bench: got {name!r}, but allowed are {', '.join(BENCHMARKS)}")
    measure: Callable[..., list[Row]] = import_module(f"rayfed.bench.{name}").measure
    return measure


def run(name: str, given: Mapping[str, Any]) -> list[Row]:
    """Runs the benchmark with the given arguments (`uploads`, `packs`, ...; for `round`, dotted settings of a run).

    UserError for an unknown benchmark or argument, or for a value that the argument's type does not allow.
    """
    measure = find(name)
    arguments = signature(measure).parameters
    if "overrides" in arguments:
        return measure(**given)
    types = get_type_hints(measure, include_extras=True)
    fields: dict[str, Any] = {key: (types[key], argument.default) for key, argument in arguments.items()}
    return measure(**dict(validate_as(create_model(name, __base__=Section, **fields), dict(given))))
