"""Population Based Training over real runs: a generation is a stage (see `rayfed.sweeps.stages`).

A member of a generation is a run directory of its own, `g03-m05`, that starts from the last checkpoint of whom it
continues (`continues.json` there says whom, see `rayfed.sweeps.warm_start`); its metrics and bytes include those rounds. All
have the file's seed: the same data, cohorts and starts, so that settings are compared and nothing else. Schedules are
constant (after the file's own warm-up): it is the population that changes rates.

Once a generation has ended, search.jsonl holds its figures, and by these a resumed search decides again: a failed
member that succeeds when it is tried again changes no decision that was made without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rayfed.config.search import PbtSettings
from rayfed.config.sweep import Sweep
from rayfed.errors import UserError
from rayfed.sweeps.evolve import Member, evolve, founders
from rayfed.sweeps.plan import Trial, check_trials, make_trials
from rayfed.sweeps.space import Point, corners, text
from rayfed.sweeps.stages import SEARCH, SearchState, StagedSearch, read_search
from rayfed.sweeps.table import TrialRow, reported, spread
from rayfed.sweeps.warm_start import check_carrying
from rayfed.tracking import Table


class PopulationSearch(StagedSearch):
    """Plans, checks and runs the search of a sweep in the directory ``out``. UserError where something is wrong."""

    def __init__(self, settings: dict[str, Any], sweep: Sweep, out: Path) -> None:
        super().__init__(settings, sweep, out)
        assert isinstance(sweep.search, PbtSettings)
        self.search = sweep.search
        ends = [self._point(point.overrides, self.search.rounds) for point in corners(sweep, {})]
        self.checked = make_trials(settings, ends, ["check"] * len(ends))
        (whole,) = make_trials(settings, [Point({}, {})], ["check"])
        rounds = whole.experiment.server.rounds
        if rounds % self.search.rounds or rounds < 2 * self.search.rounds:
            raise UserError(
                f"server.rounds: got {rounds}, but it should be two or more generations of "
                f"sweep.search.rounds={self.search.rounds}"
            )
        check_carrying(whole.experiment, sweep.parameters)
        self.federations = check_trials(self.checked, sweep)
        self.seed, self.cohort = whole.experiment.seed, whole.experiment.server.cohort
        self.source = whole.experiment.data.source
        self.generations = rounds // self.search.rounds
        self.told: list[TrialRow] = [line for line in read_search(out) if "generation" in line]
        self.members: list[Member] = []  # the newest generation
        self.stand()  # the directory was made with these settings, or it is refused

    def stand(self) -> SearchState:
        known: list[Trial] = []
        now: list[Trial] = []
        members = founders(self.search, self.sweep.parameters, self.seed)
        ended = None
        while ended is None:
            generation = members[0].generation
            before = generation <= len(self.told)
            if before:
                self._check(members)
            trials = [self.trial(member) for member in members]
            known += trials
            missing = [trial for trial in trials if not self.ended(trial)]
            now += missing
            if not before:
                if missing:
                    break
                self.told.append(self._told(members))
            figures = [line["told"] for line in self.told[generation - 1]["members"]]
            if all(figure is None for figure in figures):
                ended = "no member has a finite metric"
            elif generation == self.generations:
                ended = f"all of {generation} generations"
            else:
                members = evolve(members, figures, self.search, self.sweep.parameters, self.sweep.mode, self.seed)
        lines = list(self.told)
        if now:
            ended = None
        elif ended:
            lines.append(self._found(members) | {"ended": ended, **self._work(len(known))})
        self.members = members
        stage = f"generation {members[0].generation} of {self.generations}"
        return SearchState(known, now, stage, ended, self._verdict(members), lines)

    def trial(self, member: Member) -> Trial:
        """The member's trial: as many rounds as it and those in its line have, together."""
        point = self._point(member.settings, member.generation * self.search.rounds)
        return self.make(member.name, point, member.parent.name if member.parent else None)

    def _point(self, settings: Any, rounds: int) -> Point:
        fixed = {f"{side}.schedule.kind": "constant" for side in ("client", "server")} | {"eval.controls": False}
        return Point({**settings, "server.rounds": rounds, **fixed}, dict(settings))

    def _check(self, members: Sequence[Member]) -> None:
        """UserError where an earlier start of the search came to another generation."""
        generation = members[0].generation
        line = self.told[generation - 1]
        before = [{k: v for k, v in one.items() if k != "told"} for one in line["members"]]
        if line["metric"] != self.sweep.metric:
            raise UserError(
                f"--resume: {self.out / SEARCH} has figures of {line['metric']}, but what it is resumed with compares "
                f"{self.sweep.metric}; choose another --out"
            )
        if before != [described(member) for member in members]:
            raise UserError(
                f"--resume: {self.out / SEARCH} has another generation {generation} than these settings lead to; "
                "resume with the sweep's own sweep.yaml or choose another --out"
            )

    def _told(self, members: Sequence[Member]) -> TrialRow:
        figures = [self.line(self.trial(member)).get("metric") for member in members]
        told = [described(member) | {"told": figure} for member, figure in zip(members, figures)]
        return {"generation": members[0].generation, "metric": self.sweep.metric, "members": told}

    def _best(self, members: Sequence[Member]) -> Member | None:
        """Of these the one with the best figure, the first of equals; None where there is no figure."""
        sign = 1 if self.sweep.mode == "max" else -1
        figures = [self.line(self.trial(member)).get("metric") for member in members]
        finite = [(sign * figure, member) for member, figure in zip(members, figures) if figure is not None]
        return max(finite, key=lambda pair: pair[0], default=(0, None))[1]

    def _found(self, members: Sequence[Member]) -> TrialRow:
        """The best member, and which settings it had in which rounds."""
        best = self._best(members)
        if best is None:
            return {"best": None}
        rounds = self.search.rounds
        schedule = [
            {"rounds": [(own.generation - 1) * rounds + 1, own.generation * rounds], "trial": own.name, **own.settings}
            for own in best.line
        ]
        return {"best": best.name, "metric": self.line(self.trial(best)).get("metric"), "schedule": schedule}

    def _work(self, trials: int) -> TrialRow:
        rounds = trials * self.search.rounds
        return {"rounds": rounds, "client_rounds": rounds * self.cohort}

    def _verdict(self, members: Sequence[Member]) -> str:
        best = self._best(members)
        if best is None:
            return f"{len(members)} members in generation {members[0].generation}"
        return f"best is {best.name} with {self.sweep.metric} " + spread(
            self.line(self.trial(best)).get("metric"), None, self.sweep.metric
        )

    def table(self, trials: Sequence[Trial], lines: Sequence[TrialRow], sweep: Sweep) -> Table:
        """A row a member of the newest generation, with the settings it and those it continues had, in that order."""
        by_name = dict(zip((trial.name for trial in trials), lines, strict=True))
        report = reported(sweep, self.source)
        measured = [("metric", sweep.metric), *([("report", report)] if report else [])]
        best = self._best(self.members)
        rows = []
        for member in self.members:
            line = by_name.get(member.name)
            if line is None:
                continue
            state = "best" if member is best else ""
            size = line.get("bytes")
            rows.append(
                (
                    member.name,
                    *(_history(member, key) for key in sweep.parameters),
                    ", ".join(own.parent.name for own in member.line if own.parent and copied(own)),
                    *(spread(line.get(figure), None, key) for figure, key in measured),
                    "-" if size is None else f"{size / 1e6:.3f}",
                    state if line["status"] == "done" else line["status"],
                )
            )
        names = ("member", *sweep.parameters, "copied", *(key for _, key in measured), "MB both ways", "")
        return Table(f"Population Based Training: {self._verdict(self.members)}", names, tuple(rows))


def copied(member: Member) -> bool:
    """Whether it continues another member's checkpoint."""
    return member.parent is not None and member.parent.number != member.number


def described(member: Member) -> dict[str, Any]:
    """The member as plain values."""
    parent = member.parent.name if member.parent else None
    return {"trial": member.name, "from": parent, "settings": dict(member.settings)}


def _history(member: Member, key: str) -> str:
    """`0.01 x 2 -> 0.012`: the setting in each generation, how often in a row."""
    runs = [(value, len(list(same))) for value, same in groupby(text(own.settings[key]) for own in member.line)]
    return " -> ".join(value if count == 1 else f"{value} x {count}" for value, count in runs)
