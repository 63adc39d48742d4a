"""From the section `sweep` to the list of its points: cases, times grids, times random draws.

The list depends on the section and the seed only. A draw is keyed by (seed, setting, number of the draw). So every
point of the grid gets the same draws, methods are compared at the same rates, every mean covers all seeds, and a sweep
may grow without new draws for the trials that it has. (Tune's `BasicVariantGenerator` draws one sequence of numbers for
all settings.)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayfed import seeding
from rayfed.config.describe import format_value, short_names
from rayfed.config.sweep import SEED, Sweep, is_space
from rayfed.config.types import MOST_NAME

CASE = "case"  # the column that holds the labels of cases
MAX_CORNERS = 1024  # combinations that are all checked before a search starts
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """The settings of one trial. ``labels`` are the settings that tell trials apart, or the label of their case."""

    overrides: Settings
    labels: Settings
    name: str = "check"  # of a point that is checked and does not run


def expand(sweep: Sweep, seed: int) -> list[Point]:
    """Every point once: in the order of the cases, then of the parameters as they are written, then of the draws.

    Each has a readable name, such as `name=fedhl,lr=0.001,seed=0`. All differ and are valid folder names.
    """
    points: dict[str, Point] = {}
    for label, case in sweep.labelled():
        spaces = {**sweep.parameters, **case}
        grids = {key: space["grid"] for key, space in spaces.items() if is_space(space) and "grid" in space}
        drawn = {key: space for key, space in spaces.items() if is_space(space) and key not in grids}
        for chosen in itertools.product(*grids.values()):
            for i in range(sweep.samples if drawn else 1):
                values = dict(zip(grids, chosen, strict=True))
                values |= {key: draw(space, key, seed, i) for key, space in drawn.items()}
                point = make_point(sweep, label, case, {key: values[key] for key in spaces if key in values})
                # Two draws from few choices may be equal. Then they are one trial.
                points.setdefault(json.dumps([point.labels, point.overrides], default=str), point)
    short = short_names(key for point in points.values() for key in point.labels)
    names = [point_name(point, short) for point in points.values()]
    times = Counter(names)
    named = zip(points.values(), names, strict=True)
    return [replace(own, name=point_name(own, short, times[name] > 1)) for own, name in named]


def make_point(sweep: Sweep, label: str, case: Settings, values: Settings) -> Point:
    """The point with a case's fixed settings and chosen ``values`` of spaces. ``label`` is that of the case."""
    fixed = {key: value for key, value in case.items() if not is_space(value)}
    return Point({**fixed, **values}, {**({CASE: label} if isinstance(sweep.cases, dict) else fixed), **values})


def corners(sweep: Sweep, case: Settings) -> Iterator[Point]:
    """The case with every choice and both ends of every range, at no particular seed."""
    spaces = {key: space for key, space in {**sweep.parameters, **case}.items() if is_space(space) and key != SEED}
    ends = {key: space.get("choice") or [*map(rounded, *space.values())] for key, space in spaces.items()}
    yield from (make_point(sweep, "", case, chosen) for chosen in combinations(ends, MAX_CORNERS))


def combinations(values: Mapping[str, Sequence[Any]], most: int) -> Iterator[dict[str, Any]]:
    """All combinations of the values of settings.

    If there are more than ``most``, each value once, with the first values of the other settings.
    """
    if math.prod(map(len, values.values())) <= most:
        yield from (dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values()))
        return
    first = {key: own[0] for key, own in values.items()}
    yield first
    yield from (first | {key: value} for key, own in values.items() for value in own[1:])


def draw(space: Settings, key: str, seed: int, i: int) -> Any:
    """Draw ``i`` (from 0) of the setting, from a choice, uniform or loguniform."""
    u = float(seeding.numpy_rng(seed, "sweep", key, i).random())
    ((kind, values),) = space.items()
    if kind == "choice":
        return values[int(u * len(values))]
    low, high = values
    return rounded(low * math.exp(u * math.log(high / low)) if kind == "loguniform" else low + u * (high - low))


def rounded(x: float) -> float:
    """The number to six significant digits, so that people can read it and type it again."""
    return float(f"{x:.6g}")


def point_name(point: Point, short: Mapping[str, str], with_digest: bool = False) -> str:
    """The point's labels in characters that a folder's name may have. ``short`` maps settings to their short names.

    A name that is too long for a folder is cut, and ends with a digest of the point, as any name ``with_digest``.
    """
    parts = (f"{short[key]}={_word(value)}" for key, value in point.labels.items())
    name = re.sub(r"[^\w.,=+-]+", "-", ",".join(parts)).strip(".-")
    if len(name.encode()) > MOST_NAME or with_digest:
        name = f"{name.encode()[: MOST_NAME - 9].decode(errors='ignore')}-{_digest(point.overrides)[:8]}"
    return name


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(_word, value))
    return _digest(value)[:6] if isinstance(value, dict) else format_value(value, quotes=False)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
