"""How figures are drawn: colours, axes, legends, and SVG for the page and for files.

The same data gives the same bytes: no dates, no random ids, no user settings of matplotlib. A figure is drawn in light
colours. On the page each of these colours becomes a CSS variable, which has a second value for dark screens.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from rayfed.errors import UserError
from rayfed.files import atomic_write
from rayfed.reports.compare import RunGroup

INK, GRID, MUTED, PAPER = "#1d2530", "#d5dae1", "#a3abb6", "#ffffff"
LIGHT = {"ink": INK, "grid": GRID, "muted": MUTED, "paper": PAPER}
DARK = {"ink": "#e6e9ee", "grid": "#3a4350", "muted": "#667180", "paper": "#14181d"}
SERIES = (  # light and dark; distinct for colour-blind readers, with a contrast of at least 3:1 to the paper
    ("#0b62a4", "#6cb6ff"),
    ("#c24a00", "#ff9d57"),
    ("#00795a", "#4fd1a5"),
    ("#9c3587", "#e58fd3"),
    ("#7d6200", "#d9c04a"),
    ("#5b5bd6", "#a9a9ff"),
    ("#b3263a", "#ff8b94"),
    ("#4c5866", "#b9c3cf"),
)
RAMP = (  # light and dark; from few to many, for what has an order
    ("#a6c8e4", "#2f4c69"),
    ("#86b4da", "#3c6189"),
    ("#65a0cf", "#4a77a8"),
    ("#4689c0", "#5a8ec4"),
    ("#2b72ab", "#73a6d8"),
    ("#185b91", "#91bee6"),
    ("#0c4576", "#b3d4f0"),
    ("#062f5c", "#d6e8f8"),
)
COLORS = tuple(light for light, _ in SERIES)
DASHES = {"-": "", "--": "6 3", "-.": "7 3 1.5 3", ":": "1.5 3"}  # matplotlib's name -> SVG's dash array
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
VARIABLES = {color: name for name, color in LIGHT.items()} | {color: f"s{i}" for i, color in enumerate(COLORS)}
VARIABLES |= {pair[0]: f"r{i}" for i, pair in enumerate(RAMP)}
SIZE = (4.6, 3.2)  # inches; small, so that the text stays readable on a phone
LONG = 28  # characters of a name beside a bar
SHORT = 24  # characters of a legend entry that leaves room for a second column
FEW_DECADES = 100.0  # largest over smallest value of a log axis that gets numbers within a decade
_STYLE: Any = {
    "svg.hashsalt": "rayfed",
    "svg.fonttype": "none",  # text stays text: searchable, and in the font of the page
    "font.size": 9,
    "text.parse_math": False,  # a `$` in a name is a `$`
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}


@dataclass(frozen=True)
class GroupStyle:
    """How every figure draws a group. Each group has its own colour; neighbours also differ in their dashes."""

    color: str
    dash: str
    marker: str


Styles = Mapping[RunGroup, GroupStyle]


def group_styles(groups: Sequence[RunGroup], ranked: Sequence[RunGroup]) -> Styles:
    """A style for each group. With more groups than colours, for the best of them; figures draw the others in grey."""
    best = set(ranked[: len(COLORS)])
    dashes = tuple(DASHES)
    shown = [group for group in groups if group in best]
    return {group: GroupStyle(COLORS[i], dashes[i % len(dashes)], MARKERS[i]) for i, group in enumerate(shown)}


def ramp(count: int) -> list[str]:
    """``count`` colours in the order of RAMP, from its first to its last; neighbours may be equal."""
    last = len(RAMP) - 1
    return [RAMP[round(last * i / (count - 1)) if count > 1 else last // 2][0] for i in range(count)]


def shortened(name: str, length: int = LONG) -> str:
    """The name, or its beginning and end if it has more than ``length`` characters."""
    tail = length // 4
    return name if len(name) <= length else f"{name[: length - tail - 3]}...{name[-tail:]}"


def css() -> str:
    """The values of the CSS variables: dark if the reader's screen is dark, else light. Print is always light."""

    def variables(colors: Mapping[str, str], index: int) -> str:
        named = {f"s{i}": pair[index] for i, pair in enumerate(SERIES)}
        named |= {f"r{i}": pair[index] for i, pair in enumerate(RAMP)}
        return ";".join(f"--{name}:{color}" for name, color in {**colors, **named}.items())

    screen = f"@media screen and (prefers-color-scheme:dark){{:root{{color-scheme:dark;{variables(DARK, 1)}}}}}"
    return f":root{{color-scheme:light;{variables(LIGHT, 0)}}}\n{screen}"


@contextmanager
def drawing() -> Iterator[None]:
    """Gives matplotlib the report's style, instead of the user's. UserError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib: not installed, and figures need it; pip install -e '.[report]'") from None
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # hides the message that it builds its font cache
    with matplotlib.rc_context(), warnings.catch_warnings():
        # matplotlib's font may lack a character of a name; the fonts of the page have it.
        warnings.filterwarnings("ignore", "Glyph")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def blank(height: float = SIZE[1]) -> tuple[Any, Any]:
    """(figure, axes) of ``height`` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    return figure, figure.add_subplot()


def inline_svg(figure: Any, name: str, title: str, description: str) -> str:
    """The figure as an SVG element for a page: unique ids, colours as CSS variables, no references to other files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="([^"]*)"', head)
    assert box is not None, "matplotlib writes a viewBox"
    body = re.sub(r'\bid="|url\(#|xlink:href="#', rf"\g<0>{name}-", body).replace("xlink:href=", "href=")
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    return (
        f'<svg role="img" aria-labelledby="{name}-title {name}-desc" viewBox="{box[1]}">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>{body}'
    )


def save(figure: Any, path: Path, title: str) -> None:
    """Writes the figure to `path`.svg and `path`.png, on white."""
    for form in ("svg", "png"):
        buffer = io.BytesIO()
        metadata = {"Date": None, "Title": title} if form == "svg" else {"Software": None, "Title": title}
        figure.savefig(buffer, format=form, dpi=200, facecolor=PAPER, metadata=metadata)
        atomic_write(path.with_name(f"{path.name}.{form}"), buffer.getvalue())


def swatch(color: str, dash: str) -> str:
    """A short line for the legend of the page, as an SVG element."""
    return (
        f'<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true"><path d="M1 6H27" stroke-dasharray='
        f'{quoteattr(DASHES[dash])} style="stroke:var(--{VARIABLES[color]});stroke-width:2;fill:none"/></svg>'
    )


def number_axis(axis: Any, percent: bool = False, log: bool = False, whole: bool = False) -> None:
    """Formats numbers without exponents: 0.1, 1, 10; with ``percent``, shares as percent.

    ``log``: a log scale with a number at every power of ten, within few decades also at 2 and 5 times a power of ten.
    ``whole``: integers only, for rounds.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if log:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        low, high = sorted(axis.get_view_interval())
        few = low > 0 and high / low < FEW_DECADES
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
        axis.set_minor_formatter(NullFormatter())
    elif whole:
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_major_formatter(lambda value, _: f"{100 * value:.6g} %" if percent else f"{value:,.6g}")


def legend(axes: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """A legend below the axes, with two columns if the names are short."""
    if handles:
        columns = 2 if len(names) > 2 and max(map(len, names)) <= SHORT else 1
        shown = [name if not name.startswith("_") else f" {name}" for name in names]  # matplotlib hides `_name`
        axes.figure.legend(handles, shown, loc="outside lower left", ncols=columns, handlelength=3)
