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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ray.tune.search import Searcher

from rayfed.api.plans import Settings, read_settings
from rayfed.api.warm_start import CONSTANT, check_rank_change
from rayfed.config.load import changed, validate_as
from rayfed.config.marks import searched
from rayfed.config.search import ROUNDED, FlascSearchSettings
from rayfed.config.sweep import Sweep
from rayfed.errors import allowed
from rayfed.files import write_json
from rayfed.sweeps.plan import NAME, RUN_DIR, START_FROM, Config, Point, Trial, make_trials, trial_folder
from rayfed.sweeps.sweep import Search

START, STAY, FINAL = "start", "stay", "final"


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
    def overrides(self) -> dict[str, Any]:
        """All settings that the search decides, dotted."""
        own = {"lora.rank": self.rank, "wire.down.density": self.down, "wire.up.density": self.up}
        return own | ({} if self.path[0] == FINAL else {"server.rounds": self.rounds, **CONSTANT})


Metrics = Mapping[str, float | None]
"""The metrics of the probes that have ended, by name: None where a probe failed or diverged."""


@dataclass(frozen=True)
class Progress:
    """How far the search has come: all its ``probes`` in order, and the ``path`` of those that were chosen."""

    probes: tuple[Probe, ...]
    path: tuple[Probe, ...]
    pending: tuple[Probe, ...]
    """The probes of the current step, ended or not; after the last step, the final run."""
    ended: str
    """The reason why no further step follows; empty until then."""

    @property
    def chosen(self) -> Probe:
        return self.path[-1]

    @property
    def rounds(self) -> int:
        """Rounds of all probes, the pending ones included. Of a probe that continues others, its own rounds alone."""
        return sum(own.rounds // (1 if own.path[0] == FINAL else len(own.path)) for own in self.probes)

    @property
    def result(self) -> str:
        chosen = self.chosen
        found = f"chosen: rank {chosen.rank}, densities {chosen.down:.4g} down and {chosen.up:.4g} up"
        return f"{found}: {self.ended}" if self.ended else found


def first_probe(search: FlascSearchSettings) -> Probe:
    """The configuration from which the search starts."""
    return Probe((START,), search.rank, search.density, search.density, search.rounds)


def neighbours(probe: Probe, search: FlascSearchSettings) -> list[Probe]:
    """The probes of one step: `factor` times the communication of ``probe``, within the limits of rank and density.

    The cost of a round is rank * (down + up). `separate` adds (factor - 1) (down + up) to one direction.
    """
    f, rank, down, up = search.factor, probe.rank, probe.down, probe.up
    found = {"rank": (rank * f, down, up), "density": (rank, down * f, up * f)}
    if search.directions == "separate":
        more = (f - 1) * (down + up)
        found |= {"down": (rank, down + more, up), "up": (rank, down, up + more)}
    return [
        Probe((*probe.path, move), rank, _density(down), _density(up), probe.rounds + search.rounds)
        for move, (rank, down, up) in found.items()
        if rank <= search.max_rank and max(down, up) <= search.max_density * ROUNDED
    ]


def replay(search: FlascSearchSettings, mode: str, metrics: Metrics, final_rounds: int = 0) -> Progress:
    """Repeats the search as far as its probes have ended. Equal metrics give equal decisions.

    ``mode``: `max` or `min`. ``final_rounds`` of the budget are for the final run; 0: the search has no final run.
    """
    budget = math.inf if search.budget is None else search.budget - final_rounds
    path: list[Probe] = []
    probes, pending, ended = [first_probe(search)], [first_probe(search)], ""

    def worth(probe: Probe) -> float:
        value = metrics[probe.name]
        return -math.inf if value is None else value if mode == "max" else -value

    while not ended and all(probe.name in metrics for probe in pending):
        best = max((own for own in pending if own.path[-1] != STAY), key=worth)  # of equal ones the first: more rank
        baseline = worth(pending[-1] if search.stay else path[-1]) if path else -math.inf
        if not worth(best) - baseline > search.gain:  # nor where neither is finite
            ended = f"no neighbour gains more than {search.gain:g}" if path else "the first probe has no finite metric"
            break
        path.append(best)
        grown = neighbours(best, search)
        same = replace(best, path=(*best.path, STAY), rounds=best.rounds + search.rounds)
        step = [*grown, *([same] if search.stay else [])]
        if not grown:
            ended = f"no neighbour up to rank {search.max_rank} and density {search.max_density:g}"
        elif (len(probes) + len(step)) * search.rounds > budget:
            ended = f"the budget of {search.budget} rounds has no room for another step"
        else:
            pending = step
            probes += step
    if ended:
        last = path[-1:] if final_rounds else []
        pending = [replace(own, path=(FINAL, *own.path), rounds=final_rounds) for own in last]
        probes += pending
    return Progress(tuple(probes), tuple(path or probes[:1]), tuple(pending), ended)


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
        self, experiment: Settings, metric: str = "eval/accuracy", mode: Literal["max", "min"] = "max", **settings: Any
    ) -> None:
        if mode not in ("max", "min"):
            raise allowed("mode", mode, "it should be max or min")
        super().__init__(metric, mode)
        self.settings = search = validate_as(FlascSearchSettings, {**settings, "kind": "flasc"})
        experiment = read_settings(experiment)
        check_rank_change(experiment)
        final = self.final_rounds = experiment.server.rounds if search.final else 0
        least = search.rounds * (1 + len(neighbours(first_probe(search), search)) + search.stay) + final
        if search.budget is not None and search.budget < least:
            needs = f"{least} rounds: {(least - final) // search.rounds} probes of {search.rounds}"
            needs += f" and {final} for the final run (server.rounds)" if final else ""
            raise allowed("sweep.search.budget", search.budget, f"the first step alone needs {needs}")
        for probe in self.extremes():
            changed(experiment, [{NAME: probe.name, **probe.overrides}])  # UserError where one does not go with a rank
        self.suggested: dict[str, str] = {}
        """Tune's id of a trial -> the name of its probe."""
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
        probe = next((probe for probe in waiting if probe.name not in self.suggested.values()), None)
        if probe is None:
            return None if waiting else self.FINISHED
        self.suggested[trial_id] = probe.name
        source = self._run_dirs.get("-".join(probe.path[:-1]))
        return {NAME: probe.name, **probe.overrides, **({START_FROM: source} if source else {})}

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Records the metric of the trial's last result. None where it failed or is not finite."""
        last = {} if error else result or {}
        self.add_evaluated_point({**last, NAME: self.suggested[trial_id]}, last.get(self.metric, math.nan))

    def add_evaluated_point(
        self, parameters: Any, value: float | None, error: bool = False, *unused: Any, **more: Any
    ) -> None:
        """Records the metric of a trial that ended earlier: the search does not suggest that trial again.

        ``parameters``: its config, at least its `name`, and its run directory as `RUN_DIR`.
        """
        finite = isinstance(value, int | float) and math.isfinite(value) and not error
        self.metrics[parameters[NAME]] = float(value) if value is not None and finite else None
        if RUN_DIR in parameters:
            self._run_dirs[parameters[NAME]] = parameters[RUN_DIR]

    def save(self, checkpoint_path: str) -> None:
        """Writes the state of the search as JSON."""
        write_json(Path(checkpoint_path), [self.suggested, self.metrics, self._run_dirs])

    def restore(self, checkpoint_path: str) -> None:
        """Reads the state that `save` has written."""
        self.suggested, self.metrics, self._run_dirs = json.loads(Path(checkpoint_path).read_text(encoding="utf-8"))

    def progress(self) -> Progress:
        """The progress of the search, from the metrics of the trials that have ended."""
        return replay(self.settings, self.mode, self.metrics, self.final_rounds)

    def waiting(self) -> list[Probe]:
        """The pending probes that have not ended, as far as the search knows."""
        return [probe for probe in self.progress().pending if probe.name not in self.metrics]


def _density(value: float) -> float:
    return min(float(f"{value:.12g}"), 1.0)


class FlascProbes(Search):
    """FLASC-Search in a sweep: its probes as trials in the directory ``out``. UserError where its settings are wrong.

    The metrics of finished probes are read from the directory before Ray starts. So a resumed search repeats no
    finished probe and comes to the same decisions; failed probes run again.
    """

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        super().__init__(settings, sweep, out)
        assert isinstance(sweep.search, FlascSearchSettings)
        first = first_probe(sweep.search).overrides
        (trial,) = make_trials(settings, [Point({key: first[key] for key in searched()}, {})])
        self.searcher = FlascSearch(trial.experiment, sweep.metric, sweep.mode, **sweep.search.model_dump())
        self.cohort = trial.experiment.server.cohort
        self.check(Point(probe.overrides, {}) for probe in self.searcher.extremes())
        ended: list[Trial] | None = None
        while ended is None or ended:
            trials = [self.trial(probe.name, probe.overrides) for probe in self.searcher.waiting()]
            ended = [own for own in trials if not self.missing([own])]
            for own in ended:
                self.tell(own)

    def tell(self, trial: Trial) -> None:
        found = {NAME: trial.name, RUN_DIR: str(trial_folder(self.out, trial.name))}
        self.searcher.add_evaluated_point(found, self.rows[trial.name].get("metric"))

    def suggest(self) -> Config | None:
        config = self.searcher.suggest(str(len(self.searcher.suggested)))
        return config if isinstance(config, dict) else None

    def complete(self) -> bool:
        return not self.searcher.waiting()  # the search has ended, and so has the final run

    def labels(self, trial: Trial) -> Mapping[str, Any]:
        (*moves, last), settings = trial.name.split("-"), trial.overrides
        down, up = (float(f"{settings[f'wire.{way}.density']:.4g}") for way in ("down", "up"))
        densities = {"density": down} if self.searcher.settings.directions == "both" else {"down": down, "up": up}
        probe = FINAL if moves[:1] == [FINAL] else f"{len(moves)} {last}"
        return {"probe": probe, "rank": settings["lora.rank"], **densities}

    def lines(self) -> list[dict[str, Any]]:
        """One line for each probe that has ended, and one for the end of the search."""
        progress, metrics = self.searcher.progress(), self.searcher.metrics
        lines: list[dict[str, Any]] = [
            {"trial": own.name, **asdict(own), "metric": metrics[own.name], "chosen": own in progress.path}
            for own in progress.probes
            if own.name in metrics
        ]
        if progress.ended:
            end = {"ended": progress.result, "rounds": progress.rounds}
            lines.append({**end, "client_rounds": progress.rounds * self.cohort})
        return lines

    def title(self) -> str:
        return f"FLASC-Search: {self.searcher.progress().result}"

    def marks(self) -> dict[str, str]:
        return {probe.name: "chosen" for probe in self.searcher.progress().path}
