"""FLASC-Search over real runs: the probes of a step are a stage (see `rayfed.sweeps.stages`).

A probe is a run directory like any other trial's, except that all but the first start from the last checkpoint of the
probe that was kept (`continues.json` there says which, see `rayfed.sweeps.warm_start`); its metrics and bytes include those
rounds. Probes train at a constant rate (after the file's own warm-up): they do not know their end. The final run starts
from nothing and follows the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayfed.config import search as kinds
from rayfed.config.sweep import Sweep
from rayfed.errors import UserError
from rayfed.sweeps.flasc_steps import Probe, Walk, decision, described, neighbours, walk
from rayfed.sweeps.plan import Trial, check_trials
from rayfed.sweeps.space import Point
from rayfed.sweeps.stages import SearchState, StagedSearch
from rayfed.sweeps.table import TrialRow, reported, spread
from rayfed.sweeps.warm_start import check_growing
from rayfed.tracking import Table

FINAL = "final"


class FlascSearchRun(StagedSearch):
    """Plans, checks and runs the search of a sweep in the directory ``out``. UserError where something is wrong."""

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        super().__init__(settings, sweep, out)
        assert isinstance(sweep.search, kinds.FlascSearchSettings)
        search = self.search = sweep.search
        first = Probe(("start",), search.rank, search.density, search.density, search.rounds)
        largest = first
        while by_rank := [probe for probe in neighbours(largest, search) if probe.path[-1] == "rank"]:
            largest = by_rank[0]
        # What differs between probes is checked at both ends of the ranks; every density in (0, 1] is right.
        self.checked = [self.trial(first), self.trial(largest), self.final(first)]
        check_growing(self.checked[0].experiment)
        self.federations = check_trials(self.checked, sweep)
        experiment = self.checked[-1].experiment
        self.cohort, self.source = experiment.server.cohort, experiment.data.source
        self.reserve = experiment.server.rounds if search.final else 0
        self._check_budget(first)
        self.walk()  # the directories were made with these settings, or it is refused

    def _check_budget(self, first: Probe) -> None:
        budget, rounds = self.search.budget, self.search.rounds
        step = len(neighbours(first, self.search)) + self.search.stay
        least = rounds * (1 + step) + self.reserve
        if budget is not None and budget < least:
            final = f" and {self.reserve} for the final run (server.rounds)" if self.reserve else ""
            raise UserError(
                f"sweep.search.budget: got {budget}, but the first step alone needs {least} rounds: {1 + step} probes "
                f"of {rounds}{final}"
            )

    def trial(self, probe: Probe) -> Trial:
        """The probe's trial: a constant rate, and no controls beside it."""
        overrides = {key: value for key, value in described(probe).items() if "." in key}
        overrides |= {"server.rounds": probe.rounds, "eval.controls": False}
        overrides |= {f"{side}.schedule.kind": "constant" for side in ("client", "server")}
        return self.make(probe.name, Point(overrides, overrides), probe.parent)

    def final(self, probe: Probe) -> Trial:
        """A run of the probe's configuration from the start, as the file has it."""
        overrides = {key: value for key, value in described(probe).items() if "." in key}
        return self.make(f"{FINAL}-{probe.name}", Point(overrides, overrides))

    def metric(self, probe: Probe) -> float | None:
        """As `walk` asks for it."""
        trial = self.trial(probe)
        if not self.ended(trial):
            raise KeyError(probe.name)
        figure = self.line(trial).get("metric")
        return None if figure is None else float(figure)

    def walk(self) -> Walk:
        """The search as far as the directories tell it."""
        return walk(self.search, self.sweep.mode, self.metric, self.reserve)

    def stand(self) -> SearchState:
        at = self.walk()
        trials = [self.trial(probe) for probe in at.probes]
        lines = [decision(number, step, self.metric) for number, step in enumerate(at.steps, 1)]
        last = []
        if at.ended:
            final: TrialRow = {}
            if self.search.final:
                trials.append(self.final(at.kept))
                final = self.line(trials[-1])
                last = trials[-1:] if self.metric(at.kept) is not None else []
            rounds = at.rounds + (self.reserve if final.get("status") == "done" else 0)
            lines.append(
                {"kept": at.kept.name, **{k: v for k, v in described(at.kept).items() if "." in k}, "ended": at.ended}
                | {"rounds": rounds, "client_rounds": rounds * self.cohort, "final": final.get("metric")}
            )
        now = [self.trial(probe) for probe in at.now]
        return SearchState(trials, now, f"step {_number(at)}", at.ended, _verdict(at), lines, last)

    def table(self, trials: Sequence[Trial], lines: Sequence[TrialRow], sweep: Sweep) -> Table:
        """A row a probe, in the order of the steps, and the final run; MB are those of the row's own rounds."""
        at = self.walk()
        report = reported(sweep, self.source)
        shown = [("metric", sweep.metric), *([("report", report)] if report else [])]
        total = {line["trial"]: line.get("bytes") or 0 for line in lines}
        steps = {probe.name: str(n) for n, step in enumerate(at.steps, 1) for probe in step.probes}
        kept = {at.first.name, *(step.winner.name for step in at.steps if step.winner)}
        rows = []
        for trial, line in zip(trials, lines, strict=True):
            lora, wire, rounds = trial.experiment.lora, trial.experiment.wire, trial.experiment.server.rounds
            final = trial.name.startswith(FINAL)
            own = rounds if final else self.search.rounds
            size = (total[trial.name] - total.get(trial.continues or "", 0)) / 1e6 / own
            state = "kept" if trial.name in kept else ""
            rows.append(
                (
                    "" if final else steps.get(trial.name, _number(at)),
                    FINAL if final else trial.name.rpartition("-")[2],
                    str(lora.rank), f"{wire.down.density:.4g}", f"{wire.up.density:.4g}", str(rounds),
                    *(spread(line.get(figure), None, key) for figure, key in shown),
                    f"{size:.3f}" if total[trial.name] else "-",
                    state if line["status"] == "done" else line["status"],
                )
            )  # fmt: skip
        names = ("step", "probe", "rank", "down", "up", "rounds", *(key for _, key in shown), "MB a round", "")
        return Table(f"FLASC-Search: {_verdict(at)}", names, tuple(rows))


def _number(at: Walk) -> str:
    """Of the step under way; 0 is the first probe."""
    return "0" if at.first in at.now or not at.now else str(len(at.steps) + 1)


def _verdict(at: Walk) -> str:
    kept = at.kept
    return f"kept rank {kept.rank}, densities {kept.down:.4g} down and {kept.up:.4g} up"
