"""Heat maps: the results over two numeric settings. A cell for each pair of values; points where values were drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rayfed.reports import drawing
from rayfed.reports.compare import Comparison, RunGroup
from rayfed.reports.labels import in_order, spelled
from rayfed.reports.table import as_text
from rayfed.tracking.format import megabytes

RANK, DOWN, UP, METHOD = "lora.rank", "wire.down.density", "wire.up.density", "method.name"
ROUNDS = "server.rounds"  # no axis: the curves against rounds say more
MOST_CELLS = 8  # largest number of values on an axis of cells
FILLED = 0.5  # least share of the cells that have a result; with fewer, the map has points
MOST_MAPS = 6  # of one method
WIDE = 6.0  # ratio of largest to smallest value above which the axis of points is a log axis


@dataclass(frozen=True, eq=False)
class Axis:
    """A numeric setting. ``values`` has its value in each group, or two: the densities down and up, if they differ."""

    name: str
    label: str
    keys: tuple[str, ...]
    values: Mapping[RunGroup, tuple[float, ...]]

    @property
    def ticks(self) -> list[tuple[float, ...]]:
        """The distinct values, ascending; of two densities, the first one decides."""
        return sorted(set(self.values.values()))

    @property
    def texts(self) -> list[str]:
        """The ticks as text."""
        return [" / ".join(map(spelled, tick)) for tick in self.ticks]


@dataclass(frozen=True, eq=False)
class HeatMap:
    """The map of one method. ``cells``: (index in ``y.ticks``, index in ``x.ticks``) -> the group in that cell.

    ``method`` is None if all groups have the same one. ``chosen_among`` names the settings that vary within a cell;
    the cell shows the best group on validation.
    """

    method: str | None
    x: Axis
    y: Axis
    cells: Mapping[tuple[int, int], RunGroup]
    chosen_among: Sequence[str]

    @property
    def name(self) -> str:
        """For the name of a file: `density-rank`."""
        parts = (self.y.name, self.x.name, *([self.method] if self.method else []))
        return "-".join(part.replace(".", "-") for part in parts)

    @property
    def title(self) -> str:
        title = f"{self.y.name} and {self.x.name}" + (f", {self.method}" if self.method else "")
        return title if "." in self.y.name else title[0].upper() + title[1:]

    @property
    def has_points(self) -> bool:
        """Whether the map has points in place of cells: many values, or most pairs of values without a result."""
        rows, columns = len(self.y.ticks), len(self.x.ticks)
        return max(rows, columns) > MOST_CELLS or len(self.cells) < FILLED * rows * columns


def heat_maps(comparison: Comparison) -> list[HeatMap]:
    """The maps of each method: one for each pair of numeric settings with several values, at most MOST_MAPS."""
    methods = in_order([group.settings[METHOD] for group in comparison.groups])
    maps = []
    for method in methods:
        own = [group for group in comparison.ranked if group.settings[METHOD] == method]
        pairs = combinations(_axes(own, list(comparison.differing)), 2)
        # The map of density and rank is the first one.
        for x, y in sorted(pairs, key=lambda pair: sum("." in axis.name for axis in pair))[:MOST_MAPS]:
            # From the worst group to the best, which stays.
            cells = {(y.ticks.index(y.values[g]), x.ticks.index(x.values[g])): g for g in reversed(own)}
            others = [key for key in comparison.differing if key not in (*x.keys, *y.keys, METHOD)]
            chosen = [key for key in others if len(cells) < len(own) and _varies(key, own)]
            grid = HeatMap(method if len(methods) > 1 else None, x, y, cells, chosen)
            if not grid.has_points or all(len(tick) == 1 for axis in (x, y) for tick in axis.ticks):
                maps.append(grid)
    return maps


def _axes(groups: Sequence[RunGroup], differing: Sequence[str]) -> list[Axis]:
    """The axes of the groups, without those that only repeat an earlier one."""
    found: list[Axis] = []
    for axis in _all_axes(groups, differing):
        if len(axis.ticks) > 1 and not any(_repeats(axis, other) for other in found):
            found.append(axis)
    return found


def _repeats(axis: Axis, other: Axis) -> bool:
    """Whether the two settings rise and fall together, as the scale of an adapter does with its rank."""
    pairs = sorted({(other.values[group], axis.values[group]) for group in axis.values})
    values = [value for _, value in pairs]
    return len(pairs) == len(other.ticks) == len(axis.ticks) and values in (axis.ticks, axis.ticks[::-1])


def _all_axes(groups: Sequence[RunGroup], differing: Sequence[str]) -> Iterator[Axis]:
    for key in differing:
        values: dict[RunGroup, Any] = {group: group.settings.get(key) for group in groups}
        if key not in (DOWN, UP, ROUNDS) and all(type(value) in (int, float) for value in values.values()):
            name = "rank" if key == RANK else key
            yield Axis(name, name, (key,), {group: (value,) for group, value in values.items()})
    ways = [key for key in (DOWN, UP) if _varies(key, groups)]
    label = " / ".join(f"density {key.split('.')[1]}" for key in ways)
    if all(group.settings[DOWN] == group.settings[UP] for group in groups):
        ways, label = ways[:1], "density, both ways"
    yield Axis("density", label, (DOWN, UP), {group: tuple(group.settings[key] for key in ways) for group in groups})


def _varies(key: str, groups: Sequence[RunGroup]) -> bool:
    return len({repr(group.settings.get(key)) for group in groups}) > 1


def draw(comparison: Comparison, grid: HeatMap) -> Any:
    """The figure: the reported value and the bytes of every cell, or a point for every group. Axes ascend."""
    _, number = comparison.shown
    values = {place: value for place, group in grid.cells.items() if (value := group.mean(number)) is not None}
    return _points(comparison, grid, values) if grid.has_points else _cells(comparison, grid, values)


def _cells(comparison: Comparison, grid: HeatMap, values: Mapping[tuple[int, int], float]) -> Any:
    """Lighter cells are better."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Rectangle

    measure, rows, columns = comparison.measure, grid.y.texts, grid.x.texts
    figure, axes = drawing.blank(1.0 + 0.55 * len(rows))
    low, high = (min(values.values()), max(values.values())) if values else (0.0, 1.0)
    norm = LogNorm(low, high) if measure.lower_is_better and 0 < low < high else Normalize(low, high)
    colors = colormaps["viridis_r" if measure.lower_is_better else "viridis"]
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    several = any(len(group.summaries) > 1 for group in grid.cells.values())
    few = len(columns) <= 5
    size = 9 if len(columns) <= 3 or (few and not several) else 6.5
    for (i, j), value in values.items():
        color = colors(norm(value))
        axes.add_patch(Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, facecolor=color, edgecolor="none"))
        luminance = np.dot((0.2126, 0.7152, 0.0722), color[:3])
        text: Any = {"ha": "center", "va": "center", "color": "#ffffff" if luminance < 0.5 else "#000000"}
        group = grid.cells[i, j]
        deviation = group.deviation(comparison.shown[1]) if few else None
        axes.text(j, i + 0.12, as_text(value, measure, deviation), weight="bold", size=size, **text)
        axes.text(j, i - 0.24, f"{megabytes(group.mean(lambda r: r.bytes))} MB", size=size - 2, **text)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.5, len(rows) - 0.5), xlabel=grid.x.label, ylabel=grid.y.label)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    return figure


def _points(comparison: Comparison, grid: HeatMap, values: Mapping[tuple[int, int], float]) -> Any:
    """Darker points are better; better points lie above worse ones, and the best is larger."""
    measure = comparison.measure
    figure, axes = drawing.blank()
    ranked = sorted(values, key=lambda place: values[place], reverse=measure.lower_is_better)  # the best is last
    handles = []
    for place, color in zip(ranked, drawing.ramp(len(ranked))):
        (y,), (x,) = grid.y.ticks[place[0]], grid.x.ticks[place[1]]
        size = 9 if place == ranked[-1] else 6
        handles += axes.plot([x], [y], "o", color=color, markersize=size, markeredgewidth=0)
    for axis, own in ((axes.xaxis, grid.x), (axes.yaxis, grid.y)):
        numbers = [tick[0] for tick in own.ticks]
        drawing.number_axis(axis, log=min(numbers) > 0 and max(numbers) > WIDE * min(numbers))
    axes.set(xlabel=grid.x.label, ylabel=grid.y.label)
    ends = [(handles[i], f"{name}: {as_text(values[ranked[i]], measure)}") for name, i in (("worst", 0), ("best", -1))]
    drawing.legend(axes, *zip(*ends)) if values else None
    return figure
