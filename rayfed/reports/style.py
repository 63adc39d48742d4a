"""Colours that figures and page share. A figure is drawn in the light ones; on the page each becomes a CSS variable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayfed.reports.compare import RunGroup

INK, GRID, MUTED, PAPER = ("ink", "#1d2530"), ("grid", "#d5dae1"), ("muted", "#a3abb6"), ("paper", "#ffffff")
SERIES = (  # told apart by colour-blind readers too, and at least 3:1 on the paper; then the same for the dark page
    ("s0", "#0b62a4", "#6cb6ff"),
    ("s1", "#c24a00", "#ff9d57"),
    ("s2", "#00795a", "#4fd1a5"),
    ("s3", "#9c3587", "#e58fd3"),
    ("s4", "#7d6200", "#d9c04a"),
    ("s5", "#5b5bd6", "#a9a9ff"),
    ("s6", "#b3263a", "#ff8b94"),
    ("s7", "#4c5866", "#b9c3cf"),
)
DARK = {"ink": "#e6e9ee", "grid": "#3a4350", "muted": "#667180", "paper": "#14181d"}
LIGHT = dict((INK, GRID, MUTED, PAPER))
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SHOWN = len(SERIES)  # groups with a colour of their own


@dataclass(frozen=True)
class Look:
    """How one group is drawn everywhere: no two in the same colour, and next ones in other dashes too."""

    color: str
    dash: str
    marker: str


def looks(groups: Sequence[RunGroup], ranked: Sequence[RunGroup]) -> dict[RunGroup, Look]:
    """A look for each group, or where there are too many, for the best of them; the others stay grey and nameless."""
    best = set(ranked[:SHOWN])
    own = [group for group in groups if group in best]
    return {group: Look(SERIES[i][1], DASHES[i % len(DASHES)], MARKERS[i]) for i, group in enumerate(own)}


def variables() -> dict[str, str]:
    """Light colour -> the CSS variable's name."""
    return {light: name for name, light in LIGHT.items()} | {light: name for name, light, _ in SERIES}


def css() -> str:
    """The variables' values, light, and dark where the reader's screen is; print is always light."""
    light = {**LIGHT, **{name: color for name, color, _ in SERIES}}
    dark = {**DARK, **{name: color for name, _, color in SERIES}}
    day, night = (";".join(f"--{name}:{color}" for name, color in colors.items()) for colors in (light, dark))
    screen = f"@media screen and (prefers-color-scheme:dark){{:root{{color-scheme:dark;{night}}}}}"
    return f":root{{color-scheme:light;{day}}}\n{screen}"
