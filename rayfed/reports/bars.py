"""Bars and squares: bytes to the target, traffic by part, ranks, and the heat map of density and rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayfed.reports.compare import Comparison
from rayfed.reports.curves import Looks
from rayfed.reports.heat_map import HeatMap
from rayfed.reports.plots import blank, legend, luminance, percent_axis, plain_axis
from rayfed.reports.style import PAPER, SERIES
from rayfed.reports.table import Ledgers, rank_shares, share
from rayfed.reports.traffic import DIRECTIONS, PARTS
from rayfed.tracking.format import megabytes

LONG = 28  # letters of a name beside a bar


def target(looks: Looks) -> Any:
    """Bytes to the target, of the groups that reached it, the fewest at the top."""
    known = [(group, group.target_bytes) for group in looks if group.target_bytes is not None]
    known.sort(key=lambda pair: -(pair[1] or 0))
    figure, axes = blank(0.9 + 0.3 * len(known))
    for i, (group, size) in enumerate(known):
        axes.barh(i, (size or 0) / 1e6, color=looks[group].color, height=0.6)
        axes.annotate(f" {megabytes(size)}", ((size or 0) / 1e6, i), va="center")
    _names(axes, [short(group.label) for group, _ in known])
    axes.margins(x=0.15)
    plain_axis(axes.xaxis)
    axes.set_xlabel("MB both ways")
    return figure


def traffic(looks: Looks, ledgers: Ledgers) -> Any:
    """A bar a group and direction, of its parts; means over the seeds."""
    rows = []
    for group in looks:
        known = [ledgers[run] for run in group.counted if run in ledgers]
        rows += [(f"{short(group.label)}, down" if way == "down" else "up", way, known) for way in DIRECTIONS if known]
    figure, axes = blank(1.2 + 0.26 * len(rows))
    handles = []
    for part, (_, color, _) in zip(PARTS, SERIES):
        starts = [_mean([sum(t.bytes(way, p) for p in PARTS[: PARTS.index(part)]) for t in ts]) for _, way, ts in rows]
        widths = [_mean([t.bytes(way, part) for t in ts]) for _, way, ts in rows]
        handles.append(
            axes.barh(
                range(len(rows)), [w / 1e6 for w in widths], left=[s / 1e6 for s in starts], color=color, height=0.7
            )
        )
    _names(axes, [name for name, _, _ in rows])
    axes.invert_yaxis()
    plain_axis(axes.xaxis)
    axes.set_xlabel("MB")
    legend(axes, handles, PARTS)
    return figure


def ranks(looks: Looks) -> Any:
    """A bar a group, of the ranks that took part."""
    shares = {group: rank_shares(group) for group in looks}
    ranks = sorted({rank for own in shares.values() for rank in own})
    figure, axes = blank(1.2 + 0.3 * len(shares) + 0.17 * len(ranks))
    handles = []
    left = [0.0] * len(shares)
    for i, rank in enumerate(ranks):
        widths = [own.get(rank, 0.0) for own in shares.values()]
        color = SERIES[i % len(SERIES)][1]
        handles.append(
            axes.barh(range(len(shares)), widths, left=left, color=color, height=0.7, edgecolor=PAPER[1], linewidth=0.5)
        )
        left = [a + b for a, b in zip(left, widths)]
    _names(axes, [short(group.label) for group in shares])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    percent_axis(axes.xaxis)
    legend(axes, handles, [f"rank {rank}" for rank in ranks])
    return figure


def heat_map(comparison: Comparison, grid: HeatMap) -> Any:
    """The figure and the bytes of every cell; the lighter, the better."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    measure = comparison.measure
    values = np.full((len(grid.densities), len(grid.ranks)), np.nan)
    for place, group in grid.cells.items():
        shown = group.mean(lambda r: r.report) if measure.report else group.score
        values[place] = np.nan if shown is None else shown
    figure, axes = blank(1.0 + 0.55 * len(grid.densities))
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    norm = LogNorm(low, high) if measure.falls and 0 < low < high else Normalize(low, high)
    colors = colormaps["viridis_r" if measure.falls else "viridis"]
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for (i, j), group in grid.cells.items():
        if np.isnan(values[i, j]):
            continue
        color = colors(norm(values[i, j]))
        axes.add_patch(_square(j, i, color))
        ink = "#ffffff" if luminance(color) < 0.5 else "#000000"
        axes.text(j, i - 0.12, share(values[i, j], measure), ha="center", va="center", color=ink, weight="bold")
        size = megabytes(group.mean(lambda r: r.bytes))
        axes.text(j, i + 0.24, f"{size} MB", ha="center", va="center", color=ink, size=7)
    axes.set_xlim(-0.5, len(grid.ranks) - 0.5)
    axes.set_ylim(-0.5, len(grid.densities) - 0.5)
    axes.set_xticks(range(len(grid.ranks)), grid.ranks)
    axes.set_yticks(range(len(grid.densities)), grid.densities)
    axes.set_xlabel("rank")
    axes.set_ylabel(grid.axis)
    axes.invert_yaxis()
    return figure


def _square(x: float, y: float, color: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=color, edgecolor="none")


def _names(axes: Any, names: Sequence[str]) -> None:
    """Names of bars on the y axis."""
    axes.set_yticks(range(len(names)), names)
    axes.grid(False, axis="y")


def short(name: str) -> str:
    """The name, cut in its middle where it would leave the bars no room."""
    return name if len(name) <= LONG else f"{name[: LONG - 11]}...{name[-8:]}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
