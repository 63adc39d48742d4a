"""Points suggested by Optuna (Akiba et al. 2019, arXiv 1907.10902), through Ray Tune's `OptunaSearch`.

Each space of `parameters` is a parameter of Optuna; a choice is suggested by its index. The cases are one more choice,
and the spaces of all cases are parameters, too. Optuna always suggests all of them; those of other cases than the
chosen one are dropped.

A point is one trial of Tune. It runs once, or at every seed of the grid of `seed`, one after the other; its values are
the means over its runs. (Tune's `Repeater` knows one aim only, and gives trials no seeds of their own.) A point fails
if one of its runs has no metric, or if its settings do not go together. Runs that an earlier point has made do not run
again.

search.jsonl has a line for each point. A resumed search tells Optuna the values of all points whose runs have ended,
and then suggests the others again. The points that follow may differ from those of an uninterrupted search.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from rayfed import seeding
from rayfed.config.describe import format_settings, short_names
from rayfed.config.search import OptunaSettings
from rayfed.config.sweep import SEED, Sweep, is_space
from rayfed.config.types import MOST_TRIALS
from rayfed.errors import UserError
from rayfed.sweeps.plan import check_trials, make_trials
from rayfed.sweeps.search import SEARCH_FILE, Search
from rayfed.sweeps.space import CASE, Point, corners, make_point, point_name, rounded
from rayfed.sweeps.table import TrialGroup, groups, make_table
from rayfed.sweeps.trainable import NAME, RUNS
from rayfed.tracking import Table

if TYPE_CHECKING:
    import optuna

STUDY = "sweep"


class OptunaPoints(Search, Searcher):
    """The points of a sweep in the directory ``out``. UserError where its settings are wrong."""

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        Search.__init__(self, settings, sweep, out)
        Searcher.__init__(self)
        assert isinstance(sweep.search, OptunaSettings)
        if find_spec("optuna") is None:
            raise UserError("sweep.search.kind: got 'optuna', but it is not installed: pip install -e '.[optuna]'")
        self.search = sweep.search
        self.aims: dict[str, str] = {sweep.metric: sweep.mode}
        if self.search.against:
            self.aims[self.search.against] = "min"
        self.seeds: list[Any] = sweep.parameters.get(SEED, {}).get("grid", [None])
        varied = [*sweep.parameters, *(key for _, case in sweep.labelled() for key in case)]
        self.short = short_names(dict.fromkeys([CASE, *varied, SEED]))
        # Where all choices and both ends of all ranges are valid, so are the points in between.
        found = (point for _, case in sweep.labelled() or [("", {})] for point in corners(sweep, case))
        points = list(itertools.islice(found, MOST_TRIALS + 1))  # `make_trials` refuses more than MOST_TRIALS
        seeded = [_with_seed(point, self.seeds[0]) for point in points]
        self.checked = make_trials(settings, seeded + [_with_seed(points[0], seed) for seed in self.seeds[1:]])
        self.federations = check_trials(self.checked, sweep)
        self.points: list[dict[str, Any]] = []
        """The lines of search.jsonl."""
        self.ids: dict[str, int] = {}  # Tune's id of a trial -> the index of its point
        for line in read_lines(out / SEARCH_FILE):
            spaces = distributions(sweep)
            if line["params"].keys() != spaces.keys():
                self._refuse(f"values of {', '.join(line['params'])}", f"searches {', '.join(spaces)}")
            if (now := self._add(line["params"])["settings"]) != line["settings"]:
                self._refuse(format_settings(line["settings"]), f"reads that as {format_settings(now)}")

    def complete(self) -> bool:
        return len(self.points) >= self.search.trials and not self.missing(self.trials.values())

    def tuner(self) -> dict[str, Any]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        space, storage = distributions(self.sweep), optuna.storages.InMemoryStorage()
        way = {"max": optuna.study.StudyDirection.MAXIMIZE, "min": optuna.study.StudyDirection.MINIMIZE}
        toward = [way[mode] for mode in self.aims.values()]
        study = optuna.create_study(storage=storage, study_name=STUDY, directions=toward)
        seed = seeding.derive_seed(self.checked[0].experiment.seed, "sweep.optuna", len(self.points)) % 2**32
        known, self.points = self.points, []
        for point in known:
            if (values := self.values(point)) or "refused" in point:
                state = {"values": [*values.values()]} if values else {"state": optuna.trial.TrialState.FAIL}
                study.add_trial(optuna.trial.create_trial(params=point["params"], distributions=space, **state))
                self.points.append(point)
        again = [point["params"] for point in known if point not in self.points]
        several, batch, most = len(self.aims) > 1, self.search.batch, self.sweep.concurrency
        self.optuna = OptunaSearch(
            space, metric=[*self.aims] if several else self.sweep.metric, mode=[*self.aims.values()] if several else
            self.sweep.mode, points_to_evaluate=again, storage=storage, study_name=STUDY,
            sampler=sampler_of(self.search, seed),
        )  # fmt: skip
        return {"search_alg": self, "max_concurrent_trials": min(batch, most or batch)}

    def suggest(self, trial_id: str) -> Any:
        """The config of the next point; `FINISHED` after the last one."""
        while (index := len(self.points)) < self.search.trials:
            point = self._add(self.optuna.suggest(str(index)) or {})
            self.write()
            if "refused" not in point:
                self.ids[trial_id] = index
                runs = {name: dict(self.trials[name].overrides) for name in point["trials"]}
                return {NAME: f"{index + 1:03d}", RUNS: runs}
            self.optuna.on_trial_complete(str(index), error=True)
        return self.FINISHED

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tells Optuna the values of the point."""
        index = self.ids[trial_id]
        for name in self.points[index]["trials"]:
            self.add(self.trials[name])
        values = self.values(self.points[index])
        self.optuna.on_trial_complete(str(index), values, error=values is None)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Does nothing: Optuna gets the values of whole points."""

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: a sweep is resumed from its directory."""

    restore = save

    def values(self, point: Mapping[str, Any]) -> dict[str, float] | None:
        """The means over the point's runs, by aim; None where a run has no metric."""
        rows = [self.rows[name] for name in point["trials"]]
        if not rows or any(row.get("metric") is None for row in rows):
            return None
        return {aim: mean(row[key] for row in rows) for aim, key in zip(self.aims, ("metric", "against"), strict=False)}

    def lines(self) -> list[dict[str, Any]]:
        return [point | {"values": self.values(point)} for point in self.points]

    def table(self) -> Table:
        """A row for each point, with means over the seeds. The best point and the front are marked."""
        trials, against = [*self.trials.values()], self.search.against
        ends = [own for own in groups(trials, self.rows) if len(own.rows) == len(own.trials)]
        sign = 1 if self.sweep.mode == "max" else -1
        means = [(sign * (own.mean("metric") or 0.0), own.mean("against") or 0.0) for own in ends]
        best = max(means, default=(0.0, 0.0))[0]
        front = pareto_front(means) if against else []

        def mark(own: TrialGroup) -> str:
            if own not in ends:
                return ""
            worth, amount = means[ends.index(own)]
            marks = [f"{amount:.4g} {against}"] if against and against != "bytes/total" else []
            return ", ".join(marks + ["best"] * (worth == best) + ["front"] * ((worth, amount) in front))

        return make_table(trials, self.rows, self.sweep, f"Optuna ({self.search.sampler})", mark)

    def _add(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Adds the point that these parameters of Optuna describe. Returns its line, with the names of its runs."""
        point = point_of(params, self.sweep)
        line: dict[str, Any] = {"params": dict(params), "settings": dict(point.overrides), "trials": []}
        points, trials = [_with_seed(point, seed) for seed in self.seeds], []
        try:
            trials = make_trials(self.settings, points, [point_name(own, self.short) for own in points])
        except UserError as error:
            line["refused"] = str(error).splitlines()[0]
        for trial in trials:
            if trial.name not in self.trials:
                self.add(trial)
            line["trials"].append(trial.name)
        self.points.append(line)
        return line

    def _refuse(self, recorded: str, now: str) -> None:
        raise UserError(
            f"--resume: {self.out / SEARCH_FILE} has {recorded}, but the resumed sweep {now}; resume with the sweep's "
            "own sweep.yaml or choose another --out"
        )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of search.jsonl; none if there is no such file. UserError if it is damaged."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        if not all(isinstance(line, dict) and {"params", "settings"} <= line.keys() for line in lines):
            raise ValueError("a line is no point")
    except ValueError as error:
        raise UserError(f"--resume: {path} is damaged ({error}); choose another --out") from None
    return lines


def distributions(sweep: Sweep) -> dict[str, optuna.distributions.BaseDistribution]:
    """The parameters of Optuna: the case if there are several, `parameters`, and every case's own spaces."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    cases = sweep.labelled()
    found: dict[str, Any] = {CASE: CategoricalDistribution(range(len(cases)))} if len(cases) > 1 else {}
    for name, space in _spaces(sweep).items():
        ((kind, values),) = space.items()
        if kind == "choice":
            found[name] = CategoricalDistribution(range(len(values)))
        else:
            found[name] = FloatDistribution(values[0], values[1], log=kind == "loguniform")
    return found


def _spaces(sweep: Sweep) -> dict[str, Mapping[str, Any]]:
    """Every space by its name in Optuna: those of a case begin with the case's number."""
    spaces = {key: space for key, space in sweep.parameters.items() if key != SEED}
    for number, (_, case) in enumerate(sweep.labelled()):
        spaces |= {f"case {number}: {key}": space for key, space in case.items() if is_space(space)}
    return spaces


def point_of(params: Mapping[str, Any], sweep: Sweep) -> Point:
    """The point that Optuna suggests with these parameters."""
    number, values = params.get(CASE, 0), {}
    for name, space in _spaces(sweep).items():
        case, _, key = name.rpartition(": ")
        if case in ("", f"case {number}"):
            values[key] = space["choice"][params[name]] if "choice" in space else rounded(params[name])
    label, fixed = sweep.labelled()[number] if sweep.labelled() else ("", {})
    return make_point(sweep, label, fixed, values)


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (worth, cost) that no other point dominates: none has both no less worth and no more cost."""
    return [own for own in points if not any(x >= own[0] and y <= own[1] and (x, y) != own for x, y in points)]


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


def _with_seed(point: Point, seed: Any) -> Point:
    own = {} if seed is None else {SEED: seed}
    return Point({**point.overrides, **own}, {**point.labels, **own})
