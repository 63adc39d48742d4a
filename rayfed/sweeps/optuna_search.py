"""Points suggested by Optuna (Akiba et al. 2019, arXiv 1907.10902), through Ray Tune's `OptunaSearch`.

Each space of `parameters` is a parameter of Optuna; a choice is suggested by its index. The cases are one more choice,
and the spaces of all cases are parameters, too. Optuna always suggests all of them; those of other cases than the
chosen one are dropped.

A point runs once, or at every seed of the grid of `seed`; its values are the means over its trials. (Tune's `Repeater`
knows one aim only, and gives trials no seeds of their own.) At most `batch` points are open at a time. A point fails if
one of its trials has no metric, or if its settings do not go together. A point that repeats an earlier one has its
trials: they do not run again.

search.jsonl has a line for each point. A resumed search tells Optuna the values of all points whose trials have ended,
and goes on with the others. The points that follow may differ from those of an uninterrupted search.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from rayfed import seeding
from rayfed.config.search import OptunaSettings
from rayfed.config.sweep import SEED, Sweep
from rayfed.config.types import MOST_TRIALS
from rayfed.errors import UserError
from rayfed.sweeps.plan import Trial, check_trials, make_trials
from rayfed.sweeps.schedulers import named
from rayfed.sweeps.search import Search, read_search
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
from rayfed.sweeps.table import TrialGroup, format_mean, make_table
from rayfed.sweeps.trial import trial_folder
from rayfed.tracking import Table, read_metrics

if TYPE_CHECKING:
    import optuna

STUDY = "sweep"
POINT = "point"  # the column with the numbers of points


class OptunaPoints(Search, Searcher):
    """The points of a sweep in the directory ``out``. UserError where its settings are wrong."""

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        Search.__init__(self, settings, sweep, out)
        Searcher.__init__(self)
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
        self.points: list[dict[str, Any]] = []
        """The lines of search.jsonl."""
        self.open: dict[int, list[Trial]] = {}
        """By the number of a point that has not ended: its trials."""
        for line in read_search(out):
            if "point" in line:
                self._restore(line)

    def complete(self) -> bool:
        return len(self.points) >= self.search.trials and super().complete()

    def tuner(self) -> dict[str, Any]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        space, storage = distributions(self.sweep), optuna.storages.InMemoryStorage()
        modes = [self.sweep.mode, *(["min"] if self.search.against else [])]
        toward = {"max": optuna.study.StudyDirection.MAXIMIZE, "min": optuna.study.StudyDirection.MINIMIZE}
        study = optuna.create_study(storage=storage, study_name=STUDY, directions=[toward[mode] for mode in modes])
        for point in (own for own in self.points if own["point"] not in self.open):
            failed = {"state": optuna.trial.TrialState.FAIL}
            values: dict[str, Any] = {"values": [*point["values"].values()]} if point["values"] else failed
            study.add_trial(optuna.trial.create_trial(params=point["params"], distributions=space, **values))
        seed = seeding.derive_seed(self.checked[0].experiment.seed, "sweep.optuna", len(self.points)) % 2**32
        several = self.search.against is not None
        self.optuna = OptunaSearch(
            space, points_to_evaluate=[self.points[number - 1]["params"] for number in self.open], storage=storage,
            metric=self.objectives if several else self.sweep.metric, mode=modes if several else self.sweep.mode,
            study_name=STUDY, sampler=sampler_of(self.search, seed),
        )  # fmt: skip
        for number in self.open:  # the points that were open when the search was interrupted come first
            self.optuna.suggest(str(number))
        self.waiting = [trial for trials in self.open.values() for trial in self.missing(trials)]
        self.running: dict[str, Trial] = {}  # by Tune's id
        return {"search_alg": self}

    def suggest(self, trial_id: str) -> Any:
        """The config of the next trial; None while others have to end first, `FINISHED` after the last one."""
        while not self.waiting and len(self.points) < self.search.trials:
            if len(self.open) >= self.search.batch:
                return None
            number = len(self.points) + 1
            params = self.optuna.suggest(str(number))
            assert params is not None
            self.waiting += self.missing(self._add(number, params))
            self._end_points()
            self.write()
        if not self.waiting:
            return self.FINISHED
        self.running[trial_id] = self.waiting.pop(0)
        return named(self.running[trial_id])

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tells Optuna the values of the points that have ended with this trial."""
        self.add(self.running.pop(trial_id))
        self._end_points()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Does nothing: Optuna gets the values of whole points."""

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: a sweep is resumed from its directory."""

    def lines(self) -> list[dict[str, Any]]:
        end = [{"ended": f"all of {self.search.trials} points", **self._best()}] if self.complete() else []
        return [*self.points, *end]

    def table(self) -> Table:
        """A row for each point, with means over the seeds. The best point and the front are marked."""
        found, metric = self._best(), self.sweep.metric
        title = "no point has a finite metric"
        if found["best"] is not None:
            title = f"best is {found['best']:03d} with {metric} {format_mean(found[metric], None, metric)}"
            if front := found.get("front"):
                title += f"; against {self.search.against} the front is {', '.join(f'{own:03d}' for own in front)}"

        def mark(group: TrialGroup) -> str:
            number, against = int(group.labels[POINT]), self.search.against
            values = self.points[number - 1]["values"] or {}
            amount = [f"{values[against]:.4g} {against}"] if against in values and against != "bytes/total" else []
            marks = ["best"] * (number == found["best"]) + ["front"] * (number in found.get("front", ()))
            return ", ".join([*amount, *marks])

        title = f"Optuna ({self.search.sampler}): {title}"
        return make_table([*self.trials.values()], self.rows, self.sweep, title, mark)

    def _add(self, number: int, params: Mapping[str, Any]) -> list[Trial]:
        """Adds the point that these parameters of Optuna describe. Returns its trials; none if it is refused."""
        point, made = point_of(params, self.sweep), []
        line: dict[str, Any] = {"point": number, "params": dict(params), "settings": dict(point.overrides)}
        points = [_with_seed(point, seed) for seed in self.seeds]
        names = [fit_name(point_name(own, self.short), own) for own in points]
        numbered = [Point(own.overrides, {POINT: f"{number:03d}", **own.labels}) for own in points]
        try:
            made = make_trials(self.settings, numbered, names)
        except UserError as error:
            line["refused"] = str(error).splitlines()[0]
        trials = [self.trials.get(own.name) or self.add(own) for own in made]
        self.points.append(line | {"trials": [trial.name for trial in trials], "values": None})
        self.open[number] = trials
        return trials

    def _end_points(self) -> None:
        """Takes the values of the points of which no trial runs or waits any longer, and tells Optuna."""
        busy = {trial.name for trial in (*self.running.values(), *self.waiting)}
        for number, trials in list(self.open.items()):
            if not any(trial.name in busy for trial in trials):
                self._end(number)
                values = self.points[number - 1]["values"]
                self.optuna.on_trial_complete(str(number), values, error=values is None)

    def _end(self, number: int) -> None:
        """The values of the point: means over the seeds. None if a trial has no metric."""
        trials, against = self.open.pop(number), self.search.against
        metrics = [metric for trial in trials if (metric := self.rows[trial.name].get("metric")) is not None]
        if trials and len(metrics) == len(trials):
            sums = [mean(total_of(self.out, trial, against) for trial in trials)] if against else []
            self.points[number - 1]["values"] = dict(zip(self.objectives, [mean(metrics), *sums], strict=True))

    def _restore(self, line: Mapping[str, Any]) -> None:
        """Adds the point of a line of search.jsonl. UserError where it belongs to another search."""
        number, params = line["point"], line["params"]
        if params.keys() != (now := distributions(self.sweep)).keys():
            self.refuse_resume(f"values of {', '.join(params)}", f"searches {', '.join(now)}")
        trials = self._add(number, params)
        if (settings := self.points[-1]["settings"]) != line["settings"]:
            recorded = f"{format_settings(line['settings'])} as point {number}"
            self.refuse_resume(recorded, f"suggests {format_settings(settings)}")
        if not self.missing(trials):
            self._end(number)

    def _best(self) -> dict[str, Any]:
        """The best point, the first of equal ones, and, with a second objective, the Pareto front."""
        points = {own["point"]: tuple(own["values"].values()) for own in self.points if own["values"]}
        best = max(points, key=lambda number: self.sign * points[number][0], default=None)
        found: dict[str, Any] = {"best": best}
        if best is not None:
            found["settings"] = self.points[best - 1]["settings"]
            found |= self.points[best - 1]["values"]
        return found | ({"front": pareto_front(points, self.sweep.mode)} if self.search.against else {})


def check_installed() -> None:
    """UserError if Optuna is missing."""
    if find_spec("optuna") is None:
        raise UserError("sweep.search.kind: got 'optuna', but it is not installed: pip install -e '.[optuna]'")


def distributions(sweep: Sweep) -> dict[str, optuna.distributions.BaseDistribution]:
    """The parameters of Optuna: the case if there are several, `parameters`, and every case's own spaces."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    cases = sweep.labelled()
    spaces = {key: space for key, space in sweep.parameters.items() if key != SEED}
    for number, (_, case) in enumerate(cases):
        spaces |= {_name(number, key): space for key, space in split_case(case)[1].items()}
    found: dict[str, optuna.distributions.BaseDistribution] = {}
    if len(cases) > 1:
        found[CASE] = CategoricalDistribution(range(len(cases)))
    for name, space in spaces.items():
        ((kind, values),) = space.items()
        if kind == "choice":
            found[name] = CategoricalDistribution(range(len(values)))
        else:
            found[name] = FloatDistribution(values[0], values[1], log=kind == "loguniform")
    return found


def point_of(params: Mapping[str, Any], sweep: Sweep) -> Point:
    """The point that Optuna suggests with these parameters."""
    number = params.get(CASE, 0)
    label, case = sweep.labelled()[number] if sweep.labelled() else ("", {})
    fixed, spaces = split_case(case)
    values = {key: _value(params[key], space) for key, space in sweep.parameters.items() if key != SEED}
    values |= {key: _value(params[_name(number, key)], space) for key, space in spaces.items()}
    return make_point(sweep, label, fixed, values)


def pareto_front(values: Mapping[int, tuple[float, ...]], mode: str) -> list[int]:
    """The points that no other point dominates; equal points are all in the front.

    The first value is better by ``mode``, the second one if it is smaller.
    """
    sign = -1 if mode == "max" else 1
    costs = {number: (sign * own[0], *own[1:]) for number, own in values.items()}

    def dominated(own: tuple[float, ...]) -> bool:
        return any(other != own and all(x <= y for x, y in zip(other, own)) for other in costs.values())

    return [number for number, own in costs.items() if not dominated(own)]


def sampler_of(search: OptunaSettings, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler for `sweep.search.sampler`."""
    from optuna import samplers

    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if search.sampler == "nsga2":
        return samplers.NSGAIISampler(population_size=search.batch, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls `multivariate` experimental
        return samplers.TPESampler(n_startup_trials=search.startup, multivariate=True, constant_liar=True, seed=seed)


def total_of(out: Path, trial: Trial, key: str) -> float:
    """The sum of the key over all rounds of the trial's run."""
    rounds = read_metrics(trial_folder(out, trial) / "metrics.jsonl")
    return float(rounds[-1][key] if key == "bytes/total" else sum(record[key] for record in rounds))


def _with_seed(point: Point, seed: Any) -> Point:
    own = {} if seed is None else {SEED: seed}
    return Point({**point.overrides, **own}, {**point.labels, **own})


def _name(case: int, key: str) -> str:
    return f"case {case}: {key}"


def _value(suggested: Any, space: Mapping[str, Any]) -> Any:
    return space["choice"][suggested] if "choice" in space else rounded(suggested)
