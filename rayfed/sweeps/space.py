"""From the section `sweep` to the list of its points: cases, times grids, times random draws.

The list depends on the section and the seed only. A draw is keyed by (seed, setting, number of the draw). So every
point of the grid gets the same draws, methods are compared at the same rates, and every mean covers all seeds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayfed import seeding
from rayfed.config.describe import format_value
from rayfed.config.sweep import SEED, Sweep, is_space
from rayfed.config.types import MOST_NAME, MOST_TRIALS
from rayfed.errors import UserError

CASE = "case"  # the column that holds the labels of cases
MAX_CORNERS = 1024  # combinations that are all checked before a search starts


@dataclass(frozen=True)
class Point:
    """The settings of one trial. ``labels`` are the settings that tell trials apart, or the label of their case."""

    overrides: Mapping[str, Any]
    labels: Mapping[str, Any]


def expand(sweep: Sweep, seed: int) -> list[Point]:
    """Every point once: in the order of the cases, then of the parameters as they are written, then of the draws."""
    points: dict[str, Point] = {}
    for label, case in sweep.labelled() or [("", {})]:
        fixed, spaces = split_case(case)
        for values in _combinations(dict(sweep.parameters) | spaces, sweep.samples, seed):
            point = make_point(sweep, label, fixed, values)
            # Two draws from few choices may be equal. Then they are one trial.
            points.setdefault(json.dumps([point.labels, point.overrides], default=str), point)
    return list(points.values())


def split_case(case: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the case's fixed settings, its spaces)."""
    spaces = {key: value for key, value in case.items() if is_space(value)}
    return {key: value for key, value in case.items() if key not in spaces}, spaces


def make_point(sweep: Sweep, label: str, fixed: Mapping[str, Any], values: Mapping[str, Any]) -> Point:
    """The point with a case's ``fixed`` settings and chosen ``values``. ``label`` is the label of the case."""
    shared = {CASE: label} if isinstance(sweep.cases, dict) else fixed
    return Point({**fixed, **values}, {**shared, **values})


def _combinations(spaces: Mapping[str, Any], samples: int, seed: int) -> Iterator[dict[str, Any]]:
    grids = {key: space["grid"] for key, space in spaces.items() if "grid" in space}
    drawn = {key: space for key, space in spaces.items() if "grid" not in space}
    for values in itertools.product(*grids.values()):
        for i in range(samples if drawn else 1):
            chosen = dict(zip(grids, values, strict=True))
            chosen |= {key: draw(space, key, seed, i) for key, space in drawn.items()}
            yield {key: chosen[key] for key in spaces}


def corners(sweep: Sweep, case: Mapping[str, Any]) -> Iterator[Point]:
    """The case with every choice and both ends of every range, at no particular seed.

    Yields all combinations. If there are more than `MAX_CORNERS`, yields each value once, with the first values of the
    other settings.
    """
    fixed, spaces = split_case(case)
    spaces = {key: space for key, space in sweep.parameters.items() if key != SEED} | spaces
    ends = {
        key: space.get("choice") or [rounded(x) for x in next(iter(space.values()))] for key, space in spaces.items()
    }
    if (values := sum(map(len, ends.values()))) > MOST_TRIALS:
        raise UserError(f"sweep.parameters: got {values} choices and limits, but at most {MOST_TRIALS} are allowed")
    crossed = itertools.islice(itertools.product(*ends.values()), MAX_CORNERS + 1)
    points = [dict(zip(ends, values, strict=True)) for values in crossed]
    if len(points) > MAX_CORNERS:
        points = points[:1] + [points[0] | {key: value} for key, values in ends.items() for value in values[1:]]
    yield from (Point(fixed | chosen, fixed | chosen) for chosen in points)


def draw(space: Mapping[str, Any], key: str, seed: int, i: int) -> Any:
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


def trial_names(points: Sequence[Point]) -> list[str]:
    """A readable name for each point, such as `name=fedhl,lr=0.001,seed=0`. All differ and are valid folder names."""
    short = short_names(list(dict.fromkeys(key for point in points for key in point.labels)))
    names = [point_name(point, short) for point in points]
    times = Counter(names)
    return [
        fit_name(name, point) if times[name] == 1 else _with_digest(name, point)
        for name, point in zip(names, points, strict=True)
    ]


def point_name(point: Point, short: Mapping[str, str]) -> str:
    """The point's labels in characters that a folder's name may have. ``short`` maps settings to their short names."""
    parts = [f"{short[key]}={_word(value)}" for key, value in point.labels.items()]
    return re.sub(r"[^\w.,=+-]+", "-", ",".join(parts)).strip(".-")


def fit_name(name: str, point: Point) -> str:
    """The name, cut if it is too long for a folder."""
    return name if len(name.encode()) <= MOST_NAME else _with_digest(name, point)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted setting by its last words: as many as distinguish it. `method.name` is `method`."""
    full = {key: key.removesuffix(".name") for key in keys}
    short = {}
    for key, name in full.items():
        words = name.split(".")
        tails = (".".join(words[-n:]) for n in range(1, len(words) + 1))
        unique = (t for t in tails if sum(other == t or other.endswith("." + t) for other in full.values()) == 1)
        short[key] = next(unique, key)
    return short


def format_settings(settings: Mapping[str, Any]) -> str:
    """`client.lr=0.1, seed=0`."""
    return ", ".join(f"{key}={format_value(value, quotes=False)}" for key, value in settings.items())


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(_word, value))
    return _digest(value)[:6] if isinstance(value, dict) else format_value(value, quotes=False)


def _with_digest(name: str, point: Point) -> str:
    return f"{name.encode()[: MOST_NAME - 9].decode(errors='ignore')}-{_digest(point.overrides)[:8]}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
