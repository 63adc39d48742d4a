"""`rayfed report` and `rayfed compare`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rayfed.errors import UserError

SEVERAL = Path("report")  # the default folder for a report of several directories


def report(folders: Sequence[str], target: str | None, out: str | None, link: str | None) -> None:
    """Writes a page and figures of the runs, and prints where they are. UserError where there is nothing to read."""
    from rayfed.reports import parse_link, read, write_report

    speeds = parse_link(link) if link else None
    comparison = read(folders, _target(target))
    default = Path(folders[0]) if len(folders) == 1 else SEVERAL
    place = Path(out) if out else default
    for folder in (place, *place.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out: got {str(place)!r}, but {folder} is a file")
    for note in comparison.notes:
        print(f"* {note}")
    print(f"page {write_report(comparison, place, speeds)}, figures {place / 'figures'}")


def compare(folders: Sequence[str], target: str | None) -> None:
    """Prints the table of the runs. UserError where there is nothing to read."""
    from rich.console import Console
    from rich.text import Text

    from rayfed.reports import read, summary
    from rayfed.tracking.layout import natural_widths, room
    from rayfed.tracking.progress import frame, rich_table

    comparison = read(folders, _target(target))
    console = Console(highlight=False, markup=False, emoji=False)
    table = summary(comparison)
    width = sum(natural_widths(table)) + frame(table)
    console.width = min(room(sys.stdout), max(console.width, width))
    for note in comparison.notes:
        console.print(Text(f"* {note}"), soft_wrap=True)
    fitting = table if width <= console.width else summary(comparison, brief=True)
    console.print(rich_table(fitting, console.width))


def _target(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        raise UserError(f"--target: got {text!r}, but it should be a share between 0 and 1, such as 0.8") from None
