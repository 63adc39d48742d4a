"""From a sweep file to trials that are known to be valid: every refusal comes from here, before anything starts.

A trial is an ordinary run: settings, and a directory of its own. Planning does for each trial what `rayfed run` does
before it starts: it validates fields and combinations, loads the data and the base model (each distinct one once) and
matches the adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rayfed.api import build_components, check
from rayfed.config import Experiment, validate
from rayfed.config.load import assign
from rayfed.config.marks import data_key, model_key
from rayfed.config.sweep import SEED, Sweep
from rayfed.config.types import MOST_TRIALS
from rayfed.errors import UserError
from rayfed.sweeps.space import Point, expand, format_settings, trial_names
from rayfed.tasks.data.federation import Federation

NAMED = 3  # trials that a refusal names


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    overrides: Mapping[str, Any]
    labels: Mapping[str, Any]
    """The settings that tell trials apart, or the label of their case."""
    experiment: Experiment
    data: str
    """The key of its data: trials with equal keys share a federation."""
    metrics: tuple[str, ...]
    """The keys of metrics.jsonl by which trials can be compared."""
    continues: str | None = None
    """The trial from whose last checkpoint it starts (see `rayfed.sweeps.warm_start`); None: it starts anew."""


def plan_trials(settings: dict[str, Any], sweep: Sweep) -> tuple[list[Trial], dict[str, Federation]]:
    """(the trials of a sweep without a search, their federations by `Trial.data`).

    UserError where a trial is wrong: one line a mistake, with the trials that have the mistake.
    """
    seed = settings.get(SEED, 0)
    points = expand(sweep, seed if isinstance(seed, int) else 0)
    trials = make_trials(settings, points, trial_names(points))
    return trials, check_trials(trials, sweep)


def make_trials(settings: dict[str, Any], points: Sequence[Point], names: Sequence[str]) -> list[Trial]:
    """One trial for each point. UserError as in `plan_trials`, for fields and their combinations."""
    if len(points) > MOST_TRIALS:
        raise UserError(f"sweep: got more than {MOST_TRIALS} points to check, but at most so many are allowed")
    group = str(settings.get("name", "sweep"))
    trials = []
    refusals = Refusals()
    for point, name in zip(points, names, strict=True):
        with refusals.of(point):
            experiment = trial_experiment(settings, point.overrides, group, name)
            task = build_components(experiment).task
            metrics = ("train/loss", *task.metric_keys(experiment.eval), "bytes/total")
            data = data_key(experiment.model_dump(mode="json"))
            trials.append(Trial(name, point.overrides, point.labels, experiment, data, metrics))
    refusals.raise_all()
    return trials


def check_trials(trials: Sequence[Trial], sweep: Sweep) -> dict[str, Federation]:
    """The federations of the trials. UserError as in `plan_trials`, for metrics, data and base models."""
    refusals = Refusals()
    federations: dict[str, Federation] = {}
    models: set[str] = set()
    for trial in trials:
        with refusals.of(trial):
            exact = build_components(trial.experiment).task.exact
            _check_metric(trial, sweep)
            _check_stop(trial, sweep, exact)
            federation = check_data(trial, federations, models)
            if sweep.metric.startswith("eval/") and not exact and not len(federation.validation):
                raise UserError(
                    f"sweep.metric: got {sweep.metric!r}, but the data have no validation split; set data.validation "
                    "above 0"
                )
    refusals.raise_all()
    return federations


class Refusals:
    """Collects refusals, to raise them together. One of many trials becomes one line that names some of the trials."""

    def __init__(self) -> None:
        self.trials: dict[str, list[str]] = {}  # by the line of the refusal

    @contextmanager
    def of(self, trial: Point | Trial) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            for line in str(error).splitlines():
                self.trials.setdefault(line, []).append(format_settings(trial.overrides))

    def raise_all(self) -> None:
        lines = []
        for line, trials in self.trials.items():
            more = f"; and {len(trials) - NAMED} more" if len(trials) > NAMED else ""
            word = "trial" if len(trials) == 1 else "trials"
            lines.append(f"{line} ({word} {'; '.join(trials[:NAMED])}{more})")
        if lines:
            raise UserError("\n".join(lines))


def trial_experiment(settings: Mapping[str, Any], overrides: Mapping[str, Any], group: str, name: str) -> Experiment:
    """The settings of a trial: the shared ones with the trial's own, dotted, in their place. UserError if one is wrong.

    ``group`` is the W&B group of the trials, unless the settings name one.
    """
    own = copy.deepcopy(dict(settings))
    for key, value in overrides.items():
        if key.split(".")[0] in ("sweep", "name", "tracking"):
            raise UserError(f"{key}: a sweep cannot vary it; it changes nothing in the result")
        assign(own, key, copy.deepcopy(value), format_settings({key: value}))
    own["name"] = name
    tracking = own["tracking"] = own.get("tracking") or {}
    if isinstance(tracking, dict):  # else `validate` refuses it
        tracking["console"] = "off"  # the sweep's own console shows all trials
        if tracking.get("group") is None:
            tracking["group"] = group
    experiment = validate(own)
    if experiment.engine.pack == "auto":  # then trials would differ in more than in their settings
        raise UserError(
            "engine.pack: got 'auto', but every trial of a sweep would choose its own; name the number that `rayfed "
            "doctor CONFIG` shows"
        )
    return experiment


def _check_metric(trial: Trial, sweep: Sweep) -> None:
    for field, key in (("metric", sweep.metric), ("report", sweep.report)):
        if key is not None and key not in trial.metrics:
            raise UserError(
                f"sweep.{field}: got {key!r}, but trials of this task can be compared by {', '.join(trial.metrics)}"
            )


def _check_stop(trial: Trial, sweep: Sweep, exact: bool) -> None:
    if sweep.stop is None:
        return
    rounds, grace = trial.experiment.server.rounds, sweep.stop.grace
    if not sweep.stop.rungs(rounds):
        raise UserError(
            f"sweep.stop.grace: got {grace}, but with server.rounds={rounds} no trial could be stopped before its last "
            "round"
        )
    evaluated = not exact and sweep.metric.startswith(("eval/", "test/"))
    every = trial.experiment.eval.every if evaluated else 1
    if (rounds - 1) // every * every < grace:  # the last measured round before the end
        raise UserError(
            f"eval.every: got {every}, but sweep.stop compares {sweep.metric} from round {grace} (grace) to "
            f"{rounds - 1}, and it is not measured there"
        )


def check_data(trial: Trial, federations: dict[str, Federation], models: set[str]) -> Federation:
    """The trial's federation. ``federations`` and ``models`` hold what earlier trials were checked with.

    UserError where settings and data, or settings and base model, do not go together.
    """
    engine = trial.experiment.engine
    if engine.kind == "local" and engine.device == "cuda" and not engine.gpus:
        raise UserError("engine.gpus_per_worker: got 0, but in a sweep it says how much of a GPU each trial holds")
    model = model_key(trial.experiment.model_dump(mode="json"))
    federation = check(trial.experiment, federations.get(trial.data), model=model not in models)
    models.add(model)
    federations[trial.data] = federation
    return federation
