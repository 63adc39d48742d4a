"""`rayfed data`: the rows of a run, who holds them, and how much the clients differ. Nothing is trained."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfed.errors import UserError, allowed

if TYPE_CHECKING:
    from rich.text import Text

    from rayfed.tasks.data.federation import Federation

CLIENTS, COLUMNS = 24, 48  # largest size of the heat map in the terminal
SHADES = " .:-=+*#@"  # from no rows of a client to all of them
NAME_LENGTH = 14


def data(config: str, overrides: Sequence[str], svg: str | None) -> None:
    """Prints facts, figures and a heat map of clients and classes; with ``svg``, also writes the figure to that file.

    UserError where settings or data are wrong, or where the file cannot be written.
    """
    from rayfed import api
    from rayfed.files import atomic_write
    from rayfed.reports import partition
    from rayfed.tasks.data.heterogeneity import describe

    if svg is not None and not svg.endswith(".svg"):
        raise allowed("--svg", svg, "the name of the figure's file ends in .svg")
    experiment = api.load_config(config, overrides)
    federation = api.check(experiment, model=False)
    found = describe(federation, CLIENTS, COLUMNS)
    print(experiment.name)
    for label, text in {**rows(experiment.data.max_tokens, federation), **partition.facts(found)}.items():
        print(f"  {label:<20}{text}")
    _print_table(partition.table(found))
    for note in partition.notes(found):
        print(note)
    if (experiences := partition.experiences(found)) is not None:
        _print_table(experiences)
    if found["heat_map"]:
        _print_heat_map(found)
    if svg is not None:
        try:
            atomic_write(Path(svg), partition.svg(describe(federation)) + "\n")
        except OSError as error:
            raise UserError(f"--svg: got {svg!r}, but it cannot be written: {error.strerror}") from None
        print(f"figure {svg}")


def rows(limit: int, federation: Federation) -> dict[str, str]:
    """The rows of each split, and the tokens of a training row, of which ``limit`` are the most, as text by label."""
    import numpy as np

    splits = {name: len(federation.split(name)) for name in ("train", "validation", "test")}
    found = {"rows": ", ".join(f"{count:,} {name}" for name, count in splits.items() if count)}
    lengths = federation.train.lengths
    median, longest = int(np.median(lengths)), int(lengths.max())
    if longest == 1:  # rows without tokens
        return found
    share = f"{100 * float((lengths == limit).mean()):.3g} %"
    cut = f"; {share} of the rows reach data.max_tokens" if longest == limit else ""
    return found | {"tokens a row": f"median {median}, most {longest}{cut}"}


def _print_table(table: Any) -> None:
    """By rich on a terminal, as aligned text elsewhere."""
    if not sys.stdout.isatty():
        from rayfed.tracking.console import PlainView

        PlainView(sys.stdout).table(table)
        return
    from rich.console import Console

    from rayfed.tracking.progress import rich_table

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(rich_table(table, console.width))


def _print_heat_map(found: Mapping[str, Any]) -> None:
    from rayfed.reports.partition import scope

    print("", *scope(found), sep="\n")
    if not sys.stdout.isatty():
        for line, _ in heat_map(found["heat_map"]):
            print(line)
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    for line, cells in heat_map(found["heat_map"]):
        console.print(_colored(line, cells), no_wrap=True, overflow="crop")


Cells = Sequence[tuple[int, int, int]]


def heat_map(grid: Mapping[str, Any]) -> Iterator[tuple[str, Cells]]:
    """Lines of at most 80 columns, and the cells of each: (start, stop, level), levels as in `shades`."""
    from rayfed.reports.partition import shades

    names = [name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 2]}.." for name in grid["clients"]]
    wide, digits = max(6, *map(len, names)), max(4, len(str(max(grid["rows"]))))
    cell = min(4, max(1, COLUMNS // len(grid["classes"])))
    yield f"{'client':<{wide}} {'rows':>{digits}} {_class_axis(grid['classes'], cell * len(grid['classes']))}", ()
    for name, rows, levels in zip(names, grid["rows"], shades(grid)[0], strict=True):
        head = f"{name:<{wide}} {rows:>{digits}} "
        line = f"{head}{''.join(SHADES[level] * cell for level in levels)}|"
        yield line, [(len(head) + i * cell, len(head) + (i + 1) * cell, level) for i, level in enumerate(levels)]


def _class_axis(classes: Sequence[str], width: int) -> str:
    """The first and the last class at the ends of the axis, as far as there is room."""
    first, last = classes[0], classes[-1]
    room = max((width - 1) // 2, 1)
    shown = [name if len(name) <= room else f"{name[: max(room - 2, 1)]}.."[:room] for name in (first, last)]
    return f"{shown[0]}{shown[1]:>{max(width - len(shown[0]), len(shown[1]))}}|"


def _colored(line: str, cells: Cells) -> Text:
    """The line with a background colour behind each cell with rows: the more of the client's rows, the lighter."""
    from rich.text import Text

    from rayfed.reports.partition import LEVELS

    text = Text(line)
    for start, stop, level in cells:
        if level:
            share = (level - 1) / (LEVELS - 1)
            red, green, blue = (round(low + share * (high - low)) for low, high in ((20, 110), (60, 200), (110, 255)))
            text.stylize(f"#000000 on rgb({red},{green},{blue})", start, stop)
    return text
