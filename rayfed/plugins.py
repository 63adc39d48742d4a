"""Finds the members of an axis (methods, objectives, weightings, channels, tasks) by name.

A member is one class in one file of the axis's package, and the name of the file is the name of the member. `base` and
files whose names start with an underscore are not members. A user's own member is named by its import path,
`package.module:Class`.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

from rayfed.errors import UserError, allowed, class_and_line
from rayfed.suggestions import did_you_mean

T = TypeVar("T")


@cache
def member_names(package: str) -> tuple[str, ...]:
    """The names of the members of an axis's package, sorted. Imports neither the package nor its members."""
    spec = find_spec(package)
    assert spec is not None, package
    names = (module.name for module in pkgutil.iter_modules(spec.submodule_search_locations) if not module.ispkg)
    return tuple(sorted(name for name in names if name != "base" and not name.startswith("_")))


def member_class(package: str, name: str, base: type[T], field: str) -> type[T]:
    """The class of the member ``name``: the name of its file, or the import path of a class outside the package.

    Raises UserError for the setting ``field`` if there is no such member or if it is not a subclass of ``base``.
    """
    if ":" in name:
        found = load_object(name, field)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise allowed(field, name, f"that is no subclass of {base.__module__}.{base.__name__}")
        return found
    names = member_names(package)
    if name not in names:
        raise UserError(f"{field}: got {name!r}, but {did_you_mean(name, names)}allowed are {', '.join(names)}")
    module = import_module(f"{package}.{name}")
    (member,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    )
    return member


def load_object(path: str, field: str) -> Any:
    """The object at the import path `package.module:name`. UserError for the setting ``field`` if there is none."""
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name, None)
    except Exception as error:
        reason = f"cannot be imported ({class_and_line(error)}); is its folder on PYTHONPATH?"
        raise allowed(field, path, f"{module} {reason}") from error
    if found is None:
        raise allowed(field, path, f"{module} has no function or class {name}")
    return found
