"""The data of a run as a table and as a figure: rows a client, and clients against classes.

Both take the values that `rayfed.tasks.data.heterogeneity.describe` gives and that a run leaves as `partition.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from rayfed.files import regular
from rayfed.reports.drawing import COLORS, GRID, INK, PAPER, VARIABLES
from rayfed.tracking import Table

COLUMNS = ("min", "p10", "median", "mean", "p90", "max", "iid")
LEVELS = 8  # shades of the heat map, besides that of an empty cell
TOP, MARGIN, SIDE, TALL, BAR = 44.0, 10.0, 288.0, 240.0, 80.0  # pixels; SIDE and TALL of the heat map, BAR the longest
CHARACTER = 5.6  # pixels, about the width of a character
NAME_LENGTH = 18
SHOWN = 2  # classes of an experience that are named
LABELS = {
    "rows": "rows",
    "classes": "classes of {classes}",
    "total_variation": "total variation",
    "jensen_shannon": "Jensen-Shannon",
    "optimum_distance": "optimum distance",
}


def read_partition(folder: Path) -> dict[str, Any] | None:
    """`partition.json` of a run directory; None where there is none, as in runs of older versions."""
    try:
        found = json.loads(regular(folder / "partition.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def table(partition: Mapping[str, Any]) -> Table:
    """Every figure of the clients as a line: its spread over the clients, and its mean if the labels were shuffled."""
    columns = COLUMNS if partition["classes"] else COLUMNS[:-1]
    rows = []
    for name, spread in partition["figures"].items():
        cells = ("" if spread[column] is None else _number(spread[column]) for column in columns)
        rows.append((LABELS[name].format(**partition), *cells))
    return Table("Over the clients that have rows", ("", *columns), tuple(rows))


def experiences(partition: Mapping[str, Any]) -> Table | None:
    """A line for each experience of a sequence of classes; None without a sequence."""
    if not (found := partition.get("experiences")):
        return None
    rows = []
    for i, own in enumerate(found, 1):
        names = own.get("domains", own["classes"])
        named = ", ".join(map(_short, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
        rows.append((str(i), f"{own['rows']:,}", f"{own['clients_with_rows']:,}", str(len(own["classes"])), named))
    return Table("Experiences", ("", "rows", "clients", "classes", "which"), tuple(rows))


def facts(partition: Mapping[str, Any]) -> dict[str, str]:
    """What is counted over all clients, as text by label."""
    clients, holders = partition["clients"], partition["clients_with_rows"]
    return {
        "clients": f"{clients:,}" + (f", of which {holders:,} have rows" if holders < clients else ""),
        "largest client": f"{100 * partition['largest_share']:.3g} % of the rows",
        "effective clients": f"{partition['effective_clients']:,.1f}, by rows",
    }


def notes(partition: Mapping[str, Any]) -> list[str]:
    """The definitions of the figures in `table` and `facts`, one line of at most 80 characters each."""
    found = ["effective clients: (sum of n)^2 / (sum of n^2), over clients of n rows"]
    if partition["classes"]:
        found += [
            "total variation: half the sum of |client's - population's share| over classes",
            "Jensen-Shannon: the distance of the same shares; both distances are 0 to 1",
            "iid: the mean if labels were shuffled; what exceeds it is label skew",
        ]
    if "optimum_distance" in partition["figures"]:
        found.append("optimum distance: ||W_k - W*|| / ||W*||, W_k: the optimum of client k alone")
    return found


def scope(partition: Mapping[str, Any]) -> list[str]:
    """What the heat map shows: two lines of at most 80 characters."""
    grid, holders = partition["heat_map"], partition["clients_with_rows"]
    shown = f"{len(grid['clients'])} of {holders:,} clients" if len(grid["clients"]) < holders else "all clients"
    columns = "a class" if grid["columns_of"] == 1 else f"{grid['columns_of']} classes"
    peak = max(max(row) for row in shades(grid)[1])
    return [f"{shown}, most rows first; {columns} a column", f"shade: share of the client's rows, up to {peak:.0%}"]


def shades(grid: Mapping[str, Any]) -> tuple[list[list[int]], list[list[float]]]:
    """(levels, shares) of the cells, each (clients, columns): the share of a client's rows that a column has, 0 to 1.

    A level is from 0 to `LEVELS`, in proportion to the largest share. Only a cell without rows has level 0.
    """
    shares = [[count / n for count in counts] for counts, n in zip(grid["counts"], grid["rows"], strict=True)]
    peak = max(map(max, shares))
    return [[math.ceil(LEVELS * share / peak - 1e-9) for share in row] for row in shares], shares


def svg(partition: Mapping[str, Any], inline: bool = False) -> str:
    """The figure as an SVG element: the heat map with a bar of rows for every client; without classes the bars alone.

    With ``inline``, colours are the CSS variables of the report page. Otherwise the text is a whole SVG file.
    """
    grid = partition["heat_map"]
    rows: Sequence[int] = grid["rows"] if grid else partition["rows_by_rank"]
    height = min(max(TALL / len(rows), 6.0 if grid else 2.0), 16.0)
    bottom, names = TOP + height * len(rows), [_short(name) for name in grid["clients"]] if grid else []
    left = MARGIN + CHARACTER * max(map(len, names), default=0)
    bars = left + (SIDE + MARGIN if grid else 0)
    parts = _grid(grid, names, left, height, bottom) if grid else []
    title = scope(partition) if grid else ["most rows first"]
    parts += [_text(MARGIN, 12 + 12 * i, line) for i, line in enumerate(title)]
    bar = "".join(
        f"M{bars:.1f} {TOP + height * i:.1f}h{BAR * n / max(rows):.1f}v{height:.1f}H{bars:.1f}z"
        for i, n in enumerate(rows)
    )
    parts += [
        _text(bars, TOP - 4, "rows"),
        f'<path d="{bar}" style="fill:{COLORS[0]};stroke:{PAPER};stroke-width:0.5"/>',
    ]
    parts += [_text(bars + BAR + 4, y, f"{n:,}") for y, n in ((TOP + 8, rows[0]), (bottom, rows[-1]))]
    body = "".join(parts)
    if inline:
        for color, variable in VARIABLES.items():
            body = body.replace(color, f"var(--{variable})")
    about = f"Rows of {partition['clients_with_rows']} clients"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {bars + BAR + 60:.0f} {bottom + MARGIN:.0f}" '
        f'font-family="sans-serif" font-size="10"><title>{about}</title>{body}</svg>'
    )


def _grid(grid: Mapping[str, Any], names: Sequence[str], left: float, height: float, bottom: float) -> list[str]:
    """The heat map with names of clients and the first and last class: one path a shade, 30 bytes a cell with rows."""
    width = SIDE / len(grid["classes"])
    paths: dict[int, list[str]] = {}
    for i, levels in enumerate(shades(grid)[0]):
        for j, level in enumerate(levels):
            corner = f"M{left + width * j:.1f} {TOP + height * i:.1f}"
            paths.setdefault(level, []).append(f"{corner}h{width:.1f}v{height:.1f}h-{width:.1f}z")
    parts = [
        f'<path d="{"".join(moves)}" style="fill:{COLORS[0]};fill-opacity:{level / LEVELS:g}"/>'
        for level, moves in sorted(paths.items())
        if level
    ]
    parts.append(f'<path d="M{left:.1f} {TOP:g}h{SIDE:g}V{bottom:.1f}h-{SIDE:g}z" style="fill:none;stroke:{GRID}"/>')
    first, last = _short(grid["classes"][0]), _short(grid["classes"][-1])
    parts += [_text(left, TOP - 4, first), _text(left + SIDE, TOP - 4, last, "end")]
    every = math.ceil(9 / height)  # a name needs 9 pixels
    names_at = [(TOP + height * (i + 0.5) + 3, name) for i, name in enumerate(names)][::every]
    return parts + [_text(left - 4, y, name, "end") for y, name in names_at]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:{INK}">{escape(text)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 3]}..."


def _number(value: float) -> str:
    """Whole from 100 on, two digits after the point below 1, otherwise three digits."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}" if value >= 1 else f"{value:.2f}"
