"""The settings that differ between groups of runs, and a short label for each group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfed.config.describe import format_value
from rayfed.reports.runs import Run, natural_key

NAMED = 3  # largest number of settings in a label
UNNAMED = "run"  # the default of the setting `name`


def differing_settings(firsts: Sequence[Run]) -> dict[str, tuple[Any, ...]]:
    """Dotted setting -> its value in each run, for settings that can change the result and are not all equal.

    The value is None if a run has no such setting. The method and its options come first.
    """
    each = [run.result_settings() for run in firsts]
    keys = sorted({key: 0 for settings in each for key in settings}, key=lambda key: not key.startswith("method."))
    rows = {key: tuple(settings.get(key) for settings in each) for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def labels_of(members: Sequence[Sequence[Run]], differing: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """A label for each group: its own name, else the settings that differ, else its folder."""
    folders = [group[0].folder.resolve() for group in members]
    names = [group[0].name if len({run.name for run in group}) == 1 else "" for group in members]
    of_sweep = any(run.trial for group in members for run in group)
    short = _short_keys(differing)
    settings = [
        ", ".join(f"{name} {spelled(differing[key][i])}".strip() for key, name in short.items())
        for i in range(len(members))
    ]
    candidates = [
        [] if of_sweep or UNNAMED in names else names,
        settings if len(short) <= NAMED else [],
        _by_trial([folder.name for folder in folders]) if all("=" in folder.name for folder in folders) else [],
    ]
    for labels in candidates:
        if all(labels) and len(set(labels)) == len(members):
            return labels
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    return [str(Path(*folder.parts[-parts:])) for folder in folders]


def printable(text: str) -> str:
    """The text with replacement characters for line breaks and other characters that cannot be printed."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _by_trial(names: Sequence[str]) -> list[str]:
    """Names of trials without the seed and the common parts: `case=rbla,lr=0.1,seed=0` gives `rbla, lr 0.1`."""
    words = [[word for word in name.split(",") if not word.startswith("seed=")] for name in names]
    common = set(words[0]).intersection(*words)
    return [", ".join(w.removeprefix("case=").replace("=", " ") for w in own if w not in common) for own in words]


def _short_keys(differing: Mapping[str, tuple[Any, ...]]) -> dict[str, str]:
    """Key -> its name in a label: the last word, or the last two words where the last is not unique.

    The method has an empty name. If both directions of a wire setting always agree, they share one name.
    """
    names = {}
    for key in differing:
        down, up = key.replace("wire.up.", "wire.down."), key.replace("wire.down.", "wire.up.")
        if down == up or differing.get(down) != differing.get(up):
            names[key] = key.split(".")[-2:]
        elif key == down:
            names[key] = key.split(".")[-1:]
    last = Counter(words[-1] for words in names.values())
    return {
        key: "" if key == "method.name" else " ".join(words if last[words[-1]] > 1 else words[-1:])
        for key, words in names.items()
    }


def spelled(value: Any) -> str:
    """A setting's value as text: `0.25`, `true`, `[1, 4]`, and `-` for None."""
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else format_value(value, quotes=False)


def in_order(values: Sequence[Any]) -> list[Any]:
    """The distinct values in the natural order of their texts: `4` before `16`."""
    distinct = {spelled(value): value for value in values}
    return [distinct[text] for text in sorted(distinct, key=natural_key)]
