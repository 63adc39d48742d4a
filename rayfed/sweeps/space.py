"""From the section `sweep` to the list of its points: cases, times grids, times draws.

The list is a function of the section and the seed. A draw is keyed by (seed, setting, number of the draw) alone: every
point of the grid gets the same draws, so methods are compared at the same rates, and means over seeds stay whole.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rayfed import seeding
from rayfed.config.sweep import DRAWN, SEED, Sweep, is_space

CASE = "case"  # the column that holds the labels of cases
MOST = 1024  # combinations that are all checked before a search starts
LONGEST = 120  # characters of a trial's name, which is a folder's


@dataclass(frozen=True)
class Point:
    """One trial's settings: what it overrides, and what of it tells trials apart (a case's label stands for it)."""

    overrides: Mapping[str, Any]
    shown: Mapping[str, Any]


def expand(sweep: Sweep, seed: int) -> list[Point]:
    """Every point once, in the order of cases, then parameters as they are written, then draws."""
    points: dict[str, Point] = {}
    labels = isinstance(sweep.cases, dict)
    for label, case in sweep.labelled() or [("", {})]:
        spaces = dict(sweep.parameters) | {key: value for key, value in case.items() if is_space(value)}
        fixed = {key: value for key, value in case.items() if not is_space(value)}
        for chosen in _points_of(spaces, sweep.samples, seed):
            shown = ({CASE: label} if labels else fixed) | chosen
            # Two draws from few choices may coincide: that is one trial.
            points.setdefault(json.dumps([shown, fixed | chosen], default=str), Point(fixed | chosen, shown))
    return list(points.values())


def _points_of(spaces: Mapping[str, Any], samples: int, seed: int) -> Iterator[dict[str, Any]]:
    grids = {key: space["grid"] for key, space in spaces.items() if "grid" in space}
    drawn = {key: space for key, space in spaces.items() if "grid" not in space}
    for values in itertools.product(*grids.values()):
        for i in range(samples if drawn else 1):
            own = dict(zip(grids, values, strict=True)) | {
                key: draw(space, key, seed, i) for key, space in drawn.items()
            }
            yield {key: own[key] for key in spaces}


def corners(sweep: Sweep, case: Mapping[str, Any]) -> Iterator[Point]:
    """The case with every choice and both ends of every range, whatever the seed.

    All combinations, or where they are more than `MOST`, each value once, the first ones of the others beside it.
    """
    spaces = {key: space for key, space in sweep.parameters.items() if key != SEED}
    spaces |= {key: value for key, value in case.items() if is_space(value)}
    fixed = {key: value for key, value in case.items() if not is_space(value)}
    ends = {
        key: space.get("choice") or [number(x) for x in next(iter(space.values()))] for key, space in spaces.items()
    }
    crossed = itertools.islice(itertools.product(*ends.values()), MOST + 1)
    points = [dict(zip(ends, values, strict=True)) for values in crossed]
    if len(points) > MOST:
        points = points[:1] + [points[0] | {key: value} for key, values in ends.items() for value in values[1:]]
    yield from (Point(fixed | chosen, fixed | chosen) for chosen in points)


def draw(space: Mapping[str, Any], key: str, seed: int, i: int) -> Any:
    """Draw ``i`` (from 0) of the setting."""
    return value_at(space, float(seeding.numpy_rng(seed, "sweep", key, i).random()))


def value_at(space: Mapping[str, Any], u: float) -> Any:
    """The value of a choice, uniform or loguniform at the share ``u``, in [0, 1), of its probability."""
    ((kind, values),) = space.items()
    assert kind in DRAWN
    if kind == "choice":
        return values[int(u * len(values))]
    low, high = values
    return number(low * math.exp(u * math.log(high / low)) if kind == "loguniform" else low + u * (high - low))


def number(x: float) -> float:
    """The number to six digits, so that it can be read and typed again."""
    return float(f"{x:.6g}")


def names(points: list[Point]) -> list[str]:
    """A readable name for each point, all different and fit for a folder: `name=fedhl,lr=0.001,seed=0`."""
    columns = list(dict.fromkeys(key for point in points for key in point.shown))
    short = short_names(columns)
    made = [spelled(point, short) for point in points]
    return [
        fitting(name, point) if made.count(name) == 1 else _tagged(name, point)
        for name, point in zip(made, points, strict=True)
    ]


def spelled(point: Point, short: Mapping[str, str]) -> str:
    """What tells the point apart, in letters that a folder's name may have; ``short``: names of its settings."""
    parts = [f"{short[key]}={_word(value)}" for key, value in point.shown.items()]
    return re.sub(r"[^\w.,=+-]+", "-", ",".join(parts)).strip(".-")


def fitting(name: str, point: Point) -> str:
    """The name, cut where it is too long for a folder."""
    return name if len(name) <= LONGEST else _tagged(name, point)


def short_names(columns: list[str]) -> dict[str, str]:
    """Every dotted setting by its last words, as many as make it unlike the others; `method.name` is `method`."""
    bare = {column: column.removesuffix(".name") for column in columns}
    short = {}
    for column, whole in bare.items():
        words = whole.split(".")
        tails = (".".join(words[-n:]) for n in range(1, len(words) + 1))
        alone = (t for t in tails if sum(other == t or other.endswith("." + t) for other in bare.values()) == 1)
        short[column] = next(alone, column)
    return short


def text(value: Any) -> str:
    """A setting's value as YAML spells it."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, default=str)


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(_word, value))
    return hashlib.sha256(text(value).encode()).hexdigest()[:6] if isinstance(value, dict) else text(value)


def _tagged(name: str, point: Point) -> str:
    tag = hashlib.sha256(json.dumps(point.overrides, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{name[: LONGEST - 9]}-{tag}"
