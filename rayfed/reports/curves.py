"""Lines and points: a figure against rounds, bytes or time, and the Pareto front.

Each function draws one figure. ``keyed`` ones take, as their last argument, whether to name the groups below the axes:
on a page one legend serves several figures, a file stands alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import mean
from typing import Any

from rayfed.reports.compare import GAP, Comparison, Curve, RunGroup, curve
from rayfed.reports.plots import blank, legend, percent_axis, plain_axis
from rayfed.reports.runs import Run
from rayfed.reports.style import DASHES, INK, MARKERS, MUTED, PAPER, SERIES, Look

FEW = 12  # points that get markers
WIDE = 6.0  # largest over smallest traffic above which bytes are on a log axis
Looks = Mapping[RunGroup, Look]
X = Callable[[Run], Mapping[int, float]]


def curves(comparison: Comparison, looks: Looks, x: X | None, label: str, keyed: bool) -> Any:
    """The figure that chooses against rounds, or what ``x`` gives for them; a band over seeds, the target dotted."""
    figure, axes = blank(_height(looks, keyed))
    key = comparison.measure.key
    each = {group: curve(group.counted, key, x) for group in comparison.groups}
    ends = [own.x[-1] for own in each.values() if own.x]
    wide = x is not None and len(ends) > 1 and min(ends) > 0 and max(ends) / min(ends) > WIDE
    handles = []
    for group in sorted(each, key=lambda g: g in looks):  # the grey ones lie below
        handles.append(_line(axes, each[group], looks.get(group), len(group.counted) > 1))
    if comparison.target is not None:
        axes.axhline(comparison.target, color=INK[1], linewidth=0.8, linestyle=(0, (1, 2)))
    log = comparison.measure is GAP
    if log:
        axes.set_yscale("log")
    percent_axis(axes.yaxis, log)
    if wide:
        axes.set_xscale("log")
    plain_axis(axes.xaxis, log=wide, whole=x is None)
    axes.set_xlabel(label + (" (log scale)" if wide else ""))
    axes.set_ylabel(comparison.measure.label)
    if keyed:
        named = [(h, g) for h, g in zip(handles, sorted(each, key=lambda g: g in looks)) if g in looks]
        legend(axes, [h for h, _ in named], [g.label for _, g in named])
    return figure


def _line(axes: Any, own: Curve, look: Look | None, band: bool) -> Any:
    if look is None:
        return axes.plot(own.x, own.mean, color=MUTED[1], linewidth=0.8)[0]
    marker = look.marker if len(own.x) <= FEW else None
    if band:
        axes.fill_between(own.x, own.low, own.high, color=look.color, alpha=0.18, linewidth=0)
    return axes.plot(own.x, own.mean, color=look.color, linestyle=look.dash, marker=marker)[0]


def lines(series: Mapping[str, Mapping[int, float]], percent: bool = True, log: bool = False) -> Any:
    """Named series against rounds, always with their names."""
    figure, axes = blank(2.6 + 0.17 * len(series))
    handles = []
    for i, points in enumerate(series.values()):
        color, dash = SERIES[i % len(SERIES)][1], DASHES[i % len(DASHES)]
        marker = MARKERS[i % len(MARKERS)] if len(points) <= FEW else None
        handles += axes.plot(list(points), list(points.values()), color=color, linestyle=dash, marker=marker)
    if log:
        axes.set_yscale("log")
    if percent:
        percent_axis(axes.yaxis, log)
    plain_axis(axes.xaxis, whole=True)
    axes.set_xlabel("round")
    legend(axes, handles, list(series))
    return figure


def pareto(comparison: Comparison, looks: Looks, keyed: bool) -> Any:
    """A point a group, bytes against the figure that chooses; the front filled and joined."""
    figure, axes = blank(_height(looks, keyed))
    front = comparison.front
    points = {}
    for group in comparison.groups:
        size, score = group.mean(lambda r: r.bytes_then), group.score
        if size is not None and score is not None:
            points[group] = (size / 1e6, score)
    line = [points[group] for group in front]
    axes.plot([x for x, _ in line], [y for _, y in line], color=INK[1], linewidth=0.8, drawstyle="steps-post")
    handles, names = [], []
    for group, (x, y) in points.items():
        look = looks.get(group, Look(MUTED[1], "-", "o"))
        face = look.color if group in front else PAPER[1]
        (handle,) = axes.plot([x], [y], look.marker, color=look.color, markerfacecolor=face, markersize=7)
        if group in looks:
            handles.append(handle)
            names.append(group.label)
    sizes = [x for x, _ in points.values()]
    wide = min(sizes) > 0 and max(sizes) / min(sizes) > WIDE
    if wide:
        axes.set_xscale("log")
    if comparison.measure is GAP:
        axes.set_yscale("log")
    percent_axis(axes.yaxis, comparison.measure is GAP)
    plain_axis(axes.xaxis, log=wide)
    axes.set_xlabel("MB both ways until that round" + (" (log scale)" if wide else ""))
    axes.set_ylabel(comparison.measure.label)
    if keyed:
        legend(axes, handles, names)
    return figure


def entries(looks: Looks, way: str, keyed: bool) -> Any:
    """Entries that travel a client and round, mean over the seeds."""
    figure, axes = blank(_height(looks, keyed))
    handles = []
    for group, look in looks.items():
        points = [entries_a_client(run, way) for run in group.counted]
        shared = [t for t in points[0] if all(t in own for own in points)]
        means = [mean(own[t] for own in points) for t in shared]
        handles += axes.plot(shared, means, color=look.color, linestyle=look.dash)
    axes.set_ylim(bottom=0)
    plain_axis(axes.xaxis, whole=True)
    plain_axis(axes.yaxis)
    axes.set_xlabel("round")
    axes.set_ylabel("entries")
    if keyed:
        legend(axes, handles, [group.label for group in looks])
    return figure


def entries_a_client(run: Run, way: str) -> dict[int, float]:
    """Round -> entries that travelled that way, for the mean client."""
    return {
        record["round"]: record[f"params/{way}"] / record["clients/ok"]
        for record in run.rounds
        if record.get("clients/ok") and record.get(f"params/{way}") is not None
    }


def _height(looks: Looks, keyed: bool) -> float:
    return 3.0 + (0.17 * len(looks) if keyed else 0.0)
