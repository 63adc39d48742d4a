"""The options of a method: what they are, and what they allow."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rayfed.config.describe import in_words
from rayfed.errors import allowed

REQUIRED = inspect.Parameter.empty
STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)  # nothing is converted


def options_of(cls: type) -> dict[str, inspect.Parameter]:
    """The options of a method's class by name: the parameters of its constructor, with their types evaluated."""
    typed: Any = cls if dataclasses.is_dataclass(cls) else cls.__init__  # type: ignore[misc]
    hints, parameters = get_type_hints(typed, include_extras=True), inspect.signature(cls).parameters
    return {name: option.replace(annotation=hints.get(name, Any)) for name, option in parameters.items()}


def check_options(cls: type, values: Mapping[str, Any]) -> None:
    """UserError for the first value that its option does not allow."""
    for name, option in options_of(cls).items():
        if name in values:
            value = values[name]
            try:
                TypeAdapter(option.annotation, config=STRICT).validate_python(value)
            except ValidationError:
                raise allowed(f"method.{name}", value, f"it should be {in_words(option.annotation)}") from None
            if isinstance(value, int | float) and not -1e30 <= value <= 1e30:
                raise allowed(f"method.{name}", value, "methods compute in float32: it should be in [-1e+30, 1e+30]")
