"""Ray Tune over experiments: `rayfed.tune.trainable` and `rayfed.tune.tuner`.

    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    tuner = rayfed.tune.tuner(
        experiment,
        {"wire.up.density": tune.loguniform(1 / 64, 1), "lora.rank": tune.choice([2, 4, 8, 16])},
        tune_config=tune.TuneConfig(
            metric="eval/accuracy", mode="max", num_samples=20,
            scheduler=ASHAScheduler(time_attr="round", max_t=experiment.server.rounds, grace_period=3),
        ),
    )
    results = tuner.fit()  # a ResultGrid; the path of a result is a run directory

A trial is a run. Its config has dotted settings, which take the place of the experiment's. Tune gets every round's
record under the keys of metrics.jsonl, and a checkpoint every `checkpoint.every` rounds. So any scheduler and any
searcher of Tune works. `tune.Tuner.restore(path, rayfed.tune.trainable(experiment))` continues what was interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune.search.sample import Categorical, Float, Function, Integer

from rayfed.api import build_components
from rayfed.api.plans import Settings, read_settings
from rayfed.config import Experiment
from rayfed.config.marks import live
from rayfed.engine.connect import join_for_trials
from rayfed.errors import UserError, allowed
from rayfed.sweeps import plan
from rayfed.sweeps.flasc_search import FlascSearch
from rayfed.sweeps.on_tune import OF_TRIALS, make_trainable
from rayfed.sweeps.plan import NAME, START_FROM, Config, Point, Trial

COUNTED = ("bytes/", "params/", "time/", "clients/", "method/", "diagnostics/")
CHECKPOINTS = 4  # checkpoints of a trial that Tune keeps at least: other trials may need an earlier one than the newest


def trainable(experiment: Settings) -> Callable[[Config], None]:
    """A function trainable of Ray Tune: one trial is one run, with the resources that it needs.

    ``experiment``: an `Experiment`, the path of a YAML file, or a mapping of sections. Keys of Tune's config are dotted
    settings. The run directory is the trial's folder in Tune's storage; where the storage is no local path, it is the
    trial's working directory. The run has the trial's name and, in W&B, the experiment's name as group. UserError where
    the settings are wrong.
    """
    settings = read_settings(experiment)
    build_components(settings)
    return make_trainable(_given(settings), {})


def tuner(
    experiment: Settings, param_space: Mapping[str, Any], tune_config: tune.TuneConfig | None = None,
    run_config: tune.RunConfig | None = None,
) -> tune.Tuner:  # fmt: skip
    """A `tune.Tuner` over the experiment. Its `fit` returns Tune's ResultGrid.

    Args:
        experiment: an `Experiment`, the path of a YAML file, or a mapping of sections.
        param_space: dotted settings -> a space of Tune (`tune.choice`, `tune.loguniform`, `tune.grid_search`, ...) or a
            value. May be empty where a searcher has its own space.
        tune_config, run_config: as in Tune. Processes are used again for further trials (`reuse_actors`). Unless a
            number is given, Tune keeps the newest 4 checkpoints of a trial, or `checkpoint.keep` if that is more.

    Starts Ray, or joins it as `rayfed.run` does, unless this process uses Ray already. UserError, one line per mistake,
    before any trial starts: where a setting is unknown, where a value (for a range, one of its ends) is refused in the
    place of the experiment's, or where the cluster can never hold a trial.
    """
    settings = read_settings(experiment)
    tune_config, run_config = tune_config or tune.TuneConfig(), run_config or tune.RunConfig()
    trials = plan.make_trials(_given(settings), _points(param_space))
    federations = plan.check_trials(trials)
    _check_search(trials[0], tune_config)
    os.environ.update(OF_TRIALS | os.environ)
    join_for_trials(trial.experiment.engine for trial in trials)
    tune_config = replace(tune_config, reuse_actors=True)
    if isinstance(tune_config.search_alg, FlascSearch) and tune_config.num_samples == 1:
        tune_config.num_samples = -1  # the search knows when it has ended
    kept = run_config.checkpoint_config or tune.CheckpointConfig()
    if kept.num_to_keep is None:
        kept = replace(kept, num_to_keep=max(CHECKPOINTS, settings.checkpoint.keep))
        run_config = replace(run_config, checkpoint_config=kept)
    function = make_trainable(_given(settings), federations)
    return tune.Tuner(function, param_space=dict(param_space), tune_config=tune_config, run_config=run_config)


def _given(experiment: Experiment) -> dict[str, Any]:
    """The settings that were given, and the name."""
    return {**experiment.model_dump(mode="json", exclude_unset=True), "name": experiment.name}


def _points(space: Mapping[str, Any]) -> Iterator[Point]:
    """Points with every value of the space once: all choices, both ends of a range."""
    values = {key: _values(domain) for key, domain in space.items() if key not in (NAME, START_FROM)}
    for own in plan.combinations({key: known for key, known in values.items() if known}, most=0):
        yield Point(own, own)


def _values(domain: Any) -> list[Any]:
    if isinstance(domain, Categorical):
        return list(domain.categories)
    if isinstance(domain, Float | Integer):
        return [domain.lower, domain.upper - isinstance(domain, Integer)]
    if isinstance(domain, Function):
        return []
    return list(domain["grid_search"]) if isinstance(domain, dict) and [*domain] == ["grid_search"] else [domain]


def _check_search(trial: Trial, tune_config: tune.TuneConfig) -> None:
    """UserError where the scheduler or the searcher asks for what a run does not do."""
    search: Any = tune_config.search_alg
    scheduler = tune_config.scheduler
    while hasattr(search, "searcher"):  # a limiter or a repeater
        search = search.searcher
    mutations = getattr(scheduler, "_hyperparam_mutations", None) or {}
    for key in mutations:
        if key not in live():
            what = f"mutations of {key}, but a run can change only {', '.join(live())}"
            raise UserError(f"tune_config.scheduler: got {what}")
    every, reads = trial.experiment.eval.every, mutations or type(search).__name__ == "OptunaSearch"
    for part in (tune_config, search, scheduler):
        found = getattr(part, "metric", None) or getattr(part, "_metric", None) or []
        for metric in [found] if isinstance(found, str) else found:
            if metric not in trial.metrics and not metric.startswith(COUNTED):
                what = f"trials of this task can be compared by {', '.join(trial.metrics)} and {', '.join(COUNTED)}..."
                raise allowed("tune_config.metric", metric, what)
            if reads and every > 1 and plan.is_evaluated(trial, metric):
                reader = type(scheduler if mutations else search).__name__
                raise allowed("eval.every", every, f"{reader} reads the metric of every round: 1")
