"""`rayfed settings`: the schema as text, one setting a paragraph."""

from __future__ import annotations

import textwrap
from itertools import accumulate

from rayfed.config import Experiment
from rayfed.config.describe import allowed_values, format_value, iter_fields
from rayfed.config.sweep import Sweep
from rayfed.errors import allowed
from rayfed.suggestions import did_you_mean


def settings(section: str | None) -> None:
    """Prints the settings of the section."""
    print(describe(section))


def describe(section: str | None = None) -> str:
    """Every setting of the section (default: all; may be dotted) with its default, allowed values and meaning."""
    if section == "weighting":
        return _weightings()
    lines: list[str] = []
    known = iter_fields(Sweep, "sweep.") if (section or "").split(".")[0] == "sweep" else iter_fields(Experiment)
    for key, field in known:
        if section is None or key == section or key.startswith(section + "."):
            default = "(no default)" if field.is_required() else format_value(field.default, quotes=False)
            heading = f"{key} = {default}  [{allowed_values(field)}]"
            lines += [heading] if len(heading) <= 120 else textwrap.wrap(heading, 120, subsequent_indent="    ")
            lines.append(textwrap.fill(field.description or "", 100, initial_indent="    ", subsequent_indent="    "))
    if section is not None and not lines:
        keys = [key for key, _ in (*iter_fields(Experiment), *iter_fields(Sweep, "sweep."))]
        names = {name for key in keys for name in accumulate(key.split("."), "{}.{}".format)}
        hint = did_you_mean(section, sorted(names))
        raise allowed("settings", section, f"{hint}sections are {', '.join(Experiment.model_fields)}, sweep")
    return "\n".join(lines)


def _weightings() -> str:
    """The options of each weighting. The schema's section has no fields of its own."""
    from rayfed.cli.methods import describe_options  # these import torch
    from rayfed.plugins import member_class
    from rayfed.weighting import WEIGHTINGS, Weighting

    lines = []
    for name in WEIGHTINGS:
        cls = member_class("rayfed.weighting", name, Weighting, "server.weights")
        options = describe_options(cls, "weighting")
        lines += [f"server.weights={name}: {(cls.__doc__ or '').splitlines()[0]}", *(options or ["    no options"])]
    return "\n".join(lines)
