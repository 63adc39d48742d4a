"""FLASC-Search (Kuo et al., arXiv 2406.05233, as revised for TMLR): which rank and density to try next.

Only the paper's abstract was available: the search repeatedly compares pairs of configurations and raises either the
rank or the density. The algorithm, as far as that says:

    chosen = (rank, density), small
    repeat:  a = (rank * factor, density)      equal cost: density * n entries travel, and n, the number of
             b = (rank, density * factor)      the adapter's entries, is proportional to the rank
             chosen = the better of a and b

Derived here: a probe continues from the checkpoint of the chosen probe; the search ends if a step does not fit into the
budget, no probe gains over the chosen one, or no neighbour is left; a step may raise the density of one direction
alone; `stay`. The cost is equal in entries of the adapter. A trained head does not grow with the rank, so a step by
rank is a little cheaper than a step by density, and indices cost extra: the table shows the bytes that were sent.

Each probe is a trial of Ray Tune. The metrics and bytes of a probe include the rounds of the probes that it continues.
Probes train at constant rates after the experiment's warm-up. The final run starts anew and follows its schedules.

A decision depends on the metrics of finished probes alone (`replay`), not on the order in which they finish. So a
search that continues after an interruption, with the metrics of its finished probes, comes to the same decisions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ray.tune.search import Searcher

from rayfed.api.plans import Settings, read_settings
from rayfed.config.load import changed, validate_as
from rayfed.config.search import ROUNDED, FlascSearchSettings
from rayfed.errors import UserError, allowed
from rayfed.files import write_json
from rayfed.sweeps.warm_start import CONSTANT, RUN_DIR, START_FROM, check_rank_change

FINAL = "final"


@dataclass(frozen=True)
class Probe:
    """A configuration, and the moves by which the search came to it: the moves name the probe and its trial."""

    path: tuple[str, ...]
    rank: int
    down: float
    """Download density."""
    up: float
    """Upload density."""
    rounds: int
    """Rounds, with those of the probes that it continues."""

    @property
    def name(self) -> str:
        return "-".join(self.path)

    @property
    def parent(self) -> str | None:
        """The name of the probe that it continues; None for the first one and for the final run."""
        return None if self.is_final else "-".join(self.path[:-1]) or None

    @property
    def is_final(self) -> bool:
        """Whether it is the final run: of the chosen configuration, from the start."""
        return self.path[0] == FINAL

    @property
    def overrides(self) -> dict[str, Any]:
        """The configuration, as dotted settings."""
        return {"lora.rank": self.rank, "wire.down.density": self.down, "wire.up.density": self.up}

    @property
    def config(self) -> dict[str, Any]:
        """All settings of the probe's trial that the search decides, dotted, with the trial's name."""
        own = {} if self.is_final else {"server.rounds": self.rounds, **CONSTANT}
        return {"name": self.name, **self.overrides, **own}


Metrics = Mapping[str, float | None]
"""The metrics of the probes that have ended, by name: None where a probe failed or diverged."""


@dataclass(frozen=True)
class Step:
    """One comparison: of the ``probes`` that start from ``base``."""

    base: Probe
    probes: tuple[Probe, ...]
    baseline: float | None
    """The metric that a probe has to exceed."""
    chosen: Probe | None
    """The probe that gained most; None if none did."""


@dataclass(frozen=True)
class Progress:
    """How far the search has come."""

    first: Probe
    steps: tuple[Step, ...]
    chosen: Probe
    pending: tuple[Probe, ...]
    """The probes of the current step, ended or not; after the last step, the final run."""
    ended: str | None
    """The reason why no further step follows; None until then."""
    rounds: int
    """Rounds of all probes, the pending ones included."""

    @property
    def probes(self) -> list[Probe]:
        """Every probe so far, in order, the pending ones included."""
        return list(dict.fromkeys([self.first, *(p for step in self.steps for p in step.probes), *self.pending]))

    @property
    def result(self) -> str:
        chosen = self.chosen
        return f"chosen: rank {chosen.rank}, densities {chosen.down:.4g} down and {chosen.up:.4g} up"


def first_probe(search: FlascSearchSettings) -> Probe:
    """The configuration from which the search starts."""
    return Probe(("start",), search.rank, search.density, search.density, search.rounds)


def neighbours(probe: Probe, search: FlascSearchSettings) -> list[Probe]:
    """The probes of one step: `factor` times the communication of ``probe``, within the limits of rank and density.

    The cost of a round is rank * (down + up). `separate` adds (factor - 1) (down + up) to one direction.
    """
    f, more = search.factor, (search.factor - 1) * (probe.down + probe.up)
    found = [
        ("rank", probe.rank * f, probe.down, probe.up),
        ("density", probe.rank, probe.down * f, probe.up * f),
    ]
    if search.directions == "separate":
        found.append(("down", probe.rank, probe.down + more, probe.up))
        found.append(("up", probe.rank, probe.down, probe.up + more))
    return [
        Probe((*probe.path, move), rank, _density(down), _density(up), probe.rounds + search.rounds)
        for move, rank, down, up in found
        if rank <= search.max_rank and max(down, up) <= search.max_density * ROUNDED
    ]


def replay(search: FlascSearchSettings, mode: str, metrics: Metrics, final_rounds: int = 0) -> Progress:
    """Repeats the search as far as its probes have ended. Equal metrics give equal decisions.

    ``mode``: `max` or `min`. ``final_rounds`` of the budget are for the final run; 0: the search has no final run.
    """
    sign = 1 if mode == "max" else -1
    budget = math.inf if search.budget is None else search.budget - final_rounds
    first = chosen = first_probe(search)
    steps: list[Step] = []
    rounds = search.rounds

    def progress(*pending: Probe, ended: str | None = None) -> Progress:
        if ended and final_rounds and metrics[chosen.name] is not None:
            pending = (replace(chosen, path=(FINAL, *chosen.path), rounds=final_rounds),)
        more = final_rounds if ended and pending else 0
        return Progress(first, tuple(steps), chosen, pending, ended, rounds + more)

    if first.name not in metrics:
        return progress(first)
    if metrics[first.name] is None:
        return progress(ended="the first probe has no finite metric")
    while True:
        grown = neighbours(chosen, search)
        same = replace(chosen, path=(*chosen.path, "stay"), rounds=chosen.rounds + search.rounds)
        probes = (*grown, *([same] if search.stay else []))
        if not grown:
            return progress(ended=f"no neighbour up to rank {search.max_rank} and density {search.max_density:g}")
        if rounds + len(probes) * search.rounds > budget:
            return progress(ended=f"the budget of {search.budget} rounds has no room for another step")
        rounds += len(probes) * search.rounds
        if not all(probe.name in metrics for probe in probes):
            return progress(*probes)
        finite = {probe: sign * value for probe in grown if (value := metrics[probe.name]) is not None}
        baseline = metrics[(same if search.stay else chosen).name]
        best = max(finite, key=lambda probe: finite[probe], default=None)  # of equal ones the first: more rank
        if best is not None and baseline is not None and not finite[best] - sign * baseline > search.gain:
            best = None
        steps.append(Step(chosen, probes, baseline, best))
        if best is None:
            return progress(ended=f"no neighbour gains more than {search.gain:g}")
        chosen = best


class FlascSearch(Searcher):
    """FLASC-Search, as a search algorithm of Ray Tune.

        search = FlascSearch(experiment, metric="eval/loss", mode="min", rank=4, density=1 / 64, rounds=2)
        tuner(experiment, {}, tune_config=tune.TuneConfig(search_alg=search, num_samples=-1))

    ``settings``: those of the section `sweep.search` of the kind flasc (`rayfed settings sweep.search`). ``metric``: a
    key of the results; the value after a probe's last round counts.

    The config of a trial has dotted settings of the experiment, with the trial's `name`. Its entry `START_FROM` is the
    run directory of the finished trial that it continues; every node that runs trials must see it. A trainable that
    does not report a `RUN_DIR` gets no such entry, and trains all rounds of the trial (`server.rounds`) from the start.

    Raises UserError for a wrong setting, for a budget without room for the first step, and for an experiment that
    cannot continue at another rank and density.
    """

    def __init__(
        self, experiment: Settings, metric: str = "eval/accuracy", mode: Literal["max", "min"] = "max",
        **settings: Any,
    ) -> None:  # fmt: skip
        if mode not in ("max", "min"):
            raise allowed("mode", mode, "it should be max or min")
        super().__init__(metric, mode)
        self.settings = validate_as(FlascSearchSettings, {**settings, "kind": "flasc"})
        if mistakes := [*self.settings.mistakes()]:
            raise UserError("\n".join(mistakes))
        experiment = read_settings(experiment)
        check_rank_change(experiment)
        self.final_rounds = experiment.server.rounds if self.settings.final else 0
        self._check_budget()
        for probe in self.extremes():
            changed(experiment, [probe.config])  # UserError where a setting does not go with the rank
        self._names: dict[str, str] = {}  # Tune's id of a trial -> the name of its probe
        self.metrics: dict[str, float | None] = {}
        """The metrics of the probes that have ended, by name; None where a probe failed or diverged."""
        self._run_dirs: dict[str, str] = {}

    def extremes(self) -> tuple[Probe, Probe]:
        """The first probe, and the final run after the most moves: the largest rank, and the longest name."""
        first = last = first_probe(self.settings)
        for move in ("density", "rank"):
            while further := [probe for probe in neighbours(last, self.settings) if probe.path[-1] == move]:
                (last,) = further
        return first, replace(last, path=(FINAL, *last.path), rounds=self.final_rounds)

    def suggest(self, trial_id: str) -> Any:
        """The config of the next trial; None while others have to end first, `FINISHED` after the last one."""
        waiting = self.waiting()
        probe = next((probe for probe in waiting if probe.name not in self._names.values()), None)
        if probe is None:
            return None if waiting else self.FINISHED
        self._names[trial_id] = probe.name
        source = self._run_dirs.get(probe.parent or "")
        return probe.config | ({START_FROM: source} if source else {})

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Records the metric of the trial's last result. None where it failed or is not finite."""
        last = {} if error else result or {}
        self._record(self._names[trial_id], last.get(self.metric), last.get(RUN_DIR))

    def add_evaluated_point(
        self, parameters: Mapping[str, Any], value: float | None, error: bool = False, pruned: bool = False,
        intermediate_values: list[float] | None = None,
    ) -> None:  # fmt: skip
        """Records the metric of a trial that ended earlier: the search does not suggest that trial again.

        ``parameters``: its config, at least its `name`, and its run directory as `RUN_DIR`.
        """
        self._record(parameters["name"], None if error else value, parameters.get(RUN_DIR))

    def save(self, checkpoint_path: str) -> None:
        """Writes the state of the search as JSON."""
        state = {"names": self._names, "metrics": self.metrics, "run_dirs": self._run_dirs}
        write_json(Path(checkpoint_path), state)

    def restore(self, checkpoint_path: str) -> None:
        """Reads the state that `save` has written."""
        state = json.loads(Path(checkpoint_path).read_text(encoding="utf-8"))
        self._names, self.metrics, self._run_dirs = state["names"], state["metrics"], state["run_dirs"]

    def progress(self) -> Progress:
        """The progress of the search, from the metrics of the trials that have ended."""
        return replay(self.settings, self.mode, self.metrics, self.final_rounds)

    def waiting(self) -> list[Probe]:
        """The pending probes that have not ended, as far as the search knows."""
        return [probe for probe in self.progress().pending if probe.name not in self.metrics]

    def _check_budget(self) -> None:
        budget, rounds, final = self.settings.budget, self.settings.rounds, self.final_rounds
        probes = 1 + len(neighbours(first_probe(self.settings), self.settings)) + self.settings.stay
        least = rounds * probes + final
        if budget is not None and budget < least:
            reserved = f" and {final} for the final run (server.rounds)" if final else ""
            needs = f"the first step alone needs {least} rounds: {probes} probes of {rounds}{reserved}"
            raise allowed("sweep.search.budget", budget, needs)

    def _record(self, name: str, metric: Any, run_dir: str | None) -> None:
        finite = isinstance(metric, int | float) and math.isfinite(metric)
        self.metrics[name] = float(metric) if finite else None
        if run_dir:
            self._run_dirs[name] = run_dir


def _density(value: float) -> float:
    return min(float(f"{value:.12g}"), 1.0)
