"""How a table fits into the columns of a terminal: headings fold first, then the first column, at last everything."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TextIO

from rayfed.tracking.sinks import Table

FIRST = 12  # columns to which the first column, of names, may fold before the cells of numbers do


def room(stream: TextIO) -> int:
    """The columns for a table: those of the terminal, or of the variable COLUMNS; no limit for a file or a pipe."""
    limited = stream.isatty() or bool(os.environ.get("COLUMNS"))
    return shutil.get_terminal_size().columns if limited else sys.maxsize


def natural_widths(table: Table) -> list[int]:
    """The width of each column, in characters, with every cell on one line."""
    return [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]


def column_widths(table: Table, room: int) -> list[int]:
    """Widths of at most ``room`` characters in all, at least 1 where a column has text; the natural ones if they fit.

    Cells are folded as late as possible: a heading may fold between its words, then the first column down to FIRST,
    then any cell. The widest column gives way first.
    """
    widths = natural_widths(table)
    cells = [max((len(row[i]) for row in table.rows), default=0) for i in range(len(widths))]
    whole = [max(size, *map(len, head.split() or [""])) for size, head in zip(cells, table.columns, strict=True)]
    names = min(widths[0], FIRST)
    for least in ([widths[0], *whole[1:]], [names, *whole[1:]], [1] * len(widths)):
        while sum(widths) > room and any(width > floor for width, floor in zip(widths, least, strict=True)):
            widest = max((i for i in range(len(widths)) if widths[i] > least[i]), key=lambda i: widths[i])
            widths[widest] -= 1
    return widths


def folded(row: Sequence[str], widths: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """The row as one or more lines of cells, each at most as wide as its column."""
    cells = [textwrap.wrap(cell, max(width, 1)) or [""] for cell, width in zip(row, widths, strict=True)]
    return zip_longest(*cells, fillvalue="")
