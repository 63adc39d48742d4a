"""The base class of searches: trials run in stages on Ray Tune, and decisions are repeated from the sweep's directory.

A search computes its state (`SearchState`) from its settings and the files on the disk alone. The missing trials of the
current stage run, then the state is computed again. So no decision depends on which trial ended first, and a search
that was killed comes to the same decisions and repeats no finished trial.

Tune's own searchers and schedulers are not used: they would wait where a stage ends too, and they keep their state in
files of their own. The price: every stage starts new processes for its trials (Ray itself starts once).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from rayfed.config.sweep import Sweep
from rayfed.errors import UserError
from rayfed.files import atomic_write
from rayfed.sweeps.log import SweepLog
from rayfed.sweeps.plan import Trial, check_trials, make_trials
from rayfed.sweeps.space import Point
from rayfed.sweeps.table import TrialRow, trial_row
from rayfed.sweeps.trial import outcome_file, read_outcome
from rayfed.sweeps.warm_start import CONSTANT as CONSTANT
from rayfed.tasks.data.federation import Federation
from rayfed.tracking import Table
from rayfed.tracking.jsonl import to_line

SEARCH_FILE = "search.jsonl"


@dataclass(frozen=True)
class SearchState:
    """How far a search has come."""

    trials: Sequence[Trial]
    """All trials so far, in order."""
    pending: Sequence[Trial]
    """The trials of the current stage, ended or not."""
    stage: str
    """The name of the current stage."""
    ended: str | None
    """The reason why the search is over; None until then."""
    result: str
    """The result so far, in words."""
    lines: Sequence[Mapping[str, Any]]
    """The lines of search.jsonl."""
    final: Sequence[Trial] = ()
    """The trials that run after the search."""


class StagedSearch(ABC):
    """A search of a sweep in the directory ``out``. A derived class defines `state` and `table`.

    A derived class checks its settings in `__init__` (UserError before anything starts). There it sets ``checked``:
    trials that ask Ray for as much as any later trial. It also sets ``federations``: the data of the sweep.
    """

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        self.settings, self.sweep, self.out = settings, sweep, out
        self.sign = 1 if sweep.mode == "max" else -1
        self.checked: list[Trial] = []
        self.federations: dict[str, Federation] = {}
        self.started: set[str] = set()  # trials that this process has run
        self._trials: dict[str, Trial] = {}
        self._done: dict[str, TrialRow] = {}  # rows of finished trials; these never change
        self._on_ray = False

    @abstractmethod
    def state(self) -> SearchState:
        """The state of the search, from the files in its directory."""

    @abstractmethod
    def table(self, trials: Sequence[Trial], rows: Mapping[str, TrialRow]) -> Table:
        """The table of the sweep; ``rows`` are the trials' rows of sweep.jsonl by name."""

    def run(self, log: SweepLog) -> None:
        """Runs the missing trials, stage by stage, to the end of the search."""
        with ExitStack() as ray:
            while (state := self._write(log)).ended is None:
                missing = self._missing(state.pending)
                if not missing:
                    return  # a trial ran but has no outcome: the sweep is not finished
                log.event(f"search {self.out}: {state.stage}, to run: {', '.join(trial.name for trial in missing)}")
                self._run(missing, log, ray)
            log.event(f"search: {state.result}: {state.ended}")
            if state.final:
                self._run(self._missing(state.final), log, ray)
                self._write(log)

    def trial_at(self, name: str, point: Point, continues: str | None = None) -> Trial:
        """The trial of that name at that point. UserError where its settings are wrong."""
        if name not in self._trials:
            (trial,) = make_trials(self.settings, [point], [name])
            self._trials[name] = replace(trial, continues=continues)
        return self._trials[name]

    def has_ended(self, trial: Trial) -> bool:
        """Whether the trial has an outcome. A failed trial has to fail in this process: it is always run again."""
        if trial.name in self._done:
            return True
        outcome = read_outcome(self.out, trial)
        return outcome is not None and (outcome.status != "failed" or trial.name in self.started)

    def row(self, trial: Trial) -> TrialRow:
        """The trial's row of sweep.jsonl."""
        row = self._done.get(trial.name) or trial_row(self.out, trial, self.sweep)
        if row["status"] == "done":
            self._done[trial.name] = row
        return row

    def metric(self, trial: Trial) -> float | None:
        """The trial's metric; None if the trial has not ended, failed or diverged."""
        return self.row(trial).get("metric")

    def refuse_resume(self, recorded: str, now: str) -> NoReturn:
        """UserError: search.jsonl does not belong to the settings with which the sweep is resumed."""
        raise UserError(
            f"--resume: {self.out / SEARCH_FILE} has {recorded}, but the resumed sweep {now}; resume with the sweep's "
            "own sweep.yaml or choose another --out"
        )

    def _missing(self, trials: Sequence[Trial]) -> list[Trial]:
        missing = trials_to_run(self.out, [trial for trial in trials if trial.name not in self.started])
        self.started |= {trial.name for trial in missing}
        return missing

    def _run(self, trials: Sequence[Trial], log: SweepLog, ray: ExitStack) -> None:
        new = [trial for trial in trials if trial.data not in self.federations]
        if new:  # a searched setting decides the data
            self.federations |= check_trials(new, self.sweep)
        if trials and not self._on_ray:
            from rayfed.sweeps.on_tune import on_ray

            ray.enter_context(on_ray([*self.checked, *trials]))  # once for all stages
            self._on_ray = True
        run_trials(trials, self.sweep, self.out, self.federations, log)

    def _write(self, log: SweepLog) -> SearchState:
        """Computes the state; writes it to the log and to search.jsonl."""
        state = self.state()
        log.set_trials(state.trials)
        atomic_write(self.out / SEARCH_FILE, "".join(f"{to_line(line)}\n" for line in state.lines))
        return state


def read_search(out: Path) -> list[dict[str, Any]]:
    """The lines of the directory's search.jsonl; none if there is no such file. UserError if it is damaged."""
    path = out / SEARCH_FILE
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is no mapping")
    except ValueError as error:
        raise UserError(f"--resume: {path} is damaged ({error}); choose another --out") from None
    return lines


def trials_to_run(out: Path, trials: Sequence[Trial]) -> list[Trial]:
    """The trials that have not ended, and those that failed. Removes the outcomes of the latter."""
    missing = []
    for trial in trials:
        outcome = read_outcome(out, trial)
        if outcome is None or outcome.status == "failed":
            outcome_file(out, trial).unlink(missing_ok=True)
            missing.append(trial)
    return missing


def run_trials(
    trials: Sequence[Trial], sweep: Sweep, out: Path, federations: Mapping[str, Federation], log: SweepLog
) -> None:
    """Runs the trials on Ray Tune. Without trials, Ray is not even imported."""
    if trials:
        from rayfed.sweeps.on_tune import run_on_tune

        run_on_tune(trials, sweep, out, federations, log)
