"""Population Based Training (Jaderberg et al., arXiv 1711.09846): who trains on from whose checkpoint, and how.

A member is a run whose settings change as it trains. After every generation, a fixed number of rounds:

    rank       the members by the metric; who failed or diverged is last
    exploit    the worst `quantile` of them continue, each, the checkpoint of one of the best `quantile`, drawn evenly
    explore    and its settings, each drawn anew (`resample`), or else a number times one of `factors`, a choice
               moved to a neighbour in its list
    the rest   continue their own checkpoint under their own settings

From the paper: truncation selection, the factors 0.8 and 1.2, drawing anew. Ours: all members in step, which makes the
outcome a function of the figures; a member without a figure copies whatever the quantile; numbers stay within their
range. Every draw is keyed by (seed, generation, member, setting).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayfed import seeding
from rayfed.config.search import PbtSettings
from rayfed.sweeps.space import draw, number, value_at

Spaces = Mapping[str, Any]


@dataclass(frozen=True)
class Member:
    """Member ``number`` (from 1) in a generation (from 1): its settings there, and whom it continues; None: nobody."""

    generation: int
    number: int
    settings: Mapping[str, Any]
    parent: Member | None = None

    @property
    def name(self) -> str:
        return f"g{self.generation:02d}-m{self.number:02d}"

    @property
    def line(self) -> list[Member]:
        """The members whose rounds are in its checkpoint, the first generation's first, itself last."""
        return [*(self.parent.line if self.parent else []), self]


def founders(search: PbtSettings, spaces: Spaces, seed: int) -> list[Member]:
    """The first generation: member i has the draw i that a list of random trials would have."""
    return [
        Member(1, i + 1, {key: draw(space, key, seed, i) for key, space in spaces.items()})
        for i in range(search.population)
    ]


def evolve(
    members: Sequence[Member],
    figures: Sequence[float | None],
    search: PbtSettings,
    spaces: Spaces,
    mode: str,
    seed: int,
) -> list[Member]:
    """The next generation. ``figures``: the metric of each; None: failed or diverged. ``mode``: `max` or `min`.

    ValueError where nobody has a figure.
    """
    sign = 1 if mode == "max" else -1
    finite = {member.number: sign * figure for member, figure in zip(members, figures) if figure is not None}
    if not finite:
        raise ValueError("no member has a figure")
    ranked = sorted((member for member in members if member.number in finite), key=lambda m: -finite[m.number])
    count = min(math.ceil(search.quantile * len(members)), len(members) // 2)
    lost = len(members) - len(ranked)
    stay = {member.number for member in ranked[: len(ranked) - max(count - lost, 0)]}
    best = ranked[: max(count, 1)]
    generation = members[0].generation + 1
    return [
        Member(generation, own.number, own.settings, own)
        if own.number in stay
        else _copy(own, best, generation, search, spaces, seed)
        for own in members
    ]


def explore(
    settings: Mapping[str, Any], search: PbtSettings, spaces: Spaces, seed: int, generation: int, member: int
) -> dict[str, Any]:
    """The settings of a member that has copied ``settings``, in the generation that begins."""
    found = {}
    for key, space in spaces.items():
        rng = seeding.numpy_rng(seed, "sweep.pbt.explore", generation, member, key)
        anew, where, factor = (float(u) for u in rng.random(3))
        ((kind, values),) = space.items()
        if anew < search.resample:
            found[key] = value_at(space, where)
        elif kind == "choice":
            i = values.index(settings[key])
            beside = [j for j in (i - 1, i + 1) if 0 <= j < len(values)] or [i]
            found[key] = values[beside[int(factor * len(beside))]]
        else:
            low, high = (number(limit) for limit in values)
            found[key] = min(max(number(settings[key] * search.factors[int(factor * 2)]), low), high)
    return found


def _copy(
    own: Member, best: Sequence[Member], generation: int, search: PbtSettings, spaces: Spaces, seed: int
) -> Member:
    drawn = seeding.numpy_rng(seed, "sweep.pbt.exploit", generation, own.number).integers(len(best))
    parent = best[int(drawn)]
    return Member(
        generation, own.number, explore(parent.settings, search, spaces, seed, generation, own.number), parent
    )
