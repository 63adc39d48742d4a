"""The settings that differ between groups of runs, and a short label for each group."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    """A printable label for each group: its own name, else the settings that differ, else its folder."""
    return [printable(label) for label in _labels(members, differing)]


def printable(text: str) -> str:
    """The text with replacement characters for line breaks and other characters that cannot be printed."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _labels(members: Sequence[Sequence[Run]], differing: Mapping[str, tuple[Any, ...]]) -> list[str]:
    names = [{run.name for run in group} for group in members]
    single = [next(iter(own)) for own in names if len(own) == 1]
    given = not any(run.trial for group in members for run in group) and UNNAMED not in single
    if len(members) == 1:
        first = members[0][0]
        return [single[0] if single and given else first.folder.resolve().name]
    if given and len(set(single)) == len(members):
        return single
    short = _short_keys(differing)
    labels = [
        ", ".join(f"{name} {spelled(differing[key][i])}".strip() for key, name in short.items())
        for i in range(len(members))
    ]
    if len(short) <= NAMED and len(set(labels)) == len(members):
        return labels
    folders = [group[0].folder.resolve() for group in members]
    labels = _by_trial([folder.name for folder in folders])
    if all("=" in folder.name for folder in folders) and all(labels) and len(set(labels)) == len(members):
        return labels
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    return [str(Path(*folder.parts[-parts:])) for folder in folders]


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
            names[key] = key
        elif key == down:
            names[key] = key.rpartition(".")[2]
    last = Counter(name.rpartition(".")[2] for name in names.values())
    for key, name in names.items():
        words = 1 if last[name.rpartition(".")[2]] == 1 else 2
        names[key] = "" if key == "method.name" else " ".join(name.split(".")[-words:])
    return names


def spelled(value: Any) -> str:
    """A setting's value as text: `0.25`, `true`, `[1, 4]`, and `-` for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(map(spelled, value))}]" if isinstance(value, list) else str(value)


def in_order(values: Sequence[Any]) -> list[Any]:
    """The distinct values in the natural order of their texts: `4` before `16`."""
    distinct = {json.dumps(value, default=str): value for value in values}
    return sorted(distinct.values(), key=lambda value: natural_key(spelled(value)))
