"""What tells groups of runs apart: the settings that differ, and a short name for each group."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfed.reports.runs import Run, natural

NAMED = 3  # settings that a label may spell out
UNNAMED = "run"  # the name of runs that were given none


def differing_settings(firsts: Sequence[Run]) -> dict[str, tuple[Any, ...]]:
    """Dotted setting -> its value in each run (None where it has none), where they decide and are not all equal.

    The method and its options come first, the others in the order of the schema.
    """
    each = [run.deciding() for run in firsts]
    keys = sorted({key: 0 for settings in each for key in settings}, key=lambda key: not key.startswith("method."))
    rows = {key: tuple(settings.get(key) for settings in each) for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def labels_of(members: Sequence[Sequence[Run]], differing: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """A name for each group, fit to print: the one it was given, else what differs, else its folder."""
    return [printable(label) for label in _labels(members, differing)]


def printable(text: str) -> str:
    """The text on one line; what cannot be printed becomes a sign that says so."""
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
    keys = {key: name for key in differing if (name := _alike(key, differing)) is not None}
    short = _short_keys(keys)
    told = [", ".join(_spell(short[key], differing[key][i]) for key in keys) for i in range(len(members))]
    if len(keys) <= NAMED and len(set(told)) == len(members):
        return told
    trials = [group[0].folder.resolve().name for group in members]
    told = _by_trial(trials)
    if all("=" in name for name in trials) and all(told) and len(set(told)) == len(members):
        return told
    folders = [group[0].folder.resolve() for group in members]
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    return [str(Path(*folder.parts[-parts:])) for folder in folders]


def _by_trial(names: Sequence[str]) -> list[str]:
    """Trials' names without their seeds and what all have in common: `case=rbla,lr=0.1,seed=0` is `rbla, lr 0.1`."""
    words = [[word for word in name.split(",") if not word.startswith("seed=")] for name in names]
    common = set(words[0]).intersection(*words)
    return [", ".join(w.removeprefix("case=").replace("=", " ") for w in own if w not in common) for own in words]


def _alike(key: str, differing: Mapping[str, tuple[Any, ...]]) -> str | None:
    """The key's name in a label; where both directions always agree, one name for both (None for the second)."""
    down, up = key.replace("wire.up.", "wire.down."), key.replace("wire.down.", "wire.up.")
    if down != up and differing.get(down) == differing.get(up):
        return key.rpartition(".")[2] if key == down else None
    return key


def _short_keys(keys: Mapping[str, str]) -> dict[str, str]:
    """Each key's last word, with the one before it where that says too little; nothing for the method's name."""
    last = Counter(name.rpartition(".")[2] for name in keys.values())
    short = {}
    for key, name in keys.items():
        words = 1 if last[name.rpartition(".")[2]] == 1 else 2
        short[key] = "" if key == "method.name" else " ".join(name.split(".")[-words:])
    return short


def _spell(key: str, value: Any) -> str:
    return f"{key} {spelled(value)}".strip()


def spelled(value: Any) -> str:
    """A setting's value in a table: `0.25`, `true`, `[1, 4]`, and `-` where a run has no such setting."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(map(spelled, value))}]" if isinstance(value, list) else str(value)


def in_order(values: Sequence[Any]) -> list[Any]:
    """Distinct values, numbers and names in them by size."""
    distinct = {json.dumps(value, default=str): value for value in values}
    return sorted(distinct.values(), key=lambda value: natural(spelled(value)))
