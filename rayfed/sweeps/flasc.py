"""FLASC-Search (Kuo et al., arXiv 2406.05233, as revised for TMLR): which rank and density to try next.

Only the paper's abstract was available: the search repeatedly compares pairs of configurations and raises either the
rank or the density. The algorithm, as far as that says:

    chosen = (rank, density), small
    repeat:  a = (rank * factor, density)      equal cost: density * n entries travel, and n, the number of
             b = (rank, density * factor)      the adapter's entries, is proportional to the rank
             chosen = the better of a and b

Derived here: a probe continues from the checkpoint of the chosen probe; the search ends if a step does not fit into the
budget, no probe gains over the chosen one, or no neighbour is left; a step may raise the density of one direction
alone; `stay`. The cost is equal in entries of the adapter. A trained head does not grow with the rank, so a step by
rank is a little cheaper than a step by density, and indices cost extra: the table shows the bytes that were sent.

The probes of a step are a stage (see `rayfed.sweeps.stages`), and each probe is a trial. The metrics and bytes of a
probe include the rounds of the probes that it continues. Probes train at constant rates after the file's warm-up. The
final run starts anew and follows the file's schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayfed.config.search import ROUNDED, FlascSearchSettings
from rayfed.config.sweep import Sweep
from rayfed.errors import UserError
from rayfed.sweeps.plan import Trial, check_trials
from rayfed.sweeps.space import Point
from rayfed.sweeps.stages import CONSTANT, SearchState, StagedSearch
from rayfed.sweeps.table import TrialRow, format_mean, value_columns
from rayfed.sweeps.warm_start import check_rank_change
from rayfed.tracking import Table

FINAL = "final"


@dataclass(frozen=True)
class Probe:
    """A configuration, and the moves by which the search came to it: the moves name the probe and its trial."""

    path: tuple[str, ...]
    rank: int
    down: float
    """Download density."""
    up: float
    """Upload density."""
    rounds: int
    """Rounds, with those of the probes that it continues."""

    @property
    def name(self) -> str:
        return "-".join(self.path)

    @property
    def parent(self) -> str | None:
        """The name of the probe that it continues; None for the first one."""
        return "-".join(self.path[:-1]) or None

    @property
    def overrides(self) -> dict[str, Any]:
        """The configuration, as dotted settings."""
        return {"lora.rank": self.rank, "wire.down.density": self.down, "wire.up.density": self.up}


Metric = Callable[[Probe], float | None]
"""The metric of a probe: None where it failed or diverged, KeyError where it has not ended."""


@dataclass(frozen=True)
class Step:
    """One comparison: of the ``probes`` that start from ``base``."""

    base: Probe
    probes: tuple[Probe, ...]
    baseline: float | None
    """The metric that a probe has to exceed."""
    chosen: Probe | None
    """The probe that gained most; None if none did."""

    def line(self, number: int, metric: Metric) -> dict[str, Any]:
        """The step as a line of search.jsonl."""
        probes = [
            {"trial": probe.name, **probe.overrides, "rounds": probe.rounds, "metric": metric(probe)}
            for probe in self.probes
        ]
        chosen = self.chosen.name if self.chosen else None
        return {"step": number, "from": self.base.name, "baseline": self.baseline, "probes": probes, "chosen": chosen}


@dataclass(frozen=True)
class Progress:
    """How far the search has come."""

    first: Probe
    steps: tuple[Step, ...]
    chosen: Probe
    pending: tuple[Probe, ...]
    """The probes of the current step, ended or not."""
    ended: str | None
    """The reason why the search is over; None until then."""
    rounds: int
    """Rounds of all probes, the pending ones included."""

    @property
    def probes(self) -> list[Probe]:
        """Every probe so far, in order, the pending ones included."""
        return list(dict.fromkeys([self.first, *(p for step in self.steps for p in step.probes), *self.pending]))

    @property
    def step(self) -> str:
        """The number of the current step; 0 is the first probe."""
        return "0" if self.first in self.pending or not self.pending else str(len(self.steps) + 1)

    @property
    def result(self) -> str:
        chosen = self.chosen
        return f"chosen: rank {chosen.rank}, densities {chosen.down:.4g} down and {chosen.up:.4g} up"


def first_probe(search: FlascSearchSettings) -> Probe:
    """The configuration from which the search starts."""
    return Probe(("start",), search.rank, search.density, search.density, search.rounds)


def neighbours(probe: Probe, search: FlascSearchSettings) -> list[Probe]:
    """The probes of one step: `factor` times the communication of ``probe``, within the limits of rank and density.

    The cost of a round is rank * (down + up). `separate` adds (factor - 1) (down + up) to one direction.
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


def replay(search: FlascSearchSettings, mode: str, metric: Metric, reserve: int = 0) -> Progress:
    """Repeats the search as far as its probes have ended. Equal metrics give equal decisions.

    ``reserve`` rounds of the budget are for the final run. ``mode``: `max` or `min`.
    """
    sign = 1 if mode == "max" else -1
    budget = math.inf if search.budget is None else search.budget - reserve
    first = chosen = first_probe(search)
    steps: list[Step] = []
    rounds = search.rounds

    def progress(pending: tuple[Probe, ...] = (), ended: str | None = None) -> Progress:
        return Progress(first, tuple(steps), chosen, pending, ended, rounds)

    if not _has_ended(first, metric):
        return progress((first,))
    if metric(first) is None:
        return progress(ended="the first probe has no finite metric")
    while True:
        grown = neighbours(chosen, search)
        same = replace(chosen, path=(*chosen.path, "stay"), rounds=chosen.rounds + search.rounds)
        probes = (*grown, *([same] if search.stay else []))
        if not grown:
            return progress(ended=f"no neighbour up to rank {search.max_rank} and density {search.max_density:g}")
        if rounds + len(probes) * search.rounds > budget:
            return progress(ended=f"the budget of {search.budget} rounds has no room for another step")
        rounds += len(probes) * search.rounds
        if not all(_has_ended(probe, metric) for probe in probes):
            return progress(probes)
        finite = {probe: sign * value for probe in grown if (value := metric(probe)) is not None}
        baseline = metric(same if search.stay else chosen)
        best = max(finite, key=lambda probe: finite[probe], default=None)  # of equal ones the first: more rank
        if best is not None and baseline is not None and not finite[best] - sign * baseline > search.gain:
            best = None
        steps.append(Step(chosen, probes, baseline, best))
        if best is None:
            return progress(ended=f"no neighbour gains more than {search.gain:g}")
        chosen = best


class FlascSearch(StagedSearch):
    """The search of a sweep in the directory ``out``. UserError where its settings are wrong."""

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        super().__init__(settings, sweep, out)
        assert isinstance(sweep.search, FlascSearchSettings)
        search = self.search = sweep.search
        first = largest = first_probe(search)
        while by_rank := [probe for probe in neighbours(largest, search) if probe.path[-1] == "rank"]:
            largest = by_rank[0]
        # The smallest and the largest rank are checked; every density in (0, 1] is valid.
        self.checked = [self.trial(first), self.trial(largest), self.final(first)]
        check_rank_change(self.checked[0].experiment)
        self.federations = check_trials(self.checked, sweep)
        server = self.checked[-1].experiment.server
        self.cohort, self.reserve = server.cohort, server.rounds if search.final else 0
        self._check_budget(first)
        self.progress()  # UserError if the directory was made with other settings

    def _check_budget(self, first: Probe) -> None:
        budget, rounds = self.search.budget, self.search.rounds
        probes = 1 + len(neighbours(first, self.search)) + self.search.stay
        least = rounds * probes + self.reserve
        if budget is not None and budget < least:
            final = f" and {self.reserve} for the final run (server.rounds)" if self.reserve else ""
            raise UserError(
                f"sweep.search.budget: got {budget}, but the first step alone needs {least} rounds: {probes} probes of "
                f"{rounds}{final}"
            )

    def trial(self, probe: Probe) -> Trial:
        """The probe's trial."""
        overrides = {**probe.overrides, "server.rounds": probe.rounds, **CONSTANT}
        return self.trial_at(probe.name, Point(overrides, overrides), probe.parent)

    def final(self, probe: Probe) -> Trial:
        """A run of the probe's configuration from the start, with the file's schedules."""
        return self.trial_at(f"{FINAL}-{probe.name}", Point(probe.overrides, probe.overrides))

    def probe_metric(self, probe: Probe) -> float | None:
        """The `Metric` of probes."""
        trial = self.trial(probe)
        if not self.has_ended(trial):
            raise KeyError(probe.name)
        return self.metric(trial)

    def progress(self) -> Progress:
        """The progress of the search, from the trials' directories."""
        return replay(self.search, self.sweep.mode, self.probe_metric, self.reserve)

    def state(self) -> SearchState:
        progress = self.progress()
        chosen = progress.chosen
        trials = [self.trial(probe) for probe in progress.probes]
        lines = [step.line(number, self.probe_metric) for number, step in enumerate(progress.steps, 1)]
        last = []
        if progress.ended:
            final: TrialRow = {}
            if self.search.final:
                trials.append(self.final(chosen))
                final = self.row(trials[-1])
                last = trials[-1:] if self.probe_metric(chosen) is not None else []
            rounds = progress.rounds + (self.reserve if final.get("status") == "done" else 0)
            lines.append(
                {"chosen": chosen.name, **chosen.overrides, "ended": progress.ended, "rounds": rounds}
                | {"client_rounds": rounds * self.cohort, "final": final.get("metric")}
            )
        pending = [self.trial(probe) for probe in progress.pending]
        step = f"step {progress.step}"
        return SearchState(trials, pending, step, progress.ended, progress.result, lines, last)

    def table(self, trials: Sequence[Trial], rows: Mapping[str, TrialRow]) -> Table:
        """A row for each probe, in the order of the steps, and for the final run; MB are those of its own rounds."""
        progress = self.progress()
        values = value_columns(self.checked[0], self.sweep)
        total = {name: row.get("bytes") or 0 for name, row in rows.items()}
        steps = {probe.name: str(n) for n, step in enumerate(progress.steps, 1) for probe in step.probes}
        chosen = {progress.first.name, *(step.chosen.name for step in progress.steps if step.chosen)}
        body = []
        for trial in trials:
            row, name, final = rows[trial.name], trial.name, trial.name.startswith(FINAL)
            lora, wire, rounds = trial.experiment.lora, trial.experiment.wire, trial.experiment.server.rounds
            size = (total[name] - total.get(trial.continues or "", 0)) / 1e6 / (rounds if final else self.search.rounds)
            mark = "chosen" if name in chosen else ""
            body.append(
                (
                    "" if final else steps.get(name, progress.step),
                    FINAL if final else name.rpartition("-")[2],
                    str(lora.rank), f"{wire.down.density:.4g}", f"{wire.up.density:.4g}", str(rounds),
                    *(format_mean(row.get(key), None, title) for key, title in values),
                    f"{size:.3f}" if total[name] else "-",
                    mark if row["status"] == "done" else row["status"],
                )
            )  # fmt: skip
        titles = (title for _, title in values)
        columns = ("step", "probe", "rank", "down", "up", "rounds", *titles, "MB a round", "")
        return Table(f"FLASC-Search: {progress.result}", columns, tuple(body))


def _has_ended(probe: Probe, metric: Metric) -> bool:
    try:
        metric(probe)
    except KeyError:
        return False
    return True


def _density(value: float) -> float:
    return min(float(f"{value:.12g}"), 1.0)
