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

import math
import random
from collections.abc import Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search import BasicVariantGenerator

from rayfed import seeding
from rayfed.api.continuation import last_round, schedule
from rayfed.api.warm_start import CONSTANT, check_live_change
from rayfed.config import load_config
from rayfed.config.describe import format_value
from rayfed.config.load import overridden
from rayfed.config.marks import flat
from rayfed.config.search import PbtSettings
from rayfed.config.sweep import Sweep
from rayfed.errors import allowed
from rayfed.sweeps.plan import NAME, Point, Trial, corners, draw, is_evaluated, make_trials, rounded, trial_folder
from rayfed.sweeps.sweep import Search
from rayfed.tracking.format import format_mean


class Population(Search):
    """The members of a sweep in the directory ``out``. UserError where its settings are wrong."""

    pauses = True

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        assert isinstance(sweep.search, PbtSettings)
        self.search, generation = sweep.search, sweep.search.rounds
        (unsearched,) = make_trials(settings, [Point({}, {})])
        self.experiment = experiment = unsearched.experiment
        own = {**CONSTANT, "checkpoint.every": math.gcd(experiment.checkpoint.every, generation)}
        super().__init__(overridden(settings, own), sweep, out)
        rounds, every = experiment.server.rounds, experiment.eval.every
        if rounds % generation or rounds < 2 * generation:
            many = f"it should be two or more generations of sweep.search.rounds={generation}"
            raise allowed("server.rounds", rounds, many)
        check_live_change(experiment, sweep.parameters)
        self.check(corners(sweep, {}))
        if generation % every and is_evaluated(unsearched, sweep.metric):
            when = f"members are compared by {sweep.metric} after so many rounds"
            raise allowed("eval.every", every, f"it should divide sweep.search.rounds={generation}: {when}")
        for i in range(self.search.population):
            own = {key: draw(space, key, experiment.seed, i) for key, space in sweep.parameters.items()}
            if (config := out / "trials" / f"m{i + 1:02d}" / "config.yaml").is_file():  # it may have copied another
                plain = dict(flat(load_config(config).model_dump(mode="json")))
                own = {key: plain[key] for key in sweep.parameters}
            self.trial(f"m{i + 1:02d}", own)

    def tune_config(self) -> dict[str, Any]:
        members, generation = self.missing(self.trials.values()), self.search.rounds
        done = min(last_round(trial_folder(self.out, member.name)) for member in members) // generation * generation
        rounds, seed = self.experiment.server.rounds, self.experiment.seed
        return {
            "param_space": dict.fromkeys((NAME, *self.sweep.parameters), ""),  # PBT takes no other search algorithm
            "search_alg": BasicVariantGenerator([{NAME: own.name, **own.overrides} for own in members]),
            "num_samples": len(members),
            "scheduler": Generations(self.search, self.sweep, rounds, seed, done),
        }

    def lines(self) -> list[dict[str, Any]]:
        """One line a member, with its settings by rounds."""
        return [
            {"trial": name, "metric": self.rows[name].get("metric"), "schedule": self._schedule(trial)}
            for name, trial in self.trials.items()
        ]

    def title(self) -> str:
        metric, found = self.sweep.metric, "Population Based Training"
        for best in self.marks():
            found += f": best is {best} with {metric} {format_mean(self.rows[best]['metric'], None, metric)}"
        return found

    def labels(self, trial: Trial) -> dict[str, str]:
        """The member, the settings of its rounds, in order, and the rounds that it has copied."""
        steps = self._schedule(trial)
        copied = [f"{own['trial']} to {own['rounds'][1]}" for own in steps[:-1] if own["trial"] != trial.name]
        history = {}
        for key in self.sweep.parameters:
            values = (format_value(own[key], quotes=False) for own in steps)
            history[key] = " -> ".join(value for value, _ in groupby(values))
        return {"member": trial.name, **history, "copied": ", ".join(copied)}

    def marks(self) -> dict[str, str]:
        best = max if self.sweep.mode == "max" else min
        finite = {name: row["metric"] for name, row in self.rows.items() if row.get("metric") is not None}
        return {best(finite, key=finite.__getitem__): "best"} if finite else {}

    def _schedule(self, trial: Trial) -> list[dict[str, Any]]:
        return schedule(trial_folder(self.out, trial.name), trial.experiment, self.sweep.parameters)


class Generations(PopulationBasedTraining):
    """Population Based Training in generations, for runs of so many ``rounds``.

    ``done``: the rounds of the generations that all members have behind them, on a resume. Random choices are keyed by
    (``seed``, round, member): equal metrics give equal decisions.
    """

    def __init__(self, search: PbtSettings, sweep: Sweep, rounds: int, seed: int, done: int = 0) -> None:
        spaces = sweep.parameters
        super().__init__(
            "round", sweep.metric, sweep.mode, perturbation_interval=search.rounds, quantile_fraction=search.quantile,
            resample_probability=search.resample, perturbation_factors=search.factors, log_config=False, synch=True,
            hyperparam_mutations={key: own.get("choice") or partial(_drawn, own, key) for key, own in spaces.items()},
            custom_explore_fn=partial(_within, spaces),
        )  # fmt: skip
        self.rounds, self.seed, self.done = rounds, seed, done
        self._next_perturbation_sync = done + search.rounds

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        self._trial_state[trial].last_perturbation_time = self.done

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if self._metric not in result or result["round"] >= self.rounds:
            return str(self.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def _checkpoint_or_exploit(self, trial: Any, *rest: Any) -> None:
        with seeding.python_random(self.seed, "sweep.pbt", int(self._next_perturbation_sync), str(trial)):
            super()._checkpoint_or_exploit(trial, *rest)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Where all others wait for this one, which has failed, begins the next generation without it."""
        end, state = self._next_perturbation_sync, cast(Any, self._trial_state)
        state[trial].last_score, state[trial].last_train_time = None, end
        others = [other for other in tune_controller.get_live_trials() if other is not trial]
        if others and all(state[other].last_train_time >= end for other in others):
            super().on_trial_result(tune_controller, others[0], state[others[0]].last_result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.on_trial_complete(tune_controller, trial, {})


def _drawn(space: Mapping[str, Any], key: str) -> Any:
    return draw(space, key, random.getrandbits(60), 0)


def _within(spaces: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The changed config, with readable numbers within their ranges."""
    for key, space in spaces.items():
        if "choice" not in space:
            low, high = map(rounded, *space.values())
            config[key] = min(max(rounded(config[key]), low), high)
    return config
