"""`rayfed settings`: the schema as text, one setting a paragraph."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rayfed.config import Experiment
from rayfed.errors import UserError


def describe(section: str | None = None) -> str:
    """Every setting of the section (default: all) with its dotted key, default and meaning."""
    if section is not None and section not in Experiment.model_fields:
        raise UserError(f"settings: got {section!r}, but sections are {', '.join(Experiment.model_fields)}")
    lines = []
    for key, default, text in _walk(Experiment, ""):
        if section is None or key.split(".")[0] == section:
            lines.append(f"{key} = {default}")
            lines.append(textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(lines)


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if field.default_factory is None:
            default = "(no default)" if field.default is PydanticUndefined else _yaml(field.default)
            bounds = ", ".join(str(m) for m in field.metadata if type(m).__name__ in {"Gt", "Ge", "Lt", "Le"})
            yield f"{prefix}{name}", default, (field.description or "") + (f" [{bounds}]" if bounds else "")
        if inner is not None:
            yield from _walk(inner, f"{prefix}{name}.")


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(list(value)) if isinstance(value, tuple) else str(value)
