"""Points suggested by Optuna (Akiba et al. 2019, arXiv 1907.10902), through Ray Tune's `OptunaSearch`.

Each space of `parameters` is a parameter of Optuna; a choice is suggested by its index. The cases are one more choice,
and the spaces of all cases are parameters, too. Optuna always suggests all of them; those of other cases than the
chosen one are dropped.

A point runs once, or at every seed of the grid of `seed`; its values are the means over its trials. (Tune's `Repeater`
knows one aim only, and gives trials no seeds of their own.) At most `batch` points are open at a time. A point fails if
one of its trials has no metric, or if its settings do not go together. A point that repeats an earlier one gets the
values of the earlier one, and runs no trial.

search.jsonl has a line for each point. A resumed search tells Optuna the values of all points whose trials have ended,
and goes on with the others. The points that follow may differ from those of an uninterrupted search.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rayfed import seeding
from rayfed.config.search import OptunaSettings
from rayfed.config.sweep import SEED, Sweep
from rayfed.config.types import MOST_TRIALS
from rayfed.errors import UserError
from rayfed.sweeps.optuna_space import Values, check_installed, distributions, pareto_front, point_of, sampler_of
from rayfed.sweeps.plan import Trial, check_trials, make_trials
from rayfed.sweeps.search import Search, read_search
from rayfed.sweeps.space import (
    CASE,
    Point,
    corners,
    fit_name,
    format_settings,
    point_name,
    short_names,
)  # fmt: skip
from rayfed.sweeps.table import TrialRow, format_labels, format_mb, format_mean, groups, trial_row, value_columns
from rayfed.sweeps.trial import trial_folder
from rayfed.tracking import Table, read_metrics

if TYPE_CHECKING:
    from ray.tune.search.optuna import OptunaSearch

Params = dict[str, Any]
"""What Optuna suggests: numbers, and the indices of choices."""


@dataclass
class Suggestion:
    """Point ``number`` (from 1) of the search."""

    number: int
    params: Params
    point: Point
    trials: list[Trial] = field(default_factory=list)
    """One a seed; none where the point repeats an earlier one, or is refused."""
    same_as: int | None = None
    """The number of an earlier point with the same settings."""
    refused: str | None = None
    """Why its settings do not go together."""
    ended: bool = False
    """Whether all of its trials have ended: then Optuna knows its values."""
    values: Values | None = None
    """Its values once it has ended; None if it failed."""


class OptunaPoints(Search):
    """The points of a sweep in the directory ``out``. UserError where its settings are wrong."""

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        super().__init__(settings, sweep, out)
        assert isinstance(sweep.search, OptunaSettings)
        check_installed()
        self.search = sweep.search
        self.objectives = [sweep.metric, *([self.search.against] if self.search.against else [])]
        self.seeds: list[Any] = sweep.parameters.get(SEED, {}).get("grid", [None])
        varied = [*sweep.parameters, *(key for _, case in sweep.labelled() for key in case)]
        self.short = short_names(list(dict.fromkeys([CASE, *varied, SEED])))
        # Where all choices and both ends of all ranges are valid, so are the points in between.
        found = (point for _, case in sweep.labelled() or [("", {})] for point in corners(sweep, case))
        points = list(itertools.islice(found, MOST_TRIALS + 1))  # `make_trials` refuses more than MOST_TRIALS
        seeded = [_with_seed(point, self.seeds[0]) for point in points]
        seeded += [_with_seed(points[0], seed) for seed in self.seeds[1:]]
        self.checked = make_trials(settings, seeded, ["check"] * len(seeded))
        self.federations = check_trials(self.checked, sweep)
        self.suggestions: list[Suggestion] = []
        self._first: dict[str, int] = {}  # settings -> the number of the first point with them
        for line in read_search(out):
            if "point" in line:
                self._restore(line)

    def complete(self) -> bool:
        return len(self.suggestions) >= self.search.trials and super().complete()

    def tuner(self) -> dict[str, Any]:
        from rayfed.sweeps.schedulers import SuggestedTrials

        return {"search_alg": SuggestedTrials(self)}

    def searcher(self) -> OptunaSearch:
        """Tune's searcher, with the values of all points whose trials have ended; it suggests the others first."""
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        space, storage = distributions(self.sweep), optuna.storages.InMemoryStorage()
        modes = [self.sweep.mode, *(["min"] if self.search.against else [])]
        toward = {"max": optuna.study.StudyDirection.MAXIMIZE, "min": optuna.study.StudyDirection.MINIMIZE}
        aims = (
            {"metric": self.objectives, "mode": modes}
            if self.search.against
            else {"metric": self.sweep.metric, "mode": self.sweep.mode}
        )
        study = optuna.create_study(storage=storage, study_name="sweep", directions=[toward[mode] for mode in modes])
        for own in self.suggestions:
            if own.ended:
                failed = {"state": optuna.trial.TrialState.FAIL}
                result: dict[str, Any] = failed if own.values is None else {"values": list(own.values)}
                study.add_trial(optuna.trial.create_trial(params=own.params, distributions=space, **result))
        seed = seeding.derive_seed(self.checked[0].experiment.seed, "sweep.optuna", len(self.suggestions)) % 2**32
        return OptunaSearch(
            space, points_to_evaluate=[own.params for own in self.suggestions if not own.ended], storage=storage,
            study_name="sweep", sampler=sampler_of(self.search, seed), **aims,
        )  # fmt: skip

    def add(self, params: Params) -> Suggestion:
        """The next point."""
        point, number = point_of(params, self.sweep), len(self.suggestions) + 1
        first = self._first.setdefault(json.dumps(point.overrides, sort_keys=True, default=str), number)
        own = Suggestion(number, params, point, same_as=None if first == number else first)
        if own.same_as is None:
            try:
                own.trials = [self._trial(number, _with_seed(point, seed)) for seed in self.seeds]
            except UserError as error:
                own.refused = str(error).splitlines()[0]
        self.suggestions.append(own)
        return own

    def end(self, own: Suggestion) -> None:
        """All trials of the point have ended: its values are means over the seeds. None if a trial has no metric."""
        own.ended = True
        if own.same_as is not None:
            own.values = self.suggestions[own.same_as - 1].values
            return
        rows = [trial_row(self.out, trial, self.sweep) for trial in own.trials]
        metrics = [row["metric"] for row in rows if row.get("metric") is not None]
        if rows and len(metrics) == len(rows):
            own.values = (mean(metrics),)
            if against := self.search.against:
                own.values += (mean(total_of(self.out, trial, against) for trial in own.trials),)

    def by_key(self, own: Suggestion) -> dict[str, float] | None:
        """The values of the point by their keys; None if it failed or has not ended."""
        return None if own.values is None else dict(zip(self.objectives, own.values, strict=True))

    def lines(self) -> list[dict[str, Any]]:
        found = []
        for own in self.suggestions:
            found.append(
                {
                    "point": own.number,
                    "params": own.params,
                    "settings": dict(own.point.overrides),
                    "trials": [trial.name for trial in own.trials],
                    **({"same_as": own.same_as} if own.same_as is not None else {}),
                    **({"refused": own.refused} if own.refused else {}),
                    "values": self.by_key(own),
                }
            )
        if self.complete():
            found.append({"ended": f"all of {self.search.trials} points", **self._best()})
        return found

    def _restore(self, line: Mapping[str, Any]) -> None:
        """Adds the point of a line of search.jsonl. UserError where it belongs to another search."""
        if line["params"].keys() != (now := distributions(self.sweep)).keys():
            self.refuse_resume(f"values of {', '.join(line['params'])}", f"searches {', '.join(now)}")
        own = self.add(line["params"])
        if dict(own.point.overrides) != line["settings"]:
            recorded = f"{format_settings(line['settings'])} as point {own.number}"
            self.refuse_resume(recorded, f"suggests {format_settings(own.point.overrides)}")
        if not self.missing(own.trials):
            self.end(own)

    def _trial(self, number: int, point: Point) -> Trial:
        name = fit_name(f"{number:03d},{point_name(point, self.short)}", point)
        return self.trial_at(name, point.overrides, point.labels)

    def _best(self) -> dict[str, Any]:
        """The best point, the first of equal ones, and, with a second objective, the Pareto front."""
        points = {own.number: own.values for own in self.suggestions if own.values is not None}
        best = max(points, key=lambda number: self.sign * points[number][0], default=None)
        found: dict[str, Any] = {"best": best}
        if best is not None:
            found["settings"] = dict(self.suggestions[best - 1].point.overrides)
            found |= dict(zip(self.objectives, points[best], strict=True))
        return found | ({"front": pareto_front(points, self.sweep.mode)} if self.search.against else {})

    def _result(self) -> str:
        found, metric = self._best(), self.sweep.metric
        if found["best"] is None:
            return "no point has a finite metric"
        best = f"best is {found['best']:03d} with {metric} {format_mean(found[metric], None, metric)}"
        if not self.search.against:
            return best
        front = ", ".join(f"{number:03d}" for number in found["front"])
        return f"{best}; against {self.search.against} the front is {front}"

    def table(self, rows: Mapping[str, TrialRow]) -> Table:
        """A row for each point, with means over the seeds. The best point and the front are marked."""
        shown = [own for own in self.suggestions if any(trial.name in rows for trial in own.trials)]
        labels = list(dict.fromkeys(key for own in shown for key in own.point.labels))
        columns = value_columns(self.checked[0], self.sweep)
        against = self.search.against if self.search.against != "bytes/total" else None
        found = self._best()
        body = []
        for own in shown:
            (group,) = groups(own.trials, rows)
            seconds, values = group.mean("seconds"), own.values
            marks = ["best"] * (own.number == found["best"]) + ["front"] * (own.number in found.get("front", ()))
            body.append(
                (
                    f"{own.number:03d}",
                    *format_labels(own.point.labels, labels),
                    *group.cells(columns),
                    format_mb(group.mean("bytes")),
                    *(["-" if values is None else f"{values[1]:.4g}"] if against else []),
                    "-" if seconds is None else f"{seconds:.1f}",
                    f"{len(group.rows)}/{group.trials}",
                    ", ".join(marks),
                )
            )
        extra = [against] if against else []
        titles = (title for _, title in columns)
        names = ("point", *labels, *titles, "MB both ways", *extra, "seconds", "trials", "")
        return Table(f"Optuna ({self.search.sampler}): {self._result()}", names, tuple(body))


def total_of(out: Path, trial: Trial, key: str) -> float:
    """The sum of the key over all rounds of the trial's run."""
    rounds = read_metrics(trial_folder(out, trial) / "metrics.jsonl")
    return float(rounds[-1][key] if key == "bytes/total" else sum(record[key] for record in rounds))


def _with_seed(point: Point, seed: Any) -> Point:
    own = {} if seed is None else {SEED: seed}
    return Point({**point.overrides, **own}, {**point.labels, **own})
