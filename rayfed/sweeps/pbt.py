"""Population Based Training (Jaderberg et al., arXiv 1711.09846), by Ray Tune: members copy each other.

A member is a trial whose settings change as it trains. After every generation, a fixed number of rounds:

    rank       the members by the metric
    exploit    each of the worst `quantile` continues the checkpoint of a random one of the best `quantile`
    explore    and changes each setting: with probability `resample` a new draw; else a number is multiplied by one of
               `factors`, and a choice moves to a neighbour in its list
    others     continue their own checkpoint with their own settings

All of that is Tune's `PopulationBasedTraining`. Added here: all members wait for each other at the end of a generation,
also on a resume; numbers stay within their range; nothing is copied after the last generation; a member that fails
leaves the population. The first settings are those of a sweep without a search, and all random choices are keyed: equal
metrics give equal decisions.

A member has one run directory. When it copies another member, its metrics and bytes become those of the copied rounds,
and `continues.json` says what it copied. All members have the file's seed: the same data, cohorts and starts. Schedules
are constant after the file's warm-up, because the search itself changes the rates.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from itertools import groupby
from operator import getitem
from pathlib import Path
from typing import Any

from rayfed.api import build_components
from rayfed.config import Experiment, load_config
from rayfed.config.describe import format_value
from rayfed.config.load import assign
from rayfed.config.search import PbtSettings
from rayfed.config.sweep import Sweep
from rayfed.errors import UserError
from rayfed.sweeps.plan import Trial, check_trials, make_trials
from rayfed.sweeps.search import Search
from rayfed.sweeps.space import Point, corners, draw
from rayfed.sweeps.table import format_mean, make_table
from rayfed.sweeps.trial import trial_folder
from rayfed.sweeps.warm_start import CONSTANT, NOTE, check_live_change
from rayfed.tracking import Table


class Population(Search):
    """The members of a sweep in the directory ``out``. UserError where its settings are wrong."""

    pauses = True

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        assert isinstance(sweep.search, PbtSettings)
        self.search, generation = sweep.search, sweep.search.rounds
        (unsearched,) = make_trials(settings, [Point({}, {})], ["check"])
        self.experiment = experiment = unsearched.experiment
        constant = {**CONSTANT, "checkpoint.every": math.gcd(experiment.checkpoint.every, generation)}
        settings = copy.deepcopy(settings)
        for key, value in constant.items():
            assign(settings, key, value, f"{key}={value}")
        super().__init__(settings, sweep, out)
        points = list(corners(sweep, {}))
        self.checked = make_trials(settings, points, ["check"] * len(points))
        rounds, every = experiment.server.rounds, experiment.eval.every
        if rounds % generation or rounds < 2 * generation:
            raise UserError(
                f"server.rounds: got {rounds}, but it should be two or more generations of "
                f"sweep.search.rounds={generation}"
            )
        check_live_change(experiment, sweep.parameters)
        self.federations = check_trials(self.checked, sweep)
        exact = build_components(experiment).task.exact
        if generation % every and not exact and sweep.metric.startswith(("eval/", "test/")):
            raise UserError(
                f"eval.every: got {every}, but it should divide sweep.search.rounds={generation}: members are compared "
                f"by {sweep.metric} after so many rounds"
            )
        for i in range(self.search.population):
            name = f"m{i + 1:02d}"
            first = {key: draw(space, key, experiment.seed, i) for key, space in sweep.parameters.items()}
            self.trial_at(name, self._settings(name) or first)

    def trial(self, name: str) -> Trial:
        """The member with the settings of its run directory."""
        now = self._settings(name)
        if now is None or now == self.trials[name].overrides:
            return self.trials[name]
        return make_trials(self.settings, [Point(now, now)], [name])[0]

    def tuner(self) -> dict[str, Any]:
        from ray.tune.search import BasicVariantGenerator

        from rayfed.sweeps.process import last_round
        from rayfed.sweeps.schedulers import Generations, domain, named

        spaces, members = self.sweep.parameters, self.missing(self.trials.values())
        generation, rounds = self.search.rounds, self.experiment.server.rounds
        done = min(last_round(trial_folder(self.out, member)) for member in members) // generation * generation
        return {
            "param_space": {"name": ""} | {key: domain(space) for key, space in spaces.items()},
            "search_alg": BasicVariantGenerator(points_to_evaluate=[named(member) for member in members]),
            "num_samples": len(members),
            "scheduler": Generations(self.search, self.sweep, rounds, self.experiment.seed, done),
        }

    def lines(self) -> list[dict[str, Any]]:
        """One line a member with its settings by rounds, then the best member."""
        lines = [
            {"trial": name, "metric": self.rows[name].get("metric"), "schedule": self._schedule(trial)}
            for name, trial in self.trials.items()
        ]
        best = self._best()
        return [*lines, {"best": best, "metric": self.rows[best]["metric"]}] if best else lines

    def table(self) -> Table:
        """A row for each member, with the settings of its rounds, in order."""
        best, metric, members = self._best(), self.sweep.metric, []
        for name, trial in self.trials.items():
            schedule = self._schedule(trial)
            copied = [f"{own['trial']} to {own['rounds'][1]}" for own in schedule[:-1] if own["trial"] != name]
            history = {key: _history(schedule, key) for key in self.sweep.parameters}
            members.append(replace(trial, labels={"member": name, **history, "copied": ", ".join(copied)}))
        title = "Population Based Training"
        if best:
            title += f": best is {best} with {metric} {format_mean(self.rows[best]['metric'], None, metric)}"
        return make_table(members, self.rows, self.sweep, title, lambda own: "best" * (own.labels["member"] == best))

    def _settings(self, name: str) -> dict[str, Any] | None:
        """The member's settings in its run directory; None where it has none yet."""
        config = self.out / "trials" / name / "config.yaml"
        return self._varied(load_config(config)) if config.is_file() else None

    def _varied(self, experiment: Experiment) -> dict[str, Any]:
        plain = experiment.model_dump(mode="json")
        return {key: reduce(getitem, key.split("."), plain) for key in self.sweep.parameters}

    def _best(self) -> str | None:
        finite = {name: self.sign * row["metric"] for name, row in self.rows.items() if row.get("metric") is not None}
        return max(finite, key=lambda name: finite[name], default=None)

    def _schedule(self, trial: Trial) -> list[dict[str, Any]]:
        """The settings by which the model of the member came about: rounds, the member that trained them, settings."""
        path = trial_folder(self.out, trial) / NOTE
        note = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        name, settings, last = trial.name, dict(trial.overrides), trial.experiment.server.rounds
        found: list[dict[str, Any]] = []
        while note is not None:
            found.append({"rounds": [note["round"] + 1, last], "trial": name, **settings})
            name, last = note["trial"], note["round"]
            settings = settings | {key: value for key, value in note["before"].items() if key in settings}
            note = note.get("earlier")
        return [{"rounds": [1, last], "trial": name, **settings}, *reversed(found)]


def _history(schedule: list[dict[str, Any]], key: str) -> str:
    """`0.01 -> 0.012`: the setting's values in order."""
    values: Iterator[str] = (format_value(own[key], quotes=False) for own in schedule)
    return " -> ".join(value for value, _ in groupby(values))
