"""Density against rank: the heat map of a sweep over both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayfed.reports.compare import Comparison, RunGroup
from rayfed.reports.drawing import blank
from rayfed.reports.labels import in_order, spelled
from rayfed.reports.table import as_percent
from rayfed.tracking.format import megabytes

RANK, DOWN, UP, METHOD = "lora.rank", "wire.down.density", "wire.up.density", "method.name"


@dataclass(frozen=True, eq=False)
class HeatMap:
    """The map of one method. ``cells``: (index in ``densities``, index in ``ranks``) -> the group in that cell.

    ``method`` is None if all groups have the same one. ``chosen_among`` names the settings that vary within a cell;
    the cell shows the best group on validation.
    """

    method: str | None
    axis: str
    densities: Sequence[str]
    ranks: Sequence[str]
    cells: Mapping[tuple[int, int], RunGroup]
    chosen_among: Sequence[str]


def heat_maps(comparison: Comparison) -> list[HeatMap]:
    """A map for each method whose groups have several ranks and several densities."""
    differing, groups = comparison.differing, comparison.groups
    ways = [key for key in (DOWN, UP) if key in differing]
    axis = " / ".join(f"density {key.split('.')[1]}" for key in ways)
    if all(group.settings[DOWN] == group.settings[UP] for group in groups):
        ways, axis = ways[:1], "density, both ways"
    methods = in_order([group.settings[METHOD] for group in groups])
    maps = []
    for method in methods:
        own = [group for group in comparison.ranked if group.settings[METHOD] == method]
        places = {group: ([group.settings[key] for key in ways], group.settings[RANK]) for group in own}
        # Ordered by the density of the first direction, then of the second.
        densities = in_order([density for density, _ in places.values()])
        ranks = in_order([rank for _, rank in places.values()])
        if len(densities) < 2 or len(ranks) < 2:
            continue
        # From the worst group to the best, which stays.
        cells = {(densities.index(places[g][0]), ranks.index(places[g][1])): g for g in reversed(own)}
        others = [key for key in differing if key not in (RANK, DOWN, UP, METHOD)]
        chosen = [key for key in others if len({repr(group.settings.get(key)) for group in own}) > 1]
        labels = [" / ".join(map(spelled, density)) for density in densities]
        name = method if len(methods) > 1 else None
        maps.append(HeatMap(name, axis, labels, list(map(str, ranks)), cells, chosen))
    return maps


def draw(comparison: Comparison, grid: HeatMap) -> Any:
    """The figure: the reported value and the bytes of every cell. Lighter cells are better."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Rectangle

    measure = comparison.measure
    values = {
        place: value
        for place, group in grid.cells.items()
        if (value := group.mean(lambda r: r.report) if measure.report else group.score) is not None
    }
    figure, axes = blank(1.0 + 0.55 * len(grid.densities))
    low, high = (min(values.values()), max(values.values())) if values else (0.0, 1.0)
    norm = LogNorm(low, high) if measure.lower_is_better and 0 < low < high else Normalize(low, high)
    colors = colormaps["viridis_r" if measure.lower_is_better else "viridis"]
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for (i, j), value in values.items():
        color = colors(norm(value))
        axes.add_patch(Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, facecolor=color, edgecolor="none"))
        luminance = np.dot((0.2126, 0.7152, 0.0722), color[:3])
        text: Any = {"ha": "center", "va": "center", "color": "#ffffff" if luminance < 0.5 else "#000000"}
        axes.text(j, i + 0.12, as_percent(value, measure), weight="bold", **text)
        axes.text(j, i - 0.24, f"{megabytes(grid.cells[i, j].mean(lambda r: r.bytes))} MB", size=7, **text)
    axes.set(xlim=(-0.5, len(grid.ranks) - 0.5), ylim=(-0.5, len(grid.densities) - 0.5))
    axes.set(xlabel="rank", ylabel=grid.axis)
    axes.set_xticks(range(len(grid.ranks)), grid.ranks)
    axes.set_yticks(range(len(grid.densities)), grid.densities)
    return figure
