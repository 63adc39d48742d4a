"""Settings from a YAML file and `key=value` overrides; every mistake becomes one line that says what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rayfed.config.schema import Experiment
from rayfed.errors import UserError


class _Loader(yaml.SafeLoader):
    """Safe YAML as people write it: 1e-3 is a number, `off` is a word, and a key given twice is refused.

    (YAML 1.1 wants 1.0e-3 and reads on, off, yes and no as booleans.)
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads ``path`` (YAML), applies ``overrides`` (each `dotted.key=value`, value in YAML) and validates.

    Raises UserError with one line per mistake: unknown key, wrong type, value out of range, impossible combination.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config: got {str(path)!r}, but there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: got {str(path)!r}, but it cannot be read as text ({error})") from None
    settings = _parse(text, str(path))
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: got {type(settings).__name__}, but a config is a mapping of sections")
    for override in overrides:
        _apply(settings, override)
    return validate(settings)


def validate(settings: dict[str, Any]) -> Experiment:
    """The settings as an Experiment; UserError with one line per mistake."""
    try:
        return Experiment.model_validate(settings)
    except ValidationError as error:
        raise UserError("\n".join(_lines(error))) from None


def dump_config(experiment: Experiment) -> str:
    """The resolved settings as YAML that `load_config` reads back to the same Experiment."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _apply(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"override: got {override!r}, but an override is written key=value, such as server.rounds=20")
    *sections, last = key.split(".")
    target = settings
    for section in sections:
        child = target.setdefault(section, {})
        if child is None:  # `client:` with nothing under it
            child = target[section] = {}
        if not isinstance(child, dict):
            raise UserError(f"{key}: got {override!r}, but {section} is a single value")
        target = child
    target[last] = _parse(text, f"override {key}")


def _lines(error: ValidationError) -> Iterable[str]:
    seen = set()
    for mistake in error.errors(include_url=False):
        # Unions put the tried type into the location; a user knows only the field.
        location = ".".join(str(p) for p in mistake["loc"] if not _is_type_tag(p))
        line = _line(location, mistake)
        if (location, mistake["type"]) not in seen and line not in seen:
            seen |= {(location, mistake["type"]), line}
            yield line


def _is_type_tag(part: int | str) -> bool:
    return isinstance(part, str) and (part in {"str", "int", "float", "bool"} or "[" in part)


def _line(location: str, mistake: Any) -> str:
    kind, value, message = mistake["type"], mistake["input"], mistake["msg"]
    if kind == "value_error":  # written by the schema itself, already whole
        return message.removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"{location}: unknown key{_suggest(location)}"
    if kind == "missing":
        return f"{location}: missing, but this setting has no default"
    message = message[0].lower() + message[1:]
    return f"{location or 'config'}: got {value!r}, but {message.replace('input should', 'it should')}"


def _suggest(location: str) -> str:
    *sections, last = location.split(".")
    model: type[BaseModel] = Experiment
    for section in sections:
        annotation = model.model_fields[section].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    near = difflib.get_close_matches(last, model.model_fields, n=1)
    known = ", ".join(model.model_fields)
    return f"; did you mean {near[0]}? ({known})" if near else f"; allowed are {known}"
