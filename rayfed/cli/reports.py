"""`rayfed report` and `rayfed compare`, and the page that a finished run gets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rayfed.errors import UserError

if TYPE_CHECKING:
    import rich.table

    from rayfed.tracking import Table

PAGE = "report.html"
BESIDE = Path("report")  # where a report of several directories goes, unless told


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The two commands, as `rayfed --help` lists them."""
    page = commands.add_parser(
        "report", help="a page with figures from runs and sweeps", description="Compare the runs in DIR on one page."
    )
    _about_runs(page)
    page.add_argument(
        "--out", metavar="DIR", help="where report.html and figures/ go (default: DIR itself; report/ for several)"
    )
    page.add_argument(
        "--link", metavar="UP,DOWN", help="also show simulated time, on links of so many Mbit/s each way, such as 10,50"
    )
    page.set_defaults(action=_report)
    table = commands.add_parser(
        "compare", help="the same table in the terminal", description="Compare the runs in DIR in one table."
    )
    _about_runs(table)
    table.set_defaults(action=_compare)


def write_page(out: Path) -> None:
    """`report.html` of a finished run, from what it left; where that cannot be, a line in events.log says why.

    A run is done when its results are on the disk: whatever happens here changes neither them nor the exit code.
    """
    from rayfed.reports import figures_available, read, write_report
    from rayfed.tracking import EventSink

    events = EventSink(out / "events.log")
    if not figures_available():
        events.event(f"no {PAGE}: matplotlib is not installed (pip install 'rayfed[report]')")
        return
    try:
        write_report(read([out]), out, files=False)
    except Exception as error:
        events.event(f"no {PAGE}: {type(error).__name__}: {error}")
        print(f"rayfed: no {PAGE}: {error}", file=sys.stderr)


def _about_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a run's directory, or a sweep's")
    parser.add_argument(
        "--target", metavar="SHARE", help="accuracy (or gap) to count bytes to, 0 to 1 (default: 95 %% of the best)"
    )


def _report(options: argparse.Namespace) -> None:
    from rayfed.reports import parse_link, read, write_report

    link = parse_link(options.link) if options.link else None
    comparison = read(options.folders, _target(options.target))
    alone = Path(options.folders[0]) if len(options.folders) == 1 else BESIDE
    out = Path(options.out) if options.out else alone
    for place in (out, *out.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"--out: got {str(out)!r}, but {place} is a file")
    for note in comparison.notes:
        print(f"* {note}")
    print(f"page {write_report(comparison, out, link)}, figures {out / 'figures'}")


def _compare(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.measure import Measurement
    from rich.text import Text

    from rayfed.reports import read, summary

    comparison = read(options.folders, _target(options.target))
    console = Console(highlight=False, markup=False, emoji=False)
    whole = _grid(summary(comparison))
    width = Measurement.get(console, console.options.update(max_width=10_000), whole).maximum
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console.width = max(console.width, width)
    for note in comparison.notes:
        console.print(Text(f"* {note}"), soft_wrap=True)
    console.print(whole if width <= console.width else _grid(summary(comparison, brief=True)))


def _grid(table: Table) -> rich.table.Table:
    import rich.table
    from rich.text import Text

    grid = rich.table.Table(title=Text(table.title), title_justify="left")
    for number, name in enumerate(table.columns):
        # A narrow terminal folds a cell over two lines and never cuts it.
        grid.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*map(Text, row))
    return grid


def _target(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        raise UserError(f"--target: got {text!r}, but it should be a share between 0 and 1, such as 0.8") from None
