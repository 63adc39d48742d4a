"""From a sweep file to trials that are known to be valid: every refusal comes from here, before anything starts.

A point is a choice of settings: a case, values of the grids, random draws. The list of points depends on the section
and the seed only. A draw is keyed by (seed, setting, number of the draw). So every point of the grid gets the same
draws, methods are compared at the same rates, every mean covers all seeds, and a sweep may grow without new draws for
the trials that it has. (Tune's `BasicVariantGenerator` draws one sequence of numbers for all settings.)

A trial is an ordinary run: settings, and a directory of its own, `trials/NAME/`. Planning does for each trial what
`rayfed run` does before it starts: it validates fields and combinations, loads the data and the base model (each
distinct one once) and matches the adapters.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rayfed import seeding
from rayfed.api import build_components, check
from rayfed.config import Experiment, validate
from rayfed.config.describe import digest, format_name, format_settings, short_names
from rayfed.config.load import overridden
from rayfed.config.marks import data_key, model_key
from rayfed.config.sweep import SEED, Sweep, is_space
from rayfed.config.types import MOST_NAME, MOST_TRIALS
from rayfed.errors import UserError, allowed
from rayfed.tasks.data.federation import Federation

CASE = "case"  # the column that holds the labels of cases
MAX_CORNERS = 1024  # combinations that are all checked before a search starts
Settings = Mapping[str, Any]
NAMED = 3  # trials that a refusal names
UNFINISHED, FAILED = "unfinished", "failed"
STOPPED = "stopped"  # by the section `stop`
NOT_SELECTED = "not selected"  # other tuned values were better on the first seeds, so the trial does not run

Config = dict[str, Any]
"""Tune's config of a trial: dotted settings and their values, and the entries below."""
NAME = "name"  # the name of the run
START_FROM = "rayfed.start_from"  # the run directory of the trial that it continues
RUN_DIR = "run_dir"  # in the results of a trial: its run directory


@dataclass(frozen=True)
class Point:
    """The settings of one trial. ``labels`` are the settings that tell trials apart, or the label of their case."""

    overrides: Settings
    labels: Settings
    name: str = "check"  # of a point that is checked and does not run


@dataclass(frozen=True, kw_only=True)
class Trial(Point):
    """One run of a sweep."""

    experiment: Experiment
    metrics: tuple[str, ...]
    """The keys of metrics.jsonl by which trials can be compared."""


Checked = TypeVar("Checked", bound=Point)
Result = TypeVar("Result")


def expand(sweep: Sweep, seed: int) -> list[Point]:
    """Every point once: in the order of the cases, then of the parameters as they are written, then of the draws.

    Each has a readable name, such as `name=fedhl,lr=0.001,seed=0`. All differ and are valid folder names.
    """
    points: dict[str, Point] = {}
    for label, case in sweep.labelled():
        spaces = {**sweep.parameters, **case}
        grids = {key: space["grid"] for key, space in spaces.items() if is_space(space) and "grid" in space}
        drawn = {key: space for key, space in spaces.items() if is_space(space) and key not in grids}
        for chosen in itertools.product(*grids.values()):
            for i in range(sweep.samples if drawn else 1):
                values = dict(zip(grids, chosen, strict=True))
                values |= {key: draw(space, key, seed, i) for key, space in drawn.items()}
                point = make_point(sweep, label, case, {key: values[key] for key in spaces if key in values})
                # Two draws from few choices may be equal. Then they are one trial.
                points.setdefault(repr(point), point)
    short = short_names(key for point in points.values() for key in point.labels)
    names = [point_name(point, short) for point in points.values()]
    times = Counter(names)
    named = zip(points.values(), names, strict=True)
    return [replace(own, name=point_name(own, short, times[name] > 1)) for own, name in named]


def make_point(sweep: Sweep, label: str, case: Settings, values: Settings) -> Point:
    """The point with a case's fixed settings and chosen ``values`` of spaces. ``label`` is that of the case."""
    fixed = {key: value for key, value in case.items() if not is_space(value)}
    return Point({**fixed, **values}, {**({CASE: label} if isinstance(sweep.cases, dict) else fixed), **values})


def corners(sweep: Sweep, case: Settings) -> Iterator[Point]:
    """The case with every choice and both ends of every range, at no particular seed."""
    spaces = {key: space for key, space in {**sweep.parameters, **case}.items() if is_space(space) and key != SEED}
    ends = {key: space.get("choice") or [*map(rounded, *space.values())] for key, space in spaces.items()}
    yield from (make_point(sweep, "", case, chosen) for chosen in combinations(ends, MAX_CORNERS))


def combinations(values: Mapping[str, Sequence[Any]], most: int) -> Iterator[dict[str, Any]]:
    """All combinations of the values of settings.

    If there are more than ``most``, each value once, with the first values of the other settings.
    """
    if math.prod(map(len, values.values())) <= most:
        yield from (dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values()))
        return
    first = {key: own[0] for key, own in values.items()}
    yield first
    yield from (first | {key: value} for key, own in values.items() for value in own[1:])


def draw(space: Settings, key: str, seed: int, i: int) -> Any:
    """Draw ``i`` (from 0) of the setting, from a choice, uniform or loguniform."""
    u = float(seeding.numpy_rng(seed, "sweep", key, i).random())
    ((kind, values),) = space.items()
    if kind == "choice":
        return values[int(u * len(values))]
    low, high = values
    return rounded(low * math.exp(u * math.log(high / low)) if kind == "loguniform" else low + u * (high - low))


def rounded(x: float) -> float:
    """The number to six significant digits, so that people can read it and type it again."""
    return float(f"{x:.6g}")


def point_name(point: Point, short: Mapping[str, str], with_digest: bool = False) -> str:
    """The name of the point's trial and folder. ``short`` maps settings to their short names.

    A name that is too long for a folder is cut, and ends with a digest of the point, as any name ``with_digest``.
    """
    name = format_name(point.labels, short)
    if len(name.encode()) > MOST_NAME or with_digest:
        name = f"{name.encode()[: MOST_NAME - 9].decode(errors='ignore')}-{digest(point.overrides)[:8]}"
    return name


def trial_folder(out: Path, name: str) -> Path:
    """The run directory of the trial of that name, in the sweep's directory ``out``."""
    return out / "trials" / name


def make_trials(settings: Mapping[str, Any], points: Iterable[Point]) -> list[Trial]:
    """One trial for each point.

    UserError where fields or their combinations are wrong: one line a mistake, with the trials that have the mistake.
    """
    points = list(itertools.islice(points, MOST_TRIALS + 1))
    if len(points) > MOST_TRIALS:
        raise UserError(f"sweep: got more than {MOST_TRIALS} points to check, but at most so many are allowed")
    group = str(settings.get("name", "sweep"))

    def trial(point: Point) -> Trial:
        experiment = trial_experiment(settings, point.overrides, group, point.name)
        metrics = ("train/loss", *build_components(experiment).task.metric_keys(experiment.eval), "bytes/total")
        return Trial(**vars(point), experiment=experiment, metrics=metrics)

    return check_each(points, trial)


def check_trials(trials: Sequence[Trial], sweep: Sweep | None = None) -> dict[str, Federation]:
    """The federations of the trials, by `data_key`.

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
        plain = trial.experiment.model_dump(mode="json")
        key, model = data_key(plain), model_key(plain)
        data = federations[key] = check(trial.experiment, federations.get(key), model=model not in models)
        models.add(model)
        if sweep is not None and is_evaluated(trial, sweep.metric, "eval/") and not len(data.validation):
            what = "the data have no validation split; set data.validation above 0"
            raise allowed("sweep.metric", sweep.metric, what)

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
    for key in overrides:
        if key.split(".")[0] in ("sweep", "name", "tracking"):
            raise UserError(f"{key}: a sweep cannot vary it; it changes nothing in the result")
    own = overridden(settings, {**overrides, "name": name})
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
            raise allowed(f"sweep.{field}", key, f"trials of this task can be compared by {', '.join(trial.metrics)}")
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
