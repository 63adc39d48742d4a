"""The figures of a report, drawn by matplotlib. Same data, same bytes: no dates, no random ids, no user's own style."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from rayfed.errors import UserError
from rayfed.files import atomic_write
from rayfed.reports.style import GRID, INK, PAPER, variables

MISSING = "matplotlib: not installed, and figures need it; pip install 'rayfed[report]'"
SIZE = (4.6, 3.2)  # inches; small, so that its letters stay readable on a phone
SHORT = 24  # letters of a name that leaves room for another beside it
FORMATS = ("svg", "png")
FEW_DECADES = 100.0  # largest over smallest value of a log axis that gets numbers within a decade
_STYLE: Any = {
    "svg.hashsalt": "rayfed",
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's own letters
    "font.size": 9,
    "text.parse_math": False,  # a `$` in a name is a `$`
    "text.color": INK[1],
    "axes.labelcolor": INK[1],
    "axes.edgecolor": INK[1],
    "xtick.color": INK[1],
    "ytick.color": INK[1],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID[1],
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def available() -> bool:
    """Whether figures can be drawn here."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


@contextmanager
def drawing() -> Iterator[None]:
    """Inside, matplotlib has the report's style, whatever the user's own is. UserError where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(MISSING) from None
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # that it builds its cache of fonts is no news
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph"
        )  # a name in letters that matplotlib's font lacks; the page's has them
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def blank(height: float = SIZE[1], width: float = SIZE[0]) -> tuple[Any, Any]:
    """(figure, axes)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def inline(figure: Any, name: str, title: str, description: str) -> str:
    """The figure as an SVG element for a page: ids of its own, colours as CSS variables, nothing from elsewhere."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="([^"]*)"', head)
    assert box is not None, "matplotlib writes a viewBox"
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    for color, variable in variables().items():
        body = body.replace(color, f"var(--{variable})")
    return (
        f'<svg role="img" aria-labelledby="{name}-title {name}-desc" viewBox="{box[1]}">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>{body}'
    )


def save(figure: Any, path: Path, title: str) -> None:
    """The figure as `path`.svg and `path`.png, on white."""
    for form in FORMATS:
        buffer = io.BytesIO()
        metadata = {"Date": None, "Title": title} if form == "svg" else {"Software": None, "Title": title}
        figure.savefig(buffer, format=form, dpi=200, facecolor=PAPER[1], metadata=metadata)
        atomic_write(path.with_name(f"{path.name}.{form}"), buffer.getvalue())


def swatch(color: str, dash: str, marker: str | None) -> str:
    """A short line as a legend shows it, for the page."""
    strokes = {"-": "", "--": "6 3", "-.": "7 3 1.5 3", ":": "1.5 3"}
    shape = f'<circle cx="14" cy="6" r="3" style="fill:var(--{variables()[color]})"/>' if marker else ""
    dashes = quoteattr(strokes[dash])
    return (
        f'<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true"><path d="M1 6H27" stroke-dasharray={dashes} '
        f'style="stroke:var(--{variables()[color]});stroke-width:2;fill:none"/>{shape}</svg>'
    )


def percent_axis(axis: Any, log: bool = False) -> None:
    """Segments as percent."""
    from matplotlib.ticker import FuncFormatter

    if log:
        _decades(axis)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g} %"))


def plain_axis(axis: Any, log: bool = False, whole: bool = False) -> None:
    """Numbers as they are, also on a log axis: 0.1, 1, 10. ``whole``: no fractions, for rounds."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if log:
        _decades(axis)
    elif whole:
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _decades(axis: Any) -> None:
    """A number at every power of ten; where there are few of them, at 2 and 5 times it too."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    few = low > 0 and high / low < FEW_DECADES
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axis.set_minor_formatter(NullFormatter())


def legend(axes: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Below the axes, for figures that stand alone; two names a line where they are short."""
    if handles:
        columns = 2 if len(names) > 2 and max(map(len, names)) <= SHORT else 1
        shown = [name if not name.startswith("_") else f" {name}" for name in names]  # `_` hides a name
        axes.figure.legend(handles, shown, loc="outside lower left", ncols=columns, handlelength=3)


def luminance(rgb: Sequence[float] | Mapping[int, float]) -> float:
    """Relative brightness of a colour, 0 to 1, to choose black or white letters on it."""
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]
