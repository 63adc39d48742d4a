"""FLASC-Search in a sweep: its probes as trials in the sweep's directory, its decisions, and its table.

The metrics of finished probes are read from the directory before Ray starts. So a resumed search repeats no finished
probe and comes to the same decisions; failed probes run again.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayfed.config.search import FlascSearchSettings
from rayfed.config.sweep import Sweep
from rayfed.sweeps.flasc_search import FINAL, FlascSearch, Probe, first_probe
from rayfed.sweeps.plan import Trial, check_trials, make_trials
from rayfed.sweeps.search import Search
from rayfed.sweeps.space import Point
from rayfed.sweeps.table import format_mean, value_columns
from rayfed.sweeps.trial import trial_folder
from rayfed.sweeps.warm_start import RUN_DIR
from rayfed.tracking import Table


class FlascProbes(Search):
    """The probes of a sweep in the directory ``out``. UserError where its settings are wrong."""

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        super().__init__(settings, sweep, out)
        assert isinstance(sweep.search, FlascSearchSettings)
        first = first_probe(sweep.search).overrides
        (trial,) = make_trials(settings, [Point(first, first)], ["check"])
        options = sweep.search.model_dump(exclude={"kind"})
        self.searcher = FlascSearch(trial.experiment, sweep.metric, sweep.mode, **options)
        self.cohort = trial.experiment.server.cohort
        overrides = [_overrides(probe) for probe in self.searcher.extremes()]
        self.checked = make_trials(settings, [Point(own, own) for own in overrides], ["check"] * len(overrides))
        self.federations = check_trials(self.checked, sweep)
        self._read()

    def trial(self, name: str) -> Trial:
        if name not in self.trials:
            (probe,) = (probe for probe in self.searcher.progress().probes if probe.name == name)
            self.add(replace(self.trial_at(name, _overrides(probe)), continues=probe.parent))
        return self.trials[name]

    def tuner(self) -> dict[str, Any]:
        return {"search_alg": self.searcher}

    def complete(self) -> bool:
        return not self.searcher.waiting()  # the search has ended, and so has the final run

    def forget_failures(self) -> None:
        """Also of probes to which the search has not come yet: it comes to them only once others have run again."""
        for path in (self.out / "trials").glob("*.json"):
            with suppress(ValueError, AttributeError):  # a damaged file is refused where it is read
                if json.loads(path.read_text(encoding="utf-8")).get("status") == "failed":
                    path.unlink()

    def run(self) -> None:
        super().run()
        progress = self.searcher.progress()
        self.progress.note(f"FLASC-Search: {progress.result}: {progress.ended}")

    def write(self) -> Table:
        for probe in self.searcher.waiting():
            self.trial(probe.name)  # now the sweep counts it
        return super().write()

    def lines(self) -> list[dict[str, Any]]:
        """One line for each step, and one for the end of the search."""
        progress, metrics = self.searcher.progress(), self.searcher.metrics
        lines: list[dict[str, Any]] = [
            {
                "step": number,
                "from": step.base.name,
                "baseline": step.baseline,
                "probes": [
                    {"trial": probe.name, **probe.overrides, "rounds": probe.rounds, "metric": metrics[probe.name]}
                    for probe in step.probes
                ],
                "chosen": step.chosen.name if step.chosen else None,
            }
            for number, step in enumerate(progress.steps, 1)
        ]
        if progress.ended:
            chosen, rounds = progress.chosen, progress.rounds
            lines.append(
                {"chosen": chosen.name, **chosen.overrides, "ended": progress.ended, "rounds": rounds}
                | {"client_rounds": rounds * self.cohort, "final": metrics.get(f"{FINAL}-{chosen.name}")}
            )
        return lines

    def table(self) -> Table:
        """A row for each probe, in the order of the steps, and for the final run; MB are those of its own rounds."""
        rows, progress, values = self.rows, self.searcher.progress(), value_columns(self.checked[0], self.sweep)
        ways = ("down", "up") if self.searcher.settings.directions == "separate" else ("down",)
        steps = {probe.name: str(n) for n, step in enumerate(progress.steps, 1) for probe in step.probes}
        chosen = {progress.first.name, *(step.chosen.name for step in progress.steps if step.chosen)}
        body = []
        for probe in progress.probes:
            row, before = rows.get(probe.name, {}), rows.get(probe.parent or "", {})
            size = (row.get("bytes") or 0) - (before.get("bytes") or 0)
            rounds = probe.rounds if probe.is_final else self.searcher.settings.rounds
            mark = "chosen" if probe.name in chosen else ""
            body.append(
                (
                    "0" if probe == progress.first else steps.get(probe.name, ""),
                    FINAL if probe.is_final else probe.path[-1],
                    str(probe.rank), *(f"{getattr(probe, way):.4g}" for way in ways), str(probe.rounds),
                    *(format_mean(row.get(key), None, title) for key, title in values),
                    f"{size / 1e6 / rounds:.3f}" if row.get("bytes") else "-",
                    mark if row.get("status") == "done" else row.get("status", ""),
                )
            )  # fmt: skip
        titles = (title for _, title in values)
        densities = [f"density {way}" for way in ways] if len(ways) > 1 else ["density"]
        columns = ("step", "probe", "rank", *densities, "rounds", *titles, "MB a round", "")
        return Table(f"FLASC-Search: {progress.result}", columns, tuple(body))

    def _read(self) -> None:
        """Tells the search of the probes that have ended. UserError where one was made with other settings."""
        while not self.complete():
            trials = [self.trial(probe.name) for probe in self.searcher.waiting()]
            missing = self.missing(trials)
            if missing == trials:
                return
            for trial in (trial for trial in trials if trial not in missing):
                found = {"name": trial.name, RUN_DIR: str(trial_folder(self.out, trial))}
                self.searcher.add_evaluated_point(found, self.rows[trial.name].get("metric"))


def _overrides(probe: Probe) -> dict[str, Any]:
    return {key: value for key, value in probe.config.items() if key != "name"}
