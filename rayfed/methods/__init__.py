"""Federated LoRA methods, one file a paper. `build` makes one by name; `METHODS` is the list.

A new method is one file and one line in `METHODS`.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rayfed.errors import UserError
from rayfed.methods.base import Method, Profile, Start, Trainable, Update


@dataclass(frozen=True)
class Card:
    """A line of `rayfed methods`: where it is, what it costs. r, in, out: rank and layer sizes; d: densities."""

    home: str  # module:class
    paper: str
    down: str  # entries a client receives per layer and round
    up: str
    says: str


METHODS: dict[str, Card] = {
    "fedit": Card("rayfed.methods.fedit:FedIT", "arXiv 2305.05644", "r (in + out)", "r (in + out)",
                  "average the factors"),
    "flasc": Card("rayfed.methods.flasc:Flasc", "arXiv 2406.05233", "d_down r (in + out)", "d_up r (in + out)",
                  "sparse down and up, dense local training"),
}  # fmt: skip


def build(name: str, **options: Any) -> Method:
    """The method of that name. UserError for an unknown name or option, or a value the option does not allow."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"method.name: got {name!r}, but {hint}allowed are {', '.join(sorted(METHODS))}")
    module, _, kind = METHODS[name].home.partition(":")
    cls = getattr(import_module(module), kind)
    hints = get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    for option, value in options.items():
        if option not in known:
            raise UserError(f"method.{option}: {name} has no such option; allowed are {', '.join(known) or 'none'}")
        _check(f"method.{option}", value, known[option])
    return cls(**options)


def _check(field: str, value: Any, hint: Any) -> None:
    """Options are literals, numbers and booleans: the types that YAML gives."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise UserError(f"{field}: got {value!r}, but allowed are {', '.join(map(str, choices))}")
    elif hint is float and type(value) is int:
        return
    elif isinstance(hint, type) and type(value) is not hint:
        raise UserError(f"{field}: got {value!r}, but it should be a {hint.__name__}")


__all__ = ["METHODS", "Card", "Method", "Profile", "Start", "Trainable", "Update", "build"]
