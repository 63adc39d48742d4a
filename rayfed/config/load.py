"""Settings from a YAML file and `key=value` overrides. Every mistake becomes one line that says what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rayfed.config.describe import allowed_values, alternatives, format_value, iter_fields, section_of, sections_by_kind
from rayfed.config.schema import Experiment
from rayfed.errors import UserError

_TAG = "tag:yaml.org,2002:"
_PLAIN = [  # the types of a plain scalar (one without quotes): the first pattern that matches counts, else a string
    (_TAG + "null", re.compile(r"(~|null|Null|NULL|)\Z")),
    (_TAG + "bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")),
    (_TAG + "int", re.compile(r"[-+]?(0|[1-9][0-9_]*)\Z")),
    (_TAG + "float", re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?\Z")),
    (_TAG + "float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+\Z")),
    (_TAG + "float", re.compile(r"[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")),
    (_TAG + "merge", re.compile(r"<<\Z")),
]
Root = TypeVar("Root", bound=BaseModel)
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    """YAML, with these changes to YAML 1.1: 1e-3 is a number; off, 010, 12:30 and dates are strings.

    (YAML 1.1 reads 1e-3 as a string, off as a boolean, 010 as an octal number, 12:30 as a number to base 60.) A key
    given twice is refused. So are tags of values that no setting has, such as `!!python/object` and `!!set`.
    """

    yaml_implicit_resolvers = {None: _PLAIN}  # noqa: RUF012 - declared so by PyYAML
    yaml_constructors = {  # noqa: RUF012
        tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (None, *(_TAG + kind for kind in _KINDS))
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = key_node.value if key_node.tag == _TAG + "merge" else self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that `_Loader` or a loader of YAML 1.1 would read as another type without quotes."""

    yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, None: _PLAIN}  # noqa: RUF012

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Double quotes escape Unicode's own line ends. Without, a loader would fold them like those of the file."""
        quoted = any(end in text for end in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads the YAML file ``path``, applies ``overrides`` (each `dotted.key=value`, value in YAML) and validates.

    Raises UserError with one line per mistake: unknown key, wrong type, value out of range, refused combination.
    """
    settings = read_settings(path)
    for override in overrides:
        _apply(settings, override)
    return validate(settings)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, not yet validated; empty if the file is empty. UserError where there is none."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config: got {str(path)!r}, but there is no such file") from None
    except (OSError, ValueError) as error:  # a folder, no permission; not UTF-8
        raise UserError(f"config: got {str(path)!r}, but it cannot be read as text ({error})") from None
    settings = _parse(text, str(path))
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise UserError(
            f"config: got {str(path)!r}, but a config is a mapping of sections, not {format_value(settings)}"
        )
    return settings


def validate(settings: dict[str, Any]) -> Experiment:
    """The settings as an Experiment. Raises UserError with one line per mistake."""
    if "sweep" in settings:
        raise UserError("sweep: this section describes many runs; start them with `rayfed sweep CONFIG`")
    return validate_as(Experiment, settings)


def validate_as(model: type[Root], settings: dict[str, Any]) -> Root:
    """The settings as an instance of ``model``. Raises UserError with one line per mistake."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        # pydantic reports every item of a list and every type of a union; one line per field is enough
        lines = dict.fromkeys(_line(mistake, settings, model) for mistake in error.errors(include_url=False))
        raise UserError("\n".join(lines)) from None


def dump_config(experiment: Experiment) -> str:
    """All settings as YAML, defaults included. `load_config` reads it back to the same Experiment."""
    return dump_settings(experiment.model_dump(mode="json"))


def dump_settings(settings: dict[str, Any]) -> str:
    """A mapping as YAML. `read_settings` reads it back to the same mapping."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        reason = str(error)
    except (ValueError, LookupError):  # `!!int one`, `!!bool maybe`, an integer of thousands of digits
        reason = "a value does not match its tag or its type"
    except RecursionError:
        reason = "it is nested too deeply"
    raise UserError(f"{where}: not valid YAML: {' '.join(reason.split())}")


def parse_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value, read as YAML, of an override `key=value`. Raises UserError."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise UserError(f"override: got {override!r}, but an override is written key=value, such as server.rounds=20")
    return key, _parse(text, f"override {_dotted((key,))}")


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
            raise UserError(f"{_dotted((key,))}: got {source!r}, but {above} is the value {format_value(child)}")
        target = child
    target[last] = value


def _line(mistake: Any, settings: Any, root: type[BaseModel]) -> str:
    """A mistake that pydantic found, in one line."""
    if mistake["type"] == "value_error":  # raised by a validator of the schema: already one line
        return str(mistake["ctx"]["error"])
    field, path, section = _field(mistake["loc"], root)
    if field is None:
        hint = "a key is a string" if mistake["type"] == "invalid_key" else _suggest(path[-1], path[:-1], section, root)
        return f"{_dotted(path)}: unknown key; {hint}"
    allowed = allowed_values(field)
    if mistake["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path, allowed = (*path, "kind"), alternatives([*sections_by_kind(field)])
    value = settings
    for part in path:
        if part not in value:
            return f"{_dotted(path)}: missing, and there is no default; it should be {allowed}"
        value = value[part]
    return f"{_dotted(path)}: got {format_value(value)}, but it should be {allowed}"


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
    near = difflib.get_close_matches(last, section.model_fields, n=1)
    names = [name for name, _ in iter_fields(root)]
    itself = _dotted([*above, last])  # a known name if only sections of another kind have the key
    far = [name for name in names if name.endswith("." + last) and name != itself]
    if last in names:
        return (
            f"in YAML each part of a name is a level of its own: {last.replace('.', ': {')}: ...{'}' * last.count('.')}"
        )
    if near:
        return f"did you mean {_dotted([*above, near[0]])}? (allowed are {', '.join(section.model_fields)})"
    if far:
        return f"did you mean {' or '.join(far)}?"
    return f"allowed are {', '.join(section.model_fields)}"


def _dotted(path: Sequence[int | str]) -> str:
    """The path as a dotted name; in quotes if it has characters that do not fit on one line."""
    text = ".".join(map(str, path))
    return text if text.isprintable() else repr(text)
