"""Points suggested by Optuna (Akiba et al. 2019, arXiv 1907.10902), in batches.

The study is in memory, and the sampler is seeded by the run's seed. So equal results give equal points. Optuna suggests
a batch before it knows any result of the batch, and gets the results in the order of its suggestions, whatever the
order in which the trials ended. (For the Parzen estimators a running point counts as a bad one, so a batch spreads
out.)

Each space of `parameters` is a parameter of Optuna; a choice is suggested by its index. The label of a case is a
choice. The spaces of a case are suggested only if the case was chosen, under names of their own.

A batch is a stage (see `rayfed.sweeps.stages`). A point runs once, or at every seed of the grid of `seed`; its values
are the means over its trials. A point fails if one of its trials has no metric, or if its settings do not go together.
After a batch, search.jsonl has its values, and a resumed search gives these to Optuna. So a failed trial that succeeds
when it runs again is in the table, but changes no later point. Optuna suggests all points again, and they must equal
those in search.jsonl.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rayfed import seeding
from rayfed.config.search import OptunaSettings
from rayfed.config.sweep import SEED, Sweep
from rayfed.config.types import MOST_TRIALS
from rayfed.errors import UserError
from rayfed.sweeps.plan import Trial, check_trials, make_trials
from rayfed.sweeps.space import (
    CASE,
    Point,
    corners,
    fit_name,
    format_settings,
    make_point,
    point_name,
    rounded,
    short_names,
    split_case,
)  # fmt: skip
from rayfed.sweeps.stages import SearchState, StagedSearch, read_search
from rayfed.sweeps.table import TrialRow, format_labels, format_mb, format_mean, groups, value_columns
from rayfed.sweeps.trial import trial_folder
from rayfed.tracking import Table, read_metrics

if TYPE_CHECKING:
    import optuna

Values = tuple[float, ...]
"""The metric and, with a second objective, its amount."""


@dataclass(frozen=True)
class Suggestion:
    """Point ``number`` (from 1) of the search. ``same_as``: the number of an earlier point with the same settings."""

    number: int
    point: Point
    same_as: int | None


class Study:
    """Optuna's study. UserError if Optuna is not installed."""

    def __init__(self, search: OptunaSettings, sweep: Sweep, seed: int) -> None:
        check_installed()
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep = sweep
        self.suggestions: list[Suggestion] = []
        self._trials: list[optuna.Trial] = []
        self._first: dict[str, int] = {}  # settings -> the number of the first point with them
        less, more = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
        directions = [more if sweep.mode == "max" else less, *([less] if search.against else [])]
        key = seeding.derive_seed(seed, "sweep.optuna") % 2**32
        self._study = optuna.create_study(directions=directions, sampler=_sampler(search, key))

    def suggest(self, count: int) -> list[Suggestion]:
        """The next ``count`` points."""
        for _ in range(count):
            trial = self._study.ask()
            point = suggest_point(trial, self.sweep)
            number = len(self.suggestions) + 1
            first = self._first.setdefault(json.dumps(point.overrides, sort_keys=True, default=str), number)
            self._trials.append(trial)
            self.suggestions.append(Suggestion(number, point, None if first == number else first))
        return self.suggestions[len(self.suggestions) - count :]

    def add_result(self, number: int, values: Values | None) -> None:
        """Gives Optuna the values of point ``number``; None: the point failed."""
        import optuna

        failed = optuna.trial.TrialState.FAIL if values is None else None
        self._study.tell(self._trials[number - 1], None if values is None else list(values), state=failed)


def check_installed() -> None:
    """UserError if Optuna is missing."""
    if find_spec("optuna") is None:
        raise UserError("sweep.search.kind: got 'optuna', but it is not installed: pip install -e '.[optuna]'")


def suggest_point(trial: optuna.Trial, sweep: Sweep) -> Point:
    """The point of Optuna's trial: a case, if there are several, then `parameters`, then the case's own spaces."""
    cases = sweep.labelled() or [("", {})]
    label, case = cases[_choose(trial, CASE, len(cases))] if len(cases) > 1 else cases[0]
    fixed, spaces = split_case(case)
    values = {key: _suggest_value(trial, key, space) for key, space in sweep.parameters.items() if key != SEED}
    values |= {key: _suggest_value(trial, f"{label}: {key}", space) for key, space in spaces.items()}
    return make_point(sweep, label, fixed, values)


def pareto_front(values: Mapping[int, Values], mode: str) -> list[int]:
    """The points that no other point dominates; equal points are all in the front.

    The first value is better by ``mode``, the second one if it is smaller.
    """
    sign = -1 if mode == "max" else 1
    costs = {number: (sign * own[0], *own[1:]) for number, own in values.items()}
    return [number for number, own in costs.items() if not any(_dominates(other, own) for other in costs.values())]


class OptunaSearch(StagedSearch):
    """The search of a sweep in the directory ``out``. UserError where its settings are wrong."""

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
        self.lines: dict[int, TrialRow] = {line["point"]: line for line in read_search(out) if "point" in line}
        self.refused: dict[int, str] = {}  # points whose values are valid one by one, but not together; the reason
        self.added = 0  # points whose values Optuna has
        seed = self.checked[0].experiment.seed if self.seeds == [None] else settings.get(SEED, 0)
        self.study = Study(self.search, sweep, seed)
        self.state()  # UserError if the directory was made with other settings

    def state(self) -> SearchState:
        trials: list[Trial] = []
        pending: list[Trial] = []
        total, size = self.search.trials, self.search.batch
        for first in range(0, total, size):
            count = min(size, total - first)
            if len(self.study.suggestions) == first:
                self.study.suggest(count)
            batch = self.study.suggestions[first : first + count]
            for suggestion in batch:
                self._check_recorded(suggestion)
            own = [trial for suggestion in batch for trial in self.trials(suggestion)]
            trials += own
            missing = [trial for trial in own if not self.has_ended(trial)]
            pending += missing
            if missing and not all(suggestion.number in self.lines for suggestion in batch):
                break
            for suggestion in batch:
                self._add_result(suggestion)
        ended = None if pending else f"all of {total} points"
        stage = f"points to {len(self.study.suggestions)} of {total}"
        lines = [self.lines[number] for number in sorted(self.lines)]
        if ended:
            lines.append({"ended": ended, **self._best()})
        return SearchState(trials, pending, stage, ended, self._result(), lines)

    def trials(self, suggestion: Suggestion) -> list[Trial]:
        """The point's trials, one a seed; none if an earlier point is the same, or the point is refused."""
        if suggestion.same_as is not None or suggestion.number in self.refused:
            return []
        points = [_with_seed(suggestion.point, seed) for seed in self.seeds]
        try:
            names = [fit_name(f"{suggestion.number:03d},{point_name(p, self.short)}", p) for p in points]
            return [self.trial_at(name, point) for name, point in zip(names, points, strict=True)]
        except UserError as error:
            self.refused[suggestion.number] = str(error).splitlines()[0]
            return []

    def values(self, suggestion: Suggestion) -> Values | None:
        """Means over the seeds, from the trials' directories; None if a trial has no metric."""
        trials = self.trials(suggestion)
        metrics = [metric for trial in trials if (metric := self.metric(trial)) is not None]
        if not trials or len(metrics) < len(trials):
            return None
        against = self.search.against
        return mean(metrics), *([mean(total_of(self.out, trial, against) for trial in trials)] if against else [])

    def _check_recorded(self, suggestion: Suggestion) -> None:
        """UserError if search.jsonl has another point of that number, or other objectives."""
        line, settings = self.lines.get(suggestion.number), suggestion.point.overrides
        if line and line["settings"] != dict(settings):
            recorded = f"{format_settings(line['settings'])} as point {suggestion.number}"
            self.refuse_resume(recorded, f"(or this version of optuna) suggests {format_settings(settings)}")
        if line and line["values"] is not None and list(line["values"]) != self.objectives:
            self.refuse_resume(f"values of {' and '.join(line['values'])}", f"compares {' and '.join(self.objectives)}")

    def _add_result(self, suggestion: Suggestion) -> None:
        """Gives Optuna the point's values, once. The values in search.jsonl never change."""
        number, same_as = suggestion.number, suggestion.same_as
        if number not in self.lines:
            values = self.values(suggestion)
            by_key = None if values is None else dict(zip(self.objectives, values, strict=True))
            self.lines[number] = {
                "point": number,
                "settings": dict(suggestion.point.overrides),
                "trials": [trial.name for trial in self.trials(suggestion)],
                **({"same_as": same_as} if same_as is not None else {}),
                **({"refused": self.refused[number]} if number in self.refused else {}),
                "values": by_key if same_as is None else self.lines[same_as]["values"],
            }
        if self.added < number:
            recorded = self.lines[number]["values"]
            self.study.add_result(number, None if recorded is None else tuple(recorded[k] for k in self.objectives))
            self.added = number

    def _best(self) -> dict[str, Any]:
        """The best point, the first of equal ones, and, with a second objective, the Pareto front."""
        points = {own.number: values for own in self.study.suggestions if (values := self.values(own)) is not None}
        best = max(points, key=lambda number: self.sign * points[number][0], default=None)
        found: dict[str, Any] = {"best": best}
        if best is not None:
            found["settings"] = dict(self.study.suggestions[best - 1].point.overrides)
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

    def table(self, trials: Sequence[Trial], rows: Mapping[str, TrialRow]) -> Table:
        """A row for each point, with means over the seeds. The best point and the front are marked."""
        shown = [own for own in self.study.suggestions if any(trial.name in rows for trial in self.trials(own))]
        labels = list(dict.fromkeys(key for own in shown for key in own.point.labels))
        columns = value_columns(self.checked[0], self.sweep)
        against = self.search.against if self.search.against != "bytes/total" else None
        found = self._best()
        body = []
        for own in shown:
            (group,) = groups(self.trials(own), rows)
            seconds, values = group.mean("seconds"), self.values(own)
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


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def _suggest_value(trial: optuna.Trial, name: str, space: Mapping[str, Any]) -> Any:
    ((kind, values),) = space.items()
    if kind == "choice":
        return values[_choose(trial, name, len(values))]
    return rounded(trial.suggest_float(name, *values, log=kind == "loguniform"))


def _choose(trial: optuna.Trial, name: str, count: int) -> int:
    return int(trial.suggest_categorical(name, list(range(count))))


def _sampler(search: OptunaSettings, seed: int) -> optuna.samplers.BaseSampler:
    from optuna import samplers

    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if search.sampler == "nsga2":
        return samplers.NSGAIISampler(population_size=search.batch, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls `multivariate` and `group`, for conditional spaces, experimental
        return samplers.TPESampler(
            n_startup_trials=search.startup, multivariate=True, group=True, constant_liar=True, seed=seed
        )
