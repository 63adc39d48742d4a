"""`rayfed report` and `rayfed compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rayfed.errors import UserError

SEVERAL = Path("report")  # the default folder for a report of several directories


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the two commands to the parser."""
    page = commands.add_parser(
        "report",
        help="a page with tables and figures of runs and sweeps",
        description="Compare the runs in DIR on one page.",
    )
    _add_run_options(page)
    page.add_argument(
        "--out", metavar="DIR", help="folder of report.html and figures/ (default: DIR; for several DIR: report/)"
    )
    page.add_argument(
        "--link", metavar="UP,DOWN", help="also show simulated time on client links of this many Mbit/s, such as 10,50"
    )
    page.set_defaults(action=_report)
    table = commands.add_parser(
        "compare",
        help="a table of runs and sweeps in the terminal",
        description="Compare the runs in DIR in one table.",
    )
    _add_run_options(table)
    table.set_defaults(action=_compare)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a run's directory, or a sweep's")
    parser.add_argument(
        "--target",
        metavar="SHARE",
        help="accuracy (or gap) up to which bytes are counted, 0 to 1 (default: 95 %% of the best)",
    )


def _report(options: argparse.Namespace) -> None:
    from rayfed.reports import parse_link, read, write_report

    link = parse_link(options.link) if options.link else None
    comparison = read(options.folders, _target(options.target))
    default = Path(options.folders[0]) if len(options.folders) == 1 else SEVERAL
    out = Path(options.out) if options.out else default
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out: got {str(out)!r}, but {folder} is a file")
    for note in comparison.notes:
        print(f"* {note}")
    print(f"page {write_report(comparison, out, link)}, figures {out / 'figures'}")


def _compare(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.measure import Measurement
    from rich.text import Text

    from rayfed.reports import read, summary
    from rayfed.tracking.progress import rich_table

    comparison = read(options.folders, _target(options.target))
    console = Console(highlight=False, markup=False, emoji=False)
    table = rich_table(summary(comparison))
    width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    if not console.is_terminal:  # a file or a pipe has no width limit
        console.width = max(console.width, width)
    for note in comparison.notes:
        console.print(Text(f"* {note}"), soft_wrap=True)
    console.print(table if width <= console.width else rich_table(summary(comparison, brief=True)))


def _target(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        raise UserError(f"--target: got {text!r}, but it should be a share between 0 and 1, such as 0.8") from None
