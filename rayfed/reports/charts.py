"""The charts: lines, points and bars. Each public function draws one figure with matplotlib.

The last argument ``named`` of some functions says whether the figure has its own legend of groups. On the page one
legend serves several figures; in a file a figure stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import mean
from typing import Any

from rayfed.reports import drawing
from rayfed.reports.compare import GAP, Comparison, Curve, Measure, RunGroup, curve
from rayfed.reports.drawing import COLORS, DASHES, INK, MARKERS, MUTED, PAPER, GroupStyle, Styles
from rayfed.reports.runs import Run
from rayfed.reports.table import Ledgers, rank_shares
from rayfed.reports.traffic import DIRECTIONS, PARTS
from rayfed.tracking.format import megabytes

FEW = 12  # points of a line that gets markers
WIDE = 6.0  # ratio of largest to smallest traffic above which the axis of bytes is a log axis
X = Mapping[Run, Mapping[int, float]]  # run -> round -> place on the x axis


def curves(comparison: Comparison, styles: Styles, x: X | None, label: str, named: bool) -> Any:
    """The measure against rounds, or against ``x`` of each round: means with a band over seeds, the target dotted.

    Where rounds between full evaluations are measured on a subset, only the full evaluations have markers.
    """
    figure, axes = _blank(styles, named)
    measure = comparison.measure
    groups = sorted(comparison.groups, key=lambda group: group in styles)  # the grey lines are drawn first
    drawn = {group: curve(group.counted, measure, x) for group in groups}
    sizes = _marker_sizes(len(drawn))
    handles = {
        group: _line(axes, own, styles.get(group), len(group.counted) > 1, size)
        for (group, own), size in zip(drawn.items(), sizes)
    }
    if comparison.target is not None:
        axes.axhline(comparison.target, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    _measure_axis(axes, measure)
    _x_axis(axes, label, [] if x is None else [own.x[-1] for own in drawn.values() if own.x], whole=x is None)
    _group_legend(axes, handles, styles if named else {})
    return figure


def lines(
    series: Mapping[str, Mapping[int, float]], percent: bool = False, log: bool = False, ordered: bool = False
) -> Any:
    """Named series against rounds, with a legend; ``ordered`` ones, such as ranks, have colours of a ramp."""
    figure, axes = drawing.blank(2.6 + 0.17 * len(series))
    handles, colors = [], drawing.ramp(len(series)) if ordered else cycle(COLORS)
    sizes = _marker_sizes(len(series))
    for points, color, dash, marker, size in zip(series.values(), colors, cycle(DASHES), cycle(MARKERS), sizes):
        shown = marker if len(points) <= FEW else None
        style: Any = {"color": color, "linestyle": dash, "marker": shown, "markerfacecolor": "none", "markersize": size}
        handles += axes.plot(list(points), list(points.values()), **style)
    if percent:
        drawing.number_axis(axes.yaxis, percent=True, log=log)
    _x_axis(axes, "round", whole=True)
    drawing.legend(axes, handles, list(series))
    return figure


def pareto(comparison: Comparison, styles: Styles, named: bool) -> Any:
    """One point per group: the measure against bytes. Points of the Pareto front are filled and joined.

    Bars show the standard deviation over the seeds. Other points are hollow and lie above, so that none hides another.
    """
    figure, axes = _blank(styles, named)
    points = {group: (size / 1e6, score) for group, (size, score) in comparison.points.items()}
    front = comparison.front
    xs, ys = zip(*(points[group] for group in front))
    axes.plot(xs, ys, color=INK, linewidth=0.8, drawstyle="steps-post")
    handles = {}
    for group, (x, y) in points.items():
        style = styles.get(group, GroupStyle(MUTED, "-", "o"))
        face, above = (style.color, 3) if group in front else ("none", 4)
        deviation = group.deviation(lambda r: r.value)
        axes.errorbar([x], [y], yerr=deviation, color=style.color, elinewidth=0.8, capsize=2, zorder=2)
        (handles[group],) = axes.plot(
            [x], [y], style.marker, color=style.color, markerfacecolor=face, markersize=7, zorder=above
        )
    _measure_axis(axes, comparison.measure)
    _x_axis(axes, "MB both ways", [x for x, _ in points.values()])
    _group_legend(axes, handles, styles if named else {})
    return figure


def methods(comparison: Comparison, styles: Styles) -> Any:
    """One point per method: the value of its best group, with the deviation over seeds. The best is at the top."""
    best, (name, number) = comparison.best_of_methods[::-1], comparison.shown
    figure, axes = drawing.blank(0.9 + 0.3 * len(best))
    for i, group in enumerate(best):
        style = styles.get(group, GroupStyle(MUTED, "-", "o"))
        deviation = group.deviation(number)
        axes.errorbar(group.mean(number), i, xerr=deviation, elinewidth=0.8, capsize=2, ecolor=style.color)
        axes.plot(group.mean(number), i, style.marker, color=style.color, markersize=6)
    _bar_names(axes, [drawing.shortened(str(group.settings["method.name"])) for group in best])
    axes.set_ylim(-0.6, len(best) - 0.4)
    drawing.number_axis(axes.xaxis, percent=comparison.measure.share, log=comparison.measure is GAP)
    axes.set_xlabel(name)
    return figure


def entries(styles: Styles, way: str, named: bool) -> Any:
    """Entries sent ``way`` (`down` or `up`) per client, against rounds. Means over the seeds."""
    figure, axes = _blank(styles, named)
    handles = {}
    for group, style in styles.items():
        seeds = [entries_per_client(run, way) for run in group.counted]
        shared = [t for t in seeds[0] if all(t in points for points in seeds)]
        means = [mean(points[t] for points in seeds) for t in shared]
        (handles[group],) = axes.plot(shared, means, color=style.color, linestyle=style.dash)
    axes.set_ylim(bottom=0)
    _x_axis(axes, "round", whole=True)
    drawing.number_axis(axes.yaxis)
    axes.set_ylabel("entries")
    _group_legend(axes, handles, styles if named else {})
    return figure


def entries_per_client(run: Run, way: str) -> dict[int, float]:
    """Round -> number of entries sent ``way`` (`down` or `up`), mean over the round's clients."""
    return {
        record["round"]: record[f"params/{way}"] / record["clients/ok"]
        for record in run.rounds
        if record.get("clients/ok") and record.get(f"params/{way}") is not None
    }


def target(styles: Styles) -> Any:
    """Bytes to the target, for the groups that reached it, with the deviation over seeds. The fewest are at the top."""
    sizes = [(size, group) for group in styles if (size := group.target_bytes) is not None]
    sizes.sort(key=lambda pair: -pair[0])
    figure, axes = drawing.blank(0.9 + 0.3 * len(sizes))
    for i, (size, group) in enumerate(sizes):
        deviation = (group.deviation(lambda r: r.target_bytes) or 0.0) / 1e6
        error = {"ecolor": INK, "elinewidth": 0.8, "capsize": 2}
        axes.barh(i, size / 1e6, color=styles[group].color, height=0.6, xerr=deviation or None, error_kw=error)
        end = size / 1e6 + deviation
        axes.annotate(megabytes(size), (end, i), xytext=(5, 0), textcoords="offset points", va="center")
    _bar_names(axes, [drawing.shortened(group.label) for _, group in sizes])
    axes.margins(x=0.15)
    _x_axis(axes, "MB both ways")
    return figure


def traffic(styles: Styles, ledgers: Ledgers) -> Any:
    """One bar per group and direction, divided into the parts of the messages. Means over the seeds."""
    bars = []
    for group in styles:
        own = [ledgers[run] for run in group.counted if run in ledgers]
        bars += [
            (drawing.shortened(f"{group.label}, down") if way == "down" else "up", way, own)
            for way in DIRECTIONS
            if own
        ]
    parts = {part: [mean(t.bytes(way, part) for t in own) / 1e6 for _, way, own in bars] for part in PARTS}
    figure, axes = _stacked_bars(1.2 + 0.26 * len(bars), [name for name, _, _ in bars], parts, COLORS)
    _x_axis(axes, "MB")
    return figure


def ranks(styles: Styles) -> Any:
    """One bar per group, divided into the ranks of the clients that took part."""
    shares = [rank_shares(group) for group in styles]
    parts = {
        f"rank {rank}": [own.get(rank, 0.0) for own in shares]
        for rank in sorted({rank for own in shares for rank in own})
    }
    names = [drawing.shortened(group.label) for group in styles]
    height = 1.2 + 0.3 * len(shares) + 0.17 * len(parts)
    figure, axes = _stacked_bars(height, names, parts, drawing.ramp(len(parts)), edgecolor=PAPER, linewidth=0.5)
    axes.set_xlim(0, 1)
    drawing.number_axis(axes.xaxis, percent=True)
    return figure


def _marker_sizes(count: int) -> list[float]:
    """Sizes of ``count`` hollow markers, from large to small: of equal points, a later one lies in an earlier one."""
    return [4 + 6 * (count - 1 - i) / max(count - 1, 3) for i in range(count)]


def _line(axes: Any, own: Curve, style: GroupStyle | None, band: bool, size: float) -> Any:
    if style is None:
        return axes.plot(own.x, own.mean, color=MUTED, linewidth=0.8)[0]
    if band:
        axes.fill_between(own.x, own.low, own.high, color=style.color, alpha=0.18, linewidth=0)
    marker, at = (style.marker, own.full) if len(own.full) <= FEW else (None, [])
    shown: Any = {"marker": marker, "markevery": at, "markerfacecolor": "none", "markersize": size}
    return axes.plot(own.x, own.mean, color=style.color, linestyle=style.dash, **shown)[0]


def _stacked_bars(
    height: float, names: Sequence[str], parts: Mapping[str, Sequence[float]], colors: Sequence[str], **edge: Any
) -> Any:
    """(figure, axes) with one horizontal bar per name, divided into ``parts``: part -> its width in each bar."""
    figure, axes = drawing.blank(height)
    handles, left = [], [0.0] * len(names)
    for widths, color in zip(parts.values(), colors):
        handles.append(axes.barh(range(len(names)), widths, left=left, color=color, height=0.7, **edge))
        left = [start + width for start, width in zip(left, widths)]
    _bar_names(axes, names)
    axes.invert_yaxis()
    drawing.legend(axes, handles, list(parts))
    return figure, axes


def _bar_names(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.grid(False, axis="y")


def _measure_axis(axes: Any, measure: Measure) -> None:
    drawing.number_axis(axes.yaxis, percent=measure.share, log=measure is GAP)
    axes.set_ylabel(measure.label)


def _x_axis(axes: Any, label: str, sizes: Sequence[float] = (), whole: bool = False) -> None:
    """The x axis, on a log scale if ``sizes`` differ widely."""
    log = len(sizes) > 1 and min(sizes) > 0 and max(sizes) / min(sizes) > WIDE
    drawing.number_axis(axes.xaxis, log=log, whole=whole)
    axes.set_xlabel(label + (" (log scale)" if log else ""))


def _group_legend(axes: Any, handles: Mapping[RunGroup, Any], styles: Styles) -> None:
    named = [group for group in handles if group in styles]
    drawing.legend(axes, [handles[group] for group in named], [group.label for group in named])


def _blank(styles: Styles, named: bool) -> Any:
    return drawing.blank(3.0 + (0.17 * len(styles) if named else 0.0))
