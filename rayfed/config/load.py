"""Settings from a YAML file and `key=value` overrides. Every mistake becomes one line that says what is allowed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rayfed.config.adapter import with_digest
from rayfed.config.describe import (
    allowed_values,
    alternatives,
    format_settings,
    format_value,
    iter_fields,
    section_of,
    sections_by_kind,
    words_of,
)
from rayfed.config.parse import MOST_LEVELS, dump_settings, parse, read_text
from rayfed.config.schema import Experiment
from rayfed.config.shipped import find_config
from rayfed.config.types import TextMistake
from rayfed.errors import MOST_LINES, UserError, allowed
from rayfed.suggestions import nearest

Root = TypeVar("Root", bound=BaseModel)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads the YAML file ``path``, applies ``overrides`` (each `dotted.key=value`, value in YAML) and validates.

    ``path`` may also be the name of a config that comes with rayfed, such as `quickstart`.

    Raises UserError with one line per mistake: unknown key, wrong type, value out of range, refused combination.
    """
    settings = read_settings(path)
    for override in overrides:
        _apply(settings, override)
    return validate(settings)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, not yet validated; empty if the file is empty. UserError where there is none.

    ``path`` may also be the name of a config that comes with rayfed.
    """
    settings = parse(read_text(find_config(path)), str(path))
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise allowed("config", str(path), f"a config is a mapping of sections, not {format_value(settings)}")
    return settings


def validate(settings: dict[str, Any]) -> Experiment:
    """The settings as an Experiment. Raises UserError with one line per mistake."""
    if "sweep" in settings:
        raise UserError("sweep: this section describes many runs; start them with `rayfed sweep CONFIG`")
    return with_digest(validate_as(Experiment, settings))


def validate_as(model: type[Root], settings: dict[str, Any]) -> Root:
    """The settings as an instance of ``model``. Raises UserError with one line per mistake."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise refusal(error, settings, model) from None


def refusal(error: ValidationError, settings: Any, model: type[BaseModel]) -> UserError:
    """What pydantic found wrong with the settings of a ``model``, one line per mistake."""
    # pydantic reports every item of a list and every type of a union; one line per field is enough
    mistakes: dict[Any, Any] = {}
    for mistake in error.errors(include_url=False, include_input=False):
        mistakes.setdefault((_is_line(mistake), _field(mistake["loc"], model)[1]), mistake)
    lines = [_line(mistake, settings, model) for mistake in islice(mistakes.values(), MOST_LINES - 1)]
    if more := len(mistakes) - len(lines):
        lines.append(f"and {more} more mistakes")
    return UserError("\n".join(lines))


def changed(experiment: Experiment, overrides: Sequence[str | Mapping[str, Any]]) -> Experiment:
    """The settings with overrides: each `key=value`, or a mapping of dotted keys to values. UserError as `validate`."""
    settings = experiment.model_dump(mode="json", exclude_unset=True)
    for override in overrides:
        pairs = override.items() if isinstance(override, Mapping) else [parse_override(override)]
        for key, value in pairs:
            assign(settings, key, value, str(override))
    return validate(settings)


def overridden(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the settings with the dotted overrides in their place. UserError where one has no place."""
    own = copy.deepcopy(dict(settings))
    for key, value in overrides.items():
        assign(own, key, copy.deepcopy(value), format_settings({key: value}))
    return own


def dump_config(experiment: Experiment) -> str:
    """All settings as YAML, defaults included. `load_config` reads it back to the same Experiment."""
    return dump_settings(experiment.model_dump(mode="json"))


def parse_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value, read as YAML, of an override `key=value`. Raises UserError."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise allowed("override", override, "an override is written key=value, such as server.rounds=20")
    if key.count(".") >= MOST_LEVELS:
        raise allowed("override", override, f"a key has at most {MOST_LEVELS} parts")
    return key, parse(text, f"override {_dotted((key,))}")


def _apply(settings: dict[str, Any], override: str) -> None:
    assign(settings, *parse_override(override), override)


def assign(settings: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Sets ``settings[dotted key]`` in place. A UserError quotes ``source``, the text that the user wrote."""
    *sections, last = key.split(".")
    target = settings
    for depth, section in enumerate(sections, 1):
        child = target.setdefault(section, {})
        if child is None:  # `client:` with nothing under it
            child = target[section] = {}
        if not isinstance(child, dict):
            above = _dotted(sections[:depth])
            raise allowed(_dotted((key,)), source, f"{above} is the value {format_value(child)}")
        target = child
    target[last] = value


def _line(mistake: Any, settings: Any, root: type[BaseModel]) -> str:
    """A mistake that pydantic found, in one line."""
    if _is_line(mistake):
        return str(mistake["ctx"]["error"])
    field, path, section = _field(mistake["loc"], root)
    if field is None:
        hint = "a key is a string" if mistake["type"] == "invalid_key" else _suggest(path[-1], path[:-1], section, root)
        return f"{_dotted(path)}: unknown key; {hint}"
    what, words = allowed_values(field), words_of(field.annotation)
    if mistake["type"] in ("union_tag_invalid", "union_tag_not_found"):
        words = [*sections_by_kind(field)]
        path, what = (*path, "kind"), alternatives(words)
    value = settings
    for part in path:
        if part not in value:
            return f"{_dotted(path)}: missing, and there is no default; it should be {what}"
        value = value[part]
    if mistake["type"] == "value_error":
        return f"{_dotted(path)}: got {format_value(value)}, but {mistake['ctx']['error']}"
    near = nearest(value, words) if isinstance(value, str) else None
    hint = f"; did you mean {near}?" if near else ""
    return f"{_dotted(path)}: got {format_value(value)}, but it should be {what}{hint}"


def _is_line(mistake: Any) -> bool:
    """Whether a validator of the schema found the mistake, and has put it in a line already."""
    return mistake["type"] == "value_error" and not isinstance(mistake["ctx"]["error"], TextMistake)


def _field(
    location: Sequence[int | str], root: type[BaseModel]
) -> tuple[FieldInfo | None, tuple[int | str, ...], type[BaseModel]]:
    """(field, its path, its section) of the mistake at ``location``, a location of pydantic.

    The field is None where the key is unknown. A location of pydantic also has the kinds of sections, and the items or
    types within a field; the path does not.
    """
    section: type[BaseModel] = root
    inner: type[BaseModel] | None = root
    kinds: dict[str, type[BaseModel]] = {}
    field: FieldInfo | None = None
    path: list[int | str] = []
    for depth, part in enumerate(location):
        if part in kinds:
            inner, kinds = kinds[str(part)], {}
            continue
        if inner is None:
            break
        section, field = inner, inner.model_fields.get(str(part))
        if field is None:
            return None, (*path, *location[depth:]), section
        path.append(part)
        inner, kinds = section_of(field), sections_by_kind(field)
    return field, tuple(path), section


def _suggest(last: int | str, above: Sequence[int | str], section: type[BaseModel], root: type[BaseModel]) -> str:
    """A hint for an unknown key: a similar key of the same section, or the same key of another section."""
    last = str(last)
    near = nearest(last, section.model_fields)
    names = [name for name, _ in iter_fields(root)]
    itself = _dotted([*above, last])  # a known name if only sections of another kind have the key
    far = [name for name in names if name.endswith("." + last) and name != itself]
    if last in names:
        return (
            f"in YAML each part of a name is a level of its own: {last.replace('.', ': {')}: ...{'}' * last.count('.')}"
        )
    if near:
        return f"did you mean {_dotted([*above, near])}? (allowed are {', '.join(section.model_fields)})"
    if far:
        return f"did you mean {' or '.join(far)}?"
    return f"allowed are {', '.join(section.model_fields)}"


def _dotted(path: Sequence[int | str]) -> str:
    """The path as a dotted name; in quotes if it is empty or has characters that do not fit on one line."""
    text = ".".join(map(str, path))
    return text if text and text.isprintable() else repr(text)
