"""From a sweep file to trials that are known to be valid: every refusal comes from here, before anything starts.

A trial is an ordinary run: settings, and a directory of its own, `trials/NAME/`. Planning does for each trial what
`rayfed run` does before it starts: it validates fields and combinations, loads the data and the base model (each
distinct one once) and matches the adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from rayfed.api import build_components, check
from rayfed.config import Experiment, validate
from rayfed.config.describe import format_settings
from rayfed.config.load import assign
from rayfed.config.marks import data_key, model_key
from rayfed.config.sweep import Sweep
from rayfed.config.types import MOST_TRIALS
from rayfed.errors import UserError, allowed
from rayfed.sweeps.space import Point
from rayfed.tasks.data.federation import Federation

NAMED = 3  # trials that a refusal names
UNFINISHED, FAILED = "unfinished", "failed"
STOPPED = "stopped"  # by the section `stop`
NOT_SELECTED = "not selected"  # other tuned values were better on the first seeds, so the trial does not run

Config = dict[str, Any]
"""Tune's config of a trial: dotted settings and their values, and the entries below."""
NAME = "name"  # the name of the run
START_FROM = "rayfed.start_from"  # the run directory of the trial that it continues
ENDED = "rayfed.ended"  # the last round of a trial that has ended: it does not run, and Tune gets its rounds again
RUN_DIR = "run_dir"  # in the results of a trial: its run directory


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


Checked = TypeVar("Checked", Point, Trial)
Result = TypeVar("Result")


def trial_folder(out: Path, name: str) -> Path:
    """The run directory of the trial of that name, in the sweep's directory ``out``."""
    return out / "trials" / name


def make_trials(settings: Mapping[str, Any], points: Iterable[Point]) -> list[Trial]:
    """One trial for each point.

    UserError where fields or their combinations are wrong: one line a mistake, with the trials that have the mistake.
    """
    points = list(islice(points, MOST_TRIALS + 1))
    if len(points) > MOST_TRIALS:
        raise UserError(f"sweep: got more than {MOST_TRIALS} points to check, but at most so many are allowed")
    group = str(settings.get("name", "sweep"))

    def trial(point: Point) -> Trial:
        experiment = trial_experiment(settings, point.overrides, group, point.name)
        metrics = ("train/loss", *build_components(experiment).task.metric_keys(experiment.eval), "bytes/total")
        data = data_key(experiment.model_dump(mode="json"))
        return Trial(point.name, point.overrides, point.labels, experiment, data, metrics)

    return check_each(points, trial)


def check_trials(trials: Sequence[Trial], sweep: Sweep | None = None) -> dict[str, Federation]:
    """The federations of the trials, by `Trial.data`.

    UserError as in `make_trials`, for data, base models and GPUs, and for the metrics and rounds of the ``sweep``.
    """
    federations: dict[str, Federation] = {}
    models: set[str] = set()

    def check_trial(trial: Trial) -> None:
        engine = trial.experiment.engine
        if engine.kind == "local" and engine.device == "cuda" and not engine.gpus:
            raise allowed("engine.gpus_per_worker", 0, "in a sweep it says how much of a GPU each trial holds")
        if sweep is not None:
            _check_comparison(trial, sweep)
        model = model_key(trial.experiment.model_dump(mode="json"))
        data = federations[trial.data] = check(trial.experiment, federations.get(trial.data), model=model not in models)
        models.add(model)
        if sweep is not None and is_evaluated(trial, sweep.metric, "eval/") and not len(data.validation):
            split = "the data have no validation split; set data.validation above 0"
            raise allowed("sweep.metric", sweep.metric, split)

    check_each(trials, check_trial)
    return federations


def check_each(checked: Iterable[Checked], result: Callable[[Checked], Result]) -> list[Result]:
    """The ``result`` of each point or trial. Collects the UserErrors; what is wrong with many becomes one line."""
    found: dict[str, list[str]] = {}  # the trials by the line of the refusal
    results, lines = [], []
    for own in checked:
        try:
            results.append(result(own))
        except UserError as error:
            for line in str(error).splitlines():
                found.setdefault(line, []).append(format_settings(own.overrides))
    for line, trials in found.items():
        more = f"; and {len(trials) - NAMED} more" if len(trials) > NAMED else ""
        lines.append(f"{line} (trial{'s'[: len(trials) - 1]} {'; '.join(trials[:NAMED])}{more})")
    if lines:
        raise UserError("\n".join(lines))
    return results


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
        own_choice = "every trial of a sweep would choose its own; name the number that `rayfed doctor CONFIG` shows"
        raise allowed("engine.pack", "auto", own_choice)
    return experiment


def _check_comparison(trial: Trial, sweep: Sweep) -> None:
    """UserError where the sweep compares trials by what this one does not measure, or not when it compares them."""
    for field, key in (("metric", sweep.metric), ("fallback", sweep.fallback), ("report", sweep.report)):
        if key is not None and key not in trial.metrics:
            keys = ", ".join(trial.metrics)
            raise allowed(f"sweep.{field}", key, f"trials of this task can be compared by {keys}")
    if sweep.stop is None:
        return
    rounds, grace = trial.experiment.server.rounds, sweep.stop.grace
    if grace >= rounds:
        what = f"with server.rounds={rounds} no trial could be stopped before its last round"
        raise allowed("sweep.stop.grace", grace, what)
    every = trial.experiment.eval.every if is_evaluated(trial, sweep.metric) else 1
    if (rounds - 1) // every * every < grace:  # the last measured round before the end
        when = f"from round {grace} (grace) to {rounds - 1}, and it is not measured there"
        raise allowed("eval.every", every, f"sweep.stop compares {sweep.metric} {when}")


def is_evaluated(trial: Trial, metric: str, on: str | tuple[str, ...] = ("eval/", "test/")) -> bool:
    """Whether the trial measures the metric ``on`` its data, in the rounds of `eval.every` alone."""
    return metric.startswith(on) and not build_components(trial.experiment).task.exact
