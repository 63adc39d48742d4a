"""Settings from a YAML file and `key=value` overrides; every mistake becomes one line that says what is allowed."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rayfed.config.describe import allowed, alternatives, kinds_of, section_of, walk
from rayfed.config.schema import Experiment
from rayfed.errors import UserError

_TAG = "tag:yaml.org,2002:"
_WORDS = [  # what a word without quotes may be besides a string; the first that fits counts
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
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring = 2, 12, 4, 120


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number; off, 010, 12:30 and dates are words; a key given twice is refused.

    (YAML 1.1 reads them as a word, a boolean, an octal number, a number to base 60 and dates.) There are no kinds of
    values but those that settings have: `!!python/object`, `!!set` and the like are refused.
    """

    yaml_implicit_resolvers = {None: _WORDS}  # noqa: RUF012 - declared so by PyYAML
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
    """Quotes every string that is something else without quotes, to this loader or to one of YAML 1.1."""

    yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, None: _WORDS}  # noqa: RUF012

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Between double quotes, Unicode's own line ends are escaped; else they would be folded like the file's."""
        quoted = any(end in text for end in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads ``path`` (YAML), applies ``overrides`` (each `dotted.key=value`, value in YAML) and validates.

    Raises UserError with one line per mistake: unknown key, wrong type, value out of range, impossible combination.
    """
    settings = read_settings(path)
    for override in overrides:
        _apply(settings, override)
    return validate(settings)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, not yet validated; empty where the file is."""
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
        raise UserError(f"config: got {str(path)!r}, but a config is a mapping of sections, not {shown(settings)}")
    return settings


def validate(settings: dict[str, Any]) -> Experiment:
    """The settings as an Experiment; UserError with one line per mistake."""
    if "sweep" in settings:
        raise UserError("sweep: this section makes the settings many runs; start them with `rayfed sweep CONFIG`")
    return validate_as(Experiment, settings)


def validate_as(model: type[Root], settings: dict[str, Any]) -> Root:
    """The settings as that model; UserError with one line per mistake."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise UserError("\n".join(_lines(error, settings, model))) from None


def dump_config(experiment: Experiment) -> str:
    """The resolved settings as YAML that `load_config` reads back to the same Experiment."""
    return dump_settings(experiment.model_dump(mode="json"))


def dump_settings(settings: dict[str, Any]) -> str:
    """A mapping as YAML that `read_settings` reads back."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        reason = str(error)
    except (ValueError, LookupError):  # `!!int one`, `!!bool maybe`, an integer of thousands of digits
        reason = "a value is not what its tag or its form says"
    except RecursionError:
        reason = "it is nested too deeply"
    raise UserError(f"{where}: not valid YAML: {' '.join(reason.split())}")


def parse_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value, read as YAML, of `key=value`."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise UserError(f"override: got {override!r}, but an override is written key=value, such as server.rounds=20")
    return key, _parse(text, f"override {_dotted((key,))}")


def _apply(settings: dict[str, Any], override: str) -> None:
    key, value = parse_override(override)
    assign(settings, key, value, override)


def assign(settings: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Puts the value where the dotted key says, in place. ``said`` is what a refusal quotes."""
    *sections, last = key.split(".")
    target = settings
    for depth, section in enumerate(sections, 1):
        child = target.setdefault(section, {})
        if child is None:  # `client:` with nothing under it
            child = target[section] = {}
        if not isinstance(child, dict):
            above = _dotted(sections[:depth])
            raise UserError(f"{_dotted((key,))}: got {said!r}, but {above} is the value {shown(child)}")
        target = child
    target[last] = value


def _lines(error: ValidationError, settings: dict[str, Any], root: type[BaseModel]) -> Iterator[str]:
    told = set()
    for mistake in error.errors(include_url=False):
        # What follows the field's own name is an item of a list or, in a union, the type that was tried.
        field, path, section = _field(mistake["loc"], root)
        if (path, field is None) not in told:
            told.add((path, field is None))
            yield _line(path, field, section, mistake, settings, root)


def _line(
    path: Sequence[int | str],
    field: FieldInfo | None,
    section: type[BaseModel],
    mistake: Any,
    settings: Any,
    root: type[BaseModel],
) -> str:
    if mistake["type"] == "value_error":  # written by the schema itself, already whole
        return str(mistake["ctx"]["error"])
    if field is None:
        hint = "keys are words" if mistake["type"] == "invalid_key" else _suggest(path[-1], path[:-1], section, root)
        return f"{_dotted(path)}: unknown key; {hint}"
    right = allowed(field)
    if mistake["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path, right = (*path, "kind"), alternatives([*kinds_of(field)])
    value = settings
    for part in path:
        if part not in value:
            return f"{_dotted(path)}: missing, and there is no default; it should be {right}"
        value = value[part]
    return f"{_dotted(path)}: got {shown(value)}, but it should be {right}"


def _field(
    location: Sequence[int | str], root: type[BaseModel]
) -> tuple[FieldInfo | None, tuple[int | str, ...], type[BaseModel]]:
    """The field at or around pydantic's location of a mistake, its path, and the section that it is in.

    None where there is no such field. The path leaves out the kinds of sections, which pydantic's location names.
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
        inner, kinds = section_of(field), kinds_of(field)
    return field, tuple(path), section


def _suggest(last: int | str, above: Sequence[int | str], section: type[BaseModel], root: type[BaseModel]) -> str:
    """What the unknown key may have meant: a key beside it that reads alike, or the same name in another section."""
    last = str(last)
    near = difflib.get_close_matches(last, section.model_fields, n=1)
    names = [name for name, _ in walk(root)]
    itself = _dotted([*above, last])  # known where a section of another kind may have it
    far = [name for name in names if name.endswith("." + last) and name != itself]
    if last in names:
        return f"in YAML every name has a level of its own: {last.replace('.', ': {')}: ...{'}' * last.count('.')}"
    if near:
        return f"did you mean {_dotted([*above, near[0]])}? (allowed are {', '.join(section.model_fields)})"
    if far:
        return f"did you mean {' or '.join(far)}?"
    return f"allowed are {', '.join(section.model_fields)}"


def _dotted(path: Sequence[int | str]) -> str:
    """The path as the user wrote it, fit for one line."""
    text = ".".join(map(str, path))
    return text if text.isprintable() else repr(text)


def shown(value: Any) -> str:
    """The value as YAML spells it, on one line and not too long."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return _SHORT.repr(value)
