"""Points suggested by Optuna (Akiba et al. 2019, arXiv 1907.10902), by its `ask` and `tell`.

A point asks Optuna for its case, if there are several, and then for the spaces of `parameters` and of that case alone.
A choice is suggested by its index. (Ray Tune's `OptunaSearch` has one list of spaces for all points.)

A point runs once, or at every seed of the grid of `seed`; its values are the means over these runs. Each run is a trial
of Tune. (Tune's `Repeater` knows one aim only, and gives trials no seeds of their own.) A point fails if one of its
runs has no metric, or if its settings do not go together. Runs that an earlier point has made do not run again.

search.jsonl has a line for each point. A resumed search asks Optuna for these points again, and tells it the values of
those whose runs have ended; the other runs come first. The points that follow may differ from those of an uninterrupted
search.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import optuna
from optuna import samplers
from optuna.trial import TrialState

from rayfed import seeding
from rayfed.config.describe import format_settings, short_names
from rayfed.config.search import OptunaSettings
from rayfed.config.sweep import SEED, Sweep, is_space
from rayfed.errors import UserError
from rayfed.sweeps import plan
from rayfed.sweeps.plan import CASE, Config, Point, Trial
from rayfed.sweeps.sweep import SEARCH_FILE, Search
from rayfed.tracking.jsonl import read_lines


class OptunaPoints(Search):
    """The points of a sweep in the directory ``out``. UserError where its settings are wrong."""

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        super().__init__(settings, sweep, out)
        assert isinstance(sweep.search, OptunaSettings)
        self.search = sweep.search
        self.aims: dict[str, Any] = {sweep.metric: sweep.mode}
        if self.search.against:
            self.aims[self.search.against] = "min"
        self.seeds: list[Any] = sweep.parameters.get(SEED, {}).get("grid", [None])
        varied = [*sweep.parameters, *(key for _, case in sweep.labelled() for key in case)]
        self.short = short_names(dict.fromkeys([CASE, *varied, SEED]))
        # Where all choices and both ends of all ranges are valid, so are the points in between.
        ends = enumerate(point for _, case in sweep.labelled() for point in plan.corners(sweep, case))
        # The seeds are checked with the first of these points.
        self.check(self._at_seed(point, seed) for i, point in ends for seed in self.seeds[: 1 if i else None])
        self.points: list[dict[str, Any]] = []
        """The lines of search.jsonl."""
        self.open: dict[int, optuna.Trial] = {}
        """The points whose runs have not ended, by their indices."""
        self._start_study()

    def _start_study(self) -> None:
        """Makes the study of Optuna, with the points that search.jsonl has."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study = optuna.create_study(directions=[mode + "imize" for mode in self.aims.values()])
        for line in read_lines(path := self.out / SEARCH_FILE):
            self.study.enqueue_trial(line.get("params", {}))
            asked, known, point = self.study.ask(), line.get("settings"), None
            with suppress(ValueError):  # a choice that is gone
                point = choose(asked, self.sweep)
            if point is None or point.overrides != known:
                has = f"{path} has {format_settings(known or {})}, but the resumed sweep has other spaces"
                raise UserError(f"--resume: {has}; resume with the sweep's own sweep.yaml or choose another --out")
            self._add(asked, point)
        seed = seeding.derive_seed(self.checked[0].experiment.seed, "sweep.optuna", len(self.points)) % 2**32
        self.study.sampler = sampler_of(self.search, seed)

    def complete(self) -> bool:
        return len(self.points) >= self.search.trials and not self.open

    def suggest(self) -> Config | None:
        while not self.waiting and len(self.open) < self.search.batch and len(self.points) < self.search.trials:
            asked = self.study.ask()
            self._add(asked, choose(asked, self.sweep))
            self.write()
        return super().suggest()

    def _add(self, asked: optuna.Trial, point: Point) -> None:
        """Adds the point that was asked for. Those of its runs that are new wait for Tune."""
        line: dict[str, Any] = {"params": asked.params, "settings": dict(point.overrides), "trials": [], "values": None}
        self.open[len(self.points)] = asked
        self.points.append(line)
        points = [self._at_seed(point, seed) for seed in self.seeds]
        try:
            trials = plan.make_trials(self.settings, points)
        except UserError as error:
            line["refused"], trials = str(error).splitlines()[0], []
        for trial in trials:
            line["trials"].append(trial.name)
            if trial.name not in self.trials:
                self.add(trial)
                self.waiting += self.missing([trial])
        self.tell()

    def _at_seed(self, point: Point, seed: Any) -> Point:
        own = {} if seed is None else {SEED: seed}
        point = Point({**point.overrides, **own}, {**point.labels, **own})
        return replace(point, name=plan.point_name(point, self.short))

    def tell(self, trial: Trial | None = None) -> None:
        """Tells Optuna the values of the points whose runs have ended."""
        for index, asked in [*self.open.items()]:
            rows = [self.rows[name] for name in self.points[index]["trials"]]
            if any(row["status"] == plan.UNFINISHED for row in rows):
                continue
            del self.open[index]
            if rows and all(row.get("metric") is not None for row in rows):
                values = [mean(row[key] for row in rows) for key in ("metric", "against")[: len(self.aims)]]
                self.points[index]["values"] = dict(zip(self.aims, values, strict=True))
                self.study.tell(asked, values)
            else:
                self.study.tell(asked, state=TrialState.FAIL)

    def lines(self) -> list[dict[str, Any]]:
        return self.points

    def title(self) -> str:
        return f"Optuna ({self.search.sampler})"

    def marks(self) -> dict[str, str]:
        """The second value of each point; `best` by the metric, and `front`: no other point is better in both."""
        ended = [trial for trial in self.study.get_trials(deepcopy=False) if trial.values]
        best = (max if self.sweep.mode == "max" else min)((trial.values[0] for trial in ended), default=None)
        front = {trial.number for trial in self.study.best_trials} if self.search.against else ()
        shown = self.search.against not in (None, "bytes/total")  # the table has a column of these
        found = {}
        for trial in ended:
            marks = [f"{trial.values[1]:.4g} {self.search.against}"] if shown else []
            marks += ["best"] * (trial.values[0] == best) + ["front"] * (trial.number in front)
            found[self.points[trial.number]["trials"][0]] = ", ".join(marks)
        return found


def choose(asked: optuna.trial.BaseTrial, sweep: Sweep) -> Point:
    """The point that Optuna suggests in this trial of Optuna."""
    cases = sweep.labelled()
    number = asked.suggest_categorical(CASE, range(len(cases))) if len(cases) > 1 else 0
    label, case = cases[number]
    values: dict[str, Any] = {}
    for key, space in {**sweep.parameters, **case}.items():
        if key == SEED or not is_space(space):
            continue
        ((kind, known),) = space.items()
        name = f"case {number}: {key}" if key in case else key
        if kind == "choice":
            values[key] = known[asked.suggest_categorical(name, range(len(known)))]
        else:
            values[key] = plan.rounded(asked.suggest_float(name, *known, log=kind == "loguniform"))
    return plan.make_point(sweep, label, case, values)


def sampler_of(search: OptunaSettings, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler for `sweep.search.sampler`."""
    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if search.sampler == "nsga2":
        return samplers.NSGAIISampler(population_size=search.batch, seed=seed)
    options: dict[str, Any] = {
        "multivariate": True,
        "group": True,
        "constant_liar": True,
    }  # Optuna calls the first two experimental
    with warnings.catch_warnings(action="ignore"):
        return samplers.TPESampler(n_startup_trials=search.startup, seed=seed, **options)
