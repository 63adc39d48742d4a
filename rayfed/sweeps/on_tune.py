"""The trials on Ray Tune: one process a trial, at once as many as fit.

Tune places the trials, hands a process that is done the next trial (torch and its kin are loaded once a process, the
base model as long as it is the same one, the data once for all), and starts a trial again whose process died; the trial
then continues from its own checkpoint. What Tune is not used for: its restore. A sweep is resumed from the trials'
directories, see `rayfed.sweeps.trial`. For Tune a trial that failed has merely ended; its record says why. A trial that
the section `stop` ends gets its record here.

Nor is Ray's W&B integration used: `WandbLoggerCallback` knows what is reported to Tune, not the run, and starts a
restored trial's W&B run with ``resume=False``. A trial is tracked by its own sink, as every run, and goes on in its own
W&B run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune

from rayfed.config.sweep import Sweep
from rayfed.engine.driver import start_ray
from rayfed.errors import UserError
from rayfed.sweeps.asha import scheduler_of
from rayfed.sweeps.plan import Bundle, Trial, bundles, fits
from rayfed.sweeps.trial import outcome, settle, settle_stopped, work
from rayfed.tasks.data.federation import Federation
from rayfed.tasks.models.cache import keep_base
from rayfed.tracking import Record, RunInfo, Sink, SinkList, Table, Value

SETTINGS = {  # read by Tune where the sweep starts
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in the settings mean what they mean to `rayfed run`
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a process that died is told in one line
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # each run writes its own metrics
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command, as it does any other
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every round measures what `stop` compares
}


class Listener(Protocol):
    """Who is told what happens to the trials."""

    trials: dict[str, Trial]
    """All trials of the sweep by name, those included that do not run now."""

    def settled(self, name: str) -> None:
        """The trial of that name has ended and has its record."""

    def say(self, text: str) -> None:
        """Something else happened."""


def run_on_tune(
    trials: Sequence[Trial],
    sweep: Sweep,
    out: Path,
    federations: Mapping[str, Federation],
    listener: Listener,
) -> None:
    """Starts (or joins) Ray and runs the trials; ``listener`` hears of each that has ended.

    UserError where the cluster can never hold one of them. Ray is shut down again where it was started here.
    """
    asked = {trial.name: bundles(trial.experiment) for trial in trials}
    with on_ray(trials):
        pin = _check_resources(trials, asked)
        _fit(trials, sweep, out, federations, listener, {name: _group(own, pin) for name, own in asked.items()})


@contextmanager
def on_ray(trials: Sequence[Trial]) -> Iterator[None]:
    """Within it Ray runs, with CPUs enough for any of the trials where it is started here, and then shut down again.

    UserError where the trials name several clusters.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    addresses = {trial.experiment.engine.address for trial in trials}
    if len(addresses) > 1:
        raise UserError("engine.address: a sweep runs on one cluster, but its trials name several")
    ours = not ray.is_initialized()
    if ours:
        need = max(sum(bundle.get("CPU", 0) for bundle in bundles(trial.experiment)) for trial in trials)
        start_ray(addresses.pop(), need)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _fit(
    trials: Sequence[Trial],
    sweep: Sweep,
    out: Path,
    federations: Mapping[str, Federation],
    listener: Listener,
    groups: Mapping[str, tune.PlacementGroupFactory],
) -> None:
    known = {trial.name: trial for trial in trials}
    needed = {trial.data for trial in trials}
    data = {key: ray.put(federation) for key, federation in federations.items() if key in needed}
    watched = sweep.stop is not None  # else nobody asks for figures before a trial has ended
    trainable = tune.with_parameters(_trainable, trials=known, data=data, out=out, watched=watched)
    retries = max(trial.experiment.engine.retries for trial in trials)
    tuner = tune.Tuner(
        tune.with_resources(trainable, lambda config: groups[config["trial"]]),
        param_space={"trial": tune.grid_search(list(known))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=sweep.concurrency,
            scheduler=scheduler_of(list(listener.trials.values()), sweep, out),
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["trial"],
            trial_dirname_creator=lambda trial: trial.config["trial"],
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(out / "tune"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=retries),
            callbacks=[_Watch(known, out, listener)],
        ),
    )
    tuner.fit()


def _trainable(
    config: dict[str, Any], trials: Mapping[str, Trial], data: Mapping[str, ray.ObjectRef], out: Path, watched: bool
) -> None:
    trial = trials[config["trial"]]
    keep_base()
    sink = _Reports(trial.experiment.server.rounds) if watched else SinkList()
    work(trial, out, ray.get(data[trial.data]), sink)
    tune.report({"ended": 1})


class _Reports(Sink):
    """A sink that tells Tune the figures of every round but the last: whoever has come so far is not to be stopped."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def start(self, info: RunInfo) -> None:
        pass

    def round(self, record: Record) -> None:
        figures = {key: value for key, value in record.items() if isinstance(value, int | float)}
        if figures["round"] < self.rounds:
            tune.report(figures)

    def event(self, text: str) -> None:
        pass

    def finish(self, summary: Mapping[str, Value], table: Table | None) -> None:
        pass

    def close(self) -> None:
        pass


class _Watch(tune.Callback):
    """Passes on which trials have ended; writes the records of those that were stopped or whose process died."""

    def __init__(self, trials: Mapping[str, Trial], out: Path, listener: Listener) -> None:
        self.trials, self.out, self.listener = trials, out, listener

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self.trials[trial.config["trial"]]
        if outcome(self.out, own) is None:  # its process waits for leave to go on, and will not get it
            settle_stopped(self.out, own, trial.last_result["round"])
        self.listener.settled(own.name)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.listener.say(f"{trial.config['trial']}: its process died; it continues in a new one")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        own = self.trials[trial.config["trial"]]
        if outcome(self.out, own) is None:
            settle(self.out, own, "its process died, and did so again at every new start (engine.retries)")
        self.listener.settled(own.name)


def _check_resources(trials: Sequence[Trial], asked: Mapping[str, list[Bundle]]) -> Bundle:
    """UserError where a trial could only wait for ever; else what pins a trial's process to this node."""
    here = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    own = nodes.pop(here)
    for trial in trials:
        bundles_ = asked[trial.name]
        if not fits(bundles_, own, list(nodes.values())):
            engine = trial.experiment.engine
            field = "engine.threads" if engine.kind == "local" else "engine.workers"
            have = {name: sum(node.get(name, 0) for node in (own, *nodes.values())) for name in ("CPU", "GPU")}
            raise UserError(
                f"{field}: got {getattr(engine, field.rpartition('.')[2])}, so that a trial needs {_said(bundles_)}, "
                f"which can never fit: Ray has {_said([have])}, {_said([own])} of it on this node, where a trial's own "
                f"process runs (trial {trial.name})"
            )
    # Run directories are on this node.
    return (
        {name: 1e-3 for name in own if name.startswith("node:") and name != "node:__internal_head__"} if nodes else {}
    )


def _group(own: Sequence[Bundle], pin: Bundle) -> tune.PlacementGroupFactory:
    first, *workers = own
    return tune.PlacementGroupFactory([{**first, **pin}, *workers])


def _said(amounts: Sequence[Bundle]) -> str:
    """`1 CPU + 2 x 0.5 GPU`."""
    told: dict[str, int] = {}
    for bundle in amounts:
        text = " and ".join(f"{bundle[name]:g} {name}" for name in ("CPU", "GPU") if bundle.get(name)) or "nothing"
        told[text] = told.get(text, 0) + 1
    return " + ".join(text if count == 1 else f"{count} x ({text})" for text, count in told.items())
