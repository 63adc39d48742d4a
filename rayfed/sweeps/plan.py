"""From a sweep file to trials that are known to be right: every refusal comes from here, before anything starts.

A trial is a run like any other: settings, and a directory of its own. Planning does for each of them what
`rayfed run` does before it starts: it validates fields and combinations, loads the data and the base model (each
distinct one once) and matches the adapters. What a trial asks of Ray is planned here too, so that its nested actors
always have a place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayfed.api import check
from rayfed.config import Experiment, validate
from rayfed.config.load import assign
from rayfed.config.marks import data_key, model_key
from rayfed.config.sweep import SEED, Sweep
from rayfed.errors import UserError
from rayfed.sweeps.space import Point, expand, names, text
from rayfed.tasks.data.federation import Federation

Bundle = dict[str, float]
NAMED = 3  # trials that a refusal lists by their overrides


@dataclass(frozen=True)
class Trial:
    """One run of a sweep. ``shown`` is what tells it apart; ``data`` names the federation it trains on.

    ``continues``: the trial whose last checkpoint it starts from, see `rayfed.sweeps.warm_start`; None: from nothing.
    """

    name: str
    overrides: Mapping[str, Any]
    shown: Mapping[str, Any]
    experiment: Experiment
    data: str
    continues: str | None = None


def plan_trials(settings: dict[str, Any], sweep: Sweep) -> tuple[list[Trial], dict[str, Federation]]:
    """(the trials, the federations they name). UserError, one line a mistake and its trials, where any is wrong."""
    seed = settings.get(SEED, 0)
    points = expand(sweep, seed if isinstance(seed, int) else 0)
    trials = make_trials(settings, points, names(points))
    return trials, check_trials(trials, sweep)


def make_trials(settings: dict[str, Any], points: Sequence[Point], called: Sequence[str]) -> list[Trial]:
    """A trial of each point, fields and combinations validated; UserError as `plan`."""
    label = str(settings.get("name", "sweep"))
    trials = []
    mistakes = _Mistakes()
    for point, name in zip(points, called, strict=True):
        with mistakes.of(point):
            experiment = _experiment(settings, point, label, name)
            _check_pack(experiment)
            trials.append(
                Trial(name, point.overrides, point.shown, experiment, data_key(experiment.model_dump(mode="json")))
            )
    mistakes.tell()
    return trials


def check_trials(trials: Sequence[Trial], sweep: Sweep) -> dict[str, Federation]:
    """The federations of the trials, their data and base models checked; UserError as `plan`."""
    mistakes = _Mistakes()
    federations: dict[str, Federation] = {}
    models: set[str] = set()
    for trial in trials:
        with mistakes.of(trial):
            _check_metric(sweep, trial.experiment)
            _check_stop(sweep, trial.experiment)
            _check_data(trial, sweep, federations, models)
    mistakes.tell()
    return federations


def bundles(experiment: Experiment) -> list[Bundle]:
    """What a trial asks of Ray: its own process first, then, where the engine is Ray, one bundle a worker."""
    engine = experiment.engine
    if engine.kind == "local":
        gpus = {"GPU": engine.gpus} if engine.device == "cuda" else {}
        return [{"CPU": float(engine.threads), **gpus}]
    worker = {name: each for name, each in (("CPU", engine.cpus_per_worker), ("GPU", engine.gpus)) if each}
    return [{"CPU": 1.0}, *(dict(worker) for _ in range(engine.workers) if worker)]


def fits(asked: Sequence[Bundle], here: Bundle, others: Sequence[Bundle]) -> bool:
    """Whether one trial can ever run: its process on this node, where --out is, and its workers on any."""
    first, *workers = asked
    if any(here.get(name, 0) + 1e-9 < amount for name, amount in first.items()):
        return False
    left = {name: amount - first.get(name, 0) for name, amount in here.items()}
    if not workers:
        return True
    places = (  # workers are all alike
        min(math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in workers[0].items())
        for node in (left, *others)
    )
    return sum(places) >= len(workers)


class _Mistakes:
    """Collects refusals; the same one of many trials becomes one line that names some of them."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}
        self.now: Point | Trial | None = None

    def of(self, trial: Point | Trial) -> _Mistakes:
        self.now = trial
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        if not isinstance(error, UserError):
            return False
        assert self.now is not None
        told = ", ".join(f"{key}={text(value)}" for key, value in self.now.overrides.items())
        for line in str(error).splitlines():
            self.lines.setdefault(line, []).append(told)
        return True

    def tell(self) -> None:
        if self.lines:
            raise UserError("\n".join(f"{line} ({_listed(trials)})" for line, trials in self.lines.items()))


def _listed(trials: Sequence[str]) -> str:
    more = f"; and {len(trials) - NAMED} more" if len(trials) > NAMED else ""
    return f"{'trial' if len(trials) == 1 else 'trials'} {'; '.join(trials[:NAMED])}{more}"


def _experiment(settings: dict[str, Any], point: Point, label: str, name: str) -> Experiment:
    own = copy.deepcopy(settings)
    for key, value in point.overrides.items():
        if key.split(".")[0] in ("sweep", "name", "tracking"):
            raise UserError(f"{key}: a sweep cannot vary it; it changes nothing in the result")
        assign(own, key, copy.deepcopy(value), f"{key}={text(value)}")
    own["name"] = name
    own["tracking"] = tracking = dict(own.get("tracking") or {})
    tracking["console"] = "off"  # the sweep's own console tells of all trials
    if tracking.get("group") is None:
        tracking["group"] = label
    return validate(own)


def _check_pack(experiment: Experiment) -> None:
    """Trials that choose for themselves would differ by more than what they are compared in."""
    if experiment.engine.pack == "auto":
        raise UserError(
            "engine.pack: got 'auto', but every trial of a sweep would choose its own; name the number that `rayfed "
            "doctor CONFIG` shows"
        )


def _check_metric(sweep: Sweep, experiment: Experiment) -> None:
    if experiment.data.source == "lowrank":
        measured = ["eval/loss", "eval/gap"]
    else:
        measured = [f"{s}/{m}{x}" for s in ("eval", "test") for m in ("loss", "accuracy") for x in ("", "_masked")]
        measured += ["test/accuracy_clients"] if experiment.eval.clients else []
    allowed = ["train/loss", *measured, "bytes/total"]
    for field in ("metric", "report"):
        key = getattr(sweep, field)
        if key is not None and key not in allowed:
            raise UserError(
                f"sweep.{field}: got {key!r}, but what a run on these data measures is {', '.join(allowed)}"
            )


def _check_stop(sweep: Sweep, experiment: Experiment) -> None:
    if sweep.stop is None:
        return
    rounds = experiment.server.rounds
    if not sweep.stop.rungs(rounds):
        raise UserError(
            f"sweep.stop.grace: got {sweep.stop.grace}, but with server.rounds={rounds} no trial could be stopped "
            "before its last round"
        )
    seldom = experiment.data.source != "lowrank" and sweep.metric.startswith(("eval/", "test/"))
    every = experiment.eval.every if seldom else 1
    last = (rounds - 1) // every * every  # measured, and not the last
    if last < sweep.stop.grace:
        raise UserError(
            f"eval.every: got {every}, but sweep.stop compares {sweep.metric} from round {sweep.stop.grace} (grace) to "
            f"{rounds - 1}, and it is not measured there"
        )


def _check_data(trial: Trial, sweep: Sweep, federations: dict[str, Federation], models: set[str]) -> None:
    experiment = trial.experiment
    engine = experiment.engine
    if engine.kind == "local" and engine.device == "cuda" and not engine.gpus:
        raise UserError("engine.gpus_per_worker: got 0, but in a sweep it says how much of a GPU each trial holds")
    model = model_key(experiment.model_dump(mode="json"))
    federation = check(experiment, federations.get(trial.data), model=model not in models)
    models.add(model)
    federations[trial.data] = federation
    if sweep.metric.startswith("eval/") and federation.problem is None and not len(federation.validation):
        raise UserError(
            f"sweep.metric: got {sweep.metric!r}, but the data have no validation split; set data.validation above 0"
        )
