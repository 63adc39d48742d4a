"""What every search has in common: trials in stages on Ray Tune, decisions replayed from the sweep's directory.

Why stages and no searcher or scheduler of Tune's: these wait where a stage ends anyway, and they have a memory of their
own, where here the directory is the truth. A search says where it stands (`SearchState`), as a function of its settings and
of what is on the disk; what is missing of the stage that is under way runs, and it is asked again. So nothing depends
on which trial ended first, and a search that was killed comes to the same decisions and repeats no finished trial. The
price is that every stage starts its trials' processes anew (Ray itself only once).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayfed.config.sweep import Sweep
from rayfed.errors import UserError
from rayfed.files import atomic_write
from rayfed.sweeps.log import SweepLog, run_trials, to_run
from rayfed.sweeps.plan import Trial, check_trials, make_trials
from rayfed.sweeps.space import Point
from rayfed.sweeps.table import TrialRow, line_of
from rayfed.sweeps.trial import outcome
from rayfed.tasks.data.federation import Federation
from rayfed.tracking import Table
from rayfed.tracking.jsonl import to_line

SEARCH = "search.jsonl"


@dataclass(frozen=True)
class SearchState:
    """How far a search has come.

    ``trials``: all that are known, in order. ``now``: those of the stage under way, ended or not; ``stage`` is what it
    is called. ``ended``: why the search is over, None as long as it is not; ``last`` are trials that still follow then.
    ``verdict``: what it found so far, in words. ``lines``: those of search.jsonl.
    """

    trials: Sequence[Trial]
    now: Sequence[Trial]
    stage: str
    ended: str | None
    verdict: str
    lines: Sequence[Mapping[str, Any]]
    last: Sequence[Trial] = ()


class StagedSearch(ABC):
    """A search of a sweep in the directory ``out``: `stand` and `table` are its own, the rest is the same for all.

    Whoever derives from it checks its settings when it is made (UserError before anything starts) and leaves in
    ``checked`` trials that ask Ray for all that any trial may ask for, in ``federations`` the data of the sweep.
    """

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        self.settings, self.sweep, self.out = settings, sweep, out
        self.checked: list[Trial] = []
        self.federations: dict[str, Federation] = {}
        self.tried: set[str] = set()  # by this process: what failed before it is tried again
        self.made: dict[str, Trial] = {}
        self._done: dict[str, TrialRow] = {}  # lines of finished trials, which never change again
        self.on_ray = False

    @abstractmethod
    def stand(self) -> SearchState:
        """The search as far as the directory tells it."""

    @abstractmethod
    def table(self, trials: Sequence[Trial], lines: Sequence[TrialRow], sweep: Sweep) -> Table:
        """The table of the sweep; ``lines`` are the trials' lines of sweep.jsonl."""

    def run(self, books: SweepLog) -> None:
        """Runs what is missing, stage by stage, to the end of the search."""
        with ExitStack() as ray:
            while (at := self._write(books)).ended is None:
                todo = self._to_run(at.now)
                if not todo:
                    return  # something has no record although it ran: the sweep is not finished
                books.say(f"search {self.out}: {at.stage}, to run: {', '.join(trial.name for trial in todo)}")
                self._run(todo, books, ray)
            books.say(f"search: {at.verdict}: {at.ended}")
            if at.last:
                self._run(self._to_run(at.last), books, ray)
                self._write(books)

    def make(self, name: str, point: Point, continues: str | None = None) -> Trial:
        """The trial of that name, made once; UserError where its settings are wrong."""
        if name not in self.made:
            (trial,) = make_trials(self.settings, [point], [name])
            self.made[name] = replace(trial, continues=continues)
        return self.made[name]

    def ended(self, trial: Trial) -> bool:
        """Whether it has a record; a failed trial counts as ended only once this process has tried it."""
        if trial.name in self._done:
            return True
        known = outcome(self.out, trial)
        return known is not None and (known.status != "failed" or trial.name in self.tried)

    def line(self, trial: Trial) -> TrialRow:
        """The trial's line of sweep.jsonl."""
        line = self._done.get(trial.name) or line_of(self.out, trial, self.sweep)
        if line["status"] == "done":
            self._done[trial.name] = line
        return line

    def _to_run(self, trials: Sequence[Trial]) -> list[Trial]:
        todo = to_run(self.out, [trial for trial in trials if trial.name not in self.tried])
        self.tried |= {trial.name for trial in todo}
        return todo

    def _run(self, trials: Sequence[Trial], books: SweepLog, ray: ExitStack) -> None:
        new = [trial for trial in trials if trial.data not in self.federations]
        if new:  # data that a drawn setting decides
            self.federations |= check_trials(new, self.sweep)
        if trials and not self.on_ray:
            from rayfed.sweeps.on_tune import on_ray

            ray.enter_context(on_ray([*self.checked, *trials]))  # not anew for every stage
            self.on_ray = True
        run_trials(trials, self.sweep, self.out, self.federations, books)

    def _write(self, books: SweepLog) -> SearchState:
        """Brings the books and search.jsonl up to date with the directories."""
        at = self.stand()
        books.know(at.trials)
        atomic_write(self.out / SEARCH, "".join(f"{to_line(line)}\n" for line in at.lines))
        return at


def read_search(out: Path) -> list[dict[str, Any]]:
    """The lines of the directory's search.jsonl; none where there is no such file. UserError where it is damaged."""
    path = out / SEARCH
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is no mapping")
    except ValueError as error:
        raise UserError(f"--resume: {path} is damaged ({error}); choose another --out") from None
    return lines
