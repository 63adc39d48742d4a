"""Optuna over real runs: a batch of points is a stage (see `rayfed.sweeps.stages`), a point an ordinary run.

A point runs at every seed of the grid of `seed`, or once; Optuna is told the means, or that it failed, where any of its
runs has no figures or its settings do not go together. Once a batch has ended, search.jsonl holds what was told of it,
and that is what a resumed search tells again: a failed trial that succeeds when it is tried again is in the table, but
the points that were asked for after it stay what they were. The points themselves are asked for anew, and must be those
of search.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rayfed.config.search import OptunaSettings
from rayfed.config.sweep import SEED, Sweep
from rayfed.errors import UserError
from rayfed.sweeps.plan import Trial, check_trials, make_trials
from rayfed.sweeps.space import CASE, Point, corners, fitting, short_names, spelled, text
from rayfed.sweeps.stages import SEARCH, SearchState, StagedSearch, read_search
from rayfed.sweeps.suggest import Figures, Study, Suggestion, check_installed, front
from rayfed.sweeps.table import TrialRow, groups, reported, spread
from rayfed.sweeps.trial import place
from rayfed.tracking import Table, read_metrics


class OptunaSearch(StagedSearch):
    """Plans, checks and runs the search of a sweep in the directory ``out``. UserError where something is wrong."""

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        super().__init__(settings, sweep, out)
        assert isinstance(sweep.search, OptunaSettings)
        check_installed()
        self.search = sweep.search
        self.seeds: list[Any] = sweep.parameters.get(SEED, {}).get("grid", [None])
        varied = [*sweep.parameters, *(key for _, case in sweep.labelled() for key in case)]
        self.short = short_names(list(dict.fromkeys([CASE, *varied, SEED])))
        self.checked = self._ends()
        self.federations = check_trials(self.checked, sweep)
        experiment = self.checked[0].experiment
        self.source = experiment.data.source
        self.told: dict[int, TrialRow] = {line["point"]: line for line in read_search(out) if "point" in line}
        self.refused: dict[int, str] = {}  # points whose values are right one by one, but not together, and why
        self.heard = 0  # points that Optuna was told of
        self.study = Study(self.search, sweep, experiment.seed if self.seeds == [None] else settings.get(SEED, 0))
        self.stand()  # the directory was made with these settings, or it is refused

    def _ends(self) -> list[Trial]:
        """Trials at all choices and both ends of every range: where these are right, so is what lies between."""
        points = [point for _, case in self.sweep.labelled() or [("", {})] for point in corners(self.sweep, case)]
        seeded = [_seeded(point, self.seeds[0]) for point in points]
        seeded += [_seeded(points[0], seed) for seed in self.seeds[1:]]
        return make_trials(self.settings, seeded, ["check"] * len(seeded))

    def stand(self) -> SearchState:
        known: list[Trial] = []
        now: list[Trial] = []
        total, size = self.search.trials, self.search.batch
        for first in range(0, total, size):
            count = min(size, total - first)
            if len(self.study.asked) == first:
                self.study.ask(count)
            batch = self.study.asked[first : first + count]
            for own in batch:
                self._check(own)
            trials = [trial for own in batch for trial in self.trials(own)]
            known += trials
            missing = [trial for trial in trials if not self.ended(trial)]
            now += missing
            if missing and not all(own.number in self.told for own in batch):
                break
            for own in batch:
                self._settle(own)
        ended = None if now else f"all of {total} points"
        stage = f"points to {len(self.study.asked)} of {total}"
        lines = [self.told[one] for one in sorted(self.told)]
        if ended:
            lines.append({"ended": ended, **self._found()})
        return SearchState(known, now, stage, ended, self._verdict(), lines)

    def trials(self, own: Suggestion) -> list[Trial]:
        """The runs of the point, one a seed; none where an earlier point is the same, or its settings are refused."""
        if own.same is not None or own.number in self.refused:
            return []
        points = [_seeded(own.point, seed) for seed in self.seeds]
        try:
            return [self.make(fitting(f"{own.number:03d},{spelled(p, self.short)}", p), p) for p in points]
        except UserError as error:
            self.refused[own.number] = str(error).splitlines()[0]
            return []

    def figures(self, own: Suggestion) -> Figures | None:
        """Means over the seeds, as the directory has them now; None where any run of the point has no metric."""
        trials = self.trials(own if own.same is None else self.study.asked[own.same - 1])
        lines = [self.line(trial) for trial in trials]
        if not lines or any(line.get("metric") is None for line in lines):
            return None
        metric = mean(line["metric"] for line in lines)
        if self.search.against is None:
            return (metric,)
        return metric, mean(spent(self.out, trial, self.search.against) for trial in trials)

    def _check(self, own: Suggestion) -> None:
        """UserError where an earlier start of the search was suggested another point of that number."""
        line = self.told.get(own.number)
        if line and line["settings"] != dict(own.point.overrides):
            raise UserError(
                f"--resume: {self.out / SEARCH} has {_told(line['settings'])} as point {own.number}, but what it is "
                f"resumed with suggests {_told(own.point.overrides)}; resume with the sweep's own sweep.yaml and the "
                "optuna it was made with, or choose another --out"
            )
        if line and line["told"] is not None and list(line["told"]) != self._aims():
            raise UserError(
                f"--resume: {self.out / SEARCH} has figures of {' and '.join(line['told'])}, but what it is resumed "
                f"with compares {' and '.join(self._aims())}; choose another --out"
            )

    def _settle(self, own: Suggestion) -> None:
        """Optuna is told of the point, once; what it was told first is what it is told ever after."""
        if own.number not in self.told:
            figures = self.figures(own)
            if own.same is not None:
                figures = self._figures_of(self.told[own.same])
            self.told[own.number] = {
                "point": own.number,
                "settings": dict(own.point.overrides),
                "trials": [trial.name for trial in self.trials(own)],
                **({"same_as": own.same} if own.same is not None else {}),
                **({"refused": self.refused[own.number]} if own.number in self.refused else {}),
                "told": None if figures is None else dict(zip(self._aims(), figures, strict=True)),
            }
        if self.heard < own.number:
            self.study.tell(own.number, self._figures_of(self.told[own.number]))
            self.heard = own.number

    def _aims(self) -> list[str]:
        return [self.sweep.metric, *([self.search.against] if self.search.against else [])]

    def _figures_of(self, line: TrialRow) -> Figures | None:
        return None if line["told"] is None else tuple(line["told"][key] for key in self._aims())

    def _found(self) -> dict[str, Any]:
        """The best point and, with a second aim, the Pareto front."""
        points = {own.number: self.figures(own) for own in self.study.asked if own.same is None}
        whole = {name: figures for name, figures in points.items() if figures is not None}
        sign = 1 if self.sweep.mode == "max" else -1
        best = max(whole, key=lambda name: sign * whole[name][0], default=None)  # the first of equals
        found: dict[str, Any] = {"best": best}
        if best is not None:
            found["settings"] = dict(self.study.asked[best - 1].point.overrides)
            found |= dict(zip(self._aims(), whole[best], strict=True))
        return found | ({"front": front(whole, self.sweep.mode)} if self.search.against else {})

    def _verdict(self) -> str:
        found = self._found()
        if found["best"] is None:
            return "no point has a finite metric"
        metric = self.sweep.metric
        best = f"best is {found['best']:03d} with {metric} {spread(found[metric], None, metric)}"
        if not self.search.against:
            return best
        return f"{best}; against {self.search.against} the front is {', '.join(f'{one:03d}' for one in found['front'])}"

    def table(self, trials: Sequence[Trial], lines: Sequence[TrialRow], sweep: Sweep) -> Table:
        """A row a point, in the order of asking, with means over the seeds; the best one and the front are marked."""
        by_name = dict(zip((trial.name for trial in trials), lines, strict=True))
        shown = [own for own in self.study.asked if any(trial.name in by_name for trial in self.trials(own))]
        columns = list(dict.fromkeys(key for own in shown for key in own.point.shown))
        report = reported(sweep, self.source)
        measured = [("metric", sweep.metric), *([("report", report)] if report else [])]
        other = self.search.against if self.search.against != "bytes/total" else None
        found = self._found()
        rows = []
        for own in shown:
            mine = self.trials(own)
            (group,) = groups(mine, [by_name[trial.name] for trial in mine])
            size, seconds = group.mean("bytes"), group.mean("seconds")
            figures = self.figures(own) if other else None
            marks = ["best"] * (own.number == found["best"]) + ["front"] * (own.number in found.get("front", ()))
            rows.append(
                (
                    f"{own.number:03d}",
                    *(text(own.point.shown[key]) if key in own.point.shown else "" for key in columns),
                    *(spread(group.mean(figure), group.deviation(figure), key) for figure, key in measured),
                    "-" if size is None else f"{size / 1e6:.3f}",
                    *(["-" if figures is None else f"{figures[1]:.4g}"] if other else []),
                    "-" if seconds is None else f"{seconds:.1f}",
                    f"{len(group.lines)}/{group.trials}",
                    ", ".join(marks),
                )
            )
        names = (
            "point", *columns, *(key for _, key in measured), "MB both ways", *([other] if other else []), "seconds",
            "trials", "",
        )  # fmt: skip
        return Table(f"Optuna ({self.search.sampler}): {self._verdict()}", names, tuple(rows))


def spent(out: Path, trial: Trial, key: str) -> float:
    """How much of it the trial's run took, all rounds together."""
    rounds = read_metrics(place(out, trial) / "metrics.jsonl")
    return float(rounds[-1][key] if key == "bytes/total" else sum(record[key] for record in rounds))


def _seeded(point: Point, seed: Any) -> Point:
    own = {} if seed is None else {SEED: seed}
    return Point({**point.overrides, **own}, {**point.shown, **own})


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={text(value)}" for key, value in settings.items())
