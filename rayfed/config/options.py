"""The options of a member of an axis, such as a method: what they are, what they allow, and a member made with them.

Options stand in the section of the axis, next to `name`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rayfed.config.describe import in_words
from rayfed.errors import UserError, allowed
from rayfed.suggestions import did_you_mean

T = TypeVar("T")

REQUIRED = inspect.Parameter.empty
STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)  # nothing is converted


def options_of(cls: type) -> dict[str, inspect.Parameter]:
    """The options of a member's class by name: the parameters of its constructor, with their types evaluated."""
    typed: Any = cls if dataclasses.is_dataclass(cls) else cls.__init__  # type: ignore[misc]
    hints, parameters = get_type_hints(typed, include_extras=True), inspect.signature(cls).parameters
    return {name: option.replace(annotation=hints.get(name, Any)) for name, option in parameters.items()}


def check_options(cls: type, values: Mapping[str, Any], section: str) -> None:
    """UserError for the first value that its option does not allow."""
    for name, option in options_of(cls).items():
        if name in values:
            value = values[name]
            try:
                TypeAdapter(option.annotation, config=STRICT).validate_python(value)
            except ValidationError:
                raise allowed(f"{section}.{name}", value, f"it should be {in_words(option.annotation)}") from None
            if isinstance(value, int | float) and not -1e30 <= value <= 1e30:
                what = f"{section}s compute in float32: it should be in [-1e+30, 1e+30]"
                raise allowed(f"{section}.{name}", value, what)


def make_member(cls: type[T], section: str, name: str, options: Mapping[str, Any]) -> T:
    """The member ``name`` of the axis with this section: an object of ``cls`` with these options.

    UserError for an unknown option, for a value that the option does not allow, and for an option that is missing.
    """
    known = options_of(cls)
    for option in (option for option in options if option not in known):
        hint = did_you_mean(option, known)
        raise UserError(
            f"{section}.{option}: {name} has no such option; {hint}allowed are {', '.join(known) or 'none'}"
        )
    for option, found in known.items():
        if found.default is REQUIRED and option not in options:
            raise UserError(f"{section}.{option}: {name} needs this option: {in_words(found.annotation)}")
    check_options(cls, options, section)
    return cls(**options)
