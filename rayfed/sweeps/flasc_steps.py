"""FLASC-Search (Kuo et al., arXiv 2406.05233, as revised for TMLR): which rank and density to try next.

From the paper only its abstract is known here: the search compares pairs of configurations again and again and raises
either the rank or the density. What follows from that:

    kept = (rank, density), small
    repeat:  a = (rank * factor, density)      equal cost: the entries that travel are density * n, and n, the
             b = (rank, density * factor)      adapter's entries, is proportional to the rank
             kept = the better of a and b

Ours are the rest: that a probe goes on from the kept probe's checkpoint; the end (a step that does not fit into the
budget, no gain over the kept configuration, no neighbour left); the neighbours by one direction alone; `stay`. Cost is
equal in the adapters' entries. A trained head does not grow with the rank, so a step by rank is then a little cheaper
than one by density, and indices add what they add: the table has the bytes that were sent.

Everything here is a function of the settings and the probes' figures: replayed, it comes to the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rayfed.config.search import ROUNDED, FlascSearchSettings

FIRST = "start"


@dataclass(frozen=True)
class Probe:
    """A configuration and how the search came to it: the step names, all of them, are its own and its trial's name.

    ``down`` and ``up`` are densities; ``rounds`` counts those of the probes it continues from too.
    """

    path: tuple[str, ...]
    rank: int
    down: float
    up: float
    rounds: int

    @property
    def name(self) -> str:
        return "-".join(self.path)

    @property
    def parent(self) -> str | None:
        """The name of the probe it continues from; None for the first one."""
        return "-".join(self.path[:-1]) or None


@dataclass(frozen=True)
class Step:
    """One comparison: the probe that was kept so far, those that grew from it, and which of them is kept now, if any.

    ``bench`` is the metric that had to be bettered.
    """

    base: Probe
    probes: tuple[Probe, ...]
    bench: float | None
    winner: Probe | None


@dataclass(frozen=True)
class Walk:
    """How far the search has come: its steps, what is kept, the probes that it waits for or else why it ended.

    ``rounds`` are those of all probes, the ones under way included.
    """

    first: Probe
    steps: tuple[Step, ...]
    kept: Probe
    now: tuple[Probe, ...]  # the step that is under way: all its probes, ended or not
    ended: str | None
    rounds: int

    @property
    def probes(self) -> list[Probe]:
        """Every probe so far, in order, those of the step under way included."""
        seen = [self.first, *(probe for step in self.steps for probe in step.probes), *self.now]
        return list(dict.fromkeys(seen))


def neighbours(probe: Probe, search: FlascSearchSettings) -> list[Probe]:
    """What a step compares, at `factor` times the communication of ``probe``; without those beyond rank or density.

    The cost of a round is rank * (down + up). `separate` adds (factor - 1) (down + up) to one of the two alone.
    """
    f, more = search.factor, (search.factor - 1) * (probe.down + probe.up)
    found = [
        ("rank", probe.rank * f, probe.down, probe.up),
        ("density", probe.rank, probe.down * f, probe.up * f),
    ]
    if search.directions == "separate":
        found.append(("down", probe.rank, probe.down + more, probe.up))
        found.append(("up", probe.rank, probe.down, probe.up + more))
    return [
        Probe((*probe.path, move), rank, _density(down), _density(up), probe.rounds + search.rounds)
        for move, rank, down, up in found
        if rank <= search.max_rank and max(down, up) <= search.max_density * ROUNDED
    ]


def walk(search: FlascSearchSettings, mode: str, metric: Callable[[Probe], float | None], reserve: int = 0) -> Walk:
    """Replays the search as far as its probes have ended.

    ``metric(probe)`` is its figure: None where it failed or diverged, KeyError where it has not ended.
    ``reserve`` rounds of the budget are kept for the final run. ``mode``: `max` or `min`.
    """
    sign = 1 if mode == "max" else -1
    budget = math.inf if search.budget is None else search.budget - reserve
    first = kept = Probe((FIRST,), search.rank, search.density, search.density, search.rounds)
    steps: list[Step] = []
    rounds = search.rounds
    if not _ended(first, metric):
        return Walk(first, (), kept, (first,), None, rounds)
    if metric(first) is None:
        return Walk(first, (), kept, (), "the first probe has no finite metric", rounds)
    while True:
        grown = neighbours(kept, search)
        still = replace(kept, path=(*kept.path, "stay"), rounds=kept.rounds + search.rounds)
        probes = (*grown, *([still] if search.stay else []))
        ended = None
        if not grown:
            ended = f"no neighbour up to rank {search.max_rank} and density {search.max_density:g}"
        elif rounds + len(probes) * search.rounds > budget:
            ended = f"the budget of {search.budget} rounds has no room for another step"
        if ended:
            return Walk(first, tuple(steps), kept, (), ended, rounds)
        rounds += len(probes) * search.rounds
        if not all(_ended(probe, metric) for probe in probes):
            return Walk(first, tuple(steps), kept, probes, None, rounds)
        figures = {probe: metric(probe) for probe in grown}
        finite = {probe: sign * figure for probe, figure in figures.items() if figure is not None}
        bench = metric(still if search.stay else kept)
        best = max(finite, key=lambda probe: finite[probe], default=None)  # the first of equals: more rank
        gains = best is not None and (bench is None or finite[best] - sign * bench > search.gain)
        steps.append(Step(kept, probes, bench, best if gains else None))
        if best is None or not gains:
            return Walk(first, tuple(steps), kept, (), f"no neighbour gains more than {search.gain:g}", rounds)
        kept = best


def decision(number: int, step: Step, metric: Callable[[Probe], float | None]) -> dict[str, Any]:
    """The step as a line of search.jsonl."""
    return {
        "step": number,
        "from": step.base.name,
        "to_better": step.bench,
        "probes": [described(probe) | {"metric": metric(probe)} for probe in step.probes],
        "kept": step.winner.name if step.winner else None,
    }


def described(probe: Probe) -> dict[str, Any]:
    """The probe's name and configuration, as plain values."""
    return {
        "trial": probe.name,
        "lora.rank": probe.rank,
        "wire.down.density": probe.down,
        "wire.up.density": probe.up,
        "rounds": probe.rounds,
    }


def _ended(probe: Probe, metric: Callable[[Probe], float | None]) -> bool:
    try:
        metric(probe)
    except KeyError:
        return False
    return True


def _density(value: float) -> float:
    return min(float(f"{value:.12g}"), 1.0)
