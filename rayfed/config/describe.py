"""The schema read as a list of fields: their dotted names, and in words what each of them allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

NOUNS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    dict: "a mapping",
    list: "a list",
}
PLURALS = {int: "integers", float: "numbers", str: "strings"}


def walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted name, field) of every setting in order; a section itself is listed only if it may be null."""
    for name, field in model.model_fields.items():
        if section_of(field) is None or field.default_factory is None:
            yield prefix + name, field
        for inner in sections_of(field):
            yield from walk(inner, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The class of the section that the field holds, the first where there are several; None: it holds a value."""
    return next(iter(sections_of(field)), None)


def sections_of(field: FieldInfo) -> list[type[BaseModel]]:
    """The classes of section that the field may hold; several where the section's `kind` says which."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def kinds_of(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The classes of section by their `kind`, where the field may hold several; else empty."""
    sections = sections_of(field)
    if len(sections) < 2:
        return {}
    return {get_args(section.model_fields["kind"].annotation)[0]: section for section in sections}


def allowed(field: FieldInfo) -> str:
    """What the field allows, as it stands after "it should be": `a number in (0, 1]`, `fp32 or int8`, `null or ...`."""
    if kinds := kinds_of(field):
        optional = type(None) in get_args(field.annotation)
        return f"a section whose kind is {alternatives([*kinds])}{', or null' if optional else ''}"
    return _say(field.annotation, field.metadata)


def in_words(kind: Any) -> str:
    """What a type allows, as `allowed` says it; `Annotated[float, Field(ge=0)]` is "a number of at least 0"."""
    return _say(kind, [])


def _say(kind: Any, metadata: list[Any]) -> str:
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _say(inside[0], _flat(inside[1:]))
    if origin in (Union, UnionType):
        return alternatives([_say(part, metadata) for part in inside])
    if origin is Literal:
        return alternatives([str(choice) for choice in inside])
    if origin is tuple:
        count = "" if inside[-1] is Ellipsis else f"{len(inside)} "
        item, *limits = get_args(inside[0]) or inside[:1]  # items are plain, or Annotated with their limits
        return f"a list of {count}{PLURALS[item]}{_range(_flat(limits))}"
    if kind is type(None):
        return "null"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a section with the keys {', '.join(kind.model_fields)}"
    return NOUNS[kind] + _range(metadata)


def _flat(metadata: Iterable[Any]) -> list[Any]:
    return [part for m in metadata for part in (m.metadata if isinstance(m, FieldInfo) else [m])]


def _range(metadata: list[Any]) -> str:
    limits = {side: getattr(m, side) for m in metadata for side in ("gt", "ge", "lt", "le") if hasattr(m, side)}
    low, high = limits.get("gt", limits.get("ge")), limits.get("lt", limits.get("le"))
    if low is not None and high is not None:
        return f" in {'(' if 'gt' in limits else '['}{low}, {high}{')' if 'lt' in limits else ']'}"
    if low is not None:
        return f" above {low}" if "gt" in limits else f" of at least {low}"
    assert high is None, "say how an upper limit alone reads when there is one"
    return ""


def alternatives(words: list[str]) -> str:
    """`a, b or c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
