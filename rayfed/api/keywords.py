"""Wrong keyword arguments of public functions: one line that says what may have been meant."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def suggest_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """The function; a keyword argument that it does not have is a TypeError that suggests the nearest one."""
    names = list(inspect.signature(function).parameters)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(names)}"
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}; {hint}")
        return function(*args, **kwargs)

    return checked
