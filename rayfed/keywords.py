"""Wrong keyword arguments of public functions and classes: one line that says what may have been meant."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def suggest_keywords(target: F) -> F:
    """The function or class; a keyword argument that it does not have is a TypeError that suggests the nearest one."""
    function: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    names = [name for name in inspect.signature(function).parameters if name != "self"]

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in names:  # a looser match than in `rayfed.suggestions`: there are few names to mistake
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(names)}"
                raise TypeError(f"{target.__name__}() got an unexpected keyword argument {name!r}; {hint}")
        return function(*args, **kwargs)

    if not isinstance(target, type):
        return checked  # type: ignore[return-value]
    target.__init__ = checked  # type: ignore[misc]
    return target
