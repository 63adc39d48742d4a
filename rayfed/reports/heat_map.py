"""Density against rank: the cells of the heat map that a sweep over both makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayfed.reports.compare import Comparison, RunGroup
from rayfed.reports.labels import in_order, spelled

RANK, DOWN, UP, METHOD = "lora.rank", "wire.down.density", "wire.up.density", "method.name"


@dataclass(frozen=True, eq=False)
class HeatMap:
    """One method's map. ``cells``: (place in ``densities``, place in ``ranks``) -> the group there."""

    method: str | None
    axis: str
    densities: Sequence[str]
    ranks: Sequence[str]
    cells: Mapping[tuple[int, int], RunGroup]
    chosen_among: Sequence[str]  # settings that vary within a cell, of which the best on validation is shown


def heat_maps(comparison: Comparison) -> list[HeatMap]:
    """A map for each method, where rank and density both vary; none otherwise."""
    differing = comparison.differing
    ways = [key for key in (DOWN, UP) if key in differing]
    if RANK not in differing or not ways:
        return []
    both = all(group.settings[DOWN] == group.settings[UP] for group in comparison.groups)
    axis = "density, both ways" if both else " / ".join(f"density {key.split('.')[1]}" for key in ways)
    if both:
        ways = [DOWN]
    methods = in_order([group.settings[METHOD] for group in comparison.groups])
    found = []
    for method in methods:
        own = [group for group in comparison.groups if group.settings[METHOD] == method]
        # Densities first by the first direction, then by the second.
        pairs = in_order([[group.settings[key] for key in ways] for group in own])
        ranks = in_order([group.settings[RANK] for group in own])
        if len(pairs) < 2 or len(ranks) < 2:
            continue
        cells: dict[tuple[int, int], RunGroup] = {}
        for group in reversed([group for group in comparison.ranked if group in own]):  # the best stays
            place = pairs.index([group.settings[key] for key in ways]), ranks.index(group.settings[RANK])
            cells[place] = group
        fixed = {RANK, DOWN, UP, METHOD}
        chosen = [
            key for key in differing if key not in fixed and len({repr(group.settings.get(key)) for group in own}) > 1
        ]
        labels = [" / ".join(map(spelled, pair)) for pair in pairs]
        name = method if len(methods) > 1 else None
        found.append(HeatMap(name, axis, labels, [spelled(rank) for rank in ranks], cells, chosen))
    return found
