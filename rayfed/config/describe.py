"""The schema as a list of fields: their dotted names, and in words the values that each field allows."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rayfed.config.types import ClassPath, Printable

NOUNS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    dict: "a mapping",
    list: "a list",
    Any: "any value",
}
PLURALS = {int: "integers", float: "numbers", str: "strings"}


def iter_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted name, field) of every setting, in order. A section itself is listed only where it may be null."""
    for name, field in model.model_fields.items():
        if section_of(field) is None or field.default_factory is None:
            yield prefix + name, field
        for inner in sections_of(field):
            yield from iter_fields(inner, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section class of the field, the first where there are several; None where the field holds a value."""
    return next(iter(sections_of(field)), None)


def sections_of(field: FieldInfo) -> list[type[BaseModel]]:
    """All section classes of the field. There are several where the key `kind` of the section selects one."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def sections_by_kind(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The section classes of the field by their `kind`; empty where the field has one section class or none."""
    sections = sections_of(field)
    if len(sections) < 2:
        return {}
    return {get_args(section.model_fields["kind"].annotation)[0]: section for section in sections}


def allowed_values(field: FieldInfo) -> str:
    """The values that the field allows, in words: `a number in (0, 1]`, `fp32 or int8`, `a string or null`."""
    if kinds := sections_by_kind(field):
        optional = type(None) in get_args(field.annotation)
        return f"a section whose kind is {alternatives([*kinds])}{', or null' if optional else ''}"
    return _describe_type(field.annotation, field.metadata)


def words_of(kind: Any) -> list[str]:
    """The words that a type allows, such as `sgd` and `adamw`; empty where it allows none."""
    if get_origin(kind) is Literal:
        return [choice for choice in get_args(kind) if isinstance(choice, str)]
    return [word for part in get_args(kind) for word in words_of(part)]


def alternatives(words: list[str]) -> str:
    """`a, b or c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def format_value(value: Any, quotes: bool = True) -> str:
    """The value of a setting on one line, as in YAML; long values are cut. A string has quotes unless ``quotes=False``.

    `null`, `true`, `0.25`, `[1, 4]`, `'fedhl'`.
    """
    return value if isinstance(value, str) and not quotes else _ONE_LINE.repr(value)


class _OneLine(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxstring = 2, 12, 4, 120

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return str(value).lower()

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write integers of thousands of digits.
        return super().repr_int(value, level) if value.bit_length() < 1000 else "an integer of over 300 digits"

    def repr_tuple(self, value: tuple[Any, ...], level: int) -> str:
        return self.repr_list([*value], level)


_ONE_LINE = _OneLine()


def mistake(field: str, value: Any, what: str) -> str:
    """The line `field: got VALUE, but what`. ``what`` says what is allowed."""
    return f"{field}: got {format_value(value)}, but {what}"


def in_words(kind: Any) -> str:
    """The values that a type allows, in words: `Annotated[float, Field(ge=0)]` is "a number of at least 0"."""
    return _describe_type(kind, [])


def _describe_type(kind: Any, metadata: list[Any]) -> str:
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _describe_type(inside[0], _flat(inside[1:]))
    if origin in (Union, UnionType):
        literal = [get_args(part) if get_origin(part) is Literal else () for part in inside]
        words = [[*map(str, found)] or [_describe_type(part, metadata)] for part, found in zip(inside, literal)]
        return alternatives([word for each in words for word in each])
    if origin is Literal:
        return alternatives([str(choice) for choice in inside])
    if origin is tuple:
        most = next((f"up to {m.max_length} " for m in metadata if hasattr(m, "max_length")), "")
        count = most if inside[-1] is Ellipsis else f"{len(inside)} "
        item, *limits = get_args(inside[0]) or inside[:1]  # the type of the items, and their limits if Annotated
        return f"a list of {count}{_with_limits(PLURALS.get(item, 'values'), _flat(limits))}"
    if origin is dict:
        return f"{_with_limits(NOUNS[dict], metadata)}, from {PLURALS[inside[0]]} to {PLURALS.get(inside[1], 'values')}"
    if kind is type(None):
        return "null"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a section with the keys {', '.join(kind.model_fields)}"
    return _with_limits(NOUNS.get(kind, f"a value of type {kind}"), metadata)


def _flat(metadata: Iterable[Any]) -> list[Any]:
    return [part for m in metadata for part in (m.metadata if isinstance(m, FieldInfo) else [m])]


def _with_limits(noun: str, metadata: list[Any]) -> str:
    if any(isinstance(getattr(m, "func", None), ClassPath) for m in metadata):
        return "an import path package.module:Class"
    if most := next((m.func.most for m in metadata if isinstance(getattr(m, "func", None), Printable)), None):
        return f"{noun} (up to {most} bytes)"
    if most := next((m.max_length for m in metadata if hasattr(m, "max_length")), None):
        return f"{noun} of up to {most} keys"  # a mapping; lists are above
    limits = {side: getattr(m, side) for m in metadata for side in ("gt", "ge", "lt", "le") if hasattr(m, side)}
    low, high = limits.get("gt", limits.get("ge")), limits.get("lt", limits.get("le"))
    if low is not None and high is not None:
        return (
            f"{noun} in {'(' if 'gt' in limits else '['}{_short(low)}, {_short(high)}{')' if 'lt' in limits else ']'}"
        )
    if low is not None:
        return f"{noun} above {low}" if "gt" in limits else f"{noun} of at least {low}"
    assert high is None, "no field has an upper limit alone; add its words here"
    return noun


def _short(limit: float) -> str:
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Each dotted setting by its last words: as many as distinguish it. `method.name` is `method`."""
    full = {key: key.removesuffix(".name") for key in keys}
    short = {}
    for key, name in full.items():
        tails = (name.split(".", n)[-1] for n in range(name.count("."), -1, -1))
        unique = (t for t in tails if sum(other == t or other.endswith("." + t) for other in full.values()) == 1)
        short[key] = next(unique, key)
    return short


def format_settings(settings: Mapping[str, Any]) -> str:
    """`client.lr=0.1, seed=0`."""
    return ", ".join(f"{key}={format_value(value, quotes=False)}" for key, value in settings.items())


def format_name(settings: Mapping[str, Any], short: Mapping[str, str]) -> str:
    """`lr=0.1,seed=0`, in characters that a folder's name may have. ``short`` maps settings to their short names."""
    parts = (f"{short[key]}={_word(value)}" for key, value in settings.items())
    return re.sub(r"[^\w.,=+-]+", "-", ",".join(parts)).strip(".-")


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(_word, value))
    return digest(value)[:6] if isinstance(value, dict) else format_value(value, quotes=False)


def digest(value: Any) -> str:
    """SHA-256 (first 16 hex digits) of a value that JSON can write; of other values inside, of their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
