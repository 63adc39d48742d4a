"""`rayfed methods`: the methods as text, and one method with all its options."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise

from rayfed.config.describe import in_words
from rayfed.config.options import REQUIRED, options_of
from rayfed.methods import ALIASES, METHODS, Method, method_class


def methods(name: str | None) -> None:
    """Prints all methods, or one with its options."""
    print(describe(name) if name else describe_all())


def describe_all() -> str:
    """Every method: its name, paper and summary, then its traffic, mixed ranks, secure aggregation, source."""
    lines = []
    for name in METHODS:
        cls = method_class(name)
        lines.append(f"{name:<10} {cls.paper:<16} {cls.summary}")
        ranks = "mixed ranks" if cls.mixed_ranks else "one rank"
        lines.append(f"{'':<10} down {cls.traffic_down}; up {cls.traffic_up}")
        lines.append(f"{'':<10} {ranks}; secure aggregation: {_secure(cls)}; source: {cls.source}")
    lines += [f"{alias:<10} another name of {name}" for alias, name in ALIASES.items()]
    lines.append("Traffic is in entries per layer and round. `rayfed methods NAME` shows a method's options.")
    lines.append("Secure aggregation: whether the server needs only a sum of the uploads, over entries known to all.")
    return "\n".join(lines)


def describe(name: str) -> str:
    """One method: what it is, its traffic, its defaults, and every option with its default, range and meaning.

    ``name`` may be an import path. UserError where there is no such method.
    """
    cls = method_class(name)
    facts = {
        "paper": cls.paper,
        "source": cls.source,
        "down": f"{cls.traffic_down} entries per layer and round",
        "up": f"{cls.traffic_up} entries per layer and round",
        "ranks": "clients may have different ranks" if cls.mixed_ranks else "all clients have one rank",
        "secure": f"aggregation without seeing single uploads: {_secure(cls)}",
        "private": f"user-level privacy: {_private(cls)}",
        "graph": f"averages between neighbours, without a server: {cls.mixing or 'no'}",
        "weights": f"{cls.weights} (server.weights)",
        "optimizer": f"{cls.optimizer} (server.optimizer); allowed are {', '.join(cls.optimizers)}",
    }
    lines = [f"{name}: {cls.summary}", *(f"  {key:<10} {value}" for key, value in facts.items())]
    return "\n".join([*lines, *(describe_options(cls, "method") or ["  no options"])])


def describe_options(cls: type, section: str) -> list[str]:
    """Every option of a member of an axis with its default, range and meaning, as lines; they stand in ``section``."""
    lines, meanings = [], _meanings(cls)
    for option, found in options_of(cls).items():
        default = "(no default)" if found.default is REQUIRED else _yaml(found.default)
        lines.append(f"{section}.{option} = {default}  [{in_words(found.annotation)}]")
        if option in meanings:
            lines.append(textwrap.fill(meanings[option], 100, initial_indent="    ", subsequent_indent="    "))
    return lines


def _secure(cls: type[Method]) -> str:
    """When secure aggregation allows the method. A property decides by the options, and here by their defaults."""
    claim: object = cls.secure_aggregation
    if isinstance(claim, property):
        return "by its options, no by default"
    return "dense uploads" if claim else "no"


def _private(cls: type[Method]) -> str:
    """Whether user-level privacy takes the method. A property decides by the options, and here by their defaults."""
    claim: object = cls.summed
    if isinstance(claim, property):
        complete = all(option.default is not REQUIRED for option in options_of(cls).values())
        by_default = "yes by default; else not:" if complete and cls().summed else "no by default:"
        return f"by its options; {by_default} {cls.refuses_privacy}"
    return "yes" if claim else f"no: {cls.refuses_privacy}"


def _meanings(cls: type) -> dict[str, str]:
    """The docstring under each option's field, from the source of the class and of its bases."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):  # a class without source, such as `object`
            continue
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                meanings[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return meanings


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
